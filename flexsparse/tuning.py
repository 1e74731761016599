"""The search behind ``flexsparse tune``: every size of tiles, warps and stages that fits, timed one by one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

import torch

from flexsparse.codegen.gathered import gathered_source
from flexsparse.errors import BackendError
from flexsparse.parser import parse
from flexsparse.pipeline import bind_call, compile_pattern
from flexsparse.runtime.gathered import attend_gathered, make_call
from flexsparse.runtime.gathered_sizes import FEW_FEATURES, FOUR_BLOCKS, KERNELS, THREE_BLOCKS, Sizes, fitting, sizes_of
from flexsparse.runtime.inputs import Shapes
from flexsparse.runtime.tuned import ROWS, is_sound, steps_and_keys
from flexsparse.settings import Settings

# Milliseconds of the pass that a kernel belongs to, with these sizes for it; inf where it cannot be built.
Measure = Callable[[str, Sizes], float]
PATTERN = "sliding_window(512) | sparsek(512, after=512)"
_REPEATS = 10
# The side of the matrices whose product keeps a GPU busy for a millisecond.
_AHEAD = 8192
# What a process that builds takes of a GPU's memory, bytes.
_ROOM = 3 << 30
_builder: OnGpu | None = None


@dataclass(frozen=True)
class Trial:
    """What one kernel took with one choice of sizes."""

    kernel: str
    sizes: Sizes
    milliseconds: float


def candidates(kernel: str, shapes: Shapes) -> list[Sizes]:
    """What is tried: first the sizes that are used today, then all others that fit the GPU's shared memory."""
    made = tuple(Sizes(*x) for x in itertools.product(*steps_and_keys(kernel), (4, 8), (1, 2, 3)))
    if kernel in ROWS and max(shapes.head_dim, shapes.value_dim) <= FEW_FEATURES:
        four_warps = [sizes for sizes in made if sizes.warps == 4]
        made += tuple(replace(sizes, registers=n) for n in (FOUR_BLOCKS, THREE_BLOCKS) for sizes in four_warps)
    made = tuple(sizes for sizes in made if is_sound(kernel, sizes))
    return list(dict.fromkeys((sizes_of(kernel, shapes), *fitting(kernel, made, shapes))))


def search(
    shapes: Shapes, measure: Measure, advance: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Sizes], list[Trial]]:
    """The fastest sizes of each kernel, and all that was measured. ``advance`` is told of each trial.

    Sizes of today win a tie. Raises BackendError where no sizes of a kernel could be measured.
    """
    best, trials = {}, []
    for kernel in KERNELS:
        mine = []
        for sizes in candidates(kernel, shapes):
            mine.append(Trial(kernel, sizes, measure(kernel, sizes)))
            advance(f"{kernel}, {shapes.head_dim} wide")
        fastest = min(mine, key=lambda trial: trial.milliseconds)
        if fastest.milliseconds == float("inf"):
            raise BackendError(
                f"the {kernel} kernel",
                got=f"no sizes of {len(mine)} that could be built for head_dim {shapes.head_dim}",
                expected="at least one",
                mend="Look at the error of one: flexsparse check 'sparsek(64)' --device cuda.",
            )
        best[kernel] = fastest.sizes
        trials += mine
    return best, trials


def count(shapes: Iterable[Shapes]) -> int:
    """How many trials the search makes over these shapes."""
    return sum(len(candidates(kernel, one)) for one in shapes for kernel in KERNELS)


class OnGpu:
    """Passes over random operands on ``shapes.device``: forward, or backward for gradient kernels."""

    def __init__(self, shapes: Shapes) -> None:
        program = compile_pattern(parse(PATTERN).node)
        device, dtype = shapes.device, shapes.dtype
        lead = {"query": shapes.heads, "key": shapes.kv_heads, "value": shapes.kv_heads}
        self._query, self._key, self._value = (
            torch.randn(shapes.batch, n, shapes.q_len, shapes.head_dim, device=device, dtype=dtype, requires_grad=True)
            for n in lead.values()
        )
        scores = torch.randn(shapes.batch, shapes.kv_heads, shapes.q_len, device=device, requires_grad=True)
        bound = bind_call(program, shapes, {"scores": scores}, Settings(backend="gather"), validate=False)
        source, scale = gathered_source(program.program), shapes.head_dim**-0.5
        self._call = make_call(source, shapes, bound.tiles, scale, bound.buffers, program.program.selections)
        self._flow = torch.randn(
            shapes.batch, shapes.heads, shapes.q_len, shapes.value_dim, device=device, dtype=dtype
        )  # fmt: skip
        self._ahead = torch.randn(_AHEAD, _AHEAD, device=device, dtype=torch.bfloat16)

    def __call__(self, kernel: str, sizes: Sizes) -> float:
        """``Measure``"""
        if not self.build(kernel, sizes):
            return float("inf")
        return sorted(self._once(kernel, sizes) for _ in range(_REPEATS))[_REPEATS // 2]

    def build(self, kernel: str, sizes: Sizes) -> bool:
        """Run it once; whether it can be built."""
        try:
            self._once(kernel, sizes)
        except Exception as error:
            if not _cannot_build(error):
                raise
            return False
        return True

    def _once(self, kernel: str, sizes: Sizes) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        call = replace(self._call, sizes={**self._call.sizes, kernel: sizes})
        operands, backward = (self._query, self._key, self._value), kernel != "forward"
        if backward:
            out, _ = attend_gathered(call, *operands)
        # The GPU is busy while the host launches, so that the time is that of the kernels.
        for _ in range(3):
            self._ahead @ self._ahead
        start.record()
        if backward:
            torch.autograd.grad(out, operands, self._flow)
        else:
            attend_gathered(call, *operands)
        stop.record()
        torch.cuda.synchronize(self._flow.device)
        return start.elapsed_time(stop)


def build_ahead(shapes: Shapes, measure: OnGpu, advance: Callable[[str], None]) -> set[tuple[str, Sizes]]:
    """Build what the search will time, a process for each core; what cannot be built.

    Triton keeps what they build in its cache on disk, where ``measure`` finds it. ``advance`` is told of each build.
    Raises BrokenProcessPool where a process was ended.
    """
    trials = [(kernel, sizes) for kernel in KERNELS for sizes in candidates(kernel, shapes)]
    # What every trial of the backward pass wants is built once, and not by every process.
    measure.build("query", sizes_of("query", shapes))
    free, _ = torch.cuda.mem_get_info(shapes.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, free // _ROOM))
    failed = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(shapes,)) as pool:
        running = {pool.submit(_build, *trial): trial for trial in trials}
        try:
            for done in as_completed(running):
                if not done.result():
                    failed.add(running[done])
                advance(f"building, {shapes.head_dim} wide")
        except BaseException:
            # What waits is not begun.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _prepare(shapes: Shapes) -> None:
    """In a process that builds: what its builds run on. Ctrl-C is for the process that searches."""
    global _builder
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _builder = OnGpu(shapes)


def _build(kernel: str, sizes: Sizes) -> bool:
    assert _builder is not None
    return _builder.build(kernel, sizes)


def _cannot_build(error: Exception) -> bool:
    """Whether an error says that a kernel with these sizes does not compile or fit, and not something else."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    return isinstance(error, CompilationError | OutOfResources) or "PassManager" in str(error)
