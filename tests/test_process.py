"""The relay's process: one heap for all its threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

# Threads that each hold memory of their own, and glibc's own account of its heaps.
_PROGRAM = """
import ctypes, sys, threading
from outbox_cli.process import tune
if sys.argv[1] == "tuned":
    tune()
libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_info"):
    sys.exit("no glibc")
libc.fopen.restype = ctypes.c_void_p
libc.malloc.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
held, together = [], threading.Barrier(4)
def hold():
    together.wait()
    held.extend(libc.malloc(100_000) for _ in range(50))
    together.wait()
threads = [threading.Thread(target=hold) for _ in range(4)]
[one.start() for one in threads]
[one.join() for one in threads]
file = libc.fopen(b"/dev/stdout", b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


def heaps(how: str, **more: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how], env=environment | more, capture_output=True, text=True, check=False
    )
    if done.stderr.strip() == "no glibc":
        pytest.skip("this C library tells nothing of its heaps")
    assert done.returncode == 0, done.stderr
    return len(re.findall(r"<heap nr=", done.stdout))


def test_all_threads_of_the_relay_share_one_heap_unless_the_environment_says_otherwise() -> None:
    """Threads that allocate at the same time would have one each."""
    assert heaps("tuned") == 1
    assert heaps("plain") > 1
    assert heaps("tuned", MALLOC_ARENA_MAX="3") > 1
