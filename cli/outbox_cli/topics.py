"""`outbox topics`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from outbox.config import Config
from outbox.topic import Action
from outbox_cli.settings import Settings, confirm, fail, json_option, outbox_row, print_json, with_settings


@click.group("topics", epilog="Example: outbox topics plan")
def command() -> None:
    """Compare the topics with what the entity types declare, and mend them."""


def _look(settings: Settings) -> tuple[Config, list[Action]]:
    config = settings.needs_kafka()
    from outbox import topics
    from outbox.entity_types import read_types

    with settings.connect() as connection:
        name, shards = outbox_row(connection, config.schema)
        types = read_types(connection, config.schema)
    wanted = topics.specs(config, name=name, shards=shards, types=types)
    return config, topics.differences(config, wanted)


def _shown(actions: Sequence[Action]) -> list[dict[str, object]]:
    return [
        {
            "kind": a.kind,
            "topic": a.topic,
            "explanation": a.explanation,
            "settings": {name: {"is": is_, "should_be": should} for name, (is_, should) in a.settings.items()},
        }
        for a in actions
    ]


def _print(actions: Sequence[Action]) -> None:
    for action in actions:
        click.echo(f"{action.kind:7} {action.topic}: {action.explanation}")


@command.command(epilog="Example: outbox topics plan --json")
@json_option
@with_settings
def plan(settings: Settings, as_json: bool) -> None:
    """Show what `apply` would do. Exit 0, whatever that is."""
    _, actions = _look(settings)
    if as_json:
        print_json(_shown(actions))
    elif actions:
        _print(actions)
    else:
        click.echo("Nothing to do: the topics are as declared.")


@command.command(epilog="Example: outbox topics check (in a deployment: exit 1 stops it)")
@json_option
@with_settings
def check(settings: Settings, as_json: bool) -> None:
    """Exit 0 when the topics are as declared, 1 when they are not."""
    _, actions = _look(settings)
    if as_json:
        print_json({"equal": not actions, "differences": _shown(actions)})
    elif actions:
        _print(actions)
    else:
        click.echo("The topics are as declared.")
    if actions:
        fail(1)


@command.command(epilog="Example: outbox topics apply --yes")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--grow", is_flag=True, help="Add partitions too. Keys move: their order across the change is lost.")
@json_option
@with_settings
def apply(settings: Settings, yes: bool, grow: bool, as_json: bool) -> None:
    """Make missing topics and change settings that drifted. Never deletes. Exit 1 when something is left."""
    config, actions = _look(settings)
    from outbox import topics

    doable = [a for a in actions if a.kind in {"create", "change"} or (grow and a.kind == "grow")]
    left = [a for a in actions if a not in doable]
    if doable and not yes:
        if not as_json:
            _print(doable)
        confirm(f"Do this ({len(doable)} action(s))?", yes=yes)
    done = topics.apply(config, doable, grow=grow)
    if as_json:
        print_json({"done": _shown(done), "left": _shown(left)})
    else:
        for action in done:
            click.echo(f"{'created' if action.kind == 'create' else 'changed'} {action.topic}: {action.explanation}")
        if not actions:
            click.echo("Nothing to do: the topics are as declared.")
        for action in left:
            click.echo(f"left    {action.topic}: {action.explanation}", err=True)
    if left:
        fail(1)
