"""The click group behind `pipeline`: signals, errors and exit codes, in one place for all commands."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

import click

from pipeline.launchers import tell_launcher
from pipeline.runtime import (
    is_main_process,
    message_text,
    prepare_libraries,
    termination_as_interrupt,
    warnings_in_one_line,
)
from pipeline.terminal.errors import Failure, failure_of
from pipeline.terminal.text import Styled, write
from storage.errors import StoppedError

DISTRIBUTION = "topk-distill"
RESUMABLE_COMMANDS = frozenset({"extract", "train", "convert", "demo"})

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(kw_only=True)
class Session:
    """What one invocation was asked for apart from its work. Filled in while options are parsed."""

    debug: bool = False
    quiet: bool = False
    as_json: bool = False
    command: str | None = None


class Application(click.Group):
    """A group whose commands return an exit code or nothing, and whose every failure is told in three lines."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line and leave with its exit code. The parameters are those of `click.Group.main`."""
        extra["standalone_mode"] = False
        arguments = args[0] if args else extra.get("args")
        session = Session(as_json="--json" in (sys.argv[1:] if arguments is None else arguments))
        try:
            with termination_as_interrupt(), warnings_in_one_line():
                prepare_libraries()
                code = super().main(*args, obj=session, **extra)
        except BaseException as error:  # the one place where every failure ends
            code = _report(error, session)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. A reader of our output that has seen enough, such as `head`, does not make it fail."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of work, which is the order they are defined in."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Remember which command runs, for messages about it."""
        name, command, rest = super().resolve_command(ctx, args)
        ctx.ensure_object(Session).command = name
        return name, command, rest


def distribution_version() -> str:
    """Return the installed version, or a note that it is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed, running from a source tree)"


def _report(error: BaseException, session: Session) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if session.debug:
        write("".join(traceback.format_exception(error)), err=True, lines=True)
    command = f"pipeline {session.command}" if session.command else "pipeline"
    failure = failure_of(error, command=command, resumable=session.command in RESUMABLE_COMMANDS)
    with suppress(OSError):  # whoever would read it is gone; the exit code stays
        _tell(error, failure, session)
    return failure.exit_code


def _tell(error: BaseException, failure: Failure, session: Session) -> None:
    """Write a failure on stderr for people, and with --json on stdout too, where nothing else is than JSON."""
    tell_launcher(failure.lines())
    if isinstance(error, StoppedError) and not is_main_process():
        return  # all processes of a run stop alike: one of them says so
    for line in failure.lines():
        label, _, text = line.partition(": ")
        write(Styled(text=label, fg="red", bold=True), f": {message_text(text)}", err=True, lines=True)
    if session.as_json:
        told = {"error": failure.what, "where": failure.where, "fix": failure.fix, "exit_code": failure.exit_code}
        write(json.dumps({"event": "Failed", **told}))


def _remember(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            setattr(context.ensure_object(Session), name, True)

    return callback


def common_options(command: Command) -> Command:
    """Add the options that every command has: --debug and --quiet."""
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_remember("debug"), help="Show tracebacks of errors."
    )
    quiet = click.option(
        "--quiet", is_flag=True, expose_value=False, callback=_remember("quiet"), help="No progress, only the result."
    )
    return debug(quiet(command))
