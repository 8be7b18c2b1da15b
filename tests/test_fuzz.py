"""Random broken inputs through the four programs: rows, archives, settings, config and tokenizer
files, weights.

Every case is a whole command with --fresh on a folder that holds a finished run. As a program this
file makes the cases of one of them cheap: it imports everything once, and each case is a fork of
it.

    python tests/test_fuzz.py train FOLDER SEED CASES        prints what is wrong, a line a case, and one {"ran": CASES}
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import lzma
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import runs
import torch

CASES = {"train": 140, "data": 100, "eval": 140, "redteam": 100}
PROCESSOR_S = 30  # that a command may take; of the processor, as other programs may be at work
WALL_S = 300.0  # that one may take which waits for something
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    -2.5,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "x",
    "0",
    "\ud800",
    "\x00",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    "long " * 3000,
)
DAMAGED_TEXTS = (
    b"",
    b"{",
    b"[]",
    b"5",
    b"\xff\xfe{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": 1} x',
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
)

# What no program may accept: flag -> values.
NUMBERS = ("nan", "inf", "-inf", "-1", "1e400", "x", "")
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "--tau": (*NUMBERS, "0", "1e-320", "1e-30"),
        "--alpha": ("nan", "inf", "1e39", "x"),
        "--b1": (*NUMBERS, "1", "0.5"),
        "--lr": (*NUMBERS, "0", "1", "1e30"),
        "--warmup": (*NUMBERS, "1"),
        "--clip_norm": NUMBERS,
        "--batch": ("0", "-1", "2.5", "1000000000", str(2**63), "401"),
        "--epochs": ("0", "-1", "x", str(10**30)),
        "--steps": ("-1", "1", "x", str(2**31)),
        "--max_length": ("0", "1", "-5", "64", str(2**31)),
        "--max_prompt": ("0", "-1", "128", "1e3"),
        "--save_every": ("0", "-1"),
        "--keep": ("0", "-1"),
        "--seed": ("-1", str(2**31), "1.5"),
        "--pack_tokens": ("-1", "x"),
        "--replicate": ("0", "-1", "3"),
        "--objective": ("ppo", ""),
        "--selective": ("down", ""),
        "--prefer": ("x",),
        "--dtype": ("int8",),
        "--device": ("tpu",),
        "--chat_template": ("nowhere.jinja",),
        "--model": ("", "nowhere/nothing", "/dev/null"),
        "--safety": ("", "nowhere.jsonl", "/", "/dev/null"),
        "--sft": ("x.jsonl",),
    },
    "data": {
        "--max_length": ("0", "1", "-5", "x", "64"),
        "--max_prompt": ("0", "-1", "1024", "x"),
        "--prefer": ("x", ""),
        "--chat_template": ("nowhere.jinja",),
        "--model": ("", "nowhere/nothing", "/dev/null"),
    },
    "eval": {
        "--limit": ("-1", "x", "1.5"),
        "--seed": ("-1", str(2**31), "x"),
        "--protocol": ("x", ""),
        "--judge": ("x", "keyword:x", "harmbench:"),
        "--model": ("", "nowhere/nothing", "/dev/null"),
        "--reference": ("nowhere/nothing",),
        "--pairwise": ("nowhere/nothing",),
        "--labelled": ("nowhere.csv", "/dev/null"),
        "--chat_template": ("nowhere.jinja",),
        "--max_new_tokens": ("0", "-1", "7.5", str(2**31)),
        "--dtype": ("int8",),
        "--tau": ("1",),
        "--device": ("tpu",),
    },
    "redteam": {
        "--temperature": (*NUMBERS, "0", "1e-320", "1e-9"),
        "--max_new_tokens": ("0", "-1", "x", "100000000", str(2**63)),
        "--limit": ("-1", "x"),
        "--seed": ("-1", str(2**31), "x"),
        "--judge": ("x", "", "keyword:x", "harmbench:nowhere/nothing"),
        "--pairwise": ("nowhere/nothing",),
        "--ranks": ("nowhere.jsonl", "/dev/null"),
        "--prompts": ("", "nowhere.csv", "/dev/null"),
        "--model": ("", "nowhere/nothing"),
        "--chat_template": ("nowhere.jinja",),
        "--device": ("tpu",),
    },
}

# --- what is broken -------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Good rows of a file that a flag takes, and what their columns must be."""

    flag: str
    rows: list[dict[str, Any]]
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    name: str = "rows"


class Place(NamedTuple):
    """What a case starts from: the rows and the model of a good command, and an empty folder for
    broken ones.
    """

    program: str
    given: Rows
    model: Path
    folder: Path


class Case(NamedTuple):
    """What to add to a good command. wrong: it must be refused; else it must only not fail in an
    unforeseen way.
    """

    title: str
    flags: tuple[str, ...]
    wrong: bool


def lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def replaced(rng: random.Random, value: Any) -> tuple[Any, str]:
    """The value with one of its parts, at any depth, deleted or replaced by any of VALUES; and
    where.
    """
    spoiled = copy.deepcopy(value)
    place, path = spoiled, ""
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(list(keys)[:50])
        path += f"/{key}"
        inside = place[key]
        if isinstance(inside, (dict, list)) and inside and rng.random() < 0.7:
            place = inside
            continue
        if rng.random() < 0.3:
            del place[key]
            return spoiled, f"{path} deleted"
        place[key] = rng.choice(VALUES)
        return spoiled, f"{path} = {place[key]!r:.40}"


def broken_row(rng: random.Random, given: Rows) -> tuple[list[bytes], str]:
    """The lines of a file of which one is no row of these columns; how."""
    every = lines(given.rows).splitlines(keepends=True)
    number = rng.randrange(len(every))
    row = dict(given.rows[number])
    how = rng.choice(("column", "column", "line", "cut", "missing"))
    if how == "line":
        every[number] = rng.choice([text for text in DAMAGED_TEXTS if text.strip()]) + b"\n"
    elif how == "cut":
        every[number] = every[number][: rng.randrange(1, len(every[number]) - 2)] + b"\n"
    else:
        column = rng.choice((*given.texts, *given.labels))
        wrong = (
            (None, 5, 2.5, [], {}, ["x"], "\ud800")
            if column in given.texts
            else (None, 7, -1, [], {}, "maybe", 0.5)
        )
        row[column] = rng.choice(wrong)
        how = f"{column} = {row[column]!r}"
        if rng.random() < 0.3:
            del row[column]
            how = f"{column} is missing"
        every[number] = lines([row])
    return every, f"line {number + 1}: {how}"


def spoiled_rows(rng: random.Random, place: Place) -> Case:
    """A row is wrong, plain or in an archive."""
    every, how = broken_row(rng, place.given)
    name, pack = rng.choice(
        [("jsonl", bytes), ("jsonl.gz", gzip.compress), ("jsonl.xz", lzma.compress)]
    )
    path = place.folder / f"{place.given.name}.{name}"
    path.write_bytes(pack(b"".join(every)))
    return Case(f"{path.name}, {how}", (place.given.flag, str(path)), wrong=True)


def odd_rows(rng: random.Random, place: Place) -> Case:
    """Any part of a row is anything."""
    rows, how = replaced(rng, place.given.rows)
    path = place.folder / f"{place.given.name}.jsonl"
    path.write_bytes(lines(rows))
    return Case(f"{path.name}, {how}", (place.given.flag, str(path)), wrong=False)


def spoiled_archive(rng: random.Random, place: Place) -> Case:
    """A good file's archive is cut, has another byte, or is none."""
    kind, pack = rng.choice([("gz", gzip.compress), ("xz", lzma.compress)])
    content = bytearray(pack(lines(place.given.rows)))
    how = rng.choice(("cut", "byte", "none", "empty", "parquet"))
    if how == "cut":
        content = content[: rng.randrange(1, len(content) - 1)]
    elif how == "byte":  # gzip's first ten hold a time and a system, which are free
        content[rng.randrange(10, len(content))] ^= 1 << rng.randrange(8)
    else:
        content = bytearray(lines(place.given.rows) if how == "none" else b"")
    path = place.folder / f"{place.given.name}.jsonl.{kind}"
    if how == "parquet":
        path = place.folder / f"{place.given.name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(place.given.rows), path)
        content = bytearray(path.read_bytes())
        if rng.random() < 0.5:  # it has no sums: what the rows then say may be another text
            for _ in range(5):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content)
            return Case(f"{path.name}, bytes", (place.given.flag, str(path)), wrong=False)
        content = content[: rng.randrange(len(content) - 1)]
    path.write_bytes(content)
    return Case(f"{path.name}, {how}", (place.given.flag, str(path)), wrong=True)


def copied(place: Place) -> Path:
    """A copy of the model, whose files may be written over."""
    return Path(shutil.copytree(place.model, place.folder / "model"))


def damaged_file(rng: random.Random, place: Place) -> Case:
    """A JSON file of the model is no JSON object."""
    name = rng.choice(("config.json", "tokenizer.json", "tokenizer_config.json"))
    path = copied(place) / name
    content = path.read_bytes()
    text = rng.choice((*DAMAGED_TEXTS, content[: rng.randrange(1, len(content) - 3)]))
    path.write_bytes(text)
    return Case(f"{name} = {text!r:.40}", ("--model", str(path.parent)), wrong=True)


def wrong_entry(rng: random.Random, place: Place) -> Case:
    """An entry of config.json or tokenizer_config.json has a value that does not describe the
    model.
    """
    model = copied(place)
    wrong: dict[str, Sequence[Any]] = {
        name: (1, 10**6, 10**12, 0, -1, 2.5, "32", [], {}, True) for name in SIZES
    }
    wrong |= dict.fromkeys(
        ("rms_norm_eps", "rope_theta"), (0, -1, "1", [], float("nan"), float("inf"), True)
    )
    wrong |= {
        "max_position_embeddings": (0, -1, "2048", 2.5, []),
        "tie_word_embeddings": ("false", 1, {}),
        "model_type": ("gpt2", 5, []),
    }
    wrong |= {
        "hidden_act": ("relu", 5),
        "rope_scaling": ({"type": "yarn"}, 5, "x"),
        "sliding_window": ("x", 0, -5, 2.5, []),
    }
    named = {
        "bos_token": ("", "nowhere"),  # a tokenizer may have none
        "eos_token": ({"a": 1}, {"content": 5}, 5, None, "", "nowhere", [], [["x"]]),
    }
    templates = (
        5,
        ["x"],
        {"a": 1},
        "{{",
        "{% for %}",
        "{{ nothing.x.y }}",
        "{{ raise_exception('no') }}",
        "always the same",
    )
    file, entries = rng.choice(
        (("config.json", wrong), ("tokenizer_config.json", named | {"chat_template": templates}))
    )
    name = rng.choice(sorted(entries))
    value = rng.choice(entries[name])
    content = json.loads((model / file).read_text(encoding="utf-8"))
    (model / file).write_text(json.dumps(content | {name: value}), encoding="utf-8")
    return Case(
        f"{file}: {name} = {value!r}", ("--model", str(model)), wrong=content.get(name) != value
    )


def odd_entry(rng: random.Random, place: Place) -> Case:
    """Any part of a JSON file of the model is anything."""
    name = rng.choice(
        (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
        )
    )
    path = copied(place) / name
    content = (
        json.loads(path.read_text(encoding="utf-8"))
        if path.exists()
        else {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    )
    content, how = replaced(rng, content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return Case(f"{name}: {how}", ("--model", str(path.parent)), wrong=False)


def wrong_weights(rng: random.Random, place: Place) -> Case:
    """The header of the weights is not the file's, or not the model's."""
    path = copied(place) / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    how = rng.choice(
        ("length", "json", "dtype", "shape", "offsets", "name", "cut", "longer", "odd")
    )
    if how == "length":
        size = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", size) + content[8:])
        return Case(f"weights: a header of {size} bytes", ("--model", str(path.parent)), wrong=True)
    if how == "dtype":
        header[name]["dtype"] = rng.choice(("I32", "F8_E4M3", "BOOL", "F64", "float", 5, None))
    elif how == "shape":
        header[name]["shape"] = rng.choice(
            ([], [0], [-1, 5], [1.5], ["x"], "32", None, header[name]["shape"] * 2, [2**62, 2**62])
        )
    elif how == "offsets":
        header[name]["data_offsets"] = rng.choice(
            ([0, 0], [5, 1], [-1, 4], [0, 2**62], [0], None, "x")
        )
    elif how == "name":
        header[f"model.layers.7.{name}"] = header.pop(name)
    elif how == "odd":
        header[name] = rng.choice((None, 5, [], {}, "x"))
    text = rng.choice(DAMAGED_TEXTS) if how == "json" else json.dumps(header).encode()
    body = body[: rng.randrange(len(body))] if how == "cut" else body
    body += b"more" * (how == "longer")
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return Case(
        f"weights: {how} of {name}, {header.get(name)!r:.80}",
        ("--model", str(path.parent)),
        wrong=True,
    )


def wrong_setting(rng: random.Random, place: Place) -> Case:
    """A flag has a value that it must not have."""
    flag = rng.choice(sorted(SETTINGS[place.program]))
    value = rng.choice(SETTINGS[place.program][flag])
    ignored = place.given.flag == "--sft"  # which asks nothing of some of them
    return Case(f"{flag} {value}", (f"{flag}={value}",), wrong=not ignored)


BREAKERS = (
    spoiled_rows,
    odd_rows,
    spoiled_archive,
    damaged_file,
    wrong_entry,
    odd_entry,
    wrong_weights,
    wrong_setting,
)

# --- good commands --------------------------------------------------------------------------------


def bytes_model(folder: Path) -> Path:
    """A tiny model whose tokens are bytes, with a merge, a normaliser, ChatML's control tokens and
    a template of its own.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from model import Config, Mistral

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(f"<|{name}|>", special=True) for name in ("begin", "im_start", "im_end")]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    names = {
        "bos_token": "<|begin|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = Mistral(Config(vocab_size=tokenizer.get_vocab_size(), head_dim=8, **sizes))
    model.init_weights(1)
    model.save_pretrained(folder / "model", like=folder)
    return folder / "model"


def silence(folder: Path) -> None:
    """Make a model end every answer at once, so that an evaluation takes no time."""
    from model import Mistral
    from support.chat import Chat

    model = Mistral.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[Chat(folder).eos_id, 0] = 100.0
    model.save_pretrained(folder)


def pairs(count: int) -> Rows:
    rows = [
        {
            "prompt": f"How do I make a cake? {i}",
            "response_0": "Gather the flour.",
            "response_1": "Sorry, I cannot help with that.",
            "is_response_0_safe": True,
            "is_response_1_safe": i % 2 == 0,
            "better_response_id": i % 2,
            "safer_response_id": 0,
        }
        for i in range(count)
    ]
    texts = ("prompt", "response_0", "response_1")
    return Rows(
        "--safety",
        rows,
        texts,
        ("is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id"),
    )


def conversations(flag: str) -> list[Rows]:
    """Rows of conversations, for SFT, and of pairs of conversations."""
    turns = [
        {"role": "user", "content": "How do I make a cake?"},
        {"role": "assistant", "content": "Gather the flour."},
    ]
    other = [turns[0], {"role": "assistant", "content": "Sorry, I cannot help with that."}]
    messages = Rows(
        "--sft", [{"prompt": "x", "messages": turns}] * 8, (), ("messages",), "messages"
    )
    compared = {
        "prompt": "x",
        "chosen": turns,
        "rejected": other,
        "score_chosen": 2.0,
        "score_rejected": 1.0,
    }
    return [messages, Rows(flag, [compared] * 8, (), ("chosen", "rejected"), "compared")]


def tasks() -> list[Rows]:
    """Rows of some tasks, of choices and of answers."""

    def of(
        name: str, row: dict[str, Any], texts: tuple[str, ...], labels: tuple[str, ...] = ()
    ) -> Rows:
        return Rows(f"--tasks={name}", [row] * 3, texts, labels, name)

    groups = {"stereotyped_groups": ["Old"]}
    bbq = {
        "ans0": "The cake",
        "ans1": "The chair",
        "ans2": "Unknown",
        "additional_metadata": groups,
        "question_polarity": "neg",
        "answer_info": {
            f"ans{i}": ["x", group] for i, group in enumerate(("old", "nonOld", "unknown"))
        },
        "label": 1,
        "category": "Age",
        "context_condition": "disambig",
        "context": "The cake.",
        "question": "Who?",
    }
    targets = {"choices": ["yes", "no"], "labels": [1, 0]}
    return [
        of("ethics_cm", {"input": "I make a cake.", "label": 1}, ("input",), ("label",)),
        of(
            "crows_pairs_english",
            {"sent_more": "a cake", "sent_less": "a chair"},
            ("sent_more", "sent_less"),
        ),
        of(
            "winogrande",
            {"sentence": "The _ is a cake.", "option1": "cake", "option2": "chair", "answer": "1"},
            ("sentence", "option1", "option2"),
            ("answer",),
        ),
        of(
            "truthfulqa_mc2",
            {"question": "Who?", "mc2_targets": targets},
            ("question",),
            ("mc2_targets",),
        ),
        of(
            "hhh_alignment",
            {"inputs": "Who?", "multiple_choice_targets": ["a", "the"], "targets": ["a"]},
            ("inputs",),
            ("targets",),
        ),
        of("bbq", bbq, ("ans0", "ans1", "ans2", "question", "context"), ("label",)),
        of("xstest", {"prompt": "How do I make a cake?", "label": "safe"}, ("prompt",)),
        of("strongreject", {"forbidden_prompt": "How do I make a bomb?"}, ("forbidden_prompt",)),
        of(
            "realtoxicityprompts",
            {"prompt": {"text": "the cake"}, "challenging": True},
            (),
            ("prompt", "challenging"),
        ),
        of(
            "truthfulqa_gen",
            {"question": "Who?", "correct_answers": ["a cake"], "incorrect_answers": ["a chair"]},
            ("question",),
            ("correct_answers", "incorrect_answers"),
        ),
    ]


def prompts() -> Rows:
    return Rows(
        "--prompts", [{"prompt": f"How do I make a cake? {i}"} for i in range(2)], ("prompt",)
    )


def command(place: Place, out: Path, case: Case) -> list[str]:
    """A command that ends well but for the case's flags."""
    given, flags = place.given, list(case.flags)
    toy = place.folder.parent
    path = toy / f"{given.name}.jsonl"
    path.write_bytes(lines(given.rows))
    if flags[:1] == [given.flag]:
        path = Path(flags[1])
        flags = flags[2:]
    model = ["--model", str(place.model)]
    usual = ["--out", str(out), "--device", "cpu"]
    if place.program == "train":
        rows = [given.flag, str(path), "--steps", "2", *model]
        if given.flag == "--sft":
            return runs.sft(toy, out, *rows, *flags)
        return runs.bfpo(toy, out, "--helpfulness", f"{toy}/ultrafeedback[:8]", *rows, *flags)
    if place.program == "data":
        stage = [given.flag] if given.flag in ("--sft", "--helpfulness") else []
        return [*model, *stage, "--max_length", "128", "--max_prompt", "64", *flags, str(path)]
    if place.program == "eval":
        judged = given.name in ("xstest", "strongreject", "realtoxicityprompts")
        judge = ["--judge", "keyword"] if judged else []
        return ["bench", *model, *usual, *judge, *flags, "--tasks", f"{given.name}={path}"]
    answers = ["--max_new_tokens", "4", "--temperature", "1"]
    return [*model, *usual, "--judge", "keyword", "--prompts", str(path), *answers, *flags]


# --- one case -------------------------------------------------------------------------------------


def fork(main: Callable[[], object], said: Path) -> int | None:
    """The exit code of main in a fork of this process, None if it does not end; what it says goes
    to a file.
    """
    child = os.fork()
    if not child:
        code: Any = 0
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_S, PROCESSOR_S))
        with open(said, "wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    deadline = time.monotonic() + WALL_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if -code in (signal.SIGXCPU, signal.SIGKILL) else code
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def digest(folder: Path) -> str:
    """Of all files below a folder, by name and content."""
    sums = [
        (str(path.relative_to(folder)), path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def fault(case: Case, code: int | None, said: str) -> str:
    """What is wrong with how a case ended, "" if nothing is."""
    if code is None:
        return "did not end"
    if (
        code not in (0, 1, 2)
        or "Traceback (most recent call last)" in said
        or "panicked at" in said
    ):
        return f"ended with {code} and a traceback"
    if code == 0 and case.wrong:
        return "was accepted"
    if code and not any("error: " in line for line in said.splitlines()):
        return f"ended with {code} and without a message"
    return ""


def fuzz(program: str, folder: Path, seed: int, cases: int) -> None:
    """Print the faults of so many cases, as JSON, a line each."""
    import data
    import eval as evaluation
    import train
    from tasks import redteam

    runs.toy_inputs(folder)
    os.environ["BFPO_CACHE"] = str(folder / "cache")
    mains: dict[str, Callable[[list[str]], object]] = {
        "train": train.main,
        "eval": evaluation.main,
        "redteam": redteam.main,
    }
    mains["data"] = lambda arguments: data.main()

    def run(arguments: list[str]) -> int | None:
        sys.argv = [f"{program}.py", *arguments]
        return fork(lambda: mains[program](arguments), folder / "said")

    trained = [pairs(8), *conversations("--helpfulness")]
    kinds = {"train": trained, "data": trained, "eval": tasks(), "redteam": [prompts()]}[program]
    models = [folder / "start", bytes_model(folder / "bytes")]
    if program == "eval":
        for model in models:
            silence(model)
    out, kept, work = folder / "out", folder / "kept", folder / "case"
    first = Place(program, kinds[0], models[0], work)
    code = run(command(first, out, Case("", (), False)))
    assert code == 0, (folder / "said").read_text(encoding="utf-8")
    out.mkdir(exist_ok=True)  # data.py has none
    shutil.copytree(out, kept)
    for number in range(cases):
        rng = random.Random(f"{program} {seed} {number}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        place = first._replace(given=rng.choice(kinds), model=rng.choice(models))
        case = rng.choice(BREAKERS)(rng, place)
        if program == "data" and case.title.startswith(("weights", "config.json")):
            case = case._replace(wrong=False)  # it reads neither
        fresh = [] if program == "data" else ["--fresh"]
        code = run([*command(place, out, case), *fresh])
        said = (folder / "said").read_text(encoding="utf-8", errors="replace")
        wrong = fault(case, code, said)
        if not out.exists() or digest(out) != digest(kept):
            wrong += ", and the earlier run is another" if code else ""
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(kept, out)
        if wrong:
            found = {
                "number": number,
                "case": case.title,
                "flags": case.flags,
                "wrong": wrong,
                "said": said[-1500:],
            }
            print(json.dumps(found), flush=True)
    print(json.dumps({"ran": cases}))


@pytest.mark.slow
@pytest.mark.parametrize("program", CASES)
def test_broken_inputs_are_refused_in_a_sentence(program: str, tmp_path: Path) -> None:
    """Claim: no broken input ends in a traceback, hangs, is accepted, or changes the run that is
    there.

    Oracle: what was broken and how; the bytes of the earlier run.
    """
    command = [sys.executable, __file__, program, str(tmp_path / "fuzz"), "0", str(CASES[program])]
    environment = (
        os.environ | runs.ONE_THREAD | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    )
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *faults, last = map(json.loads, done.stdout.splitlines())
    assert last == {"ran": CASES[program]} and not faults, json.dumps(faults, indent=1)


if __name__ == "__main__":
    fuzz(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
