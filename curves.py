"""The curves of a training run, from its log.jsonl.

python curves.py runs/mine          # runs/mine/curves.png, again or for the first time
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import plots
from plots import BLACK, BLUE, ORANGE, QUADRANT_STYLE, VERMILION, Floats, Row, canvas, spread
from storage import log_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _series(rows: Sequence[Row], *keys: str) -> tuple[Floats, Floats]:
    """Steps and values of the rows that have a step and, under the nested keys, a finite number."""
    found = []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if "step" in row and isinstance(value, int | float) and math.isfinite(value):
            found.append((row["step"], value))
    table = np.array(found, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _draw_line(
    axes: Axes, steps: Floats, values: Floats, color: str, marker: str, words: str, windows: int
) -> None:
    """The values, pale, under their centred running mean over 1/`windows` of the run."""
    half = len(values) // (2 * windows)
    if half:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        values = np.convolve(values, np.ones(2 * half + 1) / (2 * half + 1), mode="valid")
        steps = steps[half:-half]
    axes.plot(
        steps,
        values,
        color=color,
        linewidth=1.8,
        marker=marker,
        markersize=5,
        markevery=max(1, len(steps) // 8),
        label=words,
    )


def _draw_margins(axes: Axes, rows: Sequence[Row]) -> None:
    """Each quadrant's margin and, dashed and named at the right edge, its last target."""
    targets = {}
    for quadrant, (color, marker, words) in QUADRANT_STYLE.items():
        steps, margins = _series(rows, "quadrants", quadrant, "margin_nats")
        if len(steps):
            _draw_line(axes, steps, margins, color, marker, words, windows=25)
        target = _series(rows, "quadrants", quadrant, "target_nats")[1]
        if len(target):
            targets[quadrant] = float(target[-1])
            axes.axhline(target[-1], color=color, linestyle="--", linewidth=1.3)
    gap = 0.06 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    for quadrant, height in zip(targets, spread(list(targets.values()), gap), strict=True):
        color, marker, words = QUADRANT_STYLE[quadrant]
        axes.plot(
            [1],
            [targets[quadrant]],
            color=color,
            marker=marker,
            clip_on=False,
            transform=axes.get_yaxis_transform(),
        )
        axes.annotate(
            words,
            (1, height),
            (7, 0),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            textcoords="offset points",
            fontsize=9,
            color=BLACK,
            annotation_clip=False,
        )
    axes.set(title="margin by safety quadrant (dashed: its target)", ylabel="margin h (nats)")


def draw(log_rows: Sequence[Row], path: Path) -> None:
    """The curves of a run from the rows of its log.jsonl: a panel for every group of keys that is
    there.

    Preference runs: each quadrant's margin and target, loss, change of the log-probabilities,
    learning rate. SFT: loss and learning rate. Thick lines are running means over 1/25 of the run.
    No row: it says so.
    """
    preference = any("quadrants" in row for row in log_rows)
    groups = [
        (
            "loss",
            "loss per pair" if preference else "loss (nats per token)",
            [
                ("loss", "total", BLACK, ""),
                ("safety_loss", "safety pairs", BLUE, "o"),
                ("helpfulness_loss", "helpfulness pairs", ORANGE, "^"),
            ],
        ),
        (
            "log-probability of the answers, change since step 0",
            "nats per answer",
            [
                ("chosen_logprob_change_nats", "chosen (more helpful)", BLUE, "o"),
                ("rejected_logprob_change_nats", "rejected", VERMILION, "D"),
            ],
        ),
        ("learning rate", "learning rate", [("lr", "learning rate", BLACK, "")]),
    ]
    groups = [
        group for group in groups if any(len(_series(log_rows, key)[0]) for key, *_ in group[2])
    ]
    count = len(groups) + preference
    figure, panels = canvas(12, 3.9 * max(1, math.ceil(count / 2)), max(1, math.ceil(count / 2)), 2)
    if preference:
        _draw_margins(panels[0], log_rows)
    for axes, (title, unit, lines) in zip(panels[int(preference) :], groups, strict=False):
        for key, words, color, marker in lines:
            steps, values = _series(log_rows, key)
            if len(steps):
                windows = len(values) if key == "lr" else 25
                _draw_line(axes, steps, values, color, marker, words, windows)
        axes.set(title=title, ylabel=unit)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=9)
    for axes in panels[:count]:
        axes.set_xlabel("optimizer step")
    for axes in panels[count:]:
        axes.set_axis_off()
    if not count:
        panels[0].text(0.5, 0.5, "no step logged", ha="center", transform=panels[0].transAxes)
    plots.save(figure, path)


def main(arguments: Sequence[str]) -> None:
    """python curves.py RUN_FOLDER: curves.png again, or for the first time, from the folder's
    log.jsonl.
    """
    folder = Path(arguments[0] if len(arguments) == 1 else "")
    if not (folder / "log.jsonl").is_file():
        sys.exit("usage: python curves.py RUN_FOLDER, a folder with log.jsonl")
    draw(log_rows(folder / "log.jsonl"), folder / "curves.png")
    print(folder / "curves.png")


if __name__ == "__main__":
    main(sys.argv[1:])
