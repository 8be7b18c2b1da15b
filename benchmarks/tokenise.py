"""Time and memory of tokenising preference pairs of real length: the first time, and when they are
in the cache; and rows/s beside datasets.map with transformers' tokenizer on the same rows.

    python benchmarks/tokenise.py --model DIR [--pairs 120000] [--peer_pairs 10000]

The pairs are synthetic, with UltraFeedback's and PKU-SafeRLHF's mean lengths together (about 213
prompt, 173 and 160 answer tokens with Mistral's tokenizer); lengths are log-normal. RssAnon is the
process's own memory: mapped files, which the system can drop at any time, do not count. The peer
gives the ids of the prompt and of both whole conversations, row by row as trainers commonly call
it, and in batches on as many processes as there are cores; first its ids are held against ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import anonymous_mib, record

from data import Stream, load_stream
from support.chat import Chat

MEAN_TOKENS = {
    "prompt": 180,
    "chosen": 172,
    "rejected": 159,
}  # the chat format adds 33 to a prompt, EOS 1 to an answer
SPREAD = 0.8  # sigma of log length


def write_pairs(path: Path, chat: Chat, pairs: int) -> None:
    """Texts of common words (one token each, nearly) with some punctuation, digits and non-Latin
    characters.
    """
    draw = np.random.default_rng(0)
    words = [
        word[1:]
        for word in sorted(chat.tokenizer.get_vocab())
        if word.startswith("▁") and word[1:].isalpha() and len(word) > 3
    ]
    words = np.array(words + [",", ".", "\n\n", "2024", "é漢", "(see", "it's"] * 200)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(pairs):
            lengths = {
                name: max(1, int(mean * draw.lognormal(-(SPREAD**2) / 2, SPREAD)))
                for name, mean in MEAN_TOKENS.items()
            }
            row = {name: " ".join(draw.choice(words, length)) for name, length in lengths.items()}
            print(
                json.dumps(
                    row | {"chosen_safe": bool(i % 2), "rejected_safe": bool(i % 3)},
                    ensure_ascii=False,
                ),
                file=file,
            )


def measured(name: str, pairs: int, work: Callable[[], Any], figures: dict[str, Any]) -> Any:
    """What work returns; prints its time, processor time in this process and peak RssAnon, and puts
    them into `figures`.
    """
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], anonymous_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begun, processor = time.perf_counter(), time.process_time()
    result = work()
    seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    stop.set()
    watcher.join()
    print(
        f"{name:<36} {seconds:8.2f} s {pairs / seconds:10.0f} rows/s; in this process {processor:.1f} s of processor,"
        f" peak {peak[0]:.0f} MiB RssAnon",
        flush=True,
    )
    figures[name] = {
        "rows": pairs,
        "wall_s": seconds,
        "rows_per_s": pairs / seconds,
        "cpu_s_in_this_process": processor,
        "memory_mib": peak[0],
    }
    return result


def conversations(
    tokenizer: Any, prompt: str, chosen: str, rejected: str
) -> list[list[dict[str, str]]]:
    question = [{"role": "user", "content": prompt}]
    return [
        question,
        *([*question, {"role": "assistant", "content": answer}] for answer in (chosen, rejected)),
    ]


def one_row(tokenizer: Any, row: dict[str, str]) -> dict[str, Any]:
    """For datasets.map: the ids of the prompt with the answer's header, and of the conversation
    with either answer.
    """
    every = conversations(tokenizer, row["prompt"], row["chosen"], row["rejected"])
    return {
        f"ids_{k}": tokenizer.apply_chat_template(
            turns, add_generation_prompt=k == 0, tokenize=True, return_dict=False
        )
        for k, turns in enumerate(every)
    }


def many_rows(tokenizer: Any, rows: dict[str, list[str]]) -> dict[str, Any]:
    every = itertools.chain(
        *(
            conversations(tokenizer, *row)
            for row in zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True)
        )
    )
    texts = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=len(turns) == 1, tokenize=False)
        for turns in every
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {f"ids_{k}": ids[k::3] for k in range(3)}


def peer(
    path: Path,
    model: str,
    chat: Chat,
    stream: Stream,
    pairs: int,
    cache: str,
    figures: dict[str, Any],
) -> None:
    """datasets.map on the first pairs of the file. Stops where its ids are not ours."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, chat_template=chat.template)
    rows = datasets.load_dataset(
        "json", data_files=str(path), split=f"train[:{pairs}]", cache_dir=cache
    )
    for i in range(min(200, pairs)):
        theirs, (prompt, *answers) = one_row(tokenizer, rows[i]), stream.tree(i)
        for answer, ids in zip(answers, (theirs["ids_1"], theirs["ids_2"]), strict=True):
            ours = np.concatenate([prompt, answer])[
                1:
            ].tolist()  # theirs have no BOS, and a newline after the last EOS
            if (
                ids[: len(ours)] != ours and max(len(prompt), len(answer)) < 512
            ):  # others may be cut
                sys.exit(f"row {i} has other ids in transformers")
    apply = partial(rows.map, remove_columns=rows.column_names, load_from_cache_file=False)
    measured("datasets.map, row by row", pairs, lambda: apply(partial(one_row, tokenizer)), figures)
    measured(
        f"datasets.map, batched, {os.cpu_count()} processes",
        pairs,
        lambda: apply(partial(many_rows, tokenizer), batched=True, num_proc=os.cpu_count()),
        figures,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder with tokenizer.json")
    parser.add_argument("--pairs", type=int, default=120_000)
    parser.add_argument(
        "--peer_pairs", type=int, default=0, help="rows for datasets.map; 0 leaves it out"
    )
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    flags = parser.parse_args()
    figures: dict[str, Any] = {}
    chat = Chat(flags.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_pairs(path, chat, flags.pairs)
        print(
            f"{flags.pairs} pairs, {path.stat().st_size / 2**20:.0f} MB of JSON lines, {anonymous_mib():.0f} MiB before",
            flush=True,
        )
        load = partial(load_stream, [str(path)], chat, held_out=0, cache_dir=Path(folder) / "cache")
        stream, _ = measured("ours, the first time", flags.pairs, load, figures)
        measured("ours, from the cache", flags.pairs, load, figures)
        if flags.peer_pairs:
            peer(
                path, flags.model, chat, stream, min(flags.peer_pairs, flags.pairs), folder, figures
            )
        means = stream.lengths.mean(axis=0)
        print(
            f"mean tokens: prompt {means[0]:.0f}, chosen {means[1]:.0f}, rejected {means[2]:.0f}, pair {means.sum():.0f};"
            f" cache {stream.report['cache']['bytes'] / 2**20:.0f} MB"
        )
    if flags.write:
        record(
            "tokenise",
            {"mean_tokens": means.tolist(), "cores": os.cpu_count(), "measured": figures},
        )


if __name__ == "__main__":
    main()
