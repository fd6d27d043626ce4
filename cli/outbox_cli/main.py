"""The command `outbox`: the only place that reads the environment."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import orjson

from outbox import __version__
from outbox.errors import OutboxError
from outbox.logs import scrub
from outbox_cli.settings import Settings, global_options

# name -> (module, help); a command's module is imported when it is called, so that --help stays fast and a base
# install without Kafka works.
_COMMANDS: dict[str, tuple[str, str]] = {
    "adopt": ("adopt", "Make the retained log new, after a restore or for a copy."),
    "backfill": ("backfill", "Publish the present state of what a type's source holds."),
    "completion": ("completion", "Print the shell's completion script."),
    "config": ("config", "Show the settings in force, and where each comes from."),
    "dead-letters": ("dead_letters", "List, retry or drop what could not be published."),
    "migrate": ("migrate", "Make or upgrade the outbox in a database without Alembic."),
    "prune": ("prune", "Empty the ring slots that nothing needs any more."),
    "read-model": ("read_model", "Keep and look after a read model, the consumer's half."),
    "reconcile": ("reconcile", "Prove that a topic says what the database says, or mend it."),
    "relay": ("relay", "Publish entries until stopped."),
    "replay": ("replay", "Publish chosen keys again, as they are now."),
    "revision": ("revision", "Write an Alembic revision into the service's versions folder."),
    "status": ("status", "Show backlog, totals, dead letters and the ring."),
    "topics": ("topics", "Compare the topics with what is declared, and mend them."),
    "types": ("types", "List, add, change or remove entity types."),
}


class _Commands(click.Group):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"outbox_cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], _COMMANDS, 1)
            if near:
                raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table: help must not import every command.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_COMMANDS.items())])


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: outbox status --json. Exit codes: 0 done, 1 a difference is left, 2 not understood, 65 entry "
    "refused, 69 a server is away, 70 a mistake of ours, 75 another relay took over, 76 a person must decide, "
    "77 denied, 78 settings.",
)
@click.version_option(__version__, prog_name="outbox")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@global_options
@click.pass_context
def cli(ctx: click.Context, /, debug: bool, **flags: Any) -> None:
    """Publish the current state of a service's entities to compacted Kafka topics, exactly once."""
    ctx.obj = Settings(flags, dict(os.environ), debug=debug)


def main() -> None:
    """Run the command line; every error comes out as sentences with an exit code."""
    _open_closed_streams()
    debug = "--debug" in sys.argv
    as_json = "--json" in sys.argv
    try:
        _check_arguments()
        code = cli.main(prog_name="outbox", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        code = 130
    except click.ClickException as error:
        if as_json:
            _show(error.format_message(), "See --help.", error.exit_code, as_json=True)
        else:
            error.show()
        code = error.exit_code
    except click.exceptions.Exit as error:
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not complain about it while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # noqa: BLE001  the last resort, so that nobody sees a traceback unasked
        if debug:
            click.echo(scrub("".join(traceback.format_exception(error))), err=True)
        known = _known(error)
        if known is None:
            known = Unexpected(
                f"Something unexpected happened: {type(error).__name__}: {error}",
                cure="Report the traceback." if debug else "Run it again with --debug and report the traceback.",
            )
        code = known.exit_code
        _show(scrub(known.message), scrub(known.cure), code, as_json=as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _open_closed_streams() -> None:
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # Whoever started us has closed it: nothing to read, and nobody who listens.
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115  for good


def _check_arguments() -> None:
    for argument in sys.argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raw = argument.encode(errors="surrogateescape")
            raise click.UsageError(f"An argument is not valid UTF-8: {raw!r}.") from error


class Unexpected(OutboxError):  # noqa: N818  it wraps an error of any kind for the one who reads the terminal
    """A mistake of this program."""

    exit_code = 70


class NotWritten(OutboxError):  # noqa: N818  as above
    """Nobody can read what was to be printed."""

    exit_code = 74


def _known(error: Exception) -> OutboxError | None:
    """The error in the project's words; None for a mistake of this program."""
    if isinstance(error, OutboxError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return NotWritten(f"The output cannot be written: {error.strerror}.", cure="Make room where it goes to.")
    from psycopg import Error

    if isinstance(error, Error):
        from outbox.database import translate

        return translate(error, "the database")
    return None


def _show(message: str, cure: str, exit_code: int, *, as_json: bool) -> None:
    if as_json:
        click.echo(orjson.dumps({"error": message, "cure": cure, "exit_code": exit_code}), err=True)
    else:
        click.echo(f"error: {message}" + (f"\n  {cure}" if cure else ""), err=True)


if __name__ == "__main__":
    main()
