"""What a plan costs on a device: operations, bytes, predicted time, and which of them sets it.

A full and a partial tile each take a time of their own on one multiprocessor, from the share of the matrix rate that
FlexAttention's kernel was measured to reach on it. Tiles spread evenly over the multiprocessors; device memory and
the launch set lower limits. It is the time of the kernels: what a call does on the host comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexsparse.hardware import Hardware
from flexsparse.plan import Plan
from flexsparse.prediction import tile_seconds


@dataclass(frozen=True)
class Cost:
    """``seconds`` is the forward time of the FlexAttention kernels; ``bound`` names the part that sets it.

    ``flops`` counts whole tiles; ``bytes`` reads each input and writes each output once; ``lists_bytes`` is what the
    block mask takes. ``parts`` gives each limit in seconds.
    """

    flops: int
    bytes: int
    lists_bytes: int
    seconds: float
    bound: str
    parts: dict[str, float]
    hardware: str

    def __str__(self) -> str:
        return (
            f"{self.seconds * 1e3:.3g} ms forward predicted on {self.hardware}, set by {self.bound}; "
            f"{self.bytes / 2**20:,.0f} MiB of operands, {self.lists_bytes / 2**20:,.1f} MiB of tile indices"
        )


def predict(plan: Plan, hardware: Hardware) -> Cost | None:
    """The cost of a plan's forward pass, None while its tiles are not known."""
    tiles = plan.tiles
    if tiles is None or plan.flops is None:
        return None
    shapes = plan.shapes
    compute = plan.calls * tile_seconds(hardware, shapes, tiles.block, tiles.partial, tiles.full)
    moved = plan.calls * plan.operand_bytes
    parts = {
        "tiles": compute,
        "memory": moved / (hardware.bandwidth_gbs * 1e9),
        "launch": plan.calls * hardware.launch_us * 1e-6,
    }
    bound = max(parts, key=lambda name: parts[name])
    seconds = max(parts["tiles"], parts["memory"]) + parts["launch"]
    return Cost(plan.flops, moved, _list_bytes(plan), seconds, bound, parts, hardware.name)


def _list_bytes(plan: Plan) -> int:
    """Indices of both directions, without what shared storage saves."""
    tiles = plan.tiles
    assert tiles is not None
    copies = plan.shapes.batch * plan.shapes.heads // (plan.mask_rows * plan.mask_heads)
    return 2 * 4 * (tiles.partial + tiles.full) // copies
