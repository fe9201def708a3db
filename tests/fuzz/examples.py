"""A message of each kind, made from its type, so that no new one is forgotten."""

from __future__ import annotations

import random
import typing
from typing import Any

import msgspec
from msgspec import inspect

from onnx_dl.protocol import codec, control, failures, lane, template

_ON_TEMPLATE = ("on_template", "on_standby")
READERS = {
    name: getattr(template if name in _ON_TEMPLATE else lane if name.startswith("lane_") else control, name)
    for name in (
        "from_client", "to_client", "from_worker", "to_worker", "on_lifeline", *_ON_TEMPLATE,
        "lane_request", "lane_reply",
    )
}  # fmt: skip
UNIONS = {
    "from_client": control.FromClient,
    "to_client": control.ToClient,
    "from_worker": control.FromWorker,
    "to_worker": control.ToWorker,
    "on_lifeline": control.OnLifeline,
    "on_template": template.OnTemplate,
    "on_standby": template.Assign,
    "lane_request": lane.LaneRequest,
    "lane_reply": lane.LaneReply,
}


def frames(name: str, rng: random.Random) -> list[bytes]:
    """Some of each kind of message that this reader knows."""
    kinds = typing.get_args(UNIONS[name]) or (UNIONS[name],)
    return [codec.encode(example(kind, rng)) for kind in kinds for _ in range(3)]


def example(kind: type[Any], rng: random.Random) -> Any:
    if kind is lane.Envelope:
        inside = codec.encode(lane.Result(value=lane.Plain(1)))
        return lane.Envelope(
            shared=[(3, 65536)], foreign=[(4, 4096, True)], dropped=[1], message=msgspec.Raw(inside)
        )
    return msgspec.convert(_made(inspect.type_info(kind), rng, 0), kind)


def failure(rng: random.Random) -> failures.Failure:
    error = rng.choice(
        (
            ValueError("no"),
            OSError(2, "no", "file"),
            KeyError("k"),
            UnicodeDecodeError("utf-8", b"x", 0, 1, "r"),
            MemoryError(),
            StopIteration(3),
            ExceptionGroup("g", [ValueError(1)]),
        )
    )
    error.__cause__ = rng.choice((None, TypeError("why")))
    return failures.describe(error, retry_after=1.0)


def _made(info: Any, rng: random.Random, depth: int) -> Any:
    match info:
        case inspect.StructType(cls=cls) if cls is failures.Failure:
            return msgspec.to_builtins(failure(rng))
        case inspect.StructType():
            return _struct(info, rng, depth)
        case inspect.UnionType(types=types):
            return _made(rng.choice(types if depth < 4 else types[-1:]), rng, depth + 1)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return [] if depth > 4 else [_made(item, rng, depth + 1) for _ in range(rng.randrange(3))]
        case inspect.TupleType(item_types=items):
            return [_made(item, rng, depth + 1) for item in items]
        case inspect.DictType(key_type=key, value_type=value):
            return {} if depth > 4 else {_made(key, rng, depth + 1): _made(value, rng, depth + 1)}
        case inspect.EnumType(cls=cls):
            return rng.choice([each.value for each in cls])
        case inspect.IntType(ge=least, le=most):
            found = [n for n in (0, 1, 2, 3, 64, 65536) if least is None or n >= least]
            return rng.choice([n for n in found if most is None or n <= most])
        case inspect.FloatType():
            return rng.choice((0.0, 2.5))
        case inspect.StrType():
            return rng.choice(("a", "float32", "<f4", "list", "x.onnx"))
        case inspect.BytesType():
            return b"0123456789abcdef"
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.AnyType():
            return rng.choice((None, 1, "x", [1, "y"], {"k": 2.5}))
    raise NotImplementedError(info)


def _struct(info: inspect.StructType, rng: random.Random, depth: int) -> Any:
    if info.array_like:
        head = [] if info.tag is None else [info.tag]
        return head + [_made(field.type, rng, depth + 1) for field in info.fields]
    made = {} if info.tag is None else {info.tag_field: info.tag}
    for field in info.fields:
        if field.required or rng.random() < 0.6:
            made[field.encode_name] = _made(field.type, rng, depth + 1)
    return made
