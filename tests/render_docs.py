"""The tables of the docs that come from code: `python tests/render_docs.py` writes them, a test compares them."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

import click

from outbox import errors
from outbox.config import SETTINGS, Config
from outbox.telemetry import EVENTS
from outbox_cli.main import cli

DOCS = Path(__file__).resolve().parents[1] / "docs"

CONFIGURATION = """# Configuration

A flag goes over the environment, the environment over `outbox.toml` (in the working directory, or `--config FILE`, or
`OUTBOX_CONFIG`), the file over the default. `outbox config` shows what is in force and where each value comes from.
A value that cannot be used, and a name in the file that is no setting, are refused.

{table}

## Kafka's own properties

A table `[kafka]` in `outbox.toml` is passed to librdkafka: TLS, SASL, tuning.

```toml
[kafka]
"security.protocol" = "SASL_SSL"
"sasl.mechanism" = "SCRAM-SHA-512"
"sasl.username" = "relay"
"sasl.password" = "..."
```

What carries the guarantee is refused with the reason: acks, idempotence, the transactional id, retries, the
partitioner, the isolation level.
"""

TELEMETRY = """# Log events

For people on a terminal, one JSON object a line otherwise (`log_format`): `at`, `level`, `logger`, `message`, and
of an event `event` and its fields. Passwords are masked.

{table}
"""

CLI = """# Command line

Every command takes `--help`, and `--json` where a script would read. Flags that all share (`--database-url`,
`--kafka-bootstrap-servers`, `--schema`, `--name`, `--config`, `--debug`) stand before or after the command.

{table}

Without a terminal nothing is asked: give `--yes`. Completion: `eval "$(outbox completion bash)"`.

## Exit codes

{codes}
"""


def configuration() -> str:
    """docs/configuration.md."""
    defaults = {f.name: getattr(Config(), f.name) for f in fields(Config)}
    rows = [
        f"| `{s.name}` | {f'`{s.variable}`' if s.name != 'kafka' else ''} | "
        f"{'' if defaults[s.name] in (None, '', {}) else f'`{defaults[s.name]}`'} | {s.help} |"
        for s in SETTINGS
    ]
    return CONFIGURATION.format(
        table="\n".join(["| setting | variable | default | meaning |", "|---|---|---|---|", *rows])
    )


def telemetry() -> str:
    """docs/telemetry.md."""
    rows = [
        f"| `{name}` | {logging.getLevelName(event.level).lower()} | {event.meaning} |"
        for name, event in EVENTS.items()
    ]
    return TELEMETRY.format(table="\n".join(["| event | level | meaning |", "|---|---|---|", *rows]))


def commands() -> list[tuple[str, click.Command]]:
    """Every command by its whole name."""
    context = click.Context(cli)
    found: list[tuple[str, click.Command]] = []
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += [(f"{name} {inner}", sub) for inner, sub in sorted(command.commands.items())]
        else:
            found.append((name, command))
    return found


def command_line() -> str:
    """docs/cli.md."""
    rows = [
        f"| `outbox {name}` | {(command.help or '').splitlines()[0]} | "
        f"`{(command.epilog or '').removeprefix('Example: ').split(' (')[0]}` |"
        for name, command in commands()
    ]
    by_code: dict[int, list[str]] = {}
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.OutboxError):
            by_code.setdefault(error.exit_code, []).append((error.__doc__ or "").splitlines()[0].rstrip("."))
    by_code[0] = ["Done"]
    by_code[1] = [
        "An error without a code of its own; a difference is left (`topics check`, `topics apply`, `reconcile`)",
        "rows were refused (`backfill watch`)",
    ]
    by_code[2] = ["The command line was not understood, or there was no terminal to ask on; `reconcile` could not tell"]
    by_code[70] = ["Something unexpected; `--debug` shows the traceback"]
    by_code[74] = ["The output cannot be written"]
    by_code[143] = ["`reconcile` or `read-model rebuild` was ended by SIGTERM; a second SIGTERM: stopped at once"]
    by_code[130] = ["Stopped by Ctrl-C"]
    codes = [f"| {code} | {'; '.join(dict.fromkeys(texts))} |" for code, texts in sorted(by_code.items())]
    return CLI.format(
        table="\n".join(["| command | what it does | example |", "|---|---|---|", *rows]),
        codes="\n".join(["| code | meaning |", "|---|---|", *codes]),
    )


PAGES = {"configuration.md": configuration, "telemetry.md": telemetry, "cli.md": command_line}

if __name__ == "__main__":
    for page, render in PAGES.items():
        (DOCS / page).write_text(render(), "utf-8")
