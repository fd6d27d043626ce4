"""What is asked of a part."""

from __future__ import annotations

import shutil
import signal
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

    def numbers(self) -> Iterator[int]:
        """The numbers of the rounds, from 0; negative ones are those of the warm-up. Each is said as it begins."""
        for number in range(-self.warm_up, self.rounds):
            self.view.step(f"round {number + 1} of {self.rounds}" if number >= 0 else "warming up")
            yield number

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A directory for the servers, removed at the end unless it is to be kept; after a failure the logs stay."""
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="work-", dir=DIRECTORY))
        # PostgreSQL may run as another user (see devstack.postgres), who must be able to enter.
        directory.chmod(0o711)
        failed = False
        try:
            yield directory
        except Exception:
            failed = True
            raise
        finally:
            # A second Ctrl-C must not end this, and leave gigabytes.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            if failed and not self.keep:
                # Many gigabytes, from which nobody learns what the logs do not say.
                for data in directory.glob("*/data"):
                    shutil.rmtree(data, ignore_errors=True)
            if failed or self.keep:
                self.view.step(f"{'the servers' if self.keep else 'the logs'} are kept: {directory}")
            else:
                shutil.rmtree(directory, ignore_errors=True)
            signal.signal(signal.SIGINT, before)
