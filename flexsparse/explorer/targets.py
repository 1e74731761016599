"""The GPUs that code can be made for where there is none, and how many blocks of a kernel a multiprocessor holds."""

from __future__ import annotations

from dataclasses import dataclass

from flexsparse.errors import SettingError, nearest


@dataclass(frozen=True)
class Target:
    """An architecture with the limits of one multiprocessor, from the vendors' tables.

    ``shared_block`` and ``shared`` are bytes of shared memory, for a block at most and in all; ``reserved`` of them go
    to the system for each block. ``registers`` is 0 where occupancy is not computed. ``device`` names a GPU of that
    architecture in ``flexsparse.hardware``.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_block: int
    shared: int
    device: str
    reserved: int = 1024
    registers: int = 65536
    warps: int = 64
    blocks: int = 32

    @property
    def is_nvidia(self) -> bool:
        return self.backend == "cuda"

    def occupancy(self, registers: int, shared: int, warps: int) -> int:
        """Blocks of a kernel on one multiprocessor: ``registers`` a thread, bytes ``shared`` and ``warps`` a block."""
        # Registers are given to a warp in units of 256, shared memory in units of 128 bytes.
        by_warp = -(-registers * self.warp // 256) * 256
        by_block = -(-(shared + self.reserved) // 128) * 128
        limits = [self.blocks, self.warps // warps, self.shared // by_block]
        return min(*limits, self.registers // by_warp // warps) if registers else min(limits)


_KIB = 1024
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, shared_block=163 * _KIB, shared=164 * _KIB, device="A100"),
        Target("sm_90", "cuda", 90, 32, shared_block=227 * _KIB, shared=228 * _KIB, device="H100"),
        Target("sm_100", "cuda", 100, 32, shared_block=227 * _KIB, shared=228 * _KIB, device="B200"),
        Target(
            "gfx942",
            "hip",
            "gfx942",
            64,
            shared_block=64 * _KIB,
            shared=64 * _KIB,
            device="MI300X",
            reserved=0,
            registers=0,
        ),
    )
}


def find_target(name: str) -> Target:
    """The target of that name. Raises SettingError with the nearest known one."""
    if name not in TARGETS:
        raise SettingError(
            "target", got=repr(name), expected=f"one of {', '.join(TARGETS)}", mend=nearest(name, TARGETS)
        )
    return TARGETS[name]
