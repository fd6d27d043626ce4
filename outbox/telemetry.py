"""The catalogue of log events: each with its level, its meaning and its fields.

docs/telemetry.md is compared with it by a test. An event that is not in it cannot be logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of log line. `text` is the line for people; the names in braces are its fields."""

    level: int
    text: str
    meaning: str


EVENTS: Mapping[str, Event] = {
    "relay.started": Event(logging.INFO, "relay {version} starts: {place}, {kafka}", "The relay process has started."),
    "relay.holds": Event(
        logging.INFO,
        'holds shard {shard} of "{outbox}" (epoch {epoch})',
        "The relay has fenced any other holder and read the position; it publishes from now on. `token` names it in "
        "the position.",
    ),
    "relay.new_log": Event(
        logging.WARNING,
        "shard {shard} has no position (a first start, or the topic of positions was lost): the retained log is "
        "published from its start (ids above {removed_id})",
        "The first start of an outbox; or the positions topic was lost.",
    ),
    "relay.torn": Event(
        logging.ERROR,
        "Kafka ended the last transaction of shard {shard} without marking it in every partition ({unmarked} records "
        "of the topic of positions are neither committed nor aborted): what it held is published again, so that some "
        "of it may be there twice; nothing is lost",
        "A broker broke a transaction, see docs/guarantees.md; or somebody else writes to the topic of positions.",
    ),
    "relay.published": Event(
        logging.DEBUG,
        "published {entries} entries as {records} records ({dead} dead letters), the first {age_seconds:.3f} s after "
        "its insert; seconds: read {read_seconds:.4f}, prepare {prepare_seconds:.4f}, produce {produce_seconds:.4f}, "
        "flush {flush_seconds:.4f}, commit {commit_seconds:.4f}",
        "One batch, one Kafka transaction. Where the seconds went: reading, preparing (collapse, messages), producing, "
        "waiting until PostgreSQL has flushed it, committing. `age_seconds` is by the wall clocks of both machines.",
    ),
    "relay.waiting": Event(
        logging.WARNING,
        "waiting for {what}: {error} {cure}",
        "A server is away; said once, tried again with growing pauses. `what` is `database` or `kafka`.",
    ),
    "relay.stuck": Event(
        logging.ERROR,
        "stuck at {what}, until somebody mends it: {error} {cure}",
        "Something that the relay needs was changed while it ran; said once, tried again with growing pauses. `what` "
        "is `database`, `kafka` or `topic`. At its start the relay ends instead.",
    ),
    "relay.topic": Event(
        logging.WARNING,
        "the topic {topic} could not be published to, and nothing needs it yet: {error} {cure}",
        "A type was added before its topic, or a topic was changed. Entries of its type will wait, and all behind "
        "them.",
    ),
    "relay.resumed": Event(logging.INFO, "{what} is back; going on", "The server answers again."),
    "relay.aborted": Event(
        logging.WARNING,
        "a transaction was aborted, nothing of it was published; trying again: {reason}",
        "Kafka gave a transaction up; the batch is published again from the position.",
    ),
    "relay.hold_in_doubt": Event(
        logging.WARNING,
        "the hold of shard {shard} is in doubt, the position will tell: {reason}",
        "The producer was fenced, or the outcome of a commit is not known.",
    ),
    "relay.dead_letter": Event(
        logging.ERROR,
        'entry {id} of {type} "{key}" cannot be published ({reason}): {message}',
        "It went to the dead-letter topic in the same transaction; the others go on.",
    ),
    "relay.lost_tail": Event(
        logging.ERROR,
        "{error} The log is adopted: what is retained is published again under new ids. Compare the topics with the "
        "tables.",
        "A fail-over or a restore lost entries that were published.",
    ),
    "relay.adopted": Event(
        logging.WARNING,
        "the log was adopted: epoch {epoch}, {entries} entries are published again",
        "Counts one adoption; said by whoever did it, a relay or `outbox adopt`.",
    ),
    "relay.starts_anew": Event(
        logging.WARNING,
        "shard {shard} starts anew from the adopted log of epoch {epoch}",
        "Each shard says it once after an adoption.",
    ),
    "relay.timeline": Event(
        logging.WARNING,
        "the database went from timeline {before} to {now} with the anchor in place; an entry below it may be lost: "
        "compare the topics with the tables",
        "A fail-over that lost nothing that shows.",
    ),
    "relay.pruned": Event(
        logging.INFO, "pruned slot {slot}: {entries} entries", "A slot of the ring was emptied by the relay."
    ),
    "relay.stopped": Event(
        logging.INFO,
        "stopped, nothing is left half-done; published {entries} entries as {records} records ({dead} dead letters)",
        "The relay ended in order. The numbers are those of this process.",
    ),
    "read_model.started": Event(
        logging.INFO, "the read model {model} follows {topics}", "The store is open; what it holds can be served."
    ),
    "read_model.assigned": Event(
        logging.INFO,
        "the read model {model} applies {places}",
        "The group has given these partitions to this process, and they are claimed in the store.",
    ),
    "read_model.ready": Event(
        logging.INFO,
        "the read model {model} has caught up",
        "It is as far as the topics were when the process started; said once.",
    ),
    "read_model.fenced": Event(
        logging.WARNING,
        "the read model {model} joins its group again: somebody else has claimed {places}",
        "This process was away for long, or a rebuild took the copy's place. Nothing was applied twice.",
    ),
    "read_model.parked": Event(
        logging.ERROR,
        'a message of the read model {model}, key "{key}", was parked: {reason}',
        "It could not be applied; the rest goes on, and a later state of the key supersedes it. Of a batch the first "
        "five are said.",
    ),
    "read_model.parked_many": Event(
        logging.ERROR,
        "of {of} messages of the read model {model} {parked} were parked; outbox read-model parked lists them",
        "Of one batch, when it is more than are said: the mapping or a table may be wrong rather than the messages.",
    ),
    "read_model.kept_unknown": Event(
        logging.WARNING,
        "the read model {model} may not ask how long {topic} keeps tombstones, and takes it for a day: {error}",
        "DescribeConfigs on the topics is denied. Said once.",
    ),
    "read_model.rebuild_asked": Event(
        logging.WARNING,
        "the read model {model} is to be rebuilt: {why}",
        "The mapping is another one, a topic was made anew, or it has forgotten what was not read yet.",
    ),
    "read_model.rebuilding": Event(
        logging.WARNING,
        "the read model {model} is rebuilt beside itself: {why}",
        "The topics are read from their starts; the copy is kept and served meanwhile.",
    ),
    "read_model.swapped": Event(
        logging.WARNING,
        "the read model {model} was rebuilt, and took the old one's place; {parked} messages are parked",
        "One transaction; whoever reads sees the old copy or the new one.",
    ),
    "read_model.rebuild_failed": Event(
        logging.ERROR,
        "the rebuild of the read model {model} failed, and is tried again: {error} {cure}",
        "The copy that there is goes on being kept. Mend it: the role may lack CREATE on the schema, or the mapping "
        "may not fit the messages. It is tried again after a minute or more.",
    ),
    "read_model.waiting": Event(
        logging.WARNING,
        "the read model {model} waits: {error} {cure}",
        "Kafka, the store or a topic is away; said once, tried again with growing pauses. The copy can be served.",
    ),
    "read_model.resumed": Event(
        logging.INFO, "the read model {model} goes on", "Kafka and the store answer again, or all topics are there."
    ),
    "read_model.stopped": Event(
        logging.INFO, "the read model {model} stopped, nothing is left half-done", "It ended in order."
    ),
    "adoption.locked_out": Event(
        logging.WARNING,
        "adoption waits for {blockers} writer(s), try {attempt} of {tries}",
        "Open transactions that wrote entries keep the log from being adopted.",
    ),
}


def emit(log: logging.Logger, name: str, **fields: object) -> None:
    """Log an event of the catalogue."""
    event = EVENTS[name]
    if log.isEnabledFor(event.level):
        log.log(event.level, event.text.format_map(fields), extra={"outbox_event": name, "outbox_fields": fields})
