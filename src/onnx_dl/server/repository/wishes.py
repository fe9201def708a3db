"""Which models are to be served, by the model control and by what clients have asked for.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from onnx_dl.errors import ConfigError
from onnx_dl.server.options import ModelControl


class Wishes:
    """Names that clients want to be served.

    ``control``: of the server; ``always``: names that are served without a client's wish, until one unloads
    them.
    """

    def __init__(self, control: ModelControl, always: Collection[str]) -> None:
        self._is_explicit = control == "explicit"
        self._always = set(always)
        self._loaded: set[str] = set()
        self.unloaded: set[str] = set()
        """Names that clients have unloaded."""
        self.overrides: dict[str, str] = {}
        """Configurations that came with loads, as JSON, by model."""

    def begin(self, asked: Sequence[str], there: Collection[str]) -> None:
        """Notes what explicit control loads at the start; ``*``: all.

        Raises:
            ConfigError: there is no such model.
        """
        if not self._is_explicit:
            return
        if "*" in asked:
            if len(asked) > 1:
                raise ConfigError("'*' loads all models; it cannot be given with the names of models.")
            self._loaded = set(there)
        elif absent := sorted(set(asked) - set(there)):
            raise ConfigError(f"There is no model {', '.join(map(repr, absent))} to be loaded at the start.")
        else:
            self._loaded = set(asked)

    def load(self, name: str, override: str | None) -> None:
        """A client, or the start, loads a model."""
        self._loaded.add(name)
        self.unloaded.discard(name)
        self.overrides.pop(name, None)
        if override is not None:
            self.overrides[name] = override

    def unload(self, name: str) -> None:
        """A client unloads a model."""
        self._loaded.discard(name)
        self.unloaded.add(name)
        self.overrides.pop(name, None)

    def is_served(self, name: str) -> bool:
        """True if the model is to be served."""
        if name in self.unloaded:
            return False
        return not self._is_explicit or name in self._loaded or name in self._always

    def is_loaded_first(self, name: str) -> bool:
        """True if the model is loaded before it is served, because somebody asked for its load."""
        return self._is_explicit and name in self._loaded

    def is_followed(self, name: str) -> bool:
        """True if changes of its files are taken over without a client's request."""
        return not (self._is_explicit and self.is_served(name))
