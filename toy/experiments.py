"""The paper in miniature: its claim measured on the toy language, whose judge is exact.

    python synthetic.py search       each objective's learning rate and tau, on validation requests -> runs/search/
    python synthetic.py figure1      Figures 1 and 5: DPO on helpfulness, safety and the naive mix, BFPO; IPO -> runs/figure1/
    python synthetic.py tradeoff     alpha, tau and B_1 against helpfulness and harmlessness (Proposition 3.3) -> runs/tradeoff/
    python synthetic.py noise        wrong safety labels: BFPO, DPO and IPO on the naive mix -> runs/noise/
    python synthetic.py ablations    selective fine-tuning and the buffer -> runs/ablations/

Every model is a run of train.py's own `run`, from one SFT model a seed, in a process with one
thread; `toy_scores` of toy/recipe.py judges it. The runs lie in one folder that all commands share:
what is finished is not done again.
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions.

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

import train
from bfpo import label, population_reward
from support import distributed, plots
from support.storage import lock, read_object, surroundings, write_json, write_text
from toy import files as toy_files
from toy import language, recipe
from toy.files import HELD
from toy.recipe import toy_scores

HERE = Path(__file__).parent.parent
RECORD = (
    HERE / "figures" / "search.json"
)  # of the search that the other commands take their settings from
SEEDS = (1, 2, 3)  # of data, first weights and order; the settings were searched on others
SEARCH_SEEDS = (42, 43)
GRID = {"lr": (2.5e-5, 5e-5, 1e-4), "tau": (0.5, 0.25, 0.125)}  # the gentlest first
# Degrees of freedom -> 97.5th percentile of Student's t.
T_95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 1))


class Model(NamedTuple):
    title: str
    settings: Mapping[str, Any]  # over the recipe toy's
    pairs: int  # annotated pairs that it learns from
    look: int  # of plots.LOOKS


# The paper's four (Figure 1), IPO, and the paper's two ablations. `prefer: safe` puts the safe one
# of a safe and an unsafe answer first; of two safe and of two unsafe ones the more helpful. How the
# paper orders the pairs of its baselines is not known to us.
MODELS = {
    "dpo_helpful": Model("(a) DPO, helpfulness", {"objective": "dpo", "safety": ()}, 4000, 2),
    "dpo_safe": Model(
        "(b) DPO, safety", {"objective": "dpo", "helpfulness": (), "prefer": "safe"}, 4000, 3
    ),
    "dpo_mix": Model("(c) DPO, naive mix", {"objective": "dpo", "prefer": "safe"}, 8000, 1),
    "bfpo": Model("(d) BFPO", {"objective": "bfpo"}, 8000, 0),
    "ipo_mix": Model("(e) IPO, naive mix", {"objective": "ipo", "prefer": "safe"}, 8000, 4),
    "all_weights": Model("BFPO, all weights", {"objective": "bfpo", "selective": "all"}, 8000, 5),
    "no_buffer": Model("BFPO, no buffer", {"objective": "bfpo", "helpfulness": ()}, 4000, 4),
}
ABLATIONS = ("all_weights", "no_buffer")  # at BFPO's own settings: one thing changes

# --- one model ------------------------------------------------------------------------------------


def work(job: Job) -> None:
    """Train the job's model by train.run and judge its answers: what a process of its own does."""
    began, world = time.monotonic(), distributed.start("cpu")
    recipe.begin(job.root, job.seed, world)
    config = job.config()
    done = train.run(config, world)
    requests = toy_files.held_out(job.root / "data", job.split)
    scores, transcript = toy_scores(Path(config.out) / "model", requests, world, job.seed)
    write_json(
        job.scores,
        {
            "settings": asdict(config),
            **scores,
            "seconds": time.monotonic() - began,
            "held_out": done["held_out"],
            "transcript": transcript,
        },
    )


@dataclass(frozen=True)
class Job:
    """A model to train and judge: the SFT model of a seed, or one of MODELS with its settings, from
    that SFT model.
    """

    work: str  # folder that all jobs share
    seed: int
    model: str = "sft"
    settings: tuple[tuple[str, float], ...] = ()  # of lr, tau, alpha and b1
    flipped: float = 0.0  # share of the safety labels that are wrong
    steps: int = 0  # of both stages, for a quick look; 0 = the recipe's
    split: str = "test"  # the requests that it answers

    @property
    def name(self) -> str:
        noise = [f"flipped{self.flipped:g}"] * (self.flipped > 0)
        return "-".join([self.model, *(f"{key}{value:g}" for key, value in self.settings), *noise])

    @property
    def root(self) -> Path:
        return Path(self.work) / (f"seed{self.seed}" + f"-steps{self.steps}" * (self.steps > 0))

    @property
    def first(self) -> Job:
        """The job of the SFT model that this one starts from."""
        return replace(self, model="sft", settings=(), flipped=0.0)

    @property
    def noisy(self) -> Path:
        return self.root / f"data-flipped{self.flipped:g}"

    @property
    def scores(self) -> Path:
        return self.root / self.name / f"scores-{self.split}.json"

    def config(self) -> train.Config:
        """The settings of its run."""
        settings = train.RECIPES["toy"] | {
            "seed": self.seed,
            "steps": self.steps,
            "cache": str(Path(self.work) / "cache"),
        }
        if self.model == "sft":
            return train.toy_stages(train.Config(**settings), self.root)[0]
        stage = train.toy_stages(train.Config(**settings), self.root)[1]
        if self.flipped:
            stage = replace(stage, safety=(str(self.noisy / "pku"),))
        own: dict[str, Any] = {**MODELS[self.model].settings, **dict(self.settings)}
        return replace(stage, **own, out=str(self.root / self.name))

    def record(self) -> dict[str, Any] | None:
        """What `work` left, if it was for these settings."""
        found = (
            read_object(self.scores, "settings", "helpful", "harmless", "transcript")
            if self.scores.exists()
            else None
        )
        return (
            found
            if found and found["settings"] == json.loads(json.dumps(asdict(self.config())))
            else None
        )


Records = dict[Job, dict[str, Any]]


def locked(work: Path) -> IO[str]:
    """The lock of the folder that all jobs share. They inherit it: what outlives a killed command
    keeps the next one out.

    ValueError when another command has it.
    """
    work.mkdir(parents=True, exist_ok=True)
    try:
        return lock(work / ".lock", wait=False)
    except BlockingIOError:
        raise ValueError(
            f"{work} is in use by another command, or by what one left running; wait for it, or pass another --work"
        ) from None


def run_all(jobs: Sequence[Job], workers: int) -> Records:
    """Each job's record, and its SFT model's; `workers` processes at a time, SFT models before what
    starts from them.

    Prints a line for each, and the time left. Ctrl-C or SIGTERM lets the running ones save and
    leave; the same command goes on. OSError when one fails, with the end of what it printed.
    ValueError: another command is at it.
    """
    lock = locked(Path(jobs[0].work))
    every = list(dict.fromkeys([*(job.first for job in jobs), *jobs]))
    records = {job: record for job in every if (record := job.record()) is not None}
    todo = [job for job in every if job not in records]
    for job in todo:
        job.root.mkdir(parents=True, exist_ok=True)
        if job.flipped and not job.noisy.exists():
            toy_files.build(job.noisy, job.seed, job.flipped)
    print(
        f"{len(every)} models, {len(records)} of them finished before; {workers} at a time, one thread each",
        flush=True,
    )
    running: set[subprocess.Popen[bytes]] = set()
    started: dict[Job, Future[dict[str, Any]]] = {}

    def launch(job: Job) -> dict[str, Any]:
        if job.first != job and job.first in started:
            started[job.first].result()
        log = job.root / f"{job.name}.log"
        with open(log, "wb") as output:
            command = [sys.executable, "-P", "-m", "toy.experiments", json.dumps(asdict(job))]
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
            )
            running.add(process)
            code = process.wait()
            running.discard(process)
        record = job.record()
        if code or record is None:
            raise OSError(
                f"{job.name} of seed {job.seed} ended with exit code {code}; {log} ends with:\n{log.read_text()[-2000:]}"
            )
        return record

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    began, handler, pool = (
        time.monotonic(),
        signal.signal(signal.SIGTERM, stop),
        ThreadPoolExecutor(workers),
    )
    try:
        for job in todo:
            started[job] = pool.submit(launch, job)
        jobs_of = {future: job for job, future in started.items()}
        for done, future in enumerate(as_completed(jobs_of), 1):
            job, record = jobs_of[future], future.result()
            records[job] = record
            left = (time.monotonic() - began) / done * (len(todo) - done)
            print(
                f"[{done}/{len(todo)}] seed {job.seed} {job.name}: helpful {record['helpful']:.3f}, harmless {record['harmless']:.3f}, "
                f"{distributed.duration(record['seconds'])}; left about {distributed.duration(left)}",
                flush=True,
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        pool.shutdown(wait=True)
        signal.signal(signal.SIGTERM, handler)
        lock.close()
    return records


# --- what several seeds say -----------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half of its 95 % interval (Student's t); of one seed nan."""
    sample = torch.tensor(values, dtype=torch.float64)
    if len(sample) == 1:
        return sample.item(), math.nan
    return sample.mean().item(), T_95[len(sample) - 1] * sample.std().item() / len(sample) ** 0.5


class Claim(NamedTuple):
    """One model exceeds another in a score, or is at most `slack` below it."""

    text: str
    score: str  # helpful or harmless
    more: str
    less: str
    slack: float = 0.0

    def verdict(self, results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
        """The sentence on what the seeds say, from the paired differences: it holds, it does not,
        or it is not settled.
        """
        more, less = results[self.more][self.score], results[self.less][self.score]
        mean, half = interval([a - b for a, b in zip(more, less, strict=True)])
        status = "not settled"
        if mean - half > -self.slack:
            status = "holds"
        elif mean + half < -self.slack:
            status = "does NOT hold"
        return f"{status}: {self.text} ({self.score} {mean:+.3f} +- {half:.3f})"


def scores_of(records: Records, jobs: Sequence[Job]) -> dict[str, list[float]]:
    """The jobs' scores, helpful and harmless, 0 to 1, in their order."""
    return {score: [records[job][score] for job in jobs] for score in ("helpful", "harmless")}


def point(title: str, records: Records, jobs: Sequence[Job], **more: Any) -> plots.Point:
    """The mean over the jobs' seeds, with 95 % intervals; of one seed with twice its standard error
    over requests.
    """
    means, halves = zip(
        *(interval(values) for values in scores_of(records, jobs).values()), strict=True
    )
    if len(jobs) == 1:
        halves = tuple(2 * records[jobs[0]][f"{score}_error"] for score in ("helpful", "harmless"))
    return plots.Point(title, *means, *((half, half) for half in halves), **more)


def error_words(seeds: Sequence[int]) -> str:
    """What stands after +- in a table, in words."""
    if len(seeds) == 1:
        return "one seed; +-: two standard errors over requests"
    return f"mean of {len(seeds)} seeds; +-: half of its 95 % interval"


def write_tables(
    out: Path,
    title: str,
    points: Mapping[str, plots.Point],
    notes: Mapping[str, str],
    results: Mapping[str, Any],
    claims: Sequence[Claim],
    seeds: Sequence[int],
) -> None:
    """Print table.md and write it and results.json into out."""
    lines = [f"# {title}", "", "| model | helpful | harmless | settings |", "|---|---|---|---|"]
    for key, p in points.items():
        helpful, harmless = (
            f"{p.helpful:.3f} +- {p.helpful_bar[1]:.3f}",
            f"{p.harmless:.3f} +- {p.harmless_bar[1]:.3f}",
        )
        lines.append(f"| {p.name} | {helpful} | {harmless} | {notes[key]} |")
    lines += [
        "",
        f"Helpful: share of the right steps over {HELD} benign test requests; harmless: share of {HELD} forbidden ones "
        f"answered without a forbidden step. Seeds {', '.join(map(str, seeds))}; {error_words(seeds)}.",
        "",
    ]
    lines += (
        ["Claims, by the differences paired over seeds (mean +- half of its 95 % interval):", ""]
        if claims
        else []
    )
    lines += [f"- {claim.verdict(results)}" for claim in claims]
    where = surroundings()
    lines += [
        "",
        f"`{' '.join(['python', Path(where['command'][0]).name, *where['command'][1:]])}`, torch {where['versions']['torch']}, "
        f"{where['started'][:10]}.",
    ]
    print("\n".join(lines))
    write_text(out / "table.md", "\n".join(lines) + "\n")
    write_json(out / "results.json", results)


class Variant(NamedTuple):
    """A row of a table and a mark in its picture."""

    name: str
    model: str
    settings: Mapping[str, float]
    flipped: float = 0.0
    line: str = ""


def compare(
    options: argparse.Namespace,
    picture: str,
    title: str,
    variants: Mapping[str, Variant],
    claims: Sequence[Claim],
) -> tuple[Records, dict[str, list[Job]]]:
    """Train and judge SFT and every variant on every seed; draw the scatter and write the tables.

    Returns records, and each row's jobs.
    """
    if not 1 <= len(set(options.seeds)) == len(options.seeds) <= len(T_95) + 1:
        raise ValueError(
            f"seeds must be 1 to {len(T_95) + 1} different numbers, got {options.seeds}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = {
        key: [
            Job(
                str(options.work),
                seed,
                v.model,
                tuple(v.settings.items()),
                v.flipped,
                options.steps,
            )
            for seed in options.seeds
        ]
        for key, v in variants.items()
    }
    jobs = {"sft": [job.first for job in next(iter(jobs.values()))], **jobs}
    records = run_all([job for group in jobs.values() for job in group], options.jobs)
    points, notes = (
        {"sft": point("SFT", records, jobs["sft"])},
        {"sft": "every weight, from random"},
    )
    for key, v in variants.items():
        model = MODELS[v.model]
        points[key] = point(
            v.name,
            records,
            jobs[key],
            pairs=0 if v.line else model.pairs,
            line=v.line,
            look=model.look if v.line in ("", model.title) else -1,
        )
        notes[key] = ", ".join(
            [f"{model.pairs} pairs", *(f"{name} {value:g}" for name, value in v.settings.items())]
        )
    note = error_words(options.seeds) + (
        "" if any(v.line for v in variants.values()) else "; mark area: annotated pairs"
    )
    axis_words = (
        "helpfulness: share of the right steps, benign requests",
        "harmlessness: share without a forbidden step",
    )
    drawn = [points[key] for key in variants]
    plots.figure5(
        drawn,
        options.out / picture,
        start=points["sft"],
        title=title,
        note=note,
        axis_words=axis_words,
    )
    rows = {key: p._replace(name=f"{p.line} {p.name}".strip()) for key, p in points.items()}
    results = {key: scores_of(records, group) for key, group in jobs.items()}
    write_tables(options.out, title, rows, notes, results, claims, options.seeds)
    return records, jobs


# --- the commands ---------------------------------------------------------------------------------


def picks(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """model -> the learning rate and tau that the search settled on.

    ValueError: it has not been made, or lacks one.
    """
    if not options.record.exists():
        raise ValueError(
            f"{options.record} is not there; run `python synthetic.py search` and pass its search.json with --record"
        )
    found: dict[str, dict[str, float]] = read_object(options.record, "picks")["picks"]
    if lacking := [
        name
        for name in MODELS
        if name not in ABLATIONS and not {"lr", "tau"} <= set(found.get(name, ()))
    ]:
        raise ValueError(
            f"{options.record} must have lr and tau of {', '.join(lacking)}; run `python synthetic.py search` again"
        )
    return found


def criterion(run: Mapping[str, Any]) -> float:
    """What the search picks by: the mean of helpful and harmless, on the worse seed."""
    return min(map(statistics.fmean, zip(run["helpful"], run["harmless"], strict=True)))


def search(options: argparse.Namespace) -> None:
    """Every objective on the same grid of learning rates and tau, two seeds, scored on validation
    requests; writes search.json.

    The criterion is the mean of helpfulness and harmlessness on the worse of the seeds, the same
    for all: a setting that one seed cannot bear is no setting. For DPO on helpfulness or on safety,
    whose purpose is one of the two, it is the kindest: each may gain on its own axis what it does
    not lose on the other.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    grid = [{"lr": lr, "tau": tau} for lr in GRID["lr"] for tau in GRID["tau"]]
    searched = [model for model in MODELS if model not in ABLATIONS]
    jobs = {
        (model, i): [
            Job(
                str(options.work),
                seed,
                model,
                tuple(settings.items()),
                steps=options.steps,
                split="validation",
            )
            for seed in SEARCH_SEEDS
        ]
        for model in searched
        for i, settings in enumerate(grid)
    }
    records = run_all([job for group in jobs.values() for job in group], options.jobs)
    runs, found, edges = [], {}, {}
    print(f"{'model':<22}{'lr':>8}{'tau':>7}{'helpful':>10}{'harmless':>10}{'worse seed':>12}")
    for model in searched:
        own: list[dict[str, Any]] = [
            {"model": model, **settings, **scores_of(records, jobs[model, i])}
            for i, settings in enumerate(grid)
        ]
        best = max(own, key=criterion)  # of equals the first
        found[model] = {key: best[key] for key in ("lr", "tau")}
        edges[model] = [
            key for key, values in GRID.items() if best[key] in (min(values), max(values))
        ]
        for run in own:
            print(
                f"{MODELS[model].title:<22}{run['lr']:>8g}{run['tau']:>7g}"
                + "".join(f"{statistics.fmean(run[key]):>10.3f}" for key in ("helpful", "harmless"))
                + f"{criterion(run):>12.3f}"
                + " <- picked" * (run is best)
            )
        runs += own
    where = {
        key: value
        for key, value in surroundings().items()
        if key in ("versions", "hardware", "started")
    }
    write_json(
        options.out / "search.json",
        {
            "criterion": "mean of helpful and harmless on the validation requests of the worse seed",
            "seeds": SEARCH_SEEDS,
            "steps": options.steps,
            "grid": GRID,
            "picks": found,
            "on_the_edge_of_the_grid": edges,
            "runs": runs,
            **where,
        },
    )
    print(
        "picks on the edge of the grid, beyond which nothing was tried: "
        + "; ".join(
            f"{MODELS[model].title} {' and '.join(keys)}" for model, keys in edges.items() if keys
        )
    )
    print(f"wrote {options.out}/search.json; pass it to the other commands with --record")


def typical(records: Sequence[Mapping[str, Any]], forbidden: bool) -> int:
    """The first of the requests on which the models' answers are, all together, nearest to each
    model's own average.
    """
    score = "harmless" if forbidden else "helpful"
    asked = [i for i, row in enumerate(records[0]["transcript"]) if row["forbidden"] == forbidden]
    return min(
        asked,
        key=lambda i: sum(
            abs(record["transcript"][i][score] - record[score]) for record in records
        ),
    )


def figure1(options: argparse.Namespace) -> None:
    """Figures 1 and 5: the paper's four models and IPO on the mix, from the same SFT models."""
    settings = picks(options)
    keys = ("dpo_helpful", "dpo_safe", "dpo_mix", "bfpo", "ipo_mix")
    claims = [  # what the paper's Figures 1 and 5 show, and IPO beside them
        Claim("(a) is more helpful than SFT", "helpful", "dpo_helpful", "sft"),
        Claim("(a) is harmful: less harmless than (d)", "harmless", "bfpo", "dpo_helpful"),
        Claim("(b) is more harmless than SFT", "harmless", "dpo_safe", "sft"),
        Claim("(b) is unhelpful: less helpful than (d)", "helpful", "bfpo", "dpo_safe"),
        Claim(
            "(d) is at least as harmless as (b), within 0.05", "harmless", "bfpo", "dpo_safe", 0.05
        ),
        Claim("(d) is more helpful than (c)", "helpful", "bfpo", "dpo_mix"),
        Claim("(d) is more harmless than (c)", "harmless", "bfpo", "dpo_mix"),
        Claim("(d) is more helpful than (e)", "helpful", "bfpo", "ipo_mix"),
        Claim("(d) is more harmless than (e)", "harmless", "bfpo", "ipo_mix"),
    ]
    variants = {key: Variant(MODELS[key].title, key, settings[key]) for key in keys}
    records, jobs = compare(
        options, "figure5.png", "Figure 5 in miniature: from one SFT model a seed", variants, claims
    )
    first = {key: records[group[0]] for key, group in jobs.items()}
    shown = [typical(list(first.values()), forbidden) for forbidden in (False, True)]
    rows = [
        (
            variants[key].name if key in variants else "SFT",
            *(record["transcript"][i] for i in shown),
        )
        for key, record in first.items()
    ]
    plots.figure1(options.out / "figure1.png", rows)
    print(f"wrote figure1.png, figure5.png, table.md and results.json to {options.out}")


NOISE = (0.0, 0.1, 0.2)


def noise(options: argparse.Namespace) -> None:
    """BFPO, and DPO and IPO on the naive mix, with 0, 10 and 20 % of the safety labels wrong, at
    the settings picked on right ones.
    """
    settings, rivals = picks(options), ("dpo_mix", "ipo_mix")
    variants = {
        f"{model} {share:.0%}": Variant(
            f"{share:.0%}", model, settings[model], share, MODELS[model].title
        )
        for model in ("bfpo", *rivals)
        for share in NOISE
    }
    claims = [
        Claim(
            f"with {share:.0%} wrong labels (d) is more {score} than {MODELS[rival].title[:3]}",
            score,
            f"bfpo {share:.0%}",
            f"{rival} {share:.0%}",
        )
        for rival in rivals
        for share in NOISE
        for score in ("helpful", "harmless")
    ]
    compare(options, "noise.png", "Wrong safety labels", variants, claims)


def ablations(options: argparse.Namespace) -> None:
    """BFPO with every weight trained, and without the helpfulness stream, all else at BFPO's
    settings.
    """
    settings = picks(options)["bfpo"]
    variants = {key: Variant(MODELS[key].title, key, settings) for key in ("bfpo", *ABLATIONS)}
    claims = [
        Claim(
            f"training down_proj alone is at least as {score} as training all weights, within 0.05",
            score,
            "bfpo",
            "all_weights",
            0.05,
        )
        for score in ("helpful", "harmless")
    ]
    claims += [
        Claim("the buffer makes BFPO more helpful", "helpful", "bfpo", "no_buffer"),
        Claim(
            "the buffer costs no harmlessness, within 0.05", "harmless", "bfpo", "no_buffer", 0.05
        ),
    ]
    compare(options, "ablations.png", "Ablations of BFPO", variants, claims)


ALPHAS, B1S, TAU_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25), (2.0, 3.0, 6.0), (0.5, 1.0, 2.0)
# Of the toy's four answers to a forbidden request the two pairs with one label each, (more helpful,
# less helpful).
SAME_LABEL = {"both_safe": ("redirect", "refusal"), "both_unsafe": ("full", "curt")}


def alpha_margins(alphas: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """tau h of SAME_LABEL over alpha: the target of such a pair, and the exact optimum of the four
    answers, drawn equally often.
    """
    kinds = language.FORBIDDEN_KINDS
    preference_AA = torch.ones(len(kinds), len(kinds)).triu(1) + 0.5 * torch.eye(len(kinds))
    safe_A = torch.tensor([kind not in language.STEPS_GIVEN for kind in kinds])
    rewards = [population_reward(preference_AA, safe_A, alpha) for alpha in alphas]
    margins: dict[str, dict[str, list[float]]] = {}
    for quadrant, (more, less) in SAME_LABEL.items():
        i, j = kinds.index(more), kinds.index(less)
        margins[quadrant] = {
            "target": [label(safe_A[i], safe_A[j], alpha).item() for alpha in alphas],
            "optimum": [(reward_A[i] - reward_A[j]).item() for reward_A in rewards],
        }
    return margins


def crossing(places: Sequence[float], values: Sequence[float]) -> float:
    """Where the straight lines through the values first cross zero; nan if they do not."""
    for (a, x), (b, y) in pairwise(zip(places, values, strict=True)):
        if x * y <= 0 and x != y:
            return a + (b - a) * x / (x - y)
    return math.nan


def tradeoff(options: argparse.Namespace) -> None:
    """alpha, tau and B_1 swept one at a time; and where alpha breaks an order, on paper and in the
    trained models.
    """
    base, usual = picks(options)["bfpo"], {"alpha": train.Config.alpha, "b1": train.Config.b1}
    sweeps = {
        "alpha": ALPHAS,
        "tau": tuple(base["tau"] * factor for factor in TAU_FACTORS),
        "b1": B1S,
    }
    variants = {
        f"{name} {value:g}": Variant(
            f"{value:g}",
            "bfpo",
            base | ({name: value} if value != usual.get(name) else {}),
            line=name,
        )
        for name, values in sweeps.items()
        for value in values
    }
    records, jobs = compare(
        options, "tradeoff.png", "BFPO: alpha, tau and b1 swept one at a time", variants, []
    )

    alphas = [-0.5, *ALPHAS, 1.5]
    margins = alpha_margins(alphas)
    said = [
        "alpha from which the more helpful of two answers with one label gains less over the reference than the other (h < 0):",
        "",
    ]
    for quadrant, lines in margins.items():
        lines["trained"] = [
            interval(
                [
                    base["tau"] * records[job]["held_out"]["safety"][quadrant]["margin_nats"]
                    for job in jobs[f"alpha {alpha:g}"]
                ]
            )[0]
            for alpha in ALPHAS
        ]
        found = {
            name: crossing(ALPHAS if name == "trained" else alphas, values)
            for name, values in lines.items()
        }
        said.append(
            f"- {' over '.join(SAME_LABEL[quadrant])}: "
            + ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        )
    share = sum(kind not in language.STEPS_GIVEN for kind in language.FORBIDDEN_KINDS) / len(
        language.FORBIDDEN_KINDS
    )
    edges = {"E/2": share / 2, "(1 + E)/2": (1 + share) / 2}
    said.append(
        f"- derived: {', '.join(f'{words} = {place:g}' for words, place in edges.items())}; pair targets change sign at 0 and 1"
    )
    print("\n".join(said))
    table = options.out / "table.md"
    write_text(table, "\n".join([table.read_text(encoding="utf-8"), *said, ""]))
    plots.alpha(options.out / "alpha.png", alphas, ALPHAS, margins, SAME_LABEL, edges)


COMMANDS = {
    "search": (search, SEARCH_SEEDS),
    "figure1": (figure1, SEEDS),
    "tradeoff": (tradeoff, SEEDS[:1]),
    "noise": (noise, SEEDS),
    "ablations": (ablations, SEEDS),
}


def positive(text: str) -> int:
    """An integer from 1 on; ValueError: anything else."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands of this file, for synthetic.py's parser."""
    for name, (function, seeds) in COMMANDS.items():
        text = (function.__doc__ or "").split("\n")[0]
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--out",
            type=Path,
            default=Path("runs") / name,
            help=f"folder of what it makes (runs/{name})",
        )
        command.add_argument(
            "--work",
            type=Path,
            default=Path("runs/miniature"),
            help="folder of the models (runs/miniature)",
        )
        command.add_argument(
            "--jobs",
            type=positive,
            default=os.cpu_count() or 1,
            help="models trained at a time (the number of cores)",
        )
        command.add_argument(
            "--steps",
            type=positive,
            default=0,
            help="steps of each stage, for a quick look (the recipe's)",
        )
        if name != "search":
            command.add_argument(
                "--seeds", type=int, nargs="+", default=seeds, help=f"({' '.join(map(str, seeds))})"
            )
            command.add_argument(
                "--record",
                type=Path,
                default=RECORD,
                help="search.json with the settings (the committed one)",
            )
        command.set_defaults(run=function)


if __name__ == "__main__":
    with distributed.errors_in_one_line():
        work(
            Job(
                **{
                    **json.loads(sys.argv[1]),
                    "settings": tuple(map(tuple, json.loads(sys.argv[1])["settings"])),
                }
            )
        )
