"""FlexAttention over the keys and, behind them, copies of those that each chunk of queries has selected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flexsparse.codegen.block_mask import block_lists
from flexsparse.codegen.flex import Generated
from flexsparse.codegen.gathering.rows import Rows
from flexsparse.runtime.chunked import Work
from flexsparse.runtime.flex import Launchers, fused
from flexsparse.runtime.launcher import mark_dynamic
from flexsparse.runtime.rows import Tables, make_tables


@dataclass(frozen=True)
class RowsCall:
    """A call over rows: where they stand, the functions of rows, and ``values``, those of ``make_buffers``."""

    rows: Rows
    generated: Generated
    values: Mapping[str, Any]


def attend_rows(
    call: RowsCall,
    work: Work,
    launchers: Launchers,
    operands: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, ...],
    *,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out and, if needed, lse without a sink. ``work`` has the tiles of rows; ``tensors`` are those that flow back.

    Where each query head selects for itself, rows are gathered for each: key and value are repeated to H heads.
    """
    query, key, value = operands
    tables = make_tables(call.rows, call.values)
    shapes = replace(work.shapes, kv_len=call.rows.total)
    if tables.heads not in (1, shapes.kv_heads):
        key, value = (x.repeat_interleave(shapes.heads // shapes.kv_heads, 1) for x in (key, value))
        shapes = replace(shapes, kv_heads=shapes.heads)
    given = {**work.constants, **work.opaque, **_by_row(call, tables, dict(zip(work.names, tensors, strict=True)))}
    given["row_group"] = shapes.heads // tables.heads
    dims = dict(zip(work.names, work.sequence_dims, strict=True))
    inside = {
        name: mark_dynamic(x, dims.get(name, (2,)), launchers.plain.settings) if isinstance(x, Tensor) else x
        for name, x in given.items()
        if name in call.generated.arguments
    }
    gathered = (query, tables.gather(key), tables.gather(value))
    return fused(
        launchers, shapes, work.scale, gathered, call.generated.build(**inside), block_lists(work.tiles), needs_lse
    )


def _by_row(call: RowsCall, tables: Tables, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was given, with the scores of selections by row, and the tables."""
    by_row = {"key_of_row": tables.key}
    for n in range(len(call.rows.ks)):
        by_row |= {f"from_{n}": tables.from_[n], f"until_{n}": tables.until[n]}
        for name in (f"u_{n}", f"u_{n}_fixed"):
            if name in given:
                by_row[name] = tables.gather_scores(given[name])
    return given | by_row
