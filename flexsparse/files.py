"""Where flexsparse keeps what it makes, and files that other processes find whole or not at all."""

from __future__ import annotations

import os
import pathlib
import tempfile


def cache_home() -> pathlib.Path:
    """``FLEXSPARSE_CACHE_DIR``, or the user's cache."""
    return pathlib.Path(os.environ.get("FLEXSPARSE_CACHE_DIR") or pathlib.Path.home() / ".cache" / "flexsparse")


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Write beside the place and move there, so that nobody reads half a file. Raises OSError and leaves nothing.

    Text is written as UTF-8.
    """
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=path.suffix, delete=False) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.close()
            # A temporary file is for its owner alone; this one has the rights that any new file gets.
            rights = os.umask(0)
            os.umask(rights)
            os.chmod(file.name, 0o666 & ~rights)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
