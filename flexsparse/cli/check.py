"""``flexsparse check``: a compiled pattern against the dense oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared
from flexsparse.cli.group import MISMATCH, OK

if TYPE_CHECKING:
    import torch

    from flexsparse.checks import Checked
    from flexsparse.runtime.inputs import Shapes
    from flexsparse.tolerance import Call

_LENGTHS, _DTYPES = (1, 17, 129), ("float32", "bfloat16")
# The oracle holds every score in float64, times 2 S / D for a selection.
_LONGEST = 2048
# Backends that take no float64.
_NARROW = ("gather", "gather_flex", "flex")
# Cases whose wrong elements are shown; the others are likely to have the same cause.
_TOLD = 1


@click.command("check", short_help="Compare with the dense oracle; exit 1 on a mismatch.")
@shared.expression_argument
@click.option("--length", type=shared.POSITIVE, multiple=True, help="Repeatable.  [default: 1, 17, 129]")
@click.option(
    "--dtype",
    multiple=True,
    help="Beside float64, where the backend takes it; repeatable.  [default: float32, bfloat16]",
)
@click.option("--batch", type=shared.POSITIVE, default=2, show_default=True, help="Rows of the batch.")
@click.option("--heads", type=shared.POSITIVE, default=None, help="Query heads.  [default: 4, or as per_head needs]")
@click.option("--kv-heads", type=shared.POSITIVE, default=2, show_default=True, help="Key and value heads.")
@click.option("--head-dim", type=shared.POSITIVE, default=32, show_default=True, help="Size of a head.")
@click.option("--deterministic/--no-deterministic", default=None, help="As in compile.  [default: None]")
@shared.device_option
@shared.backend_option
@shared.seed_option
@shared.json_option
def command(expression: str, as_json: bool, **given: Any) -> int:
    """Check the compiled pattern against the dense float64 oracle, on random input.

    Compared are out, lse and the gradients of query, key, value, selection scores and learnable tensors; two runs
    must give the same bits; rows that see no key must give 0; a NaN must stay in its row and not be swallowed. Allowed
    is twice the error of PyTorch's own dense formula in the same dtype on the same input, plus 4 units in the last
    place. Of what fails the first wrong element is shown, and why: the key and the part of the pattern that disagree.
    The longest case has operands whose heads lie side by side, as a projection gives them.

    Exits with 0 where everything holds, 1 where something does not, 2 for a mistake in the command. flexsparse.check
    does the same for tensors of your own, in your own tests.

    \b
    Examples:
      flexsparse check "causal() & sliding_window(8)"
      flexsparse check "sparsek_window(16, 32)" --length 300 --dtype float16
      flexsparse check "causal() + relative_bias(16)" --device cuda --json
    """
    from flexsparse.cli import render

    cases = _run(expression, given)
    if as_json:
        holds = all(case.holds for case in cases)
        shared.print_json({"pattern": expression, "holds": holds, "cases": [case.as_dict() for case in cases]})
    else:
        _print(expression, given["seed"], cases, render)
    return OK if all(case.holds for case in cases) else MISMATCH


def _run(expression: str, given: dict[str, Any]) -> list[Checked]:
    from flexsparse.cli import render

    with render.working("Compiling the pattern"):
        import flexsparse
        from flexsparse.example_inputs import example_call, fitting_heads

        device = shared.read_device(given["device"])
        attention = flexsparse.compile(expression, backend=given["backend"], deterministic=given["deterministic"])
        exact = flexsparse.compile(expression, backend="chunked")
        exact_too = () if given["backend"] in _NARROW else ("float64",)
        dtypes = [shared.read_dtype(name) for name in (*exact_too, *(given["dtype"] or _DTYPES))]
        heads = given["heads"] or fitting_heads(attention.pattern.node, 2 * given["kv_heads"])
        shapes = [
            _shapes(given, heads, length, dtype, device)
            for dtype in dict.fromkeys(dtypes)
            for length in _lengths(given)
        ]
        from flexsparse.checks import check_call
    cases = []
    with render.progress("Checking", len(shapes)) as advance:
        for shape in shapes:
            # FlexAttention has no float64; the chunked path does, and auto means whatever can run.
            wide = shape.dtype.itemsize == 8 and device.type == "cuda" and given["backend"] == "auto"
            call = example_call(attention, shape, given["seed"])
            call = _side_by_side(call) if shape.q_len == max(_lengths(given)) else call
            cases.append(check_call(exact if wide else attention, call))
            advance(f"Checked {str(shape.dtype).removeprefix('torch.')} at {shape.q_len}")
    return cases


def _side_by_side(call: Call) -> Call:
    """The same operands as views of [B, S, H, D], whose heads lie side by side in memory."""
    from dataclasses import replace

    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in call.operands.values())
    return replace(call, query=query, key=key, value=value)


def _lengths(given: dict[str, Any]) -> tuple[int, ...]:
    from flexsparse.errors import SettingError

    lengths: tuple[int, ...] = tuple(dict.fromkeys(given["length"])) or _LENGTHS
    if max(lengths) > _LONGEST:
        raise SettingError(
            "--length",
            got=str(max(lengths)),
            expected=f"at most {_LONGEST}, as the oracle materialises every score in float64",
        )
    return lengths


def _shapes(given: dict[str, Any], heads: int, length: int, dtype: torch.dtype, device: torch.device) -> Shapes:
    from flexsparse.runtime.inputs import Shapes

    kv_heads, head_dim = given["kv_heads"], given["head_dim"]
    shared.check_heads(heads, kv_heads)
    return Shapes(given["batch"], heads, kv_heads, length, length, head_dim, head_dim, dtype, device, 0, True)


def _print(expression: str, seed: int, cases: list[Checked], render: Any) -> None:
    from rich.text import Text

    from flexsparse.checks import dtype_name

    console = render.stdout()
    backends = ", ".join(dict.fromkeys(case.backend for case in cases))
    lengths = ", ".join(str(length) for length in dict.fromkeys(case.length for case in cases))
    console.print(
        render.facts(
            ("pattern", Text(expression, "bold")),
            ("backend", f"{backends} against the dense float64 oracle"),
            ("input", f"random, lengths {lengths}, seed {seed}; for each result the length where it did worst"),
        )
    )
    console.print()
    table = render.columns("dtype", "result", "length", "error", "allowed", "error / allowed", right=(2, 3, 4))
    for dtype in dict.fromkeys(case.dtype for case in cases):
        mine = [case for case in cases if case.dtype is dtype]
        for name in [c.name for c in mine[0].comparisons]:
            found = [(case.length, c) for case in mine for c in case.comparisons if c.name == name]
            length, worst = max(found, key=lambda pair: (not pair[1].holds, pair[1].share))
            numbers = (str(length), f"{worst.error:.2e}", f"{worst.allowed:.2e}")
            table.add_row(dtype_name(dtype), name, *numbers, render.share(worst.share, worst.holds, console))
        table.add_section()
    console.print(table)
    console.print()
    _print_rest(cases, render, console)


def _print_rest(cases: list[Checked], render: Any, console: Any) -> None:
    rows = sum(case.empty_rows for case in cases)
    wrong = sorted({name for case in cases for name in case.empty_wrong})
    empty = "out 0, gradient 0" if not wrong else f"not 0 in {', '.join(wrong)}"
    stays = "stays in its row, reaches who sees it" if not any(case.nan_wrong for case in cases) else "FAILS, see below"
    console.print(
        render.facts(
            ("repeated", _repeated(cases)),
            ("empty", f"{rows} rows see no key" + (f": {empty}" if rows else "")),
            ("NaN", stays),
        )
    )
    console.print()
    failing = [case for case in cases if not case.holds]
    for case in failing[:_TOLD]:
        console.print(render.heading(f"First wrong elements, {_name(case)}"))
        console.print("\n".join(case.lines()))
    if len(failing) > _TOLD:
        console.print(f"\n{len(failing) - _TOLD} more cases fail; --json lists them.")
    if failing:
        console.print()
    compared = [c for case in cases for c in case.comparisons]
    held = sum(c.holds for c in compared)
    console.print(
        render.verdict(not failing, f"{held} of {len(compared)} results within what is allowed, in {len(cases)} cases.")
    )


def _name(case: Checked) -> str:
    from flexsparse.checks import dtype_name

    return f"{dtype_name(case.dtype)} at {case.length}"


def _repeated(cases: list[Checked]) -> str:
    changed = sorted({e.result for case in cases for e in case.changed})
    if not changed:
        return "two runs gave the same bits"
    excused = {name for case in cases for name in case.excused}
    promised = "" if not set(changed) <= excused else ", which the plan does not promise; --deterministic does"
    return f"two runs differed in {', '.join(changed)}{promised}"
