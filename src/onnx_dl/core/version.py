"""Version of the package: the only place where it is written.  The build reads it."""

__version__ = "0.2.0.dev0"
