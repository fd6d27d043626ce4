"""Where the command `outbox` begins: imports take a moment, and Ctrl-C in it is no error of ours."""

from __future__ import annotations

import signal


def main() -> None:
    """Import the command line, then run it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from outbox_cli.main import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
