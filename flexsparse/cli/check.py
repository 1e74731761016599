"""``flexsparse check``: a compiled pattern against the dense oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared
from flexsparse.cli.group import MISMATCH, OK

if TYPE_CHECKING:
    import torch

    from flexsparse.cli.checking import Case
    from flexsparse.runtime.inputs import Shapes

_LENGTHS, _DTYPES = (1, 17, 129), ("float32", "bfloat16")
# The oracle holds every score in float64, times 2 S / D for a selection.
_LONGEST = 2048


@click.command("check", short_help="Compare with the dense oracle; exit 1 on a mismatch.")
@shared.expression_argument
@click.option("--length", type=shared.POSITIVE, multiple=True, help="Repeatable.  [default: 1, 17, 129]")
@click.option("--dtype", multiple=True, help="Beside float64; repeatable.  [default: float32, bfloat16]")
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
    must give the same bits; rows that see no key must give 0. Allowed is twice the error of PyTorch's own dense
    formula in the same dtype on the same input, plus 4 units in the last place. Exits with 1 if anything fails.

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


def _run(expression: str, given: dict[str, Any]) -> list[Case]:
    from flexsparse.cli import render

    with render.working("Compiling the pattern"):
        import flexsparse
        from flexsparse.example_inputs import example_call, fitting_heads

        device = shared.read_device(given["device"])
        attention = flexsparse.compile(expression, backend=given["backend"], deterministic=given["deterministic"])
        exact = flexsparse.compile(expression, backend="chunked")
        dtypes = [shared.read_dtype(name) for name in ("float64", *(given["dtype"] or _DTYPES))]
        heads = given["heads"] or fitting_heads(attention.pattern.node, 2 * given["kv_heads"])
        shapes = [
            _shapes(given, heads, length, dtype, device)
            for dtype in dict.fromkeys(dtypes)
            for length in _lengths(given)
        ]
        from flexsparse.cli.checking import run_case
    cases = []
    with render.progress("Checking", len(shapes)) as advance:
        for shape in shapes:
            # FlexAttention has no float64; the chunked path does, and auto means whatever can run.
            wide = shape.dtype.itemsize == 8 and device.type == "cuda" and given["backend"] == "auto"
            call = example_call(attention, shape, given["seed"])
            cases.append(run_case(exact if wide else attention, call, deterministic=given["deterministic"]))
            advance(f"Checked {str(shape.dtype).removeprefix('torch.')} at {shape.q_len}")
    return cases


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
    from flexsparse.errors import SettingError
    from flexsparse.runtime.inputs import Shapes

    kv_heads, head_dim = given["kv_heads"], given["head_dim"]
    if heads % kv_heads:
        raise SettingError("--kv-heads", got=f"{kv_heads} for {heads} query heads", expected="a divisor of --heads")
    return Shapes(given["batch"], heads, kv_heads, length, length, head_dim, head_dim, dtype, device, 0, True)


def _print(expression: str, seed: int, cases: list[Case], render: Any) -> None:
    from rich.text import Text

    from flexsparse.cli.checking import dtype_name

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


def _print_rest(cases: list[Case], render: Any, console: Any) -> None:
    changed = sorted({name for case in cases for name in case.changed})
    excused = {name for case in cases for name in case.excused}
    runs = "two runs gave the same bits" if not changed else f"two runs differed in {', '.join(changed)}"
    if changed and set(changed) <= excused:
        runs += ", which the plan does not promise; --deterministic does"
    rows = sum(case.empty_rows for case in cases)
    wrong = sorted({name for case in cases for name in case.empty_wrong})
    empty = "out 0, gradient 0" if not wrong else f"not 0 in {', '.join(wrong)}"
    console.print(
        render.facts(("repeated", runs), ("empty", f"{rows} rows see no key" + (f": {empty}" if rows else "")))
    )
    console.print()
    compared = [c for case in cases for c in case.comparisons]
    failed = sum(not c.holds for c in compared)
    holds = all(case.holds for case in cases)
    text = f"{len(compared) - failed} of {len(compared)} results within what is allowed"
    console.print(render.verdict(holds, f"{text}, in {len(cases)} cases."))
