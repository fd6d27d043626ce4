"""What a person sees: on standard error meanwhile, on standard output what came of it."""

from __future__ import annotations

import time

from rich.console import Console


class View:
    """Says what is going on; quiet when nobody is to be told."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._out = Console(quiet=quiet, highlight=False)
        self._began = time.monotonic()

    def step(self, text: str) -> None:
        """Say one thing, with the time since the start."""
        passed = time.monotonic() - self._began
        self._console.print(f"[dim]{passed:7.1f}s[/dim] {text}", soft_wrap=True)

    def result(self, text: str) -> None:
        """Say what came of it."""
        self._out.print(text, soft_wrap=True, markup=False)
