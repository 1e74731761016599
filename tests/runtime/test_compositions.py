"""Every composition on every CPU path against the float64 oracle: out, lse and all gradients."""

from __future__ import annotations

from typing import Any

import pytest

import flexsparse as fs
from tests.helpers import assert_same_result, make_inputs, oracle, run, tensors_of, torchs_own_warnings
from tests.runtime.compositions import COMPOSITIONS


def compare_with_oracle(pattern: Any, backend: str, **shapes: Any) -> None:
    inputs = make_inputs(tensors_of(pattern), **shapes)
    got = run(fs.compile(pattern, backend=backend, block_size=16), inputs)
    assert_same_result(got, run(oracle(pattern), inputs))


@pytest.mark.parametrize("size", [1, 17, 129])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_chunked_is_the_oracle(name: str, size: int) -> None:
    compare_with_oracle(COMPOSITIONS[name], "chunked", size=size)


@torchs_own_warnings
@pytest.mark.parametrize("size", [1, 17])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_eager_flex_is_the_oracle(name: str, size: int) -> None:
    # Eager FlexAttention takes head_dim 16 and more.
    compare_with_oracle(COMPOSITIONS[name], "flex_eager", size=size, head_dim=16)


@torchs_own_warnings
@pytest.mark.parametrize("name", ["hybrid gate kv", "bias on a hybrid", "two selections, either"])
def test_eager_flex_is_the_oracle_over_several_tiles(name: str) -> None:
    compare_with_oracle(COMPOSITIONS[name], "flex_eager", size=129, head_dim=16)
