"""`outbox migrate`."""

from __future__ import annotations

import click

from outbox_cli.settings import Settings, confirm, json_option, print_json, with_settings


@click.command(epilog="Example: outbox migrate --name shop --writer shop_app --relay shop_relay")
@click.option("--shards", type=click.IntRange(1, 1024), default=1, show_default=True, help="Shares of the keys; fixed.")
@click.option("--retention", default="7 days", show_default=True, help="How long published entries are kept.")
@click.option("--slots", type=click.IntRange(3, 1000), default=12, show_default=True, help="Slots of the ring; fixed.")
@click.option("--no-doorbell", is_flag=True, help="For writers that use two-phase commit: the relay only polls.")
@click.option("--writer", "writers", multiple=True, metavar="ROLE", help="A role that may write entries.")
@click.option("--relay", metavar="ROLE", help="The role of the relay.")
@click.option("--remove", is_flag=True, help="Remove the outbox with all its entries.")
@click.option("--yes", is_flag=True, help="Do not ask (with --remove).")
@click.option("--sql", "as_sql", is_flag=True, help="Print the statements instead of running them.")
@json_option
@with_settings
def command(
    settings: Settings,
    shards: int,
    retention: str,
    slots: int,
    no_doorbell: bool,
    writers: tuple[str, ...],
    relay: str | None,
    remove: bool,
    yes: bool,
    as_sql: bool,
    as_json: bool,
) -> None:
    """Make or upgrade the outbox in a database whose service has no Alembic.

    The name, the shards and the slots are fixed here for the life of the outbox. A service with Alembic uses
    `outbox revision` instead.
    """
    from outbox.revision import migrate, migration_script
    from outbox.schema import Settings as Fixed

    config = settings.config
    Fixed(config.name, config.schema, shards, retention, slots, not no_doorbell)
    if as_sql and remove:
        raise click.UsageError("--sql prints how to make it; --remove runs by itself, or: alembic downgrade.")
    if as_sql:
        click.echo(
            migration_script(
                name=config.name,
                schema=config.schema,
                shards=shards,
                retention=retention,
                slots=slots,
                doorbell=not no_doorbell,
                writers=writers,
                relay=relay,
            )
        )
        return
    settings.needs_database()
    if remove:
        confirm(f"Remove the outbox in schema {config.schema} with all its entries?", yes=yes)
    done = migrate(
        config.database_url,
        name=config.name,
        schema=config.schema,
        shards=shards,
        retention=retention,
        slots=slots,
        doorbell=not no_doorbell,
        writers=writers,
        relay=relay,
        to="base" if remove else "head",
        connect_timeout=config.connect_timeout,
    )
    if as_json:
        print_json({"before": done.before, "after": done.after, "name": done.name})
    elif done.after is None:
        click.echo("The outbox is removed; its topics are left as they are.")
    elif done.before == done.after:
        _say_fixed(settings, {"shards": shards, "slots": slots, "retention": retention})
        click.echo(f'The outbox "{done.name}" is up to date (version {done.after}).')
    elif done.before is None:
        click.echo(
            f'Created the outbox "{done.name}" (version {done.after}). Next: outbox types add NAME --topic TOPIC.'
        )
    else:
        click.echo(f'Upgraded the outbox "{done.name}" from version {done.before} to {done.after}.')


def _say_fixed(settings: Settings, asked: dict[str, object]) -> None:
    """Say which of the settings that were asked for an outbox has otherwise, and keeps."""
    from click.core import ParameterSource

    from outbox.schema import Settings as Fixed
    from outbox.schema import quote

    context = click.get_current_context()
    given = {name for name in asked if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if not given:
        return
    with settings.connect() as connection:
        row = connection.execute(
            "SELECT shards::int, slots::int, extract(epoch FROM retention)::int "
            f"FROM {quote(settings.config.schema)}.settings".encode()
        ).fetchone()
    has = dict(zip(("shards", "slots", "retention"), row or (), strict=True))
    wanted = asked | {"retention": Fixed(None, retention=str(asked["retention"])).retention_seconds}
    for name in sorted(given):
        if has[name] != wanted[name]:
            seconds = " seconds" if name == "retention" else ""
            click.echo(f"warning: the outbox has {name} {has[name]}{seconds}; that is fixed and stays so.", err=True)
