"""The load cache: optimized models on disk, when they may be used, and who writes them.

Must know no lane; works on files and options alone.
"""
