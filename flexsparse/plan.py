"""The plan: which backend runs a bound pattern, what else was considered, and why it lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexsparse.analysis.heads import first_alike
from flexsparse.analysis.tiles import EMPTY, FULL, PARTIAL, Tiles, depends_on
from flexsparse.backends import BY_FLEX, BY_RESIDUE, CHOSEN_AMONG, OVER_ROWS, VERDICTS
from flexsparse.codegen.gathering.parts import near_mask
from flexsparse.codegen.gathering.rows import rows_of
from flexsparse.errors import BackendError, DeviceError
from flexsparse.ir.nodes import Constant
from flexsparse.ir.program import Program
from flexsparse.ir.residues import split_residues
from flexsparse.ir.text import function_name
from flexsparse.prediction import predict_calls
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import CHUNK, Settings
from flexsparse.verdict import Verdict


@dataclass(frozen=True)
class Candidate:
    """A way to run the pattern: whether it can run here, and why it was taken or left.

    ``seconds`` of a whole call are predicted for those among which backend="auto" chooses on a GPU.
    """

    backend: str
    verdict: Verdict
    seconds: float | None = None

    @property
    def reason(self) -> str:
        """Why it can or cannot run, and what it is predicted to take."""
        predicted = "" if self.seconds is None else f" {self.seconds * 1e3:.2g} ms a call predicted."
        return f"{self.verdict.reason}{predicted}"


@dataclass(frozen=True)
class TileCounts:
    """Tiles over all rows and heads; ``undecided`` of the partial ones could be empty or full for all we know."""

    block: int
    empty: int
    partial: int
    full: int
    undecided: int = 0

    @property
    def total(self) -> int:
        return self.empty + self.partial + self.full

    @property
    def density(self) -> float:
        """The share of tiles that are computed."""
        return (self.partial + self.full) / self.total


@dataclass(frozen=True)
class Plan:
    """How a pattern runs on given shapes.

    ``flops`` counts two products of the computed tiles (2 multiply-adds of head_dim and value_dim an element),
    forward only, times ``calls``. The mask has lists for ``mask_rows`` x ``mask_heads``; ``distinct_heads`` of them
    were analysed, as the others have the same masks. ``gathered``: the keys that a query meets besides those of the
    tiles, which then are those that the pattern allows whatever is selected. ``notes`` are facts that a user should
    know, such as where gradients come from.
    """

    backend: str
    shapes: Shapes
    calls: int
    tiles: TileCounts | None
    mask_rows: int
    mask_heads: int
    distinct_heads: int
    gathered: int
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]

    @property
    def heads_alike(self) -> str:
        """For how many heads the mask was analysed, in words; empty where that is all of them."""
        return f", analysed for {self.distinct_heads} that differ" if self.distinct_heads < self.mask_heads else ""

    @property
    def flops(self) -> int | None:
        """Floating-point operations of the forward pass, None while the tiles are not known."""
        if self.tiles is None:
            return None
        elements = (self.tiles.partial + self.tiles.full) * self.tiles.block**2
        elements += self.shapes.batch * self.shapes.heads * self.shapes.q_len * self.gathered
        return 2 * elements * (self.shapes.head_dim + self.shapes.value_dim) * self.calls

    @property
    def operand_bytes(self) -> int:
        """Bytes of query, key, value, output and lse of one call: what it reads and writes at least."""
        shapes = self.shapes
        queries = shapes.batch * shapes.heads * shapes.q_len * (shapes.head_dim + shapes.value_dim)
        keys = shapes.batch * shapes.kv_heads * shapes.kv_len * (shapes.head_dim + shapes.value_dim)
        lse = 4 * shapes.batch * shapes.heads * shapes.q_len
        return (queries + keys) * shapes.dtype.itemsize + lse


def count_tiles(*parts: Tiles) -> TileCounts:
    """The tiles of each kind, over all parts."""
    empty, partial, full = (sum(tiles.count(kind) for tiles in parts) for kind in (EMPTY, PARTIAL, FULL))
    return TileCounts(parts[0].block, empty, partial, full, sum(tiles.undecided for tiles in parts))


def choose(program: Program, shapes: Shapes, settings: Settings) -> tuple[str, tuple[Candidate, ...]]:
    """The backend, and all that were considered. Raises BackendError or DeviceError where the wanted one cannot run."""
    verdicts = {name: verdict(program, shapes) for name, verdict in VERDICTS.items()}
    predicted: Mapping[str, float] = {}
    if shapes.device.type == "cuda":
        able = tuple(name for name in CHOSEN_AMONG if verdicts[name].holds)
        predicted = predict_calls(program, shapes, settings.block_size, able)
    candidates = tuple(Candidate(name, verdict, predicted.get(name)) for name, verdict in verdicts.items())
    by_name = {c.backend: c for c in candidates}
    if settings.backend != "auto":
        chosen = settings.backend
        if not by_name[chosen].verdict.holds:
            error = DeviceError if shapes.device.type not in ("cpu", "cuda") else BackendError
            raise error(
                f"backend={chosen!r}",
                got=f"{shapes.dtype} on {shapes.device}" + (" with gradients" if shapes.needs_grad else ""),
                expected="a call that this backend can run",
                mend=f"{by_name[chosen].verdict.reason} backend='chunked' runs it exactly, on any device.",
            )
    elif predicted:
        chosen = min(predicted, key=lambda name: predicted[name])
    else:
        chosen = "chunked"
    if settings.backend == "auto" and chosen == "chunked" and shapes.device.type != "cpu":
        reason = by_name["flex"].verdict.reason
        raise BackendError(
            "backend='auto'",
            got=f"{shapes.dtype} on {shapes.device}",
            expected="a call that FlexAttention can run",
            mend=f"{reason} Ask for backend='chunked', which is exact and slower.",
        )
    return chosen, candidates


def make_plan(
    program: Program, shapes: Shapes, settings: Settings, tiles: Tiles | None, rest: Tiles | None = None
) -> Plan:
    """The plan of the backend that ``choose`` takes; it reads ``tiles`` and ``rest``. Raises as ``choose`` does."""
    chosen, candidates = choose(program, shapes, settings)
    gated = program.gate_v != Constant(1.0)
    mask = near_mask(program) if chosen == "gather" or chosen in OVER_ROWS else program.mask
    distinct_heads = len(set(first_alike(mask, program.tables, shapes.heads)))
    return Plan(
        backend=chosen,
        shapes=shapes,
        calls=2 if gated and chosen in BY_FLEX else 1,
        tiles=None if tiles is None else count_tiles(*(t for t in (tiles, rest) if t is not None)),
        mask_rows=shapes.batch if depends_on(mask, "b") else 1,
        mask_heads=shapes.heads if distinct_heads > 1 else 1,
        distinct_heads=distinct_heads,
        gathered=sum(min(s.k, shapes.kv_len) + CHUNK for s in program.selections) if chosen == "gather" else 0,
        candidates=candidates,
        notes=_notes(program, shapes, settings, chosen, gated, distinct_heads),
    )


def _notes(
    program: Program, shapes: Shapes, settings: Settings, chosen: str, gated: bool, distinct_heads: int
) -> tuple[str, ...]:
    notes = []
    if chosen == "chunked" and shapes.device.type == "cpu" and settings.backend == "auto":
        notes.append("CPU: FlexAttention cannot train here, so the exact chunked path runs.")
    if chosen == "gather":
        notes.append(
            f"{CHUNK} queries share the keys in the slots as their chunk starts, and those that enter inside it; no "
            "key counts twice."
        )
        if shapes.needs_grad:
            notes.append("All gradients are summed in a fixed order, without atomics: bit-identical between runs.")
            learned = [name for name in program.learnable if name not in program.sink_only]
            if learned:
                notes.append(
                    f"Gradients of {', '.join(learned)}: recomputed by PyTorch operations, which is slow at length."
                )
    if chosen in OVER_ROWS:
        notes += _row_notes(program, shapes, settings)
    if chosen in BY_RESIDUE:
        split = split_residues(program)
        assert split is not None
        notes.append(
            f"Positions are reordered by residue modulo {split.modulus}: query, key and value are copied, and out back."
        )
        if split.rest is not None:
            notes.append("Pairs of two classes take a call of their own; the two are joined by their lse.")
    if gated and chosen in BY_FLEX:
        notes.append("The gate m on V takes two FlexAttention calls, over s + log m and s + log(1 - m).")
    if program.has_sink and chosen in BY_FLEX:
        again = shapes.dtype.itemsize == 4 and shapes.needs_grad and settings.deterministic is not False
        notes.append(
            "The sink joins the softmax after the attention: out * sigmoid(lse - sink), lse logaddexp(lse, sink); its "
            + (
                "gradient is recomputed in float32."
                if again
                else "gradient is a plain sum, bit-identical between runs."
            )
        )
    if chosen in ("flex", "gather_flex", "residue_flex") and shapes.needs_grad:
        recomputed = [name for name in program.learnable if name not in program.sink_only]
        if recomputed and settings.deterministic is not False:
            notes.append(
                f"Gradients of {', '.join(recomputed)}: recomputed without atomics, bit-identical "
                "between runs; deterministic=False is faster."
            )
        if program.gates and settings.deterministic is not True:
            notes.append("Gradients of the scores: FlexAttention's atomics, so the last bits may differ between runs.")
    for leaf in program.opaque:
        notes.append(
            f"{function_name(leaf.function)} could not be traced ({leaf.reason}): it runs as it is, but its tiles are "
            "judged from single elements, and simplification, pictures of its parts and fast block masks are lost."
        )
    if program.selections and chosen != "gather" and chosen not in OVER_ROWS:
        notes.append("Tiles depend on the scores: they are classified at each call.")
    if program.chosen:
        notes.append(
            "Blocks are chosen from query and key at each call, without a gradient of the choice, and their tiles are "
            "classified then."
        )
        notes.append(
            "A selection that depends on the query carries no eviction certificate: any key may be chosen again, so "
            "generation must keep them all."
        )
    mask = near_mask(program) if chosen in OVER_ROWS else program.mask
    if chosen != "gather" and not depends_on(mask, "b") and distinct_heads == 1:
        notes.append("The mask does not depend on batch or head: one block mask serves all.")
    return tuple(notes)


def _row_notes(program: Program, shapes: Shapes, settings: Settings) -> list[str]:
    rows = rows_of(program.selections, shapes.kv_len, settings.block_size)
    notes = [
        f"{rows.chunk:,} queries share copies of the keys in the slots as their chunk starts: {rows.total:,} rows for "
        f"{rows.length:,} keys, {rows.total / rows.length:.1f} times the memory of key and value. No key counts twice."
    ]
    if shapes.needs_grad:
        notes.append("Gradients of the copies are added to their keys in a fixed order, without atomics.")
    return notes
