"""faster-whisper's own voice detector, which keeps its session in a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from faster_whisper import vad
from shown import show
from sounds import recording


def listen() -> tuple[Any, Any]:
    audio = recording()
    spoken = vad.get_speech_timestamps(audio, vad.VadOptions(threshold=0.2))
    assert vad.get_vad_model() is vad.get_vad_model()
    padded = np.pad(audio, (0, -len(audio) % 512))
    chunks, kept = vad.collect_chunks(audio, spoken)
    return [spoken, vad.get_vad_model()(padded), kept, chunks], vad.get_vad_model()


if __name__ == "__main__":
    show(listen)
