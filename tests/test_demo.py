"""The demo: stock pgbench through the outbox; it ends by proving that topics and tables are equal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from devstack.processes import children, wait_until

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "pgbench_demo", "--seconds", "4", "--scale", "1"]

pytestmark = pytest.mark.acceptance


def start(*options: str) -> subprocess.Popen[str]:
    """Start the demo as `make demo` does, without a terminal."""
    return subprocess.Popen(
        [*COMMAND, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "examples"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_it_ends_by_saying_that_topics_and_tables_are_equal() -> None:
    """Exit 0, with the numbers; the hot tables show collapse."""
    demo = start()
    said, _ = demo.communicate(timeout=180)
    assert demo.returncode == 0, said
    assert re.search(r"^equal: 150,011 keys", said, re.MULTILINE), said
    assert "--watch: done: 50,000 rows" in said
    assert "reconcile client: equal: 49,997, missing: 1, stale: 1, orphaned: 1, undecodable: 1; missing: 7;" in said
    assert "--repair: equal: 50,000" in said
    branch = re.search(r"^bank.branch: .* ([\d,]+) entries, ([\d,]+) records", said, re.MULTILINE)
    assert branch is not None, said
    entries, records = (int(number.replace(",", "")) for number in branch.groups())
    assert entries > 2 * records


def test_a_wrong_record_makes_it_fail_and_is_named() -> None:
    """The comparison can fail: exit 1 when a topic holds what the table does not."""
    demo = start("--tamper")
    said, _ = demo.communicate(timeout=180)
    assert demo.returncode == 1, said
    assert "bank.account" in said
    assert not re.search(r"^equal: ", said, re.MULTILINE)


def test_ctrl_c_leaves_no_process_behind() -> None:
    """Wherever it is: here, while the relay publishes the existing rows."""
    demo = start()
    assert demo.stdout is not None
    for line in demo.stdout:
        if "existing rows" in line:
            break
    started = children(demo.pid)
    assert len(started) >= 3
    demo.send_signal(signal.SIGINT)
    demo.communicate()
    assert demo.wait(60) == 130
    assert wait_until(lambda: not any(child.alive() for child in started), seconds=10)
