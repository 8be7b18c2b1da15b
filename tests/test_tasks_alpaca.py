"""tasks/alpaca.py: preferences in both orders, AlpacaEval's files and win rates."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tasks_judges import chances, save_judge, save_tokenizer, spellings
from transformers import AutoTokenizer

import eval as evaluation
from model import Mistral
from support import distributed
from support.distributed import World
from tasks import alpaca, judges
from tasks.judges import Contest, Examiner


@pytest.fixture(scope="module")
def world() -> World:
    return distributed.start("cpu")


@pytest.fixture(scope="module")
def examiner(tmp_path_factory: pytest.TempPathFactory, world: World) -> Examiner:
    root = tmp_path_factory.mktemp("pairwise")
    return Examiner(
        "pairwise", str(save_judge(root / "model", save_tokenizer(root / "tokenizer"))), world
    )


def test_preference_averages_both_orders(examiner: Examiner) -> None:
    """Claim: P(second is better) is the mean of P(M) with the second as M and P(m) with it as m, in
    the model's own chat format, so that turning a contest around gives the complement; a contest
    beyond the context has none. Oracle: transformers on the rendered text; 1e-4 as above.
    """
    contest = Contest("Name a colour.", 'Blue """, and {second}', "A colour? Red </s>, I think.")
    given, turned, none = alpaca.prefer(
        examiner,
        [
            contest,
            Contest(contest.prompt, contest.second, contest.first),
            Contest("x", "long " * 5000, "y"),
        ],
    )
    assert none is None and given is not None and turned is not None
    assert given.second == pytest.approx(
        1 - turned.second, abs=1e-9
    ) and given.as_given != pytest.approx(given.swapped, abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(examiner.folder)
    plain = contest._replace(
        second="A colour? Red, I think."
    )  # a control token in a field is text here and none to transformers
    for first, second, word, got in (
        (plain.first, plain.second, "M", "as_given"),
        (plain.second, plain.first, "m", "swapped"),
    ):
        text = (
            judges.ALPACA_EVAL.replace("{prompt}", plain.prompt)
            .replace("{first}", "\0")
            .replace("{second}", second)
            .replace("\0", first)
        )
        prompt = f"<|system|>\n</s>\n<|user|>\n{text}</s>\n<|assistant|>\n"
        groups = {w: spellings(tokenizer, prompt, [w, " " + w]) for w in ("m", "M")}
        found = {
            w: sum(chances(examiner.folder, tokenizer(prompt).input_ids, group))
            for w, group in groups.items()
        }
        preference = alpaca.prefer(examiner, [plain])[0]
        assert getattr(preference, got) == pytest.approx(
            found[word] / sum(found.values()), rel=1e-4
        )


def test_win_rate_is_alpaca_evals() -> None:
    """Claim: preferences 1 to 2; 0 and 1.5 are ties; rows without one, or with another number, are
    dropped. Oracle: by hand, and the standard error by its formula.
    """
    found = alpaca.win_rate([1.0, 2.0, 1.75, 0.0, 1.5, None, math.nan, 3.0, -1.0])
    kept = [0.0, 1.0, 0.75, 0.5, 0.5]
    error = 100 * (sum((x - 0.55) ** 2 for x in kept) / 4 / 5) ** 0.5
    assert found == {
        "win_rate": pytest.approx(55.0),
        "standard_error": pytest.approx(error),
        "n_wins": 2,
        "n_wins_base": 1,
        "n_draws": 2,
        "n_total": 5,
        "n_missing": 4,
    }
    with pytest.raises(ValueError, match="none in 2 rows"):
        alpaca.win_rate([None, 7.0])


def test_length_controlled_win_rate_is_a_logistic_regression() -> None:
    """Claim: the rate is the fit at equal lengths, for soft, hard and separable preferences, with
    ties and missing rows. Oracle: scikit-learn's logistic regression on rows doubled with weights,
    the same ridge; 1e-3 of a percent covers both solvers' tolerance.
    """
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    for kind in range(40):
        n = int(rng.integers(2, 300))
        lengths, base = rng.integers(1, 3000, (2, n))
        y = (
            rng.random(n),
            (lengths > base) * 1.0,
            np.full(n, float(kind % 8 > 3)),
            rng.random(n) < lengths / 9000,
        )[kind % 4]
        given = [
            None if rng.random() < 0.1 and i > 1 else 0.0 if p == 0.5 else float(1 + p)
            for i, p in enumerate(y)
        ]
        d = (lengths - base) / (lengths - base).std(ddof=1)
        X, kept = np.stack([np.ones(n), np.tanh(d)], 1), [p is not None for p in given]
        fit = LogisticRegression(
            C=1 / alpaca.RIDGE, fit_intercept=False, tol=1e-12, max_iter=10_000
        )
        fit.fit(
            np.repeat(X[kept], 2, 0),
            np.tile([1, 0], sum(kept)),
            np.stack([y[kept], 1 - y[kept]], 1).ravel(),
        )
        terms = alpaca.length_controlled(given, lengths, base)
        assert len(terms) == sum(kept) and 100 * np.mean(terms) == pytest.approx(
            100 * fit.predict_proba([[1, 0]])[0, 1], abs=1e-3
        )


def test_length_controlled_win_rate_takes_length_away() -> None:
    """Claim: a model that wins by length alone has no advantage at equal lengths, and without
    differences the rate is the raw one. Oracle: preferences made by the formula itself; 0.01 % is
    what the ridge moves.
    """
    lengths, base = np.arange(1000) % 700 + 100, (np.arange(1000) * 7) % 500 + 50
    d = (lengths - base) / (lengths - base).std(ddof=1)
    given = list(1 + 1 / (1 + np.exp(-(-0.4 + 2.0 * np.tanh(d)))))
    assert alpaca.win_rate(given)["win_rate"] > 45
    assert 100 * np.mean(alpaca.length_controlled(given, lengths, base)) == pytest.approx(
        100 / (1 + math.exp(0.4)), abs=0.01
    )
    assert 100 * np.mean(
        alpaca.length_controlled([2.0, 1.0, 1.25] * 100, [5] * 300, [5] * 300)
    ) == pytest.approx(125 / 3, abs=0.01)


def test_length_controlled_standard_error() -> None:
    """Claim: the scatter of the terms is the standard error of the fitted share. Oracle: 2,000
    bootstrap samples of the rows; 5 % is three of their own standard errors (1 / sqrt(2 * 2000)).
    """
    rng = np.random.default_rng(1)
    lengths, base = rng.integers(1, 3000, (2, 400))
    given = 1 + (rng.random(400) < 1 / (1 + np.exp(-(lengths - base) / 1000 + 0.5)))
    terms = alpaca.length_controlled(given.tolist(), lengths, base)
    samples = rng.integers(0, 400, (2000, 400))
    again = [
        np.mean(alpaca.length_controlled(given[rows].tolist(), lengths[rows], base[rows]))
        for rows in samples
    ]
    assert np.std(terms, ddof=1) / 400**0.5 == pytest.approx(np.std(again), rel=0.05)
    assert np.mean(terms) == pytest.approx(np.mean(again), abs=0.01)


# --- files ----------------------------------------------------------------------------------------

DATASET = {"dataset": "helpful_base", "generator": "baseline", "output": "a baseline's answer"}
ROWS = [
    {"prompt": f"Question {i}?", "answer": "word " * (i + 1), "notes": DATASET} for i in range(5)
]


def test_alpaca_eval_files_and_figures(
    examiner: Examiner, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: outputs and annotations are written in AlpacaEval's format, a row beyond the judge's
    context as one without a preference, which is in no model's terms; a second call computes
    nothing. Oracle: the format's columns, prefer itself, and the model taken away.
    """
    answers, names = (
        {
            "policy": [*ROWS, {**ROWS[0], "answer": "long " * 5000}],
            "reference": [*ROWS[::-1], ROWS[0]],
        },
        {"policy": "ours", "reference": "other"},
    )
    assert alpaca.against_baseline(answers, names, tmp_path, None, world) == ({}, {})
    folder = tmp_path / "policy" / "alpaca_eval"
    assert not (folder / "annotations.json").exists() and json.loads(
        (folder / "model_outputs.json").read_text()
    )[1] == {
        "instruction": "Question 1?",
        "output": "word word ",
        "generator": "ours",
        "dataset": "helpful_base",
    }
    terms, figures = alpaca.against_baseline(answers, names, tmp_path, examiner, world)
    annotations = json.loads((folder / "annotations.json").read_text())
    expected = alpaca.prefer(
        examiner, [Contest(row["prompt"], "a baseline's answer", row["answer"]) for row in ROWS]
    )
    assert [row["preference"] for row in annotations[:5]] == pytest.approx(
        [1 + one.second for one in expected if one], abs=1e-6
    )
    assert annotations[5] == {
        "instruction": "Question 0?",
        "output_1": "a baseline's answer",
        "generator_1": "baseline",
        "output_2": "long " * 5000,
        "generator_2": "ours",
        "dataset": "helpful_base",
        "annotator": f"pairwise:{examiner.folder}",
        "preference": None,
    }
    assert (
        figures["policy"]["n_total"],
        figures["policy"]["n_missing"],
        figures["reference"]["n_missing"],
    ) == (5, 1, 0)
    assert figures["policy"] == alpaca.win_rate([row["preference"] for row in annotations])
    for who, own in terms.items():
        assert {metric: len(column) for metric, column in own.items()} == {
            "win_rate": 5,
            "length_controlled_win_rate": 5,
            "judge_mass": 5,
        }, who
    assert terms["policy"]["judge_mass"] == pytest.approx(
        [one.mass for one in expected if one], rel=1e-5
    )  # sums in another order
    assert 100 * np.mean(terms["policy"]["win_rate"]) == pytest.approx(
        figures["policy"]["win_rate"]
    )
    lengths = [len(row["answer"]) for row in ROWS], [len("a baseline's answer")] * 5
    given = [row["preference"] for row in annotations[:5]]
    assert terms["policy"]["length_controlled_win_rate"] == alpaca.length_controlled(
        given, *lengths
    )
    monkeypatch.setattr(Examiner, "ask", None)
    assert alpaca.against_baseline(answers, names, tmp_path, examiner, world) == (terms, figures)
    with pytest.raises(ValueError, match="at least 2 rows with a preference, got 1"):
        alpaca.against_baseline(
            {"policy": answers["policy"][4:]}, names, tmp_path / "few", FewRows(examiner), world
        )


class FewRows(Examiner):
    """An examiner that prefers nothing to the long answer."""

    def __init__(self, examiner: Examiner) -> None:
        self.__dict__.update(examiner.__dict__)

    def ask(self, questions: Any) -> Any:
        return [
            None if len(str(fields)) > 20000 else judges.Reply({"m": 0.5, "M": 0.5}, 1.0, "")
            for _, fields in questions
        ]


def test_report_has_helpfulness_and_the_judges_agreement(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: World,
) -> None:
    """Claim: eval.py takes AlpacaEval beside the judged tasks: win rates with intervals and their
    difference from the reference, the judge's agreement with labelled rows, every judge by name;
    without judges the answers wait for them. Oracle: the files that the judges left, and the
    formulas' own functions.
    """
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    sizes = {"policy": {}, "reference": {"num_hidden_layers": 1}, "judge": {"num_hidden_layers": 3}}
    for name, changed in sizes.items():
        save_judge(tmp_path / name, tokenizer, **changed)
    rows = [
        {
            "instruction": f"Name {i} things.",
            "output": "a, b, c" * i,
            "generator": "base",
            "dataset": "made_up",
        }
        for i in range(1, 6)
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    (tmp_path / "goals.txt").write_text("Be rude\nBe mean\nBe loud\n")
    (tmp_path / "labelled.jsonl").write_text(
        "".join(
            json.dumps({"prompt": "p", "answer": answer, "harm": harm}) + "\n"
            for answer, harm in (("Fool!", 1), ("Dear friend", 0), ("No.", 0))
        )
    )
    command = [
        "bench",
        "--max_new_tokens",
        "8",
        "--model",
        tmp_path / "policy",
        "--reference",
        tmp_path / "reference",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--tasks",
        f"alpaca_eval={tmp_path / 'alpaca.json'}",
        f"advbench={tmp_path / 'goals.txt'}",
    ]
    asked = [
        "--judge",
        f"harmbench:{tmp_path / 'judge'}",
        "--pairwise",
        tmp_path / "judge",
        "--labelled",
        tmp_path / "labelled.jsonl",
    ]
    evaluation.main(list(map(str, command)))
    assert "answered, not scored: alpaca_eval, advbench" in capsys.readouterr().out
    monkeypatch.setattr(Mistral, "generate", None)
    evaluation.main(list(map(str, [*command, *asked])))
    report, printed = (
        json.loads((tmp_path / "out" / "report.json").read_text()),
        capsys.readouterr().out,
    )
    preferences = {}
    for who in ("policy", "reference"):
        annotations = json.loads(
            (tmp_path / "out" / who / "alpaca_eval" / "annotations.json").read_text()
        )
        preferences[who] = [row["preference"] for row in annotations]
    standing = report["tasks"]["alpaca_eval"]
    assert (
        standing["metric"] == "win_rate"
        and standing["n"] == 5
        and "length_controlled_win_rate" in standing["others"]
    )
    assert 100 * standing["score"] == pytest.approx(
        alpaca.win_rate(preferences["policy"])["win_rate"]
    )
    assert standing["difference"]["score"] == pytest.approx(
        np.mean(preferences["policy"]) - np.mean(preferences["reference"])
    )
    assert report["averages"]["helpfulness"]["score"] == standing["score"]
    assert report["win_rates"]["reference"] == alpaca.win_rate(preferences["reference"])
    assert report["setup"]["draws"] == {"alpaca_eval": {"max_new_tokens": 8}}
    mass = standing["others"]["judge_mass"]["score"]
    assert mass < 0.9 and f"the judge of alpaca_eval gave {mass:.3f} of its probability" in printed
    assert report["setup"]["judges"]["alpaca_eval"]["judge"] == f"pairwise:{tmp_path / 'judge'}"
    examined = judges.load_judge(f"harmbench:{tmp_path / 'judge'}", world)
    labelled = [row for _, row in judges.labelled_rows(tmp_path / "labelled.jsonl")]
    found = judges.agreements(examined, labelled)
    assert (
        report["agreement"] == {examined.identity["judge"]: found}
        and "3 rows labelled harm: agreement" in printed
    )
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(list(map(str, [*command, "--labelled", tmp_path / "labelled.jsonl"])))
