"""Calls from asyncio: many at a time, without a thread for each, with a time limit."""

import asyncio

import numpy as np

from onnx_dl import InferenceSessionProxy, RunTimeout
from onnx_dl.demo.assets import load_samples, model_path


async def main() -> None:
    samples = load_samples()["digits"]
    digits = InferenceSessionProxy(model_path("digits"), ttl=60)
    await digits.aload()  # loads without blocking the event loop

    rows = np.split(samples.inputs, len(samples.inputs))
    answers = await asyncio.gather(*(digits.arun(None, {"pixels": row}, timeout=30) for row in rows))
    labels = np.concatenate([answer[0] for answer in answers])
    right = int((labels == samples.targets).sum())
    print(f"{right} of {len(rows)} right, in {len(rows)} calls at a time")

    try:
        await digits.arun(None, {"pixels": samples.inputs}, timeout=0)
    except RunTimeout as error:
        print("no time left:", type(error).__name__)


asyncio.run(main())
