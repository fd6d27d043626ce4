"""`outbox replay`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import datetime
from typing import Any

import click

from outbox import replay, requests
from outbox.database import Connection
from outbox_cli.settings import (
    ENTITY_TYPE,
    Seconds,
    Settings,
    find_type,
    json_option,
    outbox_row,
    print_json,
    with_settings,
)


class _Ids(click.ParamType[tuple[int | None, int | None]]):
    """`FROM:TO`, either of which may be missing."""

    name = "ids"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, int | None]:
        """The two ids."""
        first, colon, last = str(value).partition(":")
        if not colon or not all(part == "" or part.isdigit() for part in (first, last)) or not (first or last):
            self.fail(f"{value} is no range of ids; write 100:200, 100: or :200.", param, ctx)
        return (int(first) if first else None), (int(last) if last else None)


class _Time(click.ParamType[datetime]):
    """A time in ISO 8601; without a zone it is the machine's."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The time, with its zone."""
        try:
            return datetime.fromisoformat(str(value)).astimezone()
        except ValueError:
            self.fail(f"{value} is no time; write 2026-01-31T12:00:00+00:00.", param, ctx)


@click.command(epilog="Example: outbox replay --type customer --since 2026-01-31T12:00")
@click.option("--type", "type_name", type=ENTITY_TYPE, required=True, metavar="TYPE", help="Of this entity type.")
@click.option("--key", "keys", multiple=True, metavar="KEY", help="Only these entities.")
@click.option("--since", type=_Time(), metavar="TIME", help="Entries from this time on (ISO 8601).")
@click.option("--until", type=_Time(), metavar="TIME", help="Entries up to this time.")
@click.option("--id", "ids", type=_Ids(), metavar="FROM:TO", help="Entries of these ids.")
@click.option("--dry-run", is_flag=True, help="Count what would be published, and ask for nothing.")
@click.option(
    "--timeout",
    type=Seconds(0, 86_400),
    default=60.0,
    show_default=True,
    help="Seconds to wait for the relay, for each request of some thousand keys.",
)
@json_option
@with_settings
def command(
    settings: Settings,
    type_name: str,
    keys: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    ids: tuple[int | None, int | None] | None,
    dry_run: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Publish the chosen keys again, as they are now; the relay does it, and never puts an older state over a newer.

    From the type's source or, without one, each key's last retained entry.
    """
    first, last = ids or (None, None)
    selected = replay.Selected(type_name, keys or None, since, until, first, last)
    by_key = bool(keys) and not (since or until or ids)
    done: Counter[str] = Counter()
    gone: list[str] = []
    wanted = set(keys)
    with settings.connect() as connection:
        schema = settings.config.schema
        _, shards = outbox_row(connection, schema)
        entity_type = find_type(connection, schema, type_name)
        by_key = by_key and entity_type.source is not None
        retained = replay.count(connection, schema, selected)
        if first is not None and first <= retained.removed_id:
            click.echo(f"Entries up to {retained.removed_id} are not retained any more.", err=True)
        total = len(set(keys)) if by_key else retained.keys
        if dry_run:
            _tell({"entries": retained.entries, "keys": total}, gone, as_json)
            return
        with ExitStack() as stack:
            asked: Iterable[dict[str, Any]]
            if by_key:
                # Published whether or not an entry of them is retained.
                asked = [{"type": type_name, "keys": list(dict.fromkeys(keys))}]
            else:
                chosen = stack.enter_context(replay.keys(connection, schema, selected))
                asked = replay.requests(entity_type, selected, chosen)
            bar = stack.enter_context(click.progressbar(length=total, label=type_name, show_pos=True, file=sys.stderr))
            for arguments in asked:
                counts, missing = _ask(connection, schema, arguments, shards, timeout)
                done.update(counts)
                gone += missing
                wanted -= set(arguments["keys"])
                bar.update(len(arguments["keys"]))
    # Keys that were named, and that no retained entry has.
    _tell({"entries": retained.entries, **done}, [*gone, *sorted(wanted)], as_json)


def _ask(
    connection: Connection, schema: str, arguments: Mapping[str, Any], shards: int, timeout: float
) -> tuple[Counter[str], list[str]]:
    """Have one request done: counts, and the keys of which nothing is retained."""
    counts: Counter[str] = Counter()
    gone: list[str] = []
    for outcome in requests.publish(connection, schema, arguments, shards, seconds=timeout):
        gone += [key for _, key in outcome["gone"]]
        counts.update({word: outcome[word] for word in ("rows", "refused", "tombstones")})
    return counts, gone


def _tell(counts: Mapping[str, int], gone: list[str], as_json: bool) -> None:
    if as_json:
        print_json({**counts, "not_retained": gone})
        return
    click.echo(", ".join(f"{word}: {count:,}" for word, count in counts.items()))
    for key in gone:
        click.echo(f"no longer retained: {key}; have the service write it again", err=True)
