"""PostgreSQL crashes, is cut off, is read-only, has no room; its clock jumps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from faults.scene import Outcome, Say, Scene
from relays import eventually


def crash(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """PostgreSQL stops at once under load: aborted transactions just before, asynchronous commits among the others."""
    seconds = []
    with Scene(directory, "crash") as scene, scene.load(asynchronous=0.3, aborts=0.4) as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        for number in range(times):
            load.wait_written(10)
            scene.postgres.stop("immediate")
            scene.postgres.start()
            load.wait_written(2)
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            say(f"PostgreSQL crashed: {number + 1} of {times}")
        load.stop()
        yield Outcome("PostgreSQL stops at once, with asynchronous commits", times, scene.settle(relay), seconds)


def line(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The relay's line to PostgreSQL: cut in the middle, its backend terminated, a server that answers no more."""
    with Scene(directory, "line", statement_timeout=1) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        cut: list[float] = []
        for number in range(times):
            load.wait_written(3)
            eventually(lambda: scene.postgres_line.cut() > 0, what="a line to cut")
            cut.append(scene.seconds_until_published())
            say(f"line cut: {number + 1} of {times}")
        terminated: list[float] = []
        for number in range(times):
            load.wait_written(3)
            eventually(scene.terminate, what="a backend to terminate")
            terminated.append(scene.seconds_until_published())
            say(f"backend terminated: {number + 1} of {times}")
        silent: list[float] = []
        for number in range(max(1, times // 5)):
            load.wait_written(3)
            before = len([e for e in relay.events() if e.get("event") == "relay.waiting"])
            scene.postgres_line.silent = True
            eventually(
                lambda before=before: len([e for e in relay.events() if e.get("event") == "relay.waiting"]) > before,  # type: ignore[misc]  # bound now
                seconds=60,
                what="the relay gives the silent server up",
            )
            scene.postgres_line.silent = False
            silent.append(scene.seconds_until_published())
            say(f"silent server: {number + 1} of {max(1, times // 5)}")
        load.stop()
        assert relay.alive
        judgement = scene.settle(relay)
        yield Outcome("the line to PostgreSQL is cut", times, judgement, cut)
        yield Outcome("the relay's backend is terminated", times, judgement, terminated)
        yield Outcome("PostgreSQL accepts and never answers", len(silent), judgement, silent)
