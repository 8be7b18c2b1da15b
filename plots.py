"""What all figures share, and Figures 1 and 4 and the margins over alpha. Figure 5: scatter.py; a
training run's: curves.py.

One palette for all (Okabe and Ito's, made for colour-blind readers), blue for safe and warm for
unsafe. Line style, marker or a label on the line repeats what the colour says, so a grey print
loses nothing. Each function takes plain numbers, writes a PNG aside and renames it. matplotlib is
imported only by a drawing.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


# -------------------------------------------------------------------------------------------------- Figure 4


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
