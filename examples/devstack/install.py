"""Install what the project needs to be developed: run by `make setup`, with the standard library only.

`.venv/` gets `requirements-dev.lock` (every file checked against its hash) and the project itself, editable;
`.stack/kafka/libs/` gets Kafka's jars through Maven, as `pom.xml` beside this file names them. A step is
skipped when its stamp holds the hash of what it was made from, so that a second run takes no time.
Exit code 1, with one sentence that says what to do, when something is missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STACK = ROOT / ".stack"
LIBS = STACK / "kafka" / "libs"
LOCK = ROOT / "requirements-dev.lock"
POM = Path(__file__).with_name("pom.xml")
LEAST_JAVA = 17
GET_JAVA = "Debian, Ubuntu: apt install openjdk-17-jre-headless; macOS: brew install openjdk@17"


class InstallError(Exception):
    """Something is missing; the message says what, and how to get it."""


def java_program() -> str:
    """The `java` of JAVA_HOME, else the one on the PATH. Raises `InstallError` when there is none."""
    home = os.environ.get("JAVA_HOME")
    if home and (Path(home) / "bin" / "java").is_file():
        return str(Path(home) / "bin" / "java")
    found = shutil.which("java")
    if found is None:
        raise InstallError(
            f"Java {LEAST_JAVA} or newer is needed and no `java` is on the PATH: install it ({GET_JAVA})."
        )
    return found


def check_java() -> str:
    """The path of a `java` that is new enough. Raises `InstallError` otherwise."""
    java = java_program()
    shown = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    # 'openjdk version "17.0.15" ...'; before 9 it was "1.8.0_402".
    version = re.search(r'version "(\d+)(?:\.(\d+))?', shown.stderr + shown.stdout)
    if shown.returncode != 0 or version is None:
        raise InstallError(
            f"`{java} -version` does not work: install Java {LEAST_JAVA} or newer, or set JAVA_HOME to one."
        )
    major = int(version[2] or 0) if version[1] == "1" else int(version[1])
    if major < LEAST_JAVA:
        raise InstallError(
            f"Java {LEAST_JAVA} or newer is needed and {java} is Java {major}: "
            f"install a newer one ({GET_JAVA}) or set JAVA_HOME to one."
        )
    return java


def maven_program() -> str:
    """The path of `mvn`. Raises `InstallError` when there is none."""
    found = shutil.which("mvn")
    if found is None:
        raise InstallError(
            "Maven is needed to get Kafka and there is no `mvn` on the PATH: install it "
            "(Debian, Ubuntu: apt install maven; macOS: brew install maven)."
        )
    return found


def run(what: str, command: list[str], *, seconds: float = 1200) -> None:
    """Run one step's command, showing its output only when it fails, in an `InstallError`."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode != 0:
        shown = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-25:])
        raise InstallError(
            f"{what} failed (exit code {done.returncode}); what was said last is below. "
            f"Mend it and run `make setup` again.\n{shown}"
        )


def digest(*parts: bytes) -> str:
    """One hash over the parts and their order."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def holds(stamp: Path, value: str) -> bool:
    """Whether a stamp file holds this value."""
    return stamp.is_file() and stamp.read_text().strip() == value


def install_python() -> None:
    """Make `.venv` and install the lock's packages and the project into it."""
    version = "{}.{}".format(*sys.version_info[:2])
    python = VENV / "bin" / "python"
    stamp = VENV / "devstack-lock.stamp"
    value = digest(version.encode(), LOCK.read_bytes())
    if not (python.is_file() and holds(stamp, value)):
        made = VENV / "lib" / f"python{version}" / "site-packages" / "pip"
        if not (python.is_file() and made.is_dir()):
            run("Making .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
        # A wheel only: building from source would run code that no hash in the lock covers.
        run(
            "Installing the Python packages of requirements-dev.lock",
            [
                *(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *("--require-hashes", "--only-binary", ":all:", "-r", str(LOCK)),
            ],
        )
        stamp.write_text(value + "\n")
    stamp = VENV / "devstack-project.stamp"
    value = digest((ROOT / "pyproject.toml").read_bytes(), value.encode())
    if not holds(stamp, value):
        run(
            "Installing the project itself",
            [
                *(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                # The build backend is in the lock, so nothing is fetched unpinned.
                *("--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
            ],
        )
        stamp.write_text(value + "\n")


def install_jars(what: str, pom: Path, libs: Path) -> None:
    """Copy the jars that a pom names into `libs`."""
    stamp = libs / "devstack-pom.stamp"
    value = digest(pom.read_bytes())
    if holds(stamp, value):
        return
    maven = maven_program()
    unfinished = libs.with_name("libs.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    run(
        f"Getting {what} through Maven",
        [
            *(maven, "--batch-mode", "--quiet", "--no-transfer-progress", "--file", str(pom)),
            *("dependency:copy-dependencies", f"-DoutputDirectory={unfinished}"),
        ],
    )
    (unfinished / stamp.name).write_text(value + "\n")
    shutil.rmtree(libs, ignore_errors=True)
    unfinished.rename(libs)


def main() -> int:
    """Install all; the exit code."""
    STACK.mkdir(exist_ok=True)
    # Two at once (an editor's task and a terminal) would write into the same directories.
    with (STACK / "setup.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            # First what takes no time to find out.
            check_java()
            if not LIBS.is_dir():
                maven_program()
            install_jars("Kafka's jars", POM, LIBS)
            install_python()
        except InstallError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
