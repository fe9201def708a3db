"""Models that run in the application's own process, with the life of isolated ones: TTL, unload, eviction.

Stands on the supervisor's decisions and the workers' engines.  Must know nothing of sockets and sessions.
"""
