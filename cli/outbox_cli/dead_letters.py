"""`outbox dead-letters`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

import click

from outbox.config import Config
from outbox.database import Connection
from outbox.entity_types import read_types
from outbox.errors import UnknownTypeError
from outbox_cli.settings import (
    ENTITY_TYPE,
    Seconds,
    Settings,
    confirm,
    json_option,
    outbox_row,
    print_json,
    table,
    with_settings,
)


@click.group("dead-letters", epilog="Example: outbox dead-letters list")
def command() -> None:
    """List, retry or drop what could not be published."""


@command.command("list", epilog="Example: outbox dead-letters list --type customer --json")
@click.option("--type", "type_name", type=ENTITY_TYPE, metavar="TYPE", help="Only of this entity type.")
@json_option
@with_settings
def list_(settings: Settings, type_name: str | None, as_json: bool) -> None:
    """List the dead letters: entity, entry, reason."""
    config = settings.needs_kafka()
    from outbox.kafka.shard_log import read_dead_letters

    with settings.connect() as connection:
        name, _ = outbox_row(connection, config.schema)
        _check_type(connection, config, name, type_name)
    letters = [(x, n) for x, n in read_dead_letters(config, name) if type_name is None or x.type == type_name]
    if as_json:
        print_json(
            [
                {
                    "type": x.type,
                    "key": x.key,
                    "id": x.id,
                    "shard": n,
                    "topic": x.topic,
                    "reason": x.reason,
                    "message": x.message,
                    "created_ms": x.created_ms,
                    "at_ms": x.at_ms,
                }
                for x, n in letters
            ]
        )
    elif letters:
        rows = [
            (
                x.type,
                x.key,
                x.id,
                datetime.fromtimestamp(x.at_ms / 1000, UTC).isoformat(" ", "seconds"),
                x.reason,
                x.message,
            )
            for x, _ in letters
        ]
        click.echo(table(("TYPE", "KEY", "ENTRY", "SINCE", "REASON", "EXPLANATION"), [*rows]))
    else:
        click.echo("There are no dead letters.")


def _check_type(connection: Connection, config: Config, outbox: str, type_name: str | None) -> None:
    """Refuse a type that is not registered, unless it was once and left dead letters behind."""
    if type_name is None or type_name in {t.name for t in read_types(connection, config.schema)}:
        return
    from outbox.kafka.shard_log import read_dead_letters

    if type_name not in {letter.type for letter, _ in read_dead_letters(config, outbox)}:
        raise UnknownTypeError(f'There is no entity type "{type_name}".', cure="See them: outbox types list.")


def _exist(config: Config, outbox: str, type_name: str | None, keys: tuple[str, ...]) -> bool:
    """Whether there is any of these, as far as Kafka is named; a request for none would wait for a relay in vain."""
    if not config.kafka_bootstrap_servers:
        return True
    from outbox.kafka.shard_log import read_dead_letters

    return any(
        (type_name is None or letter.type == type_name) and (not keys or letter.key in keys)
        for letter, _ in read_dead_letters(config, outbox)
    )


def _ask(
    settings: Settings,
    kind: Literal["retry", "drop"],
    type_name: str | None,
    keys: tuple[str, ...],
    everything: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
) -> None:
    if not everything and type_name is None:
        raise click.UsageError("Say which: --type TYPE, with --key KEY if only some; or --all.")
    if everything and (type_name is not None or keys):
        raise click.UsageError("--all goes without --type and --key.")
    from outbox.requests import ask, wait_for

    with settings.connect() as connection:
        schema = settings.config.schema
        if kind == "drop":
            confirm("Forget these dead letters? Their states are not published.", yes=yes)
        name, shards = outbox_row(connection, schema)
        if type_name is not None and type_name not in {t.name for t in read_types(connection, schema)}:
            _check_type(connection, settings.needs_kafka(), name, type_name)
        if not _exist(settings.config, name, type_name, keys):
            click.echo("There is no such dead letter.", err=True)
            _tell({"request": None, {"retry": "retried", "drop": "dropped"}[kind]: 0}, [], as_json)
            return
        number = ask(connection, schema, kind, {"type": type_name, "keys": list(keys) or None})
        said = f"waiting for the relay, up to {timeout:g} s (request {number}) ..."
        outcomes = wait_for(
            connection, schema, number, shards, seconds=timeout, on_wait=lambda: click.echo(said, err=True)
        )
    total: dict[str, int] = {}
    gone: list[list[str]] = []
    for outcome in outcomes.values():
        gone += outcome.get("examples", [])
        for word in ("retried", "refused", "dropped", "not_retained"):
            if word in outcome:
                total[word] = total.get(word, 0) + outcome[word]
    _tell({"request": number, **total}, gone, as_json)


def _tell(total: Mapping[str, int | None], gone: list[list[str]], as_json: bool) -> None:
    if as_json:
        print_json({**total, "examples": gone})
        return
    counts = {word: count for word, count in total.items() if word != "request"}
    click.echo(", ".join(f"{word.replace('_', ' ')}: {count}" for word, count in counts.items()))
    if total.get("refused"):
        click.echo("refused again; the reasons: outbox dead-letters list", err=True)
    for entity in gone:
        click.echo(f"no longer retained: {entity[0]} {entity[1]}; have the service write it again", err=True)


_TYPE = click.option("--type", "type_name", type=ENTITY_TYPE, metavar="TYPE", help="Those of this entity type.")
_KEY = click.option("--key", "keys", multiple=True, help="Only of these entities.")
_ALL = click.option("--all", "everything", is_flag=True, help="All of them.")
_YES = click.option("--yes", is_flag=True, help="Do not ask.")
_TIMEOUT = click.option(
    "--timeout",
    type=Seconds(0, 86_400),
    default=30.0,
    show_default=True,
    help="Seconds to wait for the relay.",
)


@command.command(epilog="Example: outbox dead-letters retry --type customer --key 42")
@_TYPE
@_KEY
@_ALL
@_YES
@_TIMEOUT
@json_option
@with_settings
def retry(
    settings: Settings,
    type_name: str | None,
    keys: tuple[str, ...],
    everything: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Publish the last retained entry of each entity again; the relay does it, in a batch of its own order."""
    _ask(settings, "retry", type_name, keys, everything, yes, timeout, as_json)


@command.command(epilog="Example: outbox dead-letters drop --type customer --key 42 --yes")
@_TYPE
@_KEY
@_ALL
@_YES
@_TIMEOUT
@json_option
@with_settings
def drop(
    settings: Settings,
    type_name: str | None,
    keys: tuple[str, ...],
    everything: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Forget dead letters; the topic keeps the states that it has."""
    _ask(settings, "drop", type_name, keys, everything, yes, timeout, as_json)
