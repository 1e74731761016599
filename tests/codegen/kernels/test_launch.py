"""What is started directly, and what goes through Triton: with a stand-in for Triton's own launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from flexsparse.codegen.kernels import launch as launching
from flexsparse.codegen.kernels.lifetimes import _follow

pytestmark = pytest.mark.skipif(
    not launching._DIRECT or not isinstance(_follow, JITFunction), reason="this Triton launches itself"
)


class Compiled:
    """Remembers how it was started."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.started.append((grid, *arguments))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """Every kernel that Triton was asked to find; it starts what it finds itself."""
    found: list[Compiled] = []

    def launched(kernel: Any, grid: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Compiled:
            found.append(Compiled())
            return found[-1]

        return run

    monkeypatch.setattr(JITFunction, "__getitem__", launched)
    monkeypatch.setattr(launching, "_compiled", {})
    return found


def start(a: torch.Tensor, b: torch.Tensor, times: int = 64, **options: Any) -> None:
    launching.launch(_follow, (3, 2), (a, a, a, b), (times, -5), KEPT=False, BLOCK=32, LAST=True, **options)


def test_the_second_launch_is_direct_and_has_every_argument(made: list[Compiled]) -> None:
    a, b = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    start(a, b)
    start(b, a)
    (compiled,) = made
    assert compiled.started == [((3, 2, 1), *[b.data_ptr()] * 3, a.data_ptr(), 64, -5, False, 32, True)]


def test_arguments_by_name_stand_in_the_kernels_order(made: list[Compiled]) -> None:
    a = torch.zeros(64, dtype=torch.int32)
    for _ in range(2):
        named = dict.fromkeys(("p_next", "p_time", "p_length", "p_link"), a)
        launching.launch(_follow, (1,), LAST=True, BLOCK=32, none=-5, KEPT=False, times=64, num_warps=4, **named)
    assert made[0].started == [((1, 1, 1), *[a.data_ptr()] * 4, 64, -5, False, 32, True)]


def test_what_triton_would_compile_anew_is_looked_up_anew(made: list[Compiled]) -> None:
    a = torch.zeros(68, dtype=torch.int32)
    start(a, a)
    start(a, a, times=65)
    start(a.long(), a.long())
    start(a, a, num_warps=8)
    assert len(made) == 4
    assert not any(compiled.started for compiled in made)


def test_pointers_that_are_not_aligned_go_through_triton(made: list[Compiled]) -> None:
    a = torch.zeros(68, dtype=torch.int32)
    start(a, a)
    for _ in range(2):
        start(a[1:], a)
    assert len(made) == 3
    start(a, a)
    assert len(made[0].started) == 1
