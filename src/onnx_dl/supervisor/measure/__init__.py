"""Memory of workers: measured by psutil and NVML, sampled in time, kept on disk.

Must not decide anything by it; ``policy`` does.
"""
