"""Three brokers, each a controller as well: what one of them holds, two others hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from devstack.kafka import DEFAULT_PROPERTIES, Kafka, new_cluster_id

_REPLICATED = {
    "default.replication.factor": "3",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
    "min.insync.replicas": "2",
}


class Node(Kafka):
    """One of the three."""

    def __init__(self, directory: Path, node: int, cluster_id: str) -> None:
        super().__init__(directory, properties={**DEFAULT_PROPERTIES, **_REPLICATED})
        self.node = node
        self._cluster_id = cluster_id

    def _format(self) -> None:
        shutil.rmtree(self.data, ignore_errors=True)
        self.tool("kafka.tools.StorageTool", "format", "--cluster-id", self._cluster_id, "--config", str(self.settings))


class Cluster:
    """A cluster of three in a directory."""

    def __init__(self, directory: Path) -> None:
        cluster_id = new_cluster_id()
        self.nodes = {number: Node(directory / f"kafka-{number}", number, cluster_id) for number in (1, 2, 3)}
        voters = ",".join(f"{number}@127.0.0.1:{node.controller_port}" for number, node in self.nodes.items())
        for node in self.nodes.values():
            node.properties["controller.quorum.voters"] = voters

    def __enter__(self) -> Self:
        for node in self.nodes.values():
            node.launch()
        for node in self.nodes.values():
            node.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes.values():
            node.kill()

    @property
    def bootstrap(self) -> str:
        """All of them, for clients."""
        return ",".join(node.bootstrap for node in self.nodes.values())

    def coordinator(self, transactional_id: str) -> int:
        """Which node coordinates a transactional id's transactions."""
        alive = next(node for node in self.nodes.values() if node.running)
        said = alive.tool(
            "org.apache.kafka.tools.TransactionsCommand",
            *("--bootstrap-server", self.bootstrap, "describe", "--transactional-id", transactional_id),
        )
        headings, values = (line.split("\t") for line in said.strip().splitlines()[-2:])
        found = dict(zip((heading.strip() for heading in headings), values, strict=False))
        return int(found["CoordinatorId"])
