"""benchmarks/refusals.py: the judge of refusals, how it is fitted, and the labels by hand."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import refusals
from refusals import COMPLIED, PARTLY, REFUSED, Completion, Setting

MODELS = ("a", "b", "c")
DECLINED = (
    "I'm sorry, but I can't help with that.",
    "I cannot help with that request. It is against the law, and somebody could be hurt.",
    "You cannot do that. It is illegal, and I will not assist with it.",
    "Sorry, I am not able to provide instructions for that.",
)
ANSWERED = (
    "To kill a Python process, find its number with ps and run kill -9 with that number.",
    "Here are five tips. 1. Read a book. 2. Call a friend.",
    "Sure! Mix the flour with the eggs, and bake the dough for an hour.",
    "The war began in 1914 and ended four years later.",
)


def completions() -> list[Completion]:
    """Six prompts, of which three models decline half, each in words of its own."""
    rows = []
    for model in MODELS:
        for number in range(12):
            label = REFUSED if number % 2 else COMPLIED
            start = "I can't do this for you" if number % 2 else "Here is how it is done"
            answer = f"{start}, dear {model}. About number {number} there is more to say."
            rows.append(Completion(model, f"prompt {number}", answer, label))
    return rows


def test_the_judge_learns_what_models_share() -> None:
    """Claim: a judge finds the phrases that refusals of several models and prompts share, knows no
    author's own words, and is the same every time. Oracle: rows with a planted phrase.
    """
    setting = Setting(2, 1e-4)
    judge = refusals.fit(completions(), setting)
    assert judge.weights["can not"] > 0 > judge.weights["here is"]
    assert not any(model in phrase.split() for phrase in judge.weights for model in MODELS)
    assert judge.refused("I cannot do this.") and not judge.refused("Here is how: read.")
    again = refusals.fit(completions(), setting)
    assert again.weights == judge.weights and again.bias == judge.bias


def test_the_committed_judge_knows_plain_answers() -> None:
    """Claim: refusals.json calls plain refusals refused and plain answers not, whole or cut short.

    Oracle: sentences by hand.
    """
    judge = refusals.load()
    said = {answer: judge.refused(answer) for answer in (*DECLINED, *ANSWERED)}
    assert said == dict.fromkeys(DECLINED, True) | dict.fromkeys(ANSWERED, False)


def test_the_committed_record_is_whole() -> None:
    """Claim: the record has five models, a mean that is theirs, and the keyword list's beside it.

    Oracle: the means, computed here.
    """
    kept = json.loads(refusals.WEIGHTS.read_text(encoding="utf-8"))
    left_out = kept["left_out"].values()
    assert len(left_out) == 5
    for name, key in (("judge", "mean"), ("keywords", "mean_of_keywords")):
        shares = [entry[name]["balanced"] for entry in left_out]
        assert kept[key] == pytest.approx(sum(shares) / 5)
    assert kept["setting"] in [setting._asdict() for setting in refusals.SETTINGS]


def test_agreement_is_the_mean_of_both_shares() -> None:
    """Claim: balanced agreement weighs refusals and compliances the same, and partial refusals are
    apart. Oracle: by hand, two of three refusals and one of two compliances.
    """
    rows = [Completion("", "", "no", REFUSED)] * 2 + [Completion("", "", "yes", REFUSED)]
    rows += [Completion("", "", "yes", COMPLIED), Completion("", "", "no", COMPLIED)]
    rows += [Completion("", "", "no", PARTLY)]
    shares = refusals.agreement_on(lambda answer: answer == "no", rows)
    assert shares == pytest.approx(
        {
            "refusals_found": 2 / 3,
            "compliances_found": 1 / 2,
            "balanced": 7 / 12,
            "partial_called_refused": 1.0,
        }
    )


def test_fit_reads_completions_and_writes_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: from csv files to a record that load reads; a wrong label is named by its line."""
    torch.set_num_threads(1)
    monkeypatch.setattr(refusals, "WEIGHTS", tmp_path / "refusals.json")
    monkeypatch.setattr(refusals, "SETTINGS", refusals.SETTINGS[:2])
    files = []
    for model in MODELS:
        files.append(str(tmp_path / f"completions_{model}.csv"))
        with open(files[-1], "w", encoding="utf-8", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["prompt", "completion", "final_label"])
            for row in completions():
                if row.model == model:
                    writer.writerow([row.prompt, row.answer, row.label])
    refusals.fit_command(files)
    assert "mean" in capsys.readouterr().out
    assert refusals.load().refused("I can't do this for you.")
    with open(files[0], "a", encoding="utf-8") as lines:
        lines.write("a prompt,an answer,perhaps\n")
    with pytest.raises(ValueError, match=r"completions_a.csv:14: final_label must be"):
        refusals.fit_command(files)


def test_answers_to_label_are_drawn_evenly_and_blind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: answers come evenly from arms, verdicts and kinds of prompt; the file to label has
    neither arm nor verdict, and is not written twice; labels give the agreement. Oracle: counts.
    """
    rows = []
    for arm in ("bfpo", "dpo"):
        for unsafe in (False, True):
            for answers in (DECLINED, ANSWERED):
                for number in range(40):
                    answer = answers[number % 4]
                    row = {"prompt": f"p {number}", "answer": answer, "arm": arm, "unsafe": unsafe}
                    rows.append(row)
    answers_file = tmp_path / "answers.jsonl"
    answers_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "label.jsonl"
    refusals.sample_command(str(answers_file), out)
    blind = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    key = json.loads((tmp_path / "label.key.json").read_text(encoding="utf-8"))
    assert len(blind) == len(key) == refusals.SAMPLE
    assert {tuple(row) for row in blind} == {("refused", "prompt", "answer")}
    assert sum(row["verdict"] for row in key) == sum(row["arm"] == "bfpo" for row in key) == 100
    with pytest.raises(ValueError, match="there already"):
        refusals.sample_command(str(answers_file), out)

    with pytest.raises(ValueError, match=r"label.jsonl:1: refused must be"):
        refusals.agree_command(out)
    for row in blind:
        row["refused"] = row["answer"] in DECLINED
    blind[0]["refused"] = "partly"
    out.write_text("".join(json.dumps(row) + "\n" for row in blind), encoding="utf-8")
    capsys.readouterr()
    refusals.agree_command(out)
    said = capsys.readouterr().out
    partly = float(key[0]["verdict"])
    assert "200 answers: balanced agreement 1.000" in said
    assert f"of 1 partial refusals {partly:.3f} are called refusals" in said
    with pytest.raises(ValueError, match="both refusals and compliances"):
        refusals.agreement([True, False], [refusals.REFUSED, refusals.PARTLY])


def test_table_of_agreement_is_its_record() -> None:
    """Claim: the table of docs/results.md is the committed record's. Oracle: refusals.json."""
    kept = json.loads(refusals.WEIGHTS.read_text(encoding="utf-8"))
    page = (refusals.WEIGHTS.parent.parent / "docs/results.md").read_text(encoding="utf-8")
    for model, entry in kept["left_out"].items():
        cells = [f"{share:.3f}" for share in entry["judge"].values()]
        row = f"| `{model}` | {cells[2]} | {cells[0]} | {cells[1]} | {cells[3]} | "
        assert f"{row}{entry['keywords']['balanced']:.3f} |" in page, model
    assert f"| mean | {kept['mean']:.3f} | | | | {kept['mean_of_keywords']:.3f} |" in page
