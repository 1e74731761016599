"""Scores of selections from files, for ``flexsparse show --scores``."""

from __future__ import annotations

import pathlib
import pickle
import zipfile
from collections.abc import Sequence

import torch
from torch import Tensor

from flexsparse.errors import SettingError, did_you_mean
from flexsparse.ir.program import Program


def given_scores(files: Sequence[str], program: Program, length: int | None) -> dict[str, Tensor]:
    """Scores [1, H, S] by the name under which the pattern takes them, from "FILE" or "NAME=FILE" each.

    A file holds [S], [H, S] or [1, H, S]. Raises SettingError for a pattern without scores, an unknown name, a file
    that cannot be read, another shape, and lengths that differ from each other or from ``length``.
    """
    names = list(dict.fromkeys(selection.scores for selection in program.selections))
    found: dict[str, Tensor] = {}
    for given in files:
        name, _, path = given.partition("=") if "=" in given else ("", "", given)
        if not names:
            raise SettingError("--scores", got=repr(given), expected="a pattern that selects keys by scores")
        if not name and len(names) > 1:
            expected = f"NAME=FILE, as the pattern takes {', '.join(names)}"
            raise SettingError("--scores", got=repr(given), expected=expected, mend=f"Write {names[0]}={path}.")
        if name and name not in names:
            mend = did_you_mean(name, names)
            raise SettingError("--scores", got=repr(name), expected="the name of scores of the pattern", mend=mend)
        found[name or names[0]] = _read(path)
    lengths = {scores.shape[-1] for scores in found.values()} | ({length} if found and length else set())
    if len(lengths) > 1:
        said = " and ".join(str(n) for n in sorted(lengths))
        raise SettingError("--scores", got=f"lengths of {said}", expected="one length, that of --length where given")
    return found


def _read(path: str) -> Tensor:
    expected = "a .pt file with a tensor or a .npy file with an array"
    try:
        if pathlib.Path(path).suffix == ".npy":
            import numpy

            loaded = torch.from_numpy(numpy.load(path, allow_pickle=False))
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SettingError("--scores", got=f"{path!r}: {error.strerror}", expected=expected) from None
    except (ValueError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise SettingError("--scores", got=f"{path!r}, which cannot be read", expected=expected) from None
    if not isinstance(loaded, Tensor):
        raise SettingError("--scores", got=f"{path!r} with a {type(loaded).__name__}", expected=expected)
    if not loaded.is_floating_point():
        raise SettingError("--scores", got=f"{path!r} of {loaded.dtype}", expected="floating-point scores")
    if not 1 <= loaded.dim() <= 3 or (loaded.dim() == 3 and loaded.shape[0] != 1) or not loaded.numel():
        got = f"{path!r} of shape {tuple(loaded.shape)}"
        raise SettingError("--scores", got=got, expected="[S], [H, S] or [1, H, S]", mend="Take one row of the batch.")
    return loaded.detach().reshape(1, -1, loaded.shape[-1])
