"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

config_argument = click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
store_argument = click.argument("store", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a configuration value: target.k=64."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do not do it.")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
