"""Whether each backend can run a call, and why not."""

from __future__ import annotations

import os

from flexsparse import _torch
from flexsparse.errors import BackendError
from flexsparse.ir.nodes import Constant
from flexsparse.ir.program import Program
from flexsparse.ir.residues import split_residues
from flexsparse.runtime.gathered_sizes import KERNELS, sizes_of
from flexsparse.runtime.inputs import Shapes
from flexsparse.verdict import Verdict


def _gather(program: Program, shapes: Shapes) -> Verdict:
    if not program.selections:
        return Verdict(False, "Only selected keys are gathered, and the pattern selects none.")
    if program.chosen or program.opaque:
        what = "Blocks chosen by the query" if program.chosen else "Functions that could not be traced"
        return Verdict(False, f"{what} are not printed into kernels that gather.")
    if shapes.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return Verdict(False, f"Kernels that gather need a GPU, not {shapes.device.type}.")
    if shapes.dtype.itemsize == 8:
        return Verdict(False, "Kernels that gather take no float64.")
    if shapes.q_len != shapes.kv_len or shapes.q_offset:
        return Verdict(False, "Kernels that gather want as many queries as keys, from position 0 on.")
    if max(shapes.head_dim, shapes.value_dim) > 256:
        return Verdict(False, f"Kernels that gather take head_dim up to 256, not {shapes.head_dim}.")
    try:
        for kernel in KERNELS:
            sizes_of(kernel, shapes)
    except BackendError as error:
        return Verdict(False, f"Its tiles do not fit: {error}")
    return Verdict(True, "Work and memory grow with the keys that a query sees; gradients without atomics.")


def _flex(program: Program, shapes: Shapes) -> Verdict:
    device = shapes.device.type
    if device not in ("cuda", "cpu"):
        return Verdict(False, f"FlexAttention is used on cuda and cpu, not on {device}.")
    if shapes.dtype.itemsize == 8:
        return Verdict(False, "Compiled FlexAttention takes no float64.")
    if device == "cpu":
        if shapes.needs_grad:
            return Verdict(False, "FlexAttention has no gradients on CPU.")
        if program.gate_v != Constant(1.0):
            return Verdict(False, "A gate on V needs the LSE, which compiled CPU FlexAttention does not give.")
        if program.chosen:
            # Its C++ writes one size where another is meant once a captured tensor has a dynamic size of its own.
            return Verdict(False, "Compiled CPU FlexAttention cannot build the look-up of chosen blocks.")
        if program.has_sink:
            return Verdict(False, "A sink needs the LSE, which compiled CPU FlexAttention does not give.")
    if not _torch.ANY_HEAD_DIM and shapes.head_dim & (shapes.head_dim - 1):
        return Verdict(False, f"torch {_torch.VERSION} takes power-of-two head_dim only, not {shapes.head_dim}.")
    if device == "cuda" and min(shapes.head_dim, shapes.value_dim) < 16:
        return Verdict(False, f"FlexAttention takes head_dim of at least 16, not {shapes.head_dim}.")
    if shapes.needs_grad and program.gates and not _torch.HAS_CAPTURED_GRADIENTS:
        return Verdict(False, f"Gradients of the scores need torch 2.6; this is {_torch.VERSION}.")
    if device == "cpu":
        return Verdict(True, "Runs here for inference; needs a C++ compiler and 10 s or more to build a kernel.")
    return Verdict(True, "One fused kernel a call, tiles that no query sees are skipped.")


def unfit_for_rows(program: Program, shapes: Shapes) -> str:
    """Why selected keys cannot stand as rows behind the others; empty where they can."""
    if not program.selections:
        return "Only selected keys are copied, and the pattern selects none."
    if shapes.q_len != shapes.kv_len or shapes.q_offset:
        return "Copies of selected keys want as many queries as keys, from position 0 on."
    return ""


def _gather_flex(program: Program, shapes: Shapes) -> Verdict:
    unfit = unfit_for_rows(program, shapes)
    if unfit:
        return Verdict(False, unfit)
    flex = _flex(program, shapes)
    if not flex.holds or shapes.device.type == "cpu":
        return flex
    return Verdict(True, "FlexAttention over the keys and copies of those in slots: any GPU, work linear in length.")


def _gather_flex_eager(program: Program, shapes: Shapes) -> Verdict:
    unfit = unfit_for_rows(program, shapes)
    return Verdict(False, unfit) if unfit else Verdict(True, "Dense and slow: for debugging functions of rows.")


def unfit_for_residues(program: Program, shapes: Shapes) -> str:
    """Why positions cannot be reordered by residue class; empty where they can."""
    if program.selections or program.chosen or program.opaque:
        return "Selections and functions that could not be traced are not reordered by residue class."
    split = split_residues(program)
    if split is None:
        return "The mask has no condition such as (q - kv) % 4 == 0, by which positions could be reordered."
    if shapes.q_len != shapes.kv_len or shapes.q_offset:
        return "Positions are reordered where there are as many queries as keys, from position 0 on."
    if shapes.q_len % split.modulus:
        return (
            f"A length of {shapes.q_len} is no multiple of {split.modulus}: pad it, so that classes are equally long."
        )
    return ""


def _residue_flex(program: Program, shapes: Shapes) -> Verdict:
    unfit = unfit_for_residues(program, shapes)
    if unfit:
        return Verdict(False, unfit)
    split = split_residues(program)
    assert split is not None
    flex = _flex(program, shapes)
    if not flex.holds:
        return flex
    if shapes.device.type == "cpu":
        if split.rest is not None:
            return Verdict(False, "Two calls are joined by their LSE, which compiled CPU FlexAttention does not give.")
        return flex
    calls = "and another call for pairs of two classes" if split.rest is not None else "all pairs are of one class"
    return Verdict(True, f"FlexAttention over positions reordered by residue modulo {split.modulus}; {calls}.")


def _residue_flex_eager(program: Program, shapes: Shapes) -> Verdict:
    unfit = unfit_for_residues(program, shapes)
    return Verdict(False, unfit) if unfit else Verdict(True, "Dense and slow: for debugging reordered functions.")


def _flex_eager(program: Program, shapes: Shapes) -> Verdict:
    return Verdict(True, "Dense and slow: for debugging generated functions at small sizes.")


def _chunked(program: Program, shapes: Shapes) -> Verdict:
    return Verdict(True, "Exact in bounded memory on any device, with gradients and float64; PyTorch speed.")


def _reference(program: Program, shapes: Shapes) -> Verdict:
    return Verdict(True, "The dense float64 oracle: every score is materialised.")


VERDICTS = {
    "gather": _gather,
    "gather_flex": _gather_flex,
    "gather_flex_eager": _gather_flex_eager,
    "residue_flex": _residue_flex,
    "residue_flex_eager": _residue_flex_eager,
    "flex": _flex,
    "flex_eager": _flex_eager,
    "chunked": _chunked,
    "reference": _reference,
}
# Among these "auto" chooses on a GPU.
CHOSEN_AMONG = ("gather", "gather_flex", "residue_flex", "flex")
# Backends that read copies of selected keys behind the others, and all that call FlexAttention.
OVER_ROWS = ("gather_flex", "gather_flex_eager")
# Backends that reorder positions by residue class.
BY_RESIDUE = ("residue_flex", "residue_flex_eager")
BY_FLEX = (*OVER_ROWS, *BY_RESIDUE, "flex", "flex_eager")
