"""The supervisor process: starts and ends workers, and tells clients about it.  It never sees a tensor."""
