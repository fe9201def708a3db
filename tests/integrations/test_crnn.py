"""A recogniser of text lines, run with an IOBinding from buffer to buffer as OCR packages do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.crnn import CHARACTERS, CPU, HEIGHT, WIDEST, Reader, lines, recogniser, text
from tests.support.onnx_values import attempt

pytestmark = pytest.mark.slow

WIDTHS = [160, 64, 640, 8, 161, 4, 320, 160]


@cache
def real() -> Any:
    return onnxruntime.InferenceSession(recogniser(), providers=CPU)


@pytest.fixture
def proxy(host: ModelHost) -> Any:
    return InferenceSessionProxy(recogniser(), providers=CPU, host=host)


def same(proxy: Any, act: Callable[[Any], Any]) -> Any:
    """That the same comes of it with both classes; and that."""
    expected = attempt(lambda: act(real()))
    assert attempt(lambda: act(proxy)) == expected
    return expected


@pytest.mark.parametrize("how", ["method", "class"])
def test_many_widths_through_the_same_buffers(proxy: Any, how: str) -> None:
    expected, reader = Reader(real(), how), Reader(proxy, how)
    read = []
    for width in WIDTHS:
        image = lines(width)
        assert reader.read(image).tobytes() == expected.read(image).tobytes()
        # What lies behind the result is nobody's to write to.
        assert reader.logs.tobytes() == expected.logs.tobytes()
        assert reader.texts(image) == expected.texts(image) == text(real().run(["logs"], {"image": image})[0])
        read += reader.texts(image)
    assert len(set(read)) == len(set(WIDTHS))
    assert len(read[2]) > 40
    assert np.isnan(reader.logs[WIDEST // 4 * len(CHARACTERS) :]).all()


def test_several_lines_at_a_time(proxy: Any) -> None:
    expected, reader = Reader(real()), Reader(proxy)
    for count, width in [(3, 160), (1, 320), (4, 640), (2, 80)]:
        image = lines(width, count)
        assert reader.read(image).tobytes() == expected.read(image).tobytes()
        assert len(set(reader.texts(image))) > 1 or count == 1


def test_what_is_bound_stays_bound(proxy: Any) -> None:
    """Only the pixels change: nothing is bound anew."""

    def act(session: Any) -> Any:
        reader, found = Reader(session), []
        for seed in range(5):
            reader.pixels[: HEIGHT * 160] = lines(160, seed=seed).ravel()
            if seed == 0:
                reader.read(lines(160))
            session.run_with_iobinding(reader.binding)
            found.append(reader.logs.copy())
        assert len({each.tobytes() for each in found}) == 5
        return found

    assert same(proxy, act)[0] == "result"


def test_results_that_a_run_allocates(proxy: Any) -> None:
    def act(session: Any) -> Any:
        found: list[Any] = []
        for width in WIDTHS:
            image, binding = lines(width), session.io_binding()
            binding.bind_input("image", "cpu", 0, np.float32, image.shape, image.ctypes.data)
            binding.bind_output("last")
            binding.bind_output("logs", "cpu")
            session.run_with_iobinding(binding)
            last, logs = binding.get_outputs()
            found += [last.numpy(), logs.numpy(), logs.shape(), logs.data_type(), logs.device_name()]
            found += binding.copy_outputs_to_cpu()
        return found

    assert same(proxy, act)[0] == "result"


def test_one_binding_cleared_between_widths(proxy: Any) -> None:
    def act(session: Any) -> Any:
        binding, found = session.io_binding(), []
        for width in WIDTHS:
            image = lines(width)
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
            binding.bind_cpu_input("image", image)
            binding.bind_output("logs")
            session.run_with_iobinding(binding)
            found.append(binding.copy_outputs_to_cpu()[0])
        return [*found, [text(logs) for logs in found]]  # none wrote to another's

    assert same(proxy, act)[0] == "result"


def test_values_for_buffers(proxy: Any) -> None:
    def act(session: Any) -> Any:
        binding, found = session.io_binding(), []
        for width in WIDTHS:
            image = onnxruntime.OrtValue.ortvalue_from_numpy(lines(width))
            logs = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [width // 4, 1, len(CHARACTERS)], np.float32
            )
            binding.bind_ortvalue_input("image", image)
            binding.bind_ortvalue_output("logs", logs)
            session.run_with_iobinding(binding)
            found.append(logs.numpy())
        return found

    assert same(proxy, act)[0] == "result"


@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "allocated"])
@pytest.mark.parametrize("width", [164, 156])
def test_an_output_of_the_width_before(proxy: Any, buffer: bool, width: int) -> None:
    """Bound for 160 pixels, or allocated for them, and not bound anew: what the real class makes of it."""

    def act(session: Any) -> Any:
        binding, logs, found = session.io_binding(), np.zeros(WIDEST * 100, np.float32), []
        if buffer:
            binding.bind_output("logs", "cpu", 0, np.float32, [40, 1, len(CHARACTERS)], logs.ctypes.data)
        else:
            binding.bind_output("logs")
        for each in (160, width, 160):
            image = lines(each)
            binding.bind_input("image", "cpu", 0, np.float32, image.shape, image.ctypes.data)
            found.append(attempt(lambda: session.run_with_iobinding(binding)))
            found.append(attempt(binding.copy_outputs_to_cpu))
        return [*found, logs]

    kind, _ = same(proxy, act)
    assert kind == "result"


def test_a_width_that_the_buffer_is_not_meant_for(proxy: Any) -> None:
    """A model refuses an image of two rows; the binding is as good as before then."""

    def act(session: Any) -> Any:
        reader, image = Reader(session), lines(160)
        found = [reader.texts(image), attempt(lambda: reader.read(image[:, :, :2]))]
        return [*found, reader.texts(image), reader.logs]

    kind, _ = same(proxy, act)
    assert kind == "result"


def test_threads_with_a_binding_each(proxy: Any) -> None:
    images = [lines(width, seed=seed) for seed in range(6) for width in WIDTHS]
    expected = [text(real().run(["logs"], {"image": image})[0])[0] for image in images]

    def work(_: int) -> list[str]:
        reader = Reader(proxy)
        return [reader.texts(image)[0] for image in images]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [expected] * 3


PATCHED = """
import sys
import onnx_dl, onnxruntime
from onnxruntime import IOBinding, InferenceSession
from tests.support.crnn import CPU, Reader, lines
if "patched" in sys.argv:
    onnx_dl.patch(ttl=60)
session = InferenceSession(sys.argv[1], providers=CPU)
for how in "method", "class":
    reader = Reader(session, how)
    assert isinstance(reader.binding, IOBinding)
    for width in map(int, sys.argv[2].split(",")):
        print(width, reader.texts(lines(width)), reader.logs.tobytes().hex()[: width * 400])
    reader.binding.clear_binding_outputs()
    reader.binding.bind_output("logs")
    session.run_with_iobinding(reader.binding)
    print(*(value.numpy().tobytes().hex() for value in reader.binding.get_outputs()))
if "patched" in sys.argv:
    assert onnx_dl.unpatched_report() == []
    assert [model.pid for model in onnx_dl.default_host().snapshot().models if model.pid]
"""


def test_patched(tmp_path: Path) -> None:
    path = tmp_path / "crnn.onnx"
    path.write_bytes(recogniser())
    plain, patched = (
        subprocess.run(
            [sys.executable, "-c", PATCHED, path, ",".join(map(str, WIDTHS)), mode],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        for mode in ("plain", "patched")
    )
    assert (plain.returncode, plain.stderr) == (0, "")
    assert (patched.returncode, patched.stderr) == (0, "")
    assert patched.stdout == plain.stdout
    assert len(plain.stdout.splitlines()) == 2 * (len(WIDTHS) + 1)
