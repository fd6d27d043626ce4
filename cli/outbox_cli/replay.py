"""`outbox replay`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import datetime
from typing import Any

import click

from outbox import follower, replay, requests
from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.errors import ConfigError
from outbox_cli.backfill import begin_to_follow, follower_of, watched
from outbox_cli.settings import (
    ENTITY_TYPE,
    Seconds,
    Settings,
    fail,
    find_type,
    json_option,
    outbox_row,
    print_json,
    printable,
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
        if first and last and int(first) > int(last):
            self.fail(f"{value} ends before it begins.", param, ctx)
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
@click.option("--to-topic", metavar="TOPIC", help="Into a topic that follows the type: see outbox backfill start.")
@click.option(
    "--history",
    is_flag=True,
    help="Every entry in order, up to the newest: of a type without collapse, or into another topic.",
)
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
    to_topic: str | None,
    history: bool,
    dry_run: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Publish the chosen keys again, as they are now; the relay does it, and never puts an older state over a newer.

    From the type's source or, without one, each key's last retained entry. A time without a zone is this machine's.
    Exit 1 when rows were refused.
    """
    if since is not None and until is not None and since > until:
        raise click.UsageError("--since is later than --until.")
    first, last = ids or (None, None)
    selected = replay.Selected(type_name, keys or None, since, until, first, last)
    by_key = bool(keys) and not (since or until or ids)
    done: Counter[str] = Counter()
    gone: list[str] = []
    wanted = set(keys)
    with settings.connect() as connection:
        schema = settings.config.schema
        _, shards = outbox_row(connection, schema)
        entity_type = target = find_type(connection, schema, type_name)
        if entity_type.follows is not None:
            raise ConfigError(
                f"{type_name} has no entries of its own: it follows {entity_type.follows}.",
                cure=f"outbox replay --type {entity_type.follows} --to-topic {entity_type.topic} ...",
            )
        if history:
            _check_history(entity_type, to_topic, until, last)
        elif to_topic is not None:
            target = _followed_by(connection, schema, type_name, to_topic)
        by_key = by_key and target.source is not None
        retained = replay.count(connection, schema, selected)
        if first is not None and first <= retained.removed_id:
            click.echo(f"Entries up to {retained.removed_id} are not retained any more.", err=True)
        total = len(set(keys)) if by_key else retained.keys
        if dry_run:
            if not by_key and wanted:
                with replay.keys(connection, schema, selected) as chosen:
                    gone = sorted(wanted - {key for key, _ in chosen})
            _tell({"entries": retained.entries, "keys": total}, gone, as_json)
            return
        if history:
            done.update(_history(settings, connection, entity_type, to_topic, selected, timeout))
            _tell({"entries": retained.entries, **done}, gone, as_json)
            _end(type_name, done)
            return
        with ExitStack() as stack:
            asked: Iterable[dict[str, Any]]
            if by_key:
                # Published whether or not an entry of them is retained.
                asked = [{"type": target.name, "keys": list(dict.fromkeys(keys))}]
            else:
                chosen = stack.enter_context(replay.keys(connection, schema, selected))
                asked = replay.requests(target, chosen)
            bar = stack.enter_context(click.progressbar(length=total, label=type_name, show_pos=True, file=sys.stderr))
            for arguments in asked:
                counts, missing = _ask(connection, schema, arguments, shards, timeout)
                done.update(counts)
                gone += missing
                wanted -= set(arguments["keys"])
                bar.update(len(arguments["keys"]))
    # Keys that were named, and that no retained entry has.
    _tell({"entries": retained.entries, **done}, [*gone, *sorted(wanted)], as_json)
    _end(type_name, done)


def _end(type_name: str, done: Mapping[str, int]) -> None:
    """End with exit code 1 when rows were refused."""
    if done.get("refused"):
        click.echo(f"See which and why: outbox dead-letters list --type {type_name}", err=True)
        fail(1)


def _check_history(entity_type: EntityType, to_topic: str | None, until: datetime | None, last: int | None) -> None:
    if to_topic is None and entity_type.collapse:
        raise click.UsageError(
            f"{entity_type.name} collapses: its consumers want the last state of a key. --history is for a type "
            "without collapse, or --to-topic another topic."
        )
    if until is not None or last is not None:
        raise click.UsageError(
            "--history goes up to the newest entry, so that no older state is the last of a key: leave --until and the "
            "end of --id out."
        )


def _followed_by(connection: Connection, schema: str, type_name: str, topic: str) -> EntityType:
    found = follower.of_topic(connection, schema, type_name, topic)
    if found is None:
        raise ConfigError(
            f"The topic {topic} does not follow {type_name}.",
            cure=f"Have it follow: outbox backfill start {type_name} --to-topic {topic}.",
        )
    return found


def _history(
    settings: Settings,
    connection: Connection,
    entity_type: EntityType,
    to_topic: str | None,
    selected: replay.Selected,
    timeout: float,
) -> Mapping[str, int]:
    """Have every chosen entry published in order; counts of what each shard did."""
    config = settings.needs_kafka()
    name, shards = outbox_row(connection, config.schema)
    target = entity_type
    if to_topic is not None:
        target = follower_of(connection, config.schema, entity_type, to_topic, None)
    if target.reads_source:
        raise ConfigError(
            f"The topic {target.topic} gets what its source says, which knows no history.",
            cure="Replay without --history, or see outbox backfill start.",
        )
    if to_topic is not None:
        begin_to_follow(config, connection, name, shards, entity_type, target)
    arguments = {
        "type": target.name,
        "of": target.written_as,
        "keys": list(selected.keys) if selected.keys is not None else None,
        # By id from there on: times need not follow ids, and a later entry must not be left out behind an earlier one.
        "first_id": replay.first_id(connection, config.schema, selected),
    }
    number = requests.ask_backfill(connection, config.schema, arguments, shards=shards, kind="history")
    done = watched(config, connection, name, shards, number, patience=timeout)
    if done.error is not None:
        raise ConfigError(f"Request {number} could not be done: {done.error}.", cure="See outbox topics plan.")
    return {"rows": done.rows, "refused": done.refused}


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
        click.echo(f"no entry of it is retained: {printable(key)}; have the service write it again", err=True)
