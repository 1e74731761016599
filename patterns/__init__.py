"""The catalogue: every module here defines the pattern of its own name, which this package exports."""

from __future__ import annotations

import importlib
import pkgutil

from flexsparse.catalogue import PatternFunction


def catalogue() -> dict[str, PatternFunction]:  # type: ignore[type-arg]
    """Every pattern by name, in alphabetical order."""
    return {name: globals()[name] for name in __all__}


__all__ = sorted(module.name for module in pkgutil.iter_modules(__path__))
for _name in __all__:
    # A pattern shares its module's name; the function is what `from flexsparse.patterns import name` gives.
    globals()[_name] = getattr(importlib.import_module(f"flexsparse.patterns.{_name}"), _name)
