"""benchmarks/sources.py: what it calls a difference between kernels that are shown and kernels that ran."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import pytest

pytest.importorskip("triton")

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
SOURCE = "@triton.jit\ndef triton_tem_fused_flex_attention_0(p):\n    tmp1 = q >= kv\n    tl.store(p, tmp1)\n"


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sources")


def kernel(name: str = "triton_tem_fused_flex_attention_0", source: str = SOURCE, **launch: Any) -> dict[str, Any]:
    return {"name": name, "source": source, "launch": {"num_warps": 4, "BLOCK_M": 128, **launch}, "backward": False}


def test_equal_sources_are_the_same(sources: Any) -> None:
    second = kernel("forward", "def forward(): ...\n")
    rows = sources.compared([kernel(), second], [kernel(), second])
    assert [row["same"] for row in rows] == [True, True]
    assert [row["lines"] for row in rows] == [4, 1]
    assert [(row["difference"], row["launch"]) for row in rows] == [([], {})] * 2


def test_inductors_numbers_in_names_are_no_difference(sources: Any) -> None:
    renamed = "triton_tem_fused_flex_attention_zeros_3"
    ran = kernel(renamed, SOURCE.replace("triton_tem_fused_flex_attention_0", renamed))
    assert [row["same"] for row in sources.compared([kernel()], [ran])] == [True]
    # A reduction is no template, whatever its number.
    other = kernel(renamed, SOURCE.replace("triton_tem_fused_flex_attention_0", "triton_red_fused_0"))
    assert [row["same"] for row in sources.compared([kernel()], [other])] == [False]


def test_one_line_that_differs_is_shown(sources: Any) -> None:
    (row,) = sources.compared([kernel()], [kernel(source=SOURCE.replace("q >= kv", "q > kv"))])
    assert not row["same"]
    assert row["difference"] == [
        "--- shown", "+++ ran", "@@ -3 +3 @@", "-    tmp1 = q >= kv", "+    tmp1 = q > kv",
    ]  # fmt: skip
    assert row["launch"] == {}


def test_an_option_of_the_launch_that_differs_is_shown(sources: Any) -> None:
    (row,) = sources.compared([kernel()], [kernel(num_warps=8)])
    assert (row["same"], row["difference"], row["launch"]) == (False, [], {"num_warps": [4, 8]})
    # Also one that only one of them has.
    (row,) = sources.compared([kernel()], [kernel(num_stages=3)])
    assert (row["same"], row["launch"]) == (False, {"num_stages": [None, 3]})


def test_a_kernel_that_is_missing_is_named(sources: Any) -> None:
    first, second = kernel("first"), kernel("second")
    assert sources.compared([first, second], [first])[1] == {
        "kernel": "second", "same": False, "difference": ["did not run"],
    }  # fmt: skip
    # Wherever it stands among those that ran.
    for ran in ([first, second], [second, first]):
        rows = sources.compared([second], ran)
        assert [row["same"] for row in rows] == [True, False]
        assert rows[1] == {"kernel": "first", "same": False, "difference": ["was not shown"]}


def test_kernels_of_one_name_are_paired_in_their_order(sources: Any) -> None:
    kept, lost = kernel(), kernel(source=SOURCE + "# lost\n")
    assert [row["same"] for row in sources.compared([kept, lost], [kept, lost])] == [True, True]
    assert [row["same"] for row in sources.compared([kept, lost], [lost, kept])] == [False, False]
    assert [row["same"] for row in sources.compared([kept, kept], [kept])] == [True, False]
