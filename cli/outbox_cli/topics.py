"""`outbox topics`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from outbox.config import Config
from outbox.errors import ConfigError
from outbox.topic import Action
from outbox_cli.settings import ENTITY_TYPE, Settings, confirm, fail, json_option, outbox_row, print_json, with_settings


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


@command.command(epilog="Example: outbox topics switch customer --to-topic shop.customer.v2 --yes")
@click.argument("type_name", metavar="TYPE", type=ENTITY_TYPE)
@click.option("--to-topic", required=True, metavar="TOPIC", help="A topic that follows the type and has been filled.")
@click.option("--keep/--no-keep", default=True, show_default=True, help="Keep the old topic in step.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@with_settings
def switch(settings: Settings, type_name: str, to_topic: str, keep: bool, yes: bool, as_json: bool) -> None:
    """Give a type the topic that follows it, without a gap; the old one follows from then on, or ends."""
    from outbox import follower
    from outbox.kafka.shard_log import read_dead_letters

    config = settings.needs_kafka()
    ends = "is kept in step" if keep else "gets nothing any more"
    with settings.connect() as connection:
        name, shards = outbox_row(connection, config.schema)
        new = follower.of_topic(connection, config.schema, type_name, to_topic)
        letters = [x for x, _ in read_dead_letters(config, name) if new is not None and x.type in {new.name, type_name}]
        if letters:
            of = letters[0].type
            raise ConfigError(
                f'{len(letters)} entities are not in a topic (dead letters), as "{letters[0].key}" of {of}.',
                cure=f"Mend the cause and retry them: outbox dead-letters retry --type {of}; or drop them.",
            )
        confirm(f"Publish {type_name} to {to_topic}? The old topic {ends}.", yes=yes)
        now = follower.switch(connection, config.schema, type_name, to_topic, shards=shards, keep=keep)
    if as_json:
        print_json({"type": now.name, "topic": now.topic, "reads_source": now.reads_source, "kept": keep})
        return
    click.echo(f"{type_name} is published to {now.topic}; the old topic {ends}.")
    if now.reads_source:
        click.echo(
            "Its source says what is published of a change. Once services write states of that shape: "
            f"outbox types change {type_name} --no-reads-source."
        )


@command.command(epilog="Example: outbox topics retire shop.customer --yes")
@click.argument("topic")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@with_settings
def retire(settings: Settings, topic: str, yes: bool, as_json: bool) -> None:
    """End a topic that follows an entity type; what is in it stays."""
    from outbox import follower

    confirm(f"Publish nothing to {topic} any more?", yes=yes)
    with settings.connect() as connection:
        followed = follower.retire(connection, settings.config.schema, topic)
    if as_json:
        print_json({"retired": topic, "followed": followed})
    else:
        click.echo(f"{topic} follows {followed} no more, and is left as it is.")
