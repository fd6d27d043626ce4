"""One Apache Kafka broker in KRaft mode, broker and controller in one process, in a directory of its own."""

from __future__ import annotations

import base64
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from devstack.install import LIBS, InstallError, java_program
from devstack.processes import (
    LOOPBACK,
    POLL_SECONDS,
    Child,
    ServerError,
    launch_command,
    port_is_free,
    port_of,
    ports_before,
    remember_ports,
    tail,
)

START_SECONDS = 90.0
STOP_SECONDS = 60.0
LOGGING = Path(__file__).with_name("log4j2.xml")

DEFAULT_PROPERTIES: Mapping[str, str] = {
    # One broker: nothing can have more than one replica.
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # 50 partitions each by default: made at the first transaction and the first group, loaded at each start.
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "group.initial.rebalance.delay.ms": "0",
    # A misspelt topic must fail, not appear.
    "auto.create.topics.enable": "false",
    # How long a killed broker keeps its successor out. With the default, 9 s, a start after a kill took 12 s.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # Of the heap; 128 MB by default.
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
}

JVM_OPTIONS: Sequence[str] = (
    "-Xms128m",
    "-Xmx512m",
    # Starts sooner and leaves the cores to others, at the price of the broker's peak throughput.
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-Xshare:auto",
    "-Djava.awt.headless=true",
)


def java_command(main_class: str, *arguments: str, jvm: Sequence[str] = (), tmp: Path | None = None) -> list[str]:
    """The command that runs a class of Kafka's jars; `ServerError` when Java or the jars are missing.

    `tmp` is where it may leave files (native libraries unpack themselves, and stay when it is killed).
    """
    try:
        java = java_program()
    except InstallError as error:
        raise ServerError(str(error)) from error
    if not LIBS.is_dir():
        raise ServerError("Kafka is not installed here: run `make setup`.")
    return [
        java,
        *jvm,
        *([f"-Djava.io.tmpdir={tmp}"] if tmp is not None else []),
        f"-Dlog4j2.configurationFile={LOGGING.as_uri()}",
        *("-cp", f"{LIBS}/*", main_class, *arguments),
    ]


def new_cluster_id() -> str:
    """A cluster's id in Kafka's form: 16 random bytes, base64 for URLs, not beginning with a dash."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text


def node_properties(node: int, *, data: Path, port: int, controller_port: int, bootstrap: str) -> dict[str, str]:
    """What one node of a cluster needs to be broker and controller.

    `bootstrap` lists the controllers' `host:port`, comma separated: its own alone, or those of all nodes.
    """
    return {
        "process.roles": "broker,controller",
        "node.id": str(node),
        "listeners": f"PLAINTEXT://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.bootstrap.servers": bootstrap,
        "log.dirs": str(data),
    }


class Kafka:
    """An Apache Kafka broker on 127.0.0.1, without authentication.

    - `directory`: gets `data/` (formatted on the first start), `server.properties` and `kafka.log`. A second
      object on the same directory serves the same data.
    - `properties`: broker settings over `DEFAULT_PROPERTIES`; a dictionary of this object, read at each
      start.
    - `port`: None = the directory's port of before when it is free, else a free one; kept for the life of the
      object.
    - `jvm`: options of the Java machine in place of `JVM_OPTIONS`.
    - `tied`: False lets the broker outlive this process (`make up`).

    As a context manager it starts, and stops in order at the end. Failures raise `ServerError` with the end
    of the log.
    """

    node = 1

    def __init__(
        self,
        directory: Path,
        *,
        properties: Mapping[str, str] = {},
        port: int | None = None,
        jvm: Sequence[str] = JVM_OPTIONS,
        tied: bool = True,
    ) -> None:
        self.directory = directory.absolute()
        self.data = self.directory / "data"
        self.log = self.directory / "kafka.log"
        self.settings = self.directory / "server.properties"
        self.properties = {**DEFAULT_PROPERTIES, **properties}
        self.jvm = tuple(jvm)
        before = ports_before(self.directory)
        self.port = port_of("broker", before) if port is None else port
        self.controller_port = port_of("controller", before)
        self._tied = tied
        self._child: Child | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- what it is ------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the broker that this object started still runs."""
        return self._child is not None and self._child.exit_code() is None

    def wait_gone(self, seconds: float) -> bool:
        """Wait up to `seconds` for the broker to end by itself; whether it has (or did not run)."""
        return self._child is None or self._child.wait(seconds)

    @property
    def pid(self) -> int:
        """The broker's process id. Raises `ServerError` when it does not run."""
        return self.child.pid

    @property
    def child(self) -> Child:
        """The running broker as a process. Raises `ServerError` when it does not run."""
        if self._child is None or self._child.exit_code() is not None:
            raise ServerError(f"The Kafka broker of {self.directory} does not run; its log is {self.log}.")
        return self._child

    @property
    def bootstrap(self) -> str:
        """`host:port` for clients, whether it runs or not."""
        return f"{LOOPBACK}:{self.port}"

    # --- start and stop --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the broker and wait until it answers a request; nothing happens when it runs already.

        The first start formats the storage. Raises `ServerError` when it ends or is not ready in 90 s.
        """
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """The first half of `start`: start the broker without waiting until it answers."""
        if self.running:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write_settings()
        if not (self.data / "meta.properties").is_file():
            self._format()
        self._child = Child(
            java_command("kafka.Kafka", str(self.settings), jvm=self.jvm, tmp=self.directory),
            log=self.log,
            cwd=self.directory,
            tied=self._tied,
            death_signal=signal.SIGKILL,
        )

    def wait_ready(self) -> None:
        """The second half: wait for the first answer. A broker that fails is killed, then it raises."""
        child = self.child
        try:
            self._poll(child)
        except BaseException:
            child.stop(signal.SIGKILL)
            self._child = None
            raise

    def stop(self) -> None:
        """Stop the broker in order and wait for its end; killed after 60 s.

        Nothing happens when it does not run.
        """
        child, self._child = self._child, None
        if child is not None:
            child.stop(signal.SIGTERM, seconds=STOP_SECONDS)

    def kill(self) -> None:
        """Kill the broker with SIGKILL and wait for its end."""
        child, self._child = self._child, None
        if child is not None:
            child.stop(signal.SIGKILL)

    def restart(self) -> None:
        """Stop in order, then start again on the same data and port."""
        self.stop()
        self.start()

    def tool(self, main_class: str, *arguments: str, seconds: float = 120) -> str:
        """Run one of Kafka's command-line classes, such as `org.apache.kafka.tools.TopicCommand`; its output.

        Raises `ServerError` with what it wrote when it fails or takes longer than `seconds`.
        """
        # Of the log, warnings alone, on standard error.
        command = java_command(main_class, *arguments, jvm=(*JVM_OPTIONS, "-Ddevstack.level=WARN"))
        try:
            done = subprocess.run(
                launch_command(command, user=None, tied=True),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=self.directory,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"{main_class} took longer than {seconds:g} s and was ended.") from error
        if done.returncode != 0:
            written = (done.stderr + done.stdout).strip()
            raise ServerError(f"{main_class} failed (exit code {done.returncode}):\n{written}")
        return done.stdout

    # --- inside ----------------------------------------------------------------------------------

    def _write_settings(self) -> None:
        remember_ports(self.directory, {"broker": self.port, "controller": self.controller_port})
        own = node_properties(
            self.node,
            data=self.data,
            port=self.port,
            controller_port=self.controller_port,
            bootstrap=f"{LOOPBACK}:{self.controller_port}",
        )
        lines = [f"{name}={value}\n" for name, value in {**own, **self.properties}.items()]
        self.settings.write_text("# Written by devstack at each start.\n" + "".join(lines))

    def _format(self) -> None:
        # What an interrupted format left would be refused.
        shutil.rmtree(self.data, ignore_errors=True)
        self.tool(
            "kafka.tools.StorageTool",
            *("format", "--standalone", "--cluster-id", new_cluster_id(), "--config", str(self.settings)),
        )

    def _poll(self, child: Child) -> None:
        deadline = time.monotonic() + START_SECONDS
        client: AdminClient | None = None
        while True:
            code = child.exit_code()
            if code is not None:
                raise ServerError(
                    f"Kafka ended at its start (exit code {code}). The end of its log, {self.log}:\n{tail(self.log)}"
                )
            # A client only once the port is served: librdkafka's backoff would make the wait longer.
            if not port_is_free(self.port):
                client = client or AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
                try:
                    if client.list_topics(timeout=1).brokers:
                        return
                except KafkaException:
                    pass
            if time.monotonic() > deadline:
                raise ServerError(
                    f"Kafka does not answer on port {self.port} after {START_SECONDS:g} s. "
                    f"The end of its log, {self.log}:\n{tail(self.log)}"
                )
            time.sleep(POLL_SECONDS)
