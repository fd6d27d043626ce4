"""Reading ahead: the next batch of a backlog, while the one before it is committed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from outbox.batch import Batch
from outbox.position import Position


class ReadAhead:
    """At most one batch, being read or read already, for a position that is to be.

    The database's connection is used by one thread at a time: `take` and `drop` wait for the other's end.
    """

    def __init__(self, executor: Executor | None = None) -> None:
        self._executor = executor or ThreadPoolExecutor(max_workers=1, thread_name_prefix="outbox-read-ahead")
        self.batch: Future[Batch] | None = None

    def begin(self, read: Callable[[Position], Batch], position: Position) -> None:
        """Read the batch after a position, beside what is done meanwhile."""
        self.batch = self._executor.submit(read, position)

    def keep(self, batch: Batch) -> None:
        """Keep a batch that was read already."""
        self.drop()
        self.batch = Future()
        self.batch.set_result(batch)

    def take(self) -> Batch | None:
        """The batch, if there is one; raises what reading it raised."""
        batch, self.batch = self.batch, None
        return batch.result() if batch is not None else None

    def drop(self) -> None:
        """Throw it away: after a failed or unknown commit it starts from the wrong place."""
        batch, self.batch = self.batch, None
        if batch is not None:
            batch.cancel()
            if not batch.cancelled():
                batch.exception()  # waits

    def close(self) -> None:
        """Throw away what there is, and end the thread."""
        self.drop()
        self._executor.shutdown(wait=True)
