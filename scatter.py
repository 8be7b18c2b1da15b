"""Figure 5: models by helpfulness and harmlessness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import plots
from plots import BLACK, GREY, LOOKS, PALE, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def draw(
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
    plots.save(figure, path)
