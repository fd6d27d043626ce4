"""`outbox backfill start TYPE --app MODULE:ATTRIBUTE`: in the service's environment, by its own code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

from outbox import requests
from outbox.app_source import EXAMPLE, AppSource, Chunk
from outbox.app_source import run as chunks
from outbox.database import Connection
from outbox.errors import ConfigError
from outbox.pace import Pace
from outbox.requests import Asked
from outbox_cli.loading import load_attribute
from outbox_cli.settings import Settings, fail, find_type, outbox_row, print_json, printable

# How long the rows of a chunk are locked, about.
_CHUNK_SECONDS = 0.1
_MOST_ROWS = 10_000


def load(name: str) -> AppSource:
    """What MODULE:ATTRIBUTE names."""
    found = load_attribute(name, what=f"{name.partition(':')[2]} = {EXAMPLE}", example="--app shop.outbox:customers")
    if not isinstance(found, AppSource):
        raise ConfigError(
            f"{name} is a {found.__class__.__name__}, no outbox.AppSource.",
            cure=f"Define it: {name.partition(':')[2]} = {EXAMPLE}.",
        )
    return found


def run(settings: Settings, type_name: str, name: str, *, rate: float | None, dry_run: bool, as_json: bool) -> None:
    """Write an entry for each row, chunk by chunk, and show a bar. Exit 1 when rows were refused."""
    source = load(name)
    with settings.connect() as connection:
        schema = settings.config.schema
        _, shards = outbox_row(connection, schema)
        entity_type = find_type(connection, schema, type_name)
        if source.type != type_name:
            raise ConfigError(f"{name} is of the type {source.type}, not {type_name}.", cure="Name that type.")
        if entity_type.reads_source or entity_type.follows:
            raise ConfigError(
                f"What is written of {type_name} is not what is published: its source is read.",
                cure=f"Have the relay do it: outbox backfill start {type_name}.",
            )
        with source.sessions() as session:
            total: int = session.execute(source.count()).scalar_one()
        if dry_run:
            if as_json:
                print_json({"request": None, "rows": total, "keys": None})
            else:
                click.echo(f"{total:,} rows of {type_name} would be written.")
            return
        going_on = _unfinished(connection, schema, type_name, name, shards)
        if going_on is not None:
            number, total = going_on.id, going_on.arguments.get("total", total)
            click.echo(f"Going on with request {number}.", err=True)
        else:
            arguments = {"type": type_name, "app": name, "total": total}
            number = requests.ask_backfill(connection, schema, arguments, shards=shards, kind="app")
    _write(source, number, schema, total, rate=rate, as_json=as_json)


def _unfinished(connection: Connection, schema: str, type_name: str, name: str, shards: int) -> Asked | None:
    """The backfill that an earlier run did not end; one that was paused goes on now."""
    for one in requests.find(connection, schema, kinds=("app",)):
        if one.arguments.get("type") == type_name and one.state(shards) in {"running", "paused"}:
            if one.arguments.get("app") != name:
                raise ConfigError(
                    f"Request {one.id} of {type_name} goes on, by {one.arguments.get('app')}, not by {name}.",
                    cure=f"End it first: --app {one.arguments.get('app')}, or outbox backfill cancel {one.id}.",
                )
            requests.set_state(connection, schema, one.id, paused=False)
            return one
    return None


def _write(source: AppSource, number: int, schema: str, total: int, *, rate: float | None, as_json: bool) -> None:
    done = Chunk()
    rows = _paced(rate)
    with click.progressbar(
        length=total, label=f"{source.type} (request {number})", show_pos=True, file=sys.stderr
    ) as bar:
        for done in chunks(source, number, schema=schema, rows=rows):
            bar.length = max(total, done.rows)
            bar.update(done.rows - bar.pos)
    state = "done" if done.done else done.state
    if as_json:
        examples = [{"key": key, "reason": reason} for key, reason in done.examples]
        print_json(
            {"request": number, "state": state, "rows": done.rows, "refused": done.refused, "examples": examples}
        )
    else:
        click.echo(f"{state}: {done.rows:,} rows, {done.refused:,} refused")
        for key, reason in done.examples:
            click.echo(f"refused: {printable(key)}: {printable(reason)}", err=True)
    if done.refused or not done.done:
        fail(1)


def _paced(rate: float | None) -> Callable[[], int]:
    """How many rows the next chunk may have, by what the last one took; with a rate it waits until they are due."""
    pace = Pace(busy=_CHUNK_SECONDS, quiet=_CHUNK_SECONDS, most=_MOST_ROWS)
    given = 0
    asked_at = time.monotonic()

    def rows() -> int:
        nonlocal given, asked_at
        now = time.monotonic()
        if given:
            pace.took(0, given, now - asked_at, rate, now, asked=given)
        while not (given := pace.rows(0, rate, time.monotonic())):
            time.sleep(pace.due(time.monotonic()) or 0)
        asked_at = time.monotonic()
        return given

    return rows
