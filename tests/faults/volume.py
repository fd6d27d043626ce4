"""A small file system of its own, that can be filled up and given room again."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self


class LeftOutError(RuntimeError):
    """A fault that cannot be injected on this machine, and why."""


class Volume:
    """A file system in memory, mounted at `directory`; only root may mount one."""

    def __init__(self, directory: Path, *, megabytes: int) -> None:
        self.directory = directory
        self._megabytes = megabytes
        self._ballast = directory / "ballast"

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self._megabytes}m,mode=755", "outbox-faults", str(self.directory)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LeftOutError(f"no file system can be mounted here: {done.stderr.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Lazily: whatever of a killed server still has a file open must not keep it.
        subprocess.run(["umount", "--lazy", str(self.directory)], check=True)

    def fill(self) -> None:
        """Take all the room that is left."""
        ballast = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1_048_576, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(ballast, b"\0" * size)
        finally:
            os.close(ballast)
        assert os.statvfs(self.directory).f_bavail == 0, "there is room left"

    def free(self) -> None:
        """Give it back."""
        self._ballast.unlink()
