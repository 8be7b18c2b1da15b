"""toy/experiments.py, and the pictures that it draws."""

import argparse
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import synthetic
from bfpo import population_reward
from toy import experiments, language
from toy import files as toy_files
from toy.experiments import Job, Variant

ROOT = Path(__file__).parent.parent


# --- what several seeds say -----------------------------------------------------------------------


def test_interval_is_students() -> None:
    """Claim: half of the 95 % interval of the mean, for every number of seeds allowed.

    Oracle: scipy.
    """
    from scipy import stats

    rng = np.random.default_rng(0)
    for n in range(2, 11):
        values = rng.normal(size=n)
        mean, half = experiments.interval(values.tolist())
        low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
        assert mean == pytest.approx((low + high) / 2) and half == pytest.approx(
            (high - low) / 2, rel=2e-4
        )  # four digits of t
    mean, half = experiments.interval([0.5])
    assert mean == 0.5 and math.isnan(half)


@pytest.mark.parametrize(
    ("more", "less", "slack", "status"),
    [
        ([0.8, 0.82, 0.81], [0.5, 0.51, 0.52], 0.0, "holds: "),
        ([0.5, 0.51, 0.52], [0.8, 0.82, 0.81], 0.0, "does NOT hold: "),
        ([0.8, 0.5, 0.7], [0.6, 0.7, 0.65], 0.0, "not settled: "),
        ([0.8], [0.1], 0.0, "not settled: "),  # one seed settles nothing
        ([0.78, 0.80, 0.79], [0.8, 0.82, 0.81], 0.0, "does NOT hold: "),
        ([0.78, 0.80, 0.79], [0.8, 0.82, 0.81], 0.05, "holds: "),
        (
            [0.5, 0.8, 0.1],
            [0.7, 1.0, 0.3],
            0.0,
            "does NOT hold: ",
        ),  # the seeds differ, their differences do not: paired
    ],
)
def test_verdict_follows_the_paired_differences(
    more: list[float], less: list[float], slack: float, status: str
) -> None:
    """Claim: a claim holds or not only where the 95 % interval of the paired difference leaves no
    doubt. Oracle: by hand.
    """
    results = {"x": {"helpful": more, "harmless": less}, "y": {"helpful": less, "harmless": more}}
    assert experiments.Claim("t", "helpful", "x", "y", slack).verdict(results).startswith(status)
    assert f"(helpful {np.mean(more) - np.mean(less):+.3f}" in experiments.Claim(
        "t", "helpful", "x", "y", slack
    ).verdict(results)


def test_example_request_is_the_typical_one() -> None:
    """Claim: of the benign and of the forbidden requests the one where answers are nearest to each
    model's average. Oracle: by hand.
    """

    def record(helpful: list[float], harmless: list[bool]) -> dict[str, object]:
        transcript = [{"forbidden": False, "helpful": h, "harmless": True} for h in helpful]
        transcript += [{"forbidden": True, "helpful": 0.0, "harmless": h} for h in harmless]
        return {
            "transcript": transcript,
            "helpful": np.mean(helpful),
            "harmless": np.mean(harmless),
        }

    records = [
        record([0.0, 1.0, 1.0], [False, True, True]),
        record([0.0, 0.25, 0.0], [True, False, True]),
    ]
    assert experiments.typical(records, forbidden=False) == 2  # distances 0.75, 0.5, 0.42
    assert experiments.typical(records, forbidden=True) == 5  # 1, 1, 2/3


# --- the exact optimum ----------------------------------------------------------------------------


def test_exact_optimum_is_the_closed_form_where_pi_ref_draws_the_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Claim: with equally frequent pairs BFPO's optimum over the four answers to a forbidden
    request is form 1's, for every alpha and B_1. Oracle: bfpo.population_reward, up to a constant.
    1e-6: preferences of fp32.
    """
    monkeypatch.setattr(experiments, "SHARE_N", torch.ones(6).double() / 6)
    preference_AA = torch.ones(4, 4).triu(1) + 0.5 * torch.eye(4)
    safe_A = torch.tensor([0.0, 1.0, 0.0, 1.0])  # full, redirect, curt, refusal
    for alpha, b1 in ((0.5, 3.0), (-1.0, 3.0), (1.25, 2.0)):
        exact_A = torch.tensor(list(experiments.forbidden_reward("bfpo", alpha, b1).values()))
        closed_A = population_reward(preference_AA, safe_A, alpha, b1)
        assert (exact_A - exact_A.mean()).tolist() == pytest.approx(
            (closed_A - closed_A.mean()).tolist(), abs=1e-6
        )


@pytest.mark.parametrize(("objective", "unsafe", "across"), [("bfpo", -1, 1.0), ("ipo", 1, 0.5)])
def test_exact_optimum_follows_the_toys_pairs(objective: str, unsafe: int, across: float) -> None:
    """Claim: both objectives put redirect over refusal alike; BFPO puts curt over full, IPO full
    over curt; the mean safe answer leads by the target of a safe and an unsafe one.

    Oracle: by hand. By symmetry the margin d of two answers with one label minimises S (d - 1/2)^2
    + 4 c (d/2)^2, where S is the share of their pair and c that of each pair with one safe answer.
    """
    reward = experiments.forbidden_reward(objective)
    c = 0.146 / 4
    redirect = 0.5 * 0.412 / (0.412 + c)
    full = 0.5 * 0.442 / (0.442 + c) * unsafe
    assert reward["redirect"] - reward["refusal"] == pytest.approx(redirect)
    assert reward["full"] - reward["curt"] == pytest.approx(full)
    safe = reward["redirect"] + reward["refusal"]
    assert (safe - reward["full"] - reward["curt"]) / 2 == pytest.approx(across)


def test_exact_scores_begin_at_the_sft_data_and_end_at_the_best_answer(tmp_path: Path) -> None:
    """Claim: for a huge tau the optimum's scores are those of SFT's conversations; for a small one
    it is wholly helpful and harmless; half of BFPO's tau asks for IPO's helpfulness.

    Oracle: the judge on the files. 6800 rows: four standard errors are 0.021 and 0.036.
    """
    data = toy_files.build(tmp_path / "data", 9)
    asked = {}
    for forbidden in (False, True):
        asked.update({request.text: request for request in language.requests(forbidden)})
    pairs = []
    for line in (data / "ultrachat/train.jsonl").read_text().splitlines():
        row = json.loads(line)
        pairs.append((row["prompt"], row["messages"][1]["content"]))
    for line in (data / "pku/train.jsonl").read_text().splitlines()[:800]:
        row = json.loads(line)
        pairs.append((row["prompt"], row[f"response_{row['safer_response_id']}"]))
    scores: dict[bool, list[float]] = {False: [], True: []}
    for prompt, answer in pairs:
        verdict = language.judge(asked[prompt], answer)
        forbidden = asked[prompt].forbidden
        scores[forbidden].append(verdict.harmless if forbidden else verdict.helpful)
    helpful, harmless = experiments.exact_scores("bfpo", 1e6)
    assert helpful == pytest.approx(np.mean(scores[False]), abs=0.021)
    assert harmless == pytest.approx(np.mean(scores[True]), abs=0.036)
    assert experiments.exact_scores("bfpo", 0.01) == pytest.approx((1.0, 1.0), abs=1e-6)
    bfpo = experiments.exact_scores("bfpo", 0.125)
    ipo = experiments.exact_scores("ipo", 0.125)
    assert bfpo[0] == ipo[0] and bfpo[1] > ipo[1]


# --- the runs -------------------------------------------------------------------------------------


@pytest.mark.slow  # twenty seconds: two models, twice
def test_a_comparison_and_the_same_command_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Claim: picture, table and results hold what the judge says of the models that train.run left,
    in processes of their own, with a fifth of the labels wrong; the same again starts none, other
    settings do. Oracle: the answers, judged again; processes that may not start.
    """
    options = argparse.Namespace(
        out=tmp_path / "out", work=tmp_path / "work", jobs=2, steps=2, seeds=[3], split="test"
    )
    variants = {"noisy": Variant("20%", "bfpo", {"lr": 1e-4, "tau": 0.5}, 0.2, "BFPO")}
    claims = [experiments.Claim("BFPO is more helpful than SFT", "helpful", "noisy", "sft")]
    experiments.compare(options, "picture.png", "A look", variants, claims)
    printed = capsys.readouterr().out
    assert sorted(path.name for path in options.out.iterdir()) == [
        "picture.png",
        "results.json",
        "table.md",
    ]
    table, results = (
        (options.out / "table.md").read_text(),
        json.loads((options.out / "results.json").read_text()),
    )
    assert table in printed and "not settled: BFPO is more helpful than SFT" in table
    assert "[1/2] seed 3 sft: " in printed and "left about 0s" in printed
    root = options.work / "seed3-steps2"
    asked = {request.text: request for request in toy_files.held_out(root / "data")}
    folders = {"sft": root / "sft", "noisy": root / "bfpo-lr0.0001-tau0.5-flipped0.2"}
    assert list(results) == list(folders)
    for name, folder in folders.items():
        assert (folder / "model" / "config.json").is_file() and len(
            (folder / "log.jsonl").read_text().splitlines()
        ) == 2
        transcript = json.loads((folder / "scores-test.json").read_text())["transcript"]
        verdicts = [
            (language.judge(asked[row["prompt"]], row["answer"]), row["forbidden"])
            for row in transcript
        ]
        assert results[name] == {
            "helpful": [
                pytest.approx(np.mean([v.helpful for v, forbidden in verdicts if not forbidden]))
            ],
            "harmless": [
                pytest.approx(np.mean([v.harmless for v, forbidden in verdicts if forbidden]))
            ],
        }
    settings = json.loads((folders["noisy"] / "run.json").read_text())["settings"]
    assert (settings["lr"], settings["tau"], settings["objective"], settings["seed"]) == (
        1e-4,
        0.5,
        "bfpo",
        3,
    )
    assert settings["model"] == str(root / "sft/model") and settings["safety"] == [
        str(root / "data-flipped0.2/pku")
    ]

    def refuse(**process: object) -> object:
        raise RuntimeError("started")

    monkeypatch.setattr(experiments.SPAWN, "Process", refuse)
    (options.out / "results.json").unlink()
    experiments.compare(options, "picture.png", "A look", variants, claims)
    assert "2 models, 2 of them finished before" in capsys.readouterr().out
    assert json.loads((options.out / "results.json").read_text()) == results
    with pytest.raises(RuntimeError, match="started"):
        experiments.compare(
            options,
            "picture.png",
            "A look",
            {"x": variants["noisy"]._replace(settings={"lr": 2e-4, "tau": 0.5})},
            [],
        )
    job = Job(str(options.work), 3, "bfpo", (("lr", 1e-4), ("tau", 0.5)), 0.2, 2)
    assert job.record() is not None
    monkeypatch.setitem(
        experiments.train.RECIPES["toy"], "max_prompt", 63
    )  # the recipe has changed since
    assert job.record() is None


def test_a_model_that_fails_stops_the_command(tmp_path: Path) -> None:
    """Claim: a process that ends with an error ends the command with the end of its log.

    Oracle: a file where its folder should be.
    """
    job = Job(str(tmp_path), 1, steps=2)
    job.root.mkdir()
    (job.root / "sft").write_text("in the way")
    with pytest.raises(
        OSError,
        match=r"sft of seed 1 ended with exit code 1; .*sft\.log ends with:\n[^$]*must be a folder",
    ):
        experiments.run_all([job, Job(str(tmp_path), 1, "bfpo", steps=2)], 1)
    assert not (job.root / "bfpo.log").exists()


def test_a_model_that_another_command_trains_is_refused(tmp_path: Path) -> None:
    """Claim: a second command on the same models ends in an error, also when the first was killed
    and its job lives on. Oracle: a lock on the run's folder, as the job holds it.
    """
    job = Job(str(tmp_path), 1, steps=2)
    folder = job.root / "sft"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="sft is in use by another run"):
            experiments.run_all([job], 1)
    assert job.record() is None


@pytest.mark.slow  # eight seconds: three processes
def test_a_stop_lets_the_models_save(tmp_path: Path) -> None:
    """Claim: SIGTERM ends the command with 130 and its models after the step they are in, leaving
    checkpoints. Oracle: the folder.
    """
    command = [sys.executable, str(ROOT / "synthetic.py"), "search", "--jobs", "1"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "work" / "seed42" / "sft" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on" in errors
    assert [path.name[:5] for path in (log.parent / "checkpoints").iterdir()] == ["step-"]
    assert not (tmp_path / "out" / "search.json").exists()


# --- the search and its record --------------------------------------------------------------------


def test_search_moves_to_the_best_neighbour_on_its_worse_seed_until_none_is_better(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: a pick has the highest mean of both scores on validation requests, on the seed where
    that is lower, and all its neighbours were tried; scores that rise on and on end after ROUNDS,
    which the record and the last lines say; of equals the first stays; nothing is trained twice.

    Oracle: scores made up here, with a top two steps from the start, and a setting that is better
    on average and worse on its worse seed.
    """
    top = (1.25e-5, 0.5)

    def helpful(job: Job) -> float:
        lr, tau = dict(job.settings)["lr"], dict(job.settings)["tau"]
        if job.model == "bfpo":
            if (lr, tau) == (2.5e-5, 1.0):
                return {42: 1.0, 43: 0.7}[job.seed]
            return 0.8 - 0.05 * abs(math.log2(lr / top[0])) - 0.05 * abs(math.log2(tau / top[1]))
        return 0.5 - tau if job.model == "dpo_mix" else 0.5

    seen: list[Job] = []

    def scores(jobs: list[Job], workers: int) -> dict[Job, dict[str, float]]:
        assert all(job.split == "validation" for job in jobs)
        seen.extend(jobs)
        return {job: {"helpful": helpful(job), "harmless": 0.5} for job in jobs}

    monkeypatch.setattr(experiments, "run_all", scores)
    synthetic.main(["search", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["picks"].pop("bfpo") == {"lr": top[0], "tau": top[1]}
    assert found["picks"].pop("dpo_mix") == {"lr": 5e-5, "tau": 0.25 / 2**experiments.ROUNDS}
    assert set(map(str, found["picks"].values())) == {str(experiments.START)}
    edges = found["on_the_edge_of_the_grid"]
    lowest = 0.25 / 2 ** (experiments.ROUNDS + 1)
    assert edges.pop("dpo_mix") == [[5e-5, lowest], [2.5e-5, lowest], [1e-4, lowest]]
    assert not any(edges.values())
    assert capsys.readouterr().out.count("on the edge") == 1
    assert len(set(seen)) == len(seen) == 2 * len(found["runs"])
    assert {job.seed for job in seen} == set(experiments.SEARCH_SEEDS)


def test_committed_search_is_whole_and_its_picks_are_its_best() -> None:
    """Claim: each pick of the record is its model's best, the record names those whose neighbours
    were not all tried, and its seeds are in no figure. Oracle: the runs of the record.
    """
    found = json.loads(experiments.RECORD.read_text())
    assert (
        found["seeds"] == list(experiments.SEARCH_SEEDS)
        and not set(found["seeds"]) & set(experiments.SEEDS)
        and found["steps"] == 0
    )
    for model, pick in found["picks"].items():
        runs = [run for run in found["runs"] if run["model"] == model]
        worse = {}
        for run in runs:
            sums = [a + b for a, b in zip(run["helpful"], run["harmless"], strict=True)]
            worse[run["lr"], run["tau"]] = min(sums)
        assert len(worse) == len(runs) >= 9
        assert worse[pick["lr"], pick["tau"]] == max(worse.values())
        whole = set(experiments.neighbours(pick)) <= set(worse)
        assert whole != bool(found["on_the_edge_of_the_grid"][model]), model
    assert set(found["picks"]) == set(experiments.SEARCHED)
    recipe = experiments.train.RECIPES[
        "toy"
    ]  # `python train.py` trains BFPO at what was picked for it
    assert {"lr": recipe["lr"], "tau": recipe["tau"]} == found["picks"]["bfpo"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["figure1", "--jobs", "0"], 2, "--jobs"),
        (["noise", "--steps", "x"], 2, "--steps"),
        (["figure1", "--record", "search.json", "--seeds", "1", "1"], 1, "different"),
        (["tradeoff", "--record", "nowhere.json"], 1, "synthetic.py search"),
        (["noise", "--record", "part.json"], 1, "synthetic.py search"),
    ],
)
def test_bad_options_end_before_any_work(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Claim: wrong usage exits 2, a wrong value 1, with one line that says what.

    Oracle: the messages, and an empty folder.
    """
    monkeypatch.chdir(tmp_path)
    Path("search.json").write_text(
        json.dumps({"picks": {model: {"lr": 1e-4, "tau": 0.5} for model in experiments.MODELS}})
    )
    Path("part.json").write_text(json.dumps({"runs": []}))
    with pytest.raises(SystemExit) as stop:
        synthetic.main(arguments)
    assert stop.value.code == code and message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.json", "search.json"]


# --- the whole figure, outside the default run ----------------------------------------------------


@pytest.mark.slow
def test_figure1_whole(tmp_path: Path) -> None:
    """Claim: `python synthetic.py figure1` writes its four files, with every seed of every model,
    from SFT models that are a problem to be solved; BFPO raises harmlessness over SFT. Oracle: the
    files. Half an hour on two cores.
    """
    run = subprocess.run(
        [sys.executable, str(ROOT / "synthetic.py"), "figure1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    out = tmp_path / "runs" / "figure1"
    assert sorted(path.name for path in out.iterdir()) == [
        "figure1.png",
        "figure5.png",
        "results.json",
        "table.md",
    ]
    results = json.loads((out / "results.json").read_text())
    assert all(
        len(scores[name]) == len(experiments.SEEDS)
        for scores in results.values()
        for name in ("helpful", "harmless")
    )
    assert min(results["bfpo"]["harmless"]) > max(results["sft"]["harmless"])
