"""The plan in words, as text and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flexsparse.backends import BY_FLEX
from flexsparse.cost import Cost, predict
from flexsparse.hardware import Hardware
from flexsparse.ir.program import Program
from flexsparse.plan import Plan, TileCounts
from flexsparse.roofline import Roofline, roofline


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` gives: ``str()`` for people, ``as_dict()`` for programs."""

    pattern: str
    program: Program
    plan: Plan
    hardware: Hardware | None = None

    @property
    def cost(self) -> Cost | None:
        """The predicted cost on ``hardware``; None without one, while tiles are unknown, or for other backends."""
        if self.hardware is None or self.plan.backend != "flex":
            return None
        return predict(self.plan, self.hardware)

    @property
    def roofline(self) -> Roofline | None:
        """Operations and bytes under the roof of ``hardware``; None without it, with tiles unknown, in float64."""
        if self.hardware is None:
            return None
        return roofline(self.plan, self.hardware, None if self.cost is None else self.cost.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        shapes, tiles = self.plan.shapes, self.plan.tiles
        return {
            "pattern": self.pattern,
            "numbers": dict(self.program.numbers),
            "backend": self.plan.backend,
            "shapes": {
                **{name: getattr(shapes, name) for name in _SHAPE_NAMES},
                "dtype": str(shapes.dtype).removeprefix("torch."),
                "device": str(shapes.device),
            },
            "tiles": None if tiles is None else _tiles_dict(tiles),
            "mask": {name: getattr(self.plan, f"mask_{name}") for name in ("rows", "heads")}
            | {"distinct_heads": self.plan.distinct_heads},
            "gathered_keys": self.plan.gathered,
            "flex_calls": self.plan.calls if self.plan.backend in BY_FLEX else 0,
            "forward_flops": self.plan.flops,
            "candidates": [
                {
                    "backend": c.backend,
                    "can_run": c.verdict.holds,
                    "reason": c.verdict.reason,
                    "predicted_seconds": c.seconds,
                }
                for c in self.plan.candidates
            ],
            "notes": list(self.plan.notes),
            "cost": None if self.cost is None else asdict(self.cost),
            "roofline": None if self.roofline is None else self.roofline.as_dict(),
        }

    def __str__(self) -> str:
        shapes, tiles = self.plan.shapes, self.plan.tiles
        dtype = str(shapes.dtype).removeprefix("torch.")
        lines = [
            f"pattern   {self.pattern}",
            *(
                [f"numbers   {', '.join(f'{name} = {value!r}' for name, value in self.program.numbers)}"]
                if self.program.numbers
                else []
            ),
            f"shapes    query [{shapes.batch}, {shapes.heads}, {shapes.q_len}, {shapes.head_dim}], "
            f"key [{shapes.batch}, {shapes.kv_heads}, {shapes.kv_len}, {shapes.head_dim}], {dtype}, {shapes.device}"
            + (", with gradients" if shapes.needs_grad else ""),
            f"backend   {self.plan.backend}",
        ]
        for candidate in self.plan.candidates:
            mark = ">" if candidate.backend == self.plan.backend else " "
            state = "can run" if candidate.verdict.holds else "cannot run"
            lines.append(f"        {mark} {candidate.backend:<18} {state}: {candidate.reason}")
        if tiles is None:
            lines.append("tiles     known at the call, from its tensors")
        else:
            lines.append(
                f"tiles     {tiles.total:,} of {tiles.block} x {tiles.block}: {tiles.full:,} full, "
                f"{tiles.partial:,} partial, {tiles.empty:,} empty ({tiles.density:.1%} computed)"
            )
            exact = (
                "exact" if not tiles.undecided else f"sound; {tiles.undecided:,} partial tiles could not be proved so"
            )
            lines.append(f"classes   {exact}")
            if self.plan.gathered:
                lines.append(f"gathered  {self.plan.gathered:,} selected keys a query, besides those tiles")
            lines.append(f"work      {self.plan.flops or 0:.3g} floating-point operations forward, in whole tiles")
        if self.cost is not None:
            lines.append(f"cost      {self.cost}")
        if self.roofline is not None:
            lines.append(f"roofline  {self.roofline}")
        lines.append(f"mask      {self.plan.mask_rows} row(s) x {self.plan.mask_heads} head(s){self.plan.heads_alike}")
        lines += [f"note      {note}" for note in self.plan.notes]
        return "\n".join(lines)


_SHAPE_NAMES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "q_offset", "needs_grad")


def _tiles_dict(tiles: TileCounts) -> dict[str, Any]:
    return {
        "block": tiles.block,
        "full": tiles.full,
        "partial": tiles.partial,
        "empty": tiles.empty,
        "density": tiles.density,
        "undecided": tiles.undecided,
    }
