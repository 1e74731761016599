"""Which lines of FlexAttention's kernels come from the pattern: the sections that Inductor writes into its templates.

A section is a run of assignments to ``tmp0``, ``tmp1``, ... that ends in one to ``post_mod_scores``,
``mask_mod_output`` or ``grad_scores``. That a line belongs to it is certain. What it computes is read back from the
text, and said where that is an operation of the program; the compiler folds sizes and constants, and then only the
section is known.
"""

from __future__ import annotations

import ast
import re

from flexsparse.explorer.marks import Mark, MarkedText
from flexsparse.explorer.origins import Origins
from flexsparse.ir.nodes import Apply, Constant, Node, Symbol, walk
from flexsparse.ir.program import Program, program_text

_STEP = re.compile(r"\s+(tmp\d+) = (.*)$")
_ENDS = re.compile(r"\s+(post_mod_scores|mask_mod_output|grad_scores) = (tmp\d+)$")
_HIDES = re.compile(r"\s+(?:post_mod_scores|dsT?) = tl\.where\(mask_mod_output, ")
_INDICES = {"off_z": "b", "off_zq": "b", "off_h": "h", "off_hq": "h", "m": "q", "n": "kv"}
_INDICES |= {"qk": "score", "qkT": "score"}
_BINARY = {"Add": "add", "Sub": "sub", "Mult": "mul", "Div": "div", "BitAnd": "and", "BitOr": "or", "BitXor": "xor"}
_COMPARED = {"Lt": "lt", "LtE": "le", "Gt": "gt", "GtE": "ge", "Eq": "eq", "NotEq": "ne"}
_TURNED = {"gt": "lt", "ge": "le"}
_COMMUTE = ("add", "mul", "and", "or", "xor", "eq", "ne", "minimum", "maximum")
_SAME_NAME = ("abs", "exp", "exp2", "log", "log2", "sqrt", "tanh", "cos", "sigmoid", "minimum", "maximum", "where")


def mark_flex(text: str, pattern: Node, program: Program, *, in_order: bool = True) -> MarkedText:
    """The text of Inductor's kernels for ``program``, which ``pattern`` became, with its marks.

    Where positions do not stand ``in_order`` the text's q and kv are not the program's, and nothing is read back.
    """
    return MarkedText(tuple(_Marker(pattern, program, in_order).lines(text)))


class _Marker:
    def __init__(self, pattern: Node, program: Program, in_order: bool) -> None:
        self._origins = Origins(pattern, program)
        gates = [g for g in (program.gate_k, program.gate_v, program.gate_logit) if not isinstance(g, Constant)]
        self._touched = program.has_score or bool(gates)
        self._score_kind = "score and gate" if gates and program.has_score else "gate" if gates else "score"
        score: list[Node] = [program.score] if program.has_score else []
        self._whole = {"mask": (program.mask,), "score": (*score, *gates)}
        self._known = {
            section: {
                key: n
                for whole in nodes
                for n in walk(whole)
                if in_order and not isinstance(n, Constant | Symbol) and (key := _key(n)) is not None
            }
            for section, nodes in self._whole.items()
        }

    def lines(self, text: str) -> list[tuple[str, Mark | None]]:
        """The lines with their marks: those of a section are known once its end is."""
        found: list[tuple[str, Mark | None]] = []
        steps: list[int] = []
        values: dict[str, object] = {}
        for line in text.split("\n"):
            if line.startswith("def "):
                steps, values = [], {}
            mark = None
            if step := _STEP.match(line):
                steps.append(len(found))
                values[step[1]] = _value(step[2], values)
            elif end := _ENDS.match(line):
                for at in steps:
                    found[at] = (found[at][0], self._step(found[at][0], end[1], values))
                mark = self._end(end[1], values.get(end[2]))
                steps = []
            elif _HIDES.match(line):
                mark = self._end("mask_mod_output", None)
            found.append((line, mark))
        return found

    def _end(self, name: str, value: object) -> Mark | None:
        """The last line of a section has all of it, or for ``grad_scores`` what undoes it."""
        section = "mask" if name == "mask_mod_output" else "score"
        if section == "score" and not self._touched:
            return None
        wholes = self._whole[section]
        origins = tuple(dict.fromkeys(name for node in wholes for name in self._origins.of(node, section)))
        shown = ", ".join(program_text(node) for node in wholes)
        kind = section if section == "mask" else self._score_kind
        return Mark(kind, f"gradient of {shown}" if name == "grad_scores" else shown, origins)

    def _step(self, line: str, name: str, values: dict[str, object]) -> Mark | None:
        end = self._end(name, None)
        step = _STEP.match(line)
        assert step is not None
        section = "mask" if name == "mask_mod_output" else "score"
        node = self._known[section].get(values[step[1]]) if name != "grad_scores" else None
        if end is None or node is None:
            return None if end is None else Mark(end.kind)
        return Mark(end.kind, program_text(node), self._origins.of(node, section))


def _key(node: Node) -> object:
    """A node as nested tuples, in which operands that may be exchanged have one order; None for what has no key."""
    match node:
        case Constant(value):
            return float(value)
        case Symbol(name):
            return name
        case Apply(op, args):
            return _applied(op, [_key(a) for a in args])
    return None


def _applied(op: str, args: list[object]) -> object:
    if any(a is None for a in args):
        return None
    if op in _TURNED:
        op, args = _TURNED[op], args[::-1]
    if op == "neg" and isinstance(args[0], float):
        return -args[0]
    return (op, *(sorted(args, key=repr) if op in _COMMUTE else args))


def _value(code: str, values: dict[str, object]) -> object:
    """What the right side of an assignment computes, as a key; None where that is not known."""
    try:
        tree = ast.parse(code, mode="eval").body
    except SyntaxError:
        return None
    return _read(tree, values)


def _read(tree: ast.expr, values: dict[str, object]) -> object:
    match tree:
        case ast.Name(name):
            return values.get(name, _INDICES.get(name))
        case ast.Constant(value) if isinstance(value, int | float):
            return float(value)
        case ast.UnaryOp(ast.USub(), operand):
            return _applied("neg", [_read(operand, values)])
        case ast.UnaryOp(ast.Invert(), operand):
            return _applied("not", [_read(operand, values)])
        case ast.BinOp(left, op, right) if type(op).__name__ in _BINARY:
            return _applied(_BINARY[type(op).__name__], [_read(left, values), _read(right, values)])
        case ast.Compare(left, [op], [right]) if type(op).__name__ in _COMPARED:
            return _applied(_COMPARED[type(op).__name__], [_read(left, values), _read(right, values)])
        case ast.Call(ast.Attribute(_, "full"), [_, value, *_]):
            return _read(value, values)
        case ast.Call(ast.Attribute(inner, "to")):
            return _read(inner, values)
        case ast.Call(ast.Attribute(_, name), args) if name in _SAME_NAME:
            return _applied(name, [_read(a, values) for a in args])
    return None
