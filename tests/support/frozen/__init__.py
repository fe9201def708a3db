"""A program for PyInstaller, and how it is built."""
