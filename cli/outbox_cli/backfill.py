"""`outbox backfill`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from outbox import backfill, follower, requests, status
from outbox.backfill import Progress
from outbox.config import Config
from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.errors import ConfigError, NoRelayError
from outbox.requests import Asked
from outbox.schema import quote
from outbox_cli.settings import (
    ENTITY_TYPE,
    Rate,
    Settings,
    fail,
    find_type,
    json_option,
    outbox_row,
    print_json,
    table,
    with_settings,
)
from outbox_cli.types import check_topic

if TYPE_CHECKING:
    from outbox.position import Position

_LOOK_SECONDS = 0.5


@click.group("backfill", epilog="Example: outbox backfill start customer --watch")
def command() -> None:
    """Publish the present state of what a type's source holds."""


@command.command(epilog="Example: outbox backfill start customer --where 'id < 1000' --rate 500 --watch")
@click.argument("type_name", metavar="TYPE", type=ENTITY_TYPE)
@click.option("--where", metavar="SQL", help="Only rows of the source for which this holds.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="Only this entity, or several: --key a --key b; gone ones get a tombstone.",
)
@click.option("--rate", type=Rate(0, min_open=True, max=1e9), help="Rows a second at the most.")
@click.option(
    "--to-topic",
    metavar="TOPIC",
    help="Fill another topic, which gets each change from now on, too: see outbox topics switch.",
)
@click.option("--source", metavar="SQL", help="With --to-topic: the query of what is published there.")
@click.option(
    "--app",
    metavar="MODULE:ATTRIBUTE",
    help="Write entries here, by the service's own code (an outbox.AppSource); again, it goes on where it was.",
)
@click.option("--dry-run", is_flag=True, help="Count what would be published, and ask for nothing.")
@click.option("--watch", is_flag=True, help="Show a bar until it is done. Exit 1 when rows were refused.")
@json_option
@with_settings
def start(
    settings: Settings,
    type_name: str,
    where: str | None,
    keys: tuple[str, ...],
    rate: float | None,
    to_topic: str | None,
    source: str | None,
    app: str | None,
    dry_run: bool,
    watch: bool,
    as_json: bool,
) -> None:
    """Ask the relay for a backfill; it publishes page by page, beside the live changes.

    It begins when a relay runs (outbox relay). Asked for and not watched, it exits with 0 at once.
    """
    _check_options(keys, where, rate, to_topic, source, app)
    if app is not None:
        from outbox_cli.app import run

        run(settings, type_name, app, rate=rate, dry_run=dry_run, as_json=as_json)
        return
    with settings.connect() as connection:
        config = settings.needs_kafka() if watch or to_topic is not None else settings.config
        name, shards = outbox_row(connection, config.schema)
        entity_type = followed = find_type(connection, config.schema, type_name)
        if to_topic is not None:
            entity_type = follower_of(connection, config.schema, followed, to_topic, source)
        keys = tuple(dict.fromkeys(keys))
        total = _counted(connection, entity_type, keys, where)
        if dry_run:
            if as_json:
                print_json({"request": None, "rows": total, "keys": len(keys) or None})
            else:
                gone = f", {len(keys) - total} tombstones" if keys else ""
                click.echo(f"{total:,} rows of {entity_type.name} would be published{gone}.")
            return
        if to_topic is not None:
            begin_to_follow(config, connection, name, shards, followed, entity_type)
        if keys:
            arguments = {"type": entity_type.name, "keys": list(keys), "total": len(keys)}
            number = requests.ask(connection, config.schema, "publish", arguments)
        else:
            # Each shard has its own relay, which knows nothing of the others.
            of_each = rate / shards if rate is not None else None
            number = backfill.start(
                connection, config.schema, entity_type, shards=shards, where=where, rate=of_each, total=total
            )
        if not watch:
            if not status.running(connection, name):
                click.echo(f"No relay of {name} runs: it begins when one does (outbox relay).", err=True)
            if as_json:
                print_json({"request": number, "rows": total})
            else:
                click.echo(f"request {number}: {total:,} rows. See: outbox backfill watch {number}")
            return
        _watch(config, connection, name, shards, number, as_json)


def _check_options(
    keys: tuple[str, ...],
    where: str | None,
    rate: float | None,
    to_topic: str | None,
    source: str | None,
    app: str | None,
) -> None:
    if app is not None and (keys or where is not None or to_topic is not None):
        raise click.UsageError("--app goes without --where, --key and --to-topic: its own select chooses.")
    if keys and (where is not None or rate is not None):
        raise click.UsageError("--key goes without --where and --rate.")
    if source is not None and to_topic is None:
        raise click.UsageError("--source goes with --to-topic; a type's own: outbox types change TYPE --source ...")


def follower_of(
    connection: Connection, schema: str, followed: EntityType, topic: str, source: str | None
) -> EntityType:
    """The follower that carries the type to this topic, as it is, or as it would be."""
    found = follower.of_topic(connection, schema, followed.name, topic)
    if found is None:
        check_topic(connection, quote(schema), topic, topic)
        return replace(
            followed,
            name=topic,
            topic=topic,
            source=source or followed.source,
            derived=followed.derived and source is None,
            follows=followed.name,
            reads_source=source is not None,
        )
    if source is not None and source != found.source:
        raise ConfigError(
            f"The topic {topic} follows {followed.name} already, with another source.",
            cure=f"Leave --source out; or change it first: outbox types change {found.name} --source ...",
        )
    return found


def _counted(connection: Connection, entity_type: EntityType, keys: tuple[str, ...], where: str | None) -> int:
    """How many rows there are to publish."""
    if keys:
        return backfill.named(connection, entity_type, keys)
    checked = backfill.check(connection, entity_type, where=where)
    if checked.slow is not None:
        click.echo(f"warning: this will be slow: {checked.slow}.", err=True)
    return checked.rows


def begin_to_follow(
    config: Config, connection: Connection, name: str, shards: int, followed: EntityType, new: EntityType
) -> None:
    """Have the new type follow, unless it does: its topic first, to which the relay publishes as soon as it is told."""
    from outbox import topics

    if follower.of_topic(connection, config.schema, followed.name, new.topic) is not None:
        return
    wanted = topics.specs(config, name=name, shards=shards, types=[new])
    differences = topics.differences(config, [spec for spec in wanted if spec.name == new.topic])
    done = topics.apply(config, differences)
    if left := [action for action in differences if action not in done]:
        raise ConfigError(
            f"The topic {new.topic} is not as it must be: {left[0].explanation}.", cure="Choose another, or mend it."
        )
    source = new.source if new.reads_source else None
    follower.follow(connection, config.schema, followed, new.topic, source=source, sourceless=new.source is None)
    click.echo(f"{new.topic} follows {followed.name} from now on.", err=True)


def _positions(config: Config, name: str) -> list[Position | None]:
    from outbox.kafka.shard_log import read_positions
    from outbox.position import Position

    return [Position.decode(value) if value is not None else None for value in read_positions(config, name)]


def _find(connection: Connection, config: Config, number: int) -> Asked:
    found = requests.backfills(connection, config.schema, number=number)
    if not found:
        raise ConfigError(f"There is no backfill with the number {number}.", cure="See them: outbox backfill list.")
    return found[0]


@command.command("list", epilog="Example: outbox backfill list --json")
@json_option
@with_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List the backfills that were asked for, and how far they are."""
    config = settings.needs_kafka()
    with settings.connect() as connection:
        name, shards = outbox_row(connection, config.schema)
        asked = requests.backfills(connection, config.schema)
    positions = _positions(config, name) if asked else []
    rows = [(one, backfill.progress(one, positions)) for one in asked]
    if as_json:
        print_json([_as_json(one, done, shards) for one, done in rows])
    elif rows:
        shown = [
            (
                one.id,
                one.arguments.get("type"),
                one.state(shards) if done.error is None else "failed",
                f"{done.rows:,}",
                "?" if one.arguments.get("total") is None else f"{one.arguments['total']:,}",
                done.refused,
                one.requested_at.isoformat(" ", "seconds"),
                done.error or "",
            )
            for one, done in rows
        ]
        click.echo(table(("REQUEST", "TYPE", "STATE", "ROWS", "OF", "REFUSED", "ASKED", ""), shown))
    else:
        click.echo("No backfill was asked for.")


def _as_json(asked: Asked, done: Progress, shards: int) -> dict[str, object]:
    return {
        "request": asked.id,
        "type": asked.arguments.get("type"),
        "state": asked.state(shards) if done.error is None else "failed",
        "rows": done.rows,
        "total": asked.arguments.get("total"),
        "refused": done.refused,
        "error": done.error,
        "requested_at": asked.requested_at.isoformat(timespec="seconds"),
    }


_NUMBER = click.argument("number", metavar="REQUEST", type=click.IntRange(1, 2**63 - 1))


def _change(settings: Settings, number: int, *, paused: bool | None) -> None:
    with settings.connect() as connection:
        config = settings.config
        _, shards = outbox_row(connection, config.schema)
        asked = _find(connection, config, number)
        if paused is None and asked.kind == "history":
            raise ConfigError(
                f"{number} publishes a history: ended half way, keys would have an older state as the last.",
                cure=f"Let it wait (outbox backfill pause {number}), or retire its topic (outbox topics retire).",
            )
        if asked.state(shards) in {"done", "cancelled"}:
            raise ConfigError(f"Backfill {number} is {asked.state(shards)}.", cure="See them: outbox backfill list.")
        requests.set_state(connection, config.schema, number, paused=paused)


@command.command(epilog="Example: outbox backfill pause 7")
@_NUMBER
@json_option
@with_settings
def pause(settings: Settings, number: int, as_json: bool) -> None:
    """Let a backfill wait; what it has published stays, and live changes flow on."""
    _change(settings, number, paused=True)
    _tell(number, "paused", f"Backfill {number} waits. Go on: outbox backfill resume {number}", as_json)


@command.command(epilog="Example: outbox backfill resume 7")
@_NUMBER
@json_option
@with_settings
def resume(settings: Settings, number: int, as_json: bool) -> None:
    """Let a backfill go on where it was."""
    _change(settings, number, paused=False)
    _tell(number, "running", f"Backfill {number} goes on. See: outbox backfill watch {number}", as_json)


@command.command(epilog="Example: outbox backfill cancel 7")
@_NUMBER
@json_option
@with_settings
def cancel(settings: Settings, number: int, as_json: bool) -> None:
    """End a backfill for good; what it has published stays."""
    _change(settings, number, paused=None)
    _tell(number, "cancelled", f"Backfill {number} is cancelled.", as_json)


def _tell(number: int, state: str, sentence: str, as_json: bool) -> None:
    if as_json:
        print_json({"request": number, "state": state})
    else:
        click.echo(sentence)


@command.command(epilog="Example: outbox backfill watch 7")
@_NUMBER
@json_option
@with_settings
def watch(settings: Settings, number: int, as_json: bool) -> None:
    """Show a bar until a backfill is done; Ctrl-C ends the watching alone. Exit 1 when rows were refused."""
    config = settings.needs_kafka()
    with settings.connect() as connection:
        name, shards = outbox_row(connection, config.schema)
        _find(connection, config, number)
        _watch(config, connection, name, shards, number, as_json)


def watched(
    config: Config,
    connection: Connection,
    name: str,
    shards: int,
    number: int,
    *,
    patience: float | None = None,
) -> Progress:
    """Show a bar until a request is done; how far it is then.

    Raises `NoRelayError` when nothing has happened for `patience` seconds (None: it waits for ever).
    """
    asked = _find(connection, config, number)
    total = asked.arguments.get("total")
    if not status.running(connection, name):
        click.echo(f"No relay of {name} runs: it begins when one does (outbox relay).", err=True)
    moved_at, seen = time.monotonic(), -1
    # On a terminal a bar; elsewhere, and for scripts, the end alone.
    with click.progressbar(
        length=total or 0, label=f"{asked.arguments['type']} (request {number})", show_pos=True, file=sys.stderr
    ) as bar:
        while True:
            asked = _find(connection, config, number)
            done = backfill.progress(asked, _positions(config, name))
            # Rows that were written since the count are no reason for a bar that is over too early.
            bar.length = max(total or 0, done.rows)
            bar.update(done.rows - bar.pos)
            # Not by the position: another may be asked for once the control table has been told.
            if asked.state(shards) not in {"running", "paused"}:
                return done
            if done.rows != seen:
                moved_at, seen = time.monotonic(), done.rows
            if patience is not None and time.monotonic() - moved_at > patience:
                raise NoRelayError(
                    f"Request {number} has published nothing for {patience:g} s.",
                    cure=f"It goes on when a relay does: outbox backfill watch {number}. See outbox status.",
                )
            time.sleep(_LOOK_SECONDS)


def _watch(config: Config, connection: Connection, name: str, shards: int, number: int, as_json: bool) -> None:
    done = watched(config, connection, name, shards, number)
    asked = _find(connection, config, number)
    if as_json:
        print_json(_as_json(asked, done, shards))
    elif done.error is not None:
        raise ConfigError(
            f"Backfill {number} ended after {done.rows:,} rows: {done.error}.",
            cure="Mend the source (outbox types change TYPE --source ...) and start it again.",
        )
    else:
        refused = f", {done.refused} refused (see: outbox dead-letters list)" if done.refused else ""
        click.echo(f"{asked.state(shards)}: {done.rows:,} rows{refused}")
    if done.refused or done.error is not None or asked.state(shards) == "cancelled":
        fail(1)
