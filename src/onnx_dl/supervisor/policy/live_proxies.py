"""Proxies that have used a model and are not closed, also while their models are unloaded."""

from __future__ import annotations


class LiveProxies:
    """The proxies of all clients, from their first use of a model until they are closed or collected."""

    def __init__(self) -> None:
        self._proxies: set[tuple[bytes, int]] = set()

    def __bool__(self) -> bool:
        return bool(self._proxies)

    def add(self, client: bytes, proxy: int) -> None:
        """Notes a use."""
        self._proxies.add((client, proxy))

    def remove(self, client: bytes, proxy: int) -> None:
        """Notes that a proxy is closed or collected."""
        self._proxies.discard((client, proxy))

    def forget_client(self, client: bytes) -> None:
        """Notes that a client is gone, with all its proxies."""
        self._proxies = {proxy for proxy in self._proxies if proxy[0] != client}
