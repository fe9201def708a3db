"""Numbers of CUDA graphs: one for each set of memory, and none for what is not in such memory."""

from __future__ import annotations

from typing import Any

from onnx_dl.tensors.device_values import DeviceTensor, Loan
from onnx_dl.workers.engines import base
from onnx_dl.workers.engines.base import BoundRun, CancelToken
from onnx_dl.workers.engines.cuda_graphs import NO_GRAPH, TURN, GraphBackend, GraphNumbers


def tensor(address: int, loan: object = None) -> DeviceTensor:
    return DeviceTensor(1, (2,), "cuda", 0, address, loan)


def numbered(numbers: GraphNumbers, *addresses: int, given: str | None = None, loan: object = None) -> int:
    first, *others = [tensor(address, loan) for address in addresses]
    return numbers.number(given, [["x", first]], [["y", "cpu", 0, other] for other in others])


def test_each_set_of_memory_has_its_number() -> None:
    numbers = GraphNumbers()
    assert [numbered(numbers, *at) for at in ((1, 2), (1, 3), (2, 1), (1, 2))] == [1, 2, 3, 1]
    assert [numbered(numbers, 1, 2, given=given) for given in ("0", "7", "7", "-1")] == [1, 4, 4, NO_GRAPH]


def test_an_input_is_not_an_output() -> None:
    numbers, bound = GraphNumbers(), [["x", tensor(1)]]
    assert numbers.number(None, bound, []) != numbers.number(None, [], bound)


def test_values_have_no_graph() -> None:
    numbers = GraphNumbers()
    assert numbers.number(None, [["x", 5]], [["y", "cpu", 0, tensor(1)]]) == NO_GRAPH
    assert numbers.number(None, [["x", tensor(1)]], [["y", "cuda", 0, None]]) == NO_GRAPH


def test_other_memory_at_the_same_address_has_another_number() -> None:
    numbers, loans = GraphNumbers(), [Loan(), Loan()]
    assert [numbered(numbers, 1, 2, loan=loan) for loan in (*loans, loans[0])] == [1, 2, 1]


def test_there_are_no_more_graphs_than_that_until_memory_is_closed() -> None:
    numbers, loan = GraphNumbers(), Loan()
    assert numbered(numbers, 99, loan=loan) == 1
    assert [numbered(numbers, at) for at in range(20)] == [*range(2, 17), *[NO_GRAPH] * 5]
    loan.is_open = False
    assert [numbered(numbers, at) for at in (18, 19, 0)] == [17, NO_GRAPH, 2]


def test_a_released_graph_is_captured_anew() -> None:
    numbers = GraphNumbers()
    first = [numbered(numbers, 1), numbered(numbers, 2), numbered(numbers, 1, given="3")]
    assert numbers.released("0") == first[:2]
    assert [numbered(numbers, 1), numbered(numbers, 1, given="3")] == [4, 3]


class Engine:
    """A backend that notes what it is asked."""

    cuda_device = 3

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def run(self, outputs: object, feed: object, options: object, token: object) -> list[object]:
        self.asked.append(options)
        return []

    def invoke(self, method: str, args: list[Any], token: object) -> object:
        self.asked.append([method, args[-1]])
        return None

    def bind_devices(self, inputs: object, outputs: object, graph: int) -> BoundRun:
        return BoundRun(lambda: self.asked.append(graph), None)


def test_a_backend_gives_each_run_its_number() -> None:
    engine, token = Engine(), CancelToken()
    backend = GraphBackend(engine)
    backend.run(None, {}, None, token)
    backend.run(None, {}, {"run_tag": "t", "config": {"a": "b"}}, token)
    bound = [["x", tensor(1)]], [["y", "cpu", 0, tensor(2)]]
    backend.bind_devices([("x", tensor(1))], [("y", tensor(2))]).run()
    backend.invoke("run_with_iobinding", [*bound, None], token)
    backend.invoke("run_with_iobinding", [*bound, {"config": {"gpu_graph_id": "5"}}], token)
    backend.invoke("run_with_ort_values", [None, {}, None], token)
    backend.invoke("end_profiling", [4], token)
    backend.invoke("release_captured_graph", [5], token)
    none = {"gpu_graph_id": "-1"}
    assert engine.asked == [
        {"config": none},
        {"run_tag": "t", "config": {"a": "b"} | none},
        1,
        ["run_with_iobinding", {"config": {"gpu_graph_id": "1"}}],
        ["run_with_iobinding", {"config": {"gpu_graph_id": "2"}}],
        ["run_with_ort_values", {"config": none}],
        ["end_profiling", 4],
        ["release_captured_graph", 2],
    ]


def test_what_a_wrapped_backend_has() -> None:
    engine = Engine()
    backend: Any = GraphBackend(engine)
    assert base.cuda_device(backend) == 3
    assert backend.bind(None, {}, []) is backend.rerun(None) is None
    assert base.turn(backend) is TURN
    plain: Any = engine
    assert base.turn(plain) is None
