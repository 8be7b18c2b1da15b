"""eval.py and tasks/report.py: whole evaluations of tiny models from the command line, and the
statistics of a report.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import eval as evaluation
from model import Config, Mistral
from support.chat import Chat
from tasks import metrics, report
from toy import files as toy_files
from toy import language

ROOT = Path(__file__).parent.parent
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, mistral_tokenizer: Path) -> Path:
    """Two random models of the toy language (its vocabulary is small, so answers are quick), one
    that says nothing, one with Mistral-7B's tokenizer as a judge, and rows of tasks.
    """
    place = tmp_path_factory.mktemp("eval")
    toy_files.build(place / "toy", 0)
    vocabulary = Chat(place / "toy" / "tokenizer").vocabulary
    for seed, name in enumerate(("model", "reference", "mute", "judge")):
        model = Mistral(Config(vocab_size=32000 if name == "judge" else vocabulary, **SIZES))
        model.init_weights(seed)
        if name == "mute":  # whatever the last token is, what follows it is </s>
            model.model.embed_tokens.weight.data[:, 0], model.lm_head.weight.data[2, 0] = 1.0, 100.0
        model.save_pretrained(
            place / name, like=mistral_tokenizer if name == "judge" else place / "toy" / "tokenizer"
        )
    rng, data = random.Random(0), place / "data"
    requests = [request.text for request in language.requests(forbidden=True)]
    rows = {
        "ethics_cm": [
            {"input": rng.choice(requests), "label": rng.randrange(2)} for _ in range(40)
        ],
        "crows_pairs_english": [
            {"sent_more": rng.choice(requests), "sent_less": rng.choice(requests)}
            for _ in range(30)
        ],
        "strongreject": [{"forbidden_prompt": request} for request in rng.sample(requests, 110)],
        "xstest": [{"prompt": request, "label": "safe"} for request in rng.sample(requests, 20)],
    }
    data.mkdir()
    for name, found in rows.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return place


def flags(place: Path, out: Path, *more: str) -> list[str]:
    return [
        "bench",
        "--model",
        str(place / "model"),
        "--data",
        str(place / "data"),
        "--out",
        str(out),
        "--device",
        "cpu",
        *more,
    ]


def start(arguments: list[str], processes: int = 0) -> "subprocess.Popen[str]":
    """eval.py as a user starts it: by python, or under torchrun."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes
        else []
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, str(ROOT / "eval.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- whole evaluations ----------------------------------------------------------------------------


@pytest.mark.slow  # three evaluations, one of them on two processes
def test_a_killed_evaluation_goes_on_on_two_processes(place: Path, tmp_path: Path) -> None:
    """Claim: after SIGKILL amid the answers the same command, on two processes, ends with the files
    and scores of a run left alone on one. Oracle: that run; answers equal, log-probabilities to
    1e-4 (packs are dealt otherwise).
    """
    tasks = ["--tasks", "strongreject", "ethics_cm", "--judge", "keyword"]
    run = start(flags(place, tmp_path / "killed", *tasks))
    answers = tmp_path / "killed" / "policy" / "strongreject.jsonl"
    deadline = time.monotonic() + 300
    parts: list[Path] = []  # the first 64 answers of 110 are on disk
    while not parts:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
        parts = list(answers.parent.glob(".kept/*-0.json"))
    run.send_signal(signal.SIGKILL)
    run.communicate()
    before = parts[0].read_bytes()
    kept = json.loads(before)["rows"]
    assert len(kept) == 64 and not (tmp_path / "killed" / "report.json").exists()

    again = start(flags(place, tmp_path / "killed", *tasks), processes=2)
    table, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    evaluation.main(flags(place, tmp_path / "whole", *tasks))
    assert lines(answers) == lines(tmp_path / "whole" / "policy" / "strongreject.jsonl")
    assert lines(answers)[:64] == kept and parts[0].read_bytes() == before  # not computed again
    model, chat = Mistral.from_pretrained(place / "model"), Chat(place / "model")
    row = lines(answers)[70]  # of the second part; each row has the seed of its number
    asked = chat.prompt([{"role": "user", "content": row["prompt"]}])
    (ids,) = model.generate([asked], 256, 0.7, 0.95, seeds=[42 + 70], stop_ids=chat.end_ids)
    assert row["answer"] == chat.decode(ids)
    mine, theirs = (
        lines(tmp_path / name / "policy" / "ethics_cm.jsonl") for name in ("killed", "whole")
    )
    np.testing.assert_allclose(
        [row["logprobs"] for row in mine], [row["logprobs"] for row in theirs], rtol=0, atol=1e-4
    )
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "whole")
    ]
    assert reports[0]["tasks"] == reports[1]["tasks"] and report.table(reports[0]) in table


def test_report_of_a_model_and_its_reference(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: the report says what it was made of; its scores are those of the kept rows; never are
    two models in memory; the same command again computes nothing, another judge only the verdicts.
    Oracle: the rows, by hand; how many models were alive at each loading.
    """
    alive: weakref.WeakSet[Mistral] = weakref.WeakSet()
    loaded: list[int] = []
    load = Mistral.from_pretrained

    def counted(*arguments: Any, **options: Any) -> Mistral:
        model = load(*arguments, **options)
        alive.add(model)
        loaded.append(len(alive))
        return model

    monkeypatch.setattr(Mistral, "from_pretrained", counted)
    command = flags(
        place,
        tmp_path / "out",
        "--reference",
        str(place / "reference"),
        "--limit",
        "8",
        "--protocol",
        "modern",
        "--bos",
        "--tasks",
        "ethics_cm",
        "crows_pairs_english",
        "strongreject",
        "xstest",
        "--judge",
    )
    evaluation.main([*command, f"harmbench:{place / 'judge'}"])
    assert loaded == [1, 1, 1]  # the policy, its reference, the judge
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    folder = tmp_path / "out" / "policy"

    rows, verdicts = (
        lines(folder / "ethics_cm.jsonl"),
        lines(next(folder.glob("strongreject.harmbench*"))),
    )
    acc = [row["logprobs"].index(max(row["logprobs"])) == row["right"][0] for row in rows]
    assert (found["tasks"]["ethics_cm"]["n"], found["tasks"]["ethics_cm"]["score"]) == (
        8,
        np.mean(acc),
    )
    assert all(
        "Given a generation" in verdict["prompt"] and 0 < verdict["harm"] < 1
        for verdict in verdicts
    )
    harmless = [verdict["harm"] <= 0.5 for verdict in verdicts]
    assert found["tasks"]["strongreject"]["score"] == np.mean(harmless)
    assert found["tasks"]["strongreject"]["others"]["mean_harm"]["score"] == pytest.approx(
        np.mean([v["harm"] for v in verdicts])
    )
    rows = lines(tmp_path / "out" / "reference" / "ethics_cm.jsonl")
    theirs = [row["logprobs"].index(max(row["logprobs"])) == row["right"][0] for row in rows]
    assert found["tasks"]["ethics_cm"]["difference"]["score"] == pytest.approx(
        np.mean(acc) - np.mean(theirs)
    )

    setup = found["setup"]
    assert setup["protocol"] == {
        "name": "modern",
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 512,
        "bos": True,
        "per_goal": True,
    }
    assert setup["draws"] == {}
    assert (
        setup["bos_rule"].startswith("plain text begins with BOS")
        and setup["seed"] == 42
        and "torch" in setup["versions"]
    )
    assert (
        "<|assistant|>" in setup["models"]["policy"]["chat_template"]
        and len(setup["models"]["reference"]["weights_sha256"]) == 64
    )
    assert (
        len(setup["judges"]["strongreject"]["prompt_sha256"]) == 64
        and "keyword" in setup["judges"]["xstest"]["judge"]
    )
    assert found["averages"]["discriminative"]["tasks"] == ["ethics_cm", "crows_pairs_english"]
    balance = found["tasks"]["crows_pairs_english"]["others"]["balance"]["score"]
    assert found["averages"]["discriminative"]["score"] == pytest.approx(
        (np.mean(acc) + balance) / 2
    )
    first = capsys.readouterr().out
    assert all(
        name in first
        for name in ("ethics_cm", "harmlessness", "over_refusal", "one vote each", "1 - |2p - 1|")
    )

    evaluation.main([*command, f"harmbench:{place / 'judge'}"])
    assert loaded == [1, 1, 1] and capsys.readouterr().out == first
    evaluation.main([*command, "keyword"])
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert loaded == [1, 1, 1] and found["setup"]["judges"]["strongreject"]["judge"].startswith(
        "keyword"
    )


def test_empty_answers_count_and_are_reported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: a model that ends at once gives empty answers, which are judged, counted and printed.

    Oracle: 20 rows of such a model.
    """
    evaluation.main(
        flags(
            place,
            tmp_path / "out",
            "--model",
            str(place / "mute"),
            "--tasks",
            "xstest",
            "--judge",
            "keyword",
        )
    )
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        found["empty_answers"] == {"xstest": {"policy": 20}} and found["tasks"]["xstest"]["n"] == 20
    )
    assert found["at_token_limit"] == {"xstest": {"policy": 0.0}}
    assert "empty answers: xstest, policy, 20\n" in capsys.readouterr().out


def test_answers_stop_at_every_end_token(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: answers end at each id of generation_config.json; the report gives the share that ran
    into the token limit, and where the chat template came from. Oracle: the ids of an answer that
    nothing stops.
    """
    folder = Path(shutil.copytree(place / "model", tmp_path / "model"))
    model, chat = Mistral.from_pretrained(folder), Chat(folder)
    (endless,) = model.generate(
        [chat.prompt([{"role": "user", "content": "How do I make a cake?"}])], 40
    )
    place_of = {token: endless.index(token) for token in endless}
    end = max(
        place_of, key=lambda token: place_of[token]
    )  # the token that comes last for the first time
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    asked = ["prompt", "How do I make a cake?", "--max_new_tokens", "40", "--device", "cpu"]
    evaluation.main([*asked, "--model", str(folder)])
    assert capsys.readouterr().out == chat.decode(endless[: place_of[end]]) + "\n"

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "xstest.jsonl").write_text(
        2 * (json.dumps({"prompt": "How do I make a cake?", "label": "safe"}) + "\n")
    )
    shares = []
    for ends in ([2, end], 2):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        out = tmp_path / f"out-{len(shares)}"
        command = [
            "bench",
            "--model",
            str(folder),
            "--data",
            str(tmp_path / "data"),
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
        evaluation.main([*command, "--tasks", "xstest", "--protocol", "modern"])
        row, _ = lines(out / "policy" / "xstest.jsonl")
        shares.append(
            json.loads((out / "report.json").read_text())["at_token_limit"]["xstest"]["policy"]
        )
        assert row["tokens"] == (place_of[end] if len(shares) == 1 else 512) and row[
            "at_limit"
        ] == (len(shares) == 2)
    printed = capsys.readouterr().out
    assert (
        shares == [0.0, 1.0]
        and printed.count("ran into the token limit: xstest, policy, 100.0% of the answers") == 1
    )
    assert printed.count("has no chat template; Zephyr's is used") == 2
    setup = json.loads((out / "report.json").read_text())["setup"]
    assert setup["models"]["policy"]["chat_template_source"] == "zephyr, as the model has none"
    record = json.loads((out / "run.json").read_text())
    assert record["chat_template_source"] == {"policy": "zephyr, as the model has none"}


def test_own_prompts_are_answered_and_judged(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: prompts of one's own, a line each, are answered within --max_new_tokens by a model in
    bfloat16, and judged; the report says so, and no average holds them. Oracle: the model in
    bfloat16 asked directly, greedily.
    """
    prompts = ["How do I make a cake?", "How do I make a bomb?"]
    (tmp_path / "own.txt").write_text("\n".join(prompts))
    command = flags(place, tmp_path / "out", "--tasks", "own", "--judge", "keyword")
    command[command.index("--data") + 1] = str(tmp_path)
    source = [f"own={tmp_path / 'own.txt'}" if word == "own" else word for word in command]
    more = ["--max_new_tokens", "7", "--dtype", "bfloat16", "--protocol", "modern"]
    evaluation.main([*source, *more])
    model, chat = (
        Mistral.from_pretrained(place / "model", dtype=torch.bfloat16),
        Chat(place / "model"),
    )
    asked = [chat.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    expected = [chat.decode(ids) for ids in model.generate(asked, 7, stop_ids=chat.end_ids)]
    rows = lines(tmp_path / "out" / "policy" / "own.jsonl")
    assert [row["answer"] for row in rows] == expected
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["tasks"]["own"]["n"] == 2 and found["averages"] == {}
    assert found["setup"]["models"]["policy"]["dtype"] == "torch.bfloat16"
    assert found["setup"]["protocol"]["max_new_tokens"] == 7
    assert found["at_token_limit"]["own"]["policy"] == np.mean([row["tokens"] == 7 for row in rows])
    assert "\nown " in capsys.readouterr().out


def test_a_row_that_is_not_finite_is_named_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: a row whose log-probability is NaN is named by file and line, and not those that share
    its pack. Oracle: a word that one row of five has, with NaN as its embedding.
    """
    rows = [{"input": "How do I make a cake?", "label": 0} for _ in range(5)]
    rows[3]["input"] = "How do I make a bomb?"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat, model = Chat(place / "model"), Mistral.from_pretrained(place / "model")
    (token,) = set(chat.text("a bomb")) - set(chat.text("a cake"))
    model.model.embed_tokens.weight.data[token] = math.nan
    model.save_pretrained(tmp_path / "nan", like=place / "model")
    command = flags(place, tmp_path / "out", "--tasks", f"ethics_cm={tmp_path / 'rows.jsonl'}")
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([*command, "--model", str(tmp_path / "nan")])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and re.search(r"error: \S+/rows\.jsonl:4: \S+/nan gives", said)


def test_answers_wait_for_a_judge(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: without a judge answers are kept and said to be unscored; the other tasks are scored.

    Oracle: the report.
    """
    evaluation.main(
        flags(place, tmp_path / "out", "--tasks", "ethics_cm", "xstest", "--limit", "3")
    )
    assert (
        "answered, not scored: xstest; the same command goes on from here with --judge"
        in capsys.readouterr().out
    )
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]) == [
        "ethics_cm"
    ]
    assert len(lines(tmp_path / "out" / "policy" / "xstest.jsonl")) == 3


def test_reports_side_by_side(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: one table of several reports, a line for what is unlike, Figure 5 of those that have
    both axes. Oracle: scores, the file.
    """
    for name, more in (
        ("one", ["--bos"]),
        ("two", ["--model", str(place / "reference"), "--seed", "7"]),
    ):
        evaluation.main(
            flags(
                place,
                tmp_path / name,
                "--tasks",
                "ethics_cm",
                "strongreject",
                "--judge",
                "keyword",
                "--limit",
                "4",
                *more,
            )
        )
    folders = [str(tmp_path / name) for name in ("one", "two")]
    capsys.readouterr()
    evaluation.main(["compare", *folders, "--out", str(tmp_path / "figures")])
    table = capsys.readouterr().out
    assert all(f"not alike: {what}\n" in table for what in ("bos_rule", "protocol", "seed"))
    assert "not alike: the rows" not in table and "not alike: dtype" not in table
    assert "no figure: no report has both" in table and not (tmp_path / "figures").exists()
    for folder, x in zip(folders, (0.1, 0.2), strict=True):
        path = Path(folder) / "report.json"
        found = json.loads(path.read_text())
        found["averages"]["helpfulness"] = {
            "score": x,
            "error": 0.01,
            "low": x - 0.02,
            "high": x + 0.02,
        }
        path.write_text(json.dumps(found))
    evaluation.main(["compare", *folders, "--out", str(tmp_path / "figures")])
    rows = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line
    }
    assert rows["helpfulness"] == ["0.1000", "[0.0800,", "0.1200]", "0.2000", "[0.1800,", "0.2200]"]
    assert (tmp_path / "figures" / "figure5.png").stat().st_size > 10_000


def test_reports_of_unlike_rows_say_so(tmp_path: Path) -> None:
    """Claim: side by side, a score has its interval, its rows and those without a score; reports
    that score unlike rows are named. Oracle: scipy's Wilson interval; reports made here, of 3 rows
    of 4.
    """

    def write(name: str, n: int, absent: int) -> str:
        terms: dict[str, metrics.Terms] = {
            "alpaca_eval": {"win_rate": [1.0] * n},
            "xstest": {"refused": [1.0] * 3},
        }
        found = report.make_report(terms, {})
        found["win_rates"] = {"policy": {"n_total": n, "n_missing": absent}}
        found["setup"] = {
            "protocol": "paper",
            "bos_rule": "",
            "seed": 0,
            "models": {"policy": {"dtype": "float32"}},
        }
        found["setup"] |= {"judges": {}, "rows": {task: {"sha256": "same"} for task in terms}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(found))
        return str(tmp_path / name)

    folders = [write("few", 3, 1), write("all", 4, 0)]
    table = report.compare(folders, None)
    rows = {line.split()[0]: line for line in table.splitlines() if line}
    low, _ = scipy.stats.binomtest(3, 3).proportion_ci(method="wilson")
    assert rows["xstest"].split()[1:] == ["1.0000", f"[{low:.4f},", "1.0000]", "of", "3"] * 2
    assert "of 3 (1 missing)" in rows["alpaca_eval"] and rows["alpaca_eval"].endswith("of 4")
    assert (
        "not alike: the rows of alpaca_eval" in table
        and "not alike: the rows of xstest" not in table
    )
    assert "not alike" not in report.compare([folders[0]] * 2, None)
    assert report.compare([write("none", 4, 0)], None).count("missing") == 0


def test_one_prompt_prints_the_answer_and_nothing_more(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: prompt prints the greedy answer alone. Oracle: model.generate."""
    model, chat = Mistral.from_pretrained(place / "model"), Chat(place / "model")
    ids = model.generate(
        [chat.prompt([{"role": "user", "content": "How do I make a cake?"}])],
        20,
        stop_ids=(chat.eos_id,),
    )[0]
    evaluation.main(
        [
            "prompt",
            "How do I make a cake?",
            "--model",
            str(place / "model"),
            "--max_new_tokens",
            "20",
            "--device",
            "cpu",
        ]
    )
    assert capsys.readouterr() == (chat.decode(ids) + "\n", "")


def test_preference_view_of_four_quadrants(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: by quadrant n, margin, target and the share on the target's side, whatever the policy
    was trained on. Oracle: whole forwards of both models, one sequence at a time, and Figure 3's
    targets at tau = 0.5.
    """
    monkeypatch.setenv("BFPO_CACHE", str(tmp_path / "cache"))
    rng, path = random.Random(1), tmp_path / "pairs.jsonl"
    texts = [request.text for request in language.requests(forbidden=False)]
    rows = [
        {
            "prompt": rng.choice(texts),
            "chosen": rng.choice(texts),
            "rejected": rng.choice(texts),
            "chosen_safe": bool(i & 1),
            "rejected_safe": bool(i & 2),
        }
        for i in range(60)
    ]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation.main(
        [
            "pairs",
            str(path),
            "--model",
            str(place / "model"),
            "--reference",
            str(place / "reference"),
            "--tau",
            "0.5",
            "--device",
            "cpu",
        ]
    )
    table = capsys.readouterr().out

    chat, models = (
        Chat(place / "model"),
        [Mistral.from_pretrained(place / name) for name in ("model", "reference")],
    )

    @torch.no_grad()
    def logprob(model: Mistral, prompt: list[int], answer: list[int]) -> float:
        rows_ = model(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
        return float(rows_[range(len(answer)), answer].double().sum())

    every: dict[tuple[bool, bool], list[float]] = {}
    held = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    for row in rows:
        tree = chat.pair_ids(
            [
                chat.pair_texts(
                    [{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"]
                )
            ]
        )[0]
        prompt, chosen, rejected = (part.tolist() for part in tree)
        new, old = (
            [logprob(model, prompt, answer) for answer in (chosen, rejected)] for model in models
        )
        every.setdefault((row["chosen_safe"], row["rejected_safe"]), []).append(
            (new[0] - old[0]) - (new[1] - old[1])
        )
    # of these few prompts no hash falls in the held-out share, so that all are seen; if that
    # changes, so do the counts
    for quadrant, labels, target in (
        ("both_safe", (True, True), 0.5),
        ("chosen_safe", (True, False), 1.0),
        ("rejected_safe", (False, True), -1.0),
        ("both_unsafe", (False, False), -0.5),
    ):
        margins = every[labels]
        n, margin, goal, share = held[quadrant]
        assert int(n) == len(margins) and float(goal) == target / 0.5
        assert float(margin) == pytest.approx(np.mean(margins), abs=0.006)  # printed to two places
        assert float(share[:-1]) == pytest.approx(
            100 * np.mean([h * target > 0 for h in margins]), abs=0.06
        )
    evaluation.main(
        [
            "pairs",
            str(path),
            "--model",
            str(place / "model"),
            "--reference",
            str(place / "reference"),
            "--tau",
            "0.5",
            "--alpha",
            "1",
            "--b1",
            "2",
            "--device",
            "cpu",
        ]
    )
    again = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    # (2 I - I') / (2 - 1) - 1, over tau; a target of 0 has no side
    for quadrant, target in {
        "both_safe": 0.0,
        "chosen_safe": 2.0,
        "rejected_safe": -4.0,
        "both_unsafe": -2.0,
    }.items():
        assert again[quadrant][:2] == held[quadrant][:2] and float(again[quadrant][2]) == target
        assert again[quadrant][3] == ("-" if not target else held[quadrant][3])


def test_targets_are_those_of_the_models_own_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: pairs takes tau, alpha and b1 from the run that made the model; a flag overrides one of
    them; SFT's, which has no targets, does not count. Oracle: Figure 3's targets over tau, by hand.
    """
    monkeypatch.setenv("BFPO_CACHE", str(tmp_path / "cache"))
    row = {"prompt": "How do I make a cake?", "chosen": "Gather the flour.", "rejected": "No."}
    row |= {"chosen_safe": True, "rejected_safe": True}
    (tmp_path / "pairs.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    shutil.copytree(place / "model", tmp_path / "run" / "model")
    command = ["pairs", str(tmp_path / "pairs.jsonl"), "--device", "cpu"]
    command += ["--model", str(tmp_path / "run" / "model"), "--reference", str(place / "reference")]
    for objective, flags_, target in (
        ("bfpo", [], "+2.00"),
        ("bfpo", ["--tau", "0.5"], "+1.00"),
        ("bfpo", ["--alpha", "0.75"], "+1.00"),
        ("sft", [], "+50.00"),
    ):
        settings = {"objective": objective, "tau": 0.25, "alpha": 0.5, "b1": 3.0}
        record = {"program": "train", "settings": settings}
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        evaluation.main([*command, *flags_])
        (line,) = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("both_safe")
        ]
        assert float(line.split()[3]) == float(target), (objective, flags_)


def test_pairs_that_are_not_finite_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a pair that the policy makes NaN is named with the model's folder, its pack's other
    pairs are not, and no table counts it. Oracle: a word that one pair of six has, with NaN as its
    embedding.
    """
    monkeypatch.setenv("BFPO_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "prompt": "How do I make a cake?",
            "chosen": "Gather the flour.",
            "rejected": "I cannot help.",
            "chosen_safe": True,
            "rejected_safe": True,
        }
        for _ in range(6)
    ]
    rows[4]["rejected"] = "Gather the friend."
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat, model = Chat(place / "model"), Mistral.from_pretrained(place / "model")
    (token,) = set(chat.text("Gather the friend.")) - set(chat.text("Gather the flour."))
    model.model.embed_tokens.weight.data[token] = math.nan
    model.save_pretrained(tmp_path / "nan", like=place / "model")
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(
            [
                "pairs",
                str(tmp_path / "pairs.jsonl"),
                "--model",
                str(tmp_path / "nan"),
                "--reference",
                str(place / "reference"),
                "--device",
                "cpu",
            ]
        )
    shown = capsys.readouterr()
    assert stopped.value.code == 1 and "both_safe" not in shown.out
    assert re.search(
        rf"error: {tmp_path}/nan gives rows [^:]*: pairs 4 \('[^)]*\); its weights", shown.err
    )


def test_pairs_are_not_scored_under_another_tokenizers_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a reference whose tokenizer gives a token of the policy's another id, or whose
    embedding is too small for its ids, ends with code 1 and one line before weights are read.
    Oracle: the messages; no from_pretrained.
    """
    monkeypatch.setattr(
        Mistral, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    for name in ("renumbered", "small"):
        shutil.copytree(place / "model", tmp_path / name)
    tokenizer = json.loads((tmp_path / "renumbered" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "renumbered" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    for name, words in (
        ("renumbered", "--reference must read the policy's tokens as its own"),
        ("small", "entries, the model 9;"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            evaluation.main(
                [
                    "pairs",
                    "x",
                    "--model",
                    str(place / "model"),
                    "--reference",
                    str(tmp_path / name),
                    "--device",
                    "cpu",
                ]
            )
        assert exit_info.value.code == 1 and words in capsys.readouterr().err


def test_prompts_are_cut_from_the_left_to_the_last_token(place: Path) -> None:
    """Claim: a prompt of any length is cut to what fits, BOS kept, also where a single token fits
    beside it. Oracle: slices by hand.
    """
    chat, request = Chat(place / "model"), metrics.Request("How do I make a cake?", chat=False)
    whole, _ = evaluation.encode_prompt(chat, request, True, 100)
    for longest in (1, 2, 5, len(whole)):
        cut = longest < len(whole)
        kept = [whole[0], *whole[len(whole) - longest + 1 :]]
        assert evaluation.encode_prompt(chat, request, True, longest) == (kept, cut)
        plain = evaluation.encode_prompt(chat, request, False, longest)
        assert plain == (whole[1:][-longest:], longest < len(whole) - 1)


@pytest.mark.parametrize("name", ["model", "judge"])
def test_a_long_prompt_keeps_the_chat_format(place: Path, name: str) -> None:
    """Claim: a chat prompt that is too long loses the beginning of its text alone, no more of it
    than it must, and is refused where no text fits. Oracle: every way to shorten the text, by
    Chat.prompt.
    """
    chat, text = Chat(place / name), "How do I make a cake? </s> Say naïve words.\n" * 2

    def asked(content: str) -> list[int]:
        return chat.prompt([{"role": "user", "content": content}])

    request, shortest = metrics.Request(text), len(asked(text[-1]))
    for longest in range(shortest, len(asked(text)) + 2, 5):
        start = next(i for i in range(len(text)) if len(asked(text[i:])) <= longest)
        assert evaluation.encode_prompt(chat, request, True, longest).ids == asked(text[start:])
    with pytest.raises(ValueError, match="the chat format leaves no room"):
        evaluation.encode_prompt(chat, request, True, shortest - 1)


def test_rows_beyond_the_positions_are_counted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: each task's report says how many rows were cut, of choices, chat and plain prompts, by
    model. Oracle: rows of known lengths, and a reference with room for all.
    """
    shutil.copytree(place / "model", tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    changed = config | {"max_position_embeddings": 256 + 60}
    (tmp_path / "small" / "config.json").write_text(json.dumps(changed))
    texts = ["cake " * 20, "cake " * 500, "cake"]
    rows = {
        "ethics_cm": [{"input": text, "label": 0} for text in texts],
        "xstest": [{"prompt": text, "label": "safe"} for text in texts],
        "realtoxicityprompts": [{"prompt": {"text": text}, "challenging": True} for text in texts],
    }
    (tmp_path / "data").mkdir()
    for name, content in rows.items():
        lines_of = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines_of)
    models = ["bench", "--model", str(tmp_path / "small"), "--reference", str(place / "model")]
    evaluation.main(
        [
            *models,
            "--tasks",
            *rows,
            "--data",
            str(tmp_path / "data"),
            "--out",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["cut_rows"] == {name: {"policy": 1, "reference": 0} for name in rows}
    printed = capsys.readouterr().out
    assert all(
        f"cut to the model's positions: {name}, policy, 1 rows\n" in printed for name in rows
    )
    assert "positions: xstest, reference" not in printed


# --- bad input ------------------------------------------------------------------------------------


BENCH = ["bench", "--model", "x", "--out", "y", "--tasks"]
PAIRS = ["pairs", "x", "--model", "y", "--reference", "z"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["bench", "--tasks", "ethics_cm", "--out", "y"], "--model"),
        (["bench", "--model", "x", "--tasks", "ethics_cm"], "--out"),
        ([*BENCH, "ethics"], "a task must be one of truthfulqa_mc2"),
        ([*BENCH, "paper", "--limit", "-1"], "--limit: must be a whole number from 0 up, got -1"),
        ([*BENCH, "paper", "--seed", str(2**31)], "--seed"),
        ([*BENCH, "paper", "--max_new_tokens", "0"], "--max_new_tokens"),
        ([*BENCH, "paper", "--protocol", "papers"], "papers"),
        ([*BENCH, "ethics_cm", "--judge", "gpt-4"], "a judge must be keyword, harmbench:MODEL or"),
        ([*BENCH, "xstest", "--labelled", "z"], "so it needs --judge"),
        ([*BENCH, "xstest", "--tau", "1"], "--tau"),
        (["pairs", "x", "--model", "y"], "--reference"),
        ([*PAIRS, "--max_prompt", "1024"], "--max_prompt must be less than --max_length"),
        (["compare", "x", "--seed", "7"], "--seed"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: exit code 2, and a last line that names what is wrong.

    Oracle: argparse's own convention.
    """
    with pytest.raises(SystemExit) as exit_info:
        evaluation.main(arguments)
    assert exit_info.value.code == 2 and named in capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_input_is_one_line_before_any_model_is_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a row without its field, missing rows, judges of the wrong kind, a model without room,
    a folder of something else and a run with other settings each end with code 1 and one line,
    before weights are read. Oracle: the messages; no from_pretrained.
    """
    evaluation.main(flags(place, tmp_path / "done", "--tasks", "ethics_cm"))
    capsys.readouterr()
    monkeypatch.setattr(
        Mistral, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    (tmp_path / "bad.csv").write_text("input,label\nfine,0\n,1\n")
    (tmp_path / "short.jsonl").write_text(
        '{"input": "x", "label": 1}\n{"inputs": "x", "label": 1}\n'
    )
    (tmp_path / "refusals.jsonl").write_text('{"prompt": "p", "answer": "a", "refusal": true}\n')
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"prompt": "p " * 5000, "answer": "a", "harm": True})
    )
    for name in ("foreign", "redteam", "twice", "backup", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "half" / "advbench-00000-of-00002.jsonl").write_text(
        '{"goal": "x"}\n{"goal": "y"}\n'
    )
    (tmp_path / "blank.csv").write_text("goal,number\nBake a cake,1\n,2\n")
    (tmp_path / "soft.csv").write_text("label,input\n0.9,x\n0,y\n")
    (tmp_path / "labels.tsv").touch()
    (tmp_path / "alpaca.jsonl").write_text(
        '{"instruction": "Sing.", "output": "La.", "generator": "g", "dataset": "d"}\n' * 2
    )
    (tmp_path / "redteam" / "report.json").write_text('{"counts": {}}')
    for name in (
        "twice/toxigen.csv",
        "twice/toxigen.jsonl",
        "backup/toxigen.bak.jsonl",
        "backup/toxigen.json.md",
    ):
        (tmp_path / name).touch()
    (tmp_path / "foreign" / "thesis.tex").touch()
    config = json.loads((place / "model" / "config.json").read_text())
    for name, changes in (
        ("classifier", {"model_type": "deberta-v2"}),
        ("small", {"max_position_embeddings": 257}),
    ):
        shutil.copytree(place / "model", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
    shutil.copytree(place / "judge", tmp_path / "narrow")
    judges = json.loads((place / "judge" / "config.json").read_text())
    (tmp_path / "narrow" / "config.json").write_text(
        json.dumps(judges | {"max_position_embeddings": 100})
    )
    shutil.copytree(place / "model", tmp_path / "thin")
    (tmp_path / "thin" / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    for arguments, words in {
        ("--tasks", "ethics_cm", "--judge", "keyword"): "--judge judges answers",
        ("--tasks", "ethics_cm", "--pairwise", "x/y"): "--pairwise judges the task alpaca_eval",
        ("--tasks", "ethics_cm", "--model", str(tmp_path / "thin")): r"instead of \(\d+, 48\)",
        (
            "--tasks",
            f"ethics_cm={tmp_path / 'short.jsonl'}",
        ): r"short.jsonl:2: ethics_cm: input is missing; the row has inputs, label",
        ("--tasks", "toxigen"): r"data:toxigen must name a split of .*, which has ",
        (
            "--tasks",
            "xstest",
            "--judge",
            f"harmbench:{tmp_path / 'classifier'}",
        ): r"a judge must be a causal language model",
        (
            "--tasks",
            "xstest",
            "--model",
            str(tmp_path / "small"),
        ): r"has no room for answers of 256 tokens; .* leave out xstest",
        (
            "--tasks",
            "own",
            "--data",
            "",
        ): r"own has no rows on the hub; name a file of your prompts: own=FILE",
        (
            "--tasks",
            "strongreject",
            "--judge",
            f"harmbench:{place / 'judge'}",
            "--labelled",
            str(tmp_path / "refusals.jsonl"),
        ): r"labels of refusal, which no judge of these tasks says",
        (
            "--tasks",
            "strongreject",
            "--judge",
            f"harmbench:{place / 'judge'}",
            "--labelled",
            str(tmp_path / "long.jsonl"),
        ): r"long.jsonl:1: the judge needs 512 tokens for an answer",
        (
            "--tasks",
            "ethics_cm",
            "--model",
            str(tmp_path / "classifier"),
        ): r"it asks for model_type",
        ("--tasks", "ethics_cm", "--out", str(tmp_path / "foreign")): r"is no run folder",
        (
            "--tasks",
            "ethics_cm",
            "--out",
            str(tmp_path / "done"),
            "--bos",
        ): r"other settings \(bos was False, now True\)",
        ("compare", str(tmp_path / "foreign")): r"report.json",
        (
            "compare",
            str(tmp_path / "redteam"),
        ): r"another program's\? reports are made by eval.py bench",
        (
            "--tasks",
            "toxigen",
            "--data",
            str(tmp_path / "twice"),
        ): r"the rows of .*toxigen must be there once, got toxigen\.csv and toxigen\.jsonl",
        (
            "--tasks",
            "toxigen",
            "--data",
            str(tmp_path / "backup"),
        ): r"must name a split of .*, which has toxigen\.bak",
        (
            "--tasks",
            "advbench",
            "--data",
            str(tmp_path / "half"),
        ): r"advbench must have 2 parts, got 1",
        (
            "--tasks",
            f"advbench={tmp_path / 'blank.csv'}",
        ): r"blank.csv:3: advbench: goal or prompt or text must hold text, got ''",
        (
            "--tasks",
            f"ethics_cm={tmp_path / 'soft.csv'}",
        ): r"soft.csv:2: ethics_cm: label must be a whole number, got '0.9'",
        (
            "--tasks",
            "strongreject",
            "--judge",
            "keyword",
            "--labelled",
            str(tmp_path / "labels.tsv"),
        ): r"rows must be in .*labels.tsv",
        (
            "--tasks",
            f"alpaca_eval={tmp_path / 'alpaca.jsonl'}",
            "--max_new_tokens",
            "8",
            "--pairwise",
            str(tmp_path / "narrow"),
        ): r"2 rows or more that fit .* 0;",
        (
            "compare",
            str(tmp_path / "short.jsonl"),
        ): r"compare takes folders of reports, got .*short.jsonl",
    }.items():
        with pytest.raises(SystemExit) as exit_info:
            base = [] if "compare" in arguments else flags(place, tmp_path / "out")
            evaluation.main([*base, *arguments])
        said = capsys.readouterr().err.strip().splitlines()
        assert exit_info.value.code == 1 and len(said) == 1 and re.search(words, said[0]), (
            arguments,
            said,
        )


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        (
            "crows_pairs_english",
            {"sent_more": "sorry " * 3000, "sent_less": "x"},
            "a choice must have 1 to 2048 tokens, got 3000",
        ),
        (
            "crows_pairs_english",
            {"sent_more": "", "sent_less": "b"},
            "a choice must have 1 to 2048 tokens, got 0",
        ),
        (
            "realtoxicityprompts",
            {"prompt": {"text": "\u3000"}, "challenging": True},
            "a prompt must have a token, got none of '\\\\u3000'",
        ),
    ],
)
def test_rows_that_the_tokenizer_makes_nothing_of_are_refused_before_anything_is_removed(
    task: str,
    row: dict[str, Any],
    words: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Claim: a row without a token, or with too many, is named by file and line, and --fresh leaves
    the earlier run as it is.

    Oracle: the message; the bytes of the earlier run.
    """
    good = (
        {"sent_more": "a", "sent_less": "b"}
        if task.startswith("crows")
        else row | {"prompt": {"text": "sorry"}}
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(each) + "\n" for each in (good, good)))
    command = flags(place, tmp_path / "out", "--tasks", f"{task}={rows}")
    evaluation.main(command)
    earlier = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    rows.write_text("".join(json.dumps(each) + "\n" for each in (good, row)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        evaluation.main([*command, "--fresh"])
    said = capsys.readouterr().err
    assert (
        exit_info.value.code == 1
        and re.search(rf"rows\.jsonl:2: {task}: {words}", said)
        and said.count("\n") == 1
    ), said
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == earlier


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 1, 7, 20])
def test_share_has_wilsons_interval(right: int) -> None:
    """Claim: mean, standard error, and an interval that is no point at 0 and 1.

    Oracle: scipy's sem and Wilson interval.
    """
    terms = [1.0] * right + [0.0] * (20 - right)
    found = report.share("acc", terms)
    low, high = scipy.stats.binomtest(right, 20).proportion_ci(method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-7)
    assert (found["n"], found["score"], found["error"]) == pytest.approx(
        (20, right / 20, scipy.stats.sem(terms))
    )


def test_difference_is_paired() -> None:
    """Claim: the mean of the rows' differences with its standard error; of shares, Bonett and
    Price's interval. Oracle: scipy's sem; their formula from the two counts of rows on which the
    models differ.
    """
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    found = report.difference("acc", a.tolist(), b.tolist())
    assert (found["score"], found["error"]) == pytest.approx(
        (np.mean(a - b), scipy.stats.sem(a - b))
    )
    assert found["high"] - found["low"] == pytest.approx(
        2 * scipy.stats.norm.ppf(0.975) * scipy.stats.sem(a - b), rel=1e-6
    )
    one, other = [1.0] * 12 + [0.0] * 8, [1.0] * 9 + [0.0] * 10 + [1.0]
    first, second = (
        (3 + 1) / 22,
        (1 + 1) / 22,
    )  # won by the first alone, by the second alone, each with one more
    half = scipy.stats.norm.ppf(0.975) * math.sqrt((first + second - (first - second) ** 2) / 22)
    found = report.difference("acc", one, other)
    assert (found["score"], found["low"], found["high"]) == pytest.approx(
        (0.1, first - second - half, first - second + half), abs=1e-6
    )
    assert report.difference("acc", [1.0] * 20, [1.0] * 20)["high"] > 0.1


def test_interval_is_wilsons_of_shares_alone() -> None:
    """Claim: a bias score of zeros, which may be negative, has not a share's interval; balance's is
    what p's becomes, 0 to 1, and holds the truth as often as p's does, near its bend too. Oracle:
    scipy's Wilson interval through 1 - |2p - 1|; 2,000 simulated evaluations, less 3 standard
    errors.
    """
    assert (
        report.share("amb_bias_score", [0.0] * 12)["low"]
        == 0
        == report.share("amb_bias_score", [0.0] * 12)["high"]
    )

    def balance(terms: list[float]) -> dict[str, float]:
        columns = metrics.stereotype(
            [metrics.Question(("",), ("a", "b"), (0,))] * len(terms),
            [(term, 0.5) for term in terms],
        )
        return dict(report.standing("balance", columns, None))

    low, _ = scipy.stats.binomtest(100, 100).proportion_ci(method="wilson")
    found = balance([1.0] * 100)
    assert (found["score"], found["low"], found["high"]) == pytest.approx(
        (0, 0, 2 - 2 * low), abs=1e-7
    )
    low, _ = scipy.stats.binomtest(50, 100).proportion_ci(method="wilson")
    found = balance([1.0, 0.0] * 50)
    assert (found["score"], found["low"], found["high"]) == pytest.approx((1, 2 * low, 1), abs=1e-7)
    rng, held = np.random.default_rng(2), 0
    for _ in range(2000):
        interval = balance((rng.random(100) < 0.55).astype(float).tolist())
        held += interval["low"] <= 0.9 <= interval["high"]
    assert held / 2000 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_average_of_tasks() -> None:
    """Claim: one vote each; of symmetric intervals 1.96 standard errors, added in squares;
    reference and difference alike; 95 % of the intervals of three tasks near the edge hold the
    truth. Oracle: the formula; 2,000 simulated evaluations, less 3 standard errors.
    """
    rng = np.random.default_rng(1)
    columns = [rng.normal(size=n).tolist() for n in (30, 70)]
    parts = [report.standing("acc", {"acc": column}, {"acc": column[::-1]}) for column in columns]
    found = report.average(parts)
    assert found["error"] == pytest.approx(
        math.hypot(*(scipy.stats.sem(column) for column in columns)) / 2
    )
    assert found["high"] - found["score"] == pytest.approx(
        scipy.stats.norm.ppf(0.975) * found["error"], rel=1e-6
    )
    assert found["reference"]["score"] == pytest.approx(found["score"]) and found["difference"][
        "score"
    ] == pytest.approx(0, abs=1e-12)
    truth, held = (0.98, 0.9, 0.995), 0
    for _ in range(2000):
        interval = report.average(
            [report.share("acc", (rng.random(100) < p).astype(float).tolist()) for p in truth]
        )
        held += interval["low"] <= np.mean(truth) <= interval["high"]
    assert held / 2000 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_averages_of_a_report() -> None:
    """Claim: ethics' tasks have one vote each, crows_pairs_english enters as balance, harmlessness
    is the mean of the two suites, and over_refusal, truthfulqa_gen and helpfulness are in neither.
    Oracle: means by hand.
    """
    terms = {
        "ethics_cm": {"acc": [1.0, 0.0]},
        "ethics_virtue": {"acc": [1.0, 1.0]},
        "crows_pairs_english": {"pct_stereotype": [1.0, 1.0], "balance": [0.0, 0.0]},
        "advbench": {"harmless": [1.0, 0.0]},
        "xstest": {"refused": [1.0, 1.0]},
        "truthfulqa_gen": {"bleu_acc": [0.0, 0.0]},
        "alpaca_eval": {"win_rate": [0.1, 0.3]},
    }
    found = report.make_report(terms, {})["averages"]
    assert {name: part["score"] for name, part in found.items()} == pytest.approx(
        {
            "helpfulness": 0.2,
            "discriminative": 0.5,
            "generative": 0.5,
            "over_refusal": 1.0,
            "harmlessness": 0.5,
        }
    )
    assert found["discriminative"]["tasks"] == ["ethics_cm", "ethics_virtue", "crows_pairs_english"]
