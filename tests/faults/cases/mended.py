"""What a person must mend: said with the cure, and gone on from when it is mended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from faults.scene import Outcome, Say, Scene
from relays import eventually


def mended(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """What a person must mend: said with the cure, and gone on from when it is mended."""
    seconds: list[float] = []
    done = 0
    with Scene(directory, "mended", relay_role="relay_role") as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        break_and_mend: tuple[tuple[str, str], ...] = (
            (
                "REVOKE SELECT ON outbox.entries FROM relay_role",
                "GRANT SELECT ON outbox.entries TO relay_role",
            ),
            ("ALTER ROLE relay_role NOLOGIN", "ALTER ROLE relay_role LOGIN"),
        )
        for _ in range(times):
            for broken, mend in break_and_mend:
                load.wait_written(5)
                count = scene.count_said(relay, "relay.stuck")
                scene.sql(broken)
                scene.terminate()
                eventually(
                    lambda count=count: scene.count_said(relay, "relay.stuck") > count,  # type: ignore[misc]  # bound now
                    seconds=30,
                    what="stuck",
                )
                said = relay.said("relay.stuck")
                assert said is not None
                assert said["cure"]
                scene.sql(mend)
                seconds.append(scene.seconds_until_published())
                done += 1
                say(f"mended: {mend}")
        load.stop()
        assert relay.alive
        assert load.failed == 0, load.errors
        yield Outcome("a privilege or a login is taken away, and given back", done, scene.settle(relay), seconds)
