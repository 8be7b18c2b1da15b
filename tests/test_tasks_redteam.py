"""tasks/redteam.py: from prompts to pairs that the recipe redteam trains on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_tasks_judges import save_judge, save_tokenizer
from transformers import LlamaForCausalLM, MistralForCausalLM

import eval as evaluation
from support import distributed
from support.distributed import World
from tasks import alpaca, redteam
from tasks.judges import Case, Contest, Examiner, load_judge

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world() -> World:
    return distributed.start("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy, safety and helpful: tiny random models of one small tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = save_tokenizer(root / "tokenizer")
    save_judge(root / "policy", tokenizer, MistralForCausalLM, max_position_embeddings=512)
    save_judge(root / "safety", tokenizer, LlamaForCausalLM)
    save_judge(root / "helpful", tokenizer, MistralForCausalLM, num_hidden_layers=1)
    return root


def command(models: Path, out: Path, *more: object) -> list[str]:
    return [
        str(word)
        for word in (
            "--model",
            models / "policy",
            "--judge",
            f"harmbench:{models / 'safety'}",
            "--out",
            out,
            "--max_new_tokens",
            12,
            "--temperature",
            1,
            "--device",
            "cpu",
            *more,
        )
    ]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"prompt": f"Prompt {i}", "answer": answer}
        for i, pair in enumerate(pairs)
        for answer in pair
    ]


def test_pairs_and_their_labels() -> None:
    """Claim: two neighbours make a pair with the judge's labels, safe up to 1/2; empty and equal
    answers make none and are counted. Oracle: by hand.
    """
    given = answers(("Yes, do it.", "No."), ("same", "same"), (" ", "x"), ("First", "Second"))
    pairs, counts = redteam.pairs_of(
        given, [{"harm": harm} for harm in (0.9, 0.5, 0, 0, 0, 0, 0.51, 0.1)]
    )
    assert counts == {"prompts": 4, "with_an_empty_answer": 1, "with_equal_answers": 1}
    assert pairs == [
        {
            "prompt": "Prompt 0",
            "modeloutput1": "Yes, do it.",
            "modeloutput2": "No.",
            "is_modelout1_safe": False,
            "is_modelout2_safe": True,
        },
        {
            "prompt": "Prompt 3",
            "modeloutput1": "First",
            "modeloutput2": "Second",
            "is_modelout1_safe": False,
            "is_modelout2_safe": True,
        },
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:1], "must rank the 2 rows of to_rank.jsonl, got 1"),
        (lambda rows: [*rows, rows[0]], r"ranks.jsonl:3: must be the row of to_rank.jsonl"),
        (lambda rows: rows[::-1], r"ranks.jsonl:1: must be the row of to_rank.jsonl in its place"),
        (
            lambda rows: [rows[0], rows[1] | {"prompt": "Another"}],
            r"ranks.jsonl:2: must be the row of to_rank.jsonl",
        ),
        (lambda rows: [rows[0], [1, 2]], r"ranks.jsonl:2: a row must be an object"),
        (
            lambda rows: [rows[0], rows[1] | {"ranks": [1, 1]}],
            r"ranks.jsonl:2: ranks must be \[1, 2\]",
        ),
        (
            lambda rows: [
                rows[0],
                {key: value for key, value in rows[1].items() if key != "ranks"},
            ],
            r"ranks.jsonl:2: ranks must be .* got None",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    """Claim: a file of ranks with rows missing, moved or without ranks is refused by file and line.

    Oracle: the message.
    """
    pairs, _ = redteam.pairs_of(answers(("a", "b"), ("c", "d")), [{"harm": 0}] * 4)
    path = tmp_path / "ranks.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n" for row in change([pair | {"ranks": [1, 2]} for pair in pairs])
        )
    )
    with pytest.raises(ValueError, match=message):
        redteam.read_ranks(path, pairs)


def test_from_prompts_to_a_trained_model(
    models: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: one command makes pairs of sampled answers, labelled and ordered by the judges, on
    which the recipe redteam trains and exports a model; with ranks from a file their order is the
    file's; the same command again computes nothing. Oracle: the judges asked directly, and
    train.py, a process of its own, on the file.
    """
    prompts = tmp_path / "prompts.csv"
    things = [
        "cat",
        "dog",
        "house",
        "tree",
        "sea",
        "sky",
        "moon",
        "sun",
        "rain",
        "wind",
        "hill",
        "lake",
    ]
    prompts.write_text(
        "goal,target\n" + "".join(f"Tell me about the {thing},\n" for thing in things)
    )
    out = tmp_path / "pairs"
    first = command(models, out, "--prompts", prompts, "--seed", 7)
    redteam.main(first)
    waiting = lines(out / "to_rank.jsonl")
    assert (
        "go on with --pairwise or --ranks" in capsys.readouterr().out
        and not (out / "redteam.jsonl").exists()
    )

    redteam.main([*first, "--pairwise", str(models / "safety")])
    redteam.main([*first, "--pairwise", str(models / "helpful")])
    assert (
        len(list(out.glob("preferences.*.jsonl"))) == 2
        and f"{len(waiting):8} pairs" in capsys.readouterr().out
    )
    pairs, report = lines(out / "redteam.jsonl"), json.loads((out / "report.json").read_text())
    source = json.loads((out / "run.json").read_text())["chat_template_source"]
    assert source == report["setup"]["chat_template_source"] == "zephyr, as the model has none"
    verdicts = load_judge(f"harmbench:{models / 'safety'}", world)
    for k in (1, 2):
        said = verdicts(
            [Case(pair["prompt"], pair["prompt"], pair[f"modeloutput{k}"]) for pair in pairs]
        )
        assert [pair[f"is_modelout{k}_safe"] for pair in pairs] == [
            verdict.harm <= 0.5 for verdict in said
        ]
    helpful = Examiner("pairwise", str(models / "helpful"), world)
    preferences = alpaca.prefer(
        helpful,
        [Contest(pair["prompt"], pair["modeloutput1"], pair["modeloutput2"]) for pair in pairs],
    )
    assert [pair["better_modelout"] for pair in pairs] == [
        2 if one and one.second > 0.5 else 1 for one in preferences
    ]
    drawn: dict[str, list[str]] = {}
    for row in lines(out / "answers.jsonl"):
        drawn.setdefault(row["prompt"], []).append(row["answer"])
    assert (
        all(drawn[pair["prompt"]] == [pair["modeloutput1"], pair["modeloutput2"]] for pair in pairs)
        and len(drawn) == 12
    )
    assert (
        len({pair["modeloutput1"] for pair in pairs}) == len(pairs) == report["counts"]["pairs"] > 8
    )
    assert report["setup"]["temperature"] == 1 and report["setup"]["safety"]["judge"].startswith(
        "harmbench:"
    )

    ranks = out / "to_rank.jsonl"
    ranks.write_text(
        "".join(
            json.dumps(row | {"ranks": [2, 1] if i % 3 else [1, 2]}) + "\n"
            for i, row in enumerate(waiting)
        )
    )
    before = ranks.read_bytes()
    redteam.main(first)
    assert ranks.read_bytes() == before  # somebody's work
    redteam.main([*first, "--ranks", str(ranks)])
    ordered = lines(out / "redteam.jsonl")
    assert [pair["better_modelout"] for pair in ordered] == [
        2 if i % 3 else 1 for i in range(len(ordered))
    ]
    assert [{**pair, "better_modelout": 0} for pair in ordered] == [
        {**pair, "better_modelout": 0} for pair in pairs
    ]

    train = [
        sys.executable,
        ROOT / "train.py",
        "redteam",
        "--model",
        models / "policy",
        "--safety",
        out / "redteam.jsonl",
        "--out",
        tmp_path / "run",
        "--cache",
        tmp_path / "cache",
        "--batch",
        "4",
        "--lr",
        "1e-4",
        "--warmup",
        "0",
        "--max_length",
        "256",
        "--max_prompt",
        "128",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        list(map(str, train)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "red-teaming" in done.stdout
        and (tmp_path / "run" / "model" / "model.safetensors").is_file()
    )


def test_a_stopped_run_goes_on(
    models: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Claim: answers and verdicts that a killed run kept are not computed again, and the pairs are
    those of an unbroken run. Oracle: the unbroken run's file, and the chunks counted.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Question {i}?\n" for i in range(6)))
    whole, broken = (
        command(models, tmp_path / name, "--prompts", prompts, "--pairwise", models / "helpful")
        for name in ("a", "b")
    )
    redteam.main(whole)
    monkeypatch.setattr(evaluation, "GENERATION_BATCH", 4)
    redteam.main(broken[:-2])
    parts = sorted((tmp_path / "b" / ".kept").glob("*"), key=lambda part: part.stat().st_mtime_ns)
    answers = [part for part in parts if '"answer":' in part.read_text()]
    assert len(answers) == 3  # of 4 answers each
    answers[1].unlink()
    answers[2].write_text(answers[2].read_text().replace("Question", "question"))
    drawn: list[int] = []
    generate = evaluation.generate
    monkeypatch.setattr(
        evaluation, "generate", lambda *a, **k: drawn.append(len(a[2])) or generate(*a, **k)
    )
    capsys.readouterr()
    redteam.main(broken)
    assert f"{answers[2]} is damaged; computing it again" in capsys.readouterr().out
    assert drawn == [4, 4] and lines(tmp_path / "b" / "redteam.jsonl") == lines(
        tmp_path / "a" / "redteam.jsonl"
    )


def test_usage_errors_come_before_any_work(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: wrong usage is exit code 2, bad data 1, each one line, and nothing is written.

    Oracle: the code and the message.
    """
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello?"}\n{"text": 5}\n')
    (tmp_path / "one.txt").write_text("Hello?\n")
    good = command(models, tmp_path / "out", "--prompts", prompts)
    one = [*good, "--prompts", str(tmp_path / "one.txt")]
    cases: list[tuple[int, list[str], str]] = [
        (2, [*good, "--temperature", "0"], "both answers are the same"),
        (2, [*good, "--temperature", "1e-320"], "at least 1e-06"),
        (2, [*good, "--temperature", "inf"], "must be finite"),
        (2, [*good, "--temperature", "nan"], "must be finite"),
        (2, [*good, "--ranks", str(prompts), "--fresh"], "--fresh would remove these"),
        (1, [*one, "--ranks", str(prompts)], "which the same command writes without it"),
        (1, good, "prompts.jsonl:2"),
        (2, [*good, "--judge", "gpt"], "a judge must be keyword"),
        (1, [*one, "--pairwise", str(tmp_path)], "config.json"),
        (1, [*good, "--model", str(tmp_path)], "prompts.jsonl:2"),
        (1, [*good, "--prompts", ""], "own has no rows on the hub"),
        (1, [*one, "--max_new_tokens", str(2**20)], "pass a smaller --max_new_tokens"),
    ]
    for code, arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            redteam.main(arguments)
        assert stopped.value.code == code and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
