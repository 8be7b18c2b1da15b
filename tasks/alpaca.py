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
from tasks.judges import Contest, Examiner, digest, file_name
from tasks.metrics import Request, Terms

CHUNK = 64  # rows judged between two writes to disk

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
    turned = [contest._replace(first=contest.second, second=contest.first) for contest in unique]
    replies = examiner.ask([(0, contest._asdict()) for contest in [*unique, *turned]])
    found: dict[Contest, Preference | None] = {}
    for contest, one, other in zip(unique, replies, replies[len(unique) :], strict=False):
        found[contest] = None
        if one and other:
            given, swapped = one.shares["M"], other.shares["m"]
            found[contest] = Preference(
                (given + swapped) / 2, given, swapped, min(one.mass, other.mass)
            )
    return [found[contest] for contest in contests]


def kept_preferences(
    path: Path, examiner: Examiner, contests: Sequence[Contest], world: World
) -> list[dict[str, Any] | None]:
    """prefer, of all contests, each as an object, from `path` or computed and kept there."""

    def compute(numbers: range) -> list[dict[str, Any]]:
        found = prefer(examiner, [contests[i] for i in numbers])
        return [{"preference": None if one is None else one._asdict()} for one in found]

    rows = storage.kept_rows(
        path,
        {**examiner.identity, "rows": digest(contests)},
        len(contests),
        CHUNK,
        compute,
        world,
        "preferences",
    )
    examiner.unload()
    return [row["preference"] for row in rows]


# --- AlpacaEval -----------------------------------------------------------------------------------

RIDGE = 0.01  # of the squared weights, halved: separable rows have a finite optimum, and 805 others are not moved


def as_array(preferences: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Missing ones as NaN, ties as 1.5."""
    given = np.array(
        [math.nan if value is None else value for value in preferences], dtype=np.float64
    )
    return np.where(given == 0, 1.5, given)


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
    error = 100 * float(kept.std(ddof=1)) / len(kept) ** 0.5 if len(kept) > 1 else math.inf
    return {
        "win_rate": 100 * float(kept.mean()),
        "standard_error": error,
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
    X, y, weights = (
        np.stack([np.ones(kept.sum()), np.tanh(d / scale)[kept]], 1),
        given[kept] - 1,
        np.zeros(2),
    )
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


def write_outputs(folder: Path, rows: Sequence[Mapping[str, Any]], generator: str) -> None:
    """model_outputs.json, as AlpacaEval's own annotators read it."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(
        folder / "model_outputs.json",
        [
            {
                "instruction": row["prompt"],
                "output": row["answer"],
                "generator": generator,
                "dataset": row["notes"]["dataset"],
            }
            for row in rows
        ],
    )


def write_annotations(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    generator: str,
    preferences: Sequence[float | None],
    annotator: str,
) -> None:
    """annotations.json in AlpacaEval's format; preferences from 1 to 2, None for none."""
    storage.write_json(
        folder / "annotations.json",
        [
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
            for row, preference in zip(rows, preferences, strict=True)
        ],
    )


def check_contests(examiner: Examiner, requests: Sequence[Request]) -> None:
    """ValueError when the examiner's context is too small for a win rate, even of empty answers to
    AlpacaEval's instructions.
    """
    bare = [
        (0, Contest(request.prompt, request.notes["output"], "")._asdict()) for request in requests
    ]
    if (fit := sum(len(head) <= examiner.longest for head in examiner.heads(bare))) < 2:
        raise ValueError(
            f"a win rate needs 2 rows or more that fit into the judge's context, got {fit}; take another judge"
        )


def against_baseline(
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    names: Mapping[str, str],
    folder: Path,
    examiner: Examiner | None,
    world: World,
) -> tuple[dict[str, Terms], dict[str, dict[str, float]]]:
    """({model: the terms of its win rates, as shares}, {model: win_rate}) of {model: its answers to
    AlpacaEval's instructions}.

    An answer's row has prompt and answer, and the baseline's output, generator and dataset under
    notes. Without an examiner both are empty, and the files for AlpacaEval's own annotators are all
    there is: model/alpaca_eval/model_outputs.json in the folder; beside it annotations.json, in
    AlpacaEval's format too, has each preference, 1 + P(the model's answer is the better one). Rows
    for which some model has none, as they exceed the examiner's context, are in no model's terms.
    """
    preferences, masses = {}, {}
    for who, rows in answers.items():
        own = folder / who / "alpaca_eval"
        world.from_main(functools.partial(write_outputs, own, rows, names[who]))
        if examiner:
            contests = [
                Contest(row["prompt"], row["notes"]["output"], row["answer"]) for row in rows
            ]
            path = own / f"preferences.{file_name(examiner.identity)}.jsonl"
            judged = kept_preferences(path, examiner, contests, world)
            preferences[who] = [None if row is None else 1 + row["second"] for row in judged]
            masses[who] = [0.0 if row is None else row["mass"] for row in judged]
            world.from_main(
                functools.partial(
                    write_annotations,
                    own,
                    rows,
                    names[who],
                    preferences[who],
                    examiner.identity["judge"],
                )
            )
    kept = [i for i, row in enumerate(zip(*preferences.values(), strict=True)) if None not in row]
    if preferences and len(kept) < 2:
        raise ValueError(
            f"a win rate needs at least 2 rows with a preference, got {len(kept)}; the others exceed the judge's context"
        )
    found: dict[str, Terms] = {}
    for who, every in preferences.items():
        chosen = [value for value in (every[i] for i in kept) if value is not None]
        lengths = (
            [len(answers[who][i]["answer"]) for i in kept],
            [len(answers[who][i]["notes"]["output"]) for i in kept],
        )
        found[who] = {
            "win_rate": [value - 1 for value in chosen],
            "length_controlled_win_rate": length_controlled(chosen, *lengths),
            "judge_mass": [masses[who][i] for i in kept],
        }
    return found, {who: win_rate(every) for who, every in preferences.items()}
