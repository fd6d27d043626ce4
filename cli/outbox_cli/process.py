"""How the relay's process, or a read model's, is set up: batches make, and let go of, tens of thousands of objects."""

from __future__ import annotations

import ctypes
import gc
import os

# Parameters of glibc's mallopt (malloc.h), and what they are set to, in bytes where it is a size.
_MALLOC = (
    # One heap: what this thread makes for the Kafka client, the client's own thread frees. With a heap for each thread
    # a record's header cost twice as much as all else that handing it over takes.
    (-8, 1),  # M_ARENA_MAX
    # A batch's memory is kept for the next, up to so much: given back to the system, it would be made zero again.
    (-1, 64 * 2**20),  # M_TRIM_THRESHOLD
    (-2, 4 * 2**20),  # M_TOP_PAD
    (-3, 32 * 2**20),  # M_MMAP_THRESHOLD
)


def tune() -> None:
    """Set up the collector and the allocator, before threads are started.

    Whoever sets the allocator up by the environment (MALLOC_..., GLIBC_TUNABLES) has it his way, all of it.
    """
    # There are no cycles: looking for them after each 700 objects took a fifth of the time.
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has none, and needs none
        for parameter, value in _MALLOC:
            mallopt(parameter, value)
