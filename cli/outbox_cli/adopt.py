"""`outbox adopt`."""

from __future__ import annotations

import click

from outbox_cli.settings import Settings, confirm, json_option, outbox_row, print_json, with_settings


@click.command(epilog="Example: outbox adopt --yes --json")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@with_settings
def command(settings: Settings, yes: bool, as_json: bool) -> None:
    """Make the retained log new: every entry gets a new id and is published again.

    For a copy (dump and load) that takes over, a restored database, or a relay that stopped at a lost tail. Writers
    wait meanwhile. Duplicates of states, never a loss of what the database holds; compare topics and tables
    afterwards.
    """
    config = settings.needs_kafka()
    settings.needs_database()
    from outbox import adopt
    from outbox.logs import configure

    configure(config)  # says what adoption waits for
    with settings.connect() as connection:
        name, _ = outbox_row(connection, config.schema)
        prospect = adopt.look(config, connection, name)
        if not as_json:
            click.echo(
                f'The outbox "{name}", epoch {prospect.epoch}: {prospect.entries} retained entries will be published '
                f"again under ids above {prospect.floor}; {prospect.left_out} that pruning went past are left out."
            )
        confirm("Adopt this database?", yes=yes)
    epoch = adopt.adopt(config, prospect)
    if as_json:
        print_json({"epoch": epoch, "entries": prospect.entries, "left_out": prospect.left_out})
    else:
        click.echo(f"Adopted: epoch {epoch}. Start the relay, then compare the topics with the tables.")
