"""`outbox read-model`: in the consuming service's environment, for the model that it declares."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from outbox.errors import ConfigError, OutboxError
from outbox_cli.loading import load_attribute
from outbox_cli.settings import Settings, end_by_error, fail, json_option, print_json, printable, table, with_settings

if TYPE_CHECKING:
    from outbox.read_model import ReadModel

F = TypeVar("F", bound=Callable[..., Any])

_EXAMPLE = 'ReadModel("search", SqliteStore("search.db"), [Follow("shop.customer", Copy(customers))], bootstrap="...")'

app_option = click.option(
    "--app", required=True, metavar="MODULE:ATTRIBUTE", help="The service's outbox.read_model.ReadModel."
)


def _named(function: F) -> F:
    """Have cures name the app that was given, so that they can be pasted."""

    @wraps(function)
    def wrapped(settings: Settings, app: str, **arguments: Any) -> Any:
        try:
            return function(settings, app, **arguments)
        except OutboxError as error:
            error.cure = error.cure.replace("MODULE:ATTRIBUTE", app)
            raise

    return wrapped  # type: ignore[return-value]  # the same call


@click.group("read-model", epilog="Example: outbox read-model status --app search.copies:model")
def command() -> None:
    """Keep and look after a read model, the consumer's half."""


def load(name: str) -> ReadModel:
    """What MODULE:ATTRIBUTE names."""
    try:
        from outbox.read_model import ReadModel
    except ImportError as error:
        raise ConfigError(
            f"Read models need a package that is not installed: {error.name}.",
            cure="Install the extra `read-model` too: pip install '.[read-model]' in a checkout, or "
            "outbox-publisher[read-model] from where this package came from.",
        ) from error
    found = load_attribute(name, what=f"{name.partition(':')[2]} = {_EXAMPLE}", example="--app search.copies:model")
    if not isinstance(found, ReadModel):
        raise ConfigError(
            f"{name} is a {found.__class__.__name__}, no outbox.read_model.ReadModel.",
            cure=f"Define it: {name.partition(':')[2]} = {_EXAMPLE}.",
        )
    return found


@command.command(epilog="Example: outbox read-model run --app search.copies:model")
@app_option
@click.option(
    "--until-ready",
    is_flag=True,
    help="Catch up with the topics' ends as they are now, do a rebuild that is asked for, then exit 0. Stopped before: "
    "exit 130.",
)
@click.option("--log-format", type=click.Choice(["auto", "human", "json"]), help="[OUTBOX_LOG_FORMAT]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[OUTBOX_LOG_LEVEL]")
@with_settings
@_named
def run(settings: Settings, app: str, until_ready: bool, **flags: Any) -> None:
    """Keep the copy up to date until stopped.

    SIGTERM or Ctrl-C: finish the batch and exit 0 (130 with --until-ready); the second time: stop at once.
    """
    settings.add(flags)
    model = load(app)
    from outbox.logs import configure
    from outbox.wake import Wake
    from outbox_cli.process import tune

    tune()
    configure(settings.config)
    wake = Wake()

    def stop(number: int, _frame: object) -> None:
        if wake.is_set:
            os._exit(128 + number)
        wake.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if not model.run(wake, until_ready=until_ready) and until_ready:
        fail(130)


@command.command(epilog="Example: outbox read-model status --app search.copies:model --json")
@app_option
@json_option
@with_settings
@_named
def status(settings: Settings, app: str, as_json: bool) -> None:
    """Show how old the copy is, whether it is whole, what is parked. Kafka is not asked."""
    del settings
    found = load(app).status()
    if as_json:
        print_json(
            {
                "model": found.model,
                "loaded_at": found.loaded_at,
                "staleness_seconds": found.staleness,
                "same_mapping": found.same_mapping,
                "rebuild": found.rebuild,
                "rebuild_by_this_mapping": found.rebuild is not None and found.own_rebuild,
                "parked": found.parked,
                "offsets": dict(found.offsets),
            }
        )
        return
    click.echo(f"{found.model}: {'whole' if found.loaded_at else 'not whole yet'}", nl=False)
    click.echo("" if found.staleness is None else f", known to be current {found.staleness:,.0f} s ago")
    if not found.same_mapping:
        click.echo("the mapping is another one than that of the rows")
    if found.rebuild is not None:
        by = "" if found.own_rebuild else " (by another mapping than this one: its process does it)"
        click.echo(f"a rebuild is asked for{by}: {found.rebuild}")
    click.echo(f"parked: {found.parked:,}")
    if found.offsets:
        click.echo(table(("PARTITION", "APPLIED TO"), list(found.offsets.items())))


@command.command(epilog="Example: outbox read-model rebuild --app search.copies:model")
@app_option
@json_option
@with_settings
@_named
def rebuild(settings: Settings, app: str, as_json: bool) -> None:
    """Make the copy anew from the topics, beside the live one, and swap. Exit 1 when another process does so."""
    del settings
    model = load(app)
    signal.signal(signal.SIGTERM, end_by_error)
    with click.progressbar(length=1, label=f"rebuilding {model.declared.name}", file=sys.stderr) as bar:

        def told(done: int, of: int) -> None:
            bar.length = max(of, 1)
            bar.update(done - bar.pos)

        swapped = model.rebuild(told=told)
    if as_json:
        print_json({"model": model.declared.name, "swapped": swapped})
    else:
        click.echo("rebuilt and swapped" if swapped else "another process rebuilds it already")
    if not swapped:
        fail(1)


@command.command(epilog="Example: outbox read-model parked --app search.copies:model --retry")
@app_option
@click.option("--retry", is_flag=True, help="Apply them once more, after the mapping was mended.")
@click.option("--topic", metavar="TOPIC", help="Only those of this topic.")
@click.option("--key", multiple=True, metavar="KEY", help="Only those of this key.")
@json_option
@with_settings
@_named
def parked(settings: Settings, app: str, retry: bool, topic: str | None, key: tuple[str, ...], as_json: bool) -> None:
    """List the messages that could not be applied, or apply them once more. Exit 1 when some are left after a retry."""
    del settings
    model = load(app)
    if retry:
        done = model.retry(topic, list(key) or None)
        if as_json:
            print_json({"applied": done.changes, "parked": done.parked})
        else:
            click.echo(f"applied: {done.changes:,}, still parked: {done.parked:,}")
            if done.parked:
                click.echo(f"See which and why: outbox read-model parked --app {app}")
        if done.parked:
            fail(1)
        return
    found = model.parked(topic, list(key) or None)
    if as_json:
        print_json(
            [
                {
                    "topic": one.topic,
                    "key": one.key,
                    "entry_id": one.entry_id,
                    "partition": one.raw.partition,
                    "offset": one.raw.offset,
                    "reason": one.reason,
                    "parked_at": one.parked_at,
                }
                for one in found
            ]
        )
        return
    rows = [(one.topic, printable(one.key), one.raw.partition, one.raw.offset, printable(one.reason)) for one in found]
    click.echo(table(("TOPIC", "KEY", "PARTITION", "OFFSET", "REASON"), rows) if rows else "Nothing is parked.")
