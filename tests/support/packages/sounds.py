"""Half a second of noise and a second of what passes for a voice, three times."""

from __future__ import annotations

import numpy as np

RATE = 16000


def recording() -> np.ndarray:
    random = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    pitch = np.cumsum(120 + 20 * np.sin(2 * np.pi * 2 * time)) / RATE
    tones = [
        np.exp(-(((120 * k - formant) / 150) ** 2)) * np.sin(2 * np.pi * k * pitch)
        for k in range(1, 30)
        for formant in (600, 1200, 2500)
    ]
    voice = 0.2 * np.sum(tones, axis=0) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time))
    silence = random.normal(size=RATE // 2) * 1e-4
    return np.concatenate([silence, voice] * 3 + [silence]).astype(np.float32)
