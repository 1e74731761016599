"""``flexsparse doctor``: what this machine has, what will be fast on it, and how to mend what will not."""

from __future__ import annotations

import click

from flexsparse.cli import options as shared


@click.command("doctor", short_help="Say what will be fast on this machine, and mend the rest.")
@shared.json_option
def command(as_json: bool) -> None:
    """Show versions, GPUs and the cache, and for each thing that flexsparse can do whether it will here, and why.

    Nothing is compiled and no tensor is made.

    \b
    Examples:
      flexsparse doctor
      flexsparse doctor --json
    """
    from dataclasses import asdict

    from flexsparse.cli import render
    from flexsparse.doctor import examine

    with render.working("Looking at this machine"):
        found = examine()
    if as_json:
        shared.print_json(asdict(found))
        return
    console = render.stdout()
    gpus = ", ".join(found.gpus) or "none"
    cache = f"{found.cache}: {found.cache_files:,} kernel modules, {found.cache_bytes:,} bytes"
    console.print(render.facts(*found.versions.items(), ("GPU", gpus), ("cache", cache)))
    for finding in found.findings:
        console.print(render.heading(f"{'yes' if finding.verdict.holds else 'no '}  {finding.name}"))
        rows = [("why", finding.verdict.reason), *[("mend", finding.mend)] * bool(finding.mend)]
        console.print(render.facts(*rows))
