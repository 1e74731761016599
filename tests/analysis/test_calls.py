"""What a block mask asks of an accelerator: a bounded number of calls and of waits, and the lists of a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.pipeline import forget_tiles
from tests.accelerator import DEVICE, Accelerator, values

LISTS = [f"{full}{way}_{what}" for full in ("", "full_") for way in ("kv", "q") for what in ("num_blocks", "indices")]


def documents(length: int, count: int) -> Tensor:
    cuts = torch.randint(0, length, (count - 1,), generator=torch.Generator().manual_seed(0)).sort().values
    return torch.searchsorted(cuts, torch.arange(length), right=True)


def counted(text: str, length: int, heads: int = 1, **captured: Tensor) -> tuple[Accelerator, dict[str, Tensor]]:
    """The calls of a block mask on the accelerator, and its lists."""
    forget_tiles()
    with Accelerator() as accelerator:
        remote: dict[str, Any] = {name: accelerator.remote(tensor) for name, tensor in captured.items()}
        mask: Any = fs.block_mask(text, length, heads=heads, device=DEVICE, **remote)
        lists = {name: values(getattr(mask, name)) for name in LISTS}
    forget_tiles()
    return accelerator, lists


def assert_same_lists(lists: dict[str, Tensor], wanted: Any) -> None:
    for name in LISTS:
        assert torch.equal(lists[name], getattr(wanted, name)), name


# The rows of 2^19 positions are found on the host, those of 2^20 on the accelerator.
@pytest.mark.parametrize(("length", "calls", "host", "waits"), [(1 << 19, 55, 215, 0), (1 << 20, 248, 5, 8)])
def test_a_window_takes_few_calls(length: int, calls: int, host: int, waits: int) -> None:
    accelerator, lists = counted("causal & sliding_window(1024)", length)
    assert_within(accelerator, calls, host, waits)
    assert_same_lists(lists, fs.block_mask("causal & sliding_window(1024)", length))


@pytest.mark.parametrize(("length", "calls", "host", "waits"), [(1 << 19, 75, 272, 4), (1 << 20, 293, 29, 11)])
def test_documents_take_few_calls(length: int, calls: int, host: int, waits: int) -> None:
    # On the host it waits for whether the ids are sorted, for the ids at tile edges, and for two searches.
    doc = documents(length, 1000)
    accelerator, lists = counted("document & causal", length, doc=doc)
    assert_within(accelerator, calls, host, waits)
    assert_same_lists(lists, fs.block_mask("document & causal", length, doc=doc))


def assert_within(accelerator: Accelerator, calls: int, host: int, waits: int) -> None:
    assert sum(accelerator.calls.values()) <= calls
    assert sum(accelerator.host.values()) <= host
    assert sum(accelerator.waits.values()) <= waits


EVERY_WAY = [
    "full", "causal", "sliding_window(300)", "fixed(16, 2)", "bigbird(16, 2)", "dilated_window(8, 30)", "logsparse",
    "natten_2d(20, 30, 5, 5)", "sliding_window(per_head([20, 700, 20, 700]))", "per_head([causal, full]) & sinks(130)",
]  # fmt: skip


@pytest.mark.parametrize("host_rows", [0, 1 << 16], ids=["on the accelerator", "on the host"])
@pytest.mark.parametrize("text", EVERY_WAY)
def test_every_way_gives_the_lists_of_the_cpu(text: str, host_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexsparse.analysis.tiles._HOST_ROWS", host_rows)
    _, lists = counted(text, 1000, heads=4)
    assert_same_lists(lists, fs.block_mask(text, 1000, heads=4))


@pytest.mark.parametrize("host_rows", [0, 1 << 16], ids=["on the accelerator", "on the host"])
def test_captured_tensors_are_looked_up_where_they_are(host_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexsparse.analysis.tiles._HOST_ROWS", host_rows)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {"doc": documents(1000, 9), "in_prefix": torch.rand(1000, generator=generator) < 0.02}
    _, lists = counted("prefix_document", 1000, **tensors)
    assert_same_lists(lists, fs.block_mask("prefix_document", 1000, **tensors))
    marks: dict[str, Any] = {name: torch.rand(2, 1000, generator=generator) < 0.02 for name in ("vertical", "slash")}
    _, lists = counted("vertical_slash", 1000, heads=2, **marks)
    assert_same_lists(lists, fs.block_mask("vertical_slash", 1000, heads=2, **marks))
