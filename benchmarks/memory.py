"""The memory plan of a run beside the measured one: train.py in a process of its own, started as a
user starts it, its anonymous memory sampled from outside.

    python benchmarks/memory.py --write             # every model, 15 minutes on two cores; results.json
    python benchmarks/memory.py deep-all            # one of them

Measured is the most anonymous memory (RssAnon) from the plan's line to the end of the run: loading,
reference, steps, checkpoint and export. What the process held when it printed that line, before
anything is allocated, is subtracted: Python, torch and the data, 0.2 to 0.3 GiB. The plan counts
tensors, and an allowance for gaps between them on a CPU.

Of several processes it is the rank that holds most. weights_mib is what the whole model's weights
would take in the dtypes of the run.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import anonymous_mib, record

from model import Config, Mistral
from toy import language

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_S = 0.005


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how train.py is told to train it."""

    vocabulary: int
    width: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    pack_tokens: int
    flags: tuple[str, ...] = ()
    tied: bool = False
    processes: int = 1
    pairs: int = 2  # of a step

    def config(self) -> Config:
        return Config(
            self.vocabulary,
            self.width,
            self.feed_forward,
            self.layers,
            self.heads,
            self.key_heads,
            head_dim=self.width // self.heads,
            tie_word_embeddings=self.tied,
        )


ALL = ("--selective", "all")
BFLOAT16 = ("--dtype", "bfloat16")
RECOMPUTED = ("--checkpoint_blocks",)
WIDE = Case(4000, 1024, 3584, 4, 16, 4, 2000)
DEEP = Case(4000, 384, 1024, 24, 6, 6, 700)
VOCABULARY = Case(64000, 512, 1408, 4, 8, 2, 2000)
SMOLLM = Case(49152, 576, 1536, 30, 9, 3, 1536, tied=True)  # SmolLM2-135M
CASES = {
    "wide": WIDE,
    "wide-all-recomputed": dataclasses.replace(WIDE, pack_tokens=700, flags=ALL + RECOMPUTED),
    "wide-bfloat16": dataclasses.replace(WIDE, flags=BFLOAT16),
    "deep": DEEP,
    "deep-all": dataclasses.replace(DEEP, flags=ALL),
    "vocabulary": VOCABULARY,
    "vocabulary-all": dataclasses.replace(VOCABULARY, flags=ALL),
    "sharded": Case(4000, 768, 2048, 16, 12, 4, 500, flags=RECOMPUTED, processes=4, pairs=4),
    "smollm": SMOLLM,
    "smollm-bfloat16": dataclasses.replace(SMOLLM, flags=BFLOAT16),
}


def children(pid: int) -> list[int]:
    """The processes that this one started."""
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += [int(child) for child in (task / "children").read_text().split()]
    return pids


def prepare(folder: Path, config: Config, pairs: int) -> tuple[Path, Path]:
    """A random model and a file of pairs, whose prompts and answers have 100 to 200 words of the
    toy language.
    """
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(language.tokenizer_json(), encoding="utf-8")
    entries = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")
    model = Mistral(config)
    model.init_weights(0)
    model.save_pretrained(folder / "model", like=tokenizer)
    rng = random.Random(0)
    words = list(language.THINGS)
    lines = []
    for i in range(pairs):
        row: dict[str, Any] = {"chosen_safe": i % 2 == 0, "rejected_safe": i % 3 == 0}
        for key in ("prompt", "chosen", "rejected"):
            row[key] = " ".join(rng.choices(words, k=rng.randint(100, 200)))
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "model", folder / "pairs.jsonl"


def arguments(case: Case, folder: Path, steps: int) -> list[str]:
    """The command line of the run, with its model and data made in the folder."""
    model, data = prepare(folder, case.config(), case.pairs * steps)
    command = [sys.executable, "-u"]
    if case.processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(case.processes)]
    command += [str(ROOT / "train.py"), "redteam", *case.flags]
    settings = {
        "model": model,
        "safety": data,
        "device": "cpu",
        "batch": case.pairs,
        "steps": steps,
        "pack_tokens": case.pack_tokens,
        "max_length": 4096,
        "max_prompt": 2048,
        "out": folder / "run",
        "cache": folder / "cache",
        "log_every": 1,
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    return command


class Sampler(threading.Thread):
    """The most anonymous memory of a process over what it held at first, in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.idle_mib = anonymous_mib(pid)
        self.peak_mib = self.idle_mib
        self.start()

    def run(self) -> None:
        while held := anonymous_mib(self.pid):
            self.peak_mib = max(self.peak_mib, held)
            time.sleep(SAMPLE_S)


def measure(case: Case, steps: int = 2) -> dict[str, Any]:
    """{"plan_mib", "measured_mib", "weights_mib", "moment"} of a case.

    RuntimeError with the run's output when it fails.
    """
    samplers: list[Sampler] = []
    lines = []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.Popen(
            arguments(case, Path(folder), steps),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"OMP_NUM_THREADS": "1"},
            text=True,
        )
        assert run.stdout
        for line in run.stdout:
            lines.append(line)
            if line.startswith("plan:"):
                ranks = children(run.pid) if case.processes > 1 else [run.pid]
                samplers = [Sampler(pid) for pid in ranks]
        if run.wait():
            raise RuntimeError("".join(lines))
    text = "".join(lines)
    planned = re.search(r"([\d.]+) (?: in all| GiB|GiB).*at the fullest moment \((.*?)[;)]", text)
    assert planned, text
    weights = 0
    for name, shape in case.config().shapes().items():
        is_bfloat16 = case.flags == BFLOAT16 and "down_proj" not in name
        weights += math.prod(shape) * (2 if is_bfloat16 else 4)
    return {
        "plan_mib": float(planned[1]) * 1024,
        "measured_mib": max(sampler.peak_mib - sampler.idle_mib for sampler in samplers),
        "idle_mib": max(sampler.idle_mib for sampler in samplers),
        "weights_mib": weights / 2**20,
        "moment": planned[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(CASES)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {names}; default: all")
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    options = parser.parse_args()
    columns = f"{'plan MiB':>9} {'measured':>9} {'plan / measured':>15} {'weights':>9}"
    print(f"{'':20} {columns}  fullest moment")
    results = {}
    for name in options.cases or CASES:
        figures = measure(CASES[name])
        results[name] = figures
        plan, measured = figures["plan_mib"], figures["measured_mib"]
        print(
            f"{name:20} {plan:9.0f} {measured:9.0f} {plan / measured:15.2f} "
            f"{figures['weights_mib']:9.0f}  {figures['moment']}",
            flush=True,
        )
    if options.write:
        record("memory", {"cases": results})


if __name__ == "__main__":
    main()
