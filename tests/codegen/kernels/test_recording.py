"""What is repeated on other tensors, and what is not: with kernels that note where they were started."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flexsparse.codegen.kernels import recording
from flexsparse.codegen.kernels.recording import Aside, operate, recorded, recorder, repeat


class Stream:
    """Notes who waits for whom, in the order of everything else."""

    def __init__(self, name: int, log: list[Any]) -> None:
        self.cuda_stream, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.cuda_stream, "waits for", other.cuda_stream))


def start(log: list[Any], name: str, *arguments: Any) -> None:
    """Stands for ``launch``: a kernel that notes its arguments."""
    active = recorder()
    assert active is not None
    active.kernel(lambda *values, stream: log.append((name, stream, *values)), arguments)


def ready() -> tuple[Tensor, Tensor]:
    return torch.arange(8.0), torch.zeros(8)


def double(given: Tensor, made: Tensor) -> None:
    torch.mul(given, 2, out=made)


def test_kernels_start_on_the_tensors_of_their_call() -> None:
    log: list[Any] = []
    given, made = ready()

    def run() -> None:
        own, more = torch.empty(3), torch.empty(200, dtype=torch.int64)
        start(log, "first", given, own, 7)
        start(log, "second", own[1:], more, made[2:], 0.5)

    found = recorded([given, made], run)
    assert found is not None
    assert found.scratch == 512 + 2048
    others = (*ready(), torch.empty(found.scratch, dtype=torch.uint8))
    repeat(found, others, Stream(3, log), None)
    a, b, scratch = (x.data_ptr() for x in others)
    assert log == [("first", 3, a, scratch, 7), ("second", 3, scratch + 4, scratch + 512, b + 8, 0.5)]


def test_an_operation_runs_on_views_of_what_stands_for_its_tensors() -> None:
    given, made = ready()

    def run() -> None:
        own = torch.empty(2, 4, dtype=torch.float64)
        operate(lambda to, x: to.copy_(x.view(2, 4)), own, given)
        operate(lambda to, x: to.copy_(x.reshape(-1)), made, own.t())

    found = recorded([given, made], run)
    wanted = given.view(2, 4).t().reshape(-1)
    assert torch.equal(made, wanted)
    assert found is not None
    other, to = given + 10, torch.zeros(8)
    repeat(found, (other, to, torch.empty(found.scratch, dtype=torch.uint8)), Stream(1, []), None)
    assert torch.equal(to, wanted + 10)


def test_what_was_there_before_is_read_where_it_is() -> None:
    log: list[Any] = []
    given, _ = ready()
    lists = torch.arange(6)

    def run() -> None:
        start(log, "kernel", given, lists[2:], torch.empty(1), lists)

    found = recorded([given], run)
    assert found is not None
    other, scratch = torch.ones(8), torch.empty(found.scratch, dtype=torch.uint8)
    repeat(found, (other, scratch, *found.constants), Stream(1, log), None)
    at = lists.data_ptr()
    assert log == [("kernel", 1, other.data_ptr(), at + 16, scratch.data_ptr(), at)]
    # It stays alive as long as the recording.
    assert [x.data_ptr() for x in found.constants] == [at + 16]


@pytest.mark.parametrize("two", [False, True])
def test_what_is_aside_has_a_stream_of_its_own_where_there_is_one(two: bool) -> None:
    log: list[Any] = []
    given, made = ready()

    def run() -> None:
        start(log, "before", given)
        beside = Aside(given.device, wanted=False)
        with beside.begun():
            start(log, "aside", given)
        start(log, "meanwhile", given)
        beside.join()
        start(log, "after", made)

    found = recorded([given, made], run)
    assert found is not None
    repeat(found, (given, made, torch.empty(0)), Stream(1, log), Stream(2, log) if two else None)
    a, b = given.data_ptr(), made.data_ptr()
    if two:
        waits: Any = ((2, "waits for", 1), (1, "waits for", 2))
        assert log == [("before", 1, a), waits[0], ("aside", 2, a), ("meanwhile", 1, a), waits[1], ("after", 1, b)]
    else:
        assert log == [("before", 1, a), ("aside", 1, a), ("meanwhile", 1, a), ("after", 1, b)]


@pytest.mark.parametrize("two", [False, True])
def test_what_is_aside_a_second_time_stands_in_line(two: bool) -> None:
    log: list[Any] = []
    given, made = ready()

    def run() -> None:
        for name in ("first", "second"):
            beside = Aside(given.device, wanted=False)
            with beside.begun():
                start(log, f"{name} aside", given)
            start(log, f"{name} meanwhile", made)
            beside.join()

    found = recorded([given, made], run)
    assert found is not None
    repeat(found, (given, made, torch.empty(0)), Stream(1, log), Stream(2, log) if two else None)
    started = [(entry[0], entry[1]) for entry in log if isinstance(entry[0], str)]
    names = ["first aside", "first meanwhile", "second aside", "second meanwhile"]
    assert started == list(zip(names, [2 if two else 1, 1, 1, 1], strict=True))
    waits = [number for number, entry in enumerate(log) if entry[1] == "waits for"]
    assert [log[number] for number in waits] == [(2, "waits for", 1), (1, "waits for", 2)] * two
    # The second selection begins when the first has been waited for.
    assert waits == [0, 3] * two


def test_work_that_ends_aside_is_waited_for() -> None:
    log: list[Any] = []
    given, made = ready()

    def run() -> None:
        beside = Aside(given.device, wanted=False)
        with beside.begun():
            start(log, "aside", given)
        beside.join()

    found = recorded([given, made], run)
    assert found is not None
    repeat(found, (given, made, torch.empty(0)), Stream(1, log), Stream(2, log))
    assert log == [(2, "waits for", 1), ("aside", 2, given.data_ptr()), (1, "waits for", 2)]


@pytest.mark.parametrize(
    "also",
    [
        lambda x: x.clone(),
        lambda x: x.zero_(),
        lambda x: torch.zeros(3),
        lambda x: x + 1,
        lambda x: x.float().double(),
    ],
    ids=["clone", "in place", "zeros", "arithmetic", "conversion"],
)
def test_a_call_that_computes_on_its_own_is_not_repeated(also: Any) -> None:
    given, made = ready()
    log: list[Any] = []

    def run() -> None:
        also(given)
        start(log, "kernel", made)

    assert recorded([given, made], run) is None


def test_views_and_allocations_are_no_computation() -> None:
    given, made = ready()

    def run() -> None:
        parts = given.view(2, 4).t()[1:].unsqueeze(0).expand(3, -1, -1)
        start([], "kernel", parts, torch.empty_like(made), made.new_empty(3), torch.empty_strided((2,), (1,)))

    assert recorded([given, made], run) is not None


def test_tensors_that_share_memory() -> None:
    log: list[Any] = []
    given, _ = ready()
    # Two that begin at one place: any of them, as that is part of the key.
    found = recorded([given, given.view(2, 4)], lambda: start(log, "kernel", given.view(2, 4)))
    assert found is not None
    repeat(found, (given, given.view(2, 4), torch.empty(0)), Stream(1, log), None)
    # Parts of one tensor, each where none other begins.
    found = recorded([given[:4], given[4:]], lambda: start(log, "kernel", given[4:]))
    assert found is not None
    a, b = ready()
    repeat(found, (a[:4], b[:4], torch.empty(0)), Stream(1, log), None)
    assert log == [("kernel", 1, given.data_ptr()), ("kernel", 1, b.data_ptr())]
    # A place inside one of them, and nobody knows of which.
    assert recorded([given[:4], given[4:]], lambda: start(log, "kernel", given[5:])) is None


def test_an_operation_beside_other_work_is_not_repeated() -> None:
    given, made = ready()

    def run() -> None:
        with Aside(given.device, wanted=False).begun():
            operate(double, given, made)

    assert recorded([given, made], run) is None


def test_addresses_get_graphs_once_they_came_often(monkeypatch: pytest.MonkeyPatch) -> None:
    given, made = ready()

    def run() -> None:
        start([], "first", given)
        operate(double, given, made)
        start([], "second", made)
        start([], "third", made)

    found = recorded([given, made], run)
    assert found is not None
    parts: list[range] = []

    def captured(of: Any, part: range, *_: Any) -> str:
        parts.append(part)
        return f"graph of {list(part)}"

    monkeypatch.setattr(recording, "_captured", captured)
    asked = [recording.graphs_at(found, (1, 2, 3), (), given.device) for _ in range(4)]
    assert asked[:2] == [None, None]
    assert asked[2] == asked[3] == ["graph of [0]", 1, "graph of [2, 3]"]
    assert recording.graphs_at(found, (1, 2, 4), (), given.device) is None
    # Captured once, as the same addresses have the same graphs.
    assert parts == [range(1), range(2, 4)]


def test_an_operation_that_allocates_nothing_is_in_the_graph_of_its_neighbours() -> None:
    given, made = ready()
    log: list[Any] = []

    def run() -> None:
        start(log, "first", given)
        operate(double, given, made, in_graphs=True)
        start(log, "second", made)

    found = recorded([given, made], run)
    assert found is not None
    assert found.parts == (range(3),)
    a, b = ready()
    a += 1.0
    log.clear()
    repeat(found, (a, b, torch.empty(0)), Stream(1, log), None)
    assert [name for name, *_ in log] == ["first", "second"]
    assert torch.equal(b, 2 * a)


def test_no_graphs_where_the_environment_says_so_or_the_driver_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    given, made = ready()
    found = recorded([given, made], lambda: start([], "kernel", made))
    assert found is not None
    tried: list[range] = []
    monkeypatch.setattr(recording, "_captured", lambda of, part, *_: tried.append(part))
    with monkeypatch.context() as patch:
        patch.setenv(recording.GRAPHS, "0")
        assert [recording.graphs_at(found, (1, 2), (), given.device) for _ in range(5)] == [None] * 5
    assert not tried
    assert [recording.graphs_at(found, (3, 4), (), given.device) for _ in range(9)] == [None] * 9
    assert len(tried) == 1


def test_addresses_and_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    given, made = ready()
    found = recorded([given, made], lambda: start([], "kernel", made))
    assert found is not None
    monkeypatch.setattr(recording, "_recordings", {"a": found, "b": None})
    monkeypatch.setattr(recording, "_captured", lambda *_: "graph")
    for n in range(300):
        recording.graphs_at(found, (n,), (), given.device)
    assert len(found.known) == recording._ADDRESSES
    monkeypatch.setattr(recording, "_MOST", 5)
    found.known.clear()
    for n in range(8):
        for _ in range(3):
            recording.graphs_at(found, (n,), (), given.device)
        assert sum(x == ["graph"] for x in found.known.values()) == n % 5 + 1


def test_an_error_leaves_nothing_recording() -> None:
    given, made = ready()

    def run() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        recorded([given, made], run)
    assert recorder() is None


def test_a_call_on_a_cpu_just_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_recordings", {})
    given, made = ready()
    for _ in range(2):
        recording.repeated("double", [given], [made], lambda: double(given, made))
    assert torch.equal(made, 2 * given)
    assert not recording._recordings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [3000, 9000])
def test_graphs_of_a_loop_keep_the_bits_of_its_calls(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Forward and backward on changing numbers at addresses that come back; in a captured call kernels are started."""
    import flexsparse as fs

    monkeypatch.setattr(recording, "_recordings", {})
    attention = fs.compile("sliding_window(64) | sparsek(50, after=64)", backend="gather")
    operands = [torch.randn(1, 4, size, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves = [x.requires_grad_() for x in (*operands, torch.randn(1, 4, size, device="cuda"))]

    def step() -> list[Tensor]:
        out = attention(*leaves[:3], scores=leaves[3], validate=False)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    def graphs() -> int:
        kept: Any = recording._recordings
        return sum(isinstance(x, list) for found in kept.values() if found for x in found.known.values())

    for _ in range(32):
        # Dropped at once, so that the next call gets the same addresses.
        step()
    assert graphs() > 0
    for n in range(3):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        again = [x.clone() for x in step()]
        with monkeypatch.context() as patch:
            patch.setattr(recording, "graphs_at", lambda *_: None)
            wanted = step()
        for one, other in zip(wanted, again, strict=True):
            assert torch.equal(one, other), n
        del one, other, again, wanted
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        attention(*operands, scores=leaves[3], validate=False)
        with torch.cuda.graph(graph, stream=stream):
            out = attention(*operands, scores=leaves[3], validate=False)
        graph.replay()
        assert torch.equal(out, attention(*operands, scores=leaves[3], validate=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_selections_and_their_gradients_are_repeated_and_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexsparse.ops import causal_select

    monkeypatch.setattr(recording, "_recordings", {})
    for rows, size, segmented in ((16, 3000, False), (3, 20000, False), (2, 5000, True), (120, 40000, False)):
        found: list[list[Tensor]] = []
        for again in (False, True, True):
            generator = torch.Generator("cuda").manual_seed(rows + again)
            u = torch.randn(rows, size, device="cuda", generator=generator).requires_grad_()
            segments = torch.arange(size, device="cuda") // 700 if segmented else None
            (tau, count), lives, table = causal_select(u, 100, 3, segments, validate=False, chunk=64)
            (grad,) = torch.autograd.grad(tau.clamp(-9, 9).sin().sum(), u)
            results = [tau, count, *lives, table, grad]
            # Without recordings: the same numbers of a call that is run as it was written.
            with monkeypatch.context() as patch:
                patch.setattr("flexsparse.ops.kernels.repeated", lambda key, given, made, run, two_streams=False: run())
                (tau, count), lives, table = causal_select(u, 100, 3, segments, validate=False, chunk=64)
                (grad,) = torch.autograd.grad(tau.clamp(-9, 9).sin().sum(), u)
            for one, other in zip(results, [tau, count, *lives, table, grad], strict=True):
                assert torch.equal(one, other)
            found.append(results)
        assert not torch.equal(found[0][0], found[1][0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
    kept: Any = recording._recordings
    kinds = [key[0][0] for key, made in kept.items() if made is not None]
    assert kinds.count("select") == 5
    assert kinds.count("gradient") == 4
