"""Settings of the service, from environment variables.

Settings of onnx-dl (``ONNX_DL_MEMORY_LIMIT`` and others) are variables, too, and onnx-dl reads them itself.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path

MODELS = Path(__file__).with_name("models")


@dataclass(frozen=True)
class Settings:
    """The field ``detector_ttl`` is the variable ``DETECTOR_TTL``, and so on."""

    detector_model: str = str(MODELS / "detector.onnx")
    reader_model: str = str(MODELS / "reader.onnx")
    quality_model: str = str(MODELS / "quality.onnx")
    detector_ttl: float = -1.0
    """Seconds without use after which a model is unloaded; -1: it stays."""
    reader_ttl: float = 60.0
    quality_ttl: float = 0.0
    """0: it is unloaded after each use."""
    timeout: float = 5.0
    """Seconds that one request may take once its images are here."""
    batch_size: int = 4
    """Frames that the detector gets at once. A run needs about 11 MB for each frame."""
    max_images: int = 32
    """Images of one request."""
    max_request_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 25_000_000
    """Pixels of one image: a small file can hold a very large image."""
    max_active: int = 2
    """Requests that have their images in memory at a time; others wait for their turn. Together with
    ``batch_size`` this bounds the memory that runs need."""


def from_environment() -> Settings:
    """Read the variables; raises ValueError if one is no number where a number is needed."""
    given: dict[str, str | int | float] = {}
    for field in fields(Settings):
        if text := os.environ.get(field.name.upper()):
            given[field.name] = type(field.default)(text)  # type: ignore[call-arg]
    return Settings(**given)  # type: ignore[arg-type]
