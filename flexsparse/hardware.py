"""Descriptions of devices for the cost model: peak rates, bandwidth, and what FlexAttention's tiles take."""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import asdict, dataclass, replace

from flexsparse.errors import SettingError, nearest
from flexsparse.files import write_whole


@dataclass(frozen=True)
class Hardware:
    """A device as the cost model sees it.

    ``matrix_tflops``: dense bf16 or fp16 products with float32 accumulation, 10^12 operations a second, as measured
    or from the vendor's data sheet; ``bandwidth_gbs``: device memory, 10^9 bytes a second. ``full_share`` and
    ``partial_share``: the share of ``matrix_tflops`` that FlexAttention's forward kernel reaches on full and on
    partial tiles at head_dim 128; ``launch_us``: what a kernel takes besides its tiles. ``source`` says where the
    numbers come from.
    """

    name: str
    matrix_tflops: float
    bandwidth_gbs: float
    multiprocessors: int
    full_share: float
    partial_share: float
    launch_us: float
    source: str


_DATASHEET = "rates of the vendor's data sheet; shares of the H200, not measured on this device"
_OF_AMD = "peak rates as AMD's own roofline tools list them; shares of the H200, not measured on this device"
# Fitted to the kernel times of the full and window rows of benchmarks/results/flex_kernels_h200.json: a full tile takes
# 19.5 ns of the H200, a partial one 37.6 ns.
_SHARES = {"full_share": 0.436, "partial_share": 0.227, "launch_us": 10.0}

DEVICES = {
    h.name: h
    for h in (
        Hardware("A100", 312, 2039, 108, **_SHARES, source=_DATASHEET),
        Hardware("H100", 989, 3350, 132, **_SHARES, source=_DATASHEET),
        Hardware("H200", 989, 4800, 132, **_SHARES, source="rates of the data sheet; shares fitted on one H200"),
        Hardware("B200", 2250, 8000, 148, **_SHARES, source=_DATASHEET),
        Hardware("MI300X", 1307.4, 5300, 304, **_SHARES, source=_OF_AMD),
        Hardware("RTX 4090", 165, 1008, 128, **_SHARES, source=_DATASHEET),
        Hardware("CPU", 0.1, 20, 2, 0.5, 0.5, 50.0, "a guess for two cores; run `flexsparse hardware`"),
    )
}


def find(name: str) -> Hardware:
    """The device of that name, alone or as a word of a longer one, such as "NVIDIA A100-SXM4-80GB".

    Raises SettingError with the nearest known name.
    """
    found = known_in(name)
    if found is not None:
        return found if found.name.lower() == name.lower() else replace(found, name=name)
    raise SettingError("hardware", got=repr(name), expected=f"one of {', '.join(DEVICES)}", mend=nearest(name, DEVICES))


def known_in(name: str) -> Hardware | None:
    """The known device whose name is in ``name`` as whole words: an A1000 is no A100, and a GH200 no H200."""
    words = (rf"(?<![a-z0-9]){device.name.lower()}(?![a-z0-9])" for device in DEVICES.values())
    return next((d for d, word in zip(DEVICES.values(), words, strict=True) if re.search(word, name.lower())), None)


def save(device: Hardware, path: pathlib.Path) -> None:
    """Write a description as JSON, whole or not at all. Raises OSError."""
    write_whole(path, json_text(device))


def json_text(device: Hardware) -> str:
    """A description as ``load`` reads it from a file."""
    return json.dumps(asdict(device), indent=1) + "\n"


def load(path: pathlib.Path) -> Hardware:
    """Read a description that ``save`` wrote. Raises SettingError for a file that is none."""
    try:
        return Hardware(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SettingError(
            "hardware",
            got=f"'{path}': {getattr(error, 'strerror', None) or error}",
            expected="a file that `flexsparse hardware --save` wrote",
        ) from error
