"""Where a plan stands under a device's roof: what its operations and bytes take at least, and which of them binds.

The roof is the peak of the matrix units on the right and device memory on the left. Operations are those of the
forward pass in whole tiles; bytes are each operand once, so that a kernel that reads keys again from device memory
moves more. The time under the roof is a floor: no kernel with these operations and operands is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexsparse.hardware import Hardware
from flexsparse.plan import Plan


@dataclass(frozen=True)
class Roofline:
    """Rates are operations and bytes a second; ``predicted`` is the cost model's time in seconds, where it has one."""

    hardware: str
    flops: int
    bytes: int
    peak: float
    bandwidth: float
    predicted: float | None
    source: str

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    @property
    def ridge(self) -> float:
        """The intensity from which on the matrix units bind."""
        return self.peak / self.bandwidth

    @property
    def bound(self) -> str:
        """What binds under the roof: "compute" or "memory"."""
        return "compute" if self.intensity >= self.ridge else "memory"

    @property
    def roof(self) -> float:
        """Operations a second that the roof allows at this intensity."""
        return min(self.peak, self.intensity * self.bandwidth)

    @property
    def floor(self) -> float:
        """Seconds that nothing with these operations and bytes can undercut."""
        return self.flops / self.roof

    @property
    def reached(self) -> float | None:
        """Operations a second at the predicted time, None without one."""
        return None if self.predicted is None else self.flops / self.predicted

    def as_dict(self) -> dict[str, Any]:
        """Plain data: operations, bytes, rates, and times in seconds."""
        names = ("hardware", "flops", "bytes", "peak", "bandwidth", "intensity", "ridge", "bound", "floor", "predicted")
        return {name: getattr(self, name) for name in (*names, "source")}

    def __str__(self) -> str:
        time = f"{_time(self.floor)} at least (the floor of {'matrix units' if self.bound == 'compute' else 'memory'})"
        if self.predicted is not None:
            time += f", {_time(self.predicted)} predicted"
        return (
            f"{self.flops:.3g} operations forward over {self.bytes / 2**20:,.1f} MiB: {self.intensity:,.0f} a byte, "
            f"{self.bound}-bound on {self.hardware}, which turns at {self.ridge:,.0f}; {time}"
        )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} us"


def roofline(plan: Plan, hardware: Hardware, predicted: float | None) -> Roofline | None:
    """A plan under a device's roof, with its ``predicted`` seconds where there are any.

    None while its tiles are not known, and for float64, whose rate is not known.
    """
    if not plan.flops or plan.shapes.dtype.itemsize == 8:
        return None
    # float32 products run on the matrix units as tf32, at half the rate.
    peak = hardware.matrix_tflops * 1e12 / (2 if plan.shapes.dtype.itemsize == 4 else 1)
    return Roofline(
        hardware=hardware.name,
        flops=plan.flops,
        bytes=plan.calls * plan.operand_bytes,
        peak=peak,
        bandwidth=hardware.bandwidth_gbs * 1e9,
        predicted=predicted,
        source=hardware.source,
    )
