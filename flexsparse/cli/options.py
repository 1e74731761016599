"""Options that several commands share, and how their texts become values."""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flexsparse.cli.group import whole_or_not
from flexsparse.errors import DeviceError, SettingError, nearest

if TYPE_CHECKING:
    import torch

    from flexsparse.compiler import CompiledAttention

F = TypeVar("F", bound=Callable[..., Any])
POSITIVE = click.IntRange(min=1)
DTYPES = {
    "float64": ("fp64", "double"),
    "float32": ("fp32", "float"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
}

expression_argument = click.argument("expression", metavar="EXPR")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON alone on standard output.")
seed_option = click.option("--seed", default=0, show_default=True, help="Seed of example tensors and random scores.")
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto: cuda where there is one."
)
backend_option = click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="auto, gather, gather_flex, gather_flex_eager, residue_flex, residue_flex_eager, flex, flex_eager, "
    "chunked or reference.",
)


def shape_options(command: F) -> F:
    """--length, --batch, --heads, --kv-heads, --head-dim, --dtype, --device and --grad, for a plan."""
    options = (
        click.option("--length", type=POSITIVE, default=4096, show_default=True, help="Queries and keys."),
        click.option("--batch", type=POSITIVE, default=1, show_default=True, help="Rows of the batch."),
        click.option("--heads", type=POSITIVE, default=8, show_default=True, help="Query heads."),
        click.option("--kv-heads", type=POSITIVE, default=None, help="Key and value heads.  [default: as --heads]"),
        click.option("--head-dim", type=POSITIVE, default=64, show_default=True, help="Size of a head."),
        click.option("--dtype", default="bfloat16", show_default=True, help="float64, float32, bfloat16 or float16."),
        click.option("--device", default="cpu", show_default=True, help="cpu or cuda; no device is touched."),
        click.option("--grad", is_flag=True, help="Plan for training: gradients are wanted."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def bind_from(attention: CompiledAttention, options: dict[str, Any]) -> Any:
    """Bind a pattern to what ``shape_options`` read. Raises SettingError, BackendError or DeviceError."""
    heads, kv_heads = options["heads"], options["kv_heads"] or options["heads"]
    check_heads(heads, kv_heads)
    return attention.bind(
        q_len=options["length"],
        batch=options["batch"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=options["head_dim"],
        dtype=read_dtype(options["dtype"]),
        device=read_device(options["device"], exists=False),
        needs_grad=options["grad"],
    )


def check_heads(heads: int, kv_heads: int) -> None:
    """Refuse query heads that no equal groups share the KV heads of. Raises SettingError."""
    if heads % kv_heads:
        raise SettingError("--kv-heads", got=f"{kv_heads} for {heads} query heads", expected="a divisor of --heads")


def read_dtype(name: str) -> torch.dtype:
    """A floating dtype by its torch name or a short one, such as bf16. Raises SettingError."""
    import torch

    full = next((n for n, short in DTYPES.items() if name == n or name in short), None)
    if full is None:
        hint = nearest(name, DTYPES)
        raise SettingError("--dtype", got=repr(name), expected=", ".join(DTYPES), mend=hint)
    dtype: torch.dtype = getattr(torch, full)
    return dtype


def read_device(name: str, *, exists: bool = True) -> torch.device:
    """A device by its name; "auto" takes cuda where there is one. Raises DeviceError, also for an absent GPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        known = ("cpu", "cuda")
        hint = nearest(name, known)
        raise DeviceError("--device", got=repr(name), expected="cpu, cuda or cuda:N", mend=hint) from None
    if exists and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError(
            "--device",
            got=repr(name),
            expected=f"a device of this machine, which has {count} GPUs",
            mend="flexsparse doctor says what it has; --device cpu runs anywhere." if not count else "",
        )
    # Tensors say cuda:0 where they were sent to cuda.
    return torch.device("cuda", device.index or 0) if exists and device.type == "cuda" else device


def read_zoom(text: str, length: int) -> tuple[range, range]:
    """ "q0:q1,kv0:kv1" as ranges of queries and keys; an omitted end is the sequence's. Raises SettingError."""
    match = re.fullmatch(r"\s*(\d*):(\d*)\s*,\s*(\d*):(\d*)\s*", text)
    ends = [int(part) if part else None for part in match.groups()] if match else []
    if match:
        q0, q1, kv0, kv1 = (e if e is not None else (0, length, 0, length)[n] for n, e in enumerate(ends))
        if q0 < q1 <= length and kv0 < kv1 <= length:
            return range(q0, q1), range(kv0, kv1)
    raise SettingError(
        "--zoom",
        got=repr(text),
        expected=f"q0:q1,kv0:kv1 with 0 <= start < stop <= {length}",
        mend="For example --zoom 0:32,0:32; raise --length to see further.",
    )


def check_out(option: str, path: str | None) -> None:
    """Refuse a place where no file can be written, before any work is done for it. Raises SettingError."""
    if path is None:
        return
    place = pathlib.Path(path).resolve()
    if not place.parent.is_dir():
        raise SettingError(option, got=repr(path), expected="a file in a directory that exists")
    if place.exists() and not place.is_file():
        raise SettingError(option, got=repr(path), expected="a file, neither a directory nor a device")
    if not os.access(place.parent, os.W_OK):
        raise _unwritable(option, path, os.strerror(errno.EACCES))


def write_out(option: str, path: str, content: str | bytes) -> None:
    """Write a file that an option names, whole or not at all. Raises SettingError."""
    from flexsparse.files import write_whole

    try:
        # A link stays one, and what it leads to is written.
        write_whole(pathlib.Path(path).resolve(), content)
    except OSError as error:
        raise _unwritable(option, path, error.strerror or str(error)) from error


def _unwritable(option: str, path: str, why: str) -> SettingError:
    return SettingError(option, got=f"{path!r}: {why}", expected="a file in a folder that can be written")


def print_json(data: Any) -> None:
    """JSON alone on standard output; numbers that JSON lacks become text, such as "inf"."""
    with whole_or_not():
        click.echo(json.dumps(finite(data), indent=2))


def finite(data: Any) -> Any:
    """The data with numbers that JSON lacks as text."""
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
