"""silero-vad: when somebody speaks."""

from __future__ import annotations

from typing import Any

import silero_vad
import torch
from shown import show
from sounds import RATE, recording


def listen() -> tuple[Any, Any]:
    audio = torch.from_numpy(recording())
    model = silero_vad.load_silero_vad(onnx=True)
    spoken = silero_vad.get_speech_timestamps(audio, model, sampling_rate=RATE)
    model.reset_states()
    # Kept until the end: every chunk's results must stay what they were.
    chunks = [model(chunk, RATE) for chunk in audio.split(512) if len(chunk) == 512]
    batch = model(audio[: 512 * 8].reshape(8, 512), RATE)
    slow = [model(chunk, 8000) for chunk in audio[::2].split(256)[:20]]
    forward = model.audio_forward(audio[None, :RATE], RATE)
    iterator = silero_vad.VADIterator(model)
    events = [iterator(chunk) for chunk in audio.split(512) if len(chunk) == 512]
    return [spoken, [event for event in events if event], chunks, batch, slow, forward], model


if __name__ == "__main__":
    show(listen)
