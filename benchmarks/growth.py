"""How the cost of a step grows: with the prompt's share of a pair, its length, the longest pair of
a batch, the pairs of a step, and processes. Ours beside TRL's DPOTrainer at its best settings, the
pairs of a step at once and one by one, as benchmarks/step.py sets them up: 4 M parameters, fp32,
one thread.

    python benchmarks/growth.py --write             # 18 minutes; results.json and figures/growth.png

Every point is one step of each side on the same pairs, after a warm-up; the references'
log-probabilities of ours and of TRL at once must agree on the last one. Time and memory come from
processes of their own: those of memory give freed memory back at once, so that a peak counts
tensors. Processes: ours under torchrun, 16 pairs a step, seconds on the clock and of all
processors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MALLOC, Stream, draw_lengths, pairs_of, record, write_model
from step import BEST, BY_ONE, LR, OURS, REFERENCE_AGREES, SIZES, Worker

from model import Config
from support import plots

FIGURE = Path(__file__).resolve().parent.parent / "figures" / "growth.png"
MODEL = SIZES["4M"]
SIDES = (OURS, BEST, BY_ONE)
SHARES = (10, 30, 50, 70, 90)  # per cent
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)  # tokens of prompt and both answers
LONGEST = (25, 40, 55, 70, 85)  # per cent
PAIRS = (1, 2, 4, 8, 16)
PROCESSES = (1, 2, 4)
LABELS = {
    "share": "prompt's share of a pair's 600 tokens, %",
    "length": "tokens of a pair",
    "longest": "longest pair's share of 2,400 tokens, %",
    "pairs": "pairs of a step",
    "processes": "processes, two cores",
}
Lengths = list[tuple[int, int, int]]


def pair_of(tokens: int, share: float) -> tuple[int, int, int]:
    """(prompt, chosen, rejected) of so many tokens in all."""
    answer = round(tokens * (1 - share) / 2)
    return tokens - 2 * answer, answer, answer


def series() -> dict[str, dict[int, Lengths]]:
    """Series -> its places -> the lengths of a step's pairs."""
    longest = {}
    for place in LONGEST:
        tokens = 2400 * place // 100
        longest[place] = [pair_of(n, 0.4) for n in (tokens, *[(2400 - tokens) // 3] * 3)]
    drawn = draw_lengths(np.random.default_rng(1), max(PAIRS))
    return {
        "share": {place: [pair_of(600, place / 100)] * 4 for place in SHARES},
        "length": {place: [pair_of(place, 0.4)] * 2 for place in LENGTHS},
        "longest": longest,
        "pairs": {place: [tuple(map(int, row)) for row in drawn[:place]] for place in PAIRS},  # type: ignore[misc]
    }


def conversations(points: dict[str, dict[int, Lengths]]) -> dict[int, list[tuple[str, int]]]:
    """Pairs of a step -> the (series, place) that have so many: what one process of each side can
    do in one run.
    """
    found: dict[int, list[tuple[str, int]]] = {}
    for name, places in points.items():
        for place, lengths in places.items():
            found.setdefault(len(lengths), []).append((name, place))
    return found


def measure(folder: Path, points: dict[str, dict[int, Lengths]]) -> list[dict[str, Any]]:
    """[{series, place, side, tokens, cpu_s of a pair, memory_mib}]."""
    found: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for batch, wanted in conversations(points).items():
        kinds = [f"{name} {place}" for name, place in wanted]
        lengths = [points[name][place] for name, place in wanted]
        planned = {
            kind: [pairs_of(rng, each, MODEL[0])] for kind, each in zip(kinds, lengths, strict=True)
        }
        planned["warm-up"] = [pairs_of(rng, lengths[0], MODEL[0])]
        (folder / "plan.json").write_text(json.dumps(planned), encoding="utf-8")
        answers: dict[str, list[dict[str, Any]]] = {}
        for environment in ({}, MALLOC):
            workers = {
                side: Worker(side, folder, "float32", ["warm-up", *kinds], environment)
                for side in SIDES
            }
            for worker in workers.values():
                worker.ask("step")
            for _ in kinds:
                for side, worker in workers.items():
                    answers.setdefault(f"{side} {'memory' if environment else 'time'}", []).append(
                        worker.ask("step")
                    )
            ours, theirs = (
                torch.tensor(workers[side].ask("reference")["logprobs"]) for side in (OURS, BEST)
            )
            torch.testing.assert_close(theirs, ours, rtol=REFERENCE_AGREES["float32"], atol=0)
            for worker in workers.values():
                worker.end()
        for side in SIDES:
            for i, (name, place) in enumerate(wanted):
                found.append(
                    {
                        "series": name,
                        "place": place,
                        "side": side,
                        "tokens": sum(map(sum, lengths[i])) / batch,
                        "cpu_s": answers[f"{side} time"][i]["cpu_s"] / batch,
                        "memory_mib": answers[f"{side} memory"][i]["memory_mib"],
                    }
                )
                print(
                    "{series:10} {place:6} {side:16} {tokens:7.0f} tokens a pair {cpu_s:8.3f} cpu_s a pair {memory_mib:8.0f} MiB".format(
                        **found[-1]
                    ),
                    flush=True,
                )
    return sorted(
        found,
        key=lambda point: (
            list(LABELS).index(point["series"]),
            SIDES.index(point["side"]),
            point["place"],
        ),
    )


def work(folder: Path, steps: int) -> None:
    """One rank of a sharded run: seconds a pair of the steps after the first, on the clock and of
    all ranks' processors.
    """
    import train
    from data import Rows
    from support import distributed

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    config = train.Config(
        recipe="bfpo",
        model=str(folder),
        safety=("planned",),
        objective="dpo",
        tau=0.1,
        batch=16,
        dtype="float32",
        lr=LR,
        pack_tokens=train.PACK_TOKENS["cpu"],
    )
    model, trained = train.build(config, folder / "model", world)
    rng = np.random.default_rng(0)
    stream: Any = Stream(pairs_of(rng, draw_lengths(rng, config.batch), MODEL[0]))
    rows = Rows({"safety": stream}, {"safety": torch.zeros(config.batch, 2)}, None)  # type: ignore[arg-type]  # what a row says: for errors
    optimizer = torch.optim.AdamW(trained.values(), lr=config.lr)
    for step in range(steps + 1):
        if step == 1:
            began, used = time.perf_counter(), time.process_time()
        train.forward_backward(model, config, rows, torch.arange(config.batch), world)
        train.gradient_norm(trained.values()).item()
        optimizer.step()
        optimizer.zero_grad()
    cost = torch.tensor([time.perf_counter() - began, time.process_time() - used])
    cpu_s = world.sum(cost.clone())[1].item()
    world.say(
        json.dumps(
            {"wall_s": cost[0].item() / steps / config.batch, "cpu_s": cpu_s / steps / config.batch}
        )
    )
    os._exit(0)


def sharded(folder: Path, processes: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        __file__,
        "--worker",
        str(folder),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode or not lines:
        raise SystemExit(run.stderr[-3000:])
    point = {"series": "processes", "place": processes, "side": OURS, **json.loads(lines[-1])}
    print(
        "processes  {place:6} {side:10} {wall_s:8.3f} s a pair, {cpu_s:8.3f} cpu_s a pair".format(
            **point
        ),
        flush=True,
    )
    return point


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Seconds of a pair above, memory below, over each series' places; processes: seconds of all
    processors, and on the clock.
    """
    labels = {
        name: words
        for name, words in LABELS.items()
        if any(point["series"] == name for point in points)
    }
    figure, panels = plots.canvas(3 * len(labels), 6, 2, len(labels))
    for column, (name, words) in enumerate(labels.items()):
        time_axes, memory_axes = panels[column], panels[column + len(labels)]
        for side, (color, marker, line, *_) in zip(SIDES, plots.LOOKS, strict=False):
            mine = [point for point in points if point["series"] == name and point["side"] == side]
            if not mine:  # processes: ours alone
                continue
            places = [point["place"] for point in mine]
            time_axes.plot(
                places,
                [point["cpu_s"] for point in mine],
                color=color,
                marker=marker,
                linestyle=line,
                label=side,
            )
            if name == "processes":
                clock = [point["wall_s"] for point in mine]
                time_axes.plot(
                    places, clock, color=plots.GREY, marker="v", linestyle=":", label="on the clock"
                )
            else:
                memory_axes.plot(
                    places,
                    [point["memory_mib"] for point in mine],
                    color=color,
                    marker=marker,
                    linestyle=line,
                    label=side,
                )
        shown = [time_axes] if name == "processes" else [time_axes, memory_axes]
        for axes in shown:
            axes.set(xlabel=words)
            if name in ("length", "pairs", "processes"):
                axes.set_xscale("log", base=2)
                axes.set_xticks(places, [str(place) for place in places])
            if name == "length":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
        time_axes.legend(frameon=False, fontsize=8)
    panels[0].set(ylabel="processor seconds a pair")
    panels[len(labels)].set(ylabel="peak memory over the model, MiB")
    panels[-1].set_visible("processes" not in labels)
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument(
        "--write", action="store_true", help="write the figures to results.json, and the picture"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker), 3)
        return
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        write_model(folder / "model", Config(*MODEL))
        points = measure(
            folder, {name: places for name, places in series().items() if name in options.series}
        )
        points += [sharded(folder, n) for n in PROCESSES] if "processes" in options.series else []
    if options.write:
        record("growth", {"threads": 1, "points": points})
        draw(points, FIGURE)


if __name__ == "__main__":
    main()
