"""Two answers to one prompt, which is better: AlpacaEval's files, and its win rates, raw and
length-controlled, by any language model (deviation 12).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support import storage
from support.distributed import World
from support.storage import digest
from tasks.judges import Contest, Examiner, file_name
from tasks.metrics import Array, Request, Terms

CHUNK = 64  # rows judged between two writes to disk
Rows = Sequence[Mapping[str, Any]]

# --- which of two answers is better ---------------------------------------------------------------


class Preference(NamedTuple):
    """Probability that the second answer is the better one: of the mean of both orders, and in
    each.
    """

    second: float
    as_given: float
    swapped: float
    mass: float  # the smaller Reply.mass of the two


def prefer(examiner: Examiner, contests: Sequence[Contest]) -> list[Preference | None]:
    """One preference a contest, equal ones judged once; None where the prompt exceeds the model's
    context.
    """
    unique = list(dict.fromkeys(contests))
    turned = [Contest(contest.prompt, contest.second, contest.first) for contest in unique]
    replies = examiner.ask([(0, contest._asdict()) for contest in [*unique, *turned]])
    found: dict[Contest, Preference | None] = {}
    for i, contest in enumerate(unique):
        one = replies[i]
        other = replies[len(unique) + i]
        found[contest] = None
        if one and other:
            given = one.shares["M"]
            swapped = other.shares["m"]
            mass = min(one.mass, other.mass)
            found[contest] = Preference((given + swapped) / 2, given, swapped, mass)
    return [found[contest] for contest in contests]


def kept_preferences(
    path: Path, examiner: Examiner, contests: Sequence[Contest], world: World
) -> list[dict[str, Any] | None]:
    """prefer, of all contests, each as an object, from `path` or computed and kept there."""

    def compute(numbers: range) -> list[dict[str, Any]]:
        found = prefer(examiner, [contests[i] for i in numbers])
        return [{"preference": None if one is None else one._asdict()} for one in found]

    identity = {**examiner.identity, "rows": digest(contests)}
    rows = storage.kept_rows(path, identity, len(contests), CHUNK, compute, world, "preferences")
    examiner.unload()
    return [row["preference"] for row in rows]


# --- AlpacaEval -----------------------------------------------------------------------------------

# Of the squared weights, halved: separable rows have a finite optimum, and 805 others do not move.
RIDGE = 0.01


def as_array(preferences: Sequence[float | None]) -> Array:
    """Missing ones as NaN, ties as 1.5."""
    given = [math.nan if value is None else value for value in preferences]
    values = np.array(given, dtype=np.float64)
    return np.where(values == 0, 1.5, values)


def win_rate(preferences: Sequence[float | None]) -> dict[str, float]:
    """AlpacaEval's raw win rate, in percent, of its preferences: from 1, the baseline won, to 2,
    the model won; 0 and 1.5 are ties.

    100 mean(preference - 1), with its standard error; rows without a preference, or with another
    number, are dropped and counted.
    """
    given = as_array(preferences)
    kept = given[(given >= 1) & (given <= 2)] - 1
    if not len(kept):
        raise ValueError(f"a win rate needs preferences from 1 to 2, got none in {len(given)} rows")
    return {
        "win_rate": 100 * float(kept.mean()),
        "standard_error": 100 * float(kept.std(ddof=1)) / len(kept) ** 0.5,
        "n_wins": int((kept > 0.5).sum()),
        "n_wins_base": int((kept < 0.5).sum()),
        "n_draws": int((kept == 0.5).sum()),
        "n_total": len(kept),
        "n_missing": len(given) - len(kept),
    }


def length_controlled(
    preferences: Sequence[float | None], lengths: Sequence[int], baseline_lengths: Sequence[int]
) -> list[float]:
    """The share of wins had both answers been equally long (AlpacaEval 2.0, arXiv:2404.04475),
    lengths in characters: the mean of the returned terms, one for each row with a preference, its
    standard error theirs (each row's influence on the fit, tasks/metrics.py).

    P(model wins) = sigmoid(theta + phi tanh(d / std(d))), d the difference of lengths, is fitted to
    the preferences by logistic regression; the share is sigmoid(theta). AlpacaEval's third term,
    the instruction's difficulty, which takes the annotations of many models to know, is left out,
    as are its cross-validated L1 penalty and its rows of models that were told to be brief or
    verbose: on OpenHermes-2.5-Mistral-7B's published preferences this is 20.7 %, AlpacaEval's own
    figure 16.2 %.
    """
    given = as_array(preferences)
    kept = (given >= 1) & (given <= 2)
    d = np.array(lengths, dtype=np.float64) - np.array(baseline_lengths, dtype=np.float64)
    scale = d.std(ddof=1) if len(d) > 1 and np.ptp(d) else 1.0
    X = np.stack([np.ones(kept.sum()), np.tanh(d / scale)[kept]], 1)
    y = given[kept] - 1
    weights = np.zeros(2)
    for _ in range(100):  # Newton's method
        p = 1 / (1 + np.exp(-X @ weights))
        curvature = (X * (p * (1 - p))[:, None]).T @ X + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, X.T @ (y - p) - RIDGE * weights)
        weights = weights + step
        if np.abs(step).max() < 1e-10:
            break
    share = 1 / (1 + math.exp(-weights[0]))
    influence = share * (1 - share) * len(y) * (np.linalg.solve(curvature, X.T)[0] * (y - p))
    return [float(term) for term in share + influence - influence.mean()]


def write_outputs(folder: Path, rows: Rows, generator: str) -> None:
    """model_outputs.json, as AlpacaEval's own annotators read it."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = []
    for row in rows:
        outputs.append(
            {
                "instruction": row["prompt"],
                "output": row["answer"],
                "generator": generator,
                "dataset": row["notes"]["dataset"],
            }
        )
    storage.write_json(folder / "model_outputs.json", outputs)


def write_annotations(
    folder: Path,
    rows: Rows,
    generator: str,
    preferences: Sequence[float | None],
    annotator: str,
) -> None:
    """annotations.json in AlpacaEval's format; preferences from 1 to 2, None for none."""
    annotations = []
    for row, preference in zip(rows, preferences, strict=True):
        annotations.append(
            {
                "instruction": row["prompt"],
                "output_1": row["notes"]["output"],
                "generator_1": row["notes"]["generator"],
                "output_2": row["answer"],
                "generator_2": generator,
                "dataset": row["notes"]["dataset"],
                "annotator": annotator,
                "preference": preference,
            }
        )
    storage.write_json(folder / "annotations.json", annotations)


def check_contests(examiner: Examiner, requests: Sequence[Request]) -> None:
    """ValueError when the examiner's context is too small for a win rate, even of empty answers to
    AlpacaEval's instructions.
    """
    bare = [Contest(request.prompt, request.notes["output"], "") for request in requests]
    heads = examiner.heads([(0, contest._asdict()) for contest in bare])
    fit = sum(len(head) <= examiner.longest for head in heads)
    if fit < 2:
        raise ValueError(
            f"a win rate needs 2 rows or more that fit into the judge's context, got {fit}; take "
            "another judge"
        )


def as_preferences(judged: Sequence[Mapping[str, Any] | None]) -> list[float | None]:
    """AlpacaEval's numbers, 1 + P(the model's answer is the better one)."""
    return [None if row is None else 1 + row["second"] for row in judged]


def judge_answers(
    folder: Path, rows: Rows, name: str, examiner: Examiner, world: World
) -> list[dict[str, Any] | None]:
    """The preference of each of a model's answers over the baseline's, and annotations.json."""
    contests = [Contest(row["prompt"], row["notes"]["output"], row["answer"]) for row in rows]
    path = folder / f"preferences.{file_name(examiner.identity)}.jsonl"
    judged = kept_preferences(path, examiner, contests, world)
    given = as_preferences(judged)
    annotator = examiner.identity["judge"]
    world.from_main(functools.partial(write_annotations, folder, rows, name, given, annotator))
    return judged


def against_baseline(
    answers: Mapping[str, Rows],
    names: Mapping[str, str],
    folder: Path,
    examiner: Examiner | None,
    world: World,
) -> tuple[dict[str, Terms], dict[str, dict[str, float]]]:
    """({model: the terms of its win rates, as shares}, {model: win_rate}) of {model: its answers to
    AlpacaEval's instructions}.

    An answer's row has prompt and answer, and the baseline's output, generator and dataset under
    notes. Without an examiner both are empty, and the files for AlpacaEval's own annotators are all
    there is: model/alpaca_eval/model_outputs.json in the folder. With one, annotations.json lies
    beside it. Rows for which some model has no preference, as they exceed the examiner's context,
    are in no model's terms.
    """
    for who, rows in answers.items():
        own = folder / who / "alpaca_eval"
        world.from_main(functools.partial(write_outputs, own, rows, names[who]))
    if not answers or not examiner:
        return {}, {}
    judged = {
        who: judge_answers(folder / who / "alpaca_eval", rows, names[who], examiner, world)
        for who, rows in answers.items()
    }
    kept = [i for i, row in enumerate(zip(*judged.values(), strict=True)) if None not in row]
    if len(kept) < 2:
        raise ValueError(
            f"a win rate needs at least 2 rows with a preference, got {len(kept)}; the others "
            "exceed the judge's context"
        )
    terms: dict[str, Terms] = {}
    for who, every in judged.items():
        chosen = [every[i] or {} for i in kept]
        rows = [answers[who][i] for i in kept]
        lengths = [len(row["answer"]) for row in rows]
        baseline = [len(row["notes"]["output"]) for row in rows]
        given = as_preferences(chosen)
        terms[who] = {
            "win_rate": [value - 1 for value in given if value is not None],
            "length_controlled_win_rate": length_controlled(given, lengths, baseline),
            "judge_mass": [row["mass"] for row in chosen],
        }
    return terms, {who: win_rate(as_preferences(every)) for who, every in judged.items()}
