"""Every command: what it says, as text and as JSON, in 80 columns."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import pytest

import flexsparse
from flexsparse.dense import reference
from flexsparse.patterns import catalogue
from flexsparse.tolerance import evaluate
from tests.cli.conftest import Invoke

HYBRID = "(causal() & (sliding_window(8) | sinks(4) | sparsek(8, after=8))) + alibi()"
COMMANDS = {
    "list": ("list",),
    "show": ("show", HYBRID, "--length", "200"),
    "zoom": ("show", HYBRID, "--length", "200", "--zoom", "100:190,:20"),
    "explain": ("explain", HYBRID, "--length", "256"),
    "code": ("code", "causal() & sliding_window(8)"),
    "check": ("check", HYBRID, "--length", "17"),
    "doctor": ("doctor",),
}


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("name", COMMANDS)
def test_text_fits_and_has_no_colour(name: str, invoke: Invoke) -> None:
    answer = invoke(*COMMANDS[name])
    assert answer.code == 0, answer.err
    assert "\x1b" not in answer.out
    if name != "code":
        assert max(map(len, answer.out.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_all_there_is(name: str, invoke: Invoke) -> None:
    answer = invoke(*COMMANDS[name], "--json")
    assert answer.code == 0
    assert json.loads(answer.out)


def test_list_names_every_pattern(invoke: Invoke) -> None:
    text, data = invoke("list").out, json.loads(invoke("list", "--json").out)
    assert [entry["name"] for entry in data] == list(catalogue())
    for entry in data:
        assert entry["name"] + entry["parameters"].split(",")[0] in text
        assert repr(flexsparse.parse(entry["examples"][0])) == entry["examples"][0]


def test_list_takes_names(invoke: Invoke) -> None:
    assert [entry["name"] for entry in json.loads(invoke("list", "sinks", "alibi", "--json").out)] == ["sinks", "alibi"]
    text = invoke("list", "alibi", "softcap").out
    assert "causal" not in text.split("Any expression")[0]
    assert "▁▂▄▅▆██▆▅▄▂▁" in text


def test_show_draws_a_triangle(invoke: Invoke) -> None:
    data = json.loads(invoke("show", "causal()", "--length", "64", "--block", "16", "--json").out)
    assert data["rows"] == ["PEEE", "FPEE", "FFPE", "FFFP"]
    assert data["counts"] == {"empty": 6, "partial": 4, "full": 6}
    assert data["computed"] == 10 / 16
    assert data["pairs_seen"] == pytest.approx(65 / 128)
    text = invoke("show", "causal()", "--length", "64", "--block", "16").out
    assert "██▒▒" in text
    assert "62.5% of the tiles are computed; 50.8% of the pairs are seen." in text
    assert "the same for every head" in text


def test_show_zooms_to_single_pairs(invoke: Invoke) -> None:
    answer = invoke("show", "causal() & sliding_window(2)", "--length", "64", "--zoom", "10:13,9:13")
    rows = [line.split("  ")[-1] for line in answer.out.splitlines() if set(line) & set("█·")][:3]
    assert rows == ["████····", "··████··", "····████"]


def test_show_head_by_head(invoke: Invoke) -> None:
    pattern = "sliding_window(per_head([1, 64]))"
    first, last = (
        json.loads(invoke("show", pattern, "--length", "64", "--head", head, "--json").out) for head in ("0", "3")
    )
    assert (first["heads"], first["heads_differ"]) == (4, True)
    assert first["counts"]["empty"] == 12
    assert last["counts"]["empty"] == 6
    assert first["computed_by_head"] == last["computed_by_head"] == [0.25, 0.25, 0.625, 0.625]


def test_show_says_what_is_made_up(invoke: Invoke) -> None:
    pattern = "causal() & document() & sparsek(4)"
    answers = [invoke("show", pattern, "--length", "64", "--seed", seed).out for seed in ("0", "0", "1")]
    assert answers[0] == answers[1] != answers[2]
    assert "scores: example data, normal random scores, shape [1, 4, 64], seed 0" in answers[0]
    assert "doc: example data, 4 documents, shape [1, 64], seed 0" in answers[0]


def test_explain_gives_reasons(invoke: Invoke) -> None:
    arguments = ("explain", "sparsek_window(16, 32)", "--length", "512", "--grad", "--device", "cuda")
    answer = invoke(*arguments)
    assert "> gather" in answer.out
    assert "80 selected keys a query" in " ".join(answer.out.split())
    flex = invoke(*arguments, "--backend", "flex")
    assert "on example tensors, seed 0" in " ".join(flex.out.split())
    data = json.loads(invoke(*arguments, "--json").out)
    assert data["backend"] == "gather"
    assert data["shapes"]["device"] == "cuda"
    assert data["shapes"]["needs_grad"] is True
    on_cpu = json.loads(invoke("explain", "causal()", "--json").out)
    assert on_cpu["backend"] == "chunked"
    assert on_cpu["tiles"]["full"] > 0


@pytest.mark.parametrize("stage", ["expr", "ir", "source", "mask_mod", "score_mod", "rows", "kernels"])
def test_code_in_a_pipe_is_the_code(stage: str, invoke: Invoke) -> None:
    expected = flexsparse.compile(HYBRID).code(stage)
    assert invoke("code", HYBRID, "--stage", stage).out == expected + "\n" * (not expected.endswith("\n"))
    assert json.loads(invoke("code", HYBRID, "--stage", stage, "--json").out)["code"] == expected


def test_code_of_the_plan(invoke: Invoke) -> None:
    answer = invoke("code", "causal()", "--stage", "plan", "--length", "256")
    assert answer.out.startswith("pattern   causal()")
    assert "256" in answer.out


def test_kernels_are_shown_without_a_gpu(invoke: Invoke, tmp_path: pathlib.Path) -> None:
    shapes = ("--length", "512", "--head-dim", "32", "--heads", "2")
    answer = invoke("code", "sparsek(64)", "--stage", "triton", *shapes)
    assert answer.out.startswith("# forward: num_warps=")
    assert "HEAD_DIM=32" in answer.out
    pytest.importorskip("triton")
    path = tmp_path / "forward.ptx"
    path.write_text("old")
    assert answer.out.count("# mask from sparsek(64): selected_0") > 1
    marks = json.loads(invoke("code", "sparsek(64)", "--stage", "triton", "--json", *shapes).out)["marks"]
    assert {mark["kind"] for mark in marks} == {"mask", "gate"}
    assert "# gate" in answer.out.splitlines()[marks[0]["line"] - 1]
    folded = invoke("code", "sparsek(64)", "--stage", "triton", "--fold", *shapes).out
    assert " lines\n" in folded
    assert folded.count("# mask from") == answer.out.count("# mask from")
    assert len(folded) < len(answer.out)
    answer = invoke("code", "sparsek(64)", "--stage", "ptx", "--target", "sm_80", "--out", str(path), *shapes)
    assert (answer.code, answer.out) == (0, "")
    assert path.read_text().startswith("// forward\n")
    assert ".target sm_80" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]
    data = json.loads(invoke("code", "sparsek(64)", "--stage", "resources", "--grad", "--json", *shapes).out)
    assert data["target"] == "sm_90"
    assert data["code"].startswith("kernel ")
    assert data["kernels"][0]["loads"]["16"] > 0
    assert data["roofline"]["bound"] == "memory"
    assert data["roofline"]["predicted"] is None
    assert {k["kernel"] for k in data["kernels"] if not k["backward"]} == {"forward"}
    assert len(data["kernels"]) == 6


def test_check_reports_every_result(invoke: Invoke) -> None:
    pattern = "causal() & (sparsek(4) | sliding_window(4)) & (kv > 2) + relative_bias(5)"
    data = json.loads(invoke("check", pattern, "--length", "1", "--length", "20", "--dtype", "bf16", "--json").out)
    assert data["holds"] is True
    assert [(c["dtype"], c["length"]) for c in data["cases"]] == [
        (dtype, length) for dtype in ("float64", "bfloat16") for length in (1, 20)
    ]
    names = ["out", "lse", "d query", "d key", "d value", "d scores", "d bias"]
    for case in data["cases"]:
        assert [r["name"] for r in case["results"]] == names
        assert case["changed_between_runs"] == case["empty_rows_wrong"] == []
        assert case["empty_rows"] == 2 * 4 * min(3, case["length"])


def test_check_of_a_sink_counts_rows_without_keys_from_the_mask(invoke: Invoke) -> None:
    pattern = "causal() & (kv > 2) & learned_sinks()"
    data = json.loads(invoke("check", pattern, "--length", "20", "--dtype", "bf16", "--json").out)
    assert data["holds"] is True
    for case in data["cases"]:
        assert [r["name"] for r in case["results"]][-1] == "d sink_logits"
        assert case["empty_rows"] == 2 * 4 * 3
        assert case["empty_rows_wrong"] == []


def test_blocks_are_drawn_explained_and_checked(invoke: Invoke) -> None:
    pattern = "moba(16, 1) & document()"
    drawn = json.loads(invoke("show", pattern, "--length", "96", "--block", "16", "--json").out)
    assert drawn["heads_differ"] is True
    assert drawn["rows"][0] == "P" + 5 * "E"
    assert drawn["example_data"][-1] == (
        "query, key: example data, normal random values, from which blocks are chosen, seed 0"
    )
    told = json.loads(invoke("explain", pattern, "--length", "96", "--json").out)
    assert any("carries no eviction certificate" in note for note in told["notes"])
    assert "on example tensors, seed 0" in " ".join(invoke("explain", pattern, "--length", "96").out.split())
    found = json.loads(invoke("check", pattern, "--length", "40", "--dtype", "float32", "--json").out)
    assert found["holds"] is True
    listed = invoke("list", "moba", "quest").out
    assert "moba(16, 2), 192 queries and keys" in listed


def test_check_notices_the_backend_as_a_note(invoke: Invoke) -> None:
    answer = invoke("check", "causal()", "--length", "5")
    assert answer.err.startswith("note: flexsparse runs its exact chunked path on CPU")
    assert "HOLDS" in answer.out
    assert invoke("check", "causal()", "--length", "5", "--backend", "chunked").err == ""


def test_check_fails_where_the_oracle_differs(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexsparse import tolerance

    # The oracle of another window stands in for a kernel that is off by one.
    monkeypatch.setattr(tolerance, "reference", lambda _, *x, **n: reference("causal() & sliding_window(3)", *x, **n))
    answer = invoke("check", "causal() & sliding_window(4)", "--length", "17")
    assert answer.code == 1
    assert "FAILS" in answer.out
    monkeypatch.undo()
    assert invoke("check", "causal() & sliding_window(4)", "--length", "17").code == 0


def test_an_error_that_nobody_foresaw_is_no_failed_check(invoke: Invoke) -> None:
    """torch divides by kv_len - 17, which is 0."""
    answer = invoke("check", "causal() & (q // (kv_len - 17) < 3)", "--length", "17")
    assert answer.code == 3
    assert "Traceback" in answer.err
    assert "ZeroDivisionError" in answer.err


def test_check_fails_where_two_runs_differ(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, runs = evaluate, itertools.count()

    def unsteady(run: Any, call: Any) -> Any:
        found = usual(run, call)
        found["d key"][1, 0, 2, 3] += 1e-12 * next(runs)
        return found

    monkeypatch.setattr("flexsparse.checks.evaluate", unsteady)
    answer = invoke("check", "causal()", "--length", "5")
    assert answer.code == 1
    assert "two runs differed in d key" in answer.out
    assert "two runs differ: d key[b=1, kv_head=0, kv=2, d=3]: expected" in " ".join(answer.out.split())


def test_check_names_the_element_and_the_part(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexsparse.runtime import chunked

    usual = chunked._attended

    def without_a_key(work: Any, chunk: Any, functions: Any, *operands: Any) -> Any:
        mask = functions["mask_mod"]
        hidden = {**functions, "mask_mod": lambda b, h, q, kv: mask(b, h, q, kv) & ~((q == 6) & (kv == 4))}
        return usual(work, chunk, hidden, *operands)

    monkeypatch.setattr(chunked, "_attended", without_a_key)
    answer = invoke("check", "causal() & (sliding_window(3) | sinks(1))", "--length", "9", "--dtype", "float32")
    assert answer.code == 1
    assert max(map(len, answer.out.splitlines())) <= 80
    said = " ".join(answer.out.split())
    assert "First wrong elements, float64 at 9" in said
    assert "out[b=0, h=0, q=6, d=0]: expected" in said
    assert (
        "key kv=4: the backend's mask; the generated one is right and causal() and sliding_window(3): expected" in said
    )
    assert "expected seen, got hidden" in said
    data = json.loads(invoke("check", "causal()", "--length", "9", "--dtype", "float32", "--json").out)
    assert data["holds"] is False
    assert data["cases"][0]["first_wrong"][0]["at"] == {"b": 0, "h": 0, "q": 6, "d": 0}
    assert data["cases"][0]["cause"]["kv"] == 4
    assert data["cases"][0]["cause"]["part"] == "mask"


def test_what_changes_between_two_patterns_or_two_plans(invoke: Invoke) -> None:
    answer = invoke("code", "sliding_window(8)", "--stage", "mask_mod", "--diff", "sliding_window(9)")
    assert answer.out == (
        "--- sliding_window(8) (mask_mod)\n+++ sliding_window(9) (mask_mod)\n@@ -1,3 +1,3 @@\n"
        " def mask_mod(b, h, q, kv):\n"
        "-    # (kv <= q) & (q - kv < 8)\n-    return (kv <= q) & (q - kv < 8)\n"
        "+    # (kv <= q) & (q - kv < 9)\n+    return (kv <= q) & (q - kv < 9)\n"
    )
    plans = ("code", "causal()", "--stage", "plan", "--against", "length=256", "--against", "grad=yes")
    told = json.loads(invoke(*plans, "--json").out)["diff"]
    assert "+++ causal() (plan, length=256, grad=True)\n" in told
    assert "-shapes    query [1, 8, 4096, 64]" in told
    same = invoke("code", "causal()", "--stage", "ir", "--diff", "full() & causal()")
    assert (same.code, same.out, same.err) == (0, "", "note: no line of ir differs\n")
