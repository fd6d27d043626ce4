"""`outbox reconcile`."""

from __future__ import annotations

import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click
import psycopg

from outbox import requests
from outbox.config import Config
from outbox.database import Connection, place, translate
from outbox.errors import ConfigError, OutboxError
from outbox_cli.loading import load_attribute
from outbox_cli.settings import (
    ENTITY_TYPE,
    Seconds,
    Settings,
    end_by_error,
    fail,
    find_type,
    json_option,
    outbox_row,
    print_json,
    printable,
    with_settings,
)

if TYPE_CHECKING:
    from outbox.comparison import Comparison, Report
    from outbox.equality import Equality

DIFFERENT, NOT_TOLD = 1, 2


class NotTold(OutboxError):  # noqa: N818  an answer to the question that was asked
    """Whether they are equal could not be told; here exit code 2, whatever it was."""

    exit_code = NOT_TOLD


@click.command(epilog="Example: outbox reconcile customer --repair")
@click.argument("type_name", metavar="TYPE", type=ENTITY_TYPE)
@click.option("--repair", is_flag=True, help="Have the relay publish the keys that differ, and compare again.")
@click.option(
    "--sample",
    type=click.IntRange(1),
    metavar="N",
    help="About so many keys alone, and what they say of all: quick, for a monitor.",
)
@click.option(
    "--timeout",
    type=Seconds(0, 86_400),
    default=60.0,
    show_default=True,
    help="Seconds to wait for the relay to publish what is committed, or for the read model to apply it.",
)
@click.option(
    "--read-model",
    "app",
    metavar="MODULE:ATTRIBUTE",
    help="Compare this read model of the consuming service with the topic instead.",
)
@json_option
@with_settings
def command(
    settings: Settings,
    type_name: str,
    repair: bool,
    sample: int | None,
    timeout: float,
    app: str | None,
    as_json: bool,
) -> None:
    """Compare the topic of an entity type with its source, key by key. Exit 0: equal, 1: different, 2: could not tell.

    TYPE needs a source (outbox types change TYPE --source ...). Both sides may change meanwhile: a key that is on its
    way is looked at again. Exit 2 is also for a server that is away and for a setting that is wrong. A repair needs a
    relay that runs. What is compared is kept in files below TMPDIR, some 400 bytes a key at the most; with --sample
    less, but the whole topic is read all the same.
    """
    if app is not None and (repair or sample is not None):
        raise click.UsageError(
            f"--read-model goes without --repair and --sample; mend it: outbox read-model rebuild --app {app}."
        )
    signal.signal(signal.SIGTERM, end_by_error)
    try:
        if app is not None:
            report = _of_read_model(app, type_name, timeout)
        else:
            report = _of_source(settings, type_name, repair=repair, timeout=timeout, sample=sample)
    except OutboxError as error:
        cure = error.cure if app is None else error.cure.replace("MODULE:ATTRIBUTE", app)
        raise NotTold(error.message, cure=cure) from error
    except psycopg.Error as error:
        known = translate(error, place(settings.config.database_url))
        raise NotTold(known.message, cure=known.cure) from error
    except (sqlite3.Error, OSError) as error:
        raise NotTold(
            f"What is compared cannot be kept: {error}.",
            cure="It needs some 400 bytes a key in the directory that TMPDIR names.",
        ) from error
    if app is not None:
        mend = f"Make it anew: outbox read-model rebuild --app {app}; or see: outbox read-model parked --app {app}."
    elif repair:
        mend = (
            "What the relay could not publish is among the dead letters, or is a key's bytes: outbox dead-letters list."
        )
    else:
        mend = f"Mend it: outbox reconcile {type_name} --repair."
    _conclude(report, as_json=as_json, sampled=sample is not None, mend=mend)


def _of_source(settings: Settings, type_name: str, *, repair: bool, timeout: float, sample: int | None) -> Report:
    """Compare the topic with the type's source; `repair`: until they are the same, as far as the relay can."""
    config = settings.needs_kafka()
    from outbox.comparison import comparison
    from outbox.reconcile import Reconciler

    with settings.connect() as connection, ExitStack() as stack:
        name, shards = outbox_row(connection, config.schema)
        entity_type = find_type(connection, config.schema, type_name)
        found = stack.enter_context(comparison(_equality(entity_type.comparison)))

        def compare() -> Report:
            reconciler = Reconciler(
                config,
                connection,
                entity_type,
                name=name,
                shards=shards,
                told=_told(),
                seconds=timeout,
                sample=sample,
            )
            return reconciler.run(found)

        report = compare()
        if repair and report.different:
            _repair(config, connection, shards, type_name, found, timeout)
            before, report = report, compare()
            click.echo(f"{before.different:,} keys were handed to the relay.", err=True)
        return report


def _conclude(report: Report, *, as_json: bool, sampled: bool, mend: str) -> None:
    """Show what was found; the exit code says it, too."""
    _show(report, as_json=as_json, sampled=sampled, mend=mend)
    if report.different:
        fail(DIFFERENT)
    if report.moving:
        fail(NOT_TOLD)


def _of_read_model(app: str, type_or_topic: str, timeout: float) -> Report:
    """Compare a read model with its topic."""
    from outbox_cli.read_model import load

    # What is not installed is said there.
    model = load(app)
    from outbox.comparison import comparison
    from outbox.read_model.compare import Comparer

    follow = model.declared.follow(type_or_topic)
    model.store.open(model.declared)
    with comparison() as found:
        comparer = Comparer(model.declared, model.store, model.settings, follow, seconds=timeout, told=_told())
        return comparer.run(found)


def _equality(named: str | None) -> Equality:
    """What the entity type says of when two states are the same; its function is imported here."""
    from outbox.equality import BYTES, JSON, Equality

    if named is None or named in {JSON, BYTES}:
        return Equality(named)
    normal = load_attribute(named, what="a function of a state's bytes", example="--comparison shop.avro:normal")
    if not callable(normal):
        raise ConfigError(f"{named} is a {normal.__class__.__name__}, no function.", cure="Name a function.")
    return Equality(named, normal)


def _repair(
    config: Config, connection: Connection, shards: int, type_name: str, found: Comparison, timeout: float
) -> None:
    """Hand the keys that differ to the relay: it reads each anew, in the snapshot of its batch."""
    for keys in found.different():
        requests.publish(connection, config.schema, {"type": type_name, "keys": keys}, shards, seconds=timeout)


def _told() -> Callable[[str, int, int | None], None]:
    """A line on a terminal, written over and over; elsewhere nothing."""
    if not sys.stderr.isatty():
        return lambda _what, _done, _of: None

    def tell(what: str, done: int, of: int | None) -> None:
        share = f" of {of:,}" if of is not None else ""
        click.echo(f"\r\x1b[Kreading the {what}: {done:,}{share}", nl=False, err=True)

    return tell


def _show(report: Report, *, as_json: bool, sampled: bool, mend: str) -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    from outbox.comparison import KINDS
    from outbox.sample import CONFIDENCE, at_most

    counts = {kind: getattr(report, kind) for kind in ("equal", *KINDS, "moving")}
    most = at_most(report.different + report.moving, report.keys) if sampled else 1.0
    if as_json:
        said = {"sample": {"keys": report.keys, "different_at_most": most, "confidence": CONFIDENCE}} if sampled else {}
        print_json({**counts, "examples": report.examples, **said})
        return
    click.echo(", ".join(f"{kind}: {count:,}" for kind, count in counts.items() if count or kind == "equal"))
    if sampled:
        click.echo(f"a sample of {report.keys:,} keys: with {CONFIDENCE:.0%} confidence at most {most:.3%} differ")
    for kind, keys in report.examples.items():
        for key in keys:
            click.echo(f"{kind}: {printable(key)}")
        if (more := counts[kind] - len(keys)) > 0:
            click.echo(f"{kind}: and {more:,} more")
    if report.different:
        click.echo(mend, err=True)
