"""The verifier: what every program must satisfy, checked after lowering and after each rewrite."""

from __future__ import annotations

from flexsparse.errors import VerificationError
from flexsparse.ir.nodes import (
    BLOCK_SCORES,
    OPERATIONS,
    SYMBOLS,
    Apply,
    Constant,
    Kind,
    Load,
    Node,
    Opaque,
    Scalar,
    Symbol,
    walk,
)
from flexsparse.ir.program import Chosen, Gate, Program, Selected, table_name

_OPERANDS_BOOL = ("and", "or", "xor", "not")
_OPERANDS_INT = ("floordiv", "mod", "truncdiv", "truncmod")


def verify(program: Program) -> Program:
    """The program itself. Raises VerificationError, naming the expression and the node, on a broken invariant."""
    tensors = {spec.name for spec in program.tensors} | {table_name(n) for n in range(len(program.tables))}
    for name, expression in program.expressions.items():
        wanted = Kind.BOOL if name == "mask" else None
        if (expression.kind is Kind.BOOL) != (wanted is Kind.BOOL):
            raise _broken(name, expression, "a mask" if wanted else "a number")
        for node in walk(expression):
            _check(name, node, program, tensors)
    return program


def _check(name: str, node: Node, program: Program, tensors: set[str]) -> None:
    match node:
        case Constant() | Scalar():
            pass
        case Symbol(symbol):
            if symbol not in SYMBOLS or (symbol == "score" and name != "score"):
                raise _broken(name, node, "a symbol of the language, and the running score only in scores")
            if symbol == "kv" and name == "sink":
                raise _broken(name, node, "a sink that does not depend on a key")
        case Load(tensor, index):
            if tensor.name not in tensors or len(index) != len(tensor.dims):
                raise _broken(name, node, "a declared tensor with one index for each dimension")
            if any(i.kind is not Kind.INT for i in index):
                raise _broken(name, node, "integer indices")
        case Apply(op, args):
            _check_operation(name, node, op, args)
        case Opaque(_, kind, args):
            if len(args) != (kind is Kind.REAL) or (args and args[0].kind is not Kind.REAL):
                raise _broken(name, node, "the running score for a score function, nothing for a mask function")
        case Selected(number) | Gate(number):
            if not 0 <= number < len(program.selections):
                raise _broken(name, node, f"one of {len(program.selections)} selections")
            if isinstance(node, Gate) and name in ("mask", "score"):
                raise _broken(name, node, "gates only in gates")
            if name == "sink":
                raise _broken(name, node, "a sink that does not depend on a key")
        case Chosen(topk):
            if topk.k < 1 or topk.block < 1 or topk.score not in BLOCK_SCORES:
                raise _broken(name, node, "at least one block of at least one key, and a known score")
        case _:
            raise _broken(name, node, "a flattened node")


def _check_operation(name: str, node: Node, op: str, args: tuple[Node, ...]) -> None:
    if op not in OPERATIONS or len(args) != OPERATIONS[op].arity:
        raise _broken(name, node, "an operation of the table with its number of operands")
    kinds = [arg.kind for arg in args]
    if op == "where":
        if kinds[0] is not Kind.BOOL or Kind.BOOL in kinds[1:]:
            raise _broken(name, node, "a mask and two numbers")
    elif op in _OPERANDS_BOOL:
        if set(kinds) != {Kind.BOOL}:
            raise _broken(name, node, "masks as operands")
    elif Kind.BOOL in kinds or (op in _OPERANDS_INT and Kind.REAL in kinds):
        raise _broken(name, node, "numbers as operands, integers for // and %")


def _broken(name: str, node: Node, expected: str) -> VerificationError:
    return VerificationError(
        f"program.{name}", got=repr(node), expected=expected, mend="This is a defect of flexsparse; please report it."
    )
