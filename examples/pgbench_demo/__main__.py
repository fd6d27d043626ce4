"""`python -m pgbench_demo`: run the demo; see `pgbench_demo.run`."""

from __future__ import annotations

import signal
import sys

# Importing takes a moment, and Ctrl-C in it is no error.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: sys.exit(128 + number))

from pgbench_demo.run import main  # noqa: E402  after the signals

if __name__ == "__main__":
    sys.exit(main())
