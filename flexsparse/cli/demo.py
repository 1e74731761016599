"""``flexsparse demo``: the whole way on real text, from an expression to verified gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared
from flexsparse.cli.group import MISMATCH, OK

if TYPE_CHECKING:
    from rich.console import Console

    from flexsparse.cli.demo_input import DemoInput
    from flexsparse.cli.measure import Measured
    from flexsparse.compiler import CompiledAttention
    from flexsparse.explanation import Explanation
    from flexsparse.pictures.mask import Drawable
    from flexsparse.tolerance import Comparison

# On a CPU, and on a GPU.
_LENGTH, _KEPT = {"cpu": 4096, "cuda": 16384}, {"cpu": 128, "cuda": 512}
_HEADS, _KV_HEADS, _HEAD_DIM = 8, 2, 64
# The oracle holds every score of the prefix in float64.
_LONGEST_PREFIX = 2048


@dataclass(frozen=True)
class _Found:
    """Everything that the demo shows."""

    source: DemoInput
    title: str
    attention: CompiledAttention
    drawn: Drawable
    plan: Explanation
    prefix: int
    comparisons: tuple[Comparison, ...]
    sparse: Measured
    dense: Measured

    @property
    def holds(self) -> bool:
        return all(c.holds for c in self.comparisons)


@click.command("demo", short_help="Run a hybrid on real text and verify it.")
@click.option("--file", "path", metavar="PATH", help="Text to read.  [default: the topics of Python's own help]")
@click.option("--length", type=shared.POSITIVE, default=None, help="Bytes of it.  [default: 4096; 16384 on a GPU]")
@click.option("--k", type=int, default=None, help="Keys that SPARSEK keeps.  [default: 128; 512 on a GPU]")
@click.option("--window", type=int, default=None, help="Keys of the window.  [default: 128; 512 on a GPU]")
@shared.device_option
@click.option("--svg", metavar="FILE", help="Save what the terminal shows as a picture.")
@shared.seed_option
@shared.json_option
def command(as_json: bool, svg: str | None, **given: Any) -> int:
    """Run a hybrid of window, sinks and SPARSEK on real text: picture, code, plan, gradients, comparison.

    The result of the full length is verified on a prefix against the dense float64 oracle, forward and every
    gradient, and time and memory are compared with dense attention. Exits with 1 if the verification fails.

    \b
    Examples:
      flexsparse demo
      flexsparse demo --file README.md --length 2048 --k 64 --window 64
      flexsparse demo --device cuda --json
    """
    from flexsparse.cli import render

    shared.check_out("--svg", svg)
    found = _run(given)
    if as_json:
        shared.print_json(_as_dict(found))
    else:
        console = render.stdout(record=svg is not None)
        _print(found, console)
        if svg is not None:
            shared.write_out("--svg", svg, render.svg(console, "flexsparse demo"))
    return OK if found.holds else MISMATCH


def _run(given: dict[str, Any]) -> _Found:
    from flexsparse.cli import render

    with render.progress("Reading the text", 5) as advance:
        import flexsparse
        from flexsparse.cli.measure import measure

        source, title = _source(given)
        attention = flexsparse.compile(source.expression)
        tensors = source.tensors()
        advance("Drawing the mask")
        drawn = _drawable(attention, source, tensors)
        advance("Running forward and backward, verifying against the oracle")
        prefix = min(source.length, source.window + source.k + 256, _LONGEST_PREFIX)
        comparisons = _verify(attention, tensors, prefix, source.seed)
        advance("Measuring flexsparse")
        sparse = measure(source, "flexsparse")
        advance("Measuring dense attention")
        dense = measure(source, "dense")
        advance("Done")
    return _Found(source, title, attention, drawn, attention.explain(), prefix, comparisons, sparse, dense)


def _source(given: dict[str, Any]) -> tuple[DemoInput, str]:
    """The demo's input, its length cut to the text's, and a line about it."""
    from flexsparse.cli.demo_input import DemoInput, read_text

    device = shared.read_device(given["device"])
    text = read_text(given["path"])
    kind = "cuda" if device.type == "cuda" else "cpu"
    length = min(given["length"] or _LENGTH[kind], len(text))
    k, window = (_KEPT[kind] if given[name] is None else given[name] for name in ("k", "window"))
    dtype = "bfloat16" if kind == "cuda" else "float32"
    source = DemoInput(
        given["path"], length, k, window, _HEADS, _KV_HEADS, _HEAD_DIM, dtype, str(device), given["seed"]
    )
    name = given["path"] or "Python's own help (pydoc_data.topics)"
    return source, f"{name}, the first {length:,} of {len(text):,} bytes"


def _drawable(attention: CompiledAttention, source: DemoInput, tensors: dict[str, Any]) -> Drawable:
    from flexsparse.pictures.mask import drawable, square_shapes

    shapes = square_shapes(source.length, source.heads, source.kv_heads, source.device)
    return drawable(attention, shapes, {"scores": tensors["scores"]})


def _verify(attention: CompiledAttention, tensors: dict[str, Any], prefix: int, seed: int) -> tuple[Comparison, ...]:
    """Run the full length; compare its prefix with the oracle's.

    Nothing flows back from behind the prefix, and no query before looks there, so the results of the prefix are
    those of the prefix alone.
    """
    import torch

    from flexsparse.tolerance import Call, evaluate, judge

    generator = torch.Generator().manual_seed(seed + 1)
    query, scores = tensors["query"], tensors["scores"]
    flow = torch.randn(query.shape, generator=generator).to(query)
    flow_lse = torch.randn(query.shape[:3], generator=generator).to(scores)
    flow[:, :, prefix:], flow_lse[:, :, prefix:] = 0, 0
    call = Call(query, tensors["key"], tensors["value"], {"scores": scores}, ("scores",), flow, flow_lse)
    got = evaluate(attention, call)
    short = Call(
        query[:, :, :prefix],
        tensors["key"][:, :, :prefix],
        tensors["value"][:, :, :prefix],
        {"scores": scores[..., :prefix]},
        ("scores",),
        flow[:, :, :prefix],
        flow_lse[..., :prefix],
    )
    cut = {name: x[:, :, :prefix] for name, x in got.items()}
    return judge(attention.pattern, cut, short)


def _print(found: _Found, console: Console) -> None:
    from flexsparse.cli import render

    source, shapes = found.source, found.plan.plan.shapes
    console.print(render.heading("Text and pattern"))
    console.print(
        render.facts(
            ("text", found.title),
            (
                "tensors",
                f"{source.heads} query heads, {source.kv_heads} KV heads of {source.head_dim}, {source.dtype} on "
                f"{source.device}; bytes embedded and projected by fixed random weights, selection scores as well",
            ),
            ("pattern", str(found.attention.pattern)),
        )
    )
    console.print(render.heading("What each query sees"))
    picture = found.drawn.tiles(0, render.cells())
    console.print(render.mask(picture, console))
    console.print(render.legend(picture, "tiles", console))
    seen = "" if picture.pairs is None else f"; {picture.pairs:.1%} of all pairs are seen"
    console.print(f"{picture.computed:.1%} of the tiles are computed{seen}.")
    console.print(f"The last query sees {_seen_last(found)} of {shapes.kv_len:,} keys. Head 0 is shown, on this text.")
    for stage in ("mask_mod", "score_mod"):
        console.print(render.heading(f"Generated {stage}"))
        console.print(render.code(found.attention.code(stage), console))
    console.print(render.heading("Plan"))
    tiles = found.plan.plan.tiles
    computed = (
        "" if tiles is None else f"{tiles.total:,} of {tiles.block} x {tiles.block}, {tiles.density:.1%} computed"
    )
    console.print(render.explanation(found.plan, computed))
    console.print(render.heading("Verified against the dense float64 oracle"))
    _print_checks(found, console)
    console.print(render.heading("Beside dense attention"))
    _print_measured(found, console)


def _seen_last(found: _Found) -> int:
    last = found.source.length - 1
    picture = found.drawn.pairs(0, range(last, last + 1), range(last + 1), (1, 1))
    return picture.counts[2]


def _print_checks(found: _Found, console: Console) -> None:
    from flexsparse.cli import render

    table = render.columns("result", "error", "allowed", "error / allowed", right=(1, 2))
    for c in found.comparisons:
        table.add_row(c.name, f"{c.error:.2e}", f"{c.allowed:.2e}", render.share(c.share, c.holds, console))
    console.print(table)
    held = sum(c.holds for c in found.comparisons)
    text = (
        f"{held} of {len(found.comparisons)} results of the run at full length, on its first {found.prefix} positions"
    )
    console.print(render.verdict(found.holds, text))


def _print_measured(found: _Found, console: Console) -> None:
    from flexsparse.cli import render

    table = render.columns("forward + backward", "forward", "backward", "together", "peak memory", right=(1, 2, 3, 4))
    for name, m in (("flexsparse, this pattern", found.sparse), ("dense causal attention", found.dense)):
        peak = "not measured" if m.peak is None else f"{m.peak / 2**20:,.0f} MiB"
        table.add_row(name, *(f"{1000 * t:,.1f} ms" for t in (m.forward, m.backward, m.total)), peak)
    console.print(table)
    console.print(_sentence(found))


def _sentence(found: _Found) -> str:
    """Which was faster, said plainly, and what dense attention does not compute."""
    ratio = found.dense.total / found.sparse.total
    what = "scaled_dot_product_attention, same shapes, without pattern, bias and gates"
    if 0.95 < ratio < 1.05:
        return f"Both take about as long. Dense is {what}."
    if ratio > 1:
        return f"flexsparse is {ratio:.1f}x faster. Dense is {what}."
    backend = found.plan.plan.backend
    why = ": on a CPU the exact chunked path runs, the fused kernels need a GPU" if backend == "chunked" else ""
    return f"Dense is {1 / ratio:.1f}x faster here{why}. Dense is {what}."


def _as_dict(found: _Found) -> dict[str, Any]:
    from flexsparse.cli import render

    picture = found.drawn.tiles(0, (render.WIDEST, render.WIDEST))
    return {
        "input": found.source.as_dict(),
        "pattern": str(found.attention.pattern),
        "picture": ["".join("EPF"[kind] for kind in row) for row in picture.kinds],
        "pairs_seen": picture.pairs,
        "mask_mod": found.attention.code("mask_mod"),
        "score_mod": found.attention.code("score_mod"),
        "plan": found.plan.as_dict(),
        "verified_positions": found.prefix,
        "results": [
            {"name": c.name, "error": c.error, "allowed": c.allowed, "holds": c.holds} for c in found.comparisons
        ],
        "holds": found.holds,
        "seconds": {
            name: {"forward": m.forward, "backward": m.backward}
            for name, m in (("flexsparse", found.sparse), ("dense", found.dense))
        },
        "peak_bytes": {"flexsparse": found.sparse.peak, "dense": found.dense.peak},
        "dense_is_faster": found.dense.total < found.sparse.total,
    }
