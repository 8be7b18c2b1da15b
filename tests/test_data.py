"""data.py: sources, schemas, streams, their cache and report, batches and packs, against rows and
counts made by hand.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import bfpo
import data
import eval as evaluation
from data import Pair, batch_indices, cost, deal, describe, load_stream
from support.chat import Chat
from support.sources import find_source, read_rows

ROOT = Path(__file__).parent.parent
BOTH, CHOSEN, REJECTED, NEITHER = data.QUADRANTS


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pku(
    prompt: str = "q",
    safe: tuple[Any, Any] = (True, False),
    better: Any = 0,
    safer: Any = 0,
    **more: Any,
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response_0": "zero",
        "response_1": "one",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": better,
        "safer_response_id": safer,
    } | more


def own(i: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"question {i}",
        "chosen": f"good {i}",
        "rejected": f"bad {i}",
        "chosen_safe": i % 2 == 0,
        "rejected_safe": i % 3 == 0,
    } | more


def write(path: Path, rows: list[Any]) -> Path:
    """The rows in the format that the file's name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_suffix("") if path.suffix in (".gz", ".xz") else path
    if plain.suffix == ".parquet":
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        content = buffer.getvalue().to_pybytes()
    elif plain.suffix == ".csv":
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = table.getvalue().encode()
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        content = (json.dumps(rows, indent=1) if plain.suffix == ".json" else lines).encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(content))
    return path


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """A small byte-level tokenizer with Zephyr's format: every text has ids and comes back from
    them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        ["question answer good bad <|user|>\n<|assistant|>\n<|system|>\n"] * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder = tmp_path_factory.mktemp("small")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return Chat(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BFPO_CACHE", str(tmp_path / "token cache"))
    return tmp_path / "token cache"


def everything(stream: data.Stream) -> list[Any]:
    labels = np.stack([stream.chosen_safe, stream.rejected_safe], axis=1).tolist()
    return [([part.tolist() for part in stream.tree(i)], labels[i]) for i in range(len(stream))]


def quadrants_of(stream: data.Stream) -> set[str]:
    names = {(True, True): BOTH, (True, False): CHOSEN, (False, True): REJECTED}
    labels = zip(stream.chosen_safe.tolist(), stream.rejected_safe.tolist(), strict=True)
    return {names.get(pair, NEITHER) for pair in labels}


def prompts(stream: data.Stream, chat: Chat) -> list[str]:
    """The questions of a stream of own() rows, in its order."""
    texts = [chat.decode(np.concatenate(stream.tree(i))) for i in range(len(stream))]
    return [text.split("<|user|>\n")[1].split("\n")[0] for text in texts]


# ------------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize(
    "row, schema, prefer, pair",
    [
        (pku(), "PKU-SafeRLHF", "helpful", Pair(user("q"), "zero", "one", True, False)),
        (pku(better=1), "PKU-SafeRLHF", "helpful", Pair(user("q"), "one", "zero", False, True)),
        (pku(better=1), "PKU-SafeRLHF", "safe", Pair(user("q"), "zero", "one", True, False)),
        (
            pku(better=1, safer_response_id=1),
            "PKU-SafeRLHF",
            "safe",
            Pair(user("q"), "zero", "one", True, False),
        ),
        (
            pku(better=1, safer_response_id=1),
            "PKU-SafeRLHF",
            "safer",
            Pair(user("q"), "zero", "one", True, False),
        ),
        (
            pku(better=1, safe=(True, True)),
            "PKU-SafeRLHF",
            "safe",
            Pair(user("q"), "one", "zero", True, True),
        ),
        (
            pku(better=1, safe=(False, False)),
            "PKU-SafeRLHF",
            "safe",
            Pair(user("q"), "one", "zero", False, False),
        ),
        (
            pku(better=1, safe=(False, False)),
            "PKU-SafeRLHF",
            "safer",
            Pair(user("q"), "zero", "one", False, False),
        ),
        (
            pku(prompt_source="x", response_0_severity_level=0),
            "PKU-SafeRLHF",
            "helpful",
            Pair(user("q"), "zero", "one", True, False),
        ),
        (
            {
                "prompt": "q",
                "modeloutput1": "a",
                "modeloutput2": "b",
                "better_modelout": 2,
                "is_modelout1_safe": 1,
                "is_modelout2_safe": 0,
            },
            "red-teaming",
            "helpful",
            Pair(user("q"), "b", "a", False, True),
        ),
        (
            {
                "prompt": "q",
                "modeloutput1": "a",
                "modeloutput2": "b",
                "better_modelout": 2,
                "is_modelout1_safe": True,
                "is_modelout2_safe": False,
            },
            "red-teaming",
            "safe",
            Pair(user("q"), "a", "b", True, False),
        ),
        (
            {
                "prompt": "x",
                "chosen": talk("q", "a", "r", "b"),
                "rejected": talk("q", "a", "r", "c"),
                "score_chosen": 8.0,
                "score_rejected": 1.0,
                "messages": talk("q", "b"),
            },
            "TRL",
            "safe",
            Pair(talk("q", "a", "r"), "b", "c", True, True),
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "TRL",
            "helpful",
            Pair(user("q"), "a", "b", True, True),
        ),
        (
            {"prompt": talk("q"), "chosen": answer("a"), "rejected": answer("b")},
            "TRL",
            "helpful",
            Pair(talk("q"), "a", "b", True, True),
        ),
        (
            {"prompt": talk("q", "r", "s"), "chosen": answer("a"), "rejected": answer("b")},
            "TRL",
            "safe",
            Pair(talk("q", "r", "s"), "a", "b", True, True),
        ),
        (
            {"prompt": "q", "chosen": answer("a"), "rejected": answer("b")},
            "TRL",
            "helpful",
            Pair(user("q"), "a", "b", True, True),
        ),
        (
            {"prompt": talk("q"), "chosen": talk("q", "a"), "rejected": talk("q", "b")},
            "TRL",
            "helpful",
            Pair(talk("q"), "a", "b", True, True),
        ),
        (
            {"chosen": talk("q", "r", "s", "a"), "rejected": talk("q", "r", "s", "b")},
            "TRL",
            "helpful",
            Pair(talk("q", "r", "s"), "a", "b", True, True),
        ),
        (
            own(3, prompt=talk("q"), chosen=talk("q", "a"), rejected=talk("q", "b")),
            "bfpo",
            "helpful",
            Pair(talk("q"), "a", "b", False, True),
        ),
        (
            own(3, chosen=answer("a"), rejected=answer("b")),
            "bfpo",
            "safe",
            Pair(user("question 3"), "b", "a", True, False),
        ),
        (
            own(2, chosen_safe="True", rejected_safe="0"),
            "bfpo",
            "helpful",
            Pair(user("question 2"), "good 2", "bad 2", True, False),
        ),
        (own(3), "bfpo", "helpful", Pair(user("question 3"), "good 3", "bad 3", False, True)),
        (own(3), "bfpo", "safe", Pair(user("question 3"), "bad 3", "good 3", True, False)),
        (own(3), "bfpo", "safer", Pair(user("question 3"), "bad 3", "good 3", True, False)),
        (
            own(0, prompt=talk("q", "a", "r")),
            "bfpo",
            "helpful",
            Pair(talk("q", "a", "r"), "good 0", "bad 0", True, True),
        ),
    ],
)
def test_schemas_give_the_pair(row, schema, prefer, pair):
    """A row of every public schema, ours, and TRL's in all its forms: recognised by its columns;
    which answer is chosen, and its label, by hand.
    """
    assert data.find_schema(list(row), "pairs") == schema and data.QUADRANTS == bfpo.QUADRANTS
    assert data.read_pair(row, data.SCHEMAS[schema], prefer) == pair


def test_unlabelled_pairs_are_helpfulness_only(chat, tmp_path):
    """Claim: rows without labels are refused as safety pairs, with what to do, and count as safe
    among helpfulness pairs. Oracle: the words; the labels.
    """
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = str(write(tmp_path / "a.jsonl", [row]))
    for words in ("add the columns chosen_safe and rejected_safe", "pass the source as --help"):
        with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{words}"):
            load_stream([path], chat, labelled=True)
    (labels,) = [labels for _, labels in everything(load_stream([path], chat, held_out=0)[0])]
    assert labels == [True, True]
    write(tmp_path / "a.jsonl", [row | {"chosen_safe": False, "rejected_safe": True}])
    stream, _ = load_stream([path], chat, held_out=0, labelled=True)
    assert everything(stream)[0][1] == [False, True]


def test_known_schemas_are_listed_with_their_marks(chat, tmp_path):
    """Claim: the error over unknown columns names each schema, the column that marks it, and its
    columns. Oracle: data.SCHEMAS.
    """
    path = str(write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}]))
    for stage in ("pairs", "sft"):
        with pytest.raises(ValueError, match=r"a\.jsonl:1: .*got question, answer") as error:
            load_stream([path], chat, stage=stage)
        for name, schema in data.SCHEMAS.items():
            listed = f"{name}, marked by {schema.mark}: prompt, {schema.answers[0]}"
            assert (listed in str(error.value)) == (stage == "sft" or name != "messages")


def test_sft_takes_conversations_and_safer_answers(chat, tmp_path):
    """SFT scores all after BOS: messages as they are, PKU's safer answer even of two unsafe ones;
    cut at max_length.
    """
    rows = [
        {"prompt": "p", "messages": talk("hi", "hello", "more", "sure")},
        {"messages": talk("x" * 90, "y" * 90)},
    ]
    conversations = write(tmp_path / "ultrachat.jsonl", rows)
    pairs = write(tmp_path / "pku.jsonl", [pku(better=1, safe=(False, False)), pku(better=1)])
    stream, held = load_stream(
        [str(conversations), str(pairs)],
        chat,
        stage="sft",
        held_out=0,
        max_length=120,
        max_prompt=60,
    )
    wanted = [rows[0]["messages"], rows[1]["messages"], talk("q", "zero"), talk("q", "zero")]
    assert len(held) == 0 and stream.lengths.shape == (4, 2)
    for i, messages in enumerate(wanted):
        bos, rest = stream.tree(i)
        ([_, whole],) = chat.conversation_ids([chat.conversation_text(messages)])
        assert bos.tolist() == [chat.bos_id] and rest.tolist() == whole[:119].tolist()
    assert [part["answers_cut"] for part in stream.report["sources"]] == [1, 0]


@pytest.mark.parametrize(
    "name",
    [
        *("rows.parquet", "rows.csv", "rows.jsonl", "rows.jsonl.gz", "rows.jsonl.xz"),
        *("rows.json", "rows.json.gz", "rows.json.xz"),
    ],
)
def test_formats_hold_the_same_rows(name, chat, tmp_path):
    """JSON lines and a JSON array, plain, gzip and xz, parquet and CSV: the same trees as from the
    rows themselves.
    """
    rows = [own(i) for i in range(7)] + [own(7, chosen="naïve 漢字 😀\n\ttwo"), own(8)]
    path = write(tmp_path / name, rows)
    if name == "rows.json":
        path.write_text("\n " + path.read_text())
    elif name == "rows.json.gz":  # as some editors begin a file
        path.write_bytes(gzip.compress("\ufeff".encode() + gzip.decompress(path.read_bytes())))
    stream, _ = load_stream([str(path)], chat, held_out=0)
    texts = [chat.pair_texts(user(row["prompt"]), row["chosen"], row["rejected"]) for row in rows]
    trees = [[part.tolist() for part in tree] for tree in chat.pair_ids(texts)]
    assert everything(stream) == [
        (tree, [row["chosen_safe"], row["rejected_safe"]])
        for tree, row in zip(trees, rows, strict=True)
    ]
    assert stream.lengths.tolist() == [[len(part) for part in tree] for tree in trees]


def test_mistral_stream_is_truncated_as_the_paper(mistral_tokenizer, tmp_path):
    """With Mistral's tokenizer, streams hold pair_ids cut by truncate; what was cut is counted. 600
    words beat 100 tokens.
    """
    mistral = Chat(mistral_tokenizer)
    rows = [
        own(0),
        own(1, prompt="word " * 600),
        own(2, chosen="word " * 600),
        own(3, prompt="a " * 300, rejected="b " * 300),
    ]
    stream, _ = load_stream(
        [str(write(tmp_path / "a.jsonl", rows))], mistral, held_out=0, max_length=100, max_prompt=40
    )
    assert stream.tokens.dtype == np.uint16
    for i, row in enumerate(rows):
        (tree,) = mistral.pair_ids(
            [mistral.pair_texts(user(row["prompt"]), row["chosen"], row["rejected"])]
        )
        assert [p.tolist() for p in stream.tree(i)] == [
            p.tolist() for p in data.truncate(tree, 100, 40)
        ]
        assert (
            stream.tree(i)[0][0] == mistral.bos_id
            and stream.lengths[i, 0] + stream.lengths[i, 1:].max() <= 100
        )
    (part,) = stream.report["sources"]
    assert (part["prompts_cut"], part["answers_cut"]) == (2, 2)


def recorded_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of every schema by source, some cut, empty, identical or with doubtful scores."""
    words = ["tree", "naïve", "漢字", "</s>", "<|user|>\n", "😀", "\t", "  two", "2024", "it's"]

    def text(seed: int, most: int) -> str:
        draws = hashlib.sha256(str(seed).encode()).digest()
        return " ".join(words[byte % len(words)] for byte in (draws * 20)[: seed * 7 % most])

    plain = [
        own(i, prompt=f"question {i} {text(i, 90)}", chosen=text(i + 1, 60), rejected=text(i, 80))
        for i in range(80)
    ]
    plain[7] |= {"rejected": plain[7]["chosen"]}
    pairs = [
        pku(f"{text(i, 40)} {i}", (i % 2 == 0, i % 3 == 0), i % 2, (i + 1) // 2 % 2)
        for i in range(60)
    ]
    scored = []
    for i in range(40):
        turns = talk(f"{i} {text(i, 50)}", "a", text(i, 30) + "?")
        answers = {"chosen": f"yes {text(i, 90)}", "rejected": f"no {text(i + 3, 70)}"}
        row: dict[str, Any] = {"score_chosen": i % 5, "score_rejected": 2.0 if i % 7 else None}
        for name, answer in answers.items():
            row[name] = [*turns, {"role": "assistant", "content": answer}]
        scored.append(row)
    conversations = [
        {"messages": talk(f"{i}", text(i, 60) + "!", text(i, 9) + "?", text(i + 5, 99) + ".")}
        for i in range(30)
    ]
    return {"plain": plain, "pku": pairs, "scored": scored, "messages": conversations}


RECORDED_COUNTS = (
    *("rows", "empty", "identical", "prompts_cut", "answers_cut"),
    *("training_rows", "held_out_rows"),
)
# From the first version of these arrays. Other sums need another data.FORMAT.
RECORDED = {
    "pairs": "8b96da7811a6df9b f3e8476e27853c6e",
    "pairs, counts": "b094b4e541a58095",
    "pairs, steps": "395328006cf7dfa2",
    "safe": "e673e044eabdbdd9 66f05079aac65e41",
    "safe, counts": "cc6b3630688e0c5f",
    "safe, steps": "259b4d60eb3e2130",
    "helpfulness": "91730914a33d21ee 138ff0ef4573110d",
    "helpfulness, counts": "2cc6766bce0df6f1",
    "helpfulness, steps": "b1e0872e3981e2bf",
    "sft": "64a398e103859ea0 461dc9b735d04607",
    "sft, counts": "106175d487c439c6",
    "sft, steps": "ffa1e31ba3819723",
}


def recorded_sums(stream: data.Stream) -> str:
    """A short sum of a stream's ids, lengths and labels."""
    parts = [np.concatenate(stream.tree(i)).tolist() for i in range(len(stream))]
    labels = np.stack([stream.chosen_safe, stream.rejected_safe]).astype(int).tolist()
    content = json.dumps([parts, stream.lengths.tolist(), labels])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def test_ids_batches_and_packs_are_those_recorded(mistral_tokenizer, tmp_path):
    """Claim: the same rows give the ids, lengths, labels, batches and packs that they gave before.
    Oracle: sums recorded from the first version of this file.
    """
    mistral = Chat(mistral_tokenizer)
    rows = recorded_rows()
    paths = {name: str(write(tmp_path / f"{name}.jsonl", part)) for name, part in rows.items()}
    write(tmp_path / "split" / "train.jsonl", rows["plain"][:50])
    write(tmp_path / "split" / "test.jsonl", rows["plain"][50:])
    lengths = {"max_length": 250, "max_prompt": 80}
    several = [paths["plain"], f"{paths['pku']}[:80%]", str(tmp_path / "split")]
    calls: dict[str, Any] = {
        "pairs": (several, lengths),
        "safe": ([paths["pku"]], {"prefer": "safe", "held_out": 0.3}),
        "helpfulness": ([paths["scored"]], lengths),
        "sft": ([paths["messages"], paths["pku"]], {"stage": "sft", "max_length": 250}),
    }
    sums = {}
    for name, (sources, options) in calls.items():
        train, held = load_stream(sources, mistral, **options)
        sums[name] = f"{recorded_sums(train)} {recorded_sums(held)}"
        counts = [[part[key] for key in RECORDED_COUNTS] for part in train.report["sources"]]
        sums[f"{name}, counts"] = hashlib.sha256(str(counts).encode()).hexdigest()[:16]
        tokens = train.lengths.sum(1)
        dealt = []
        for step in range(5):
            batch = batch_indices(len(train), 16, 42, step, name)
            dealt.append([batch.tolist(), deal(tokens[batch].tolist(), 3, 400)])
        sums[f"{name}, steps"] = hashlib.sha256(str(dealt).encode()).hexdigest()[:16]
    assert sums == RECORDED


def test_streams_without_bos_are_truncated_and_split(chat, tmp_path):
    """Without BOS a prompt that is cut is its last max_prompt tokens, and a conversation is split
    after its first token, which nothing predicts. Oracle: slices of pair_ids, by hand.
    """
    (tmp_path / "tokenizer.json").write_text(chat.tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    bare = Chat(tmp_path)
    row = own(0, prompt="a " * 300)
    source = [str(write(tmp_path / "a.jsonl", [row]))]
    texts = bare.pair_texts(user(row["prompt"]), row["chosen"], row["rejected"])
    ((prompt, chosen, rejected),) = bare.pair_ids([texts])
    pairs, _ = load_stream(source, bare, held_out=0, max_length=100, max_prompt=40)
    cut = [part.tolist() for part in pairs.tree(0)]
    assert cut == [prompt[-40:].tolist(), chosen.tolist(), rejected.tolist()]
    conversations, _ = load_stream(source, bare, stage="sft", held_out=0, max_length=9999)
    whole = [*prompt, *chosen]
    assert [part.tolist() for part in conversations.tree(0)] == [whole[:1], whole[1:]]


# ------------------------------------------------------------------------------------------------ sources and files


@pytest.mark.parametrize(
    "suffix, rows",
    [
        ("", range(10)),
        ("[:3]", range(3)),
        ("[7:]", range(7, 10)),
        ("[2:5]", range(2, 5)),
        ("[:20%]", range(2)),
        ("[25%:75%]", range(2, 8)),
        ("[:]", range(10)),
        ("[:99]", range(10)),
    ],
)
def test_slices_take_raw_rows(suffix, rows, chat, tmp_path):
    """[START:STOP] over the rows as they are in the files, one source of two files; percentages
    round to the nearest row.
    """
    write(tmp_path / "d" / "a" / "train.jsonl", [own(i) for i in range(4)])
    write(tmp_path / "d" / "b" / "train.parquet", [own(i) for i in range(4, 10)])
    stream, _ = load_stream([f"{tmp_path / 'd'}{suffix}"], chat, held_out=0)
    assert prompts(stream, chat) == [f"question {i}" for i in rows]


def test_splits_of_a_folder_laid_out_like_the_hub(chat, tmp_path):
    """Shards, round folders and numbered parquet files; the split asked for, the stage's own, or
    the only one; held-out rows.
    """
    hub = tmp_path / "hub"
    names = {
        "data/train_prefs-00000-of-00002.parquet": 0,
        "data/train_prefs-00001-of-00002.parquet": 1,
        "data/test_prefs-00000-of-00001-0ab1.parquet": 2,
        "data/train_sft-00000-of-00001.jsonl.gz": 3,
        "round1/valid.jsonl.xz": 4,
        "round2/valid.csv": 5,
        "other/0000.parquet": 6,
        "other/0001.parquet": 7,
        ".cache/train.jsonl": 8,
    }
    for name, i in names.items():
        write(hub / name, [own(i)])
    (hub / "README.txt").write_text("what these files hold")

    def read(suffix: str, stage: str = "pairs") -> list[list[str]]:
        return [
            prompts(stream, chat) for stream in load_stream([f"{hub}{suffix}"], chat, stage=stage)
        ]

    assert read("") == read(":train_prefs") == [["question 0", "question 1"], ["question 2"]]
    assert read("", "sft") == [["question 3"], []]
    assert read(":valid") == [["question 4", "question 5"], []]
    assert read(":other[1:]") == [["question 7"], []]
    with pytest.raises(
        ValueError,
        match=r"must name a split of .* which has test_prefs, train_prefs, train_sft, other, valid",
    ):
        read(":nothing")
    (hub / "data" / "train_prefs-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="train_prefs must have 2 parts, got 1"):
        read("")


def test_splits_of_a_folder_of_ones_own(chat, tmp_path):
    """Claim: the one split with train in its name is trained on, and its test split is held out; a
    file whose rows are there twice, or a part that is missing, is refused. Oracle: the rows.
    """
    for i, name in enumerate(("mine-train.jsonl", "mine-test.jsonl", "notes.jsonl")):
        write(tmp_path / "mine" / name, [own(i)])
    streams = load_stream([f"{tmp_path / 'mine'}"], chat)
    assert [prompts(stream, chat) for stream in streams] == [["question 0"], ["question 1"]]
    streams = load_stream([f"{tmp_path / 'mine'}:mine-test"], chat, held_out=0)
    assert prompts(streams[0], chat) == ["question 1"]
    for i, names in enumerate(
        (
            ["train.jsonl", "train.jsonl.gz"],
            ["train.jsonl", "train-00000-of-00001.parquet"],
            ["train-00000-of-00001-0ab1.parquet", "train-00000-of-00001-77fe.parquet"],
        )
    ):
        for name in names:
            write(tmp_path / "twice" / str(i) / name, [own(1)])
        with pytest.raises(
            ValueError, match=rf"{i}/train must be there once, got {' and '.join(sorted(names))}"
        ):
            load_stream([f"{tmp_path / 'twice' / str(i)}"], chat)
    for name in ("train.jsonl", "test-00000-of-00002.jsonl"):
        write(tmp_path / "part" / name, [own(1)])
    with pytest.raises(ValueError, match="test must have 2 parts, got 1"):
        load_stream([f"{tmp_path / 'part'}"], chat)
    write(tmp_path / "one" / "pairs.jsonl", [own(1)])
    assert prompts(load_stream([f"{tmp_path / 'one'}"], chat, held_out=0)[0], chat) == [
        "question 1"
    ]
    odd = write(
        tmp_path / "a:b@c[:3].jsonl", [own(i) for i in range(5)]
    )  # an existing name is itself, whatever it holds
    assert len(load_stream([str(odd)], chat, held_out=0)[0]) == 5


def test_folders_of_save_to_disk_are_told_the_remedy(chat, tmp_path):
    """Claim: a folder that datasets' save_to_disk wrote, of one split or several, is refused with
    the call that writes a file instead; that file is read. Oracle: datasets, and the rows.
    """
    import datasets

    rows = [own(i) for i in range(3)]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "two"))
    for name in ("one", "two"):
        with pytest.raises(ValueError, match=r"datasets' save_to_disk.*load_from_disk.*to_json"):
            load_stream([str(tmp_path / name)], chat)
    saved = datasets.load_from_disk(str(tmp_path / "two"))
    saved["train"].to_json(str(tmp_path / "train.jsonl"))
    stream, _ = load_stream([str(tmp_path / "train.jsonl")], chat, held_out=0)
    assert prompts(stream, chat) == [row["prompt"] for row in rows]


def test_held_out_rows_of_a_test_split_are_limited(chat, tmp_path, monkeypatch):
    """The first HELD_OUT_ROWS of the test split; none with held_out=0; a slice cuts the training
    rows alone.
    """
    write(tmp_path / "d" / "train.jsonl", [own(i) for i in range(5)])
    write(tmp_path / "d" / "test.jsonl", [own(i) for i in range(100, 105)])
    monkeypatch.setattr(data, "HELD_OUT_ROWS", 3)
    train, held = load_stream([f"{tmp_path / 'd'}[:2]"], chat)
    assert prompts(train, chat) == ["question 0", "question 1"]
    assert prompts(held, chat) == ["question 100", "question 101", "question 102"]
    assert len(load_stream([str(tmp_path / "d")], chat, held_out=0)[1]) == 0


def test_held_out_share_splits_by_prompt(chat, tmp_path):
    """Without a test split: about the stated share (0.2 of 1000 prompts, 4 sigma = 0.05), no prompt
    on both sides, and the same prompts from a file in another order.
    """
    rows = [own(i) for i in range(1000)] + [own(i, chosen="other") for i in range(1000)]
    train, held = load_stream([str(write(tmp_path / "a.jsonl", rows))], chat, held_out=0.2)
    inside, outside = set(prompts(train, chat)), set(prompts(held, chat))
    assert not inside & outside and len(inside | outside) == 1000 and abs(len(outside) - 200) < 50
    _, again = load_stream([str(write(tmp_path / "b.jsonl", rows[::-1]))], chat, held_out=0.2)
    assert set(prompts(again, chat)) == outside


@pytest.mark.parametrize(
    "source, words",
    [
        ("", "NAME"),
        ("missing.jsonl", "existing file or folder"),
        ("./no/folder", "existing file or folder"),
        ("{}/empty", "no data file"),
        ("{}/notes.pdf", ".jsonl, .json .* or .txt, without a split"),
        ("{}/a.jsonl:train", "without a split"),
        ("{}/a.jsonl[5:5]", "rows to train on"),
        ("{}/a.jsonl[:120%]", "existing file or folder"),
        ("{}/two", "must name a split"),
    ],
)
def test_unfit_sources_are_refused(source, words, chat, tmp_path, monkeypatch):
    """A source that is missing, empty, no data or ambiguous: one ValueError that says what it
    wants.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pdf").write_text("x")
    write(tmp_path / "a.jsonl", [own(1)])
    write(tmp_path / "two" / "one.jsonl", [own(1)])
    write(tmp_path / "two" / "another.jsonl", [own(1)])
    with pytest.raises(ValueError, match=words):
        load_stream([source.format(tmp_path)], chat)


HUB_SCRIPT = """
import sys
from support.chat import Chat
from data import load_stream
chat = Chat(sys.argv[1])
for source in sys.argv[2:]:
    try:
        train, held = load_stream([source], chat)
        print(len(train), len(held), train.fingerprint)
    except ValueError as error:
        print("ValueError", error)
"""


@pytest.mark.slow  # a fresh process for each state of the hub
def test_hub_data_set_with_revision_cache_and_offline_mode(chat, hub, mistral_tokenizer):
    """A data set of a local server that answers like the hub: only the split's files are fetched,
    once; the second time and offline they come from huggingface_hub's cache; unknown names and
    revisions are one ValueError, and so is a private set without a token. The oracle: its rows.
    """
    for name in ("set", "secret"):
        folder = hub.root / "datasets/owner" / name
        write(folder / "data" / "train_prefs-00000-of-00001.parquet", [own(i) for i in range(6)])
        write(folder / "data" / "test_prefs-00000-of-00001.parquet", [own(i) for i in range(6, 9)])
        write(folder / "data" / "train_gen-00000-of-00001.parquet", [own(9)])
        (folder / "README.md").write_text("# a data set")
    hub.private.add("owner/secret")

    def run(*sources: str, **environment: str) -> list[str]:
        return hub.run(HUB_SCRIPT, mistral_tokenizer, *sources, **environment).split("\n")

    half = "owner/set@v1:train_prefs[:50%]"
    first, *unknown = run(half, "owner/none", "owner/set@v9", "owner/secret:train_prefs")
    assert first.startswith("3 3 ")
    files = ["data/test_prefs-00000-of-00001.parquet", "data/train_prefs-00000-of-00001.parquet"]
    assert hub.downloads() == files
    for line, name in zip(unknown, ("owner/none", "owner/set@v9", "owner/secret"), strict=True):
        assert line.startswith(
            f"ValueError {name} must be a local path or a hub dataset within reach"
        )
    offline, other = run(half, "owner/other", HF_HUB_OFFLINE="1")
    assert hub.downloads() == []
    assert offline == first and other.startswith("ValueError owner/other must be")
    again, secret = run(half, "owner/secret:train_prefs", HF_TOKEN=hub.TOKEN)
    assert again == first and secret.startswith("6 3 ")
    assert hub.downloads() == files  # the private set's


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "row, words",
    [
        (own(chosen_safe="yes"), "chosen_safe must be true or false, got 'yes'"),
        (own(chosen_safe=None), "chosen_safe must be"),
        (own(rejected_safe=float("nan")), "rejected_safe must be .* got nan"),
        (own(rejected_safe=2), "rejected_safe must be"),
        ({k: v for k, v in own().items() if k != "chosen"}, "chosen is missing"),
        (own(prompt=5), "prompt must be text"),
        (own(chosen=["a"]), "chosen must be a list of"),
        (own(chosen=talk("q", "a")), "rejected must be a list of"),
        (own(prompt=None), "prompt must be text"),
        (own(prompt=[]), "prompt must be a list"),
        (own(prompt=talk("q", "a")), "must end with a user's turn"),
        (own(prompt=[{"role": "robot", "content": "q"}]), "role must be"),
        (own(prompt=[{"role": "user"}]), "content is missing"),
        (own(prompt=["q"]), "prompt must be a list"),
        (own(chosen="\ud800"), "surrogates"),
        (b'{"prompt": "\xff"}', "must be JSON in UTF-8: .*0xff in position 12"),
        (b"{", "must be JSON"),
        (b"[1]", r"must be an object, got \[1\]"),
        (b"null", "must be an object"),
        (b"[" * 100_000, "must be JSON"),
        (b"NaN", "must be an object"),
    ],
)
def test_malformed_rows_are_named(row, words, chat, tmp_path):
    """Each way to break a row: file:line, the field, what it must be and what it is.

    The bad row is on line 3.
    """
    lines = [
        json.dumps(own(1)).encode(),
        b"",
        row if isinstance(row, bytes) else json.dumps(row).encode(),
        json.dumps(own(2)).encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(
        ValueError, match=rf"malformed rows: 1; the first ones:\n.*/a\.jsonl:3: .*{words}"
    ):
        load_stream([str(tmp_path / "a.jsonl")], chat)


@pytest.mark.parametrize(
    "row, words",
    [
        (pku(better=2), "better_response_id must be 0 or 1, got 2"),
        (pku(safer=True), "safer_response_id must be 0 or 1, got True"),
        (pku(safer="0"), "safer_response_id"),
        (pku(better=-1), "better_response_id"),
        (pku(better=None), "better_response_id"),
        (pku(safe=(True, "no")), "is_response_1_safe"),
        (
            {
                "prompt": "q",
                "modeloutput1": "a",
                "modeloutput2": "b",
                "better_modelout": 0,
                "is_modelout1_safe": True,
                "is_modelout2_safe": True,
            },
            "better_modelout must be 1 or 2, got 0",
        ),
        (
            {"chosen": talk("q", "a"), "rejected": talk("r", "b"), "score_chosen": 1},
            "one conversation",
        ),
        (
            {"chosen": talk("q", "a"), "rejected": talk("q", "b", "c"), "score_chosen": 1},
            "one conversation",
        ),
        ({"chosen": talk("q"), "rejected": talk("q"), "score_chosen": 1}, "one conversation"),
        (
            {
                "chosen": [*talk("q", "a"), *talk("", "b")[1:]],
                "rejected": [*talk("q", "a"), *talk("", "c")[1:]],
                "score_chosen": 1,
            },
            "a.jsonl:1: the prompt must end with a user's turn, got assistant",
        ),
        (
            {
                "chosen": [{"role": "system", "content": "s"}, *talk("", "b")[1:]],
                "score_chosen": 1,
                "rejected": [{"role": "system", "content": "s"}, *talk("", "c")[1:]],
            },
            "must end with a user's turn, got system",
        ),
        ({"prompt": "q", "answer": "a"}, "known schema, got prompt, answer; known: PKU"),
        ({"messages": talk("q", "a")}, "known schema"),
    ],
)
def test_malformed_rows_of_public_schemas_are_named(row, words, chat, tmp_path):
    """Ids outside {0, 1} or {1, 2}, labels of the wrong type, conversations that differ, unknown
    columns; on row 1.
    """
    with pytest.raises(ValueError, match=words):
        load_stream([str(write(tmp_path / "a.jsonl", [row]))], chat)


def test_first_ten_malformed_rows_and_their_number(chat, tmp_path):
    """25 bad rows among good ones, in jsonl and parquet: ten places, in order, and the count;
    nothing is left in the cache.
    """
    rows = [own(i, chosen_safe=[True, False, None][i % 3]) for i in range(75)]
    for name, place in (("a.jsonl", "{}:{}: "), ("a.parquet", "{}: row {}: ")):
        path = write(tmp_path / name, rows)
        with pytest.raises(ValueError) as error:
            load_stream([str(path)], chat)
        head, *lines = str(error.value).split("\n")
        assert head == "malformed rows: 25; the first ones:"
        assert [line.split("chosen_safe")[0] for line in lines] == [
            place.format(path, i) for i in range(3, 33, 3)
        ]
    assert not [p for p in (tmp_path / "token cache").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.jsonl.xz", "a.json.gz"]
)
def test_truncated_and_damaged_files(name, chat, tmp_path):
    """Half of any file, its middle overwritten, or nothing at all: a ValueError with the file's
    name, never a traceback.
    """
    whole = write(
        tmp_path / name, [own(i, chosen=f"{i * 7919} " * 30) for i in range(300)]
    ).read_bytes()
    middle = len(whole) // 2
    for content in (
        whole[:middle],
        whole[:middle] + b"\0\xff" * 40 + whole[middle + 80 :],
        b"",
        whole[:4],
    ):
        (tmp_path / name).write_bytes(content)
        # A slice of what breaks off would be of a wrong total; single lines are rows or none.
        for suffix in ("",) if name in ("a.jsonl", "a.csv") else ("", "[:50%]", "[:2]"):
            with pytest.raises(ValueError, match=rf"{name}"):
                load_stream([f"{tmp_path / name}{suffix}"], chat)
    if name == "a.jsonl.gz":
        (tmp_path / name).write_bytes(whole[:middle])
        with pytest.raises(ValueError, match=r"after .*a\.jsonl\.gz:\d+ it is unreadable"):
            load_stream([f"{tmp_path / name}[:20%]"], chat)


def test_a_slice_asks_its_own_rows_to_be_whole(chat, tmp_path):
    """A row that cannot be read counts as one, and stops no slice without it; nor does a test split
    that breaks off and is not read.
    """
    folder = tmp_path / "d"
    path = write(folder / "train.jsonl", [own(i) for i in range(2)])
    path.write_text(path.read_text() + "{\n")
    whole = write(folder / "test.jsonl.gz", [own(i) for i in range(300)]).read_bytes()
    (folder / "test.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for suffix in ("[:2]", "[:67%]"):
        assert prompts(load_stream([f"{folder}{suffix}"], chat, held_out=0)[0], chat) == [
            "question 0",
            "question 1",
        ]
    with pytest.raises(ValueError, match=r"train\.jsonl:3: must be JSON"):
        load_stream([f"{folder}[1:]"], chat, held_out=0)
    with pytest.raises(ValueError, match=r"test\.jsonl\.gz must be a whole .gz file"):
        load_stream([f"{folder}[:2]"], chat)


def test_arrays_and_prompts(tmp_path):
    """Claim: a JSON array is read row by row, a broken one is named with the place of the fault;
    each line of a .txt is a prompt. Oracle: the rows.
    """
    path = tmp_path / "a.json"
    path.write_text(f"[\n {json.dumps(own(1))},\n {json.dumps(own(2))} , 5\n]\n")
    rows = list(read_rows(path))
    assert [row for _, row in rows[:2]] == [own(1), own(2)]
    assert str(rows[2][1]) == "a row must be an object, got 5" and rows[2][0] == f"{path}: row 3"
    path.write_text(f"[{json.dumps(own(1))}\n {json.dumps(own(2))}]")
    with pytest.raises(ValueError, match=r"a\.json must be .*delimiter: line 2 column 2"):
        list(read_rows(path))
    path.write_text(" [ ] ")
    assert not list(read_rows(path))
    (tmp_path / "a.txt").write_text("How?\n\n Why, then? \n")
    assert [row for _, row in read_rows(tmp_path / "a.txt")] == [
        {"text": "How?"},
        {"text": "Why, then?"},
    ]


def test_times_of_a_parquet_file_are_not_read(chat, tmp_path):
    """A column of times, which nothing asks for, does no harm: not nanoseconds, nor a year that
    Python has not.
    """
    rows = {key: [own(i)[key] for i in range(3)] for key in own()}
    times = {
        "made": pa.array([1, 2, 3], pa.timestamp("ns")),
        "seen": pa.array([2**62, 0, 0], pa.timestamp("us")),
    }
    pq.write_table(pa.table(rows | times), tmp_path / "a.parquet")
    assert prompts(load_stream([str(tmp_path / "a.parquet")], chat, held_out=0)[0], chat) == [
        f"question {i}" for i in range(3)
    ]


def test_fields_of_null_type_are_read(chat, tmp_path):
    """Claim: a parquet file in which a field within the turns, or a column, is None in every row is
    read whole, across its batches. Oracle: the rows that were written, by pyarrow and by datasets.
    """
    from datasets import Dataset

    turns = [turn | {"tool_calls": None, "parts": []} for turn in talk("q", "a")]
    rows = []
    for i in range(300):
        rejected = [turns[0], turns[1] | {"content": f"bad {i}"}]
        rows.append(
            {
                "chosen": turns,
                "rejected": rejected,
                "score_chosen": 2.0,
                "score_rejected": 1.0,
                "note": None,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "b.parquet"))
    for name in ("a.parquet", "b.parquet"):
        assert [row for _, row in read_rows(tmp_path / name)] == rows
        assert len(load_stream([str(tmp_path / name)], chat, held_out=0)[0]) == 300


def test_sft_loses_no_turn_to_the_template(mistral_tokenizer, tmp_path):
    """A conversation whose system turn the template writes before the last user's turn alone, as
    Mistral-7B-Instruct-v0.3's does, is a malformed row, not one without it; one that ends with a
    user's turn has nothing to compare with.
    """
    (tmp_path / "t.jinja").write_text(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop.last and system is defined %}{{ system + '\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    chat, turns = (
        Chat(mistral_tokenizer, str(tmp_path / "t.jinja")),
        [
            {"role": "system", "content": "Be brief."},
            *[{"role": role, "content": role} for role in ("user", "assistant") * 2],
        ],
    )
    for messages, words in (
        (turns, r"a\.jsonl:1: the chat template writes this prompt otherwise"),
        (turns[1:], ""),
        (turns[1:-1], ""),
    ):
        path = write(tmp_path / "a.jsonl", [{"messages": messages}])
        if words:
            with pytest.raises(ValueError, match=words):
                load_stream([str(path)], chat, stage="sft", max_length=99, held_out=0)
        else:
            stream, _ = load_stream([str(path)], chat, stage="sft", max_length=99, held_out=0)
            ([_, rest],) = chat.conversation_ids([chat.conversation_text(messages)])
            assert np.array_equal(stream.tree(0)[1], rest)


def test_pairs_that_are_equal_once_cut_are_dropped(chat, tmp_path):
    """Answers that differ beyond max_length alone have a margin of 0 for ever: they count as
    identical. Oracle: the rows.
    """
    long = "word " * 200
    path = write(
        tmp_path / "a.jsonl", [own(0), own(1, chosen=long + "a", rejected=long + "b"), own(2)]
    )
    train, _ = load_stream([str(path)], chat, max_length=60, max_prompt=30, held_out=0)
    assert (
        prompts(train, chat) == ["question 0", "question 2"]
        and train.report["sources"][0]["identical"] == 1
    )
    assert len(load_stream([str(path)], chat, max_length=2000, max_prompt=30, held_out=0)[0]) == 3


def test_unreadable_parquet_text(chat, tmp_path):
    """Bytes that are no UTF-8 in a parquet text column: the file and the row before its batch."""
    rows = {key: [own(i)[key] for i in range(3)] for key in own()}
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table(rows | {"chosen": raw}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet must be a whole .*from its start.*0xff"):
        load_stream([str(tmp_path / "a.parquet")], chat)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    field=st.sampled_from(sorted(own())),
    value=JSON,
    base=st.sampled_from([own(1), pku()]),
    stage=st.sampled_from(["pairs", "sft"]),
)
def test_any_value_in_any_field(chat, tmp_path, field, value, base, stage):
    """Hypothesis puts any JSON into a field: the row is read, counted as dropped, or named in a
    ValueError; none is lost.
    """
    path = write(tmp_path / "a.jsonl", [base, base | {field: value}])
    try:
        stream, _ = load_stream(
            [str(path)], chat, stage=stage, held_out=0, cache_dir=tmp_path / "fuzz"
        )
    except ValueError as error:
        assert "a.jsonl:2: " in str(error)
    else:
        (part,) = stream.report["sources"]
        assert (
            part["rows"] == 2 == len(stream) + part["empty"] + part["identical"]
            and len(stream) == part["training_rows"]
        )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.binary(max_size=300),
    name=st.sampled_from(["a.jsonl", "a.json", "a.parquet", "a.csv", "a.jsonl.gz", "a.json.xz"]),
)
def test_any_bytes(chat, tmp_path, content, name):
    """Hypothesis writes any bytes: always a ValueError that names the file (no row could be made of
    them).
    """
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_stream([str(tmp_path / name)], chat, cache_dir=tmp_path / "fuzz")


# ---------------------------------------------------------------------------------------------------------- cache


def test_cache_is_used_again_and_keyed_by_all_that_matters(chat, tmp_path, monkeypatch):
    """The second call builds nothing; a changed row, option, template or order of sources does:
    each fingerprint is new.
    """
    path, other = (
        write(tmp_path / "a.jsonl", [own(i) for i in range(9)]),
        write(tmp_path / "b.jsonl", [own(1)]),
    )
    built: list[Path] = []
    build = data.build
    monkeypatch.setattr(
        data, "build", lambda folder, **rest: (built.append(folder), build(folder, **rest))
    )
    (tmp_path / "t.jinja").write_text("{{ bos_token }}" + chat.template)
    plain = load_stream([str(path)], chat)[0]
    assert everything(load_stream([str(path)], chat)[0]) == everything(plain) and len(built) == 1
    variants = [
        {},
        {"max_length": 100, "max_prompt": 50},
        {"max_prompt": 100},
        {"prefer": "safe"},
        {"stage": "sft"},
        {"held_out": 0.3},
        {"labelled": True},
    ]
    prints = {load_stream([str(path)], chat, **variant)[0].fingerprint for variant in variants}
    prints |= {
        load_stream(sources, chat)[0].fingerprint
        for sources in ([str(path), str(other)], [str(other), str(path)])
    }
    prints.add(load_stream([f"{path}[:5]"], chat)[0].fingerprint)
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(chat.tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    assert (
        load_stream([str(path)], Chat(folder))[0].fingerprint == plain.fingerprint
    )  # the same tokenizer elsewhere
    prints.add(load_stream([str(path)], Chat(folder, str(tmp_path / "t.jinja")))[0].fingerprint)
    inside = write(tmp_path / "d" / "train.jsonl", [own(8)])
    prints.add(load_stream([str(inside.parent)], chat)[0].fingerprint)
    for file, source in ((path, path), (inside, inside.parent)):
        times = file.stat()
        file.write_bytes(file.read_bytes().replace(b"good 8", b"GOOD 8"))  # the same size and time
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        prints.add(load_stream([str(source)], chat)[0].fingerprint)
    assert len(prints) == len(built) == len(variants) + 7


PROCESS_SCRIPT = """
import os, sys, time
import data
build = data.build
def slow(folder, **rest):
    with open(sys.argv[3], "a") as log:
        print("start", os.getpid(), file=log, flush=True)
    build_items = data.read_items
    def items(*arguments):
        for item in build_items(*arguments):
            time.sleep(float(sys.argv[4]))
            yield item
    data.read_items = items
    build(folder, **rest)
data.build = slow
stream, _ = data.load_stream([sys.argv[2]], data.Chat(sys.argv[1]), held_out=0)
print(len(stream), stream.fingerprint, int(sum(p.sum() for p in stream.tree(len(stream) - 1))))
"""


def start(chat_folder: Path, path: Path, log: Path, pause: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS_SCRIPT, str(chat_folder), str(path), str(log), str(pause)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow  # half a minute: six processes
def test_four_processes_share_one_builder_and_a_kill_leaves_nothing(
    mistral_tokenizer, cache, tmp_path
):
    """A builder is killed (SIGKILL) in the middle while another waits: the waiter builds anew. Then
    four processes start at once: one builds for seconds, and all read the same stream. Each build
    writes a line.
    """
    path, log = write(tmp_path / "a.jsonl", [own(i) for i in range(40)]), tmp_path / "log"
    victim = start(mistral_tokenizer, path, log, 30)
    while not log.exists():
        time.sleep(0.05)
    waiter = start(mistral_tokenizer, path, log, 0)
    time.sleep(0.5)
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [
        ".partial"
    ] and waiter.poll() is None
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    out, errors = waiter.communicate(timeout=60)
    assert out.startswith("40 "), errors
    assert len(log.read_text().split("\n")) == 3 and [
        p.suffix for p in cache.iterdir() if p.is_dir()
    ] == [""]
    log.unlink()
    write(path, [own(i) for i in range(41)])
    four = [start(mistral_tokenizer, path, log, 0.1) for _ in range(4)]
    outputs = [process.communicate(timeout=120) for process in four]
    assert (
        len({out for out, _ in outputs}) == 1
        and outputs[0][0].startswith("41 ")
        and log.read_text().count("start") == 1
    ), outputs


@pytest.mark.parametrize("name", ["tokens", "rows.npy", "report.json", "sha256.json"])
def test_a_cut_or_lost_file_in_the_cache_is_noticed(name, chat, cache, tmp_path, capsys):
    """Any file of a cache cut short, in its middle or at its end, or gone: the cache is named and
    made again. Oracle: the stream before, what is printed.
    """
    path = write(tmp_path / "a.jsonl", [own(i) for i in range(40)])
    stream, _ = load_stream([str(path)], chat)
    before = everything(stream)
    folder = Path(stream.report["cache"]["folder"])
    whole = (folder / name).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-2], None):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        assert everything(load_stream([str(path)], chat)[0]) == before
        assert f"{folder} is damaged; making it again" in capsys.readouterr().err
        assert (folder / name).read_bytes() == whole
    load_stream([str(path)], chat)
    assert "damaged" not in capsys.readouterr().err


def test_data_folders_may_be_read_only_but_caches_may_not(chat, tmp_path, monkeypatch):
    """Nothing is written beside the data; a cache that cannot be made is a ValueError that names
    BFPO_CACHE.
    """
    path = write(tmp_path / "d" / "a.jsonl", [own(1)])
    before = sorted(path.parent.iterdir())
    load_stream([str(path)], chat)
    assert sorted(path.parent.iterdir()) == before
    monkeypatch.setenv("BFPO_CACHE", str(path / "below a file"))
    with pytest.raises(ValueError, match="BFPO_CACHE"):
        load_stream([str(path)], chat)


# --------------------------------------------------------------------------------------------------------- report


def test_report_counts_what_the_rows_hold(chat, tmp_path):
    """A file with known numbers of everything: the report has them; the text names the file, the
    schema, marks scored tokens.
    """
    rows = [
        own(0),
        own(1),
        own(2),
        own(3),
        own(4, chosen=""),
        own(5, rejected=" \n"),
        own(6, prompt="<|user|>", chosen="<|user|>", rejected="<|user|>"),  # identical
        own(7, prompt=" "),
        own(8, chosen="<|assistant|>\nhi", prompt="<|user|> x"),
    ]
    path = str(write(tmp_path / "a.jsonl", rows))
    train, _ = load_stream([path], chat, held_out=0, labelled=True)
    (part,) = train.report["sources"]
    assert part == {
        "source": str(tmp_path / "a.jsonl"),
        "schema": "bfpo",
        "rows": 9,
        "training_rows": 5,
        "held_out_rows": 0,
        "empty": 3,
        "identical": 1,
        "prompts_cut": 0,
        "answers_cut": 0,
        "quadrants": {BOTH: 1, CHOSEN: 2, REJECTED: 1, NEITHER: 1},
        "held_out_quadrants": dict.fromkeys(data.QUADRANTS, 0),
        "tokens": part["tokens"],
    }
    text = describe(train.report)
    assert (
        "[[good 0</s>]]" in text
        and "[[bad 0</s>]]" in text
        and "<|assistant|>\\n" in text
        and "bfpo, 9 rows" in text
    )
    assert str(tmp_path / "token cache") in text and "WARNING" not in text
    json.dumps(train.report)


def test_report_is_short_and_begins_with_what_is_lost(chat, tmp_path):
    """Claim: one source's report is under 20 lines however its first row is written, with dropped
    and cut in the second. Oracle: the text.
    """
    rows = [own(i, prompt=f"question {i}\n" * 50, chosen="line\n" * i) for i in range(9)]
    path = str(write(tmp_path / "a.jsonl", rows))
    stream, _ = load_stream([path], chat, held_out=0, max_length=90, max_prompt=60, labelled=True)
    lines = describe(stream.report).split("\n")
    assert len(lines) < 20 and max(map(len, lines)) < 500
    lost = "  dropped: 1 empty, 0 with identical answers; cut to length: 8 prompts, "
    assert lines[1].startswith(lost) and lines[1].endswith(" answers")


def test_report_gives_length_percentiles_by_source(chat, tmp_path):
    """Two sources of other lengths, rows held out in between: each one's percentiles are numpy's
    over its own training trees.
    """
    short, long = [own(i) for i in range(30)], [own(i, chosen="word " * i) for i in range(1, 31)]
    paths = [
        str(write(tmp_path / f"{name}.jsonl", rows))
        for name, rows in (("short", short), ("long", long))
    ]
    both, held = load_stream(paths, chat, held_out=0.2)
    assert len(held) > 2
    start = 0
    for part in both.report["sources"]:
        lengths = both.lengths[start : start + part["training_rows"]]
        start += len(lengths)
        for name, column in zip(
            ("prompt", "chosen", "rejected", "total"), (*lengths.T, lengths.sum(1)), strict=True
        ):
            assert part["tokens"][name] == {
                f"p{q}": int(np.percentile(column, q)) for q in (0, 10, 50, 90, 99, 100)
            }
    assert start == len(both) and describe(both.report).count(" total tokens") == 2
    parts = both.report["sources"]
    assert parts[0]["tokens"]["chosen"]["p100"] < 20 < parts[1]["tokens"]["chosen"]["p50"]


@pytest.mark.slow  # ten seconds of waiting
def test_tokenising_shows_the_time_left_on_a_terminal_alone(mistral_tokenizer, tmp_path):
    """On a terminal: rows done of all rows, the time left and rows/s, wiped at the end; into a
    file: nothing in a short run.
    """
    import pty
    import termios

    path = write(tmp_path / "a.jsonl", [own(i, chosen="word " * 300) for i in range(3000)])
    command = [sys.executable, "data.py", str(path), "--model", str(mistral_tokenizer)]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    shown = b""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # what the other end's closing is on Linux
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert process.returncode == 0 and re.search(
        rb"tokenising .*/3000 \[\d\d:\d\d<\d\d:\d\d, .*rows/s\]", shown
    ), shown[-500:]
    path.write_text("".join(json.dumps(own(i)) + "\n" for i in range(50)))
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).stderr == b""


def test_report_warns_of_one_quadrant(chat, tmp_path):
    """labelled=True and a source whose pairs are all in one quadrant: a warning that names both;
    without it, none.
    """
    path = write(tmp_path / "a.jsonl", [own(2), own(4), own(8)])
    reports = [
        describe(load_stream([str(path)], chat, held_out=0, labelled=labelled)[0].report)
        for labelled in (True, False)
    ]
    assert f"WARNING: every pair of {path}" in reports[0] and "WARNING" not in reports[1]


def test_report_names_quadrants_without_held_out_pairs(chat, tmp_path):
    """Claim: a quadrant that has training pairs and no held-out ones is named with the flag that
    holds out more, and no other is. Oracle: the labels of the held-out pairs.
    """
    rows = [own(i) for i in range(24)]
    path = str(write(tmp_path / "a.jsonl", rows))
    for share in (0.02, 0.1, 0.3, 0.7):
        train, held = load_stream([path], chat, held_out=share)
        missing = quadrants_of(train) - quadrants_of(held)
        unseen = [name for name in data.QUADRANTS if name in missing]
        words = f"no held-out pair is {' or '.join(unseen)}; a larger --held_out"
        assert (words in describe(train.report)) == bool(unseen)
        assert unseen or share > 0.1


def test_command_line(mistral_tokenizer, tmp_path, monkeypatch, capsys):
    """python data.py FILE --model DIR [--sft] prints the report; bad data: one line, exit code 1;
    usage: 2.
    """
    path = write(tmp_path / "a.jsonl", [own(i) for i in range(6)])

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
        data.main()
        return capsys.readouterr().out

    def refused(*arguments: str) -> object:
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        return stop.value.code

    model = ("--model", str(mistral_tokenizer))
    good = subprocess.run(
        [sys.executable, "data.py", str(path), *model],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert good.returncode == 0, good.stderr
    assert "6 rows read, 6 to train on" in good.stdout
    assert len(good.stdout.splitlines()) < 19
    assert "total tokens" in run(str(path), *model, "--sft")
    unlabelled = [
        {"chosen": talk(f"q {i}", "good"), "rejected": talk(f"q {i}", "bad"), "score_chosen": 2.0}
        for i in range(3)
    ]
    free = str(write(tmp_path / "no labels.jsonl", unlabelled))
    assert "pass the source as --helpfulness" in str(refused(free, *model))
    both = run(free, *model, "--helpfulness")
    assert "both_safe 3 (100.0%)" in both and "WARNING" not in both
    path.write_text("{}\n")
    assert str(refused(str(path), *model)).startswith(
        "error: "
    )  # sys.exit says it, and exits with 1
    assert refused(str(path)) == 2


def test_a_run_keeps_the_questions_that_it_was_trained_on(toys, tmp_path, capsys):
    """Claim: --held_out sets the share of a run, whose folder keeps the hashes of its training
    questions and of its starting model's; an evaluation warns with the count of a task's prompts
    among them. Oracle: the rows, and question_hash.
    """
    lines = (toys / "pku" / "train.jsonl").read_text().splitlines(keepends=True)
    questions = [json.loads(line)["prompt"] for line in lines]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(lines[:40]))
    two.write_text("".join(lines[40:80]))
    last = ("--steps", "2", "--held_out", "0.4")
    runs.run_here(runs.bfpo(toys, tmp_path / "1", "--safety", str(one), *last))
    model = str(tmp_path / "1" / "model")
    runs.run_here(runs.bfpo(toys, tmp_path / "2", "--safety", str(two), "--model", model, *last))
    train = {text for text in questions[:40] if data.question_hash(text) >= 0.4 * 2**64}
    later = {text for text in questions[40:80] if data.question_hash(text) >= 0.4 * 2**64}
    known = set(data.trained_questions(tmp_path / "1" / "model").tolist())
    assert known >= set(map(data.question_hash, train)) and len(train) < len(set(questions[:40]))
    assert not known & {data.question_hash(text) for text in set(questions[:40]) - train}
    both = data.trained_questions(tmp_path / "2" / "model").tolist()
    assert set(both) == known | set(map(data.question_hash, later))
    assert not len(data.trained_questions(toys / "start"))

    prompts = [*sorted(train)[:2], "a question of nobody's"]
    write(tmp_path / "x.jsonl", [{"prompt": text, "label": "safe"} for text in prompts])
    for folder, words in (("1", "was trained on 2 of the 3 prompts of xstest"), ("", "")):
        capsys.readouterr()
        policy = tmp_path / folder / "model" if folder else toys / "start"
        task = ("--tasks", f"xstest={tmp_path / 'x.jsonl'}", "--judge", "keyword")
        out = ("--out", str(tmp_path / f"eval{folder}"), "--device", "cpu")
        evaluation.main(["bench", "--model", str(policy), *task, *out])
        printed = capsys.readouterr().out
        assert words in printed and ("was trained on" in printed) == bool(words)


# ----------------------------------------------------------------------------------------------- batches and packs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 2**40))
def test_batches_are_an_endless_sequence_of_permutations(size, batch, seed):
    """Every `size` consecutive places hold each row once, for the first three epochs; any step
    alone gives the same rows.
    """
    steps = -(-3 * size // batch)
    batches = [batch_indices(size, batch, seed, step, "safety").tolist() for step in range(steps)]
    flat = [row for rows in batches for row in rows]
    assert all(sorted(flat[i * size : (i + 1) * size]) == list(range(size)) for i in range(3))
    data._permutation.cache_clear()
    assert batch_indices(size, batch, seed, steps - 1, "safety").tolist() == batches[-1]


def test_batches_depend_on_seed_name_and_epoch_alone():
    """Other seeds, streams and epochs give other orders; the numbers are pinned: they must outlive
    a change of numpy.
    """
    orders = {
        tuple(batch_indices(50, 50, seed, step, name))
        for seed in (0, 1)
        for step in (0, 1)
        for name in ("safety", "helpfulness")
    }
    assert len(orders) == 8
    assert batch_indices(10, 10, 42, 0, "safety").tolist() == [7, 5, 8, 0, 6, 4, 1, 2, 9, 3]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 6), st.integers(1, 60))
def test_deal_loses_nothing_and_keeps_the_budget(tokens, world_size, budget):
    """Every tree is in exactly one pack of one rank; a pack is within the budget or one tree alone;
    no pack is empty.
    """
    ranks = deal(tokens, world_size, budget)
    assert len(ranks) == world_size and sorted(
        i for packs in ranks for pack in packs for i in pack
    ) == list(range(len(tokens)))
    assert all(
        pack and (len(pack) == 1 or sum(tokens[i] for i in pack) <= budget)
        for packs in ranks
        for pack in packs
    )
    assert ranks == deal(tokens, world_size, budget)


def test_deal_evens_out_the_cost_of_ranks():
    """At paper scale (32 + 32 pairs a step, 4 ranks, log-normal lengths around 546 tokens, up to
    1536): under 5 % between ranks.
    """
    draw = np.random.default_rng(0)
    for _ in range(200):
        tokens = np.clip(draw.lognormal(6.1, 0.6, 64).astype(int), 40, 1536).tolist()
        ranks = deal(tokens, 4, 8192)
        costs = [sum(cost(tokens[item]) for pack in packs for item in pack) for packs in ranks]
        assert max(costs) / min(costs) - 1 < 0.05


def test_source_of_a_named_recipe():
    """The paper's sources are written in the grammar; nothing is fetched for a name that is no data
    set.
    """
    with pytest.raises(ValueError, match="existing file or folder, or a hub data set"):
        find_source("PKU-SafeRLHF@ff7ba91[:20%]", "pairs")
