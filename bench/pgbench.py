"""Stock pgbench, with several scripts in one run: whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import percentile
from devstack.postgres import Postgres
from devstack.processes import ServerError

# It ends when the last transaction has; one that waits for ever does not.
_OVER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Times:
    """One script in one run: microseconds of whole transactions."""

    mean: float
    p99: float

    @classmethod
    def of(cls, micros: Sequence[float]) -> Times:
        """Sum a run up."""
        return cls(statistics.fmean(micros), percentile(sorted(micros), 0.99))


def run(
    url: str,
    scripts: Mapping[str, str],
    *,
    clients: int,
    seconds: float,
    durable: bool,
    variables: Mapping[str, object],
    rate: float | None = None,
) -> dict[str, Times]:
    """Run the scripts, drawn anew for each transaction; the times of each that was drawn.

    With a `rate` (transactions a second) the time that a transaction waited for its turn is not counted. Raises
    `ServerError` when a transaction failed, or does not end.
    """
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as place:
        directory = Path(place)
        arguments = ["-n", "-M", "prepared", "-c", str(clients), "-j", str(min(clients, 2)), "-T", f"{seconds:.0f}"]
        for name, value in variables.items():
            arguments += ["-D", f"{name}={value}"]
        for name, script in scripts.items():
            path = directory / f"{name}.sql"
            path.write_text(script)
            arguments += ["-f", str(path)]
        if rate is not None:
            arguments += ["-R", f"{rate:g}"]
        try:
            done = subprocess.run(
                [Postgres.bin("pgbench"), *arguments, "-l", "--log-prefix", str(directory / "log"), url],
                env={**os.environ, "PGOPTIONS": f"-c synchronous_commit={'on' if durable else 'off'}"},
                capture_output=True,
                text=True,
                timeout=seconds + _OVER_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(
                f"pgbench was to run {seconds:.0f} s and did not end {_OVER_SECONDS:g} s later."
            ) from error
        if done.returncode != 0 or "aborted" in done.stderr:
            raise ServerError(f"pgbench failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        micros: dict[int, list[float]] = {}
        for path in directory.glob("log.*"):
            for line in path.read_text().splitlines():
                # client, number, time, script, epoch, microseconds of it, and with a rate: how late it began
                parts = line.split()
                late = float(parts[6]) if rate is not None else 0.0
                micros.setdefault(int(parts[3]), []).append(float(parts[2]) - late)
    return {name: Times.of(micros[number]) for number, name in enumerate(scripts) if number in micros}
