"""Every mistake gets its message, exit code 2 and no traceback."""

from __future__ import annotations

import os

import pytest

from tests.cli.conftest import Invoke

MISTAKES = {
    ("show", "caussal"): "got the name 'caussal', expected a pattern, a symbol or a function of the language. "
    "Did you mean 'causal'?",
    ("show", "causal() &"): "expected an expression such as causal & sliding_window(512)",
    ("show", "sparsek(0)"): "sparsek(k): got 0, expected an integer of at least 1.",
    ("show", "alibi()"): "Add it to the keys it scores: full() + alibi()",
    ("shwo", "causal"): "No such command 'shwo'. Did you mean 'show'?",
    ("list", "causl"): "NAME: got 'causl', expected a pattern of the catalogue. Did you mean 'causal'?",
    ("show",): "Missing argument 'EXPR'.\nAn expression is, for example, \"causal() & sliding_window(512)\".",
    ("show", "causal", "--lenght", "3"): "No such option",
    ("show", "causal", "--length", "0"): "0 is not in the range x>=1",
    ("show", "causal", "--length", "many"): "'many' is not a valid integer",
    ("show", "causal", "--block", "20"): "block_size: got 20, expected a multiple of 16",
    ("show", "causal", "--zoom", "5:3,0:9"): "--zoom: got '5:3,0:9', expected q0:q1,kv0:kv1 with 0 <= start < stop",
    ("show", "causal", "--zoom", "here"): "--zoom: got 'here'",
    ("show", "causal", "--head", "7"): "--head: got 7, expected 0 to 3, as there are 4 heads.",
    ("show", "causal", "--view", "headz"): "--view: got 'headz', expected tiles, heads, score, gate, selection. "
    "Did you mean 'heads'?",
    ("show", "causal", "--view", "gate"): "--view: got 'gate' for a pattern without one",
    ("show", "causal", "--view", "score"): "--view: got 'score' for a pattern that leaves scores as they are",
    ("show", "causal", "--view", "selection"): "--view: got 'selection' for a pattern that selects no keys by scores",
    ("show", "causal + alibi", "--view", "score", "--query", "1024"): "--query: got 1024, expected 0 to 1023.",
    ("show", "causal", "--length", "1000000", "--zoom", ":,:"): "got 1,000,000 queries x 1,000,000 keys, expected a "
    "window of at most 67,108,864 pairs",
    ("show", "sparsek(2)", "--length", "9000", "--view", "gate"): "--zoom: got 9,000 queries x 9,000 keys",
    ("show", "moba(64, 4)", "--length", "1000000"): "Take a shorter length, fewer heads or larger blocks.",
    ("show", "causal + alibi", "--view", "score", "--raw", "nan"): "--raw: got nan, expected a finite score.",
    ("show", "causal & ~causal + alibi", "--view", "score", "--query", "3"): "--query: got 3, which sees no key",
    ("show", "sparsek(2)", "--view", "selection", "--zoom", ":,:"): "--zoom: got one for --view selection",
    ("show", "causal", "--query", "3"): "--query: got one for --view tiles, expected --view score without --zoom.",
    ("show", "causal", "--raw", "1"): "--raw: got one for --view tiles, expected --view score, which starts from it.",
    ("show", "sparsek(2)", "--view", "gate", "--raw", "0"): "--raw: got one for --view gate, expected --view score",
    ("show", "causal", "--zoom", ":,:", "--block", "64"): "--block: got one for --view tiles with --zoom, expected "
    "--view tiles or heads, without --zoom.",
    ("show", "causal", "--view", "heads", "--head", "1"): "--head: got one for --view heads, expected a view of one",
    ("show", "causal + alibi", "--view", "score", "--head", "1"): "--head: got one for --view score, expected a view",
    ("show", "causal", "--out", "x.htm"): "expected a file ending in .svg, .png, .html. Did you mean '.html'?",
    ("show", "causal", "--out", "x"): "--out: got 'x', expected a file ending in .svg, .png, .html. For example",
    ("show", "causal", "--out", "no-such-folder/x.svg"): "expected a file in a directory that exists",
    ("show", "causal", "--cells", "2000"): "2000 is not in the range 8<=x<=1024",
    ("show", "causal", "--scores", "x.pt"): "--scores: got 'x.pt', expected a pattern that selects keys by scores",
    ("show", "sparsek(2)", "--scores", "score=x.pt"): "--scores: got 'score', expected the name of scores of the "
    "pattern. Did you mean 'scores'?",
    ("explain", "causal", "--dtype", "f32"): "--dtype: got 'f32', expected float64, float32, bfloat16, float16.",
    ("explain", "causal", "--dtype", "bfloat61"): "Did you mean 'bfloat16'?",
    ("explain", "causal", "--device", "cudda"): "--device: got 'cudda', expected cpu, cuda or cuda:N. "
    "Did you mean 'cuda'?",
    ("explain", "causal", "--heads", "6", "--kv-heads", "4"): "--kv-heads: got 4 for 6 query heads",
    ("explain", "causal", "--backend", "flx"): "backend: got 'flx'",
    ("explain", "causal", "--hardware", "H100", "--png", "x.txt"): "--png: got 'x.txt', expected a file ending in .png",
    ("explain", "causal", "--hardware", "H100", "--html", "x.png"): "--html: got 'x.png', expected a file ending in "
    ".html",
    (
        "code",
        "causal",
        "--target",
        "sm_80",
    ): "--target: got --stage source, expected a stage that is about a GPU: graph, triton, triton-backward, ttir",
    ("explain", "causal", "--backend", "flex", "--grad"): "FlexAttention has no gradients on CPU.",
    ("code", "causal", "--stage", "mask"): "stage: got 'mask', expected one of 'expr', 'canonical', 'ir', 'tiles', "
    "'plan', 'source', 'mask_mod', 'score_mod', 'rows', 'kernels', 'graph', 'triton', 'triton-backward', 'ttir', "
    "'ttgir', 'llvm', 'ptx', 'sass', 'amdgcn', 'resources', 'cpp'. Did you mean 'mask_mod'?",
    ("code", "sparsek(8)", "--stage", "ptx", "--target", "sm90"): "target: got 'sm90', expected one of sm_80, sm_90, "
    "sm_100, gfx942. Did you mean 'sm_90'?",
    ("code", "sparsek(8)", "--stage", "sass", "--target", "gfx942"): "stage: got 'sass' for gfx942",
    ("code", "causal", "--out", "no-such-folder/x.py"): "--out: got 'no-such-folder/x.py', expected a file in a "
    "directory that exists",
    (
        "hardware",
        "--save",
        "no-such-folder/x.json",
    ): "--save: got 'no-such-folder/x.json', expected a file in a directory",
    ("completion", "bsh"): "SHELL: got 'bsh', expected bash, zsh or fish. Did you mean 'bash'?",
    ("completion",): "Missing argument 'bash|zsh|fish'",
    ("cache", "claer"): "No such command 'claer'. Did you mean 'clear'?",
    ("code", "causal", "--against", "lenght=8"): "--against: got 'lenght=8', expected NAME=VALUE, NAME one of length, ",
    ("code", "causal", "--against", "length"): "--against: got 'length', expected NAME=VALUE",
    ("code", "causal", "--against", "heads=0"): "--against: got 'heads=0', expected a number of at least 1 as heads.",
    ("code", "causal", "--against", "grad=1"): "--against: got 'grad=1', expected yes or no as grad.",
    ("code", "causal", "--out", "/"): "--out: got '/', expected a file, neither a directory nor a device.",
    ("code", "causal", "--out", os.devnull): "expected a file, neither a directory nor a device.",
    ("code", "causal", "--target", "sm90"): "target: got 'sm90', expected one of sm_80, sm_90, sm_100, gfx942.",
    ("code", "causal &"): "expression 'causal &': got invalid syntax where it ends, expected an expression such as",
    ("code", " "): "expression ' ': got no text, expected an expression such as causal & sliding_window(512).",
    ("explain", "causal", "--hardware", "H100", "--png", "/"): "--png: got '/', expected a file, neither",
    ("check", "causal", "--dtype", "int8"): "--dtype: got 'int8'",
    ("check", "causal", "--length", "100000"): "--length: got 100000, expected at most 2048",
    ("check", "causal", "--kv-heads", "3", "--heads", "4"): "--kv-heads: got 3 for 4 query heads",
    ("check", "causal", "--device", "cuda:99"): "--device: got 'cuda:99', expected a device of this machine",
    ("bench", "causal", "--lengths", "64,x"): "--lengths: got '64,x', expected whole numbers of at least 1 with commas",
    ("bench", "causal", "--lengths", "0"): "--lengths: got '0', expected whole numbers of at least 1",
    (
        "bench",
        "causal",
        "--peers",
        "sdap",
    ): "--peers: got 'sdap', expected some of sdpa, flex, others, or none. Did you mean 'sdpa'?",
    ("bench", "causal", "--heads", "4", "--kv-heads", "3"): "--kv-heads: got 3 for 4 query heads",
    ("bench", "causal", "--save", "no-such-folder/x.json"): "--save: got 'no-such-folder/x.json', expected a file in a",
    ("bench", "causal", "--save", "/"): "--save: got '/', expected a file, neither a directory nor a device.",
    ("bench", "causal", "--device", "cuda:99"): "--device: got 'cuda:99', expected a device of this machine, which has",
    ("demo", "--k", "0"): "sparsek(k): got 0, expected an integer of at least 1.",
    ("demo", "--window", "-1"): "sliding_window(window): got -1, expected an integer of at least 1.",
    ("demo", "--file", "no-such-file"): "--file: got 'no-such-file': No such file or directory",
    ("demo", "--svg", "no-such-folder/x.svg"): "--svg: got 'no-such-folder/x.svg'",
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.items(), ids=[" ".join(a) for a in MISTAKES])
def test_message_and_code(arguments: tuple[str, ...], message: str, invoke: Invoke) -> None:
    answer = invoke(*arguments)
    assert answer.code == 2
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""


def test_json_of_a_mistake_leaves_standard_output_empty(invoke: Invoke) -> None:
    answer = invoke("check", "causall", "--json")
    assert (answer.code, answer.out) == (2, "")


@pytest.mark.parametrize(
    "arguments",
    [("code", "causal", "--out"), ("bench", "causal", "--save"), ("explain", "causal", "--hardware", "H100", "--html")],
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    arguments: tuple[str, ...], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    answer = invoke(*arguments, "x")
    assert answer.code == 2
    assert answer.err == (
        f"Error: {arguments[-1]}: got 'x': Permission denied, expected a file in a folder that can be written.\n"
    )


def test_an_empty_file(invoke: Invoke, tmp_path: object) -> None:
    path = f"{tmp_path}/empty.txt"
    open(path, "w").close()
    answer = invoke("demo", "--file", path)
    assert answer.code == 2
    assert "which is empty, expected a file with text" in answer.err
