"""The cost model: what it counts, which limit it names, and how it compares with what was measured."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse import hardware
from flexsparse.cost import predict
from flexsparse.errors import SettingError
from flexsparse.measurement import measure_hardware

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "flex_kernels_h200.json"
MEASURED = json.loads(RESULTS.read_text())["rows"]


def cost_of(text: str, device: Any = "H200", **shapes: Any) -> Any:
    options = {"q_len": 4096, "head_dim": 128, "heads": 16, "device": "cuda", **shapes}
    return fs.compile(text).explain(hardware=device, **options).cost


def test_operations_bytes_and_lists_are_counted_from_the_tiles() -> None:
    cost = cost_of("causal()")
    tiles = 32 * 33 // 2
    # Two products of 128 x 128 x 128 a tile and head, two operations an element.
    assert cost.flops == tiles * 16 * 2 * 2 * 128**3
    assert cost.bytes == 4 * 16 * 4096 * 128 * 2 + 16 * 4096 * 4
    assert cost.lists_bytes == 2 * 4 * tiles


def test_the_bound_is_the_largest_part() -> None:
    assert cost_of("causal()", q_len=65536).bound == "tiles"
    assert cost_of("causal()", q_len=128).bound == "launch"
    slow_memory = hardware.Hardware("slow", 1000, 1, 100, 1.0, 1.0, 0.0, "made up")
    assert cost_of("causal()", slow_memory).bound == "memory"


@pytest.mark.parametrize("row", MEASURED, ids=[f"{r['mask']}-{r['length']}-{r['dynamic']}" for r in MEASURED])
def test_prediction_is_within_thirty_percent_of_the_measured_kernel(row: dict[str, Any]) -> None:
    """Full and window rows were fitted; the causal and document rows judge the fit."""
    shapes: dict[str, Any] = {"q_len": row["length"], "heads": row["heads"], "head_dim": 128, "device": "cuda"}
    plan = fs.compile("causal()").bind(**shapes).plan
    assert plan.tiles is not None
    counted = replace(plan, tiles=replace(plan.tiles, partial=row["partial"], full=row["full"]))
    cost = predict(counted, hardware.find("H200"))
    assert cost is not None
    assert abs(cost.seconds * 1e3 / row["kernel_ms"] - 1) < 0.30


def test_other_backends_and_unknown_tiles_have_no_cost() -> None:
    assert cost_of("causal()", device="H200", q_len=64) is not None
    assert fs.compile("causal()", backend="chunked").explain(hardware="H200", q_len=64, head_dim=16).cost is None
    assert cost_of("sparsek(4)") is None


def test_devices_are_found_by_name_and_mistakes_named() -> None:
    assert hardware.find("h100").name == "H100"
    assert hardware.find("NVIDIA H100 80GB HBM3").matrix_tflops == hardware.find("H100").matrix_tflops
    with pytest.raises(SettingError, match=r"hardware: got 'X100', expected one of A100, .* Did you mean"):
        hardware.find("X100")


@pytest.mark.parametrize("name", ["H1000", "GH200 480GB", "NVIDIA A100X", "RTX 40900"])
def test_a_device_is_found_by_whole_words_only(name: str) -> None:
    with pytest.raises(SettingError, match=rf"hardware: got '{name}'"):
        hardware.find(name)


@pytest.mark.parametrize(
    ("name", "known"), [("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("B200", "B200")]
)
def test_a_device_is_found_by_a_longer_name(name: str, known: str) -> None:
    found = hardware.find(name)
    assert (found.name, found.matrix_tflops) == (name, hardware.DEVICES[known].matrix_tflops)


def test_a_measurement_is_saved_and_read_back(tmp_path: pathlib.Path) -> None:
    device = measure_hardware("cpu")
    assert device.matrix_tflops > 0
    assert device.bandwidth_gbs > 0
    assert torch.__version__ in device.source
    hardware.save(device, tmp_path / "here.json")
    assert hardware.load(tmp_path / "here.json") == device
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SettingError, match="expected a file that `flexsparse hardware --save` wrote"):
        hardware.load(tmp_path / "other.json")
