"""Memory that was mapped by parts, as torch's expandable segments are: it goes to workers by descriptors.

Against stand-ins for CUDA's driver and for a session with the CUDA provider.
``tests/gpu`` has what needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

from tests.session.test_device_handles import COPIES, counted, log, on_gpu

__all__ = ["log"]

SEGMENT = """
base = cuda.reserve(1 << 20)
for place in range(4):
    cuda.map_part(base + place * 4096, 4096)
x = np.arange(1500, dtype=np.float32)  # 6000 bytes
source, target = base + 3000, base + 9800  # in three parts and in two, of which one is the same
binding.bind_input("x", "cuda", 0, np.float32, x.shape, source)
binding.bind_output("y", "cuda", 0, np.float32, x.shape, target)

def run(factor):
    cuda.write(source, (x * factor).tobytes())
    proxy.run_with_iobinding(binding)
    assert floats(target, len(x)) == (x * factor).tolist()
"""
IMPORT, MAP, UNMAP = "cuMemImportFromShareableHandle", "cuMemMap", "cuMemUnmap"


def test_a_tensor_in_several_parts_is_one_for_the_worker(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        SEGMENT
        + """
for factor in 1, 3, 5:
    run(factor)
proxy.unload()
run(7)
del binding
assert told == [] and cuda.misuses == 0 and cuda.parts == 4
""",
    )
    count = counted(calls)
    assert count.keys() & COPIES == set()
    assert count[IMPORT] == 10  # three parts and two, in two workers


def test_a_part_that_is_mapped_anew_is_noticed(folder: Path, log: Path) -> None:
    on_gpu(
        folder,
        log,
        SEGMENT
        + """
run(1)
for part in 0, 2:
    cuda.unmap_part(base + part * 4096, 4096)
    cuda.map_part(base + part * 4096, 4096)
    run(part + 2)
    run(part + 3)
cuda.unmap_part(base + 4096, 4096)
assert "beyond its allocation" in refused(proxy.run_with_iobinding, binding)
assert told == [] and cuda.misuses == 0
""",
    )


def test_what_nothing_names_is_given_back(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        SEGMENT
        + f"""
from pathlib import Path
from tests.support.fake_cuda import calls
unmapped = lambda: [call.result for call in calls(Path({str(log)!r})) if call.function == {UNMAP!r}]
run(1)
binding.bind_input("x", "cuda", 0, np.float32, x.shape, target)
proxy.run_with_iobinding(binding)
proxy.run_with_iobinding(binding)
assert unmapped() == [0] * 3  # what was the input
binding.clear_binding_inputs()
binding.clear_binding_outputs()
proxy.run(None, {{"x": x}})
assert unmapped() == [0] * 5
for part in range(4):
    cuda.unmap_part(base + part * 4096, 4096)
assert cuda.parts == 0, "this process holds no handle"
assert told == [] and cuda.misuses == 0
""",
    )
    assert all(not call.result for call in calls if call.function == UNMAP)


def test_parts_that_the_driver_does_not_tell_are_copied(folder: Path, log: Path) -> None:
    for reason in ("reserved", "refuse", "refuse-open"):
        calls = on_gpu(
            folder,
            log,
            SEGMENT
            + """
run(1)
run(2)
(text,) = told
assert text.startswith("Tensors on the GPU are copied through main memory, because "), text
assert cuda.misuses == 0
""",
            IPC=reason,
        )
        assert counted(calls).keys() >= COPIES


def test_a_tensor_in_more_parts_than_a_message_has_room_for_is_copied(folder: Path, log: Path) -> None:
    on_gpu(
        folder,
        log,
        """
base = cuda.reserve(1 << 20)
for place in range(100):
    cuda.map_part(base + place * 4096, 4096)
x = np.arange(40_000, dtype=np.float32)  # 40 parts
cuda.write(base, x.tobytes())
binding.bind_input("x", "cuda", 0, np.float32, x.shape, base)
binding.bind_output("y", "cuda", 0, np.float32, x.shape, base + 50 * 4096)
for _ in range(2):
    proxy.run_with_iobinding(binding)
    assert floats(base + 50 * 4096, len(x)) == x.tolist()
(text,) = told
assert "too many parts" in text, text
assert cuda.misuses == 0
""",
    )
