"""``flexsparse bench`` and what it measures with: times, peers, the table, the file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import pathlib
import shlex
import sys
import time
import types
from typing import Any

import pytest
import torch

import flexsparse
from flexsparse import peers, timing
from flexsparse.cli import bench
from flexsparse.example_inputs import example_call
from flexsparse.peers import CannotRun, Setting, contenders, make_setting
from flexsparse.runtime.inputs import Shapes
from tests.cli.conftest import Invoke

QUICK = ("--seconds", "0.01", "--lengths", "48", "--heads", "4", "--head-dim", "16", "--device", "cpu")


def _setting(pattern: str, *, heads: int = 4, kv_heads: int = 2, length: int = 48, grad: bool = True) -> Setting:
    attention = flexsparse.compile(pattern, backend="chunked")
    shapes = Shapes(2, heads, kv_heads, length, length, 16, 16, torch.float32, torch.device("cpu"), 0, grad)
    return make_setting(attention, example_call(attention, shapes, 0), needs_grad=grad)


def _out(setting: Setting, name: str) -> torch.Tensor:
    return next(c for c in contenders(setting) if c.name == name).prepare()()


def test_quartiles_are_those_of_the_calls() -> None:
    assert timing.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == timing.Timing(2.0, 3.0, 4.0, 5)
    assert timing.quartiles([7.0]) == timing.Timing(7.0, 7.0, 7.0, 1)


def test_a_time_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the call moves; the first call, which is slow, does not count."""
    now, took = [0.0], iter([100.0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(took, 0.004)

    found = timing.time_calls(call, torch.device("cpu"), 0.1)
    assert found.low == pytest.approx(4)
    assert found.high == pytest.approx(4)
    assert 20 <= found.calls <= 30
    assert timing.time_calls(call, torch.device("cpu"), 1e-9).calls == 3


def test_on_a_gpu_caches_are_emptied_outside_of_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what a GPU is asked to do, and the times of its own clock, on a GPU that is not there."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, after: Event) -> float:
            return 2.5

    flush = types.SimpleNamespace(zero_=lambda: done.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch, "empty", lambda size, **options: flush)
    found = timing.time_calls(lambda: done.append("call"), torch.device("cuda"), 1e-9)
    assert found == timing.Timing(2.5, 2.5, 2.5, 3)
    assert done[-13:] == [*3 * ["flush", "event", "call", "event"], "wait"]


@pytest.mark.parametrize("pattern", ["causal()", "full()"])
@pytest.mark.parametrize("name", ["SDPA math", "SDPA flash", "SDPA, mask given"])
def test_peers_of_plain_attention_compute_the_same(pattern: str, name: str) -> None:
    setting = _setting(pattern)
    torch.testing.assert_close(_out(setting, name), _out(setting, "flexsparse"))


def test_a_mask_that_is_given_is_the_patterns() -> None:
    setting = _setting("causal() & (sliding_window(5) | sinks(2)) & document()")
    torch.testing.assert_close(_out(setting, "SDPA, mask given"), _out(setting, "flexsparse"))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["causal() & sliding_window(5) + alibi()", "causal() & document()"])
def test_flex_attention_computes_the_same(pattern: str) -> None:
    setting = _setting(pattern, grad=False)
    torch.testing.assert_close(_out(setting, "FlexAttention"), _out(setting, "flexsparse"))


@pytest.mark.parametrize(
    ("pattern", "dense", "masked", "flex"),
    [
        ("causal() & sliding_window(5)", "dense causal", "same mask", "this pattern"),
        ("full() + alibi()", "dense", "mask, no scores", "this pattern"),
        ("sparsek_window(4, 4)", "dense causal", "mask of the call", "dense causal"),
        ("causal().sink(0.0)", "dense causal", "mask, no scores", "dense causal"),
    ],
)
def test_each_says_what_it_computes(pattern: str, dense: str, masked: str, flex: str) -> None:
    says = {c.name: c.computes for c in contenders(_setting(pattern))}
    assert says["flexsparse"] == "this pattern"
    assert (says["SDPA math"], says["SDPA, mask given"], says["FlexAttention"]) == (dense, masked, flex)


def test_scores_that_fill_the_memory_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = _setting("causal()", length=300)
    monkeypatch.setattr(peers, "_memory", lambda device: 1 << 20)
    with pytest.raises(CannotRun, match="its scores would take"):
        _out(setting, "SDPA math")
    with pytest.raises(CannotRun, match="known at the call only"):
        _out(_setting("sparsek(4)"), "SDPA, mask given")


@pytest.mark.parametrize("name", ["fla NSA", "fla NSA, selected", "adasplash", "flash-sparse-attn", "attn-gym"])
def test_what_is_not_installed_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None)
    with pytest.raises(CannotRun, match=r"not installed \(pip install [a-z_-]+\)"):
        _out(_setting("causal()"), name)


def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Modules with the functions that the libraries document, which keep what they were given."""
    given: dict[str, dict[str, Any]] = {}

    def parallel_nsa(q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
        given["fla"] = {"q": q, "k": k, "v": v, **options}
        return torch.zeros_like(q)

    def adasplash(q: Any, k: Any, v: Any, is_causal: bool) -> torch.Tensor:
        given["adasplash"] = {"q": q, "k": k, "is_causal": is_causal}
        return torch.zeros_like(q)

    def flash_sparse_attn_func(query: Any, key: Any, value: Any, is_causal: bool) -> torch.Tensor:
        given["flash"] = {"q": query, "k": key, "is_causal": is_causal}
        return torch.zeros_like(query)

    modules: dict[str, dict[str, Any]] = {
        "fla.ops.nsa": {"parallel_nsa": parallel_nsa},
        "adasplash": {"adasplash": adasplash},
        "flash_sparse_attn": {"flash_sparse_attn_func": flash_sparse_attn_func},
    }
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
    whole = peers._module
    monkeypatch.setattr(peers, "_module", lambda name, setting, gpu=True: whole(name, setting, gpu=False))
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: found)
    return given


def test_an_import_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: found)
    setting = types.SimpleNamespace(call=types.SimpleNamespace(query=types.SimpleNamespace(is_cuda=True)))
    with pytest.raises(CannotRun, match=r"^its import failed: No module named 'no_such_library'$"):
        peers._module("no_such_library", setting)  # type: ignore[arg-type]


def test_versions_of_other_libraries_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_OTHERS", {"rich": "rich", "no_such_library": "no-such-library"})
    assert peers.versions_of_others() == {"rich": importlib.metadata.version("rich")}


def test_other_libraries_are_given_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    given = _stand_ins(monkeypatch)
    setting = _setting("causal()", heads=32, kv_heads=2, length=200)
    _out(setting, "fla NSA")
    choosing = given["fla"]
    assert choosing["g_cmp"].shape == (2, 200, 32)
    assert "block_indices" not in choosing
    for name in ("fla NSA, selected", "adasplash", "flash-sparse-attn"):
        _out(setting, name)
    nsa = given["fla"]
    assert "g_cmp" not in nsa
    assert nsa["q"].shape == (2, 200, 32, 16)
    assert nsa["k"].shape == (2, 200, 2, 16)
    assert nsa["g_slc"].shape == (2, 200, 32)
    blocks = nsa["block_indices"]
    assert blocks.shape == (2, 200, 2, nsa["block_counts"])
    own = torch.arange(200).view(1, -1, 1) // nsa["block_size"]
    assert bool((blocks.amax(-1) == own).all())
    assert bool((blocks >= 0).all())
    assert given["adasplash"]["q"].shape == (2, 32, 200, 16)
    assert given["adasplash"]["is_causal"] is True
    assert given["flash"]["k"].shape == (2, 200, 2, 16)
    assert given["flash"]["is_causal"] is True
    _out(_setting("full()"), "adasplash")
    assert given["adasplash"]["k"].shape[1] == 4
    assert given["adasplash"]["is_causal"] is False
    with pytest.raises(CannotRun, match="query heads a KV head, not 2"):
        _out(_setting("causal()"), "fla NSA")


def test_a_pipe_gets_a_line_for_each_time(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = invoke("bench", "causal() & sliding_window(8)", *QUICK, "--peers", "sdpa,others")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 80
    timed = [line.split() for line in lines if line.strip().startswith("48 ")]
    assert [line[1:3] for line in timed][:2] == [["flexsparse", "this"], ["SDPA", "math"]]
    assert "No GPU is used" in answer.out
    said = " ".join(answer.out.split())
    assert "flexsparse backend chunked" in said
    assert "SDPA cuDNN its kernels need a GPU" in said


def test_json_and_file_have_what_the_numbers_depend_on(invoke: Invoke, tmp_path: pathlib.Path) -> None:
    save = tmp_path / "bench.json"
    answer = invoke("bench", "causal()", *QUICK, "--peers", "sdpa", "--save", str(save), "--json", "--kv-heads", "2")
    assert answer.code == 0, answer.err
    data = json.loads(answer.out)
    assert data == json.loads(save.read_text())
    assert data["complete"] is True
    assert data["versions"]["torch"] == torch.__version__
    assert data["device"].startswith("CPU")
    assert data["shapes"]["lengths"] == [48]
    assert data["shapes"]["kv_heads"] == 2
    assert str(tmp_path) not in save.read_text()
    rows = {row["by"]: row for row in data["rows"]}
    assert next(iter(rows)) == "flexsparse"
    assert rows["flexsparse"]["backend"] == "chunked"
    for name in ("flexsparse", "SDPA math"):
        for passes in ("forward", "forward_backward"):
            found = rows[name][passes]
            assert 0 < found["low"] <= found["median"] <= found["high"]
            assert found["calls"] >= 3
    assert rows["SDPA cuDNN"]["forward"] is None
    assert rows["SDPA cuDNN"]["reason"]
    again = invoke("bench", "causal()", *QUICK, "--peers", "none", "--forward-only", "--json")
    (row,) = json.loads(again.out)["rows"]
    assert row["forward_backward"] is None
    assert row["reason"] == ""


def test_the_command_in_the_file_gives_the_same_shapes(invoke: Invoke) -> None:
    pattern = "causal() & per_head([sliding_window(3), causal(), causal()])"
    asked = ("bench", pattern, *QUICK[:4], "--peers", "none", "--json")
    first = json.loads(invoke(*asked).out)
    assert first["shapes"]["heads"] == 12
    second = json.loads(invoke(*shlex.split(first["command"])[1:], "--json").out)
    assert second["shapes"] == first["shapes"]
    assert second["command"] == first["command"]


def test_an_interrupt_keeps_the_rows_so_far_in_a_whole_file(
    invoke: Invoke, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = bench._times

    def interrupted(contender: Any, *rest: Any) -> Any:
        if contender.name == "SDPA flash":
            raise KeyboardInterrupt
        return usual(contender, *rest)

    monkeypatch.setattr(bench, "_times", interrupted)
    save = tmp_path / "bench.json"
    assert invoke("bench", "causal()", *QUICK, "--peers", "sdpa", "--save", str(save)).code == 130
    data = json.loads(save.read_text())
    assert [row["by"] for row in data["rows"]] == ["flexsparse", "SDPA math", "SDPA efficient"]
    assert data["complete"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_peer_that_breaks_is_listed_and_the_pattern_that_breaks_is_an_error(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*options: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(peers, "_ours", full)
    (row,) = json.loads(invoke("bench", "causal()", *QUICK, "--peers", "none", "--json").out)["rows"]
    assert (row["forward"], row["reason"]) == (None, "failed: CUDA out of memory.")
    monkeypatch.undo()
    monkeypatch.setattr(peers, "_sdpa", lambda setting, backend: 1 / 0)
    rows = json.loads(invoke("bench", "causal()", *QUICK, "--peers", "sdpa", "--json").out)["rows"]
    assert {row["reason"] for row in rows if row["by"] == "SDPA math"} == {"failed: division by zero"}
    answer = invoke("bench", "causal()", *QUICK, "--peers", "none", "--backend", "flex")
    assert answer.code == 2
    assert "FlexAttention has no gradients on CPU" in answer.err
