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
    """The Python peer and what draws the plots, in an environment of their own; `ServerError` when it fails."""
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


def versions() -> dict[str, str]:
    """Of what is compared, as pinned."""
    pom = _POM.read_text()
    found = {
        "Debezium": re.search(r"<debezium.version>(.*?)<", pom),
        "Kafka and Kafka Connect": re.search(r"<kafka.version>(.*?)<", pom),
        "txoutbox": re.search(r"^txoutbox==(\S+)", _LOCK.read_text(), re.MULTILINE),
    }
    return {name: match[1] for name, match in found.items() if match}
