"""``flexsparse cache``: the kernels that were generated so far."""

from __future__ import annotations

import click

from flexsparse.cli import options as shared
from flexsparse.cli.group import CommandGroup


@click.group("cache", cls=CommandGroup, short_help="Clear the kernels that were generated so far.")
def command() -> None:
    """Kernels that were generated so far, in FLEXSPARSE_CACHE_DIR or ~/.cache/flexsparse.

    What a pattern needs is generated again at its next call.

    \b
    Examples:
      flexsparse cache clear
    """


@command.command("clear")
@shared.json_option
def clear(as_json: bool) -> None:
    """Remove them. Other files in the folder stay, and so do the caches of Triton and of torch.

    \b
    Examples:
      flexsparse cache clear
      flexsparse cache clear --json
    """
    from flexsparse.codegen.gathered import cache_folder, cached_files
    from flexsparse.errors import SettingError

    files = cached_files()
    removed, size = 0, 0
    for path in files:
        try:
            bytes_of_it = path.stat().st_size
            path.unlink()
            removed, size = removed + 1, size + bytes_of_it
        except FileNotFoundError:
            # Another process clears as well.
            continue
        except OSError as error:
            raise SettingError("cache", got=f"{path}: {error.strerror}", expected="files that may be removed") from None
    if as_json:
        shared.print_json({"folder": str(cache_folder()), "files": removed, "bytes": size})
    else:
        click.echo(f"kernel modules removed: {removed:,}, of {size:,} bytes, from {cache_folder()}")
