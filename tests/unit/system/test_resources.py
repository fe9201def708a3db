"""Processors and memory by affinity and cgroup, from files as kernels write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnx_dl.system import resources

HERE = len(os.sched_getaffinity(0))


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n1:name=systemd:/x\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, HERE),
        (V2, HERE),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000"}, HERE),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "100000 100000"}, 1),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "10000 100000"}, 1),
        (V2 | {"sys/fs/cgroup/a/cpu.max": "50000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 1),
        (
            V2 | {"sys/fs/cgroup/cpu.max": "100000 100000"},
            1,
        ),  # a container's own
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "nonsense"}, HERE),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "1000 0"}, HERE),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "99999999 100000"}, HERE),
        (V1 | {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1"}, HERE),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
    ],
)
def test_what_the_group_allows(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert resources.processors(tree(tmp_path, files)) == expected


@pytest.mark.skipif(HERE < 2, reason="needs two processors")
def test_a_part_of_a_processor_counts_as_one(tmp_path: Path) -> None:
    assert resources.processors(tree(tmp_path, V2 | {"sys/fs/cgroup/a/cpu.max": "110000 100000"})) == 2


@pytest.mark.skipif(HERE < 2, reason="needs two processors")
def test_affinity() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert resources.processors() == 1
        assert resources.fewer_processors() == 1 or os.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)


MEMINFO = {"proc/meminfo": "MemTotal:       1000 kB\nMemFree: 5 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 1_024_000),
        (MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": "max\n"}, 1_024_000),
        (MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": "5000\n"}, 5000),
        (
            MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": "5000\n", "sys/fs/cgroup/a/memory.max": "4000"},
            4000,
        ),
        (MEMINFO | V2 | {"sys/fs/cgroup/memory.max": "3000"}, 3000),
        (MEMINFO | V1 | {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2000"}, 2000),
        (MEMINFO | V1 | {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(2**63 - 4096)}, 1_024_000),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert resources.memory(tree(tmp_path, files)) == expected


def test_memory_of_this_machine() -> None:
    assert (resources.memory() or 0) > 64 << 20


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cgroup.controllers": "cpu memory"}, 2),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "1"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, 1),
    ],
)
def test_which_cgroups(tmp_path: Path, files: dict[str, str], version: int | None) -> None:
    assert resources.cgroup_version(tree(tmp_path, files)) == version


def test_what_the_machine_has_whatever_groups_allow(tmp_path: Path) -> None:
    root = tree(tmp_path, MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": "5000\n"})
    assert (resources.memory(root), resources.installed_memory(root)) == (5000, 1_024_000)
    assert resources.installed_memory(tmp_path / "nothing") is None
