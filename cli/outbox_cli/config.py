"""`outbox config`."""

from __future__ import annotations

import click

from outbox.config import SETTINGS, masked, unknown_variables
from outbox_cli.settings import Settings, json_option, print_json, table, with_settings


@click.command("config", epilog="Example: outbox config --json")
@json_option
@with_settings
def command(settings: Settings, as_json: bool) -> None:
    """Show the settings in force and where each comes from; secrets are masked."""
    resolved = settings.resolved
    rows: list[tuple[str, object, str]] = []
    for setting in SETTINGS:
        value = getattr(resolved.config, setting.name)
        if setting.name == "kafka":
            from outbox.kafka.settings import is_secret

            value = {name: "***" if is_secret(name) else text for name, text in value.items()}
        rows.append((setting.name, masked(setting.name, value), resolved.sources[setting.name]))
    if as_json:
        print_json({name: {"value": value, "source": source} for name, value, source in rows})
    else:
        shown = [(name, "" if value is None else str(value), source) for name, value, source in rows]
        click.echo(table(("SETTING", "VALUE", "FROM"), [*shown]))
    for variable, near in unknown_variables(settings.environment).items():
        meant = f" Did you mean {near}?" if near else ""
        click.echo(f"warning: {variable} is set, but is no setting.{meant}", err=True)
