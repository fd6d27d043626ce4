"""The benchmarks work: small ones, judged by what was delivered and never by how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import document, drain, growth, owner
from bench.__main__ import PARTS, main
from bench.options import Options
from bench.report import Report
from bench.topics import Delivered
from bench.view import View
from bench.workload import Load
from devstack.processes import ServerError


@pytest.mark.acceptance
def test_a_small_drain_delivers_every_entry_and_measures_the_relay_and_the_limit() -> None:
    """Servers, filling, the relay as a process, the count of what can be read, usage, COPY; no other Java peers."""
    report = drain.run(
        Options("here", entries=2000, rounds=1, warm_up=0, seconds=60, stage_seconds=1, peers=("relay", "COPY"),
                view=View(quiet=True))
    )  # fmt: skip
    assert report.of("relay", "records") == [2000]
    assert all(value > 0 for one in report.series for value in one.values)
    assert {one.contender for one in report.series} == {"relay", "COPY"}


@pytest.mark.acceptance
def test_a_small_growth_drains_outboxes_with_a_past_and_finds_no_row_that_publishing_left_dead() -> None:
    """Two of the pasts, in one run: a ring that went round, and a transaction that stays open."""
    report = growth.run(
        Options("here", entries=200, rounds=1, warm_up=0, seconds=60, stage_seconds=1,
                peers=(growth.FRESH, growth.OPEN, growth.RING), view=View(quiet=True))
    )  # fmt: skip
    assert {one.contender for one in report.series} == {"relay, fresh", "relay, open", "relay, ring"}
    assert {one.name for one in report.ratios} == {"rate: open / fresh", "rate: ring / fresh"}
    assert report.of("relay, ring", "rows read without an index") == [0]
    assert any(note.endswith("in all of them: 0.") for note in report.notes)


@pytest.mark.acceptance
def test_a_small_owner_times_every_variant_beside_the_plain_insert() -> None:
    """Nothing but stock pgbench, a second a run; the verdicts are for the greatest number of clients."""
    report = owner.run(
        Options("here", entries=1, rounds=1, warm_up=0, seconds=60, stage_seconds=1, peers=(owner.OFF, owner.BULK),
                view=View(quiet=True))
    )  # fmt: skip
    titles = {one.title for one in owner.variants()}
    assert {one.contender.partition(",")[0] for one in report.series} == titles
    assert all(0 < value < 100 for one in report.series for value in one.values)
    assert len(report.ratios) == 2 * (3 + 1)


def test_a_contender_that_lost_doubled_or_held_back_something_is_refused() -> None:
    """Figures of a contender that did not do the work are worth nothing."""
    load = Load(3, 2)
    right = [(b"c1", 1), (b"c0", 2), (b"c1", 3)]

    def judged(records: list[tuple[bytes, int]], *, collapsed: bool = False) -> None:
        delivered = Delivered()
        for key, version in records:
            delivered.take(key, b'{"version":%d,"note":""}' % version, versions=True)
        load.check(delivered, exactly_once=True, collapsed=collapsed, who="somebody")

    judged(right)
    judged(right[1:], collapsed=True)
    for wrong in (right[1:], right + right[2:], [right[2], right[1], right[0]], right[:2]):
        with pytest.raises(ServerError, match="somebody delivered wrongly"):
            judged(wrong)


def test_a_report_is_kept_and_its_section_is_replaced_in_the_page(tmp_path: Path) -> None:
    """The text around the marks is people's and stays."""
    report = Report("drain", "Drain", "here", {"entries": 1})
    report.ratio("rate", [3.0, 4.0, 5.0], [1.0, 1.0, 1.0], aim=4)
    page = tmp_path / "performance.md"
    page.write_text("# Mine\n\n<!-- bench:drain -->\nold\n<!-- /bench:drain -->\n\nAlso mine.\n")
    assert Report.load(report.save(tmp_path)) == report
    assert document.write(list(PARTS), page, tmp_path) == ["drain"]
    text = page.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("\nAlso mine.\n")
    assert "old" not in text
    assert "| rate | 4.00 (3.00 to 5.00) | at least 4 | met |" in text
    assert json.dumps(report.as_json())


def test_the_command_names_the_parts_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped part is answered with the right ones."""
    with pytest.raises(SystemExit):
        main(["drian"])
    said = capsys.readouterr().err
    assert all(part in said for part in PARTS)
