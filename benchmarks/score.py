"""Scoring the benchmark's choices beside lm-evaluation-harness: the same model, rows and thread,
task by task. Both start from the texts of a task's questions; their values are compared first.

    python benchmarks/score.py --model DIR truthfulqa_mc2=FILE bbq=FILE ethics_cm=FILE --write

Processor seconds of one thread, sides interleaved. lm-evaluation-harness gets the batch size that
is fastest for it on each task. Random weights take as long as trained ones; `--random` writes a
model of SmolLM2-135M's shape with the tokenizer in DIR, which may hold nothing else.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import record

from eval import choice_logprobs, encode_question
from model import Config, Mistral
from support import distributed
from support.chat import Chat
from tasks import questions
from tasks.judges import LanguageModel
from tasks.metrics import Question

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of each choice, in nats. The sides differ in the order of sums, and in bfloat16 in what is rounded.
TOLERANCE = {"float32": 1e-2, "bfloat16": 2.0}
BATCH_SIZES = (1, 8, 32)


def smollm2_shape(vocabulary: int) -> Config:
    """SmolLM2-135M's architecture with another vocabulary."""
    return Config(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        model_type="llama",
    )


def write_random(tokenizer: Path, folder: Path) -> Path:
    """A model folder with random weights and this tokenizer."""
    model = Mistral(smollm2_shape(Chat(tokenizer).vocabulary))
    model.init_weights(0)
    model.save_pretrained(folder, like=tokenizer)
    return folder


def their_logprobs(lm: Any, asked: Sequence[Question]) -> list[float]:
    """Of every choice of every question, by lm-evaluation-harness."""
    from lm_eval.api.instance import Instance

    requests = [request for question in asked for request in question.requests]
    instances = [Instance("loglikelihood", {}, request, 0) for request in requests]
    return [logprob for logprob, _ in lm.loglikelihood(instances, disable_tqdm=True)]


def our_logprobs(model: LanguageModel, asked: Sequence[Question]) -> list[float]:
    """The same, by eval.py."""
    longest = model.config.max_position_embeddings
    choices = [encode_question(model.chat, question, True, longest) for question in asked]
    return [value for row in choice_logprobs(model, choices) for value in row]


def timed(call: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """(processor seconds, what the call returns)"""
    start = time.process_time()
    values = call()
    return time.process_time() - start, values


def best_batch(lm: Any, asked: Sequence[Question]) -> int:
    """The batch size that is fastest for lm-evaluation-harness on these questions."""
    seconds = {}
    for size in BATCH_SIZES:
        lm.batch_size_per_gpu = size
        seconds[size], _ = timed(lambda: their_logprobs(lm, asked))
    return min(seconds, key=seconds.__getitem__)


def compare(model: LanguageModel, lm: Any, asked: Sequence[Question], options: Any) -> Any:
    """Seconds of both sides on a task's questions, round by round."""
    lm.batch_size_per_gpu = best_batch(lm, asked)
    theirs: list[float] = []
    ours: list[float] = []
    apart = 0.0
    for _ in range(options.rounds):
        seconds, expected = timed(lambda: their_logprobs(lm, asked))
        theirs.append(seconds)
        seconds, values = timed(lambda: our_logprobs(model, asked))
        ours.append(seconds)
        apart = max(abs(a - b) for a, b in zip(expected, values, strict=True))
    if apart > TOLERANCE[options.dtype]:
        raise SystemExit(f"the two sides must agree, but a choice is {apart:.3g} nats apart")
    return {
        "questions": len(asked),
        "choices": sum(len(question.choices) for question in asked),
        "most_nats_apart": apart,
        "batch_size": lm.batch_size_per_gpu,
        "lm_eval_s": theirs,
        "ours_s": ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", metavar="TASK=FILE")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--random", action="store_true", help="random weights, DIR's tokenizer")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--limit", type=int, default=0, help="questions of a task; 0 = all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    protocol = questions.PROTOCOLS["modern"]
    tables: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.model)
        if options.random:
            folder = write_random(folder, Path(scratch) / "model")
        model = LanguageModel(str(folder), world, dtype=DTYPES[options.dtype])
        lm = HFLM(pretrained=str(folder), device="cpu", dtype=options.dtype, add_bos_token=True)
        for entry in options.rows:
            name, _, file = entry.partition("=")
            found = questions.load(name, file, protocol, options.limit)
            tables[name] = compare(model, lm, [question for _, question in found], options)
            figures = tables[name]
            ratios = sorted(
                a / b for a, b in zip(figures["lm_eval_s"], figures["ours_s"], strict=True)
            )
            figures["times_faster"] = statistics.median(ratios)
            print(
                f"{name:24} {figures['choices']:5} choices  lm-eval "
                f"{statistics.median(figures['lm_eval_s']):7.2f} s (batch "
                f"{figures['batch_size']})  ours {statistics.median(figures['ours_s']):7.2f} s  "
                f"{figures['times_faster']:.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )
    theirs = sum(statistics.median(figures["lm_eval_s"]) for figures in tables.values())
    ours = sum(statistics.median(figures["ours_s"]) for figures in tables.values())
    print(f"all: {theirs / ours:.2f} times")
    if options.write:
        settings = {"dtype": options.dtype, "rounds": options.rounds, "random": options.random}
        record("score", {"settings": settings, "tasks": tables, "times_faster": theirs / ours})


if __name__ == "__main__":
    main()
