"""Install what the comparison needs, when it is needed: Kafka Connect with Debezium, and the Python packages.

All goes below `.stack/bench/`, apart from what the project itself is developed with; pom.xml and requirements.lock
beside this file pin it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from devstack import install
from devstack.install import STACK, InstallError
from devstack.processes import ServerError

HERE = Path(__file__).parent
LIBS = STACK / "bench" / "libs"
VENV = STACK / "bench" / "venv"
PYTHON = VENV / "bin" / "python"
_POM = HERE / "pom.xml"
_LOCK = HERE / "requirements.lock"


def connect() -> None:
    """Kafka Connect and Debezium; `ServerError` when they cannot be had."""
    try:
        install.check_java()
        LIBS.parent.mkdir(parents=True, exist_ok=True)
        install.install_jars("Kafka Connect and Debezium", _POM, LIBS)
    except InstallError as error:
        raise ServerError(str(error)) from error


def python_packages() -> None:
    """The contender in Python and what draws the plots, in an environment of their own; `ServerError` when it fails."""
    stamp = VENV / "lock.stamp"
    value = install.digest("{}.{}".format(*sys.version_info[:2]).encode(), _LOCK.read_bytes())
    if install.holds(stamp, value):
        return
    try:
        install.run("Making .stack/bench/venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
        install.run(
            "Installing the Python packages of bench/requirements.lock",
            [
                *(str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *("--require-hashes", "--only-binary", ":all:", "-r", str(_LOCK)),
            ],
        )
    except InstallError as error:
        raise ServerError(str(error)) from error
    stamp.write_text(value + "\n")


def debezium() -> dict[str, str]:
    """The versions of Debezium and Kafka Connect, as pinned."""
    pom = _POM.read_text()
    named = {"Debezium": "debezium", "Kafka Connect": "kafka"}
    return {name: re.findall(rf"<{which}.version>(.*?)<", pom)[0] for name, which in named.items()}


def locked(*packages: str) -> dict[str, str]:
    """The versions of Python packages, as pinned."""
    lock = _LOCK.read_text()
    return {name: re.findall(rf"^{name}==(\S+)", lock, re.MULTILINE)[0] for name in packages}
