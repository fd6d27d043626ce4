"""The benchmarks work: small ones, judged by what was delivered and never by how fast."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import pytest

import bench.__main__
from bench import (
    backfill,
    document,
    drain,
    growth,
    hot,
    idle,
    install,
    latency,
    limits,
    measure,
    owner,
    read_model,
    reconcile,
)
from bench.__main__ import PARTS, main
from bench.contender import Contender, prepared
from bench.measure import Usage, turned
from bench.options import Options
from bench.part import Part
from bench.relay import Relay
from bench.report import Ratio, Report, Series
from bench.servers import Servers, servers
from bench.topics import Delivered
from bench.view import View
from bench.workload import Load
from devstack.processes import Child, ServerError
from outbox.config import Config
from outbox.reader import Reader


def asked(*peers: str, entries: int = 1) -> Options:
    """The smallest run of a part."""
    return Options(
        "here", entries=entries, rounds=1, warm_up=0, seconds=60, stage_seconds=1, peers=peers, view=View(quiet=True)
    )


@pytest.mark.acceptance
def test_a_small_drain_delivers_every_entry_and_measures_the_relay_and_the_limit() -> None:
    """Servers, filling, the relay as a process, the count of what can be read, usage, COPY; no other Java peers."""
    report = drain.run(asked("relay", "COPY", entries=2000))
    assert report.of("relay", "records") == [2000]
    # The system counts CPU in hundredths of a second: COPY of so little may take none.
    assert all(value > 0 for one in report.series for value in one.values if one.unit != "s")
    assert report.of("relay", drain.CPU)[0] > 0
    assert {one.contender for one in report.series} == {"relay", "COPY"}
    # Nothing is said of whom nobody asked for.
    assert not any("Connect" in note for note in report.notes)
    assert not any("in 1 transactions" in note for note in report.notes)


@pytest.mark.acceptance
def test_a_small_growth_drains_outboxes_with_a_past_and_finds_no_row_that_publishing_left_dead() -> None:
    """Three of the pasts, in one run; a row that is read without an index, or not delivered, would fail it."""
    report = growth.run(asked(growth.AGAIN, growth.WIDE, growth.OPEN, growth.RING, growth.LATE, entries=200))
    names = ("fresh again", "wide", "open", "ring", "late")
    assert {one.contender for one in report.series} == {f"relay, {name}" for name in ("fresh", *names)}
    assert {one.name for one in report.ratios} == {f"rate: {name} / fresh" for name in names}
    # Fetched once for each entry; a late one is found by its transaction.
    assert 1 <= report.of("relay, late", "rows looked at for an entry")[0] < 10
    assert all(report.of(f"relay, {name}", column) == [0] for name in names for column in growth.DEAD)


@pytest.mark.acceptance
def test_a_small_owner_times_every_variant_beside_the_plain_insert() -> None:
    """Nothing but stock pgbench, a second a run; the verdicts are for the greatest number of clients."""
    report = owner.run(asked(owner.OFF, owner.BUSY, owner.BULK))
    titles = {one.title for one in [*owner.variants(), *owner.bulk()]}
    assert {one.contender.partition(",")[0] for one in report.series} == titles
    assert all(0 < value < 100 for one in report.series for value in one.values if one.unit != "ms")
    judged = [one for one in report.ratios if one.aim is not None]
    assert len(judged) == 2 * (3 + 3 + 1)
    # What a running relay costs everybody, with each number of clients and kind of commit.
    assert len(report.ratios) - len(judged) == 4


@pytest.mark.acceptance
def test_a_small_hot_run_writes_fewer_records_than_entries() -> None:
    """The same relay, hot keys and distinct ones."""
    report = hot.run(asked("relay", entries=5000))
    assert report.of(hot.DISTINCT, "records") == [5000]
    assert hot.KEYS <= report.of("relay", "records")[0] < 5000
    assert [one.name for one in report.ratios] == ["rate: hot keys / distinct keys"]


@pytest.mark.acceptance
def test_a_small_latency_run_times_every_stage_and_the_bare_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers, a consumer, the relay's own steps; the stage whose rate was not kept would have no verdict."""
    monkeypatch.setattr(latency, "_WARM_SECONDS", 0.2)
    report = latency.run(asked("relay", "bare"))
    stages = {stage.name for stage in latency.STAGES}
    assert {one.contender for one in report.series if one.figure == "p99"} == {
        *(f"relay, {stage}" for stage in stages),
        f"{latency.BARE_NAME}, {latency.IDLE}",
    }
    for stage in stages:
        middle, most = (report.of(f"relay, {stage}", f"{name} from before the insert")[0] for name in ("p50", "max"))
        assert 0 < report.of(f"relay, {stage}", "p50")[0] < middle <= most
    assert [panel.title for panel in report.panels] == [stage.name for stage in latency.STAGES]
    assert sum("wake-up" in note and "%" in note for note in report.notes) == len(stages)


@pytest.mark.acceptance
def test_a_peer_that_does_not_deliver_in_a_stage_loses_its_own_figures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are said to be missing; a relay that does not deliver ends the run."""
    monkeypatch.setattr(latency, "_WARM_SECONDS", 0.2)
    changes, failing = latency.Traffic.changes, "peer"

    def failing_changes(traffic: latency.Traffic, contender: Contender, stage: latency.Stage) -> latency.Latencies:
        if contender.name == failing and stage.rate == 1000:
            raise ServerError("7 of 1200 changes were received.")
        return changes(traffic, contender, stage)

    def contenders(those: Servers, _chosen: Sequence[str]) -> list[Contender]:
        made = {name: partial(Relay, those, name=name) for name in ("peer", "relay")}
        return prepared(made, ["peer", "relay"], those.stack)

    monkeypatch.setattr(latency.Traffic, "changes", failing_changes)
    monkeypatch.setattr(latency, "contenders", contenders)
    report = latency.run(asked("relay"))
    assert {one.contender for one in report.series if one.contender.startswith("peer")} == {
        "peer, idle",
        "peer, 5,000/s",
    }
    assert any("peer, 1,000/s: no figures; in one round 7 of 1200" in note for note in report.notes)
    failing = "relay"
    with pytest.raises(ServerError, match="7 of 1200"):
        latency.run(asked("relay"))


@pytest.mark.acceptance
def test_a_small_idle_run_counts_cpu_and_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that sleeps, and the servers alone."""
    monkeypatch.setattr(idle, "_SETTLE_SECONDS", 0.2)
    report = idle.run(replace(asked("relay"), stage_seconds=3))
    assert {one.contender for one in report.series} == {"relay", idle.NOBODY}
    # A relay looks from time to time; one that asked all the time would not be idle.
    assert 0 < report.of("relay", "statements/s in the database")[0] < 100


@pytest.mark.acceptance
def test_a_small_backfill_delivers_every_row_and_times_live_changes_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table once for each round, as many entries by the drain, COPY, and changes of another type meanwhile."""
    monkeypatch.setattr(latency, "_WARM_SECONDS", 0.2)
    report = backfill.run(asked("backfill", "drain", "COPY", "live", entries=2000))
    assert report.of("relay-backfill", "records") == report.of("relay-drain", "records") == [2000]
    assert {one.contender for one in report.series} == {
        *("relay-backfill", "relay-drain", "COPY"),
        *(backfill.ALONE, backfill.BESIDE),
    }
    assert 0 < report.of(backfill.BESIDE, "p50")[0] <= report.of(backfill.BESIDE, "p99")[0]
    assert report.of(backfill.BESIDE, backfill.MEANWHILE)[0] > 0
    assert sum("% of the time in which changes came" in note for note in report.notes) == 1
    assert [(one.name, one.aim) for one in report.ratios if one.aim is not None] == [
        ("rate: relay-backfill / relay-drain", 1),
        ("idle p99: beside backfills / alone", 3),
    ]


@pytest.mark.acceptance
def test_a_small_reconcile_finds_all_equal_and_is_timed_beside_a_consumer() -> None:
    """Whole processes; a reconcile that found a difference, or a consumer that missed a record, would fail it."""
    report = reconcile.run(asked("reconcile", "sample", "consumer", entries=2000))
    assert {one.contender for one in report.series} == set(reconcile.NAMES.values())
    assert all(report.of(who, "seconds")[0] > 0 for who in reconcile.NAMES.values())
    assert [one.name for one in report.ratios] == ["time: reconcile / a bare consumer"]


@pytest.mark.acceptance
def test_a_contender_that_dies_ends_the_wait_at_once(tmp_path: Path) -> None:
    """Not only after the time that it may take; its log is shown."""

    class Killed(Relay):
        def begin(self) -> None:
            super().begin()
            assert self._child is not None
            self._child.send(signal.SIGKILL)

    with servers(tmp_path) as those:
        relay = Killed(those)
        those.stack.callback(relay.close)
        relay.prepare()
        with pytest.raises(ServerError, match=r"The relay ended by itself \(exit code -9\)"):
            drain.drain_once(relay, Load(10, 10), those, seconds=600, told=lambda _: None)


def test_a_contender_that_lost_doubled_or_held_back_something_is_refused() -> None:
    """Figures of a contender that did not do the work are worth nothing."""
    load = Load(3, 2)
    right = [(b"c1", 1), (b"c0", 2), (b"c1", 3)]

    def judged(records: list[tuple[bytes, int]], *, collapsed: bool = False) -> None:
        delivered = Delivered()
        for key, version in records:
            delivered.take(key, b'{"version":%d,"note":""}' % version)
        load.check(delivered, exactly_once=True, collapsed=collapsed, who="somebody")

    judged(right)
    judged(right[1:], collapsed=True)
    for wrong in (right[1:], right + right[2:], [right[2], right[1], right[0]], right[:2]):
        with pytest.raises(ServerError, match="somebody delivered wrongly"):
            judged(wrong)


def found(part: str = "drain", *, at: str = "2026-01-01", lacks: Sequence[str] = ()) -> Report:
    """A report with a few figures."""
    report = Report(part, part.title(), "here", {"entries": 1}, at=at, lacks=list(lacks))
    report.series += [Series("relay", "entries/s", "", [3.0, 4.0, 5.0]), Series("other", "entries/s", "", [0.25, 0.5])]
    report.ratio("rate", [3.0, 4.0, 5.0], [1.0, 1.0, 1.0], aim=4)
    return report


def test_a_report_is_kept_and_its_section_is_replaced_in_the_page(tmp_path: Path) -> None:
    """The text around the marks is people's and stays."""
    report = found()
    page = tmp_path / "performance.md"
    page.write_text("# Mine\n\n<!-- bench:drain -->\nold\n<!-- /bench:drain -->\n\nAlso mine.\n")
    assert Report.load(report.save(tmp_path)) == report
    assert document.write(list(PARTS), page, tmp_path) == (["drain"], [])
    text = page.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("\nAlso mine.\n")
    assert "old" not in text
    assert "| rate | 4.00 (3.00 to 5.00) | at least 4 | met |" in text
    assert json.dumps(report.as_json())


def test_a_trial_is_kept_apart_and_does_not_come_into_the_page(tmp_path: Path) -> None:
    """It is named, unless a full run is newer; what has no figures is not kept at all."""
    page = tmp_path / "performance.md"
    found(at="2026-01-02", lacks=["no warm-up"]).save(tmp_path)
    assert document.write(["drain"], page, tmp_path) == ([], ["drain of 2026-01-02, a trial: no warm-up"])
    assert not page.exists()
    found(at="2026-01-01").save(tmp_path)
    assert document.write(["drain"], page, tmp_path) == (["drain"], ["drain of 2026-01-02, a trial: no warm-up"])
    found(at="2026-01-03").save(tmp_path)
    assert document.write(["drain"], page, tmp_path) == (["drain"], [])
    with pytest.raises(ServerError, match="found no figures"):
        Report("hot", "Hot", "here", {}).save(tmp_path)
    (tmp_path / "drain.json").write_text('{"part": "drain", "series": [], "chart": "p50"}')
    found("hot").save(tmp_path)
    written, left_out = document.write(["drain", "hot"], page, tmp_path)
    assert written == ["hot"]
    assert "measure the part again" in left_out[0]


def test_only_a_run_of_everything_that_is_large_enough_is_a_full_one() -> None:
    """The defaults are; each thing that is missing is named."""
    part = Part("part", lambda _: found(), ("a", "b"), by_entries=True, stage_seconds=10)
    full = Options("here", entries=1_000_000, rounds=3, warm_up=1, seconds=600, stage_seconds=10, peers=("b", "a"))
    assert part.lacks(full) == []
    assert part.lacks(replace(full, entries=999_999)) == ["999,999 entries instead of 1,000,000"]
    assert part.lacks(replace(full, rounds=2)) == ["rounds: 2 instead of 3 at least"]
    assert part.lacks(replace(full, warm_up=0)) == ["no warm-up"]
    assert part.lacks(replace(full, stage_seconds=5)) == ["stages of 5 s instead of 10"]
    assert part.lacks(replace(full, peers=("a",))) == ["without b"]
    assert replace(part, by_entries=False).lacks(replace(full, entries=1)) == []


def test_a_missed_aim_says_by_how_much() -> None:
    """As a share of the aim, by the median; however little it is."""

    def shown(ratio: Ratio) -> str:
        report = found()
        report.ratios = [ratio]
        return report.markdown().splitlines()[-1].split("|")[-2].strip()

    assert shown(Ratio("r", [3.0, 3.6, 9.0], aim=4)) == "**missed by 10%**"
    assert shown(Ratio("r", [0.486], aim=0.45, at_least=False)) == "**missed by 8.0%**"
    assert shown(Ratio("r", [1.03001], aim=1.03, at_least=False)) == "**missed by less than 0.1%**"
    assert shown(Ratio("r", [9.0], aim=4, at_least=False)) == "**missed by 125%**"
    assert shown(Ratio("r", [4.0], aim=4)) == "met"
    assert shown(Ratio("r", [4.0])) == ""


def test_a_report_is_drawn_panel_by_panel(tmp_path: Path) -> None:
    """By matplotlib, in the environment that the benchmarks have of their own; the same report, the same bytes."""
    try:
        install.python_packages()
    except (ServerError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"matplotlib cannot be installed here: {error}")
    report = found()
    report.panel("entries/s")
    report.panel("entries/s")
    report.save(tmp_path)
    drawn = []
    for name in ("one", "two"):
        page = tmp_path / name / "performance.md"
        page.parent.mkdir()
        assert document.write(["drain"], page, tmp_path) == (["drain"], [])
        assert "](performance-drain.svg)" in page.read_text()
        drawn.append((page.parent / "performance-drain.svg").read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].count(b'id="axes_') == 2


@pytest.mark.postgres
def test_the_limit_is_read_with_the_planner_settings_of_the_relay(outbox_database: str) -> None:
    """Otherwise it would sort, or walk the whole log, where the relay does not."""
    reader = Reader(Config(database_url=outbox_database), shard=0)
    reader.open()
    try:
        asked_for = reader._open().execute(
            "SELECT name, setting FROM pg_settings"
            " WHERE source = 'session' AND (name LIKE 'enable_%' OR name LIKE 'jit%')"
        )
        assert dict(asked_for.fetchall()) == limits.PLANNER
    finally:
        reader.close()


def test_each_round_has_another_order() -> None:
    """Those of the warm-up, which have negative numbers, too: who comes after whom changes as well."""
    orders = ["".join(turned("abc", number)) for number in range(-1, 6)]
    assert orders == ["bac", "abc", "acb", "cab", "cba", "bca", "bac"]
    assert turned([], 7) == []


def test_without_a_part_all_are_run_and_one_that_fails_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each is kept as it ends; the page is written; the exit code and the last line say that something failed."""
    commands: list[str] = []

    def failing(options: Options) -> Report:
        commands.append(options.command)
        raise ServerError("no server")

    parts = [Part("first", failing, ("a",)), Part("second", lambda _: found("second"), ("a",))]
    monkeypatch.setattr(bench.__main__, "PARTS", {one.name: one for one in parts})
    monkeypatch.setattr(Report, "save", lambda report: tmp_path / report.part)
    monkeypatch.setattr(document, "write", lambda names: (names, []))
    assert main(["--rounds", "1"]) == 1
    said = capsys.readouterr().err
    assert "first failed: no server" in said
    assert f"kept in {tmp_path / 'second'}" in said
    assert said.endswith("Failed: first.\n")
    assert commands == ['make bench ARGS="--rounds 1"']
    assert main(["second"]) == 0


def test_the_command_names_the_parts_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped part is answered with the right ones, and so is a mistyped peer."""
    with pytest.raises(SystemExit):
        main(["drian"])
    said = capsys.readouterr().err
    assert all(part in said for part in PARTS)
    for arguments in (["drain", "--peers", "relai"], ["--peers", "relay"]):
        with pytest.raises(SystemExit):
            main(arguments)
    said = capsys.readouterr().err
    assert all(peer in said for peer in drain.PEERS)
    assert "name it" in said


@pytest.mark.acceptance
def test_a_small_read_model_run_loads_updates_and_times_changes() -> None:
    """The real command, and a bare consumer with COPY; each in a database that is gone afterwards."""
    report = read_model.run(asked("model", "limit", entries=2000))
    assert report.of(read_model.MODEL, read_model.UPDATES)[0] > 0
    assert report.of(read_model.STRICTER, read_model.LOAD)[0] >= report.of(read_model.LIMIT, read_model.LOAD)[0]
    assert report.of(read_model.MODEL, read_model.IN_ALL)[0] >= report.of(read_model.MODEL, read_model.MEMORY)[0] > 0
    assert not any("Connect" in note for note in report.notes)
    assert 0 < report.of(read_model.MODEL, read_model.P50)[0] <= report.of(read_model.MODEL, read_model.P99)[0]
    assert [one.aim for one in report.ratios] == [0.5, None, 1.2]


@pytest.mark.postgres
def test_a_load_is_over_only_when_every_row_can_be_read(outbox_database: str) -> None:
    """That the last keys are there is a sign; a row that is missing is waited for all the same."""
    looks = 0
    with psycopg.connect(outbox_database, autocommit=True) as connection:
        connection.execute("CREATE TABLE copied (key text PRIMARY KEY)")
        connection.execute("INSERT INTO copied SELECT 'k' || n FROM generate_series(1, 999) n")

        def check() -> None:
            nonlocal looks
            looks += 1
            if looks == 3:
                connection.execute("INSERT INTO copied VALUES ('k0')")

        awaited = [read_model.Awaited("copied", 1000)]
        with read_model.watching(outbox_database, check) as watch:
            watch.until(awaited, time.monotonic(), 60, "the last row")
            assert watch.size(awaited) > 0
    assert looks == 3


def test_early_memory_is_that_of_the_look_at_which_a_tenth_was_there() -> None:
    """By the size that the tables have in the end, which nobody knows before; in a tiny run, that of the only look."""
    assert read_model.peak_at([(0, 5), (9, 6), (10, 7), (50, 9), (100, 12)], 0.1) == 7
    assert read_model.peak_at([(0, 5)], 0.1) == 5


# Holds memory and waits for another program, which it starts.
_STARTING = """
import subprocess, sys
held = b"x" * int(sys.argv[1])
sys.exit(subprocess.run([sys.executable, "-c", *sys.argv[2:]]).returncode)
"""
# Holds as much and works until a file is there; not longer than who started it.
_STARTED = """
import os, sys, time
held, by = b"x" * int(sys.argv[1]), os.getppid()
while os.getppid() == by and (time.process_time() < 0.5 or not os.path.exists(sys.argv[2])):
    pass
"""


def test_what_a_command_used_is_also_what_the_process_used_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CPU of one that ended before it, memory of both at once; the second one stays until they were looked at."""
    size, seen, look = 100_000_000, tmp_path / "seen", measure.tree_usage

    def looking(pid: int) -> Usage:
        found = look(pid)
        if found.peak_bytes > 2 * size:
            seen.touch()
        return found

    monkeypatch.setattr(measure, "tree_usage", looking)
    command = [sys.executable, "-c", _STARTING, str(size), _STARTED, str(size), str(seen)]
    _, used = measure.run_measured(Child(command, log=tmp_path / "log"), seconds=60, what="the command")
    assert used.peak_bytes > 2 * size
    assert used.cpu_seconds >= 0.5


def test_a_command_that_fails_or_takes_too_long_gives_no_figures(tmp_path: Path) -> None:
    """Its exit code is said; or it is ended."""
    log = tmp_path / "log"
    with pytest.raises(ServerError, match=r"it failed \(exit code 3\)"):
        measure.run_measured(Child([sys.executable, "-c", "raise SystemExit(3)"], log=log), seconds=60, what="it")
    endless = Child([sys.executable, "-c", "while True: pass"], log=log)
    with pytest.raises(ServerError, match=r"it took longer than 0\.1 s"):
        measure.run_measured(endless, seconds=0.1, what="it")
    assert endless.exit_code() is not None


def test_a_wrong_number_is_answered_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """No name of a function comes into it."""
    for name in ("--entries", "--rounds", "--warm-up", "--seconds", "--stage-seconds"):
        for value in ("soon", "-1", "nan"):
            with pytest.raises(SystemExit):
                main([f"{name}={value}"])
            assert f"argument {name}: it must be a" in capsys.readouterr().err
