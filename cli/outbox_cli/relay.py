"""`outbox relay`."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import click

from outbox import __version__
from outbox_cli.process import tune
from outbox_cli.settings import Seconds, Settings, json_option, print_json, with_settings


@click.command(epilog="Example: outbox relay --until-caught-up")
@click.option("--until-caught-up", is_flag=True, help="Publish all that is committed now, then exit 0.")
@click.option(
    "--timeout",
    type=Seconds(0.1, 604_800),
    metavar="SECONDS",
    help="With --until-caught-up: exit 69 if it takes longer; otherwise servers that are away are waited for.",
)
@click.option("--shard", type=int, help="Which shard; default 0. [OUTBOX_SHARD]")
@click.option("--log-format", type=click.Choice(["auto", "human", "json"]), help="[OUTBOX_LOG_FORMAT]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[OUTBOX_LOG_LEVEL]")
@json_option
@with_settings
def command(settings: Settings, until_caught_up: bool, timeout: float | None, as_json: bool, **flags: Any) -> None:
    """Publish entries, each once and in order, until stopped.

    SIGTERM or Ctrl-C: finish or abort the batch and exit 0; the second time: stop at once.
    """
    if timeout is not None and not until_caught_up:
        raise click.UsageError("--timeout goes with --until-caught-up.")
    settings.add(flags)
    settings.needs_database()
    config = settings.needs_kafka()
    from outbox.config import mask_url
    from outbox.database import place
    from outbox.logs import configure
    from outbox.relay import Relay
    from outbox.telemetry import emit
    from outbox.wake import Wake

    configure(config)
    tune()
    log = logging.getLogger("outbox.relay")
    wake = Wake()

    def stop(number: int, _frame: object) -> None:
        if wake.is_set:
            os._exit(128 + number)
        wake.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    emit(
        log,
        "relay.started",
        version=__version__,
        place=place(config.database_url),
        kafka=mask_url(config.kafka_bootstrap_servers),
    )
    relay = Relay(config, wake=wake)
    relay.run(until_caught_up=until_caught_up, timeout=timeout)
    done = relay.done
    emit(log, "relay.stopped", entries=done.entries, records=done.records, dead=done.dead)
    if as_json:
        print_json({"entries": done.entries, "records": done.records, "dead_letters": done.dead})
