"""One call of the kernels that gather: what it reads, and the numbers and constants that its kernels take."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flexsparse.codegen.gathered import GatheredSource, load_module
from flexsparse.runtime.gathered_sizes import Sizes, padded
from flexsparse.runtime.inputs import Shapes
from flexsparse.runtime.slot_records import slot_records
from flexsparse.settings import CHUNK

_LISTS = ("p_near_count", "p_near_index", "p_full_count", "p_full_index")


@dataclass(frozen=True)
class GatheredCall:
    """Everything but query, key, value and the scores that the kernels of one call read.

    ``values`` are those of ``make_buffers``; ``tables`` the key in each slot of each chunk, by selection; ``lists`` the
    block mask of what is near, in tiles of CHUNK; ``sizes`` the tiles of each kernel.
    """

    source: GatheredSource
    shapes: Shapes
    scale: float
    values: Mapping[str, Any]
    tables: tuple[Tensor, ...]
    lists: tuple[Tensor, ...]
    ks: tuple[int, ...]
    afters: tuple[int, ...]
    sizes: Mapping[str, Sizes]

    @property
    def module(self) -> ModuleType:
        return load_module(self.source.text)

    @property
    def chunks(self) -> int:
        return -(-self.shapes.q_len // CHUNK)

    @property
    def gate_names(self) -> tuple[str, ...]:
        """What has a gradient besides query, key and value: the scores of gates, and the thresholds they fall with."""
        return (*(f"u_{n}" for n in self.source.gated), *(f"tau_{n}" for n in self.source.shifted))

    @functools.cached_property
    def numbers(self) -> dict[str, Any]:
        """What the pattern computes from sizes and from the numbers of the call."""
        if not self.source.numbers:
            return {}
        shapes = self.shapes
        sizes = {**self.values, "q_len": shapes.q_len, "kv_len": shapes.kv_len, "heads": shapes.heads}
        known = {"math": math, "min": min, "max": max, "abs": abs}
        return {name: eval(text, known, sizes) for name, text in self.source.numbers.items()}

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """All that decides how its kernels are started, but for the tensors that they read."""
        numbers = (self.scale, *self.ks, *self.afters, *self.numbers.items())
        return (self.source.text, self.shapes, *numbers, *self.sizes.items())


def tensors_read(
    call: GatheredCall, operands: Sequence[Tensor], gates: Sequence[Tensor]
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a call by the names of parameters; ``gates`` are those of ``gate_names``, contiguous float32."""
    values, source = call.values, call.source
    read = dict(zip(("p_query", "p_key", "p_value"), operands, strict=True))
    read |= {f"p_{name}": gate for name, gate in zip(call.gate_names, gates, strict=True)}
    for n, table in enumerate(call.tables):
        read |= {f"p_birth_{n}": values[f"birth_{n}"], f"p_death_{n}": values[f"death_{n}"], f"p_slots_{n}": table}
        if n in source.shifted:
            read[f"p_least_{n}"] = values[f"least_{n}"].float().contiguous()
    read |= {f"p_of_{name}": values[name] for name, _ in source.captured}
    return read


def arguments_of(call: GatheredCall, read: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments that all kernels take: what is read, with the records of slots, and numbers."""
    shapes = call.shapes
    made: dict[str, Any] = {**read, "scale": call.scale}
    for name in ("query", "key", "value"):
        made |= {f"stride_{name[0]}{dim}": read[f"p_{name}"].stride(i) for i, dim in enumerate("bhs")}
    made |= {"length": shapes.q_len, "heads": shapes.heads, "group": shapes.heads // shapes.kv_heads}
    made |= {"n_chunks": call.chunks, "WIDE": is_wide(*(read[f"p_{name}"] for name in ("query", "key", "value")))}
    for n, (k, after) in enumerate(zip(call.ks, call.afters, strict=True)):
        heads = read[f"p_birth_{n}"].shape[1]
        made |= {f"heads_{n}": heads, f"group_{n}": shapes.heads // heads, f"k_{n}": k, f"after_{n}": after}
        table, own = read[f"p_slots_{n}"], read[f"p_u_{n}"] if n in call.source.slot_gates[n] else None
        # The next changes are for the kernel of slots alone, which is given them.
        made |= {f"p_records_{n}": slot_records(table, read[f"p_death_{n}"], own, CHUNK), f"p_next_{n}": table}
    for name, dims in call.source.captured:
        made |= {f"of_{name}_stride_{d}": read[f"p_of_{name}"].stride(d) for d in range(dims)}
    return made | call.numbers


def is_wide(*tensors: Tensor) -> bool:
    """Whether the rows [B, H, S, D] of a head lie so far apart that 32 bits do not count the numbers between them."""
    return any((x.shape[2] - 1) * x.stride(2) + x.shape[3] >= 1 << 31 for x in tensors)


def lists_of(lists: Sequence[Tensor]) -> dict[str, Any]:
    """Four lists: how many partial tiles and which, how many full ones and which."""
    near_count, near_index = lists[:2]
    rows, heads = near_count.shape[:2]
    one_b, one_h = int(rows > 1), int(heads > 1)
    return {
        **dict(zip(_LISTS, lists, strict=True)),
        "count_b": one_b * near_count.stride(0), "count_h": one_h * near_count.stride(1),
        "index_b": one_b * near_index.stride(0), "index_h": one_h * near_index.stride(1),
        "index_row": near_index.stride(2),
    }  # fmt: skip


def threads_assembled(sizes: Sizes, shapes: Shapes) -> int:
    """The threads of a block where parts of a kernel are in NVIDIA's assembly; 0 elsewhere."""
    # The interpreter knows no assembly.
    assembled = shapes.device.type != "cpu" and torch.version.hip is None
    return 32 * sizes.warps if assembled else 0


def constants_of(sizes: Sizes, shapes: Shapes) -> dict[str, Any]:
    """What a kernel is built for, and how it is launched."""
    return {
        "HEAD_DIM": shapes.head_dim, "VALUE_DIM": shapes.value_dim,
        "BLOCK_D": padded(shapes.head_dim), "BLOCK_V": padded(shapes.value_dim),
        "BLOCK_M": CHUNK, "BLOCK_Q": sizes.queries, "BLOCK_N": sizes.keys,
        "PRECISION": "ieee" if shapes.dtype is torch.float32 else "tf32",
        "num_warps": sizes.warps, "num_stages": sizes.stages,
        # An option of NVIDIA's backend alone.
        **({"maxnreg": sizes.registers} if sizes.registers and torch.version.hip is None else {}),
    }  # fmt: skip
