"""What each way to run a pattern on a GPU will take, to choose among them: tiles, copies, and the work of the host.

A rough model for a choice, not for a report: ``cost`` has the kernels' time alone. Whole calls were measured for
benchmarks/results/choices_h200.json, one after another, and the numbers below are fitted to them. Tiles are counted
from the mask without what it reads from tensors, which can only hide keys: a bound from above.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from flexsparse.analysis.tiles import FULL, LOOKED_AT, PARTIAL, classify
from flexsparse.codegen.gathering.parts import near_mask
from flexsparse.codegen.gathering.rows import rows_of
from flexsparse.errors import SettingError
from flexsparse.hardware import DEVICES, Hardware, find
from flexsparse.ir.nodes import TRUE, Apply, Constant, Load, Node, Opaque, replaced, walk
from flexsparse.ir.program import Chosen, Program, Selected
from flexsparse.ir.residues import split_residues
from flexsparse.runtime.inputs import Shapes, class_shapes
from flexsparse.settings import CHUNK

# Milliseconds of the host: for a forward pass, and for one with its backward pass.
_HOST = {"gather": (0.3, 1.2), "gather_flex": (3.2, 5.0), "residue_flex": (0.55, 1.55), "flex": (0.4, 1.15)}
# What tiles that depend on scores or on query and key add, as they are classified at each call.
_CLASSIFIED = (9.0, 11.0)
# What an untraced function adds where tiles of keys are classified apart from those of copies, element by element, in
# calls of so many that they are looked at.
_UNTRACED = 47.0
# A backward pass in forward passes: of FlexAttention's kernels, of those that add gradients of scores with atomics, of
# those over copies, and of the kernels that gather.
_BACKWARD, _BACKWARD_OF_SCORES, _BACKWARD_OF_COPIES, _BACKWARD_OF_GATHERS = 2.7, 11.0, 4.0, 3.7
# Tables that are looked up at every pair of a copy cost as much again as its tiles.
_LOOKED_UP = 2.0
# The share of the matrix rate that the kernels that gather reach at head_dim 128.
_GATHER_SHARE = 0.36
# Thresholds, lifetimes and slots: seconds a score.
_SELECTION = 0.2e-9
# Longer masks are counted at this length, a half and a quarter of it, and their growth goes on.
_COUNTED = 16384


@functools.lru_cache(maxsize=512)
def predict_calls(program: Program, shapes: Shapes, block: int, backends: tuple[str, ...]) -> Mapping[str, float]:
    """Seconds of a whole call on a GPU, with its backward pass where ``shapes`` want gradients, by backend."""
    device = _device(shapes)
    return {
        name: _PREDICTED[name](program, shapes, block, device) + _host(name, program, shapes, block)
        for name in backends
    }


def tile_seconds(device: Hardware, shapes: Shapes, block: int, partial: int, full: int) -> float:
    """What FlexAttention's forward kernel takes for tiles that are spread evenly over the multiprocessors."""
    flops = 4 * block**2 * (shapes.head_dim + shapes.value_dim) / 2
    return flops * (full / device.full_share + partial / device.partial_share) / _rate(device, shapes)


def _rate(device: Hardware, shapes: Shapes) -> float:
    """Operations a second; float32 products run on the matrix units as tf32, at half the rate."""
    return device.matrix_tflops * 1e12 / (2 if shapes.dtype.itemsize == 4 else 1)


def _device(shapes: Shapes) -> Hardware:
    if shapes.device.type == "cuda" and torch.cuda.is_available():
        try:
            return find(torch.cuda.get_device_name(shapes.device))
        except SettingError:
            pass
    # Plans are made without a GPU too, and for GPUs that nobody described: what matters are ratios.
    return DEVICES["H100"]


def _host(name: str, program: Program, shapes: Shapes, block: int) -> float:
    pick = int(shapes.needs_grad)
    milliseconds = _HOST[name][pick]
    if name == "residue_flex":
        split = split_residues(program)
        milliseconds *= 2 if split is not None and split.rest is not None else 1
    mask = program.mask if name == "flex" else near_mask(program)
    if any(isinstance(n, Selected | Chosen) for n in walk(mask)):
        milliseconds += _CLASSIFIED[pick]
    if name == "gather_flex" and program.opaque and sum(_counted(mask, program, shapes, block)) >= LOOKED_AT:
        milliseconds += _UNTRACED
    return milliseconds * 1e-3


def _flex(program: Program, shapes: Shapes, block: int, device: Hardware) -> float:
    seconds = _tiles(program, program.mask, shapes, block, device) * _calls(program)
    return seconds * _passes(shapes, _BACKWARD_OF_SCORES if program.gates else _BACKWARD) + _selecting(program, shapes)


def _residue_flex(program: Program, shapes: Shapes, block: int, device: Hardware) -> float:
    split = split_residues(program)
    assert split is not None
    classes = class_shapes(shapes, split.modulus)
    seconds = _tiles(split.within, split.within.mask, classes, block, device)
    if split.rest is not None:
        seconds += _tiles(split.rest, split.rest.mask, shapes, block, device)
    return (seconds + 2 * _operand_bytes(shapes) / (device.bandwidth_gbs * 1e9)) * _passes(shapes, _BACKWARD)


def _gather_flex(program: Program, shapes: Shapes, block: int, device: Hardware) -> float:
    if program.chosen:
        # Blocks that queries choose can be anywhere, so no tile of the keys is spared.
        return _LOOKED_UP * _flex(program, shapes, block, device)
    rows = rows_of(program.selections, shapes.kv_len, block)
    queries = shapes.batch * shapes.heads * -(-shapes.q_len // block)
    copies = queries * sum(width // block + 2 for width in rows.widths)
    seconds = _tiles(program, near_mask(program), shapes, block, device)
    seconds += _LOOKED_UP * tile_seconds(device, shapes, block, copies, 0)
    moved = 2 * rows.total / rows.length * _operand_bytes(shapes) / (device.bandwidth_gbs * 1e9)
    return (seconds * _calls(program) + moved) * _passes(shapes, _BACKWARD_OF_COPIES) + _selecting(program, shapes)


def _gather(program: Program, shapes: Shapes, block: int, device: Hardware) -> float:
    near = sum(_counted(near_mask(program), program, shapes, CHUNK))
    chunks = shapes.batch * shapes.heads * -(-shapes.q_len // CHUNK)
    tiles = near + chunks * sum(-(-min(s.k, shapes.kv_len) // CHUNK) + 1 for s in program.selections)
    flops = 4 * CHUNK**2 * (shapes.head_dim + shapes.value_dim) / 2
    seconds = tiles * flops / (_rate(device, shapes) * _GATHER_SHARE)
    return seconds * _passes(shapes, _BACKWARD_OF_GATHERS) + _selecting(program, shapes)


_PREDICTED = {"gather": _gather, "gather_flex": _gather_flex, "residue_flex": _residue_flex, "flex": _flex}


def _passes(shapes: Shapes, backward: float) -> float:
    return 1 + backward if shapes.needs_grad else 1


def _calls(program: Program) -> int:
    return 2 if program.gate_v != Constant(1.0) else 1


def _selecting(program: Program, shapes: Shapes) -> float:
    scores = shapes.batch * shapes.kv_heads * shapes.kv_len * len(program.selections)
    return _SELECTION * scores * (1.25 if shapes.needs_grad else 1)


def _operand_bytes(shapes: Shapes) -> int:
    rows = shapes.heads * shapes.q_len + shapes.kv_heads * shapes.kv_len
    return shapes.batch * rows * (shapes.head_dim + shapes.value_dim) * shapes.dtype.itemsize


def _tiles(program: Program, mask: Node, shapes: Shapes, block: int, device: Hardware) -> float:
    return tile_seconds(device, shapes, block, *_counted(mask, program, shapes, block))


def _counted(mask: Node, program: Program, shapes: Shapes, block: int) -> tuple[int, int]:
    """Partial and full tiles over all rows and heads, of a long mask by how they grow."""
    mask, longest = _without_tensors(mask), max(shapes.q_len, shapes.kv_len)
    if longest <= _COUNTED:
        return _count(mask, program, shapes, block)
    found = []
    for part in (4, 2, 1):
        sizes = [max(1, n * _COUNTED // (longest * part)) for n in (shapes.q_len, shapes.kv_len)]
        found.append(_count(mask, program, replace(shapes, q_len=sizes[0], kv_len=sizes[1], q_offset=0), block))
    partial, full = (_grown(counts, 4 * longest / _COUNTED) for counts in zip(*found, strict=True))
    return partial, full


def _grown(counts: tuple[int, ...], length: float) -> int:
    """A count at ``length``, from those at 1, 2 and 4: bands grow in proportion, all below a diagonal as a square."""
    one, two, four = counts
    slope = two - one
    bend = ((four - two) / 2 - slope) / 3
    return max(0, round(one + slope * (length - 1) + bend * (length - 1) * (length - 2)))


def _count(mask: Node, program: Program, shapes: Shapes, block: int) -> tuple[int, int]:
    tiles = classify(mask, shapes.sizes, {}, block=block, tables=program.tables)
    return tiles.count(PARTIAL), tiles.count(FULL)


def _without_tensors(mask: Node) -> Node:
    """A mask that shows all that this one shows, and reads nothing that is given at the call."""
    if not any(isinstance(n, Load | Selected | Chosen | Opaque) for n in walk(mask)):
        return mask
    if isinstance(mask, Apply) and mask.op in ("and", "or"):
        return replaced(mask, {arg: _without_tensors(arg) for arg in mask.args})
    return TRUE
