import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import synthetic

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figure4_run(tmp_path_factory):
    """`python synthetic.py` with no argument, in an empty folder."""
    folder = tmp_path_factory.mktemp("figure4")
    run = subprocess.run(
        [sys.executable, ROOT / "synthetic.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, folder / "runs" / "figure4"


# -------------------------------------------------------------------------------------------------------------- Figure 4


def test_figure4_writes_the_three_files_and_nothing_else(figure4_run):
    """Claim: names, keys and columns as documented, no file left aside.

    Oracle: the issue's schema.
    """
    _, out = figure4_run
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.csv",
        "figure4.png",
        "summary.json",
    ]
    assert (out / "figure4.png").read_bytes().startswith(b"\x89PNG") and (
        out / "figure4.png"
    ).stat().st_size > 50_000
    summary = json.loads((out / "summary.json").read_text())
    assert sorted(summary) == ["bfpo", "dpo", "ipo", "optimum"]
    for name in ("dpo", "ipo", "bfpo"):
        assert sorted(summary[name]) == ["probabilities", "ranking"]
        probabilities = summary[name]["probabilities"]
        assert sum(probabilities) == pytest.approx(1, abs=1e-12)  # float64 means of softmax outputs
        assert summary[name]["ranking"] == [
            f"y{y + 1}" for y in np.argsort(-np.array(probabilities))
        ]
    with open(out / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["objective", "seed", "step", "p1", "p2", "p3", "p4"]
    keys = {(row["objective"], int(row["seed"]), int(row["step"])) for row in rows}
    assert len(rows) == len(keys) == 3 * 10 * 1801 and max(step for *_, step in keys) == 1800
    assert [float(rows[0][p]) for p in ("p1", "p2", "p3", "p4")] == [0.25] * 4


def test_figure4_shows_what_the_paper_shows(figure4_run):
    """Claim: only BFPO has the desired ranking, close to the exact optimum; IPO sits on its own
    closed form. Oracle: Figure 4; PAPER's pi*; softmax of p(y) for IPO. 0.01: the 95 % intervals
    over ten seeds are about 0.003.
    """
    _, out = figure4_run
    summary = json.loads((out / "summary.json").read_text())
    assert summary["bfpo"]["ranking"] == ["y1", "y3", "y4", "y2"]
    assert summary["dpo"]["ranking"] == summary["ipo"]["ranking"] == ["y1", "y2", "y3", "y4"]
    assert summary["optimum"] == pytest.approx([0.4110, 0.1177, 0.3201, 0.1512], abs=5e-5)
    assert summary["bfpo"]["probabilities"] == pytest.approx(summary["optimum"], abs=0.01)
    weights = [math.exp(p) for p in (0.875, 0.625, 0.375, 0.125)]
    assert summary["ipo"]["probabilities"] == pytest.approx(
        [weight / sum(weights) for weight in weights], abs=0.01
    )
    assert summary["dpo"]["probabilities"][0] > 0.9


def test_figure4_summary_is_the_mean_of_the_curves(figure4_run):
    """Claim: summary.json holds means over seeds at the last step.

    Oracle: curves.csv, which has seven digits.
    """
    _, out = figure4_run
    summary = json.loads((out / "summary.json").read_text())
    with open(out / "curves.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if row["step"] == "1800"]
    for name in ("dpo", "ipo", "bfpo"):
        means = [
            np.mean([float(row[p]) for row in last if row["objective"] == name])
            for p in ("p1", "p2", "p3", "p4")
        ]
        assert summary[name]["probabilities"] == pytest.approx(means, abs=1e-6)


def test_figure4_prints_a_verdict_per_objective_and_the_layouts(figure4_run):
    """Claim: the table's verdicts and the one line on all six layouts.

    Oracle: the files, and PAPER.md's six of six.
    """
    printed, _ = figure4_run
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert (
        "NOT desired, in 0 of 10 seeds" in lines["DPO"]
        and "NOT desired, in 0 of 10 seeds" in lines["IPO"]
    )
    assert "y1 > y3 > y4 > y2  desired, in 10 of 10 seeds" in next(
        x for x in printed.splitlines() if x.startswith("BFPO ")
    )
    assert sum("all six layouts" in line for line in printed.splitlines()) == 1
    assert "6 of 6 exact optima and 60 of 60 runs" in lines["all"]


@pytest.mark.parametrize("name, seed", [("dpo", 0), ("ipo", 1), ("bfpo", 1)])
def test_batched_runs_are_what_each_is_alone(name, seed):
    """Claim: runs in one tensor do not touch each other.

    Oracle: one theta, one seed, torch's Adam and losses by hand.
    """
    layout, steps = (True, True, False, False), 60
    together = synthetic.train_policies(name, [synthetic.SAFE, layout], seeds=2, steps=steps)
    draws = torch.randint(6, (steps, 32), generator=torch.Generator().manual_seed(seed))
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.01)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for step in range(steps):
        w, l = zip(*(pairs[i] for i in draws[step]), strict=True)  # noqa: E741
        h = theta[list(w)] - theta[list(l)]  # uniform reference, softmax: the rest cancels
        target = torch.tensor(
            [(3 * layout[a] - layout[b]) / 2 - 0.5 for a, b in zip(w, l, strict=True)]
        )
        losses = {
            "dpo": torch.nn.functional.softplus(-h),
            "ipo": (h - 0.5) ** 2,
            "bfpo": (h - target) ** 2,
        }
        optimizer.zero_grad()
        losses[name].mean().backward()
        optimizer.step()
    # 1e-10: 60 Adam steps of float64 whose gradients are summed in another order
    torch.testing.assert_close(
        together[-1, 1, seed], torch.softmax(theta.detach(), 0), rtol=0, atol=1e-10
    )
    assert torch.equal(together[0], torch.full_like(together[0], 0.25))


def test_seeds_draw_different_pairs_uniformly():
    """Claim: seeds differ, and a rerun is bit-identical. Oracle: itself."""
    first, second = (
        synthetic.train_policies("bfpo", [synthetic.SAFE], seeds=3, steps=5) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert len({tuple(run.tolist()) for run in first[-1, 0]}) == 3


@pytest.mark.parametrize(
    "safe, order",
    [((1, 0, 1, 0), [0, 2, 3, 1]), ((1, 1, 0, 0), [0, 1, 3, 2]), ((0, 0, 1, 1), [2, 3, 1, 0])],
)
def test_desired_ranking_is_figure_2(safe, order):
    """Claim: safe & helpful > safe & less helpful > unsafe & less helpful > unsafe & helpful.

    Oracle: by hand.
    """
    assert synthetic.desired_ranking([bool(s) for s in safe]) == order


# -------------------------------------------------------------------------------------------------------------- theorems


def test_theorems_command_passes_and_prints_errors_with_tolerances(capsys):
    """Claim: exit code 0; every line has an error and a bound.

    Oracle: the printed numbers, compared again here.
    """
    code = synthetic.main(["theorems"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    checks = [line.split() for line in printed.splitlines() if line.startswith(("ok", "FAIL"))]
    assert len(checks) == 10 and all(check[0] == "ok" for check in checks)
    for *_, error, relation, bound in checks:
        assert float(error) <= float(bound) if relation == "<=" else float(error) >= float(bound)
    assert sum(check[-2] == ">=" for check in checks) == 1  # where independence matters


def test_theorems_fail_when_a_closed_form_is_wrong(monkeypatch, capsys):
    """Claim: a wrong form 1 is a FAIL line and exit code 1.

    Oracle: a population_reward whose last term is off by 1e-6.
    """
    right, sets = synthetic.population_reward, synthetic.random_sets

    def wrong(preference, safe, alpha, b1, reference):
        return right(preference, safe, alpha, b1, reference) + 1e-6 * (
            preference @ (reference * safe)
        )

    monkeypatch.setattr(synthetic, "population_reward", wrong)
    monkeypatch.setattr(
        synthetic, "random_sets", lambda count, *rest, **more: sets(3, *rest, **more)
    )  # 3: seconds
    assert synthetic.theorems() == 1
    printed = capsys.readouterr().out
    assert printed.count("FAIL") == 2 and "8 of 10 checks hold" in printed


@pytest.mark.parametrize("product_shaped", [False, True])
def test_random_sets_are_action_sets(product_shaped):
    """Claim: mirrored preferences, pi_ref sums to 1, both labels occur; product-shaped sets are
    independent. Oracle: definitions.
    """
    for actions in synthetic.random_sets(30, 7, product_shaped=product_shaped):
        size = len(actions.safe_A)
        torch.testing.assert_close(
            actions.preference_AA + actions.preference_AA.T, torch.ones(size, size).double()
        )
        assert (
            actions.reference_A.sum().item() == pytest.approx(1, abs=1e-12)
            and 0 < actions.safe_A.sum() < size
        )
        if product_shaped:
            mass = actions.reference_A.reshape(2, size // 2)
            torch.testing.assert_close(mass, mass.sum(1, keepdim=True) * mass.sum(0))
            assert torch.equal(
                actions.preference_AA[: size // 2], actions.preference_AA[size // 2 :]
            )


def test_minimiser_has_a_zero_gradient():
    """Claim: the numerical minimiser is one: no direction lowers the loss.

    Oracle: the loss by hand, perturbed.
    """
    for actions in synthetic.random_sets(5, 11):
        s = actions.safe_A.double()
        target = (actions.b1 * s[:, None] - s) / (actions.b1 - 1) - actions.alpha

        def loss(u, actions=actions, target=target):
            return (
                actions.reference_A[:, None]
                * actions.reference_A
                * actions.preference_AA
                * (u[:, None] - u - target) ** 2
            ).sum()

        u = synthetic.minimise(actions)
        for direction in torch.eye(len(u), dtype=torch.float64):
            assert loss(u) <= min(loss(u + 1e-4 * direction), loss(u - 1e-4 * direction))


# ------------------------------------------------------------------------------------------------------ the command line


def test_wrong_usage_exits_2_and_a_bad_folder_1(tmp_path, capsys):
    """Claim: an unknown command or flag exits 2, a folder that cannot be made exits 1 in one line.

    Oracle: exit codes, and what is said on stderr.
    """

    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            synthetic.main(list(arguments))
        return stop.value.code, capsys.readouterr().err

    code, said = refused("figure5")
    assert code == 2 and "invalid choice: 'figure5'" in said
    for arguments in (["--ouy", "x"], ["theorems", "--out", "x"]):
        assert refused(*arguments)[0] == 2
    (tmp_path / "file").write_text("")
    code, said = refused("--out", str(tmp_path / "file" / "figure4"))
    assert code == 1 and said.count("\n") == 1 and "--out" in said


def test_import_does_nothing(tmp_path):
    """Claim: importing prints, writes and draws nothing. Oracle: a fresh process."""
    code = (
        "import sys; import synthetic, support.plots, bfpo; assert 'matplotlib' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "") and not list(tmp_path.iterdir())
