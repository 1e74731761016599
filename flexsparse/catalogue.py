"""``@pattern``: turns a small function in the language into a named, checked, listed pattern."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, get_args, get_type_hints

from flexsparse.errors import FlexsparseError, PatternArgumentError, TruthValueError, did_you_mean
from flexsparse.expression import Expression, Index, Value, wrap
from flexsparse.ir.nodes import Constant, Named, PerHead
from flexsparse.ir.scalars import is_of_scalars

P = ParamSpec("P")
R = TypeVar("R", bound=Expression)


class PatternFunction(Generic[P, R]):
    """A pattern of the catalogue: call it to get the expression, which prints as the call.

    ``examples`` are the argument sets that ``list`` draws and that every shared test runs.
    """

    def __init__(self, function: Callable[P, R], examples: Sequence[Mapping[str, Any]]) -> None:
        self.function = function
        self.name = function.__name__
        self.examples = tuple(dict(e) for e in examples)
        self.signature = inspect.signature(function)
        module = inspect.getmodule(function)
        self.__doc__ = function.__doc__ or (module.__doc__ if module else None)
        self.__name__ = self.__qualname__ = self.name
        self.__module__ = function.__module__
        self.__wrapped__ = function

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return inspect.cleandoc(self.__doc__ or "").split("\n", 1)[0]

    @property
    def parameters(self) -> str:
        """The parameters as they are written in the definition, without types."""
        shown = [
            p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}"
            for p in self.signature.parameters.values()
        ]
        return f"({', '.join(shown)})"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        bound = self._bind(args, kwargs)
        try:
            result = self.function(*bound.args, **bound.kwargs)
        except (TypeError, TruthValueError) as error:
            shaping = [f"{name}={value!r}" for name, value in bound.arguments.items() if _of_scalars(value)]
            if not shaping:
                raise
            raise PatternArgumentError(
                f"{self.name}({', '.join(shaping)})",
                got="a number that each call gives",
                expected="a number that is known when the pattern is written, as it decides how that is built",
                mend=f"Compile {self.name} anew where it changes.",
            ) from error
        except FlexsparseError as error:
            # An inner check speaks of `window` or `topk(k)`; the user wrote this pattern's name.
            inner = re.fullmatch(r"\w+\((\w+)\)|(\w+)", error.argument)
            argument = f"{self.name}({inner[1] or inner[2]})" if inner else f"{self.name}: {error.argument}"
            raise PatternArgumentError(argument, got=error.got, expected=error.expected, mend=error.mend) from None
        named = Named(self.name, self._written(bound), result.node)
        return wrap(named)  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<pattern {self.name}{self.parameters}>"

    def _bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> inspect.BoundArguments:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = [name for name in kwargs if name not in self.signature.parameters]
            hint = did_you_mean(unknown[0], self.signature.parameters) if unknown else ""
            shown = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
            raise PatternArgumentError(
                self.name,
                got=f"{self.name}({', '.join(shown)}): {error}",
                expected=f"{self.name}{self.parameters}",
                mend=hint,
            ) from None
        for name, value in bound.arguments.items():
            self._check(name, value)
        return bound

    def _check(self, name: str, value: object) -> None:
        """Refuse an argument whose type is not one that the annotation names."""
        annotation = get_type_hints(self.function).get(name)
        allowed = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        if _of_scalars(value) and (float in allowed or (int in allowed and isinstance(value, Index))):
            return
        if annotation is None or isinstance(value, tuple(a for a in allowed if isinstance(a, type))):
            boolean_for_number = isinstance(value, bool) and bool not in allowed and annotation is not None
            if not boolean_for_number:
                return
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            return
        names = " or ".join("None" if a is type(None) else getattr(a, "__name__", str(a)) for a in allowed)
        raise PatternArgumentError(
            f"{self.name}({name})",
            got=f"{value!r}, {type(value).__name__}",
            expected=names,
            mend=f"The pattern takes {self.name}{self.parameters}.",
        )

    def _written(self, bound: inspect.BoundArguments) -> tuple[tuple[str, object], ...]:
        """The arguments as the printed form shows them: required ones by position, others where they differ."""
        written: list[tuple[str, object]] = []
        for name, parameter in self.signature.parameters.items():
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            required = parameter.default is inspect.Parameter.empty
            if not required and not isinstance(value, Expression) and value == parameter.default:
                continue
            by_position = required and parameter.kind is not inspect.Parameter.KEYWORD_ONLY
            written.append(("" if by_position else name, _frozen(value)))
        return tuple(written)


def _of_scalars(value: object) -> bool:
    """Whether the value is a number that each call gives, or computed of such."""
    return isinstance(value, Value) and is_of_scalars(value.node)


def _frozen(value: object) -> object:
    """Arguments become part of a hashable node."""
    if isinstance(value, Expression):
        return value.node
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def pattern(*, examples: Sequence[Mapping[str, Any]]) -> Callable[[Callable[P, R]], PatternFunction[P, R]]:
    """Declare a pattern with the argument sets by which it is drawn and tested.

    The decorated function takes numbers, strings or expressions and returns an expression. Its printed form
    is the call; its summary in ``flexsparse list`` is the first line of its module's docstring.
    """

    def decorate(function: Callable[P, R]) -> PatternFunction[P, R]:
        return PatternFunction(function, examples)

    return decorate


def at_least(least: int, **arguments: object) -> None:
    """Refuse an integer argument below ``least``; expressions, as from ``per_head``, are checked entry by entry.

    A number that each call gives is checked when it is known.
    """
    for name, value in arguments.items():
        for number in _numbers(value):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise PatternArgumentError(name, got=repr(number), expected=f"an integer of at least {least}")


def above(bound: float, **arguments: object) -> None:
    """Refuse a number that is not above ``bound``; expressions as in ``at_least``."""
    for name, value in arguments.items():
        for number in _numbers(value):
            if not number > bound:
                raise PatternArgumentError(name, got=repr(number), expected=f"a number above {bound}")


def _numbers(value: object) -> list[Any]:
    """The numbers that are known of an argument."""
    if not isinstance(value, Value):
        return [value]
    return [e.value for e in value.node.entries if isinstance(e, Constant)] if isinstance(value.node, PerHead) else []
