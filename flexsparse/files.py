"""Where flexsparse keeps what it makes, and files that other processes find whole or not at all."""

from __future__ import annotations

import os
import pathlib
import tempfile


def cache_home() -> pathlib.Path:
    """``FLEXSPARSE_CACHE_DIR``, or the user's cache."""
    return pathlib.Path(os.environ.get("FLEXSPARSE_CACHE_DIR") or pathlib.Path.home() / ".cache" / "flexsparse")


def write_whole(path: pathlib.Path, data: str | bytes) -> None:
    """Write beside the place and move there, so that nobody reads half a file. Raises OSError and leaves nothing."""
    raw = data.encode() if isinstance(data, str) else data
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=path.suffix, delete=False) as file:
        try:
            file.write(raw)
            file.close()
            # A temporary file is for its owner alone; this one has the rights that any new file gets.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(file.name, 0o666 & ~mask)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
