"""An accelerator that is not there: tensors that say they are elsewhere, counted calls, counted waits.

On a GPU every call costs the host some 10 us, and every number that the host asks for makes it wait. Both can be
counted without one: inside ``Accelerator()`` tensors on the device "meta" hold values, every operation on them is
counted, and one that mixes them with tensors of the host fails as it would on a GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
# Operations whose result's size depends on values, so that the host waits for them. repeat_interleave and index are
# such only in some forms, see ``_waits``.
_SIZED_BY_VALUES = ("nonzero", "_unique2", "bincount", "masked_select", "equal", "_local_scalar_dense")


class Remote(Tensor):
    """A tensor that says it is on DEVICE; its values are in ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        made: Remote = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{function} outside of Accelerator()")


class _Literals(TorchFunctionMode):
    """``torch.tensor(numbers, device=...)`` and ``tolist`` copy beneath what a dispatch mode sees; here they show."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if function is Tensor.tolist:
            return args[0].cpu().tolist() if isinstance(args[0], Remote) else args[0].tolist()
        return function(*args, **kwargs)


class Accelerator(TorchDispatchMode):
    """Counts ``calls`` and ``waits`` of DEVICE by operation, and ``host`` operations beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.host: Counter[str] = Counter()
        self._literals = _Literals()

    def __enter__(self) -> Accelerator:
        self._literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        remote = any(isinstance(x, Remote) for x in leaves)
        to = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if name == "_to_copy" and to is not None and (to == DEVICE) != remote:
            return self.moved(function, args, kwargs, to)
        if not remote and to != DEVICE:
            self.host[name] += 1
            return function(*args, **kwargs)
        lost = [x for x in leaves if not isinstance(x, Remote) and x.dim()]
        assert not lost, f"{name} mixes the accelerator with a tensor of the host"
        self.calls[name] += 1
        if _waits(name, args, kwargs):
            self.waits[name] += 1
        if to == DEVICE:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(Remote, lambda x: x.held, (args, kwargs))
        result = function(*args, **kwargs)
        return result if name in ("_local_scalar_dense", "equal") else tree_map_only(Tensor, Remote, result)

    def moved(self, function: Any, args: Any, kwargs: dict[str, Any], to: torch.device) -> Tensor:
        self.calls["_to_copy"] += 1
        kwargs["device"] = torch.device("cpu")
        if to == DEVICE:
            return Remote(function(*args, **kwargs))
        self.waits["_to_copy"] += 1
        host: Tensor = function(args[0].held, **kwargs)
        return host

    def remote(self, tensor: Tensor) -> Tensor:
        """The tensor with its values, on DEVICE."""
        return Remote(tensor)


def values(tensor: Tensor) -> Tensor:
    """What a tensor of DEVICE holds."""
    assert isinstance(tensor, Remote)
    return tensor.held


def _waits(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1])
    return name in _SIZED_BY_VALUES
