"""`outbox revision`."""

from __future__ import annotations

from pathlib import Path

import click

from outbox_cli.settings import Settings, json_option, print_json, with_settings


@click.command(epilog="Example: outbox revision --add-type customer --topic shop.customer")
@click.option(
    "--alembic-config", type=click.Path(path_type=Path), default=Path("alembic.ini"), show_default=True, metavar="FILE"
)
@click.option("--add-type", metavar="NAME", help="Register an entity type.")
@click.option("--topic", help="The topic of the entity type.")
@click.option("--capture", metavar="[SCHEMA.]TABLE", help="Publish a table by a trigger.")
@click.option("--type", "type_name", metavar="NAME", help="The type of --capture; default --add-type, or the table.")
@click.option("--key", multiple=True, metavar="COLUMN", help="The key's columns of --capture; default id.")
@click.option(
    "--no-existing-rows", is_flag=True, help="With --capture: do not write entries for the rows that are there."
)
@click.option("--head", default="head", metavar="REVISION", help="Which head to follow, where there are several.")
@click.option(
    "--version-path",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Which folder of versions to write into, where there are several.",
)
@json_option
@with_settings
def command(
    settings: Settings,
    alembic_config: Path,
    add_type: str | None,
    topic: str | None,
    capture: str | None,
    type_name: str | None,
    key: tuple[str, ...],
    no_existing_rows: bool,
    head: str,
    version_path: Path | None,
    as_json: bool,
) -> None:
    """Write a revision into the service's versions folder: create or upgrade the outbox, or register a type."""
    from outbox.revision import UpToDateError, write_revision

    if capture is None and (key or no_existing_rows):
        raise click.UsageError("--key and --no-existing-rows belong to --capture TABLE.")
    path: Path | None = None
    try:
        path = write_revision(
            alembic_config,
            name=settings.config.name,
            schema=settings.config.schema,
            add_type=add_type,
            topic=topic,
            capture=capture,
            type=type_name,
            key=key or ("id",),
            existing_rows=not no_existing_rows,
            head=head,
            version_path=version_path,
        )
    except UpToDateError as there:
        click.echo(f"{there.message} {there.cure}", err=True)
    if as_json:
        print_json({"path": path})
    elif path is not None:
        click.echo(f"Wrote {path}. Read it, then: alembic upgrade head.")
