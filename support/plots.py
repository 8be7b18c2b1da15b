"""All pictures: Figures 1, 4 and 5, the margins over alpha, and the curves of a training run.

    python -m support.plots runs/mine          # runs/mine/curves.png, again or for the first time

One palette for all (Okabe and Ito's, made for colour-blind readers): blue for safe, warm for
unsafe. Line style, marker or a label repeats what the colour says, so a grey print loses nothing.
Each function takes plain numbers and writes a PNG. matplotlib is imported only by a drawing.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from support.storage import log_rows, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
Row = Mapping[str, Any]

BLUE, SKY, VERMILION, ORANGE, GREEN = "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73"
BLACK, GREY, PALE = "#1A1A1A", "#767676", "#E4E4E4"
# Colour, marker and words of a safety quadrant: blue where the label asks for h > 0, warm where it
# asks for h < 0.
QUADRANT_STYLE = {
    "both_safe": (BLUE, "o", "both safe"),
    "chosen_safe": (SKY, "s", "only chosen safe"),
    "rejected_safe": (ORANGE, "^", "only rejected safe"),
    "both_unsafe": (VERMILION, "D", "both unsafe"),
}
# Colour, marker and line of the first, second, ... group of points. A seventh starts again.
LOOKS = [
    (BLUE, "o", "-"),
    (VERMILION, "s", "--"),
    (ORANGE, "^", "-."),
    (SKY, "D", ":"),
    (GREEN, "v", "-"),
    (GREY, "P", "--"),
]
BELOW: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 10}


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
    """Writes the PNG, whole or not at all."""
    with whole(path) as aside:
        figure.savefig(aside, format="png", dpi=200, facecolor="white")


# --- Figures 4 and 1, the margins over alpha ------------------------------------------------------

OPTIMUM: dict[str, Any] = {"color": BLACK, "linestyle": ":", "linewidth": 1.3}


def name_ends(axes: Axes, step: int, ends: Floats, names: Sequence[str], gap: float) -> None:
    """Name lines at their right ends. Ends closer than `gap` share one text, highest line first."""
    groups: list[list[int]] = []
    for y in np.argsort(-ends, kind="stable"):
        if groups and ends[groups[-1][-1]] - ends[y] < gap:
            groups[-1].append(y)
        else:
            groups.append([y])

    for group in groups:
        axes.annotate(
            "\n".join(names[y] for y in group),
            (step, ends[group].mean()),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            linespacing=1.0,
            annotation_clip=False,
        )


def policy_styles(safe: Sequence[bool]) -> list[dict[str, Any]]:
    """The line of each action, the most helpful first.

    Safe is blue and solid, unsafe warm and dashed. The more helpful of two is darker and thicker.
    """
    left = {
        True: [(BLUE, "-", 2.4), (SKY, "-", 1.6)],
        False: [(VERMILION, "--", 2.4), (ORANGE, "--", 1.6)],
    }
    styles = []
    for is_safe in safe:
        color, line, width = left[is_safe].pop(0)
        styles.append({"color": color, "linestyle": line, "linewidth": width})
    return styles


def draw_policy(
    axes: Axes,
    mean: Floats,
    half_width: Floats,
    names: Sequence[str],
    styles: Sequence[dict[str, Any]],
) -> None:
    """One panel of Figure 4: every action's mean and 95 % band, named where the line ends."""
    steps = np.arange(len(mean))
    for y, style in enumerate(styles):
        low = mean[:, y] - half_width[:, y]
        high = mean[:, y] + half_width[:, y]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.3, linewidth=0)
        axes.plot(steps, mean[:, y], **style)
    name_ends(axes, steps[-1], mean[-1], names, gap=0.033)  # a text's height in probability
    axes.set(xlabel="optimizer step", xlim=(0, steps[-1]), ylim=(-0.05, 1))
    axes.set_xticks(np.linspace(0, steps[-1], 5).round().astype(int))


def order_words(actions: Sequence[int]) -> str:
    """Actions, counted from 0, as y1 > y2 > ..."""
    return " > ".join(f"y{y + 1}" for y in actions)


def title_policy(axes: Axes, name: str, final: Floats, desired: Sequence[int]) -> None:
    """The objective, the ranking that it ends with, and whether that is the desired one."""
    ranking = np.argsort(-final, kind="stable").tolist()
    axes.set_title(f"{name.upper()}:  {order_words(ranking)}", fontsize=13, loc="left", pad=22)
    place = axes.transAxes
    if ranking == list(desired):
        axes.text(0, 1.025, "the desired ranking", transform=place, weight="bold")
    else:
        axes.text(0, 1.025, "not the desired ranking", transform=place, color=GREY)


def figure4(
    path: Path,
    means: Mapping[str, Floats],
    half_widths: Mapping[str, Floats],
    safe: Sequence[bool],
    desired: Sequence[int],
    optimum: Sequence[float],
) -> None:
    """Figure 4: action probabilities over the steps, one panel for each objective.

    means, half_widths: objective -> [steps + 1, 4], step 0 first; actions are y1 (most helpful) to
    y4, two of them safe. desired: the ranking wanted, as indices. optimum: BFPO's exact one, dotted
    in its panel.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    styles = policy_styles(safe)
    names = [f"y{y + 1} {'safe' if is_safe else 'unsafe'}" for y, is_safe in enumerate(safe)]
    figure, panels = canvas(12.6, 5.6, 1, len(means), share_y=True)
    for axes, (objective, mean) in zip(panels, means.items(), strict=True):
        draw_policy(axes, mean, half_widths[objective], names, styles)
        title_policy(axes, objective, mean[-1], desired)
        if objective == "bfpo":
            for probability in optimum:
                axes.axhline(probability, zorder=3, **OPTIMUM)
    panels[0].set_ylabel("action probability")
    figure.suptitle(
        f"Desired ranking:  {order_words(desired)}   (safe before unsafe; the more helpful of two "
        "safe actions first, the less helpful of two unsafe)",
        fontsize=12,
    )

    keys: list[Any] = []
    ranks = ("most helpful", "second", "third", "least helpful")
    for name, rank, style in zip(names, ranks, styles, strict=True):
        keys.append(Line2D([], [], label=f"{name}, {rank}", **style))
    keys.append(Patch(color=GREY, alpha=0.4, linewidth=0, label="95 % interval of the mean"))
    keys.append(Line2D([], [], label="BFPO's exact optimum", **OPTIMUM))
    figure.legend(handles=keys, ncols=len(keys), columnspacing=1.2, **BELOW)
    save(figure, path)


def frame(good: bool) -> dict[str, Any]:
    """The box around an answer of Figure 1."""
    color, line = (BLUE, "-") if good else (VERMILION, "--")
    return {"facecolor": "white", "edgecolor": color, "linestyle": line, "linewidth": 1.6}


def verdict(row: Row) -> tuple[bool, str]:
    """Whether an answer to its request is good, and the judge's words for it."""
    if not row["forbidden"]:
        return row["helpful"] >= 0.5, f"helpful {row['helpful']:.0%}"
    if row["harmless"]:
        return True, "harmless"
    return False, "HARMFUL"


def figure1(path: Path, rows: Sequence[tuple[str, Row, Row]]) -> None:
    """Figure 1: each model's answers to the same benign and the same forbidden request.

    rows: (title, benign, forbidden); the two are rows of toy_scores' transcript. A solid blue box
    holds what is harmless, or helpful in half of the steps or more; a dashed warm one what is not.
    """
    from matplotlib.patches import Patch

    figure, (axes,) = canvas(11.5, 1.1 + 0.85 * len(rows), 1, 1)
    axes.set(xlim=(0, 1), ylim=(-len(rows), 0.45))
    axes.set_axis_off()
    columns = (0.19, 0.6)
    for x, request in zip(columns, rows[0][1:], strict=True):
        kind = "forbidden" if request["forbidden"] else "benign"
        words = textwrap.fill(f"{kind}: {request['prompt']}", 48)
        axes.text(x, -0.02, words, fontsize=11, weight="bold", va="bottom")
    for i, (title, *answers) in enumerate(rows):
        middle = -i - 0.55
        axes.text(0, middle, title, fontsize=11, va="center")
        for x, row in zip(columns, answers, strict=True):
            good, judged = verdict(row)
            words = textwrap.fill(row["answer"] or "(nothing)", 52) + f"\n[{judged}]"
            box = {"boxstyle": "round,pad=0.35", **frame(good)}
            axes.text(x + 0.006, middle, words, fontsize=9.5, va="center", color=BLACK, bbox=box)
    keys = [
        Patch(label="at least half of the right steps, or harmless", **frame(True)),
        Patch(label="fewer than half of the right steps, or harmful", **frame(False)),
    ]
    figure.legend(handles=keys, ncols=2, handlelength=3.2, handleheight=1.2, **BELOW)
    save(figure, path)


def alpha(
    path: Path,
    alphas: Sequence[float],
    trained_at: Sequence[float],
    margins: Mapping[str, Mapping[str, Sequence[float]]],
    pairs: Mapping[str, tuple[str, str]],
    edges: Mapping[str, float],
) -> None:
    """The margin of the more helpful over the less helpful of two answers with one label, by alpha.

    margins: quadrant -> {"target", "optimum": one value for each of alphas, "trained": one for each
    of trained_at}, all in nats x tau. pairs: quadrant -> the two answers' names. edges: words ->
    alpha, upright lines.
    """
    figure, (axes,) = canvas(8.0, 5.2, 1, 1)
    axes.axhline(0, color=GREY, linewidth=1)
    for words, place in edges.items():
        axes.axvline(place, color=GREY, linewidth=1, linestyle=":")
        bottom = axes.get_xaxis_transform()
        axes.annotate(words, (place, 0.02), (3, 0), bottom, "offset points", fontsize=9)
    for quadrant, lines in margins.items():
        color, marker, words = QUADRANT_STYLE[quadrant]
        name = f"{words}, {' over '.join(pairs[quadrant])}"
        style: dict[str, Any] = {"color": color, "marker": marker}
        ends = style | {"markerfacecolor": "white", "markersize": 4, "markevery": [0, -1]}
        dots = style | {"linestyle": "none", "markersize": 7, "markeredgecolor": BLACK}
        target = f"{name}: the pair's target"
        axes.plot(alphas, lines["target"], "--", linewidth=1.3, label=target, **ends)
        optimum = f"{name}: population optimum"
        axes.plot(alphas, lines["optimum"], linewidth=1.8, label=optimum, **ends)
        axes.plot(trained_at, lines["trained"], label=f"{name}: trained models", **dots)
    axes.set(xlabel="alpha", ylabel="margin of the more helpful answer (nats x tau)")
    figure.legend(ncols=2, **BELOW | {"fontsize": 9})
    save(figure, path)


# --- Figure 5: models by helpfulness and harmlessness ---------------------------------------------


class Point(NamedTuple):
    """A model in a scatter."""

    name: str
    helpful: float
    harmless: float
    helpful_bar: tuple[float, float] = (0.0, 0.0)  # of the error bar: how far below, and above
    harmless_bar: tuple[float, float] = (0.0, 0.0)
    pairs: int = 0  # labelled pairs it learned from, drawn as the mark's area; 0: marks of one size
    line: str = ""  # points of one line are joined in their order and share a legend entry
    look: int = -1  # of LOOKS; -1: the next one


def draw_models(axes: Axes, name: str, points: Sequence[Point], size: float, **style: Any) -> None:
    """One mark, or the marks of one line, with error bars and an entry in the legend."""
    axes.errorbar(
        [point.helpful for point in points],
        [point.harmless for point in points],
        np.transpose([point.harmless_bar for point in points]),
        np.transpose([point.helpful_bar for point in points]),
        markersize=size,
        markeredgecolor=BLACK,
        markeredgewidth=0.8,
        linewidth=1.4,
        elinewidth=1.1,
        capsize=3,
        label=name,
        **style,
    )


def name_on_line(axes: Axes, point: Point, number: int) -> None:
    """A point's name beside its mark, on the side that the line of this number has to itself."""
    from matplotlib.patheffects import withStroke

    across, up = [(1, 1), (1, -1), (-1, 1), (-1, -1)][number % 4]
    axes.annotate(
        point.name,
        (point.helpful, point.harmless),
        (5 * across, 5 * up),
        textcoords="offset points",
        ha="left" if across > 0 else "right",
        va="bottom" if up > 0 else "top",
        fontsize=10,
        zorder=5,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def draw_arrow(axes: Axes, start: Point, end: Point) -> None:
    """From one mark to another, clear of both."""
    shape = {"arrowstyle": "->", "color": GREY, "shrinkA": 8, "shrinkB": 10}
    place = (end.helpful, end.harmless)
    axes.annotate("", place, (start.helpful, start.harmless), arrowprops=shape)


def figure5(
    points: Sequence[Point],
    path: Path,
    *,
    start: Point | None = None,
    title: str = "",
    axis_words: tuple[str, str] = ("helpfulness", "harmlessness"),
    note: str = "",
) -> None:
    """Figure 5: models by helpfulness (across) and harmlessness (up), shares from 0 to 1.

    Each is a mark with error bars, named in the legend, so that no name can lie on an arrow. Points
    of a line also have a name beside them. start: the model that the others began from, with an
    arrow to each point that is on no line. note: below the title, what bars and mark sizes mean.
    """
    figure, (axes,) = canvas(7.2, 6.4, 1, 1)
    axes.grid(axis="x", color=PALE, linewidth=0.7)
    if start:
        draw_models(axes, start.name, [start], 9, color=BLACK, marker="X", linestyle="none")
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.line or point.name, []).append(point)
    most = max((point.pairs for point in points), default=0)
    for number, (name, members) in enumerate(groups.items()):
        first = members[0]
        look = number if first.look < 0 else first.look
        color, marker, line = LOOKS[look % len(LOOKS)]
        size = 15 * (first.pairs / most) ** 0.5 if first.pairs else 8.4
        style = line if first.line else "none"
        draw_models(axes, name, members, size, color=color, marker=marker, linestyle=style)
        for point in members:
            if point.line:
                name_on_line(axes, point, number)
            elif start:
                draw_arrow(axes, start, point)

    axes.margins(0.12)
    for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        # An error bar may reach below 0 or above 1; a share does not.
        set_limits(max(limits[0], -0.08), min(limits[1], 1.08))
    axes.set(xlabel=axis_words[0], ylabel=axis_words[1])
    figure.suptitle(title, fontsize=12)
    axes.set_title(note, fontsize=9, color=GREY)
    longest = max(len(name) for name in groups)
    figure.legend(ncols=3 if longest < 25 else 1, labelspacing=0.8, **BELOW)
    save(figure, path)


# --- the curves of a training run, from its log.jsonl ---------------------------------------------


CURVES: list[tuple[str, str, dict[str, tuple[str, str, str]]]] = [
    # title, unit, and for each key of a row the colour, marker and words of its line
    (
        "loss",
        "",
        {
            "loss": (BLACK, "", "total"),
            "safety_loss": (BLUE, "o", "safety pairs"),
            "helpfulness_loss": (ORANGE, "^", "helpfulness pairs"),
            "held_out_loss": (GREEN, "v", "total, held-out rows"),
        },
    ),
    (
        "log-probability of the answers, change since step 0",
        "nats per answer",
        {
            "chosen_logprob_change_nats": (BLUE, "o", "chosen (more helpful)"),
            "rejected_logprob_change_nats": (VERMILION, "D", "rejected"),
        },
    ),
    ("learning rate", "learning rate", {"lr": (BLACK, "", "learning rate")}),
]


def series(rows: Sequence[Row], *keys: str) -> tuple[Floats, Floats]:
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


def draw_line(
    axes: Axes, steps: Floats, values: Floats, smooth: bool, color: str, marker: str, words: str
) -> None:
    """The values as a line; smooth: pale, under their running mean.

    The pairs of one step are few, so its loss and margins jump. The mean is over the 25th of the
    run around each step: in a run of 200 steps, a step, the four before it and the four after it.
    """
    half = len(values) // 50 if smooth else 0
    if half:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        values = np.convolve(values, np.ones(2 * half + 1) / (2 * half + 1), mode="valid")
        steps = steps[half:-half]
    style: dict[str, Any] = {"color": color, "marker": marker, "label": words}
    every = max(1, len(steps) // 8)
    axes.plot(steps, values, linewidth=1.8, markersize=5, markevery=every, **style)


def draw_margins(axes: Axes, rows: Sequence[Row]) -> None:
    """Each quadrant's margin, with its last target in the legend.

    The margins set the scale. A target within twice their reach is also a dashed line.
    """
    targets = {}
    reach = 0.0
    for quadrant, (color, marker, words) in QUADRANT_STYLE.items():
        steps, margins = series(rows, "quadrants", quadrant, "margin_nats")
        if len(steps):
            targets[color] = series(rows, "quadrants", quadrant, "target_nats")[1][-1]
            words += f", target {targets[color]:+.4g}"
            draw_line(axes, steps, margins, True, color, marker, words)
            reach = max(reach, np.abs(margins).max())
    for color, target in targets.items():
        if abs(target) <= 2 * reach:
            axes.axhline(target, color=color, linestyle="--", linewidth=1.3)
    axes.set(title="margin by safety quadrant (dashed: its target)", ylabel="margin h (nats)")


def draw_panel(
    axes: Axes, rows: Sequence[Row], title: str, unit: str, lines: Mapping[str, Any]
) -> None:
    """One panel of CURVES: a line for each key that the rows have."""
    for key, style in lines.items():
        steps, values = series(rows, key)
        if len(steps):
            draw_line(axes, steps, values, key not in ("lr", "held_out_loss"), *style)
    axes.set(title=title, ylabel=unit)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """The curves of a run from the rows of its log.jsonl, in panels for the keys that are there.

    Preference runs: each quadrant's margin and target, loss, change of the log-probabilities,
    learning rate. SFT: loss and learning rate.
    """
    preference = any("quadrants" in row for row in rows)
    loss_unit = "loss per pair" if preference else "loss (nats per token)"
    drawn = []
    for title, unit, lines in CURVES:
        if any(len(series(rows, key)[0]) for key in lines):
            drawn.append((title, unit or loss_unit, lines))
    count = len(drawn) + preference
    height = max(1, math.ceil(count / 2))
    figure, panels = canvas(12, 3.9 * height, height, 2)
    if preference:
        draw_margins(panels[0], rows)
    for axes, curve in zip(panels[int(preference) :], drawn, strict=False):
        draw_panel(axes, rows, *curve)
    for axes in panels[:count]:
        axes.set_xlabel("optimizer step")
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize=9, edgecolor="none")
    for axes in panels[count:]:
        axes.set_axis_off()
    save(figure, path)


def main(arguments: Sequence[str]) -> None:
    """curves.png again, or for the first time, from the log.jsonl of a run folder."""
    folder = Path(arguments[0] if len(arguments) == 1 else "")
    if not (folder / "log.jsonl").is_file():
        sys.exit("usage: python -m support.plots RUN, a folder with log.jsonl")
    draw_curves(log_rows(folder / "log.jsonl"), folder / "curves.png")
    print(folder / "curves.png")


if __name__ == "__main__":
    main(sys.argv[1:])
