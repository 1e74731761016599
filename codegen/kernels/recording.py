"""A computation's kernels, started again on other tensors of the same shapes.

Around short kernels a host takes longer than they run: it allocates, cuts views and finds each kernel by its arguments.
For the same shapes all of that is the same, addresses aside. So the first call runs and is recorded: which kernels,
with which numbers, and of each pointer where it stands in one of the caller's tensors or in what the call allocated
itself. Later calls allocate once and start the kernels.

A loop that does the same again and again gets the same addresses too. For those that come back, what stands between two
operations of PyTorch's is captured as a CUDA graph: one start instead of many. It owns no memory, as all of its
addresses are of tensors that each call allocates, and a call that is itself captured starts the kernels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse._torch import SeesOperations

# Recordings that are kept; lengths come and go.
_KEPT = 256
# Where allocations of a call begin in the one that stands for them, in bytes: as torch's own do.
_APART = 512
# Sets of addresses that a recording knows, at which of their calls they get graphs, and how many graphs there may be.
_ADDRESSES, _OFTEN, _MOST = 256, 3, 512
_ALLOCATIONS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
# "0" in the environment: no graphs.
GRAPHS = "FLEXSPARSE_CUDA_GRAPHS"
_recordings: dict[Hashable, Recording | None] = {}
_active = threading.local()


class Pointer(NamedTuple):
    """An address: so many bytes behind that of base ``base``: the caller's tensors, the scratch, then the constants."""

    base: int
    offset: int


class Kernel(NamedTuple):
    """One start: Triton's runner, all arguments with 0 for pointers, and these with their places."""

    runner: Callable[..., None]
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, int, int], ...]  # place, base, offset
    aside: bool


class Operand(NamedTuple):
    """A tensor of an operation."""

    at: Pointer
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Operation(NamedTuple):
    """A PyTorch operation that writes into tensors it is given, what these are, and whether it may be in a graph."""

    run: Callable[..., object]
    tensors: tuple[Operand, ...]
    in_graphs: bool


def stands_alone(entry: Kernel | Operation) -> bool:
    return isinstance(entry, Operation) and not entry.in_graphs


@dataclass(frozen=True)
class Recording:
    """What was started in order; with fork and join before the entries of these numbers, where there are any."""

    entries: tuple[Kernel | Operation, ...]
    scratch: int  # bytes
    fork: int
    join: int
    # What was there before the call and is nobody's argument, such as lists that are kept from call to call.
    constants: tuple[Tensor, ...] = ()
    # By addresses: how often they came, -1 where there is no room for graphs, and then their graphs, with the numbers
    # of operations between them.
    known: dict[tuple[int, ...], int | list[Any]] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def parts(self) -> tuple[range, ...]:
        """The numbers of entries: those that follow one another together, an operation that is in no graph alone."""
        cuts = [n for n, entry in enumerate(self.entries) if stands_alone(entry)]
        ends = sorted({0, len(self.entries), *cuts, *(n + 1 for n in cuts)})
        return tuple(itertools.starmap(range, itertools.pairwise(ends)))


class Recorder:
    """Takes down the entries of one call on ``tensors``; not ``complete`` where something cannot be repeated."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.entries: list[Kernel | Operation] = []
        self.complete = True
        self.aside = False
        self.fork, self.join = -1, -1
        # By address: what the call allocated, kept so that no address is given out twice, and where it will stand.
        self._own: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._bytes = 0
        self._allocated: set[int] = set()
        self._constants: dict[int, tuple[Tensor, int]] = {}

    def see(self, schema: Any, made: Any) -> None:
        """What computes on tensors and is no entry: a call that does it cannot be repeated by its entries."""
        viewed = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
        if schema.name.split("::")[-1] in _ALLOCATIONS:
            self._allocated.add(made.untyped_storage().data_ptr())
        else:
            self.complete &= viewed

    def kernel(self, runner: Callable[..., None], values: Sequence[Any]) -> None:
        """A kernel started with ``values``, tensors among them."""
        arguments, pointers = [], []
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                if value.numel():
                    pointers.append((place, *self._pointer(value)))
                value = 0
            arguments.append(value)
        self.entries.append(Kernel(runner, tuple(arguments), tuple(pointers), self.aside))

    def operation(self, run: Callable[..., object], tensors: Sequence[Tensor], in_graphs: bool) -> None:
        # A fork and its join belong to one graph.
        self.complete &= self.fork < 0
        found = tuple(Operand(self._pointer(x), x.dtype, x.shape, x.stride()) for x in tensors)
        self.entries.append(Operation(run, found, in_graphs))

    def recording(self) -> Recording | None:
        if not self.complete:
            return None
        constants = tuple(tensor for tensor, _ in self._constants.values())
        return Recording(tuple(self.entries), self._bytes, self.fork, self.join, constants)

    def _pointer(self, tensor: Tensor) -> Pointer:
        storage, address = tensor.untyped_storage(), tensor.data_ptr()
        bases = [n for n, x in enumerate(self.tensors) if x.untyped_storage().data_ptr() == storage.data_ptr()]
        # Those that begin at one place do so at every call of this key.
        exact = [n for n in bases if self.tensors[n].data_ptr() == address]
        if bases:
            # A place in memory that several share is none of one of them.
            self.complete &= len(bases) == 1 or bool(exact)
            base = (exact or bases)[0]
            return Pointer(base, address - self.tensors[base].data_ptr())
        if storage.data_ptr() not in self._allocated:
            number = len(self.tensors) + 1 + len(self._constants)
            constant, base = self._constants.setdefault(storage.data_ptr(), (tensor.detach(), number))
            return Pointer(base, address - constant.data_ptr())
        if storage.data_ptr() not in self._own:
            self._own[storage.data_ptr()] = storage, self._bytes
            self._bytes += -(-storage.nbytes() // _APART) * _APART
        return Pointer(len(self.tensors), self._own[storage.data_ptr()][1] + address - storage.data_ptr())


def recorder() -> Recorder | None:
    """That of the call that this thread records."""
    found: Recorder | None = getattr(_active, "recorder", None)
    return found


def operate(run: Callable[..., object], *tensors: Tensor, in_graphs: bool = False) -> None:
    """``run(*tensors)``, an operation of PyTorch's that writes into some of them and does nothing else.

    ``in_graphs``: it allocates nothing either, so that a graph which owns no memory can have it.
    """
    active = recorder()
    if active is None:
        run(*tensors)
        return
    complete = active.complete
    run(*tensors)
    active.complete = complete
    active.operation(run, tensors, in_graphs)


class Aside:
    """Work that may run beside what follows it, until ``join``; on a stream of its own where that is ``wanted``.

    A recording has one fork and one join, the first. What is aside later, as of a second selection, stands in line.
    """

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self._streams = _streams_of(device) if wanted else None
        self._recorder: Recorder | None = None

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        active = recorder()
        if active is not None and active.fork < 0:
            self._recorder = active
            active.fork, active.aside = len(active.entries), True
        with _forked(self._streams):
            yield
        if self._recorder is not None:
            self._recorder.aside = False

    def join(self) -> None:
        """What follows waits for it."""
        if self._recorder is not None:
            self._recorder.join = len(self._recorder.entries)
        if self._streams is not None:
            here, beside = self._streams
            here.wait_stream(beside)


_Streams = tuple[torch.cuda.Stream, torch.cuda.Stream]


def _streams_of(device: torch.device) -> _Streams:
    here = torch.cuda.current_stream(device)
    return here, _beside(device, here.cuda_stream)


@functools.lru_cache(maxsize=64)
def _beside(device: torch.device, stream: int) -> torch.cuda.Stream:
    """A stream for what may run beside the work of ``stream``, each of which has one of its own."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _forked(streams: _Streams | None) -> Iterator[None]:
    if streams is None:
        yield
        return
    here, beside = streams
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        yield


def repeated(
    key: Hashable,
    given: Sequence[Tensor],
    made: Sequence[Tensor],
    run: Callable[[], None],
    *,
    two_streams: bool = False,
) -> None:
    """Do what ``run`` does; its entries alone where it was recorded for this key and tensors like these.

    ``run`` starts kernels by ``launch`` on ``given`` and ``made``, and on others that it allocates itself; what else it
    does on a device is an ``operate``. ``key`` and the shapes, strides and types of ``given`` decide everything but
    addresses; ``made`` is new and contiguous. A call that does something else is not repeated by entries, nor one whose
    tensors Triton would compile anew for. ``two_streams``: whether an ``Aside`` gets a stream of its own.
    """
    device = given[0].device
    tensors = (*given, *made)
    addresses = [x.data_ptr() for x in tensors]
    if device.type != "cuda" or recorder() is not None or functools.reduce(operator.or_, addresses) & 15:
        run()
        return
    alike = None if len(set(addresses)) == len(addresses) else tuple(map(addresses.index, addresses))
    key = (key, device.index, alike, *[(x.dtype, x.shape, x.stride()) for x in given])
    if key not in _recordings:
        if len(_recordings) >= _KEPT:
            _recordings.clear()
        _recordings[key] = recorded(tensors, run)
        return
    found = _recordings[key]
    if found is None:
        run()
        return
    with contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        scratch = torch.empty(found.scratch, dtype=torch.uint8, device=device)
        bases = (*tensors, scratch, *found.constants)
        graphs = None
        if not torch.cuda.is_current_stream_capturing():
            at = (*addresses, *[x.data_ptr() for x in bases[len(addresses) :]])
            graphs = graphs_at(found, at, bases, device)
        if graphs is None:
            here = torch.cuda.current_stream(device)
            beside = _beside(device, here.cuda_stream) if two_streams and found.fork >= 0 else None
            repeat(found, bases, here, beside)
            return
        for part in graphs:
            if isinstance(part, int):
                _operate_again(found.entries[part], bases)
            else:
                part.replay()


def recorded(tensors: Sequence[Tensor], run: Callable[[], None]) -> Recording | None:
    """Run it and take down what it starts; None where that cannot be repeated."""
    made = Recorder(tensors)
    _active.recorder = made
    try:
        with SeesOperations(made.see):
            run()
    finally:
        _active.recorder = None
    return made.recording()


def repeat(recording: Recording, bases: Sequence[Tensor], here: Any, beside: Any) -> None:
    """Start the entries on the caller's tensors, the scratch and the constants; what is aside on ``beside`` if any."""
    for part in recording.parts:
        _start(recording, part, bases, here, beside)


def _start(recording: Recording, part: range, bases: Sequence[Tensor], here: Any, beside: Any) -> None:
    """Start entries that follow one another, on ``here``, the current stream. No operation is in a fork."""
    addresses = [x.data_ptr() for x in bases]
    main = other = here.cuda_stream
    if beside is not None:
        other = beside.cuda_stream
    for number in part:
        entry = recording.entries[number]
        if isinstance(entry, Operation):
            _operate_again(entry, bases)
            continue
        if beside is not None and number == recording.fork:
            beside.wait_stream(here)
        if beside is not None and number == recording.join:
            here.wait_stream(beside)
        arguments = list(entry.arguments)
        for place, base, offset in entry.pointers:
            arguments[place] = addresses[base] + offset
        entry.runner(*arguments, stream=other if entry.aside else main)
    if beside is not None and recording.join == part.stop == len(recording.entries):
        here.wait_stream(beside)


def graphs_at(
    recording: Recording, addresses: tuple[int, ...], bases: Sequence[Tensor], device: torch.device
) -> list[Any] | None:
    """Graphs, and numbers of operations between them, for tensors at these addresses that have come often enough."""
    found = recording.known.get(addresses, 0)
    if isinstance(found, list):
        return found
    if found < 0:
        return None
    if addresses not in recording.known and len(recording.known) >= _ADDRESSES:
        # The oldest, as a dictionary is in the order of what came.
        recording.known.pop(next(iter(recording.known)))
    recording.known[addresses] = found + 1
    if found + 1 < _OFTEN or os.environ.get(GRAPHS) == "0":
        return None
    _make_room()
    made: list[Any] = []
    for part in recording.parts:
        alone = stands_alone(recording.entries[part[0]])
        made.append(part[0] if alone else _captured(recording, part, bases, device))
    recording.known[addresses] = -1 if None in made else made
    return None if None in made else made


def _make_room() -> None:
    """Forget all graphs where there are as many as may be."""
    kept = [x for x in _recordings.values() if x is not None]
    if sum(len(made) for x in kept for made in x.known.values() if isinstance(made, list)) >= _MOST:
        for recording in kept:
            recording.known.clear()


def _captured(recording: Recording, part: range, bases: Sequence[Tensor], device: torch.device) -> Any:
    """The graph of entries that follow one another; None where the driver makes none."""
    here, beside = _beside(device, -1), _beside(device, -2)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(here):
            # Other threads may go on allocating.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                _start(recording, part, bases, here, beside if recording.fork in part else None)
            finally:
                graph.capture_end()
    except RuntimeError:
        return None
    return graph


def _operate_again(operation: Kernel | Operation, bases: Sequence[Tensor]) -> None:
    assert isinstance(operation, Operation)
    operation.run(*[_view(x, bases) for x in operation.tensors])


def _view(of: Operand, bases: Sequence[Tensor]) -> Tensor:
    found = bases[of.at.base]
    if found.dtype != of.dtype:
        # Scratch, whose parts begin at multiples of every type's size.
        found = found.view(of.dtype)
    if (found.shape, found.stride(), of.at.offset) == (of.shape, of.stride, 0):
        return found
    return found.as_strided(of.shape, of.stride, found.storage_offset() + of.at.offset // found.element_size())
