"""Hosts that follow a file: models by name, limits, and what a change of it does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_dl import (
    ConfigError,
    EventType,
    InferenceSessionProxy,
    ModelHost,
    ModelState,
    ModelStatus,
    SupervisorStartError,
)
from tests.contract.both import CPU, F, model, node, tensor
from tests.support.waiting import eventually, wait_for

pytestmark = pytest.mark.slow

X = np.full((1, 3), 5, np.float32)
Opened = Callable[..., ModelHost]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for op in ("Neg", "Abs", "Sqrt"):
        made = model([node(op, ["x"], ["y"])], [tensor("x", F, [1, 3])], [tensor("y", F, [1, 3])])
        (tmp_path / f"{op}.onnx").write_bytes(made)
    return tmp_path / "host.toml"


@pytest.fixture
def following(nothing_is_left_behind: None, file: Path) -> Iterator[Opened]:
    hosts: list[ModelHost] = []

    def make(text: str, **arguments: Any) -> ModelHost:
        file.write_text(text)
        hosts.append(ModelHost(config=file, **arguments))
        hosts[-1].start()
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


def value(proxy: InferenceSessionProxy) -> float:
    return float(proxy.run(None, {"x": X})[0][0, 0])


def statuses(host: ModelHost) -> dict[str, ModelStatus]:
    return {os.path.basename(status.model): status for status in host.snapshot().models}


NEG = '[models.negate]\npath = "Neg.onnx"\n'


def test_a_model_by_its_name(following: Opened) -> None:
    host = following(NEG + 'ttl = "5m"\npriority = 3\npin = true\noptions = {intra_op_num_threads = 2}')
    proxy = host.open("negate")
    assert value(proxy) == -5
    assert proxy.ttl == 300
    assert proxy.get_session_options().intra_op_num_threads == 2
    status = statuses(host)["Neg.onnx"]
    assert (status.ttl, status.priority, status.pinned, status.leases) == (300, 3, True, 2)
    proxy.close()  # the host holds it, too
    assert statuses(host)["Neg.onnx"].leases == 1
    longer = host.open("negate", ttl=900)
    assert value(longer) == -5
    assert statuses(host)["Neg.onnx"].ttl == 900


def test_who_asks_the_host_to_hold_it_otherwise_has_the_last_word(following: Opened, file: Path) -> None:
    host = following(NEG + "ttl = 60")
    negate = host.open("negate")
    assert value(negate) == -5
    assert host.adopt("negate").ttl == 60
    assert not host.adopt("negate", ttl=600).pinned
    status = host.adopt("negate", ttl=900, pin=True, priority=2)
    assert (status.ttl, status.pinned, status.priority) == (900, True, 2)
    file.write_text(NEG + "ttl = 90")
    eventually(lambda: statuses(host)["Neg.onnx"].ttl == 90, "the file's next word counts")


def test_names_that_there_are_not(following: Opened) -> None:
    host = following(NEG)
    with pytest.raises(ConfigError, match=r"no model of that name in .*host\.toml; it has: negate"):
        host.open("neagte")
    with pytest.raises(ConfigError, match="providers: the host's file says how"):
        host.open("negate", providers=CPU)
    with ModelHost() as other, pytest.raises(Exception, match="NO_SUCHFILE"):
        other.open("negate")


def test_what_is_eager_is_loaded_without_anybody(following: Opened) -> None:
    host = following(NEG + 'eager = true\n[models.other]\npath = "Abs.onnx"')
    eventually(lambda: statuses(host)["Neg.onnx"].state is ModelState.READY, "it is loaded")
    assert statuses(host).keys() == {"Neg.onnx"}
    assert host.unload("Neg.onnx") is False  # a path of this directory, which is another
    (name,) = [status.model for status in host.snapshot().models]
    assert host.unload(name) is True
    assert not host.snapshot().models


def test_a_group(following: Opened) -> None:
    host = following(
        NEG + 'group = "g"\nttl = 50\n[models.absolute]\npath = "Abs.onnx"\ngroup = "g"\nttl = 70\npin = true'
    )
    assert value(host.open("negate")) == -5
    (status,) = host.snapshot().models
    assert len(status.members) == 2
    assert (status.ttl, status.pinned) == (70, True)
    assert value(host.open("absolute")) == 5
    assert host.snapshot().models[0].pid == status.pid


def test_a_model_is_warmed_up(following: Opened, file: Path) -> None:
    """The first call draws the second number of the model's sequence: one run was made before."""
    drawn = model(
        [node("RandomUniform", [], ["r"], seed=7.0, shape=[1]), node("Add", ["x", "r"], ["y"])],
        [tensor("x", F, [1, 3])],
        [tensor("y", F, [1, 3])],
    )
    (file.parent / "Draw.onnx").write_bytes(drawn)
    text = '[models.{0}]\npath = "Draw.onnx"\nmax_runs = {1}\n'
    warm = "warmup = {x = {shape = [1, 3], fill = 5}}\n"
    host = following(text.format("cold", 8) + text.format("warm", 9) + warm)
    cold = host.open("cold")
    assert value(cold) != (second := value(cold))
    assert value(host.open("warm")) == second


def test_a_file_that_cannot_be(following: Opened) -> None:
    with pytest.raises(SupervisorStartError, match=r'host\.toml, line 3: models\.negate\.ttl = "fast"'):
        following(NEG + 'ttl = "fast"')


def test_limits_and_who_has_the_last_word(following: Opened) -> None:
    assert following('memory_limit = "3GiB"').snapshot().memory_limit == 3 << 30
    assert following('memory_limit = "3GiB"', memory_limit="2GiB").snapshot().memory_limit == 2 << 30


def test_the_environment_names_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('memory_limit = "3GiB"\n' + NEG)
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("ONNX_DL_CONFIG", "host.toml")
    with ModelHost() as host:
        assert value(host.open("negate")) == -5
        assert host.snapshot().memory_limit == 3 << 30


def test_a_limit_that_is_lowered_while_models_are_loaded(following: Opened, file: Path) -> None:
    host = following('memory_limit = "1GiB"\n' + NEG + '[models.absolute]\npath = "Abs.onnx"\n')
    proxies = [host.open("negate"), host.open("absolute")]
    assert [value(proxy) for proxy in proxies] == [-5, 5]
    with host.events() as events:
        lower = host.snapshot().memory_in_use - (1 << 20)
        file.write_text(f"memory_limit = {lower}\n" + file.read_text().split("\n", 1)[1])
        gone = wait_for(events, EventType.UNLOADED)
    assert gone.reason == "evicted"
    assert len([status for status in host.snapshot().models if status.pid]) == 1
    assert host.snapshot().memory_in_use <= lower


@pytest.mark.parametrize("way", ["rewritten", "renamed over", "SIGHUP"])
def test_a_change_is_followed(following: Opened, file: Path, way: str) -> None:
    host = following('memory_limit = "3GiB"\n' + NEG + "ttl = 60")
    assert value(host.open("negate")) == -5
    later = file.with_suffix(".new") if way == "renamed over" else file
    later.write_text(
        'memory_limit = "4GiB"\n' + NEG + 'ttl = 90\n[models.root]\npath = "Sqrt.onnx"\neager = true'
    )
    if later is not file:
        later.rename(file)
    if way == "SIGHUP":
        os.kill(host.snapshot().supervisor_pid or 0, signal.SIGHUP)
    eventually(lambda: host.snapshot().memory_limit == 4 << 30, "the limit is the new one")
    eventually(lambda: statuses(host)["Sqrt.onnx"].pid, "what is eager is loaded")
    assert value(host.open("root")) == pytest.approx(5**0.5)
    assert statuses(host)["Neg.onnx"].ttl == 90


def test_a_model_that_is_no_longer_in_it_goes_unless_somebody_has_it(following: Opened, file: Path) -> None:
    host = following(NEG + 'eager = true\n[models.absolute]\npath = "Abs.onnx"\neager = true')
    held = host.open("absolute")
    assert value(held) == 5
    eventually(lambda: len([s for s in statuses(host).values() if s.pid]) == 2, "both are loaded")
    file.write_text("")
    eventually(lambda: statuses(host).keys() == {"Abs.onnx"}, "who nobody holds is gone")
    assert statuses(host)["Abs.onnx"].leases == 1
    assert value(held) == 5


def test_a_bad_change_is_refused_and_the_old_one_stays(
    following: Opened, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    host = following('memory_limit = "3GiB"\n' + NEG)
    file.write_text('memory_limit = "much"\n')
    said: list[str] = []

    def refused() -> bool:
        said.append(capfd.readouterr().err)
        return "line 1: memory_limit" in "".join(said)

    eventually(refused, "stderr says so")
    assert "The earlier settings stay in force" in "".join(said)
    assert host.snapshot().memory_limit == 3 << 30
    assert value(host.open("negate")) == -5
    file.write_text('memory_limit = "5GiB"\n')
    eventually(lambda: host.snapshot().memory_limit == 5 << 30, "the next good one is in force")


def test_what_is_eager_and_never_called_goes_after_its_ttl(following: Opened) -> None:
    host = following(NEG)
    with host.events() as events:
        assert host.adopt("negate", ttl=0.2).leases == 1
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"
    host = following(NEG + "eager = true\nttl = 0.2")
    eventually(lambda: host.snapshot().seq >= 4, "loading, ready, draining, unloaded")
    assert not statuses(host)


def test_what_is_eager_and_never_called_makes_room(following: Opened, file: Path) -> None:
    host = following('memory_limit = "1GiB"\n' + NEG + "eager = true")
    eventually(lambda: statuses(host)["Neg.onnx"].state is ModelState.READY, "it is loaded")
    with host.events() as events:
        file.write_text("memory_limit = 1000000\n" + NEG + "eager = true")
        assert wait_for(events, EventType.UNLOADED).reason == "evicted"


def test_an_eager_model_that_does_not_load_is_told(
    following: Opened, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a group, too, where the others load."""
    (file.parent / "bad.onnx").write_bytes(b"no model")
    member = '\neager = true\ngroup = "g"\n'
    host = following(NEG + member + '[models.broken]\npath = "bad.onnx"' + member)
    said: list[str] = []

    def told() -> bool:
        said.append(capfd.readouterr().err)
        return "bad.onnx failed:Protobuf parsing failed" in "".join(said)

    eventually(told, "stderr says so")
    assert "onnx-dl: an eager model did not load: " in "".join(said)
    assert value(host.open("negate")) == -5


# --- whatever stands in files ------------------------------------------------------------------------------

BAD: dict[str, tuple[str | bytes, str]] = {
    "nested": ("x = " + "[" * 489 + "]" * 489, "line 1: this is nested more than 32 levels deep"),
    "metrics": ('metrics = "nonsense"', 'line 1: metrics = "nonsense" is not an address'),
    "option": (
        NEG + "options = {log_severity_level = 77}",
        "line 3: models.negate.options.log_severity_level",
    ),
    "number": (NEG + f"priority = 0x{'f' * 5000}", "line 3: models.negate.priority is a number of more than"),
    "no text": (b"# \xff", "line 1: this is not UTF-8"),
    "large": ("#" * (1 << 20) + "\n", "it has more than 1048576 bytes"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_host_goes_on_whatever_its_file_becomes(
    following: Opened, file: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    host = following(NEG + "ttl = 60")
    proxy = host.open("negate")
    assert value(proxy) == -5
    content, told = BAD[kind]
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    said: list[str] = []
    eventually(lambda: said.append(capfd.readouterr().err) or told in "".join(said), "stderr says why not")
    assert "The earlier settings stay in force." in "".join(said)
    assert value(proxy) == -5 and statuses(host)["Neg.onnx"].ttl == 60
    file.write_text(NEG + "ttl = 90")
    eventually(lambda: statuses(host)["Neg.onnx"].ttl == 90, "the next one counts")


@pytest.mark.parametrize("becomes", ["folder", "fifo", "device"])
def test_a_host_waits_for_nothing_that_comes_in_place_of_its_file(
    following: Opened, file: Path, becomes: str
) -> None:
    host = following(NEG + "ttl = 60")
    assert value(host.open("negate")) == -5
    file.unlink()
    match becomes:
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
    pid = host.snapshot().supervisor_pid
    assert pid is not None
    os.kill(pid, signal.SIGHUP)
    assert value(host.open("negate")) == -5
    os.rmdir(file) if becomes == "folder" else os.unlink(file)
    file.write_text(NEG + "ttl = 90")
    eventually(lambda: statuses(host)["Neg.onnx"].ttl == 90, "a file counts")
