"""Where a training step's time goes on a CPU, against the least that its arithmetic takes: the
selective recipe, fp32, one thread.

    python benchmarks/where.py --write              # 2 minutes; results.json

The least is the step's matrix products alone, at their own shapes and packs, each timed by itself:
the forward of every linear layer, the backward to its input where anything trains below it, the
weight gradient of down_proj, and the head on the answers' rows. Beside it is what torch's profiler
finds in a whole step of train.py, part by part; rounds of both are interleaved, and the least time
of each counts.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Stream, draw_lengths, pairs_of, parameters_of, record, write_model
from step import LR, SIZES
from torch import Tensor

import train
from data import Rows, deal
from model import Config
from support import distributed

# What the profiler calls the outermost event of each part of a step.
PARTS = {
    "gate, up, SwiGLU and down_proj": ("SwiGLU", "SwiGLUBackward"),
    "q, k, v and o": ("aten::linear", "MmBackward0", "aten::mm"),
    "head on the answers' rows": ("RowLogProbs", "RowLogProbsBackward"),
    "attention, rotation included": ("BlockedAttention", "BlockedAttentionBackward"),
    "AdamW": ("Optimizer.step#AdamW.step",),
}


def products(config: Config, rows: int, scored: int) -> dict[str, list[tuple[int, int, int]]]:
    """Part -> (rows, in, out) of the matrix products of one pack's forward and backward, as many
    entries as there are products.
    """
    D, inner, K = config.hidden_size, config.intermediate_size, config.head_dim
    HK, GK, last = (
        config.num_attention_heads * K,
        config.num_key_value_heads * K,
        config.num_hidden_layers - 1,
    )
    attention: list[tuple[int, int, int]] = []
    feed_forward: list[tuple[int, int, int]] = []
    for layer in range(config.num_hidden_layers):
        queries = scored if layer == last else rows
        heads = [(queries, D, HK), (rows, D, GK), (rows, D, GK), (queries, HK, D)]
        gate_up_down = [(queries, D, inner), (queries, D, inner), (queries, inner, D)]
        for part, each in ((attention, heads), (feed_forward, gate_up_down)):
            part += each + [(n, b, a) for n, a, b in each] * (
                layer > 0
            )  # nothing trains below the first layer's down_proj
        feed_forward.append((D, queries, inner))  # down_proj's gradient
    head = [(scored, D, config.vocab_size), (scored, config.vocab_size, D)]
    return dict(zip(PARTS, (feed_forward, attention, head), strict=False))


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def bare(
    shapes: list[tuple[int, int, int]], operands: dict[tuple[int, int, int], tuple[Tensor, Tensor]]
) -> float:
    def multiply() -> None:
        for shape in shapes:
            F.linear(*operands[shape])

    return seconds(multiply)


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """Part -> seconds of a step: of its outermost events, with all that happens inside them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()  # the profiler's clock
        step()
        total = time.perf_counter() - began
    found = dict.fromkeys(PARTS, 0.0)
    part_of = {name: part for part, names in PARTS.items() for name in names}
    for event in profile.events() or ():
        above, inside = event.cpu_parent, False
        while above is not None:
            inside, above = inside or above.name in part_of, above.cpu_parent
        if event.name in part_of and not inside:
            found[part_of[event.name]] += event.cpu_time_total / 1e6
    return found | {"the rest: norms, residuals, sums, Python": total - sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="30M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world, architecture = (
        distributed.start("cpu"),
        Config(*SIZES[options.size], sliding_window=None),
    )
    rng = np.random.default_rng(0)
    stream: Any = Stream(pairs_of(rng, draw_lengths(rng, 4), architecture.vocab_size))
    budget = train.PACK_TOKENS["cpu"]
    with TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", architecture)
        config = train.Config(
            recipe="bfpo",
            model=folder,
            safety=("planned",),
            batch=len(stream),
            dtype="float32",
            pack_tokens=budget,
        )
        model, trained = train.build(config, Path(folder) / "model", world)
    rows = Rows({"safety": stream}, {"safety": torch.zeros(len(stream), 2)}, None)  # type: ignore[arg-type]  # what a row says: for errors
    optimizer = torch.optim.AdamW(trained.values(), lr=LR)

    def step() -> None:
        train.forward_backward(model, config, rows, torch.arange(len(stream)), world)
        train.gradient_norm(trained.values()).item()
        optimizer.step()
        optimizer.zero_grad()

    packs = deal(stream.lengths.sum(1).tolist(), 1, budget)[0]
    shapes: dict[str, list[tuple[int, int, int]]] = {}
    for pack in packs:
        sizes = stream.lengths[pack]
        for part, each in products(architecture, int(sizes.sum()), int(sizes[:, 1:].sum())).items():
            shapes.setdefault(part, []).extend(each)
    operands = {
        (n, a, b): (torch.randn(n, a), torch.randn(b, a))
        for each in shapes.values()
        for n, a, b in each
    }
    step()
    whole, parts, least = [], [], []
    for _ in range(options.rounds):
        whole.append(seconds(step))
        parts.append(profiled(step))
        least.append({part: bare(each, operands) for part, each in shapes.items()})
    # the profiler slows what it watches: its parts are scaled to the step without it
    best = min(parts, key=lambda each: sum(each.values()))
    scale = min(whole) / sum(best.values())
    table = {
        part: {
            "step_s": value * scale,
            "products_s": min(each.get(part, 0.0) for each in least),
            "gflop": sum(2 * n * a * b for n, a, b in shapes.get(part, ())) / 1e9,
        }
        for part, value in best.items()
    }
    total = {
        key: sum(row[key] for row in table.values()) for key in ("step_s", "products_s", "gflop")
    }
    print(
        f"{parameters_of(architecture) / 1e6:.1f} M parameters, {len(stream)} pairs, {int(stream.lengths.sum()):,} tokens in "
        f"{len(packs)} packs"
    )
    print(f"{'':50}{'GFLOP':>8}{'products alone, s':>20}{'in the step, s':>16}{'share':>8}")
    for part, row in [*table.items(), ("all", total)]:
        print(
            f"{part:50}{row['gflop']:8.1f}{row['products_s']:20.3f}{row['step_s']:16.3f}{row['step_s'] / total['step_s']:8.1%}"
        )
    print(
        f"the step takes {total['step_s'] / total['products_s']:.2f} times its products alone, which run at "
        f"{total['gflop'] / total['products_s']:.0f} GFLOP/s; under the profiler it is {1 / scale:.2f} times as long"
    )
    if options.write:
        record(
            "where",
            {
                "threads": 1,
                "size": options.size,
                "rounds": options.rounds,
                "parts": table,
                "all": total,
                "profiler": 1 / scale,
            },
        )


if __name__ == "__main__":
    main()
