"""One training step of the selective recipe: this project beside TRL's DPOTrainer on the same
checkpoint, pairs, precision and threads.

    python benchmarks/step.py --write               # every run, an hour; results.json
    python benchmarks/step.py --runs 4M-float32     # one of them

Both sides run their own training loop, data to optimizer, each in a process of its own that waits
between steps: a round is a few steps of one side after another's, on the same pairs, with one
thread. The loss is DPO's (sigmoid), which both have on summed log-probabilities; only down_proj
trains. Before anything is timed the sides' gradients must agree, and so must their references'
log-probabilities.

    ours                  train.optimize, as a run of train.py calls it: the reference cached, a few pairs in a pack
    ours, one pack        --pack_tokens 8192: the step's pairs in one pack
    TRL default           DPOConfig's defaults but for the precision: live reference, gradient checkpointing, every row through the head;
                          of 8 pairs a step in the run that is named after them, else of 4
    TRL best              the reference cached, no checkpointing, and only the answers' rows through the head, as TRL does on a GPU
    TRL best, by one      the same, a pair at a time with gradient accumulation: little padding, at no cost on a CPU

"grouped" rows have batches of pairs of like length, as transformers' length-grouped sampler makes
them. "+ reference" adds one forward of the reference to a step, which a run of one epoch pays even
where it is cached. In bfloat16 ours keeps frozen weights in bfloat16 and trained ones in fp32; TRL
default is autocast over fp32 weights, its own default; TRL best has its weights as ours does.

Memory is a process's most anonymous memory during a step over what it held with the policy loaded:
gradients, optimizer, activations, and the live reference where there is one. memory_mib is what a
user sees, glibc keeping what is freed for later. tensors_mib is one step more in processes that
give freed memory back at once (glibc's thresholds at 64 kB), so that it counts tensors.
"""

import argparse
import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from common import (
    MALLOC,
    Pair,
    Stream,
    anonymous_mib,
    draw_lengths,
    pairs_of,
    parameters_of,
    record_part,
    write_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import Config

# Shapes in a 7B's proportions (feed-forward 3.5 times the width, four query heads a key head; the
# head is 4 % of the body, there 2 %): vocabulary, width, feed-forward, layers, query heads, key
# heads, head size.
SIZES = {"30M": (2000, 512, 1792, 8, 8, 2, 64), "4M": (500, 256, 896, 4, 4, 1, 64)}
OURS, WHOLE, DEFAULT, BEST, BY_ONE = (
    "ours",
    "ours, one pack",
    "TRL default",
    "TRL best",
    "TRL best, by one",
)
# Size and precision -> pairs of a step, and the sides. The authors' launch gives a GPU 4 pairs at a
# time; TRL's default is 8.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "30M-float32": (4, (OURS, WHOLE, DEFAULT, BEST, BY_ONE)),
    "30M-float32-8pairs": (8, (OURS, DEFAULT, BEST)),
    "4M-float32": (4, (OURS, DEFAULT, BEST)),
    "4M-bfloat16": (4, (OURS, DEFAULT, BEST)),
}
BETA = 0.1
LR = 1e-9  # an optimizer's step costs the same at any rate; at this one the policy stays the reference, which is checked after a step
# Largest relative error of a gradient tensor. fp32: rounding in sums of thousands of terms leaves
# 1e-6 to 1e-5; one token lost or counted twice, 1e-3. bfloat16, each side against ours in fp32: 8
# bits of mantissa in every layer leave a few percent.
AGREE = {"float32": 1e-4, "bfloat16": 0.1}
REFERENCE_AGREES = {"float32": 1e-5, "bfloat16": 1e-2}  # relative, of sums over hundreds of tokens
POOL = 200  # pairs that are sorted by length for the grouped rows
# Of random batches, over 20,000 of them: padded tokens over real ones by the pairs of a batch, and
# tokens of two rows a pair over those of its tree. A few batches scatter by 5 %, and the ratios
# with them, so they are drawn again until both means are these to 1 %.
PADDING, SHARING = {4: 1.42, 8: 1.54}, 1.39

Figures = dict[str, float]


def plan(rounds: int, batch: int, vocabulary: int) -> dict[str, list[list[Pair]]]:
    """The steps' pairs by kind: one warm-up, and for every round a random batch and a grouped one.

    A grouped batch is one of those that sorting POOL pairs by their longer sequence gives; the
    rounds take them evenly over the range.
    """
    rng = np.random.default_rng(0)
    pool = draw_lengths(rng, POOL)
    pool = pool[np.argsort(pool[:, 0] + pool[:, 1:].max(1), kind="stable")]
    firsts = [int((i + 0.5) / rounds * POOL) // batch * batch for i in range(rounds)]
    drawn = [draw_lengths(rng, batch) for _ in range(rounds)]
    while rounds > 1 and not typical(drawn):
        drawn = [draw_lengths(rng, batch) for _ in range(rounds)]
    lengths = {
        "warm-up": [draw_lengths(rng, batch)],
        "random": drawn,
        "grouped": [pool[first : first + batch] for first in firsts],
    }
    return {
        kind: [pairs_of(rng, each, vocabulary) for each in batches]
        for kind, batches in lengths.items()
    }


def padding(lengths: np.ndarray) -> float:
    """Tokens of the padded batch of prompt + answer rows, over those that are not padding; lengths
    [pairs, 3].
    """
    rows = lengths[:, :1] + lengths[:, 1:]
    return float(rows.max() * rows.size / rows.sum())


def typical(batches: list[np.ndarray]) -> bool:
    """Whether these batches pad, and share prompts, as random ones do on average."""
    lengths = np.concatenate(batches)
    sharing = (lengths.sum() + lengths[:, 0].sum()) / lengths.sum()
    pads = float(np.mean([padding(each) for each in batches]))
    return abs(pads / PADDING[len(batches[0])] - 1) < 0.01 and abs(sharing / SHARING - 1) < 0.01


def lengths_of(pairs: list[Pair]) -> np.ndarray:
    return np.array([[len(part) for part in pair] for pair in pairs])


# --- the two sides, each in its own process -------------------------------------------------------


class Turn:
    """A worker's side of the conversation: it waits between steps, and says what the last one cost."""

    def __init__(self, channel: IO[str], reference: Callable[[], Tensor]) -> None:
        self.channel, self.reference = channel, reference

    def say(self, **figures: Any) -> None:
        print(json.dumps(figures), file=self.channel, flush=True)

    def wait(self) -> None:
        """Until the next step is asked for; the reference of the last step's pairs is computed on
        the way.
        """
        for command in sys.stdin:
            self.begun = time.process_time(), time.perf_counter()
            if command.strip() == "step":
                return
            logprobs = self.reference().flatten().tolist()
            self.say(**self.cost(), logprobs=logprobs)
        os._exit(0)  # nothing more is asked

    def cost(self) -> Figures:
        return {
            "cpu_s": time.process_time() - self.begun[0],
            "wall_s": time.perf_counter() - self.begun[1],
        }

    def stepped(self) -> None:
        self.say(**self.cost())
        self.wait()


def serve_ours(
    side: str, folder: Path, dtype: str, steps: list[list[Pair]], channel: IO[str]
) -> None:
    """train.optimize, as a run of train.py calls it."""
    import train
    from data import Rows, batch_indices, score
    from support import distributed
    from support.storage import RunFolder

    world = distributed.start("cpu")
    batch = len(steps[0])
    config = train.Config(
        recipe="bfpo",
        model=str(folder),
        safety=("planned",),
        objective="dpo",
        tau=BETA,
        batch=batch,
        steps=len(steps),
        dtype=dtype,
        log_every=2**30,
        save_every=2**30,
        lr=LR,
    )
    config = dataclasses.replace(
        config, pack_tokens=train.PACK_TOKENS["cuda" if side == WHOLE else "cpu"]
    )
    model, trained = train.build(config, folder / "model", world)
    idle = anonymous_mib()
    # the planned pairs, at the places where a run draws them step by step
    places = [
        int(i)
        for step in range(len(steps))
        for i in batch_indices(batch * len(steps), batch, config.seed, step, "safety")
    ]
    at = dict(zip(places, (pair for step in steps for pair in step), strict=True))
    stream: Any = Stream([at[i] for i in range(len(at))])
    reference = score(model, stream, world, config.pack_tokens, "reference")
    rows = Rows({"safety": stream}, {"safety": reference}, None)  # type: ignore[arg-type]  # what a row says matters to errors alone
    train.forward_backward(model, config, rows, rows.draw(batch, config.seed, 0), world)
    gradients = {
        name: distributed.local_part(p.grad) for name, p in trained.items() if p.grad is not None
    }
    save_file(gradients | {"reference": reference[places]}, folder / f"{dtype}-{side}.safetensors")
    for p in trained.values():
        p.grad = None
    finished = 0

    def reference_again() -> Tensor:
        last: Any = Stream(steps[finished - 1])
        return score(model, last, world, config.pack_tokens, "reference").T

    turn = Turn(channel, reference_again)

    class Folder(RunFolder):
        def start_log(self, step: int, steps: int, print_every: int) -> None:
            super().start_log(step, steps, print_every)
            turn.say(idle_mib=idle)
            turn.wait()

        def log_step(self, row: Any) -> None:
            nonlocal finished
            super().log_step(row)
            finished += 1
            turn.stepped()

    (folder / side).mkdir(exist_ok=True)
    train.optimize(
        model, trained, config, len(steps), rows, lambda: ({}, 0.0), Folder(folder / side, world)
    )


def serve_trl(
    side: str, folder: Path, dtype: str, steps: list[list[Pair]], channel: IO[str]
) -> None:
    """DPOTrainer.train."""
    best, at_once = side != DEFAULT, 1 if side == BY_ONE else len(steps[0])
    import trl.trainer.utils
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for name, p in model.named_parameters():
        p.requires_grad_("down_proj" in name)
        kept = torch.float32 if p.requires_grad or not best else getattr(torch, dtype)
        p.data = p.data.to(
            kept, copy=True
        )  # off the mapped file, so that it counts as held before the step
    idle = anonymous_mib()
    if best:  # torch still folds the chunks of logits: only which rows go through the head changes
        trl.trainer.utils._use_triton = lambda device: True
    references = load_file(folder / f"{dtype}-{OURS}.safetensors")["reference"].tolist()
    rows = []
    for (prompt, chosen, rejected), (c, r) in zip(
        (pair for step in steps for pair in step), references, strict=False
    ):
        cached = {"ref_chosen_logps": c, "ref_rejected_logps": r} if best else {}
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **cached}
        )

    class Trainer(DPOTrainer):  # type: ignore[misc]
        batch: Any = None
        passes = 0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenised already

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the columns are there; what computing them costs is asked for between steps

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            self.batch, self.passes = inputs, self.passes + 1
            loss = super().training_step(model, inputs, *rest)
            if self.passes * at_once == len(steps[0]):  # the first step's gradient is whole
                gradients = {
                    name: p.grad.clone()
                    for name, p in model.named_parameters()
                    if p.grad is not None
                }
                save_file(gradients, folder / f"{dtype}-{side}.safetensors")
            return loss

    args = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=BETA,
        learning_rate=LR,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=len(steps[0]) // at_once,
        max_steps=len(steps),
        bf16=dtype == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=not best,
        precompute_ref_log_probs=best,
        train_sampling_strategy="sequential",
        save_strategy="no",
        max_length=None,
        report_to=[],
        disable_tqdm=True,
    )
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    trainer = Trainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    turn = Turn(
        channel,
        lambda: torch.cat(
            trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, trainer.batch)
        ),
    )

    class Waits(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn.say(idle_mib=idle)
            turn.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.stepped()

    trainer.add_callback(Waits())
    trainer.train()


def serve(side: str, folder: Path, dtype: str, kinds: list[str]) -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(1)
    planned = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    steps = [pairs for kind in kinds for pairs in planned[kind]]
    (serve_ours if side in (OURS, WHOLE) else serve_trl)(side, folder, dtype, steps, channel)


# --- the conversation -----------------------------------------------------------------------------


class Worker:
    """One side's process, seen from here; it gets the plan's steps of these kinds, one after the
    other.
    """

    def __init__(
        self, side: str, folder: Path, dtype: str, kinds: list[str], environment: dict[str, str]
    ) -> None:
        self.log, self.idle_mib = folder / f"{dtype}-{side}.log", 0.0
        quiet = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }
        command = [
            sys.executable,
            __file__,
            "--worker",
            side,
            "--folder",
            str(folder),
            "--dtype",
            dtype,
            "--kinds",
            *kinds,
        ]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | quiet | environment,
            )
        self.idle_mib = self._answer()["idle_mib"]

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to "step" or "reference": cpu_s, wall_s, and memory_mib, the peak over idle
        meanwhile.
        """
        assert self.process.stdin
        print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        peak = 0.0
        while not select.select([self.process.stdout], [], [], 0.005)[0]:
            peak = max(peak, anonymous_mib(self.process.pid))
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker died:\n{self.log.read_text(encoding='utf-8')[-3000:]}")
        return json.loads(line) | {"memory_mib": peak - self.idle_mib}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert got.keys() == expected.keys(), (got.keys(), expected.keys())
    return max(
        (
            (got[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        ).item()
        for name in expected
    )


def gradient_errors(folder: Path, dtype: str, sides: list[str]) -> dict[str, float]:
    """The error of each side's first gradient: of TRL's against ours, in bfloat16 of every side's
    against ours in fp32.

    SystemExit over AGREE: times of two computations that differ are not compared.
    """
    exact = folder / f"float32-{OURS}.safetensors"
    if not exact.exists():
        Worker(OURS, folder, "float32", ["warm-up"], {}).end()
    found = {side: load_file(folder / f"{dtype}-{side}.safetensors") for side in sides}
    expected = load_file(exact)
    for tensors in (*found.values(), expected):
        tensors.pop("reference", None)
    errors = {side: difference(gradients, expected) for side, gradients in found.items()}
    if max(errors.values()) > AGREE[dtype]:
        raise SystemExit(
            f"the sides' gradients differ, so their times are not compared: relative errors {errors}, at most {AGREE[dtype]}"
        )
    return errors


def rounds(
    workers: dict[str, Worker], planned: dict[str, list[list[Pair]]]
) -> dict[str, list[Figures]]:
    """Row name -> one {cpu_s, wall_s, memory_mib} a round: seconds of a pair, the most memory of
    the step.
    """
    rows: dict[str, list[Figures]] = {}

    def keep(name: str, pairs: int, *answers: dict[str, Any]) -> None:
        seconds = {
            key: sum(answer[key] for answer in answers) / pairs for key in ("cpu_s", "wall_s")
        }
        rows.setdefault(name, []).append(seconds | {"memory_mib": answers[0]["memory_mib"]})

    sides = list(workers)
    for number, pairs in enumerate(planned["random"]):
        for side in (
            sides[number % len(sides) :] + sides[: number % len(sides)]
        ):  # each side goes first in turn
            step = workers[side].ask("step")
            keep(side, len(pairs), step)
            if side in (OURS, BEST):  # TRL default's step holds the reference's forward already
                keep(f"{side} + reference", len(pairs), step, workers[side].ask("reference"))
    for pairs in planned["grouped"]:
        for side in (OURS, BEST):
            keep(f"{side}, grouped", len(pairs), workers[side].ask("step"))
    return rows


def tensors_mib(side: str, folder: Path, dtype: str) -> float:
    """A step's memory where freed memory goes back at once: its second step's, the optimizer's
    moments being there.
    """
    worker = Worker(side, folder, dtype, ["warm-up", "random"], MALLOC)
    try:
        worker.ask("step")
        return float(worker.ask("step")["memory_mib"])
    finally:
        worker.end()


def spread(values: list[float]) -> Figures:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(run: str, rounds_wanted: int, folder: Path) -> dict[str, Any]:
    """All rounds of one model, precision and pairs of a step: figures, and ratios round by round."""
    (size, dtype), (pairs, sides) = run.split("-")[:2], RUNS[run]
    planned = plan(rounds_wanted, pairs, SIZES[size][0])
    (folder / "plan.json").write_text(json.dumps(planned), encoding="utf-8")
    workers: dict[str, Worker] = {}
    try:
        for side in sides:
            workers[side] = Worker(
                side,
                folder,
                dtype,
                ["warm-up", "random", *(["grouped"] if side in (OURS, BEST) else [])],
                {},
            )
        for worker in workers.values():
            worker.ask("step")
        ours, *others = [
            torch.tensor(workers[side].ask("reference")["logprobs"])
            for side in (OURS, DEFAULT, BEST)
        ]
        for other in others:
            torch.testing.assert_close(other, ours, rtol=REFERENCE_AGREES[dtype], atol=0)
        errors = gradient_errors(folder, dtype, list(workers))
        rows = rounds(workers, planned)
    finally:
        for worker in workers.values():
            worker.end()
    tensors = (
        {side: tensors_mib(side, folder, dtype) for side in sides} if dtype == "float32" else {}
    )
    shape = {
        "rounds": rounds_wanted,
        "pairs_a_step": pairs,
        "parameters": parameters_of(Config(*SIZES[size])),
    }
    return shape | summarise(planned, rows, tensors) | {"gradient_errors": errors}


def compare(rows: dict[str, list[Figures]], tensors: dict[str, float]) -> list[dict[str, Any]]:
    """Every pair of rows that is there: theirs over ours in seconds, ours over theirs in memory; of
    all rounds together, and of one.
    """
    with_reference, grouped = (
        [f"{OURS} + reference", f"{BEST} + reference"],
        [f"{OURS}, grouped", f"{BEST}, grouped"],
    )
    compared = [
        (OURS, DEFAULT),
        (OURS, BEST),
        (with_reference[0], DEFAULT),
        with_reference,
        grouped,
        (WHOLE, DEFAULT),
        (WHOLE, BEST),
        (OURS, BY_ONE),
    ]

    def ratio(above: str, below: str, key: str) -> Figures:
        a, b = ([figure[key] for figure in rows[name]] for name in (above, below))
        each = [x / y for x, y in zip(a, b, strict=True)]
        return {"all": sum(a) / sum(b), "least": min(each), "most": max(each)}

    return [
        {
            "ours": ours,
            "theirs": theirs,
            "times_faster": ratio(theirs, ours, "cpu_s"),
            "share_of_memory": ratio(ours, theirs, "memory_mib"),
        }
        | (
            {"share_of_tensors": tensors[ours] / tensors[theirs]}
            if ours in tensors and theirs in tensors
            else {}
        )
        for ours, theirs in compared
        if ours in rows and theirs in rows
    ]


def summarise(
    planned: dict[str, list[list[Pair]]], rows: dict[str, list[Figures]], tensors: dict[str, float]
) -> dict[str, Any]:
    batches = {kind: [lengths_of(step) for step in planned[kind]] for kind in ("random", "grouped")}
    figures: dict[str, Any] = {}
    for name, each in rows.items():
        lengths = np.concatenate(batches["grouped" if name.endswith("grouped") else "random"])
        per_s = len(each) / sum(figure["wall_s"] for figure in each)
        figures[name] = {"pairs_per_s": per_s, "tokens_per_s": per_s * lengths.sum() / len(lengths)}
        figures[name] |= {
            key: spread([figure[key] for figure in each]) for key in ("cpu_s", "memory_mib")
        }
    return {
        "mean_tokens": {
            kind: np.concatenate(each).mean(0).tolist() for kind, each in batches.items()
        },
        "padding": {kind: statistics.mean(map(padding, each)) for kind, each in batches.items()},
        "figures": figures,
        "tensors_mib": tensors,
        "compared": compare(rows, tensors),
    }


def table(name: str, result: dict[str, Any]) -> str:
    tokens, padded = (
        "/".join(f"{n:.0f}" for n in result["mean_tokens"]["random"]),
        result["padding"],
    )
    lines = [
        f"{name}: {result['parameters'] / 1e6:.1f} M parameters; {tokens} tokens of prompt/chosen/rejected, padding "
        f"{padded['random']:.2f} (grouped {padded['grouped']:.2f}); gradients agree to {max(result['gradient_errors'].values()):.0e}"
    ]
    lines.append(
        f"{'':22}{'pairs_per_s':>12}{'tokens_per_s':>13}{'cpu_s of a pair':>26}{'memory_mib':>22}{'tensors_mib':>12}"
    )
    for side, row in result["figures"].items():
        cells = [
            f"{row[key]['median']:{form}} ({row[key]['least']:{form}} to {row[key]['most']:{form}})"
            for key, form in (("cpu_s", ".3f"), ("memory_mib", ".0f"))
        ]
        tensors = f"{result['tensors_mib'][side]:12.0f}" if side in result["tensors_mib"] else ""
        lines.append(
            f"{side:22}{row['pairs_per_s']:12.3g}{row['tokens_per_s']:13.0f}{cells[0]:>26}{cells[1]:>22}{tensors}"
        )
    for row in result["compared"]:
        speed, memory = (
            f"{each['all']:.2f} ({each['least']:.2f} to {each['most']:.2f})"
            for each in (row["times_faster"], row["share_of_memory"])
        )
        tensors = (
            f", {row['share_of_tensors']:.2f} of its tensors" if "share_of_tensors" in row else ""
        )
        lines.append(
            f"  {row['ours']} against {row['theirs']}: {speed} times faster, {memory} of its memory{tensors}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, Path(options.folder), options.dtype, options.kinds)
        return
    with tempfile.TemporaryDirectory() as top:
        for run in options.runs:
            size, pairs = run.split("-")[0], RUNS[run][0]
            folder = Path(top) / f"{size}-{pairs}"
            if not folder.exists():
                folder.mkdir()
                write_model(folder / "model", Config(*SIZES[size]))
            result = measure(run, options.rounds, folder)
            print(table(run, result), flush=True)
            if options.write:  # what is measured is kept, whatever becomes of the next run
                record_part("step", "runs", run, result, threads=1)


if __name__ == "__main__":
    main()
