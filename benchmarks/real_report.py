"""The report of real_model.py, from the committed verdicts alone: a table and a picture.

Every interval holds 95 % of what comes out when families of prompts are drawn again, with
replacement. A family is in a draw with all its prompts, all runs and all arms, so that differences
between arms are paired.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common  # noqa: F401  # puts the program's folder on the path
import numpy as np
from numpy.typing import NDArray
from real_rows import FOLDS

from support import plots, storage

DRAWS = 10_000
AGREE = ("model", "steps", "batch", "new_tokens", "settings")  # what folds must have in common
# Name -> words of the columns. All are shares from 0 to 1.
MEASURES = {
    "unsafe": "declines unsafe",
    "advbench": "declines AdvBench",
    "safe": "declines safe (over-refusal)",
    "balanced": "mean of declining unsafe and answering safe",
}
# Measure -> what an arm does more of, where its share is the higher one.
CLAIMS = {
    "unsafe": "declines more unsafe XSTest prompts",
    "advbench": "declines more of AdvBench",
    "safe": "declines more safe prompts",
    "balanced": "tells unsafe from safe prompts better",
}

Json = dict[str, Any]
Draws = NDArray[np.float64]  # [1 + DRAWS]: the value observed, then that of each draw


def fold_path(results: Path, fold: int) -> Path:
    """Where a fold's verdicts are: a line for the run, then one for each prompt and pair."""
    return results / f"fold-{fold}.jsonl"


def read_folds(results: Path) -> tuple[list[Json], list[Json], list[Json]]:
    """(the folds' heads, verdicts, margins) of the folds that are there. ValueError: none is, or
    they are not of one experiment.
    """
    heads, verdicts, margins = [], [], []
    for fold in range(1, FOLDS):
        path = fold_path(results, fold)
        if not path.exists():
            continue
        head, *rows = map(storage.read_line, path.read_text(encoding="utf-8").splitlines())
        heads.append(head)
        verdicts += [row | {"fold": fold} for row in rows if "refused" in row]
        margins += [row | {"fold": fold} for row in rows if "margin" in row]
        for name in AGREE:
            if head[name] != heads[0][name]:
                raise ValueError(
                    f"folds must agree in {name}, but {path} has {head[name]} and not "
                    f"{heads[0][name]}; run it again with the same settings"
                )
    if not heads:
        raise ValueError(f"{results} has no fold-1.jsonl to fold-4.jsonl; run `fold 1` first")
    return heads, verdicts, margins


# --- statistics -----------------------------------------------------------------------------------


class Resampler:
    """Means over rows, observed and in each draw of families."""

    def __init__(self, families: Iterable[str], draws: int = DRAWS) -> None:
        self.places = {family: place for place, family in enumerate(dict.fromkeys(families))}
        size = len(self.places)
        drawn = np.random.default_rng(0).multinomial(size, [1 / size] * size, draws)
        self.counts = np.vstack([np.ones(size), drawn])  # of each family in each draw

    def mean(self, values: Sequence[float], families: Sequence[str]) -> Draws:
        """The mean of some rows. It is not a number in draws that hold none of their families."""
        places = [self.places[family] for family in families]
        sums = np.bincount(places, values, len(self.places))
        sizes = np.bincount(places, minlength=len(self.places))
        with np.errstate(invalid="ignore"):
            return (self.counts @ sums) / (self.counts @ sizes)


def interval(draws: Draws) -> tuple[float, float, float]:
    """(value, low, high): the value observed, and the ends of its 95 % interval."""
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return float(draws[0]), float(low), float(high)


def measures_of(verdicts: Sequence[Json], arm: str, resampler: Resampler) -> dict[str, Draws]:
    """Each of MEASURES for one arm, and the share of answers that ran into the token limit."""

    def mean(field: str, rows: Sequence[Json]) -> Draws:
        values = [row[field][arm] for row in rows]
        return resampler.mean(values, [row["family"] for row in rows])

    found = {}
    for name in ("unsafe", "advbench", "safe"):
        found[name] = mean("refused", [row for row in verdicts if row["set"] == name])
    found["balanced"] = (found["unsafe"] + 1 - found["safe"]) / 2
    found["at_limit"] = mean("at_limit", verdicts)
    return found


# --- the tables -----------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table, and an empty line."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def shown(draws: Draws, form: str = ".2f") -> str:
    """A value with its interval."""
    value, low, high = (format(number, form) for number in interval(draws))
    return f"{value} [{low}, {high}]"


def about(heads: Sequence[Json]) -> list[str]:
    """What was run, where, and what the labels are."""
    first = heads[0]
    missing = sorted({*range(1, FOLDS)} - {head["fold"] for head in heads})
    weights = "as published"
    if first["derived_from_4_bit"]:
        weights = "derived from the 4-bit numbers of that file, and not the published ones"
    lines = [
        f"Model: {first['model']}; its weights are {weights}.",
        f"Each run: {first['steps']} steps of SFT, then {first['steps']} steps of each arm, of "
        f"{first['batch']} safety pairs and {first['batch']} helpfulness pairs. Answers are greedy, "
        f"of at most {first['new_tokens']} tokens.",
        "People labelled XSTest's answers as compliance or refusal. Their safety is derived from "
        "that and from the prompt's type. The model was probably tuned on UltraFeedback, so its "
        "held-out pairs may be known to it.",
        "Intervals are 95 %, by drawing families of prompts again. One without width means that "
        "all answers agree, not that the share is exact.",
    ]
    if missing:
        lines.append(f"**Not done yet: fold {', '.join(map(str, missing))}.**")
    paragraphs = [part for line in lines for part in (line, "")]
    rows = []
    for head in heads:
        minutes = f"{sum(head['processor_minutes'].values()):.0f}"
        if head["resumed"]:
            minutes += f", without those before a stop of {', '.join(head['resumed'])}"
        cells = [head["hardware"]["processor"], str(head["threads"]), head["dtype"], minutes]
        rows.append([str(head["fold"]), *cells, f"{head['wall_minutes']:.0f}", head["date"]])
    header = ["run", "processor", "threads", "dtype", "processor minutes", "minutes", "date"]
    return paragraphs + table(header, rows)


def claims(name: str, other: str, differences: Mapping[str, Draws]) -> list[str]:
    """What the intervals allow to say of an arm beside another."""
    lines = []
    for measure, words in CLAIMS.items():
        value, low, high = interval(differences[measure])
        size = (
            f"by {abs(value):.2f} [{min(abs(low), abs(high)):.2f}, {max(abs(low), abs(high)):.2f}]"
        )
        if low > 0:
            lines.append(f"- {name} {words} than {other}, {size}.")
        elif high < 0:
            lines.append(f"- {other} {words} than {name}, {size}.")
        else:
            lines.append(f"- {name} and {other} cannot be told apart in: {MEASURES[measure]}.")
    return lines


def arm_tables(measures: Mapping[str, Mapping[str, Draws]]) -> list[str]:
    """Every arm, its difference to the SFT model, and BFPO's difference to it."""
    arms = [name for name in measures if name != "sft"]

    def less(name: str, other: str) -> dict[str, Draws]:
        return {key: measures[name][key] - measures[other][key] for key in measures[name]}

    words = [*MEASURES.values(), "at the token limit"]
    fields = [*MEASURES, "at_limit"]
    rows = [[name, *(shown(found[field]) for field in fields)] for name, found in measures.items()]
    lines = ["## Shares of answers", "", *table(["model", *words], rows)]
    lines += ["## Difference to the SFT model", ""]
    rows = []
    for name in arms:
        differences = less(name, "sft")
        rows.append([name, *(shown(differences[field], "+.2f") for field in fields)])
    lines += table(["arm", *words], rows)
    lines += ["## BFPO less each arm", ""]
    rows, said = [], claims("bfpo", "sft", less("bfpo", "sft"))
    for name in arms:
        if name != "bfpo":
            differences = less("bfpo", name)
            rows.append([name, *(shown(differences[field], "+.2f") for field in fields)])
            said += claims("bfpo", name, differences)
    lines += table(["arm", *words], rows)
    return [*lines, "## What the intervals allow to say", "", *said, ""]


def run_table(verdicts: Sequence[Json], names: Sequence[str], folds: Sequence[int]) -> list[str]:
    """Every measure of the runs singly."""
    rows = []
    for name in names:
        cells: dict[str, list[str]] = {measure: [] for measure in MEASURES}
        for fold in folds:
            own = [row for row in verdicts if row["fold"] == fold]
            resampler = Resampler((row["family"] for row in own), draws=0)
            found = measures_of(own, name, resampler)
            for measure, values in cells.items():
                values.append(f"{found[measure][0]:.2f}")
        rows.append([name, *(" / ".join(values) for values in cells.values())])
    title = f"## The runs singly: {', '.join(map(str, folds))}"
    return [title, "", *table(["model", *MEASURES.values()], rows)]


def margin_table(
    title: str,
    margins: Sequence[Json],
    group: Callable[[Json], str],
    heads: Sequence[Json],
    resampler: Resampler,
) -> list[str]:
    """Mean margins over the SFT model, arm by arm, of each group of held-out pairs."""
    groups: dict[str, list[Json]] = {}
    for row in margins:
        groups.setdefault(group(row), []).append(row)
    lines = []
    for name, rows in sorted(groups.items()):
        sign = 1 if rows[0]["quadrant"] == "both_safe" else -1
        families = [row["family"] for row in rows]
        for arm in rows[0]["margin"]:
            values = [row["margin"][arm] for row in rows]
            target = heads[0]["targets"][arm][rows[0]["quadrant"]]
            side = resampler.mean([float(value * sign > 0) for value in values], families)
            cells = [name, str(len(rows)), arm, shown(resampler.mean(values, families), "+.1f")]
            lines.append([*cells, "" if target is None else f"{target:+.1f}", shown(side)])
    header = ["pairs", "how many", "arm", "margin, nats", "target", "on BFPO's side"]
    return [f"## {title}", "", *table(header, lines)]


def settings_table(head: Json) -> list[str]:
    """What the search chose."""
    rows = []
    for name, setting in head["settings"].items():
        tau = "" if setting["tau"] is None else f"{setting['tau']:g}"
        rows.append([name, f"{setting['lr']:g}", tau])
    return ["## Settings", "", *table(["arm", "learning rate", "tau"], rows)]


def example(head: Json) -> list[str]:
    """A harmless prompt with each model's answer."""
    lines = ["## An example", "", f"Run {head['fold']}: {head['example']['prompt']}", ""]
    for name, answer in head["example"]["answers"].items():
        lines.append(f"- {name}: {' '.join(answer.split())}")
    return [*lines, ""]


# --- the picture ----------------------------------------------------------------------------------


def point_of(name: str, measures: Mapping[str, Draws]) -> plots.Point:
    """An arm in the picture."""
    helpful, helpful_low, helpful_high = interval(1 - measures["safe"])
    harmless, low, high = interval((measures["unsafe"] + measures["advbench"]) / 2)
    across = (helpful - helpful_low, helpful_high - helpful)
    return plots.Point(name, helpful, harmless, across, (harmless - low, high - harmless))


def draw(measures: Mapping[str, Mapping[str, Draws]], title: str, path: Path) -> None:
    points = {name: point_of(name, found) for name, found in measures.items()}
    start = points.pop("sft")
    plots.figure5(
        list(points.values()),
        path,
        start=start,
        title=title,
        axis_words=("share of safe prompts answered", "share of unsafe prompts declined"),
        note="unsafe: mean of XSTest and AdvBench; bars: 95 %, by families of prompts",
    )


def write(results: Path, figures: Path) -> None:
    """real_model.md and real_model.png of the folds that are there."""
    heads, verdicts, margins = read_folds(results)
    folds = [head["fold"] for head in heads]
    names = list(heads[0]["targets"])
    resampler = Resampler(row["family"] for row in verdicts + margins)
    measures = {name: measures_of(verdicts, name, resampler) for name in names}
    safety = [row for row in margins if row["set"] == "safety"]
    helpful = [row for row in margins if row["set"] == "helpfulness"]
    by_quadrant = partial(margin_table, heads=heads, resampler=resampler)
    lines = ["# BFPO on a real pretrained model", "", *about(heads), *arm_tables(measures)]
    lines += run_table(verdicts, names, folds)
    lines += by_quadrant("Margins by quadrant", safety, lambda row: row["quadrant"])
    title = "Margins by who wrote the compliance"
    lines += by_quadrant(title, safety, lambda row: f"{row['quadrant']}, {row['author']}")
    lines += by_quadrant("Margins of UltraFeedback's held-out pairs", helpful, lambda row: "all")
    lines += settings_table(heads[0]) + example(heads[0])
    storage.write_text(figures / "real_model.md", "\n".join(lines))
    runs = ", ".join(map(str, folds))
    draw(measures, f"{heads[0]['model']}: runs {runs} of 4", figures / "real_model.png")
    print(f"wrote {figures / 'real_model.md'} and real_model.png, of runs {runs}")
