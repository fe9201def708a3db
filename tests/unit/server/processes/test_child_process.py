"""A child as the first process sees it, with a stand-in for the program that it runs."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import msgspec
import pytest

from onnx_dl.server.processes import child_process as module
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.child_process import ChildProcess
from onnx_dl.server.processes.link import Link
from onnx_dl.server.v2.failures import invalid
from tests.support.waiting import DEADLINE, allowed


class Program:
    """A process that was not started; its end of the link is the test's."""

    pid = 1
    fd: int

    def __init__(self, _argv: Any, *, pass_fds: list[int], **_: Any) -> None:
        Program.fd = os.dup(pass_fds[0])

    def send_signal(self, _: int) -> None:
        raise ProcessLookupError


async def refuse(_: m.Ask) -> m.Done:
    raise invalid("no")


async def fail(_: m.Ask) -> m.Done:
    raise ZeroDivisionError


async def answer_badly(question: m.Ask) -> m.Done:
    return m.Done(ticket=question.ticket, text=object())  # type: ignore[arg-type]  # no message can have it


@pytest.mark.parametrize(
    ("answer", "status", "words", "logged"),
    [
        (refuse, 400, "no", ""),
        (fail, 500, "The first process of the server failed.", "ZeroDivisionError"),
        (answer_badly, 500, "The first process of the server failed.", "TypeError"),
    ],
)
def test_whoever_asks_gets_an_answer(
    answer: Any,
    status: int,
    words: str,
    logged: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module.subprocess, "Popen", Program)

    async def test() -> None:
        child = ChildProcess(1, answer, lambda _: None)
        answers: asyncio.Queue[Any] = asyncio.Queue()
        link: Link[m.ToChild] = Link(
            socket.socket(fileno=Program.fd),
            msgspec.msgpack.Decoder(m.ToChild),
            lambda message, _: answers.put_nowait(message),
            lambda: None,
        )
        try:
            link.send(m.Ask(ticket=7, operation="load", arguments=["m", {}]))
            async with asyncio.timeout(allowed(DEADLINE)):
                refusal = await answers.get()
            assert isinstance(refusal, m.Refusal)
            assert (refusal.ticket, refusal.http, refusal.text) == (7, status, words)
        finally:
            link.close()
            child.kill()

    asyncio.run(test())
    assert logged in caplog.text and ("Traceback" in caplog.text) == bool(logged)
