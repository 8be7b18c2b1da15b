"""What several benchmarks share: pairs of the public data's lengths, a random checkpoint, a
process's own memory, and where figures go.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Config, Mistral

RESULTS = Path(__file__).resolve().parent / "results.json"
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
)
# glibc gives freed memory back at once, each tensor over 64 kB being a mapping of its own, so that
# a peak counts tensors.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
# Tokens of prompts and answers: log-normal with these medians and sigma, drawn again until in
# range. Their means, 214 and 165, and the padding of random batches of 4 pairs, 1.42 (of sorted
# ones 1.13), are about those of the paper's two public sets (213, 173 and 160 tokens; 1.43 and
# 1.14).
PROMPT, ANSWER, SIGMA = (200, 100, 400), (165, 50, 350), 0.7

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def draw_lengths(rng: np.random.Generator, pairs: int) -> np.ndarray:
    """[pairs, 3] tokens of prompt, chosen, rejected."""
    columns = []
    for median, low, high in (PROMPT, ANSWER, ANSWER):
        drawn = np.exp(rng.normal(np.log(median), SIGMA, 20 * pairs + 100)).astype(int)
        columns.append(drawn[(drawn >= low) & (drawn <= high)][:pairs])
    return np.stack(columns, 1)


def pairs_of(
    rng: np.random.Generator, lengths: Sequence[Sequence[int]] | np.ndarray, vocabulary: int
) -> list[Pair]:
    """Random tokens of these lengths; the first three entries of a vocabulary are its control
    tokens.
    """
    return [tuple(rng.integers(3, vocabulary, int(n)).tolist() for n in row) for row in lengths]  # type: ignore[misc]


class Stream:
    """What train.py reads of a data.Stream, held in memory: all answers safe."""

    fingerprint = "benchmark"

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.trees = [[np.array(part) for part in pair] for pair in pairs]
        self.lengths = np.array([[len(part) for part in tree] for tree in self.trees]).reshape(
            -1, 3
        )
        self.chosen_safe = self.rejected_safe = np.ones(len(self.trees), dtype=bool)

    def __len__(self) -> int:
        return len(self.trees)

    def tree(self, i: int) -> list[np.ndarray]:
        return self.trees[i]


def write_model(folder: Path, config: Config) -> None:
    """A random fp32 checkpoint."""
    model = Mistral(dataclasses.replace(config, sliding_window=None))
    model.init_weights(0)
    for p in model.parameters():
        p.data.mul_(
            2 if p.dim() == 2 else 1
        )  # 0.02 leaves attention almost flat, and gradients blind to it
    model.save_pretrained(folder)


def parameters_of(config: Config) -> int:
    return sum(int(np.prod(shape)) for shape in config.shapes().values())


def anonymous_mib(pid: int | str = "self") -> float:
    """Memory of a process that no file backs (RssAnon); 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return int(text.split("RssAnon:")[1].split()[0]) / 1024 if "RssAnon:" in text else 0.0


def surroundings() -> dict[str, Any]:
    """Command, date, hardware and versions; libraries that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    hardware: dict[str, Any] = {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    command = " ".join(
        ["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *sys.argv[1:]]
    )
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "versions": versions,
    }


def record(name: str, figures: dict[str, Any]) -> None:
    """Puts figures, and where they were taken, under `name` in results.json, which is written aside
    and renamed.
    """
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    aside = RESULTS.with_suffix(".aside")
    entries = dict(sorted((known | {name: surroundings() | figures}).items()))
    aside.write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, RESULTS)


def record_part(name: str, kind: str, part: str, figures: dict[str, Any], **shared: Any) -> None:
    """Puts figures, with the command and date, under `part` of the `kind` that the entry `name`
    has. Other parts stay if they were taken on this hardware with these versions.
    """
    here = surroundings()
    before = (
        json.loads(RESULTS.read_text(encoding="utf-8")).get(name, {}) if RESULTS.exists() else {}
    )
    kept = (
        before.get(kind, {})
        if all(before.get(key) == here[key] for key in ("hardware", "versions"))
        else {}
    )
    record(
        name,
        shared | {kind: kept | {part: {key: here[key] for key in ("command", "date")} | figures}},
    )
