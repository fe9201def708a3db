"""Every message over the wire and back, and nothing but messages."""

from __future__ import annotations

import ast
import contextlib
import pickle
import random
import typing
from pathlib import Path

import msgspec
import pytest

import onnx_dl
from onnx_dl.core.environment import Environment, ThreadAttributes
from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import ModelStatus, Usage
from onnx_dl.core.terms import Terms
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, control, failures, lane, template
from tests.support.builders import DESCRIPTION, spec

FAILURE = failures.Failure(family="builtin", name="ValueError", args=["no", 1], details={"retry_after": 1.5})
VALUE = lane.Items(
    "list",
    [lane.Tensor("<f4", (2, 3), 1, 64, True), lane.Text((1,), 1, 0), lane.Packed(1, 64), lane.Plain(1)],
)
MODEL = spec(
    options={"config": {}}, providers=["CPU", ["CUDA", {"id": 1}]], provider_options=[{}], extra={"x": 1}
)
STATUS = ModelStatus(
    model="m",
    key="k",
    state=ModelState.READY,
    worker_id=1,
    pid=None,
    leases=2,
    ttl=-1.0,
    usage=Usage(1, 2, None),
    loads=1,
    failures=0,
    retry_after=0.0,
)
ENVIRONMENT = Environment({"A": "b", "C": None})
EVENT = ModelEvent(seq=1, type=EventType.READY, at=1.5, model="m", key="k", worker_id=1, rss=5, seconds=0.5)

EXAMPLES = [
    control.ClientHello(version=1, secret="s", client=b"\0\xff"),
    control.Welcome(build="onnxruntime-1.31.1"),
    control.Refused(reason="no"),
    control.Blob(number=1, name="d"),
    control.Acquire(ticket=1, proxy=2, spec=MODEL, terms=Terms()),
    control.Granted(ticket=1, worker_id=2, pid=3, address="a", secret="s", description=DESCRIPTION),
    control.Denied(ticket=1, failure=FAILURE),
    control.AskModel(ticket=1, name="vad"),
    control.Named(ticket=1, spec=MODEL, terms=Terms(60.0, pin=True, priority=2)),
    control.DropBlob(number=1),
    control.Withdraw(ticket=1, proxy=2, keep=True),
    control.Outdated(proxy=1, worker_id=2, path="/m.onnx"),
    control.Release(proxy=1),
    control.SetTtl(proxy=1, ttl=0.5),
    control.Unload(ticket=1, key="k", force=True),
    control.Unloaded(ticket=1, was_loaded=False),
    control.AskStatus(ticket=1, measure=False),
    control.Status(ticket=1, seq=9, supervisor_pid=3, models=[STATUS]),
    control.AskEvents(ticket=1, limit=20),
    control.RecentEvents(ticket=1, events=[EVENT]),
    control.AskOutcome(ticket=1, worker_id=2),
    control.Outcome(ticket=1, failure=None),
    control.Shutdown(ticket=1),
    control.Bye(ticket=1),
    control.Published(event=EVENT),
    control.Wrote(pid=1, text=b"why\n", worker_id=2, model="m.onnx", last=True),
    control.WorkerStarted(worker_id=1),
    control.Prepare(device_id=1),
    control.Load(spec=spec(), ttl=5.0, mapped=True, early=True),
    control.WorkerPrepared(worker_id=1),
    control.WorkerLoading(worker_id=1),
    control.WorkerReady(worker_id=1, address="a", secret="s", description=DESCRIPTION, seconds=0.5),
    control.Saveable(worker_id=1, key="k", nbytes=5, blob="b", order="{}"),
    control.WorkerFailed(worker_id=1, failure=FAILURE),
    control.Retime(ttl=-1.0),
    control.Drain(),
    control.WorkerDraining(worker_id=1),
    control.WorkerDrained(worker_id=1),
    control.Exit(),
    control.DrainIfIdle(),
    lane.Terminate(thread=7, request=8),
    lane.Started(),
    template.Spawn(
        worker_id=1,
        identity=b"i",
        control="c",
        thread_attributes=ThreadAttributes(nice=3),
        environment=ENVIRONMENT,
    ),
    template.Spawned(worker_id=1, pid=2),
    template.Assign(worker_id=1, blobs=["b"], thread_attributes=ThreadAttributes(nice=3)),
    template.SpawnFailed(worker_id=1, reason="r"),
    template.TemplateReady(forkable=True),
    lane.LaneHello(version=1, secret="s", reply_to="r"),
    lane.LaneOpen(secret="s", thread=7),
    lane.Envelope(
        shared=[(1, 2)], foreign=[(6, 7, True)], dropped=[3], message=msgspec.Raw(b"\x01"), letter=(4, 5)
    ),
    lane.Call(
        outputs=lane.Plain(None),
        feed=[("x", VALUE), (3, lane.Plain(1))],
        options={"logid": "a"},
        plan=3,
        moved=[1],
    ),
    lane.PlacedCall(
        outputs=["y"],
        feed=[("x", VALUE)],
        foreign=[("z", lane.Foreign("<f4", (2, 3), 1, 64))],
        places=[("y", lane.Place(2, 0, 24))],
    ),
    lane.PlacedResult(value=VALUE, written=[lane.WrittenResult(0, "<f4", (2, 3))]),
    lane.Replay(plan=3, moved=[(1, lane.Tensor("<f4", (2, 3), 1, 64))]),
    lane.Invoke(method="end_profiling", args=[VALUE]),
    lane.Taken(by_value=[0, 2]),
    lane.Touch(),
    lane.Hold(),
    lane.Unhold(),
    lane.Trim(),
    lane.Result(value=VALUE),
    lane.SameResult(),
    lane.CallFailed(failure=FAILURE),
    lane.Draining(),
    lane.Forgotten(),
]

READERS = {
    control.FromClient: control.from_client,
    control.ToClient: control.to_client,
    control.FromWorker: control.from_worker,
    control.ToWorker: control.to_worker,
    control.OnLifeline: control.on_lifeline,
    template.OnTemplate: template.on_template,
    template.Assign: template.on_standby,
    lane.LaneRequest: lane.lane_request,
    lane.LaneReply: lane.lane_reply,
}


def readers_of(message: codec.Message) -> list[codec.Reader]:
    return [
        reader for union, reader in READERS.items() if type(message) in (typing.get_args(union) or (union,))
    ]


def name_of(message: object) -> str:
    return type(message).__name__


def test_every_message_has_an_example_and_a_reader():
    assert {type(e) for e in EXAMPLES} == set(codec.Message.__subclasses__())
    assert all(readers_of(e) for e in EXAMPLES)


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_round_trip(message):
    raw = codec.encode(message)
    assert msgspec.msgpack.decode(raw)["type"] == name_of(message)
    for reader in readers_of(message):
        for data in (raw, memoryview(raw)):
            got = reader(data)
            assert type(got) is type(message)
            assert got == message


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_every_other_direction_refuses_it(message):
    raw = codec.encode(message)
    for reader in set(READERS.values()) - set(readers_of(message)):
        with pytest.raises(
            ProtocolError, match=rf"protocol version {codec.PROTOCOL_VERSION} .* same version of onnx-dl"
        ):
            reader(raw)


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_truncated(message):
    raw = codec.encode(message)
    for reader in readers_of(message):
        for end in range(len(raw)):
            with pytest.raises(ProtocolError):
                reader(raw[:end])
        with pytest.raises(ProtocolError):
            reader(raw + b"\0")


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_missing_fields_and_wrong_types(message):
    plain = msgspec.msgpack.decode(codec.encode(message))
    required = [f for f in msgspec.structs.fields(message) if f.required]
    for field in required:
        less = {name: value for name, value in plain.items() if name != field.name}
        wrong = plain | {field.name: [[]] if isinstance(plain[field.name], dict | str | bytes) else "x"}
        if field.type is lane.Value:
            wrong[field.name] = {"no": "value"}
        for bad in (less, wrong):
            for reader in readers_of(message):
                with pytest.raises(ProtocolError):
                    reader(msgspec.msgpack.encode(bad))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"\xc1",
        b"\x80",
        b"hello",
        b"\xff" * 100,
        msgspec.msgpack.encode(None),
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode({"type": "Nonsense"}),
        msgspec.msgpack.encode({"type": 5}),
        msgspec.msgpack.encode({"no": "type"}),
        msgspec.msgpack.encode({"type": "Message"}),
        b"\x81\xa4type\xa4\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        pickle.dumps({"type": "Welcome"}),
        b"\x91" * 50_000,
        codec.encode(control.Denied(ticket=1, failure=FAILURE)).replace(
            b"\x92\xa2no\x01", b"\x91" * 50_000 + b"\xc0"
        ),
        codec.encode(lane.Result(value=lane.Plain(7)))[:-1] + b"\x91" * 50_000 + b"\xc0",
    ],
    ids=lambda raw: raw[:12].hex() or "empty",
)
@pytest.mark.parametrize(
    "reader", READERS.values(), ids=["/".join(c.__name__ for c in typing.get_args(u)[:2]) for u in READERS]
)
def test_garbage(reader, raw):
    with pytest.raises(ProtocolError):
        reader(raw)


def test_random_damage_gives_a_message_or_a_protocol_error():
    rng = random.Random(3)
    raws = [(codec.encode(e), readers_of(e)) for e in EXAMPLES]
    for _ in range(20_000):
        raw, readers = rng.choice(raws)
        damaged = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        for reader in readers:
            with contextlib.suppress(ProtocolError):
                assert isinstance(reader(bytes(damaged)), codec.Message)


def test_fields_of_a_later_version_are_ignored():
    """A peer of the same protocol version may say more, not less."""
    plain = msgspec.msgpack.decode(codec.encode(control.Retime(ttl=5.0))) | {"later": [1]}
    assert control.to_worker(msgspec.msgpack.encode(plain)) == control.Retime(ttl=5.0)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, object(), {1: object()}], ids=lambda v: str(v)[:20])
def test_what_has_no_form_in_msgpack_is_refused_where_it_is_sent(value):
    with pytest.raises((OverflowError, TypeError)):
        codec.encode(lane.Result(value=lane.Plain(value)))


def test_nothing_is_pickled_anywhere():
    forbidden = {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "multiprocessing",
    }
    sources = list(Path(onnx_dl.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    for path in sources:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute):
                names = [node.attr] if node.attr in ("recv_pyobj", "send_pyobj", "allow_pickle") else []
                assert not names, f"{path}:{node.lineno} uses {names}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), f"{path}:{node.lineno}"
            assert not {name.split(".")[0] for name in names} & forbidden, f"{path}: {names}"
