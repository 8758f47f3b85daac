"""The command line: the group `pipeline` and its commands, in the order of work.

A command parses, calls one function of the application and shows what comes back. It returns an exit code, or None for
0; failures are exceptions and end in `pipeline.terminal.application`. Each command loads its phase inside its body, so
that `pipeline --help` imports no model library.
"""

from __future__ import annotations

import click

from pipeline.commands import looking, models, phases, setup, stores
from pipeline.terminal.application import DISTRIBUTION, Application, common_options, distribution_version

COMMANDS: tuple[click.Command, ...] = (
    setup.init,
    setup.doctor,
    phases.plan,
    phases.extract,
    stores.status,
    stores.verify,
    stores.repair,
    stores.gc,
    stores.diff,
    stores.convert,
    looking.export,
    looking.inspect,
    phases.train,
    models.evaluate,
    models.generate,
    setup.schema,
    setup.demo,
)


@click.group(
    cls=Application,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option("--version", is_flag=True, help="Show the version.")
@common_options
@click.pass_context
def main(context: click.Context, version: bool) -> None:
    """Offline top-k logit distillation: read a teacher once, train any number of students from the store.

    \b
    pipeline init          writes configurations to start from
    pipeline extract       teacher over a corpus  ->  store
    pipeline train         store -> student
    """
    if version:
        click.echo(f"{DISTRIBUTION} {distribution_version()}")
    elif context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in COMMANDS:
    main.add_command(_command)
