"""Draw one figure of a report: `python -P plot.py REPORT.json PICTURE.svg`, in the environment that has matplotlib.

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

OURS, OTHERS = "#1f6feb", "#8c959f"


def draw(report: dict[str, Any], picture: Path) -> None:
    """Write the picture; the same report gives the same bytes."""
    mpl.rcParams["svg.hashsalt"] = "outbox"
    shown = [one for one in report["series"] if one["figure"] == report["chart"]]
    middles = [statistics.median(one["values"]) for one in shown]
    whiskers = [
        [middle - min(one["values"]) for one, middle in zip(shown, middles, strict=True)],
        [max(one["values"]) - middle for one, middle in zip(shown, middles, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.45 * len(shown)))
    colours = [OURS if one["contender"].startswith("relay") else OTHERS for one in shown]
    axes.barh([one["contender"] for one in shown], middles, xerr=whiskers, color=colours, ecolor="#24292f", capsize=3)
    axes.invert_yaxis()
    unit = f", {shown[0]['unit']}" if shown[0]["unit"] else ""
    axes.set_xlabel(f"{report['chart']}{unit}")
    axes.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    text = picture.read_text()
    picture.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
