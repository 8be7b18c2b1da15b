"""support/plots.py: what the pictures show, read back from matplotlib's own objects."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from support import plots
from support.plots import Point


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a drawing function and returns the figure that it saves."""
    caught = []
    save = plots.save

    def keep(figure: Any, path: Path) -> None:
        caught.append(figure)
        save(figure, path)

    def draw(function: Callable[..., None], *arguments: Any, **more: Any) -> Any:
        function(*arguments, **more)
        caught[-1].draw_without_rendering()  # at its own resolution again, not the file's
        return caught[-1]

    monkeypatch.setattr(plots, "save", keep)
    return draw


def names_of(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


# --- Figures 4 and 1 ------------------------------------------------------------------------------


def test_figure4_names_each_line_at_its_own_end(drawn: Callable[..., Any], tmp_path: Path) -> None:
    """Claim: a name stands within half a text's height of its line's end, also where three lines
    end together. Oracle: the drawn texts, whose rows share their height; 0.025 is half of a row's
    0.033 and what three rows at one end need.
    """
    ends = {"dpo": [0.97, 0.028, 0.0009, 0.00003], "bfpo": [0.413, 0.118, 0.318, 0.151]}
    means = {name: np.array([[0.25] * 4, values]) for name, values in ends.items()}
    widths = {name: np.zeros((2, 4)) for name in ends}
    safe = (True, False, True, False)
    figure = drawn(plots.figure4, tmp_path / "f.png", means, widths, safe, [0, 2, 3, 1], [0.4, 0.1])
    for axes, values in zip(figure.axes, ends.values(), strict=True):
        heights = {}
        for text in axes.texts[:-1]:  # the last one is the verdict
            box = text.get_window_extent().transformed(axes.transData.inverted())
            rows = text.get_text().split("\n")
            for i, name in enumerate(rows):
                heights[name] = box.y1 - (i + 0.5) * box.height / len(rows)
        assert list(sorted(heights)) == ["y1 safe", "y2 unsafe", "y3 safe", "y4 unsafe"]
        for name, end in zip(sorted(heights), values, strict=True):
            assert abs(heights[name] - end) < 0.025, name
        placed = sorted(heights.values())
        assert np.diff(placed).min() > 0.028  # no text on another
    assert names_of(figure.legends[0])[-1] == "BFPO's exact optimum"


def test_figure1_frames_what_the_judge_says(drawn: Callable[..., Any], tmp_path: Path) -> None:
    """Claim: every answer is drawn with its verdict, dashed where it is harmful or less than half
    helpful, and the legend says so. Oracle: by hand.
    """

    def row(forbidden: bool, answer: str, helpful: float, harmless: bool) -> dict[str, object]:
        row = {"forbidden": forbidden, "prompt": "q", "answer": answer}
        return {**row, "helpful": helpful, "harmless": harmless}

    rows = [
        ("SFT", row(False, "one", 0.25, True), row(True, "two", 0.0, False)),
        ("BFPO", row(False, "three", 0.5, True), row(True, "four", 0.0, True)),
    ]
    figure = drawn(plots.figure1, tmp_path / "figure1.png", rows)
    frames = {}
    for text in figure.axes[0].texts:
        if text.get_bbox_patch():
            frames[text.get_text()] = text.get_bbox_patch().get_linestyle()
    assert frames == {
        "one\n[helpful 25%]": "--",
        "two\n[HARMFUL]": "--",
        "three\n[helpful 50%]": "-",
        "four\n[harmless]": "-",
    }
    (legend,) = figure.legends
    edges = [to_hex(patch.get_edgecolor()).upper() for patch in legend.get_patches()]
    assert edges == [plots.BLUE, plots.VERMILION]
    assert [words.split(", or ")[1] for words in names_of(legend)] == ["harmless", "harmful"]


# --- Figure 5 -------------------------------------------------------------------------------------


def test_scatter_names_every_mark_in_its_legend(drawn: Callable[..., Any], tmp_path: Path) -> None:
    """Claim: marks and error bars stand at their values, the area of a mark follows the pairs, and
    the legend names all of them, so that no name is near an arrow. Oracle: the drawn objects.
    """
    points = [
        Point("BFPO", 0.80, 0.93, (0.02, 0.01), (0.02, 0.03), pairs=8000),
        Point("DPO, naive mix", 0.82, 0.90, (0.03, 0.03), (0.02, 0.02), pairs=8000),
        Point("DPO, helpfulness", 1.0, 0.31, pairs=4000),
    ]
    start = Point("SFT", 0.56, 0.39, (0.01, 0.01), (0.01, 0.01))
    figure = drawn(
        plots.figure5, points, tmp_path / "s.png", start=start, title="title", note="note"
    )
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("helpfulness", "harmlessness")
    assert (figure.get_suptitle(), axes.get_title()) == ("title", "note")
    assert names_of(figure.legends[0]) == [point.name for point in [start, *points]]

    marks = {}
    segments = []
    for group in axes.containers:
        mark, _, bars = group
        place = (mark.get_xdata()[0], mark.get_ydata()[0])
        marks[group.get_label()] = (*place, mark.get_markersize() ** 2)
        for lines in bars:
            segments += np.round(lines.get_segments(), 9).tolist()
    for point in [start, *points]:
        assert marks[point.name][:2] == (point.helpful, point.harmless)
    assert marks["BFPO"][2] == pytest.approx(2 * marks["DPO, helpfulness"][2])
    assert [[0.78, 0.93], [0.81, 0.93]] in segments and [[0.80, 0.91], [0.80, 0.96]] in segments

    arrows = [text for text in axes.texts if text.arrow_patch]
    assert {text.xy for text in arrows} == {(point.helpful, point.harmless) for point in points}
    assert not any(text.get_text() for text in axes.texts)


def test_scatter_joins_and_names_the_points_of_a_line(
    drawn: Callable[..., Any], tmp_path: Path
) -> None:
    """Claim: a line's points are joined in their order under one legend entry, each with its name
    beside it; two lines through one point name it on different sides. Oracle: the drawn objects.
    """
    points = []
    for name, slope in (("BFPO", 1), ("DPO", 2)):
        points += [Point(f"{k} %", 0.8 - 0.01 * k * slope, 0.9, line=name) for k in (0, 10, 20)]
    figure = drawn(plots.figure5, points, tmp_path / "s.png")
    (axes,) = figure.axes
    assert names_of(figure.legends[0]) == ["BFPO", "DPO"]
    paths = [list(group[0].get_xdata()) for group in axes.containers]
    assert paths == [[p.helpful for p in points[:3]], [p.helpful for p in points[3:]]]
    assert [text.get_text() for text in axes.texts] == ["0 %", "10 %", "20 %"] * 2
    first, second = (axes.texts[i].get_window_extent() for i in (0, 3))
    assert axes.texts[0].xy == axes.texts[3].xy and not first.overlaps(second)


def test_scatter_keeps_long_names_in_the_picture(drawn: Callable[..., Any], tmp_path: Path) -> None:
    """Claim: names of any usual length are whole: a legend of folders has one column.

    Oracle: the drawn boxes.
    """
    names = [f"runs/eval/mistral-7b-bfpo-seed{seed}-tau0.01" for seed in (42, 43, 44)]
    points = [Point(name, 0.5, 0.1 * i) for i, name in enumerate(names)]
    figure = drawn(plots.figure5, points, tmp_path / "s.png")
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert box.y1 < figure.axes[0].bbox.y0


# --- curves of a run ------------------------------------------------------------------------------

TARGETS = {
    "both_safe": 50.0,
    "chosen_safe": 100.0,
    "rejected_safe": -100.0,
    "both_unsafe": -50.0,
}


def preference_rows(steps: int, reached: float = 1.0) -> list[dict[str, Any]]:
    """A run whose margins go straight to a share of their targets."""
    rows = []
    for step in range(1, steps + 1):
        quadrants = {}
        for name, target in TARGETS.items():
            view = {"margin_nats": reached * target * step / steps, "target_nats": target}
            quadrants[name] = {"pairs": 8, "target_side_share": 1.0, **view}
        row = {"step": step, "loss": 9e3, "safety_loss": 7e3, "helpfulness_loss": 2e3, "lr": 5e-7}
        row |= {"chosen_logprob_change_nats": -1.0, "rejected_logprob_change_nats": -2.0}
        rows.append({**row, "quadrants": quadrants})
    return rows


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.axison]


@pytest.mark.parametrize(
    "rows, titles",
    [
        (preference_rows(200), ["margin", "loss", "log-probability", "learning rate"]),
        (preference_rows(1), ["margin", "loss", "log-probability", "learning rate"]),
        (
            [{"step": 1, "loss": 3.0, "lr": 0.0}, {"step": 2, "loss": 2.0, "lr": 1e-5}],
            ["loss", "learning rate"],
        ),
        (
            [
                {"step": 1, "quadrants": {}},
                {"event": "resumed"},
                {"step": 2, "loss": math.nan, "lr": None},
            ],
            ["margin"],
        ),
    ],
)
def test_curves_draws_the_panels_whose_keys_are_there(
    drawn: Callable[..., Any], tmp_path: Path, rows: list[dict[str, Any]], titles: list[str]
) -> None:
    """Claim: preference, SFT and broken rows give their panels, labelled, in one PNG.

    Oracle: titles and the folder.
    """
    shown = panels(drawn(plots.draw_curves, rows, tmp_path / "curves.png"))
    for axes, title in zip(shown, titles, strict=True):
        assert axes.get_title().startswith(title)
        assert axes.get_xlabel() and axes.get_ylabel()
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps, points", [(20, 20), (200, 192)])
def test_curves_margins_move_to_their_targets(
    drawn: Callable[..., Any], tmp_path: Path, steps: int, points: int
) -> None:
    """Claim: margin and target share a colour; the running mean is centred (8 steps fewer in 200).
    Oracle: rows on a straight line, which a centred mean leaves where it is; 1e-9 nats of float64
    sums.
    """
    margins = panels(drawn(plots.draw_curves, preference_rows(steps), tmp_path / "c.png"))[0]
    dashed = [line for line in margins.lines if line.get_linestyle() == "--"]
    targets = {line.get_color(): line.get_ydata()[0] for line in dashed}
    thick = [line for line in margins.lines if line.get_linewidth() == 1.8]
    assert sorted(targets.values()) == [-100, -50, 50, 100] and len(thick) == 4
    for line in thick:
        assert len(line.get_xdata()) == points
        straight = targets[line.get_color()] * line.get_xdata() / steps
        np.testing.assert_allclose(line.get_ydata(), straight, atol=1e-9)
    assert names_of(margins.get_legend()) == [
        "both safe, target +50",
        "only chosen safe, target +100",
        "only rejected safe, target -100",
        "both unsafe, target -50",
    ]


def test_curves_margins_set_the_scale_when_targets_are_far(
    drawn: Callable[..., Any], tmp_path: Path
) -> None:
    """Claim: where margins reach 2 % of their targets, they fill more than half of the panel, and
    no target is a line. Oracle: limits and lines.
    """
    rows = preference_rows(20, reached=0.02)
    margins = panels(drawn(plots.draw_curves, rows, tmp_path / "c.png"))[0]
    low, high = margins.get_ylim()
    assert -4 < low < -2 and 2 < high < 4  # margins end at -2 and 2
    assert not [line for line in margins.lines if line.get_linestyle() == "--"]


def test_curves_draw_held_out_losses(drawn: Callable[..., Any], tmp_path: Path) -> None:
    """Claim: the held-out losses of a log are a line of the loss panel, at their own steps.

    Oracle: the rows.
    """
    rows = preference_rows(20)
    for step, loss in ((4, 8e3), (9, 7e3), (14, None)):
        rows.append({"step": step, "held_out": {}, "held_out_loss": loss})
    loss_panel = panels(drawn(plots.draw_curves, rows, tmp_path / "c.png"))[1]
    (line,) = [line for line in loss_panel.lines if "held-out" in line.get_label()]
    assert list(line.get_xdata()) == [4, 9] and list(line.get_ydata()) == [8e3, 7e3]


def test_curves_without_rows_are_a_figure(tmp_path: Path) -> None:
    """Claim: an empty log is a figure, not an exception at the end of a run. Oracle: the file."""
    plots.draw_curves([], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
