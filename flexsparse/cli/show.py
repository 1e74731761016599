"""``flexsparse show``: pictures of a pattern, in the terminal or in a file."""

from __future__ import annotations

from typing import Any

import click

from flexsparse.cli import options as shared


@click.command("show", short_help="Draw masks, scores, gates and selections.")
@shared.expression_argument
@click.option(
    "--view", default="tiles", show_default=True, metavar="VIEW", help="tiles, heads, score, gate or selection."
)
@click.option("--length", type=shared.POSITIVE, default=None, help="Queries and keys.  [default: 1024, or as --scores]")
@click.option(
    "--block", type=shared.POSITIVE, default=None, help="Tile size.  [default: 16 to 128; larger from 131073]"
)
@click.option("--zoom", metavar="Q0:Q1,KV0:KV1", help="Show single pairs of these queries and keys.")
@click.option("--heads", type=shared.POSITIVE, default=None, help="Query heads.  [default: 4, or as per_head needs]")
@click.option("--head", type=click.IntRange(min=0), default=None, help="The head to show.  [default: 0]")
@click.option("--scores", metavar="[NAME=]FILE", multiple=True, help=".pt or .npy: scores [H, S] of a selection.")
@click.option("--raw", type=float, default=None, help="The raw score that --view score starts from.  [default: 0.0]")
@click.option("--query", type=click.IntRange(min=0), default=None, help="The query of the curves of --view score.")
@click.option("--cells", type=click.IntRange(8, 1024), default=None, help="Cells a side.  [default: 32; in files 256]")
@click.option("--out", metavar="FILE", help="Write a .svg, a .png or an .html page instead.")
@shared.seed_option
@shared.json_option
def command(expression: str, as_json: bool, **given: Any) -> None:
    """Show which keys each query sees: tiles that are full, partial or empty, and the share that is computed.

    Queries run down, keys run right. Tiles are classified by the compiler as for a real call. Where a cell covers
    several tiles it is full only if all are, and empty only if all are. Tensors that the pattern takes (scores,
    documents, lengths) are example data, made from --seed, unless --scores gives them.

    \b
    Views (--view):
      tiles      the tiles of one head; with --zoom single pairs
      heads      one small picture for each head that differs
      score      what becomes of --raw, by distance; with --zoom by pair
      gate       the soft gate of each pair, the greatest of a cell
      selection  which keys are selected when, in which slots, above what tau

    Scores and gates are printed as numbers where they fit, some 9 keys wide. A page (--out FILE.html) says which part
    of the pattern decides the tile under the pointer.

    \b
    Examples:
      flexsparse show "causal() & sliding_window(256)"
      flexsparse show "causal() & document()" --length 1000000
      flexsparse show "causal() + alibi()" --view score --zoom 0:8,0:8
      flexsparse show "sparsek_window(8, 8)" --length 64 --view selection
      flexsparse show "sparsek_window(64, 128)" --out mask.html
    """
    from flexsparse.cli import render
    from flexsparse.cli.show_figure import draw

    path = None
    if given["out"] is not None:
        from flexsparse.pictures.figure import check_path

        path = check_path(given["out"])
        shared.check_out("--out", given["out"])
    with render.working("Compiling the pattern"):
        shown = draw(expression, given, with_reasons=path is not None or as_json)
        if path is not None:
            from flexsparse.pictures.figure import save

            save(shown.figure, path)
    if as_json:
        shared.print_json(shown.as_dict())
    elif path is not None:
        click.echo(f"note: the picture is in {path}", err=True)
    else:
        from flexsparse.cli import draw as drawing

        console = render.stdout()
        drawing.print_figure(shown.figure, console)
