"""Program to FlexAttention functions: real Python source that ``inspect`` and tracebacks can find.

The functions work on scalars under ``vmap`` (FlexAttention) and on broadcast index tensors alike (the chunked
path), so one text serves every backend. Arithmetic on reals follows the dtype of the score; reals inside a mask
are float32.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import linecache
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flexsparse.codegen.emitter import ARGUMENT, ROW, Emitter, filled, has_scalars, is_uniform, opaque_name
from flexsparse.errors import ShapeError
from flexsparse.ir.nodes import (
    OPERATIONS,
    SIZE_SYMBOLS,
    Apply,
    Constant,
    Kind,
    Node,
    Scalar,
    Symbol,
    walk,
)
from flexsparse.ir.program import Gate, Program, program_text, table_name

_SOFT = {"ste_identity": "1, with the gradient of u", "ste_sigmoid": "1, with the gradient of sigmoid(u - tau)"}
_SOFT["capped_softmax"] = "min(1, exp(u - tau)), at least `least`"
_SCORE_FUNCTIONS = ("score_mod", "kept_score_mod", "lost_score_mod")
_WIDTH = 100
_COMMENT_WIDTH = 160


@dataclass(frozen=True)
class Form:
    """What the functions count: queries from ``q_offset`` on, and rows of keys and their copies in place of keys."""

    offset: bool = False
    rows: bool = False

    def emitter(self, real_dtype: str, hoisted: dict[Node, str], program: Program | None = None) -> Emitter:
        """An emitter of such functions, with what ``program`` has that could not be traced."""
        return Emitter(real_dtype, hoisted, () if program is None else program.opaque, self.offset, self.rows)


@dataclass(frozen=True)
class Generated:
    """A generated module: its text, the names that ``build`` takes, and ``build`` itself.

    ``build(**values)`` returns the functions by name: ``mask_mod``, ``score_mod`` (None where the score is
    untouched), and for a gate on V: ``kept_score_mod`` (score_mod plus the log of the gate), ``lost_score_mod``
    (score_mod plus the log of ``gate_total`` less the gate), ``value_gate`` and ``gate_total``. These are None where
    no gate acts on V. ``sink_logit(like, b, h, q)`` gives the sink, in the dtype of ``like`` or captured ones; None
    without one.
    """

    source: str
    filename: str
    arguments: tuple[str, ...]
    build: Callable[..., dict[str, Any]]

    def function_source(self, name: str) -> str:
        """The text of one function, or a comment where the pattern needs none."""
        for node in ast.walk(ast.parse(self.source)):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                lines = self.source.splitlines()[node.lineno - 1 : node.end_lineno]
                return textwrap.dedent("\n".join(lines))
        return f"# no {name}: the pattern leaves it as it is"


def selection_arguments(program: Program, number: int) -> tuple[str, ...]:
    """The names under which ``build`` takes what belongs to one selection."""
    used = [gate for gate in program.gates if gate.number == number]
    names = [f"birth_{number}", f"death_{number}", f"group_{number}"]
    if used:
        names += [f"u_{number}", f"tau_{number}", f"least_{number}"]
    if any(gate.through for gate in used):
        names += [f"u_{number}_fixed", f"tau_{number}_fixed"]
    return tuple(names)


def generate(program: Program, title: str, *, offset: bool = False, rows: bool = False) -> Generated:
    """The functions of a program. ``title`` is the expression they came from; ``offset`` adds ``q_offset`` to q.

    With ``rows`` they take a row in place of a key: ``key_of_row`` says whose it is, and ``build`` takes the scores of
    selections, and ``from_n`` and ``until_n``, by row. There is no ``value_gate`` and no ``sink_logit`` then.
    """
    form = Form(offset, rows)
    arguments = _arguments(program, form)
    source = _module(program, title, arguments, form)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    filename = f"<flexsparse {digest}>"
    # linecache keeps entries without a modification time, so tracebacks and inspect.getsource find the text.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    # Dynamo imports a function's module by name, so the generated one must be found there.
    module = types.ModuleType(f"flexsparse_generated_{digest}")
    exec(compile(source, filename, "exec"), module.__dict__)
    sys.modules[module.__name__] = module
    return Generated(source, filename, arguments, _refusing(module.build, title))


def _refusing(build: Callable[..., dict[str, Any]], title: str) -> Callable[..., dict[str, Any]]:
    """``build``, which computes functions of sizes alone in Python, with an error in words where they have no value."""

    @functools.wraps(build)
    def refusing(**values: Any) -> dict[str, Any]:
        try:
            return build(**values)
        except (ArithmeticError, ValueError) as error:
            numbers = (*SIZE_SYMBOLS, *(name for name, x in values.items() if isinstance(x, int | float)))
            sizes = ", ".join(f"{name}={values[name]}" for name in dict.fromkeys(numbers) if name in values)
            raise ShapeError(
                "sizes",
                got=f"{sizes} ({error})",
                expected=f"sizes at which every function of sizes alone in {title} has a value",
                mend="Bound its argument, as in exp(minimum(kv_len, 700)).",
            ) from error

    return refusing


def _arguments(program: Program, form: Form) -> tuple[str, ...]:
    names = [opaque_name(n) for n in range(len(program.opaque))]
    names += [spec.name for spec in program.tensors if _is_loaded(program, spec.name)]
    names += [table_name(n) for n in range(len(program.tables)) if _is_loaded(program, table_name(n))]
    for number in range(len(program.selections)):
        names += selection_arguments(program, number)
        names += [f"from_{number}", f"until_{number}"] * form.rows
    names += ["key_of_row", "row_group"] * form.rows
    names += [topk.name for topk in program.chosen]
    mentioned = {n.name for e in program.expressions.values() for n in walk(e) if isinstance(n, Symbol)}
    names += [name for name in SIZE_SYMBOLS if name in mentioned]
    scalars = _scalars(program)
    names += [*(scalar.name for scalar in scalars), *([ARGUMENT] if scalars else [])]
    return (*names, "q_offset") if form.offset else tuple(names)


def _scalars(program: Program) -> tuple[Scalar, ...]:
    """Those that the expressions read, and not only what a selection is."""
    read = {n for e in program.expressions.values() for n in walk(e) if isinstance(n, Scalar)}
    return tuple(scalar for scalar in program.scalars if scalar in read)


def opaque_functions(program: Program) -> dict[str, Callable[..., Any]]:
    """The functions that could not be traced, under the names by which ``build`` takes them."""
    return {opaque_name(n): leaf.function for n, leaf in enumerate(program.opaque)}


def _is_loaded(program: Program, name: str) -> bool:
    return any(name in names for names in program.loaded.values())


def _module(program: Program, title: str, arguments: tuple[str, ...], form: Form) -> str:
    hoisted: dict[Node, str] = {}
    bodies = {
        "mask_mod": _mask_function(program, form, hoisted),
        **{name: _score_function(program, form, hoisted, name) for name in _SCORE_FUNCTIONS},
    }
    if not form.rows:
        bodies["value_gate"] = _value_gate_function(program, form, hoisted)
        bodies["sink_logit"] = _sink_function(program, form, hoisted)
    present = {name: body for name, body in bodies.items() if body}
    lines = [f"    {line}" for line in _argument_comments(program, form)]
    emitter = Emitter("torch.float32", None)
    # A scalar becomes an argument once nothing is computed of its number any more.
    for node, name in sorted(hoisted.items(), key=lambda item: isinstance(item[0], Scalar)):
        lines.append(f"    {name} = {_hoisted(emitter, node)}")
    for body in present.values():
        lines += ["", textwrap.indent(body, "    ")]
    entries = ", ".join(f'"{name}": {name if name in present else None}' for name in bodies)
    lines += ["", f'    return {{{entries}, "gate_total": {_gate_total(program)}}}', ""]
    text = "\n".join(lines).lstrip("\n")
    imports = ["import math", ""] if "math." in text else []
    return "\n".join([f"# {title}", *imports, "import torch", "", "", f"def build({_keywords(arguments)}):", text])


def _hoisted(emitter: Emitter, node: Node) -> str:
    """A function of sizes as Python text; as an argument, of the kind that the node has, where scalars decide it."""
    shown = emitter.emit(node)
    if not has_scalars(node):
        return shown
    return f"{ARGUMENT}({shown if node.kind is not Kind.REAL or isinstance(node, Scalar) else f'float({shown})'})"


def _keywords(arguments: tuple[str, ...]) -> str:
    return f"*, {', '.join(arguments)}" if arguments else ""


def _argument_comments(program: Program, form: Form) -> Iterator[str]:
    for scalar in _scalars(program):
        yield f"# {scalar.name}: {scalar.kind.value}, a number of the call; {ARGUMENT} keeps it out of compiled code"
    for spec in program.tensors:
        if _is_loaded(program, spec.name):
            yield f"# {spec.name}: {spec.kind.value} [{', '.join(spec.dims)}]"
    for topk in program.chosen:
        yield f"# {topk.name}: the blocks of {topk.block} keys that each query chose, bool [B, H, S_q, blocks]"
    for number in range(len(program.selections)):
        yield f"# selection {number}: key kv is selected for the queries birth <= q < death; [B, H_scores, S] int32"
        if len(selection_arguments(program, number)) > 3:
            soft = _SOFT.get(program.selections[number].gate, "clip(u - tau, least, 1)")
            yield f"# its gate is {soft}, each [B, H_scores, S]; group_{number} is H // H_scores"
        if form.rows:
            yield f"# row stands for its key in selection {number} for the queries from <= q < until; [B, H_rows, rows]"
    if form.rows:
        yield "# rows: the keys, and behind them copies of those in the slots as each chunk of queries starts;"
        yield "# key_of_row is the key of each, and u is by row as well; row_group is H // H_rows"


def _function(name: str, parameters: str, form: Form, comment: str, body: list[str]) -> str:
    shown = comment if len(comment) <= _COMMENT_WIDTH else f"{comment[: _COMMENT_WIDTH - 3]}..."
    if form.rows:
        parameters = parameters.removesuffix("kv") + "row"
    lines = [f"def {name}({parameters}):", f"    # {shown}"]
    if form.rows:
        lines.append(f"    kv = key_of_row[{ROW}]")
    if form.offset:
        lines.append("    q = q + q_offset")
    return "\n".join(lines + [f"    {line}" for line in body])


def _mask_function(program: Program, form: Form, hoisted: dict[Node, str]) -> str:
    emitter = form.emitter("torch.float32", hoisted, program)
    if isinstance(program.mask, Constant):
        body = "return kv >= 0" if program.mask.value else "return kv < 0"
    else:
        body = f"return {emitter.emit_mask(program.mask)}"
    lines = [body]
    if len(body) > _WIDTH and isinstance(program.mask, Apply) and program.mask.op in ("and", "or"):
        first, *rest = emitter.chain(program.mask, program.mask.op)
        symbol = OPERATIONS[program.mask.op].symbol
        lines = ["return (", f"    {first}", *(f"    {symbol} {operand}" for operand in rest), ")"]
    return _function("mask_mod", "b, h, q, kv", form, program_text(program.mask), lines)


def _gate_total(program: Program) -> float | None:
    """What ``lost_score_mod`` subtracts the gate on V from; None without one.

    1 leaves nothing of a key whose gate is 1. A straight-through gate is 1 everywhere and still has a gradient,
    which the logarithm of nothing would lose.
    """
    if program.gate_v == Constant(1.0):
        return None
    return 2.0 if any(isinstance(n, Gate) and n.through for n in walk(program.gate_v)) else 1.0


def _score_function(program: Program, form: Form, hoisted: dict[Node, str], name: str) -> str:
    """One of ``_SCORE_FUNCTIONS``; empty where there is nothing to do."""
    one, total = Constant(1.0), _gate_total(program)
    value_gate = name != "score_mod"
    if value_gate and total is None:
        return ""
    steps: list[tuple[str, Node]] = []
    emitter = form.emitter("score.dtype", hoisted, program)
    body: list[str] = []
    if program.gate_k != one:
        body.append(f"gate = {emitter.emit(program.gate_k)}")
        steps.append(("score = score * gate", program.gate_k))
    if program.has_score:
        steps.append((f"score = {emitter.emit_score(program.score)}", program.score))

    def shown(gate: Node) -> str:
        return "gate" if gate == program.gate_k else emitter.emit(gate)

    if program.gate_logit != one:
        steps.append((f"score = score + torch.log({shown(program.gate_logit)})", program.gate_logit))
    if name == "kept_score_mod":
        steps.append((f"score = score + torch.log({shown(program.gate_v)})", program.gate_v))
    if name == "lost_score_mod":
        steps.append((f"lost = {total} - {shown(program.gate_v)}", program.gate_v))
        # The inner choice keeps the gradient of the logarithm finite where nothing is lost.
        steps.append(("some = torch.where(lost > 0.0, lost, 1.0)", one))
        steps.append(('score = torch.where(lost > 0.0, score + torch.log(some), -float("inf"))', one))
    if not steps:
        return ""
    gates = emitter.gate_lines([node for _, node in steps])
    comment = program_text(program.score)
    if program.gate_k != one:
        comment = f"score * gate_k, then {comment}" if program.has_score else "score * gate_k"
    comment += " + log(gate_logit)" if program.gate_logit != one else ""
    comment += {"kept_score_mod": " + log(gate_v)", "lost_score_mod": f" + log({total} - gate_v)"}.get(name, "")
    body = gates + body + [line for line, _ in steps] + ["return score"]
    return _function(name, "score, b, h, q, kv", form, comment, body)


def _value_gate_function(program: Program, form: Form, hoisted: dict[Node, str]) -> str:
    if program.gate_v == Constant(1.0):
        return ""
    emitter = form.emitter("torch.float32", hoisted)
    body = [*emitter.gate_lines([program.gate_v]), f"return {emitter.emit(program.gate_v)}"]
    return _function("value_gate", "b, h, q, kv", form, program_text(program.gate_v), body)


def _sink_function(program: Program, form: Form, hoisted: dict[Node, str]) -> str:
    """The sink, computed outside FlexAttention from index tensors that broadcast together."""
    if not program.has_sink:
        return ""
    emitter = Emitter("like.dtype", hoisted)
    shown = emitter.emit(program.sink)
    body = f"return {filled('like', program.sink, shown)}" if is_uniform(program.sink) else f"return {shown}"
    return _function("sink_logit", "like, b, h, q", form, program_text(program.sink), [body])
