"""`outbox prune`."""

from __future__ import annotations

from dataclasses import asdict

import click

from outbox_cli.settings import Settings, json_option, outbox_row, print_json, table, with_settings


@click.command(epilog="Example: outbox prune --dry-run")
@click.option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")
@json_option
@with_settings
def command(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Empty the ring slots that are older than the retention and published by every shard."""
    config = settings.needs_kafka()
    from outbox.kafka.shard_log import read_positions
    from outbox.position import Position
    from outbox.pruning import prune_ring

    with settings.connect() as connection:
        name, _ = outbox_row(connection, config.schema)
    positions = [Position.decode(value) for value in read_positions(config, name) if value is not None]
    results = list(prune_ring(config, positions, dry_run=dry_run))
    if as_json:
        print_json({"dry_run": dry_run, "slots": [asdict(result) for result in results]})
        return
    rows: list[tuple[object, ...]] = [
        (
            r.slot,
            ("would be pruned" if dry_run else "pruned") if r.pruned else "kept",
            r.entries if r.pruned else None,
            r.reason or "",
        )
        for r in results
    ]
    click.echo(table(("SLOT", "", "ENTRIES", "REASON"), rows))
