"""Rights of callers: tokens with scopes, Host and Origin, certificates, and starts that are refused.

Knows neither protocol, no model and no socket.
"""
