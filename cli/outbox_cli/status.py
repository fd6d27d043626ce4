"""`outbox status`."""

from __future__ import annotations

import signal
import threading

import click

from outbox.errors import BrokerUnavailableError
from outbox.status import Status, look
from outbox_cli.settings import Seconds, Settings, json_option, print_json, table, with_settings


@click.command(epilog="Example: outbox status --watch")
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option("--interval", type=Seconds(0.1, 3600), default=2.0, show_default=True, help="Seconds between.")
@json_option
@with_settings
def command(settings: Settings, watch: bool, interval: float, as_json: bool) -> None:
    """Show backlog and its age, totals, collapse, dead letters, the ring, and what the relay is doing."""
    config = settings.needs_database()
    stopped = threading.Event()
    if watch:
        # Not by an exception: it could come up inside a callback of the Kafka client and get lost there.
        signal.signal(signal.SIGINT, lambda *_: _stop(stopped))
    with settings.connect() as connection:
        while not stopped.is_set():
            status = look(config, connection)
            if as_json:
                print_json(status.as_json())
            else:
                if watch:
                    click.clear()
                click.echo(render(status))
            if not watch:
                if status.kafka is not None and config.kafka_bootstrap_servers:
                    # Shown all the same, but a monitor must not take it for an answer.
                    click.get_current_context().exit(BrokerUnavailableError.exit_code)
                return
            stopped.wait(interval)


def _stop(stopped: threading.Event) -> None:
    if stopped.is_set():
        raise KeyboardInterrupt
    stopped.set()


def render(status: Status) -> str:
    """The status for people."""
    parts = [f'outbox "{status.name}", epoch {status.epoch}']
    if status.kafka is not None:
        parts.append(f"Kafka could not be asked: {status.kafka} What is unpublished is not known.")
    for shard in status.shards:
        on = f" ({shard.on})" if shard.on else ""
        age = "" if shard.position_age_seconds is None else f", last position {shard.position_age_seconds:.0f} s ago"
        parts.append(f"shard {shard.shard}: {shard.state}{on}{age}")
    rows: list[tuple[object, ...]] = [
        (
            t.type,
            t.shard,
            t.topic or "(not registered)",
            _or_unknown(t.unpublished),
            "" if t.oldest_seconds is None else f"{t.oldest_seconds:.1f} s",
            _or_unknown(t.published),
            _or_unknown(t.records),
            "" if t.collapse_ratio is None else f"{t.collapse_ratio:.2f}",
            _or_unknown(t.dead_letters),
        )
        for t in status.types
    ]
    headings = ("TYPE", "SHARD", "TOPIC", "UNPUBLISHED", "OLDEST", "PUBLISHED", "RECORDS", "RATIO", "DEAD")
    parts += ["", table(headings, rows), ""]
    held = [slot for slot in status.ring if slot.entries]
    parts.append(f"ring: {len(held)} of {len(status.ring)} slots hold {sum(slot.entries for slot in held)} entries")
    parts += [f"  {pin}" for pin in status.pins]
    return "\n".join(parts)


def _or_unknown(number: int | None) -> object:
    return "?" if number is None else number
