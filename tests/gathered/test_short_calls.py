"""Short calls started again as a whole, in Triton's interpreter: kernels run again, at the addresses of that call."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import flexsparse as fs
from flexsparse import short_calls
from flexsparse._torch import is_plain
from flexsparse.ops import gated
from flexsparse.runtime import gathered_arguments

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter")


class Stream:
    cuda_stream = 0


def tensor_at(address: int, like: Tensor) -> Tensor:
    """A contiguous tensor on memory that is somebody else's."""
    memory = (ctypes.c_byte * like.nbytes).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel()).view(like.shape)


class Repeats:
    """Stands for ``launch`` and ``repeated`` of a GPU: what is recorded is started again from the next call on."""

    def __init__(self) -> None:
        self.recordings: dict[Any, Any] = {}
        self.again: list[str] = []

    def launch(
        self, kernel: Any, grid: Any, pointers: Sequence[Tensor] = (), numbers: Sequence[Any] = (), /, **named: Any
    ) -> None:
        from flexsparse.codegen.kernels.recording import recorder

        rest = kernel.arg_names[len(pointers) + len(numbers) :]
        given = [*pointers, *numbers, *[named[name] for name in rest if name in named]]
        options = {name: named[name] for name in named if name not in kernel.arg_names}
        with _disable_current_modes():
            # What the interpreter itself does on tensors is nothing that a GPU does.
            kernel[grid](**dict(zip(kernel.arg_names, given, strict=False)), **options)
        active = recorder()
        if active is not None:
            tensors = {place: x for place, x in enumerate(given) if isinstance(x, Tensor) and x.numel()}

            def runner(*values: Any, stream: int) -> None:
                placed = [tensor_at(x, tensors[n]) if n in tensors else x for n, x in enumerate(values)]
                kernel[grid](**dict(zip(kernel.arg_names, placed, strict=False)), **options)

            active.kernel(runner, given)

    def repeated(
        self, key: Any, given: Sequence[Tensor], made: Sequence[Tensor], run: Callable[[], None], **_: Any
    ) -> None:
        from flexsparse.codegen.kernels import recording

        if recording.recorder() is not None:
            run()
            return
        tensors = (*given, *made)
        key = (key, *[(x.dtype, x.shape, x.stride()) for x in given])
        if key not in self.recordings:
            self.recordings[key] = recording.recorded(tensors, run)
            return
        found = self.recordings[key]
        assert found is not None, "not complete"
        scratch = torch.full((found.scratch,), 255, dtype=torch.uint8)
        recording.repeat(found, (*tensors, scratch, *found.constants), Stream(), None)
        self.again.append(key[0][0])


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> Repeats:
    """Calls on a CPU take the way of a GPU."""
    # Imported before launch and repeated are exchanged in every module.
    from flexsparse.codegen.kernels import launch, recording, slot_records
    from flexsparse.ops import kernels  # noqa: F401

    made, old = Repeats(), (launch.launch, recording.repeated)
    for module in [m for name, m in sys.modules.items() if name.startswith("flexsparse")]:
        if getattr(module, "launch", None) is old[0]:
            monkeypatch.setattr(module, "launch", made.launch)
        if getattr(module, "repeated", None) is old[1]:
            monkeypatch.setattr(module, "repeated", made.repeated)
    monkeypatch.setattr(short_calls, "_DEVICE", "cpu")
    monkeypatch.setattr(gated, "_by_kernels", is_plain)
    monkeypatch.setattr(gathered_arguments, "slot_records", slot_records.slot_records)
    return made


def operands(seed: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, h, size, 16, generator=generator) for h in (4, 2, 2)]


def test_what_is_started_again_gives_the_bits_of_its_own_call(repeats: Repeats) -> None:
    attention, size = fs.compile("(sliding_window(16) | sparsek(9, after=16)) + alibi", backend="gather"), 70
    # The first is like any other, the second is recorded, the third is not one of them.
    for seed in range(3):
        query, key, value = operands(seed, size)
        scores = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(seed))
        found, lse = attention(query, key, value, scores=scores, validate=False, return_lse=True)
    assert repeats.again == ["attention"]
    wanted, wanted_lse = attention(query, key, value, scores=scores, return_lse=True)
    assert torch.equal(found, wanted)
    assert torch.equal(lse, wanted_lse)
