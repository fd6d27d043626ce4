"""Draw the panels of a report: `python -P plot.py REPORT.json PICTURE.svg`, in the environment that has matplotlib.

Imports nothing of this project. Bars are medians, whiskers reach from the least to the most of the rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

# A panel's first figure is drawn darkest.
OURS = ("#1f6feb", "#79b1ff", "#b6d4ff")
OTHERS = ("#57606a", "#8c959f", "#c4cbd2")
WHISKERS = "#24292f"
# Inches of a group of bars, and of what stands around a panel.
GROUP, AROUND = 0.3, 0.9


def draw(report: dict[str, Any], picture: Path) -> None:
    """Write the picture; the same report gives the same bytes."""
    mpl.rcParams["svg.hashsalt"] = "outbox"
    heights = [AROUND + GROUP * len(panel["bars"]) * (1 + len(panel["figures"])) / 2 for panel in report["panels"]]
    figure, rows = plt.subplots(
        len(heights), figsize=(8, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for panel, axes in zip(report["panels"], rows[:, 0], strict=True):
        draw_panel(panel, report["series"], axes)
    figure.savefig(picture, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    text = picture.read_text()
    picture.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def draw_panel(panel: dict[str, Any], series: list[dict[str, Any]], axes: Any) -> None:
    """A group of bars for each contender, a bar of it for each figure."""
    found = {(one["contender"], one["figure"]): one for one in series}
    figures, base = panel["figures"], panel["base"]
    height = 0.8 / len(figures)
    for place, name in enumerate(figures):
        shown = [(row, who, found[who, name]) for row, who in enumerate(panel["bars"]) if (who, name) in found]
        middles = [statistics.median(one["values"]) for _, _, one in shown]
        whiskers = [
            [middle - min(one["values"]) for (_, _, one), middle in zip(shown, middles, strict=True)],
            [max(one["values"]) - middle for (_, _, one), middle in zip(shown, middles, strict=True)],
        ]
        axes.barh(
            [row + (place - (len(figures) - 1) / 2) * height for row, _, _ in shown],
            [middle - base for middle in middles],
            height=height,
            left=base,
            xerr=whiskers,
            color=[(OURS if who in panel["ours"] else OTHERS)[place % len(OURS)] for _, who, _ in shown],
            ecolor=WHISKERS,
            capsize=2,
        )
    axes.set_yticks(range(len(panel["bars"])), panel["bars"].values())
    axes.invert_yaxis()
    if base:
        axes.axvline(base, color=WHISKERS, linewidth=0.8)
    unit = next((one["unit"] for (who, name), one in found.items() if who in panel["bars"] and name in figures), "")
    # From dark to light, as the bars of a group from the top.
    axes.set_xlabel(", ".join(figures) + (f"; {unit}" if unit else ""))
    axes.set_title(panel["title"], loc="left", fontsize="medium")
    # As many digits as the steps need: 1,000,000, or 0.25.
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
