"""``flexsparse bench``: time of a pattern beside PyTorch's own attention and other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared

if TYPE_CHECKING:
    import torch

    from flexsparse.compiler import CompiledAttention
    from flexsparse.peers import Contender, Setting
    from flexsparse.timing import Timing

# What is measured where nothing is said: on a CPU small sizes, which say little about a GPU.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"lengths": "512,2048", "heads": 4, "head_dim": 64, "dtype": "float32"},
    "cuda": {"lengths": "4096,16384", "heads": 16, "head_dim": 128, "dtype": "bfloat16"},
}
_ON_CPU = "No GPU is used: PyTorch operations on a CPU, which say nothing about the kernels of a GPU."
_METHOD = (
    "median and quartiles of whole calls, first call not counted; forward without gradients; validate=False; block "
    "masks of FlexAttention made beforehand; "
)
_CLOCKS = {
    "cpu": "the host's clock",
    "cuda": "CUDA events around eager calls, launches included, caches emptied between calls",
}


@dataclass(frozen=True)
class Row:
    """What one contender took at one length; ``reason`` says why a time is missing."""

    length: int
    by: str
    computes: str
    backend: str | None
    forward: Timing | None
    forward_backward: Timing | None
    reason: str = ""


@click.command("bench", short_help="Time a pattern beside SDPA, FlexAttention and others.")
@shared.expression_argument
@click.option("--lengths", metavar="N,N,...", help="Queries and keys.  [default: 512,2048; 4096,16384 on a GPU]")
@click.option("--batch", type=shared.POSITIVE, default=1, show_default=True, help="Rows of the batch.")
@click.option("--heads", type=shared.POSITIVE, default=None, help="Query heads.  [default: 4; 16 on a GPU]")
@click.option("--kv-heads", type=shared.POSITIVE, default=None, help="Key and value heads.  [default: as --heads]")
@click.option("--head-dim", type=shared.POSITIVE, default=None, help="Size of a head.  [default: 64; 128 on a GPU]")
@click.option("--dtype", default=None, help="float32, bfloat16, ...  [default: float32; bfloat16 on a GPU]")
@click.option("--peers", default="sdpa,flex,others", show_default=True, help="Of these, or none.")
@click.option("--forward-only", is_flag=True, help="Leave forward + backward out.")
@click.option(
    "--seconds", type=click.FloatRange(0.01, 60), default=0.5, show_default=True, help="About so long for each number."
)
@click.option("--save", metavar="FILE", help="Write what --json prints there, after each row.")
@shared.device_option
@shared.backend_option
@shared.seed_option
@shared.json_option
@click.pass_context
def command(context: click.Context, /, expression: str, save: str | None, as_json: bool, **given: Any) -> None:
    """Time the pattern beside its peers: forward, and forward with backward, at several lengths.

    Peers are PyTorch's scaled_dot_product_attention with each of its back ends and with the mask as a tensor, raw
    FlexAttention with the same functions where it can express them, and fla (NSA), adasplash, flash-sparse-attn and
    attn-gym where they are installed. Each runs the nearest work that it can do; the column "computes" says which.
    Random operands from --seed. What cannot run here is listed with the reason.

    \b
    Examples:
      flexsparse bench "causal() & sliding_window(512)"
      flexsparse bench "sparsek_window(512, 512)" --lengths 4096,65536 --kv-heads 4
      flexsparse bench "causal()" --device cpu --peers sdpa --json
      flexsparse bench "causal() & sinks(4)" --save bench.json
    """
    from flexsparse.cli import bench_table

    shared.check_out("--save", save)
    attention, given = _ready(expression, given)
    data = _about(context, attention, given)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        if save is not None:
            shared.write_out("--save", save, json.dumps(shared.finite(as_data()), indent=1) + "\n")

    def as_data(complete: bool = False) -> dict[str, Any]:
        return {**data, "complete": complete, "rows": [asdict(row) for row in rows]}

    with bench_table.shown(data, quiet=as_json) as show:
        for row_of, says in _work(attention, given):
            show.next(says)
            row = row_of()
            keep(row)
            show.row(row)
    if save is not None:
        shared.write_out("--save", save, json.dumps(shared.finite(as_data(True)), indent=1) + "\n")
    if as_json:
        shared.print_json(as_data(True))
    elif save is not None:
        click.echo(f"note: the measurements are in {save}", err=True)


def _ready(expression: str, given: dict[str, Any]) -> tuple[CompiledAttention, dict[str, Any]]:
    """The compiled pattern, and the options with their defaults and as values. Raises what is wrong with them."""
    from flexsparse.cli import render

    lengths = None if given["lengths"] is None else _lengths(given["lengths"])
    groups = _groups(given["peers"])
    with render.working("Compiling the pattern"):
        import flexsparse
        from flexsparse.example_inputs import fitting_heads

        device = shared.read_device(given["device"])
        usual = _DEFAULTS["cuda" if device.type == "cuda" else "cpu"]
        attention = flexsparse.compile(expression, backend=given["backend"])
        heads = given["heads"] or fitting_heads(attention.pattern.node, usual["heads"])
        given = {name: usual.get(name) if value is None else value for name, value in given.items()}
        kv_heads = given["kv_heads"] or heads
        shared.check_heads(heads, kv_heads)
    lengths = lengths or _lengths(given["lengths"])
    sizes: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "device": device,
        "dtype": shared.read_dtype(given["dtype"]),
    }
    # A call that the backend refuses is refused before anything is measured.
    alike: dict[str, Any] = {
        "batch": given["batch"],
        "head_dim": given["head_dim"],
        "needs_grad": not given["forward_only"],
    }
    attention.bind(q_len=max(lengths), **sizes, **alike)
    return attention, {**given, **sizes, "lengths": lengths, "peers": groups}


def _lengths(text: str) -> tuple[int, ...]:
    from flexsparse.errors import SettingError

    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise SettingError(
            "--lengths",
            got=repr(text),
            expected="whole numbers of at least 1 with commas between",
            mend="For example --lengths 4096,16384.",
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _groups(text: str) -> tuple[str, ...]:
    from flexsparse.errors import SettingError, nearest

    known = ("sdpa", "flex", "others")
    names = [] if text == "none" else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            hint = nearest(name, (*known, "none"))
            raise SettingError("--peers", got=repr(name), expected=f"some of {', '.join(known)}, or none", mend=hint)
    return tuple(names)


def _work(attention: CompiledAttention, given: dict[str, Any]) -> Any:
    """What is to be done, one after the other: a function that measures a row, and what it is."""
    from flexsparse.example_inputs import example_call
    from flexsparse.peers import contenders, make_setting
    from flexsparse.runtime.inputs import Shapes

    for length in given["lengths"]:
        lead = (given["batch"], given["heads"], given["kv_heads"], length, length)
        wide, wanted = given["head_dim"], not given["forward_only"]
        shapes = Shapes(*lead, wide, wide, given["dtype"], given["device"], 0, wanted)
        call = example_call(attention, shapes, given["seed"])
        setting = make_setting(attention, call, needs_grad=wanted)
        for contender in contenders(setting, given["peers"]):
            yield _measuring(contender, setting, given), f"{contender.name} at {length:,}"


def _measuring(contender: Contender, setting: Setting, given: dict[str, Any]) -> Callable[[], Row]:
    def measured() -> Row:
        import torch

        from flexsparse.peers import CannotRun

        ours = contender.name == "flexsparse"
        device, length = given["device"], setting.call.query.shape[2]
        times: dict[str, Timing] = {}
        reason = ""
        try:
            for name, timing in _times(contender, setting, device, given["seconds"], not given["forward_only"]):
                times[name] = timing
        except CannotRun as why:
            reason = str(why)
        except Exception as error:
            # What others raise is theirs; the pattern's own errors are the user's to mend, but for a full memory.
            if ours and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            reason = f"failed: {(str(error) or type(error).__name__).splitlines()[0][:160]}"
        if not reason and not contender.has_backward and not given["forward_only"]:
            reason = "no gradients on a CPU"
        backend = setting.attention.plan.backend if ours and times else None
        found = (times.get("forward"), times.get("forward_backward"))
        return Row(length, contender.name, contender.computes, backend, *found, reason)

    return measured


def _times(contender: Contender, setting: Setting, device: torch.device, seconds: float, backward: bool) -> Any:
    """("forward", its time), then ("forward_backward", its time) where that is wanted and there is one."""
    import torch

    from flexsparse.timing import time_calls

    run = contender.prepare()
    with torch.no_grad():
        yield "forward", time_calls(run, device, seconds)
    if not (backward and contender.has_backward):
        return
    flow, leaves = torch.randn_like(run()), setting.leaves
    yield (
        "forward_backward",
        time_calls(lambda: torch.autograd.grad(run(), leaves, flow, allow_unused=True), device, seconds),
    )


def _about(context: click.Context, attention: CompiledAttention, given: dict[str, Any]) -> dict[str, Any]:
    """Everything that the numbers depend on, ready for JSON."""
    from flexsparse.doctor import device_name, versions
    from flexsparse.peers import versions_of_others

    kind = "cuda" if given["device"].type == "cuda" else "cpu"
    names = ("batch", "heads", "kv_heads", "head_dim", "seed")
    return {
        "command": _command_line(context, given),
        "device": device_name(given["device"]),
        "versions": versions() | (versions_of_others() if "others" in given["peers"] else {}),
        "pattern": str(attention.pattern),
        "shapes": {
            **{name: given[name] for name in names},
            "lengths": list(given["lengths"]),
            "dtype": str(given["dtype"]).removeprefix("torch."),
        },
        "unit": "ms",
        "method": _METHOD + _CLOCKS[kind],
        "note": _ON_CPU if kind == "cpu" else "",
    }


def _command_line(context: click.Context, given: dict[str, Any]) -> str:
    """The command that measures the same again, its defaults written out; without the places of files."""
    import shlex

    words = ["flexsparse", "bench", context.params["expression"], "--lengths", ",".join(map(str, given["lengths"]))]
    for name in ("batch", "heads", "kv_heads", "head_dim", "dtype", "device", "backend", "seconds", "seed"):
        words += [f"--{name.replace('_', '-')}", str(given[name]).removeprefix("torch.")]
    words += ["--peers", ",".join(given["peers"]) or "none", *["--forward-only"] * given["forward_only"]]
    return shlex.join(words)
