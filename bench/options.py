"""What is asked of a part."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.report import DIRECTORY
from bench.view import View


@dataclass(frozen=True)
class Options:
    """The command line, read. `seconds` is the most that one contender may take in one round;
    `stage_seconds` is how long a steady load, or nothing at all, is watched.
    """

    command: str
    entries: int
    rounds: int
    warm_up: int
    seconds: float
    stage_seconds: float
    peers: Sequence[str]
    keep: bool = False
    view: View = field(default_factory=View)

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A directory for the servers, removed at the end unless it is to be kept."""
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="work-", dir=DIRECTORY))
        # PostgreSQL may run as another user (see devstack.postgres), who must be able to enter.
        directory.chmod(0o711)
        try:
            yield directory
        finally:
            if self.keep:
                self.view.step(f"kept: {directory}")
            else:
                shutil.rmtree(directory, ignore_errors=True)
