"""What is said of a compiler that failed: the last cause, by its type and message, without what is put around it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from flexsparse.errors import BackendError
from flexsparse.failures import cause_in_words, cause_of


class LoweringException(RuntimeError): ...  # noqa: N818  The name that torch has.


class BackendCompilerFailed(RuntimeError):  # noqa: N818
    """As torch's: the first line names the function that was called, and what failed is kept beside it."""

    def __init__(self, inner: Exception) -> None:
        super().__init__(f"backend='_build' raised:\n{type(inner).__name__}: {inner}\n\nSet TORCHDYNAMO_VERBOSE=1 for")
        self.inner_exception = inner


LOWERING = (
    "ValueError: Q and KV block size must be divisible by BLOCK_M and BLOCK_N.\n  target: flex_attention\n"
    "  args[0]: TensorBox(StorageBox(\n    InputBuffer(name='primals_1')\n  ))"
)


def chained(*errors: Exception) -> Exception:
    """The errors raised from one another, the first one last."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def test_the_cause_is_the_last_that_was_raised_or_wrapped() -> None:
    inner = LoweringException(LOWERING)
    refused = BackendError("backend='flex'", got="BackendCompilerFailed: backend='_build' raised:", expected="it runs")
    outer = chained(refused, BackendCompilerFailed(inner))
    assert cause_of(outer) is inner
    assert cause_in_words(outer) == "ValueError: Q and KV block size must be divisible by BLOCK_M and BLOCK_N"
    # An error that was handled when another was raised is no cause.
    error = RuntimeError("no kernel")
    error.__context__ = KeyError("cache")
    assert cause_of(error) is error


def test_an_exception_that_is_its_own_cause_is_said_once() -> None:
    error = RuntimeError("a circle")
    error.__cause__ = error
    assert cause_in_words(error) == "RuntimeError: a circle"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(), "RuntimeError: no message"),
        (RuntimeError("backend='_build' raised:\n"), "RuntimeError: no message"),
        (AssertionError("\n\nfirst\n  second\n"), "AssertionError: first second"),
        (
            NotImplementedError("no such dtype\n\nfrom user code:\n   File 'x.py', line 1\n\nSet TORCH_LOGS=1"),
            "NotImplementedError: no such dtype",
        ),
        (
            RuntimeError("Unsupported\n  Explanation: it cannot trace x\n  Hint: avoid x\n\n  Developer debug context"),
            "RuntimeError: Unsupported Explanation: it cannot trace x",
        ),
        (
            AttributeError("no get_dtype\n\nWhile executing %copy : [num_users=1]\nOriginal traceback:\nFile 'x.py'"),
            "AttributeError: no get_dtype",
        ),
        # Triton's shows the kernel up to the line that is wrong.
        (ValueError("at 2:4:\ndef k(p):\n    x(p)\n    ^\nx is not defined"), "ValueError: x is not defined"),
        (ValueError("a: " + "word " * 100), "ValueError: a: " + "word " * 57 + "..."),
    ],
)
def test_what_is_left_out(error: Any, said: str) -> None:
    assert cause_in_words(error) == said
