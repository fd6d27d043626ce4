"""Every error that the outbox raises: what happened, and the cure."""

from __future__ import annotations

from typing import ClassVar


class OutboxError(Exception):
    """Root of all errors of this package.

    `message` says what happened and names the row, topic or setting; `cure` says what mends it (a command where
    there is one), or is empty. `exit_code` is what the command line exits with; see docs/cli.md.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, cure: str = "") -> None:
        super().__init__(message, cure)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message} {self.cure}".rstrip()

    def __reduce__(self) -> tuple[object, ...]:
        return _made_again, (self.__class__, self.message, self.cure)


def _made_again(kind: type[OutboxError], message: str, cure: str) -> OutboxError:
    """An error that comes from another process."""
    return kind(message, cure=cure)


# -- the owning service's side ---------------------------------------------------------------------------------


class EntryError(OutboxError):
    """What names or makes an entry is refused; a writer's entry in its own transaction."""

    exit_code = 65


class UnknownTypeError(EntryError):
    """The entity type is not registered."""


class EntryKeyError(EntryError):
    """The key is empty, too long, or cannot be written as text."""


class StateTooLargeError(EntryError):
    """The state is larger than its type's limit."""


class StateError(EntryError):
    """The state cannot be serialised, or is missing."""


class HeadersError(EntryError):
    """The headers are not a mapping of strings, or use a name that the relay sets itself."""


class BypassError(OutboxError):
    """A bulk statement goes around the unit of work of a published class: no entry would be written."""


class CaptureError(OutboxError):
    """A table cannot be captured."""


# -- settings and schema ---------------------------------------------------------------------------------------


class ConfigError(OutboxError):
    """A setting, a source or a request is missing, unknown, or cannot be used."""

    exit_code = 78


class SchemaError(OutboxError):
    """The outbox's schema is missing, or of another version than this library needs."""

    exit_code = 78


class WrongOutboxError(OutboxError):
    """The outbox has another name than the one that was asked for."""

    exit_code = 78


# -- servers ---------------------------------------------------------------------------------------------------


class DatabaseError(OutboxError):
    """PostgreSQL answered with an error that trying again does not mend (a privilege, a password, a missing table)."""

    exit_code = 77


class DatabaseUnavailableError(OutboxError):
    """PostgreSQL cannot be reached, or the connection was cut; trying again may help."""

    exit_code = 69


class BrokerError(OutboxError):
    """Kafka answered with an error that trying again does not mend."""

    exit_code = 77


class BrokerUnavailableError(OutboxError):
    """Kafka cannot be reached, or did not answer in time; trying again may help."""

    exit_code = 69


class TopicError(OutboxError):
    """A topic is missing, or its settings would lose data."""

    exit_code = 78


# -- the relay -------------------------------------------------------------------------------------------------


class RelayError(OutboxError):
    """The relay cannot go on by itself."""


class FencedError(RelayError):
    """Another relay took over this shard."""

    exit_code = 75


class LostTailError(RelayError):
    """The database lost entries that were published, and the settings say to stop."""

    exit_code = 76


class WrongClusterError(RelayError):
    """The database is another cluster than the one that was published from."""

    exit_code = 76


class UnsuitableServerError(RelayError):
    """The server is a standby, or the connection goes through a pooler."""

    exit_code = 78


class NotCaughtUpError(RelayError):
    """The time that `relay --until-caught-up` was given is over."""

    exit_code = 69


class NoRelayError(RelayError):
    """A request is written, but no relay has done it in time."""

    exit_code = 69


class TooManyDeadLettersError(RelayError):
    """So many keys are dead-lettered that the cause is likely not the entries."""

    exit_code = 76


# -- the read model --------------------------------------------------------------------------------------------


class NeedsRebuildError(OutboxError):
    """The copy is not what the topics and the mapping say, and a person decides."""

    exit_code = 76


class ParkedError(OutboxError):
    """A message that was waited for could not be applied."""

    exit_code = 65


class StoreError(OutboxError):
    """The read model's store answered with an error that trying again does not mend."""

    exit_code = 77


class StoreUnavailableError(OutboxError):
    """The read model's store cannot be reached, is locked, or the connection was cut; trying again may help."""

    exit_code = 69
