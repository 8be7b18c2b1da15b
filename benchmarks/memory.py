"""The memory plan of a run beside the measured one: train.py in a process of its own, its anonymous
memory sampled from outside.

    python benchmarks/memory.py --write             # every model, 12 minutes on two cores; results.json
    python benchmarks/memory.py deep-all            # one of them

Measured is the most anonymous memory (RssAnon) from the plan's line to the end of the run over what
the process held when it printed that line, before anything is allocated: loading, reference, steps,
checkpoint and export. The plan counts tensors. glibc keeps freed memory unless told to give it
back, so the process runs with MALLOC_MMAP_THRESHOLD_ = MALLOC_TRIM_THRESHOLD_ = 65536 and
MALLOC_ARENA_MAX = 1: every tensor is then a mapping of its own. `--glibc` leaves glibc as it is,
which a user's run on a CPU does too.

Of several processes it is the rank that holds most; weights is what the whole model's weights would
take in the dtypes of the run.
"""

import argparse
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

from common import MALLOC, anonymous_mib, record

from model import Config, Mistral
from toy import language

ROOT = Path(__file__).resolve().parent.parent

# name: (vocabulary, width, feed-forward, layers, query heads, key heads), tokens of a pack, what
# else train.py is told. A name that ends in -of-4 runs on four processes.
CASES: dict[str, tuple[tuple[int, int, int, int, int, int], int, list[str]]] = {
    "wide": ((4000, 1024, 3584, 4, 16, 4), 2000, []),
    "wide-all-recomputed": (
        (4000, 1024, 3584, 4, 16, 4),
        1000,
        ["--selective", "all", "--checkpoint_blocks"],
    ),
    "deep": ((4000, 384, 1024, 24, 6, 6), 1000, []),
    "deep-all": ((4000, 384, 1024, 24, 6, 6), 1000, ["--selective", "all"]),
    "vocabulary": ((64000, 512, 1408, 4, 8, 2), 2000, []),
    "vocabulary-all": ((64000, 512, 1408, 4, 8, 2), 2000, ["--selective", "all"]),
    "sharded-of-4": ((4000, 768, 2048, 16, 12, 4), 500, ["--checkpoint_blocks"]),
    "wide-bfloat16": ((4000, 1024, 3584, 4, 16, 4), 2000, ["--dtype", "bfloat16"]),
}


def config_of(shape: tuple[int, int, int, int, int, int]) -> Config:
    return Config(*shape, head_dim=shape[1] // shape[4], sliding_window=None)


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def prepare(
    folder: Path, shape: tuple[int, int, int, int, int, int], pairs: int
) -> tuple[Path, Path]:
    """A random model and a file of pairs of 150-word prompts and answers, in the toy language's
    words.
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
    model = Mistral(config_of(shape))
    model.init_weights(0)
    model.save_pretrained(folder / "model", like=tokenizer)
    rng = random.Random(0)
    rows = [
        {
            key: " ".join(rng.choice(list(language.THINGS)) for _ in range(150))
            for key in ("prompt", "chosen", "rejected")
        }
        | {"chosen_safe": i % 2 == 0, "rejected_safe": i % 3 == 0}
        for i in range(pairs)
    ]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return folder / "model", folder / "pairs.jsonl"


def measure(name: str, glibc: bool = False, pairs: int = 4, steps: int = 2) -> dict[str, Any]:
    """{"plan_mib", "measured_mib", "moment"} of a case.

    RuntimeError with the run's output when it fails.
    """
    shape, pack_tokens, more = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = prepare(folder, shape, 2 * pairs)
        command = [
            sys.executable,
            "-u",
            str(ROOT / "train.py"),
            "redteam",
            "--model",
            str(model),
            "--safety",
            str(data),
            "--device",
            "cpu",
            "--batch",
            str(pairs),
            "--steps",
            str(steps),
            "--pack_tokens",
            str(pack_tokens),
            "--max_length",
            "4096",
            "--max_prompt",
            "2048",
            "--out",
            str(folder / "run"),
            "--cache",
            str(folder / "cache"),
            "--log_every",
            "1",
            *more,
        ]
        if name.endswith("-of-4"):
            command[1:2] = ["-u", "-m", "torch.distributed.run", "--nproc_per_node", "4"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if glibc else MALLOC)
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
        )
        idle: dict[int, float] = {}  # process -> what it held when the plan was printed
        peak: dict[int, float] = {}

        def sample() -> None:
            while run.poll() is None:
                for pid in list(idle):
                    peak[pid] = max(peak.get(pid, 0.0), anonymous_mib(pid))
                time.sleep(0.002)

        threading.Thread(target=sample, daemon=True).start()
        lines = []
        assert run.stdout
        for line in run.stdout:
            lines.append(line)
            if line.startswith("plan:"):
                ranks = children(run.pid) if name.endswith("-of-4") else [run.pid]
                idle |= {pid: anonymous_mib(pid) for pid in ranks}
        if run.wait():
            raise RuntimeError("".join(lines))
    planned = re.search(
        r"([\d.]+) (?: in all| GiB|GiB).*at the fullest moment \((.*?)[;)]", "".join(lines)
    )
    assert planned, lines
    weights = sum(
        math.prod(size) * (2 if "bfloat16" in more and "down_proj" not in tensor else 4)
        for tensor, size in config_of(shape).shapes().items()
    )
    return {
        "plan_mib": float(planned[1]) * 1024,
        "measured_mib": max(peak[pid] - idle[pid] for pid in idle),
        "weights_mib": weights / 2**20,
        "moment": planned[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all"
    )
    parser.add_argument("--glibc", action="store_true", help="leave glibc's thresholds as they are")
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    options = parser.parse_args()
    results = {}
    print(
        f"{'':20} {'plan MiB':>9} {'measured':>9} {'plan / measured':>15} {'weights':>9}  fullest moment"
    )
    for name in options.cases or CASES:
        results[name] = found = measure(name, options.glibc)
        ratio = found["plan_mib"] / found["measured_mib"]
        print(
            f"{name:20} {found['plan_mib']:9.0f} {found['measured_mib']:9.0f} {ratio:15.2f} "
            f"{found['weights_mib']:9.0f}  {found['moment']}",
            flush=True,
        )
    if options.write:
        record("memory", {"glibc": options.glibc, "cases": results})


if __name__ == "__main__":
    main()
