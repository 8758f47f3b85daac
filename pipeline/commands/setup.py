"""The first five minutes: `pipeline init`, `doctor`, `schema` and `demo`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.options import json_option
from pipeline.terminal.application import Session, common_options
from pipeline.terminal.text import Styled, print_json, write

if TYPE_CHECKING:
    from pipeline.config.schema import Phase
    from pipeline.doctor import Check


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path())
@common_options
def init(directory: Path) -> None:
    """Write configurations to start from.

    They go into DIRECTORY (default: here) and overwrite nothing.
    """
    from pipeline.init import write_starter

    for path in write_starter(directory):
        write(f"wrote {path}")
    write(f"next: pipeline plan {directory / 'extract.yaml'}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path())
@json_option
@common_options
def doctor(path: Path, as_json: bool) -> int:
    """Examine this machine, and PATH as the place of a store."""
    from pipeline.doctor import examine, exit_code

    checks = show_checks(examine(path), as_json=as_json)
    return exit_code(checks)


@click.command()
@click.argument("phase", type=click.Choice(["extract", "train"]))
@common_options
def schema(phase: Phase) -> None:
    """Print the JSON Schema of a configuration."""
    from pipeline.config.schema import json_schema

    write(json_schema(phase).removesuffix("\n"), lines=True)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("demo"))
@click.option("--teacher", metavar="PATH", type=click.Path(path_type=Path), help="A model in place of the demo's own.")
@json_option
@common_options
@click.pass_obj
def demo(session: Session, directory: Path, teacher: Path | None, as_json: bool) -> None:
    """Do the whole job on a small real teacher, in minutes.

    Everything goes into DIRECTORY (default: demo). After an interruption the same command goes on.
    """
    from pipeline.demo.run import demo

    demo(directory, teacher=teacher, quiet=session.quiet, as_json=as_json)


_LEVEL_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def show_checks(checks: Iterable[Check], *, as_json: bool) -> list[Check]:
    """Write the checks of `doctor` as they come, and return them."""
    seen: list[Check] = []
    for check in checks:
        seen.append(check)
        if not as_json:
            level = Styled(text=f"{check.level:4}", fg=_LEVEL_COLORS[check.level], bold=check.level != "ok")
            write(level, f"  {check.topic:<11}  {check.found}")
            if check.fix is not None:
                write(f"{'':19}", Styled(text=check.fix, dim=True))
    if as_json:
        print_json(seen)
    return seen
