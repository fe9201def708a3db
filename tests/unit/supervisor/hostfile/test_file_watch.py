"""A file that is watched: every way in which its content changes, and what changes nothing."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnx_dl.supervisor.hostfile.file_watch import FileWatch
from tests.support.waiting import DEADLINE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "host.toml"
    path.parent.mkdir()
    path.write_text("a = 1")
    return path


@pytest.fixture
def watch(file: Path) -> Iterator[FileWatch]:
    watch = FileWatch(file)
    yield watch
    watch.close()


def told(watch: FileWatch, timeout: float = 0) -> bool:
    """Whether a poller would be woken."""
    return bool(select.select([watch.fileno()], [], [], timeout)[0])


def seen(watch: FileWatch) -> bool:
    """What a supervisor does: waits for the descriptor, then asks; and then nothing is left to read."""
    assert told(watch, DEADLINE), "no event"
    changed = watch.changed()
    assert not told(watch) and not watch.changed()
    return changed


def replace(path: Path, text: str) -> None:
    other = path.with_name("other")
    other.write_text(text)
    other.replace(path)


def point(link: Path, target: str) -> None:
    """As Kubernetes does it: the new link is made beside the old one and renamed over it."""
    other = link.with_name("..tmp")
    other.symlink_to(target)
    other.replace(link)


def test_nothing_happens(watch):
    assert not told(watch) and not watch.changed()


def test_rewrite_in_place(watch, file):
    file.write_text("a = 2")
    assert seen(watch)


def test_what_is_half_written_is_not_looked_at(watch, file):
    with file.open("w") as writing:
        writing.write("a = ")
        writing.flush()
        assert not told(watch)
        (file.parent / "unrelated").write_text("")
        assert not watch.changed()
        writing.write("2")
    assert seen(watch)


def test_a_new_file_is_looked_at_when_it_is_written(watch, file):
    file.unlink()
    with file.open("w") as writing:
        assert not watch.changed()
        writing.write("a = 2")
    assert seen(watch)


def test_rename_over(watch, file):
    replace(file, "a = 2")
    assert seen(watch)
    replace(file, "a = 3")
    assert seen(watch)


def test_hard_link_under_the_name(watch, file):
    other = file.with_name("other")
    other.write_text("a = 2")
    file.unlink()
    file.hardlink_to(other)
    assert seen(watch)


@pytest.mark.parametrize("write", [Path.write_text, replace])
def test_equal_content_is_no_change(watch, file, write):
    write(file, "a = 1")
    assert not seen(watch)
    write(file, "a = 2")
    assert seen(watch)


def test_unrelated_files(watch, file):
    for name in ("host.toml~", ".host.toml.swp", "other"):
        (file.parent / name).write_text("b")
    (file.parent / "more").mkdir()
    assert told(watch)
    before = os.stat(file).st_atime_ns
    assert not watch.changed() and not told(watch)
    assert os.stat(file).st_atime_ns == before


def test_deleted_and_made_again(watch, file):
    file.unlink()
    assert not watch.changed()
    file.write_text("a = 1")
    assert not seen(watch)
    file.unlink()
    file.write_text("a = 2")
    assert seen(watch)


def test_moved_away_and_another_in_its_place(watch, file):
    """As editors do that keep a copy."""
    file.rename(file.with_name("host.toml~"))
    file.write_text("a = 2")
    assert seen(watch)


def test_config_map(tmp_path):
    for number in (1, 2):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "host.toml").write_text(f"a = {number}")
    (tmp_path / "..data").symlink_to("..1")
    file = tmp_path / "host.toml"
    file.symlink_to("..data/host.toml")
    watch = FileWatch(file)
    point(tmp_path / "..data", "..2")
    assert seen(watch)
    (tmp_path / "..1" / "host.toml").write_text(
        "a = 3"
    )  # the old one does not count any more, the new one does
    assert not told(watch)
    (tmp_path / "..2" / "host.toml").write_text("a = 4")
    assert seen(watch)
    watch.close()


def test_a_link_to_elsewhere(tmp_path, file):
    link = tmp_path / "link"
    link.symlink_to(file)
    watch = FileWatch(link)
    file.write_text("a = 2")
    assert seen(watch)
    other = tmp_path / "other"
    other.write_text("a = 3")
    link.unlink()
    link.symlink_to("other")  # made where it is, not renamed
    assert seen(watch)
    other.write_text("a = 4")
    assert seen(watch)
    watch.close()


def test_a_folder_that_is_a_link(tmp_path, file):
    """As with releases that are folders, and a link to the present one."""
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "host.toml").write_text("a = 2")
    current = tmp_path / "current"
    current.symlink_to("folder")
    watch = FileWatch(current / "host.toml")
    point(current, "next")
    assert seen(watch)
    watch.close()


def test_the_folder_is_made_again(watch, file):
    file.unlink()
    file.parent.rmdir()
    assert not seen(watch)
    file.parent.mkdir()
    assert not seen(watch)
    file.write_text("a = 2")
    assert seen(watch)


def test_the_folder_is_replaced(watch, file, tmp_path):
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "host.toml").write_text("a = 2")
    file.parent.rename(tmp_path / "before")
    (tmp_path / "next").rename(file.parent)
    assert seen(watch)
    (tmp_path / "before" / "host.toml").write_text("a = 3")
    assert not told(watch)


def test_a_file_that_is_not_there_yet(tmp_path):
    file = tmp_path / "a" / "b" / "host.toml"
    watch = FileWatch(file)
    (tmp_path / "a").mkdir()
    assert not seen(watch)
    (tmp_path / "a" / "b").mkdir()
    file.write_text("")
    assert seen(watch)
    watch.close()


def test_links_in_a_circle(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to(second)
    second.symlink_to(first)
    watch = FileWatch(first)
    second.unlink()
    second.write_text("a")
    assert seen(watch)
    watch.close()


def test_more_events_than_the_kernel_keeps(watch, file):
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip("the queue of this machine is too long to be filled")
    others = [file.parent / name for name in ("first", "second")]
    for number in range(most + 100):  # equal events in a row would be one
        others[number % 2].write_bytes(b"")
    file.write_text("a = 2")
    assert seen(watch)


def test_who_reads_it_on_request_says_so(watch, file):
    """A change that has no event, as on some network file systems, does not hide the way back."""
    with file.open("r+") as writing:
        writing.write("a = 2")
        writing.flush()
        assert not watch.changed()
        assert watch.changed(anyway=True)
        writing.seek(0)
        writing.write("a = 1")
    assert seen(watch)


def test_closing(file):
    watch = FileWatch(file)
    fd = watch.fileno()
    assert not os.get_inheritable(fd)
    watch.close()
    watch.close()
    assert watch.fileno() is None
    with pytest.raises(OSError):
        os.fstat(fd)


LIMITED = """
import os, resource, sys
from onnx_dl.supervisor.hostfile.file_watch import FileWatch
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
used = max(map(int, os.listdir("/proc/self/fd")))
resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
watch = FileWatch(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert watch.fileno() is None
assert watch.changed(), "its content was not known so far"
assert not watch.changed()
open(sys.argv[1], "w").write("other")
assert watch.changed(), "who asks is told nevertheless"
watch.close()
"""


def test_without_inotify(file):
    """What cannot be had is said, with what to do instead."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        f"onnx-dl: changes of {file} are not noticed: Too many open files. "
        "Send SIGHUP to make the host read it.\n"
    )
