"""Install what the comparison needs, when it is needed: Kafka Connect with Debezium, and the Python packages.

All goes below `.stack/bench/`, apart from what the project itself is developed with; pom.xml, sink.xml and
requirements.lock beside this file pin it.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from devstack import install
from devstack.install import STACK, InstallError
from devstack.processes import ServerError

HERE = Path(__file__).parent
VENV = STACK / "bench" / "venv"
PYTHON = VENV / "bin" / "python"
_LOCK = HERE / "requirements.lock"


@dataclass(frozen=True, slots=True)
class Jars:
    """Kafka Connect with a connector of Debezium's: its name, what pins it, and where it lies."""

    name: str
    pom: Path
    libs: Path

    def install(self) -> None:
        """Get them; `ServerError` when they cannot be had."""
        try:
            install.check_java()
            self.libs.parent.mkdir(parents=True, exist_ok=True)
            install.install_jars(f"Kafka Connect and {self.name}", self.pom, self.libs)
        except InstallError as error:
            raise ServerError(str(error)) from error

    @property
    def versions(self) -> dict[str, str]:
        """The versions of it and of Kafka Connect, as pinned."""
        pom = self.pom.read_text()
        named = {self.name: "debezium", "Kafka Connect": "kafka"}
        return {name: re.findall(rf"<{which}.version>(.*?)<", pom)[0] for name, which in named.items()}


SOURCE = Jars("Debezium", HERE / "pom.xml", STACK / "bench" / "libs")
SINK = Jars("Debezium's JDBC sink", HERE / "sink.xml", STACK / "bench" / "sink-libs")


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


def locked(*packages: str) -> dict[str, str]:
    """The versions of Python packages, as pinned."""
    lock = _LOCK.read_text()
    return {name: re.findall(rf"^{name}==(\S+)", lock, re.MULTILINE)[0] for name in packages}
