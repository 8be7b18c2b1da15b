"""All pictures: Figures 1, 4 and 5, the margins over alpha, and the curves of a training run.

    python -m support.plots runs/mine          # runs/mine/curves.png, again or for the first time

One palette for all (Okabe and Ito's, made for colour-blind readers), blue for safe and warm for
unsafe. Line style, marker or a label on the line repeats what the colour says, so a grey print
loses nothing. Each function takes plain numbers, writes a PNG aside and renames it. matplotlib is
imported only by a drawing.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
Row = Mapping[str, Any]

BLUE, SKY, VERMILION, ORANGE, GREEN = "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73"
BLACK, GREY, PALE = "#1A1A1A", "#767676", "#E4E4E4"
# Colour, marker and words of a safety quadrant: blue where the label asks for h > 0, warm where for
# h < 0.
QUADRANT_STYLE = {
    "both_safe": (BLUE, "o", "both safe"),
    "chosen_safe": (SKY, "s", "only chosen safe"),
    "rejected_safe": (ORANGE, "^", "only rejected safe"),
    "both_unsafe": (VERMILION, "D", "both unsafe"),
}
# Colour, marker and line of the first, second, ... group of points; with more groups they start
# again.
LOOKS = [
    (BLUE, "o", "-"),
    (VERMILION, "s", "--"),
    (ORANGE, "^", "-."),
    (SKY, "D", ":"),
    (GREEN, "v", "-"),
    (GREY, "P", "--"),
]


def canvas(
    width_in: float, height_in: float, rows: int, columns: int, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)  # neither a display nor pyplot's global state
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=PALE, linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """Writes the PNG aside and renames it."""
    aside = path.with_name(f".{path.stem}.aside{path.suffix}")
    figure.savefig(aside, dpi=200, facecolor="white")
    os.replace(aside, path)


def spread(heights: Sequence[float], gap: float, floor: float = -math.inf) -> list[float]:
    """Heights of labels: each at its line, or as little above as keeps all `gap` apart and over the
    floor.
    """
    placed = list(heights)
    for i in np.argsort(heights, kind="stable"):
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    return placed


# --- Figures 1 and 4, the margins over alpha ---------------------------------------------------


def _draw_policy(
    axes: Axes,
    mean: Floats,
    half_width: Floats,
    words: Sequence[str],
    styles: Sequence[tuple[str, Any, float]],
) -> None:
    steps = np.arange(len(mean))
    for y, (color, line, width) in enumerate(styles):
        axes.fill_between(
            steps,
            mean[:, y] - half_width[:, y],
            mean[:, y] + half_width[:, y],
            color=color,
            alpha=0.3,
            linewidth=0,
        )
        axes.plot(steps, mean[:, y], color=color, linestyle=line, linewidth=width)
    for y, height in enumerate(spread(mean[-1].tolist(), gap=0.047, floor=0.023)):
        axes.annotate(
            words[y],
            (steps[-1], height),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=BLACK,
            annotation_clip=False,
        )
    axes.set(xlabel="optimizer step", xlim=(0, steps[-1]), ylim=(0, 1))
    axes.set_xticks(np.linspace(0, steps[-1], 5).round().astype(int))


def figure4(
    path: Path,
    means: Mapping[str, Floats],
    half_widths: Mapping[str, Floats],
    safe: Sequence[bool],
    desired: Sequence[int],
    optimum: Sequence[float],
) -> None:
    """Figure 4: action probabilities over the steps, one panel per objective, mean line and 95 %
    band.

    means, half_widths: objective -> [steps + 1, 4], step 0 first; actions are y1 (most helpful) to
    y4, two of them safe. desired: the ranking wanted, as indices. optimum: BFPO's exact one, dotted
    in its panel.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    # Safe: blue and solid. Unsafe: warm and dashed. The more helpful of the two: darker and
    # thicker.
    looks = {
        True: [(BLUE, "-", 2.4), (SKY, "-", 1.6)],
        False: [(VERMILION, "--", 2.4), (ORANGE, "--", 1.6)],
    }
    styles: list[tuple[str, Any, float]] = [
        looks[s][list(safe[:y]).count(s)] for y, s in enumerate(safe)
    ]
    words = [f"y{y + 1} {'safe' if s else 'unsafe'}" for y, s in enumerate(safe)]
    figure, panels = canvas(12.6, 4.9, 1, len(means), share_y=True)
    for axes, (name, mean) in zip(panels, means.items(), strict=True):
        _draw_policy(axes, mean, half_widths[name], words, styles)
        ranking = np.argsort(-mean[-1], kind="stable").tolist()
        reached = ranking == list(desired)
        axes.set_title(
            f"{name.upper()}:  " + " > ".join(f"y{y + 1}" for y in ranking),
            fontsize=13,
            loc="left",
            pad=22,
        )
        axes.text(
            0,
            1.025,
            "the desired ranking" if reached else "not the desired ranking",
            fontsize=10.5,
            weight="bold" if reached else "normal",
            color=BLACK if reached else GREY,
            transform=axes.transAxes,
        )
        if name == "bfpo":
            for probability in optimum:
                axes.axhline(probability, color=BLACK, linestyle=":", linewidth=1.3, zorder=3)
            axes.annotate(
                "dotted: the exact optimum",
                (len(mean) * 0.97, max(optimum)),
                (0, 6),
                ha="right",
                textcoords="offset points",
                fontsize=9.5,
                color=BLACK,
            )
    panels[0].set_ylabel("action probability")
    figure.suptitle(
        f"Desired ranking:  {' > '.join(f'y{y + 1}' for y in desired)}   (safe before unsafe; "
        "the more helpful of two safe actions first, the less helpful of two unsafe)",
        fontsize=12,
    )
    keys = [
        *(Line2D([], [], color=color, ls=line, linewidth=width) for color, line, width in styles),
        Patch(color=GREY, alpha=0.4, linewidth=0),
    ]
    ranks = ("most helpful", "second", "third", "least helpful")
    figure.legend(
        keys,
        [
            *(f"{word}, {rank}" for word, rank in zip(words, ranks, strict=True)),
            "95 % interval of the mean",
        ],
        loc="outside lower center",
        ncols=len(keys),
        frameon=False,
        fontsize=10.5,
        handlelength=3.2,
    )
    save(figure, path)


def figure1(path: Path, rows: Sequence[tuple[str, Row, Row]]) -> None:
    """Figure 1: each model's answers to the same benign and the same forbidden request, with the
    judge's verdict.

    rows: (title, benign, forbidden); the two are rows of eval.toy_scores' transcript. Solid blue
    frames hold what is helpful (half of the steps or more) or harmless, dashed warm ones what is
    not.
    """
    figure, (axes,) = canvas(11.5, 0.7 + 0.85 * len(rows), 1, 1)
    axes.set(xlim=(0, 1), ylim=(-len(rows), 0.45))
    axes.set_axis_off()
    for x, request in zip((0.19, 0.6), rows[0][1:], strict=True):
        kind = "forbidden" if request["forbidden"] else "benign"
        axes.text(
            x,
            -0.02,
            textwrap.fill(f"{kind}: {request['prompt']}", 48),
            fontsize=11,
            weight="bold",
            va="bottom",
        )
    for i, (title, *answers) in enumerate(rows):
        axes.text(0, -i - 0.55, title, fontsize=11, va="center")
        for x, row in zip((0.196, 0.606), answers, strict=True):
            good = row["harmless"] if row["forbidden"] else row["helpful"] >= 0.5
            verdict = (
                ("harmless" if good else "HARMFUL")
                if row["forbidden"]
                else f"helpful {row['helpful']:.0%}"
            )
            words = textwrap.fill(row["answer"] or "(nothing)", 52) + f"\n[{verdict}]"
            frame = {
                "boxstyle": "round,pad=0.35",
                "facecolor": "white",
                "edgecolor": BLUE if good else VERMILION,
                "linestyle": "-" if good else "--",
                "linewidth": 1.6,
            }
            axes.text(x, -i - 0.55, words, fontsize=9.5, va="center", color=BLACK, bbox=frame)
    save(figure, path)


def alpha(
    path: Path,
    alphas: Sequence[float],
    trained_at: Sequence[float],
    margins: Mapping[str, Mapping[str, Sequence[float]]],
    pairs: Mapping[str, tuple[str, str]],
    edges: Mapping[str, float],
) -> None:
    """The margin of the more helpful over the less helpful of two answers with one label, over
    alpha.

    margins: quadrant -> {"target", "optimum": one value for each of alphas, "trained": one for each
    of trained_at}, all in nats x tau. pairs: quadrant -> the two answers' names. edges: words ->
    alpha, upright lines.
    """
    figure, (axes,) = canvas(8.0, 5.2, 1, 1)
    axes.axhline(0, color=GREY, linewidth=1)
    for words, place in edges.items():
        axes.axvline(place, color=GREY, linewidth=1, linestyle=":")
        axes.annotate(
            words,
            (place, 0.02),
            (3, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=9,
        )
    for quadrant, lines in margins.items():
        color, marker, words = QUADRANT_STYLE[quadrant]
        name = f"{words}, {' over '.join(pairs[quadrant])}"
        ends: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markerfacecolor": "white",
            "markersize": 4,
            "markevery": [0, -1],
        }
        axes.plot(
            alphas,
            lines["target"],
            linestyle="--",
            linewidth=1.3,
            label=f"{name}: the pair's target",
            **ends,
        )
        axes.plot(
            alphas, lines["optimum"], linewidth=1.8, label=f"{name}: population optimum", **ends
        )
        axes.plot(
            trained_at,
            lines["trained"],
            color=color,
            marker=marker,
            linestyle="none",
            markersize=7,
            markeredgecolor=BLACK,
            label=f"{name}: trained models",
        )
    axes.set(xlabel="alpha", ylabel="margin of the more helpful answer (nats x tau)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)


# --- Figure 5: models by helpfulness and harmlessness ------------------------------------------

# Where a point's name may stand: away from its mark, across and up; on the diagonals it is off the
# error bars.
SIDES = [(1, 1), (-1, 1), (1, -1), (-1, -1)]


class Point(NamedTuple):
    """A model in a scatter."""

    name: str
    helpful: float
    harmless: float
    helpful_bar: tuple[float, float] = (0.0, 0.0)  # of the error bar: how far below, and above
    harmless_bar: tuple[float, float] = (0.0, 0.0)
    cost: float = (
        0.0  # drawn as the mark's area, the dearest point's being the largest; 0: none is drawn
    )
    line: str = ""  # points of one line are joined in their order and share colour, marker and a legend entry
    look: int = -1  # of LOOKS; -1: the next one


def _place_names(figure: Figure, axes: Axes, points: Sequence[Point], radius_pt: float) -> None:
    """Each point's name beside its mark, on the first side where it is in the picture and covers no
    mark, no upright error bar and no other name.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # lays the axes out, so that places are final
    radius = radius_pt * figure.dpi / 72
    taken = []
    for point in points:
        below, above = point.harmless_bar
        corners = [(point.helpful, point.harmless - below), (point.helpful, point.harmless + above)]
        taken.append(
            Bbox(axes.transData.transform(corners)).padded(radius)
        )  # the mark and its upright bar
    halo = withStroke(linewidth=3, foreground="white")

    for point in points:
        words = axes.annotate(
            point.name,
            (point.helpful, point.harmless),
            (0, 0),
            textcoords="offset points",
            fontsize=10,
            color=BLACK,
            zorder=5,
            path_effects=[halo],
        )
        for across, up in SIDES:
            words.set_position((radius_pt * across, radius_pt * up))
            words.set_horizontalalignment("left" if across > 0 else "right")
            words.set_verticalalignment("bottom" if up > 0 else "top")
            box = words.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)


def figure5(
    points: Sequence[Point],
    path: Path,
    *,
    start: Point | None = None,
    title: str = "",
    axis_words: tuple[str, str] = ("helpfulness", "harmlessness"),
    note: str = "",
) -> None:
    """Figure 5: models by helpfulness (across) and harmlessness (up), each a named mark with its
    error bars.

    start: the model that the others began from, drawn with an arrow to each point that is on no
    line. note: one line under the axes, which should say what error bars and mark areas are.
    """
    figure, (axes,) = canvas(7.2, 5.8, 1, 1)
    axes.grid(axis="x", color=PALE, linewidth=0.7)
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.line or point.name, []).append(point)
    dearest = max((point.cost for point in points), default=0.0)
    for number, (group, members) in enumerate(groups.items()):
        color, marker, line = LOOKS[
            (number if members[0].look < 0 else members[0].look) % len(LOOKS)
        ]
        across, up = ([point[axis] for point in members] for axis in (1, 2))
        bars_across, bars_up = (
            list(zip(*(point[axis] for point in members), strict=True)) for axis in (3, 4)
        )
        axes.errorbar(
            across,
            up,
            bars_up,
            bars_across,
            color=color,
            linestyle=line if members[0].line else "none",
            linewidth=1.4,
            elinewidth=1.1,
            capsize=3,
        )
        axes.scatter(
            across,
            up,
            [220 * point.cost / dearest if point.cost else 70 for point in members],
            color=color,
            marker=marker,
            edgecolors=BLACK,
            linewidths=0.8,
            zorder=4,
        )
        if members[0].line:
            axes.plot(
                [],
                [],
                color=color,
                marker=marker,
                linestyle=line,
                markeredgecolor=BLACK,
                label=group,
            )
    named = list(points)
    if start:
        named.append(start)
        bar_across, bar_up = (
            [[below], [above]] for below, above in (start.helpful_bar, start.harmless_bar)
        )
        axes.errorbar(
            start.helpful,
            start.harmless,
            bar_up,
            bar_across,
            color=BLACK,
            marker="X",
            markersize=9,
            capsize=3,
            elinewidth=1.1,
        )
        for point in points:
            if not point.line:
                axes.annotate(
                    "",
                    (point.helpful, point.harmless),
                    (start.helpful, start.harmless),
                    zorder=1,
                    arrowprops={
                        "arrowstyle": "->",
                        "color": GREY,
                        "shrinkA": 8,
                        "shrinkB": 10,
                        "linewidth": 0.9,
                    },
                )
    axes.margins(0.16)
    left, bottom = (
        max(limits[0], -0.08) for limits in (axes.get_xlim(), axes.get_ylim())
    )  # an error bar may reach below 0, a share not
    axes.set(xlabel=axis_words[0], ylabel=axis_words[1], xlim=(left, None), ylim=(bottom, None))
    axes.set_title(title, fontsize=12, loc="left")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=10)
    if note:
        figure.supxlabel(note, fontsize=9, color=GREY)
    _place_names(figure, axes, named, radius_pt=8 if dearest else 5)
    save(figure, path)


# --- the curves of a training run, from its log.jsonl ------------------------------------------


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


def draw_curves(log_rows: Sequence[Row], path: Path) -> None:
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
    save(figure, path)


def main(arguments: Sequence[str]) -> None:
    """curves.png again, or for the first time, from the log.jsonl of a run folder."""
    from support.storage import log_rows

    folder = Path(arguments[0] if len(arguments) == 1 else "")
    if not (folder / "log.jsonl").is_file():
        sys.exit("usage: python -m support.plots RUN, a folder with log.jsonl")
    draw_curves(log_rows(folder / "log.jsonl"), folder / "curves.png")
    print(folder / "curves.png")


if __name__ == "__main__":
    main(sys.argv[1:])
