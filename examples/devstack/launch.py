"""Become another program, tied to the life of the process that asked for it.

Run as a script by `devstack.processes.start` with `python -I -S launch.py PARENT SIGNAL USER PROGRAM ARG...`:

- PARENT: the id of the asking process; when it is gone already, nothing is started (exit 75). 0 = not tied.
- SIGNAL: number of the signal that the kernel sends to the program when the asking process ends, however it
  ends (Linux; elsewhere the tie is left out).
- USER: the system user to become, or "-" to stay.

It is a program of its own, not a `preexec_fn`: code that runs between fork and exec in a process with threads
(librdkafka has many) may deadlock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
SECBIT_NO_SETUID_FIXUP = 1 << 2
CAP_DAC_OVERRIDE = 1
CAPABILITY_VERSION_3 = 0x20080522

GONE = 75
FAILED = 126


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def become(user: str) -> None:
    """Change to `user`, keeping of root's powers only that of passing directories closed to others.

    PostgreSQL refuses to run as root, yet the checkout and a test's directory are often below one that only
    root may enter. Loosening their modes would outlive the run; one ambient capability does not.
    Where it cannot be kept (no Linux, a confined container), the change of user alone is done.
    """
    import pwd

    entry = pwd.getpwnam(user)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # Without the first, access(2) ignores capabilities, and PostgreSQL looks for its files with it.
        if libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) != 0:
            libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    if sys.platform == "linux":
        mask = 1 << CAP_DAC_OVERRIDE
        header = _CapHeader(CAPABILITY_VERSION_3, 0)
        sets = (_CapData * 2)(_CapData(mask, mask, mask), _CapData(0, 0, 0))
        if libc.capset(ctypes.byref(header), sets) == 0:
            libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0)
    os.environ.update(USER=user, LOGNAME=user, HOME=entry.pw_dir)


def main(parent: int, signal_number: int, user: str, command: list[str]) -> NoReturn:
    """Tie, change user, and exec `command`; a failure is one line on standard error and exit code 126."""
    if user != "-":
        become(user)
    # After the change of user, which clears the tie.
    if parent and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(GONE)
    # Python ignores it, and a program that is exec'ed inherits that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be run: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(FAILED)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
