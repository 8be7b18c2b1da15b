"""The paper in miniature: its claim measured on the toy language, whose judge is exact.

    python synthetic.py search       each objective's learning rate and tau, on validation requests
    python synthetic.py figure1      Figures 1 and 5: DPO on helpfulness, safety and the naive mix,
                                     BFPO; IPO on the mix
    python synthetic.py tradeoff     alpha, tau and B_1 swept (Proposition 3.3)
    python synthetic.py noise        wrong safety labels: BFPO, DPO and IPO on the naive mix
    python synthetic.py ablations    selective fine-tuning, the buffer, and half of tau

Each writes to runs/<command>. Every model is a run of train.py's own `run`, from one SFT model a
seed, in a process with one thread; `toy_scores` of toy/recipe.py judges it. The runs lie in one
folder that all commands share: what is finished is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from multiprocessing import connection
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train
from bfpo import label, population_reward
from support import distributed, plots
from support.storage import read_object, surroundings, write_json, write_text
from toy import files as toy_files
from toy import language, recipe
from toy.files import HELD, PAIRS
from toy.recipe import toy_scores

# The record of the search that the other commands take their settings from.
RECORD = Path(__file__).parent.parent / "figures" / "search.json"
SEEDS = (1, 2, 3, 4, 5, 6)  # of data, first weights and order; the settings were searched on others
SEARCH_SEEDS = (42, 43)
EPOCHS = 4  # of the safety pairs, 500 steps; after 250 BFPO is still far from its targets
START = {"lr": 5e-5, "tau": 0.25}  # where the search begins
FACTORS = (1, 0.5, 2)  # from a setting to its neighbours, itself first
ROUNDS = 4  # of the search, in each of which a pick moves by a factor of at most 2
# Degrees of freedom -> 97.5th percentile of Student's t.
T_95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 1))
SCORES = ("helpful", "harmless")
SPAWN = multiprocessing.get_context("spawn")  # a fresh process, as fork is unsafe beside threads


class Model(NamedTuple):
    """A way to train the SFT model on."""

    title: str
    settings: Mapping[str, Any]  # over the recipe toy's
    pairs: int  # labelled pairs that it learns from
    look: int  # of plots.LOOKS


# The paper's four (Figure 1), IPO, the paper's two ablations, and two with other targets. `prefer:
# safe` puts the safe one of a safe and an unsafe answer first; of two safe and of two unsafe ones
# the more helpful. How the paper orders the pairs of its baselines is not known to us.
DPO_SAFE = {"objective": "dpo", "helpfulness": (), "prefer": "safe"}
MODELS = {
    "sft": Model("SFT", {}, 0, 0),
    "dpo_helpful": Model("(a) DPO, helpfulness", {"objective": "dpo", "safety": ()}, 4000, 2),
    "dpo_safe": Model("(b) DPO, safety", DPO_SAFE, 4000, 3),
    "dpo_mix": Model("(c) DPO, naive mix", {"objective": "dpo", "prefer": "safe"}, 8000, 1),
    "bfpo": Model("(d) BFPO", {"objective": "bfpo"}, 8000, 0),
    "ipo_mix": Model("(e) IPO, naive mix", {"objective": "ipo", "prefer": "safe"}, 8000, 4),
    "all_weights": Model("BFPO, all weights", {"objective": "bfpo", "selective": "all"}, 8000, 5),
    "no_buffer": Model("BFPO, no buffer", {"objective": "bfpo", "helpfulness": ()}, 4000, 2),
    "bfpo_strong": Model("BFPO, half of its tau", {"objective": "bfpo"}, 8000, 1),
    "ipo_weak": Model("IPO, twice its tau", {"objective": "ipo", "prefer": "safe"}, 8000, 3),
}
SEARCHED = ("dpo_helpful", "dpo_safe", "dpo_mix", "bfpo", "ipo_mix")

# --- the models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A model to train and judge: the SFT model of a seed, or one of MODELS trained on from it."""

    work: str  # folder that all jobs share
    seed: int
    model: str = "sft"
    settings: tuple[tuple[str, float], ...] = ()  # of lr, tau, alpha and b1
    flipped: float = 0.0  # share of the safety labels that are wrong
    steps: int = 0  # of both stages, for a quick look; 0 = the recipe's
    split: str = "test"  # the requests that it answers

    @property
    def name(self) -> str:
        parts = [self.model, *(f"{key}{value:g}" for key, value in self.settings)]
        if self.flipped:
            parts.append(f"flipped{self.flipped:g}")
        return "-".join(parts)

    @property
    def root(self) -> Path:
        folder = f"seed{self.seed}"
        if self.steps:
            folder += f"-steps{self.steps}"
        return Path(self.work) / folder

    @property
    def first(self) -> Job:
        """The job of the SFT model that this one starts from."""
        return replace(self, model="sft", settings=(), flipped=0.0)

    @property
    def noisy(self) -> Path:
        return self.root / f"data-flipped{self.flipped:g}"

    @property
    def log(self) -> Path:
        return self.root / f"{self.name}.log"

    @property
    def scores(self) -> Path:
        return self.root / self.name / f"scores-{self.split}.json"

    def config(self) -> train.Config:
        """The settings of its run."""
        shared = {"seed": self.seed, "steps": self.steps, "cache": str(Path(self.work) / "cache")}
        toy = replace(train.Config(**train.RECIPES["toy"] | shared), epochs=EPOCHS)
        sft, preference = train.toy_stages(toy, self.root)
        if self.model == "sft":
            return sft
        if self.flipped:
            preference = replace(preference, safety=(str(self.noisy / "pku"),))
        own: dict[str, Any] = {**MODELS[self.model].settings, **dict(self.settings)}
        return replace(preference, **own, out=str(self.root / self.name))

    def record(self) -> dict[str, Any] | None:
        """What `work` left, if it was for these settings."""
        if not self.scores.exists():
            return None
        record = read_object(self.scores, "settings", "helpful", "harmless", "transcript")
        settings = json.loads(json.dumps(asdict(self.config())))
        return record if record["settings"] == settings else None


Records = dict[Job, dict[str, Any]]


def work(job: Job) -> None:
    """What a job's process does: train the model, judge its answers, keep both. It prints to a log.

    Its scores are kept last, so that a job with scores is whole.
    """
    began = time.monotonic()
    with (
        open(job.log, "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        distributed.errors_in_one_line(),
    ):
        world = distributed.start("cpu")
        recipe.begin(job.root, job.seed, world)
        config = job.config()
        done = train.run(config, world)
        requests = toy_files.held_out(job.root / "data", job.split)
        scores, transcript = toy_scores(Path(config.out) / "model", requests, world, job.seed)
        record = {"settings": asdict(config), **scores, "seconds": time.monotonic() - began}
        write_json(job.scores, record | {"held_out": done["held_out"], "transcript": transcript})


def finished(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Runs each job in a process of its own, `workers` at a time; yields each record as it comes.

    OSError when one fails, with the end of its log. When this command ends, for whatever reason,
    Python sends SIGTERM to the processes that are left, as they are daemons, and waits for them.
    train.run then saves.
    """
    waiting = list(jobs)
    running: dict[Any, tuple[Any, Job]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            job.root.mkdir(parents=True, exist_ok=True)
            if job.flipped and not job.noisy.exists():
                toy_files.build(job.noisy, job.seed, job.flipped)
            process = SPAWN.Process(target=work, args=(job,), daemon=True)
            process.start()
            running[process.sentinel] = (process, job)
        for sentinel in connection.wait(list(running)):
            process, job = running.pop(sentinel)
            process.join()
            record = job.record()
            if process.exitcode or record is None:
                raise OSError(
                    f"{job.name} of seed {job.seed} ended with exit code {process.exitcode}; "
                    f"{job.log} ends with:\n{job.log.read_text()[-2000:]}"
                )
            yield job, record


def run_all(jobs: Sequence[Job], workers: int) -> Records:
    """Each job's record, and its SFT model's, which is trained before what starts from it.

    Prints a line for each, and the time left. Ctrl-C or SIGTERM lets the running ones save and
    leave; the same command goes on.
    """
    every = list(dict.fromkeys([*(job.first for job in jobs), *jobs]))
    records = {job: record for job in every if (record := job.record()) is not None}
    todo = [job for job in every if job not in records]
    print(
        f"{len(every)} models, {len(records)} of them finished before; {workers} at a time, one "
        "thread each",
        flush=True,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    began = time.monotonic()
    first = [job for job in todo if job.model == "sft"]
    second = [job for job in todo if job.model != "sft"]
    trained = chain(finished(first, workers), finished(second, workers))
    for done, (job, record) in enumerate(trained, 1):
        records[job] = record
        left = (time.monotonic() - began) / done * (len(todo) - done)
        print(
            f"[{done}/{len(todo)}] seed {job.seed} {job.name}: helpful {record['helpful']:.3f}, "
            f"harmless {record['harmless']:.3f}, {distributed.duration(record['seconds'])}; "
            f"left about {distributed.duration(left)}",
            flush=True,
        )
    return records


# --- the exact optimum ----------------------------------------------------------------------------

KINDS = language.FORBIDDEN_KINDS
SAFE_A = torch.tensor([kind in toy_files.SAFE_KINDS for kind in KINDS])
MORE = [KINDS.index(more) for more, _ in toy_files.SAFETY_PAIRS]
LESS = [KINDS.index(less) for _, less in toy_files.SAFETY_PAIRS]
SHARE_N = torch.tensor(list(toy_files.SAFETY_PAIRS.values()), dtype=torch.float64)
# The two pairs of KINDS with one label each, (more helpful, less helpful).
SAME_LABEL = {"both_safe": ("redirect", "refusal"), "both_unsafe": ("full", "curt")}


def forbidden_reward(objective: str, alpha: float = 0.5, b1: float = 3.0) -> dict[str, float]:
    """tau log(pi*/pi_ref) of KINDS under BFPO, or IPO with `prefer: safe`, up to a constant.

    The least-squares solution of reward[more] - reward[less] = g over the safety pairs. Only where
    pi_ref draws both answers of a pair is population_reward its closed form.
    """
    more_N = SAFE_A[MORE]
    less_N = SAFE_A[LESS]
    g_N = label(more_N.double(), less_N.double(), alpha, b1)
    if objective == "ipo":  # -1/2 where the safe answer is the less helpful one
        g_N = torch.where(less_N & ~more_N, -0.5, 0.5).double()
    actions_AA = torch.eye(len(KINDS), dtype=torch.float64)
    root_N = SHARE_N.sqrt()
    weighted_NA = root_N[:, None] * (actions_AA[MORE] - actions_AA[LESS])
    reward_A = torch.linalg.pinv(weighted_NA) @ (root_N * g_N)
    return dict(zip(KINDS, reward_A.tolist(), strict=True))


def exact_scores(objective: str, tau: float, **of_label: Any) -> tuple[float, float]:
    """(helpful, harmless) of pi*, with the kinds of answers in SFT's conversations as pi_ref.

    2000 conversations answer forbidden requests; 800 are the safer answers of safety pairs.
    """
    count = len(language.BENIGN_KINDS)
    preference_AA = torch.ones(count, count).triu(1) + 0.5 * torch.eye(count)
    benign_A = population_reward(preference_AA, torch.ones(count), **of_label) / tau
    benign_A += torch.tensor(toy_files.SFT_BENIGN).log()
    steps_A = torch.tensor([language.STEPS_GIVEN.get(kind, 0) for kind in language.BENIGN_KINDS])

    rows_A = 2000 * torch.tensor(toy_files.SFT_FORBIDDEN) / sum(toy_files.SFT_FORBIDDEN)
    for i, j, share in zip(MORE, LESS, SHARE_N, strict=True):
        rows_A[i if SAFE_A[i] > SAFE_A[j] else j] += 800 * share
    reward_A = torch.tensor(list(forbidden_reward(objective, **of_label).values()))
    forbidden_A = rows_A.log() + reward_A / tau
    helpful = benign_A.softmax(0) @ steps_A.double() / 4
    return helpful.item(), forbidden_A.softmax(0)[SAFE_A].sum().item()


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
        """What the seeds say, from the paired differences: it holds, it does not, or it is not
        settled.
        """
        more = results[self.more][self.score]
        less = results[self.less][self.score]
        mean, half = interval([a - b for a, b in zip(more, less, strict=True)])
        status = "not settled"
        if mean - half > -self.slack:
            status = "holds"
        elif mean + half < -self.slack:
            status = "does NOT hold"
        return f"{status}: {self.text} ({self.score} {mean:+.3f} +- {half:.3f})"


def scores_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Helpful and harmless, 0 to 1, of each record."""
    return {score: list(map(itemgetter(score), records)) for score in SCORES}


class Variant(NamedTuple):
    """A row of a table and a mark in its picture."""

    name: str
    model: str
    settings: Mapping[str, float]
    flipped: float = 0.0
    line: str = ""

    def jobs(self, options: argparse.Namespace) -> list[Job]:
        """One for each seed."""
        settings = tuple(self.settings.items())
        job = Job(str(options.work), 0, self.model, settings, self.flipped, options.steps)
        return [replace(job, seed=seed, split=options.split) for seed in options.seeds]

    def point(self, records: Sequence[Mapping[str, Any]]) -> plots.Point:
        """The mean over seeds, with its 95 % interval; of one seed with twice its standard error
        over requests.
        """
        scores = scores_of(records)
        helpful, helpful_bar = interval(scores["helpful"])
        harmless, harmless_bar = interval(scores["harmless"])
        if len(records) == 1:
            helpful_bar = 2 * records[0]["helpful_error"]
            harmless_bar = 2 * records[0]["harmless_error"]
        point = plots.Point(
            self.name, helpful, harmless, (helpful_bar,) * 2, (harmless_bar,) * 2, line=self.line
        )
        title, _, pairs, look = MODELS[self.model]
        if self.line == "":
            return point._replace(pairs=pairs, look=look)
        return point._replace(look=look) if self.line == title else point

    def row(self, point: plots.Point) -> str:
        """Its line of the table."""
        name = f"{self.line} {self.name}".strip()
        helpful = f"{point.helpful:.3f} +- {point.helpful_bar[1]:.3f}"
        harmless = f"{point.harmless:.3f} +- {point.harmless_bar[1]:.3f}"
        note = "every weight, from random"
        exact = "-"
        if self.model != "sft":
            _, own, pairs, _ = MODELS[self.model]
            parts = [f"{key} {value:g}" for key, value in self.settings.items()]
            note = ", ".join([f"{pairs} pairs", *parts])
            if own["objective"] != "dpo" and pairs == 2 * PAIRS and not self.flipped:
                settings = {key: value for key, value in self.settings.items() if key != "lr"}
                exact = "{:.3f} / {:.3f}".format(*exact_scores(own["objective"], **settings))
        return f"| {name} | {helpful} | {harmless} | {exact} | {note} |"


def picture_note(seeds: Sequence[int], variants: Sequence[Variant]) -> str:
    """What the marks and bars of a picture mean."""
    note = f"Marks: means of {len(seeds)} seeds. Bars: 95 % intervals."
    if len(seeds) == 1:
        note = "Marks: one seed. Bars: two standard errors over requests."
    pairs = {MODELS[variant.model].pairs for variant in variants}
    if len(pairs) > 1:
        note += f" Large marks: {max(pairs)} labelled pairs. Small marks: {min(pairs)}."
    return note


def write_tables(
    out: Path,
    title: str,
    rows: Sequence[str],
    results: Mapping[str, Any],
    claims: Sequence[Claim],
    seeds: Sequence[int],
) -> None:
    """Print table.md and write it and results.json into out."""
    bars = f"mean of {len(seeds)} seeds; +-: half of its 95 % interval"
    if len(seeds) == 1:
        bars = "one seed; +-: two standard errors over requests"
    lines = [
        f"# {title}",
        "",
        "| model | helpful | harmless | exact optimum | settings |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Helpful: share of the right steps over {HELD} benign test requests; harmless: share of "
        f"{HELD} forbidden ones answered without a forbidden step. Seeds "
        f"{', '.join(map(str, seeds))}; {bars}. Exact optimum: helpful / harmless of the policy "
        "with the least loss, for BFPO and IPO on right labels.",
        "",
    ]
    if claims:
        lines += [
            "Claims, by the differences paired over seeds (mean +- half of its 95 % interval):",
            "",
        ]
    lines += [f"- {claim.verdict(results)}" for claim in claims]
    where = surroundings()
    program, *arguments = where["command"]
    command = " ".join(["python", Path(program).name, *arguments])
    lines += ["", f"`{command}`, torch {where['versions']['torch']}, {where['started'][:10]}."]
    print("\n".join(lines))
    write_text(out / "table.md", "\n".join(lines) + "\n")
    write_json(out / "results.json", results)


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
        raise ValueError(f"pass 1 to {len(T_95) + 1} different --seeds, got {options.seeds}")
    options.out.mkdir(parents=True, exist_ok=True)
    shown = {"sft": Variant("SFT", "sft", {}), **variants}
    jobs = {key: variant.jobs(options) for key, variant in shown.items()}
    records = run_all(list(chain(*jobs.values())), options.jobs)
    points = {}
    rows = []
    results = {}
    for key, variant in shown.items():
        group = [records[job] for job in jobs[key]]
        points[key] = variant.point(group)
        rows.append(variant.row(points[key]))
        results[key] = scores_of(group)
    start = points.pop("sft")
    plots.figure5(
        list(points.values()),
        options.out / picture,
        start=start,
        title=title,
        axis_words=(
            "helpfulness: share of the right steps, benign requests",
            "harmlessness: share without a forbidden step",
        ),
        note=picture_note(options.seeds, list(variants.values())),
    )
    write_tables(options.out, title, rows, results, claims, options.seeds)
    return records, jobs


# --- the commands ---------------------------------------------------------------------------------


def picks(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """model -> the learning rate and tau that the search settled on. ValueError: no such record."""
    remedy = "run `python synthetic.py search` and pass its search.json with --record"
    return dict(read_object(options.record, "picks", remedy=remedy)["picks"])


def criterion(run: Mapping[str, Any]) -> float:
    """What the search picks by: the mean of helpful and harmless, on the worse seed."""
    return min(map(statistics.fmean, zip(run["helpful"], run["harmless"], strict=True)))


def neighbours(pick: Mapping[str, Any]) -> list[tuple[float, float]]:
    """A pick's learning rate and tau, then half, once and twice the one with each of the other."""
    return [(pick["lr"] * a, pick["tau"] * b) for a, b in product(FACTORS, FACTORS)]


def try_settings(
    options: argparse.Namespace, untried: Mapping[str, Sequence[tuple[float, float]]]
) -> list[dict[str, Any]]:
    """Both scores, over seeds, of each model at its learning rates and tau."""
    jobs = {}
    for model, places in untried.items():
        for lr, tau in places:
            jobs[model, lr, tau] = Variant("", model, {"lr": lr, "tau": tau}).jobs(options)
    records = run_all(list(chain(*jobs.values())), options.jobs)
    runs = []
    for (model, lr, tau), group in jobs.items():
        scores = scores_of([records[job] for job in group])
        runs.append({"model": model, "lr": lr, "tau": tau, **scores})
    return runs


def search(options: argparse.Namespace) -> None:
    """Every objective's learning rate and tau, by moving to the best neighbour until none is
    better; two seeds, scored on validation requests; writes search.json.

    So each pick is as good as its eight neighbours. Where the scores rise on and on, the search
    ends after ROUNDS, and the record names the neighbours that it did not try. The criterion is the
    mean of helpfulness and harmlessness on the worse of the seeds, the same for all: a setting that
    one seed cannot bear is no setting. It is the kindest for DPO on helpfulness or on safety, whose
    purpose is one of the two: each may gain on its own axis what it does not lose on the other.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    picked: dict[str, Mapping[str, Any]] = {}
    untried = {model: neighbours(START) for model in SEARCHED}
    for _ in range(ROUNDS):
        runs += try_settings(options, untried)
        for model in SEARCHED:
            own = {(run["lr"], run["tau"]): run for run in runs if run["model"] == model}
            picked[model] = max(own.values(), key=criterion)  # of equals the one tried first
            untried[model] = [place for place in neighbours(picked[model]) if place not in own]
        if not any(untried.values()):
            break

    for model, run in picked.items():
        edge = ", on the edge of what was tried" if untried[model] else ""
        print(f"{MODELS[model].title}: lr {run['lr']:g}, tau {run['tau']:g}{edge}")
    where = surroundings()
    record = {
        "criterion": "mean of helpful and harmless on the validation requests of the worse seed",
        "seeds": options.seeds,
        "steps": options.steps,
        "rounds": ROUNDS,
        "picks": {model: {"lr": best["lr"], "tau": best["tau"]} for model, best in picked.items()},
        "on_the_edge_of_the_grid": untried,
        "runs": runs,
        **{key: where[key] for key in ("versions", "hardware", "started")},
    }
    write_json(options.out / "search.json", record)
    print(f"wrote {options.out}/search.json; pass it to the other commands with --record")


def typical(records: Sequence[Mapping[str, Any]], forbidden: bool) -> int:
    """The first of the requests on which the models' answers are, all together, nearest to each
    model's own average.
    """
    score = "harmless" if forbidden else "helpful"

    def distance(i: int) -> float:
        gaps = [record["transcript"][i][score] - record[score] for record in records]
        return float(sum(map(abs, gaps)))

    transcript = records[0]["transcript"]
    asked = [i for i, row in enumerate(transcript) if row["forbidden"] == forbidden]
    return min(asked, key=distance)


def figure1(options: argparse.Namespace) -> None:
    """Figures 1 and 5: the paper's four models and IPO on the mix, from the same SFT models."""
    settings = picks(options)
    claims = [  # the caption of the paper's Figure 1, and then what it says nothing of
        Claim("Fig. 1, (a) is harmful: less harmless than SFT", "harmless", "sft", "dpo_helpful"),
        Claim("Fig. 1, (b) is unhelpful: less helpful than SFT", "helpful", "sft", "dpo_safe"),
        Claim("Fig. 1, (c) may be harmful: less harmless than (d)", "harmless", "bfpo", "dpo_mix"),
        Claim("Fig. 1, (c) may be unhelpful: less helpful than (d)", "helpful", "bfpo", "dpo_mix"),
        Claim("Fig. 1, (d) is not harmful: more harmless than SFT", "harmless", "bfpo", "sft"),
        Claim("Fig. 1, (d) is not unhelpful: more helpful than SFT", "helpful", "bfpo", "sft"),
        Claim("(d) is more harmless than (a)", "harmless", "bfpo", "dpo_helpful"),
        Claim("(d) is more helpful than (b)", "helpful", "bfpo", "dpo_safe"),
        Claim("(d) is as harmless as (b), within 0.05", "harmless", "bfpo", "dpo_safe", 0.05),
        Claim("(d) is more helpful than (e)", "helpful", "bfpo", "ipo_mix"),
        Claim("(d) is more harmless than (e)", "harmless", "bfpo", "ipo_mix"),
    ]
    variants = {key: Variant(MODELS[key].title, key, settings[key]) for key in SEARCHED}
    title = "Figure 5 in miniature: five ways to train the same SFT model further"
    records, jobs = compare(options, "figure5.png", title, variants, claims)
    of_first_seed = {key: records[group[0]] for key, group in jobs.items()}
    benign, forbidden = (typical(list(of_first_seed.values()), kind) for kind in (False, True))
    rows = []
    for key, record in of_first_seed.items():
        answers = record["transcript"]
        rows.append((MODELS[key].title, answers[benign], answers[forbidden]))
    plots.figure1(options.out / "figure1.png", rows)
    print(f"wrote figure1.png, figure5.png, table.md and results.json to {options.out}")


NOISE = (0.0, 0.1, 0.2)


def noise(options: argparse.Namespace) -> None:
    """BFPO, and DPO and IPO on the naive mix, with 0, 10 and 20 % of the safety labels wrong, at
    the settings picked on right ones.
    """
    settings = picks(options)
    variants = {}
    for model, share in product(("bfpo", "dpo_mix", "ipo_mix"), NOISE):
        variant = Variant(f"{share:.0%}", model, settings[model], share, MODELS[model].title)
        variants[f"{model} {share:.0%}"] = variant
    claims = []
    for rival, share, score in product(("dpo_mix", "ipo_mix"), NOISE, SCORES):
        text = f"with {share:.0%} wrong labels (d) is more {score} than {MODELS[rival].title[:3]}"
        claims.append(Claim(text, score, f"bfpo {share:.0%}", f"{rival} {share:.0%}"))
    title = "BFPO, DPO and IPO with 0, 10 and 20 % of the safety labels wrong"
    compare(options, "noise.png", title, variants, claims)


def ablations(options: argparse.Namespace) -> None:
    """BFPO with every weight trained, without helpfulness pairs, at half of its tau; IPO at two.

    BFPO asks for 1/(2 tau) between two safe answers and 1/tau between a safe and an unsafe one, IPO
    for 1/(2 tau) between both. With half of BFPO's tau IPO asks twice as much of two safe ones.
    """
    bfpo = picks(options)["bfpo"]
    ipo = picks(options)["ipo_mix"]
    settings = {"bfpo": bfpo, "all_weights": bfpo, "no_buffer": bfpo}
    settings |= {"bfpo_strong": bfpo | {"tau": bfpo["tau"] / 2}}
    settings |= {"ipo_mix": ipo, "ipo_weak": ipo | {"tau": ipo["tau"] * 2}}
    variants = {key: Variant(MODELS[key].title, key, own) for key, own in settings.items()}
    text = "training down_proj alone is as {} as training all weights, within 0.05"
    claims = [Claim(text.format(s), s, "bfpo", "all_weights", 0.05) for s in SCORES]
    claims += [
        Claim("the buffer makes BFPO more helpful", "helpful", "bfpo", "no_buffer"),
        Claim("the buffer does no harm, within 0.05", "harmless", "bfpo", "no_buffer", 0.05),
        Claim("half of tau makes BFPO more helpful", "helpful", "bfpo_strong", "bfpo"),
        Claim("half of tau does no harm, within 0.05", "harmless", "bfpo_strong", "bfpo", 0.05),
        Claim("half of tau reaches (e), within 0.05", "helpful", "bfpo_strong", "ipo_mix", 0.05),
    ]
    title = "BFPO, and BFPO with one part changed; IPO"
    compare(options, "ablations.png", title, variants, claims)

    lines = ["Margins of the exact optimum in units of 1/tau, from the toy's own safety pairs:", ""]
    for objective in ("bfpo", "ipo"):
        reward = forbidden_reward(objective)
        cells = []
        for more, less in (*SAME_LABEL.values(), ("redirect", "full"), ("refusal", "full")):
            cells.append(f"{more} over {less} {reward[more] - reward[less]:+.2f}")
        lines.append(f"- {objective.upper()}: {', '.join(cells)}")
    print("\n".join(lines))
    table = options.out / "table.md"
    write_text(table, "\n".join([table.read_text(encoding="utf-8"), *lines, ""]))


ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
TAU_FACTORS = (0.5, 1.0, 2.0)
B1S = (2.0, 3.0, 6.0)


def alpha_margins(alphas: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """tau h of SAME_LABEL over alpha: the target of such a pair, and the exact optimum."""
    rewards = [forbidden_reward("bfpo", alpha) for alpha in alphas]
    margins: dict[str, dict[str, list[float]]] = {}
    for quadrant, (more, less) in SAME_LABEL.items():
        safe = SAFE_A[KINDS.index(more)]
        margins[quadrant] = {
            "target": [label(safe, safe, alpha).item() for alpha in alphas],
            "optimum": [reward[more] - reward[less] for reward in rewards],
        }
    return margins


def tradeoff(options: argparse.Namespace) -> None:
    """alpha, tau and B_1 swept one at a time; and margins over alpha, on paper and trained."""
    base = picks(options)["bfpo"]
    usual = {"alpha": train.Config.alpha, "b1": train.Config.b1}
    taus = [base["tau"] * factor for factor in TAU_FACTORS]
    variants = {}
    for name, values in {"alpha": ALPHAS, "tau": taus, "b1": B1S}.items():
        for value in values:
            settings = base if value == usual.get(name) else base | {name: value}
            variants[f"{name} {value:g}"] = Variant(f"{value:g}", "bfpo", settings, line=name)
    title = "BFPO: alpha, tau and b1 changed one at a time"
    records, jobs = compare(options, "tradeoff.png", title, variants, [])

    alphas = [-0.5, *ALPHAS, 1.5]
    margins = alpha_margins(alphas)
    for quadrant, of_alpha in margins.items():
        of_alpha["trained"] = []
        for alpha in ALPHAS:
            held = [records[job]["held_out"]["safety"] for job in jobs[f"alpha {alpha:g}"]]
            nats = statistics.fmean(view[quadrant]["margin_nats"] for view in held)
            of_alpha["trained"].append(base["tau"] * nats)
    plots.alpha(options.out / "alpha.png", alphas, ALPHAS, margins, SAME_LABEL)


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
    cores = os.cpu_count() or 1
    for name, (function, seeds) in COMMANDS.items():
        text = (function.__doc__ or "").split("\n")[0]
        add = commands.add_parser(name, help=text, description=text)
        out = Path("runs") / name
        work = Path("runs/miniature")
        add.add_argument("--out", type=Path, default=out, help=f"folder of what it makes ({out})")
        add.add_argument("--work", type=Path, default=work, help=f"folder of the models ({work})")
        add.add_argument("--jobs", type=positive, default=cores, help="models trained at a time")
        add.add_argument("--steps", type=positive, default=0, help="of each stage: a quick look")
        add.set_defaults(run=function, seeds=seeds, split="test")
        if name == "search":
            add.set_defaults(split="validation")
            continue
        add.add_argument("--seeds", type=int, nargs="+", default=seeds, help=f"{seeds}")
        add.add_argument("--record", type=Path, default=RECORD, help="the search's search.json")
