"""A training step at Mistral-7B's shape on one GPU: correctness first, then speed, memory, and
TRL's DPOTrainer beside it.

    python benchmarks/gpu.py --write                  # one GPU of 80 GB or more, 9 minutes; results.json, "gpu"
    python benchmarks/gpu.py --parts step trl_best    # some parts; `check` always comes first
    python benchmarks/gpu.py --tiny                   # the same code at a tiny shape, on a CPU too: its figures mean nothing

Each part is a process of its own with a time limit: one that crashes, or runs out of memory or
time, is reported with what it had measured, and the others go on. Weights are random, pairs have
the public data's lengths, a step is the paper's: 32 + 32 pairs, down_proj alone trains (fp32), the
rest is bfloat16.

    check        FlexAttention (compiled, dynamic shapes) against BlockedAttention on the CPU in fp32, and against padded SDPA: values and
                 gradients of every parameter of a small model, over packs of five lengths. Where
                 they disagree nothing is timed.
    step         train.optimize at several pack_tokens, with and without activation checkpointing; memory beside the plan's. useful_share
                 is the arithmetic that the step needs (operations below) over what a large bfloat16
                 matrix product reaches here.
    train20      20 steps of it at the recipe's defaults: is the peak under 80e9 bytes?
    trl_best     TRL's DPOTrainer: the reference cached (its cost is not in the step, as it is not in ours), no checkpointing
    trl_default  the same at its defaults: a live reference, gradient checkpointing. Both have our dtypes, and 4 pairs at a time: fewer if
                 these do not fit, which is then said. Attention is transformers' default, whose
                 padding mask keeps SDPA from its flash kernel. alloc_retries over 0: memory was so
                 scarce that it cost time; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is then
                 worth a try.
    attention    one layer's attention of a pack by FlexAttention, and of the same pairs as padded rows by SDPA, 4 pairs at a time
    profile      the time of one step on the device, by kind of kernel
    compiled     `step` with every block under torch.compile
    generate     benchmarks/generate.py with 8 of the 32 layers
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Stream, draw_lengths, pairs_of, record_part
from torch import Tensor

import train
from data import Rows, score
from model import FLEX_BLOCK, Config, Mistral, Pack, pack_attend, rotary
from support import distributed, memory_plan
from support.kernels import flex_on, rotated
from support.storage import RunFolder

# Largest relative error of a tensor. fp32: sums of thousands of terms round to 1e-6 to 1e-5, a
# token lost or counted twice is 1e-3; bfloat16, 8 bits of mantissa: a few percent.
AGREE = {"float32": 1e-4, "bfloat16": 0.08}
LIMIT_BYTES = 80e9
NO_TIME = "no time was left"
# Parts of a kernel's name (an operation's on a CPU) -> what it does; the first match counts.
KINDS = {
    "collectives": ("nccl",),
    "attention": ("flex_attention", "triton_tem", "flash", "fmha", "BlockedAttention"),
    "copies": ("memcpy", "memset", "copy"),
    "matrix products": ("gemm", "nvjet", "xmma", "cutlass", "::mm", "addmm", "bmm"),
}


@dataclass(frozen=True)
class Scale:
    config: Config
    checked: Config  # the check's model
    shrink: int  # divides the pairs' lengths
    batch: int  # pairs of each of two streams in a step
    packs: tuple[int, ...]  # pack_tokens; the first is the default's place
    timed: int  # steps, after one that warms up
    steps: int  # of train20
    order: int  # of the matrices whose product gives the chip's rate
    at_once: int  # pairs that TRL takes at a time
    generate: tuple[str, ...]


FULL = Scale(
    Config(32000, 4096, 14336, 32, 32, 8, 128),
    Config(2000, 256, 896, 2, 4, 2, 128),
    1,
    32,
    (8192, 4096, 16384),
    2,
    20,
    8192,
    4,
    (
        "--hidden",
        "4096",
        "--inner",
        "14336",
        "--layers",
        "8",
        "--heads",
        "32",
        "--vocabulary",
        "32000",
    ),
)
TINY = Scale(
    Config(300, 64, 224, 3, 4, 1, 16),
    Config(300, 64, 224, 2, 4, 2, 16),
    10,
    2,
    (256, 128, 512),
    2,
    3,
    64,
    2,
    (
        "--hidden",
        "64",
        "--inner",
        "128",
        "--layers",
        "2",
        "--heads",
        "4",
        "--vocabulary",
        "100",
        "--prompts",
        "2",
        "--new",
        "4",
        "--rounds",
        "1",
    ),
)

Say = Callable[..., None]


class NotMeasured(Exception):
    """Why a part cannot be measured here."""


class Enough(Exception):
    """The last measured step is done; what a run does then, a checkpoint of 22 GB first, is not
    measured.
    """


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(compute: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one call, the median of three times `repeats` calls; the first calls warm up."""
    times = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            compute()
        synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times[1:])


# --- check ----------------------------------------------------------------------------------------


def padded_logprobs(model: Mistral, trees: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """What model.logprobs gives, by a padded row for each prompt and response, full logits and
    SDPA; fp32 [R], chosen ones first.
    """
    pairs = [(tree[0], tree[b]) for b in (1, 2) for tree in trees]
    width, device = (
        max(len(prompt) + len(response) for prompt, response in pairs),
        model.head.device,
    )
    tokens = torch.tensor(
        [[*p, *r] + [0] * (width - len(p) - len(r)) for p, r in pairs], device=device
    )
    logp = model(tokens)[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    place = torch.arange(width - 1, device=device)
    first, end = (
        torch.tensor(x, device=device)[:, None] - 1
        for x in ([len(p) for p, _ in pairs], [len(p) + len(r) for p, r in pairs])
    )
    return (logp * ((place >= first) & (place < end))).sum(1)


def values_and_gradients(model: Mistral, compute: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The values, fp64 on the CPU, and by parameter the gradient of a sum of them in which each has
    a weight of its own.
    """
    model.zero_grad()
    out = compute()
    (out * torch.linspace(1, 2, len(out), device=out.device)).sum().backward()
    found = {"values": out} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a tensor, and which; one that is missing or not finite is off
    by infinity.
    """
    errors = {
        name: ((got[name] - expected[name]).norm() / expected[name].norm()).item()
        if name in got
        else math.inf
        for name in expected
    }
    return max(
        (error if math.isfinite(error) else math.inf, name) for name, error in errors.items()
    )


def agreement(
    model: Mistral, oracle: Mistral, trees: Sequence[Sequence[Sequence[int]]]
) -> list[dict[str, Any]]:
    """The errors of model.logprobs on the model's device: against the oracle's, fp32 on the CPU,
    and against padded rows by SDPA.
    """
    device, dtype, pack = (
        model.head.device,
        str(model.head.dtype).removeprefix("torch."),
        Pack.build(trees),
    )
    found = values_and_gradients(model, lambda: model.logprobs(pack.to(device)))
    oracles = {
        "BlockedAttention, fp32, CPU": values_and_gradients(oracle, lambda: oracle.logprobs(pack)),
        f"padded SDPA, {dtype}": values_and_gradients(model, lambda: padded_logprobs(model, trees)),
    }
    errors = {name: difference(found, expected) for name, expected in oracles.items()}
    return [
        {
            "dtype": dtype,
            "tokens": len(pack.tokens),
            "against": name,
            "value_error": difference(
                {"values": found["values"]}, {"values": oracles[name]["values"]}
            )[0],
            "largest_error": error,
            "tensor": tensor,
        }
        for name, (error, tensor) in errors.items()
    ]


def disagreement(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first row over AGREE in words; "" when all agree."""
    for row in rows:
        if not row["largest_error"] <= AGREE[row["dtype"]]:
            return (
                f"{row['dtype']}, pack of {row['tokens']} tokens: {row['tensor']} is off by {row['largest_error']:.1e} against "
                f"{row['against']}, at most {AGREE[row['dtype']]} allowed"
            )
    return ""


def check(scale: Scale, device: str, say: Say) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    rng, rows = np.random.default_rng(0), list[dict[str, Any]]()
    oracle = Mistral(scale.checked)
    oracle.init_weights(0)
    for p in oracle.parameters():  # 0.02 leaves attention almost flat; in bfloat16's values the oracle's weights are both dtypes'
        p.data = p.data.mul(4 if p.dim() == 2 else 1).bfloat16().float()
    batches = [
        [(1, 1, 1), (5, 2, 3)],
        *(draw_lengths(rng, n) // scale.shrink for n in (3, 1, 6, 2)),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(oracle).to(device, dtype)
        for lengths in batches:
            rows += agreement(model, oracle, pairs_of(rng, lengths, scale.checked.vocab_size))
            say(rows=rows, disagreement=disagreement(rows))


# --- the training loop ----------------------------------------------------------------------------


def useful(config: Config, lengths: np.ndarray) -> float:
    """Operations that a step on pairs [n, 3] needs: forward, backward of the activations, gradient
    of down_proj; attention over the tokens that see each other. Nothing computed twice counts
    twice.
    """
    prompts, answers = lengths[:, :1], lengths[:, 1:]
    trained = frozenset(name for name in config.shapes() if "down_proj" in name)
    load = memory_plan.Load(
        config.shapes(),
        config.num_attention_heads,
        trained,
        torch.bfloat16,
        "cuda",
        tokens=int(lengths.sum()),
        scored=int(answers.sum()),
    )
    scored = float(
        (answers * prompts + answers * (answers - 1) // 2).sum()
    )  # rows p - 1 to p + r - 2 of a path
    every = float(
        (prompts * (prompts + 1) // 2).sum()
        + (answers * prompts + answers * (answers + 1) // 2).sum()
    )
    width, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
    forward, backward = (
        4 * width * ((layers - 1) * every + scored),
        8 * width * ((layers - 2) * every + scored),
    )  # none below block 0's
    return sum(memory_plan.operations(load)) + forward + backward


def product_rate(order: int, device: torch.device) -> float:
    a = torch.randn(order, order, device=device).bfloat16()
    return 2 * order**3 / seconds_of(lambda: torch.mm(a, a), device, 10)


def peak(device: torch.device) -> dict[str, int]:
    """Since the last reset: the most bytes of tensors and of what the allocator kept for them, and
    how often it had to give all unused ones back before it got more; nothing on a CPU.
    """
    if device.type != "cuda":
        return {}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()


class Run:
    """A model of the scale's shape as train.py builds it, random, and the pairs of `steps` steps
    with their reference.
    """

    def __init__(self, scale: Scale, device: str, steps: int) -> None:
        self.scale, self.steps, self.world = scale, steps, distributed.start(device)
        self.config = train.Config(
            recipe="bfpo",
            model="random",
            safety=("random",),
            helpfulness=("random",),
            batch=scale.batch,
            dtype="bfloat16",
            pack_tokens=scale.packs[0],
            log_every=2**30,
            save_every=2**30,
        )
        self.streams: Any = pairs_of_steps(scale, steps)
        train.load_weights = randomise  # train.build fills a model from a folder: 14.5 GB here, which need not be written
        with tempfile.TemporaryDirectory() as folder:
            entries = {
                "architectures": ["MistralForCausalLM"],
                "hidden_act": "silu",
            } | dataclasses.asdict(scale.config)
            Path(folder, "config.json").write_text(json.dumps(entries), encoding="utf-8")
            self.model, self.trained = train.build(self.config, Path(folder), self.world)
        references = {}
        for name, stream in self.streams.items():  # the first compiles, the second is timed
            start = time.perf_counter()
            references[name] = score(self.model, stream, self.world, self.config.pack_tokens, name)
            self.reference_pairs_per_s = len(stream) / (time.perf_counter() - start)
        self.rows = Rows(self.streams, references, None)  # type: ignore[arg-type]  # what a row says matters to errors alone

    def drawn(self, step: int) -> Tensor:
        return self.rows.draw(self.config.batch, self.config.seed, step)

    def through(
        self, config: train.Config, after: Callable[[int, dict[str, Any]], None]
    ) -> dict[str, int]:
        """train.optimize's steps, with `after` called when each is done on the device; peak memory."""
        world, last = self.world, self.steps - 1

        class Folder(RunFolder):
            def log_step(self, row: Any) -> None:
                synchronize(world.device)
                after(row["step"], row)
                if row["step"] == last:
                    raise Enough

        reset_peak(world.device)
        self.model.checkpoint_blocks = config.checkpoint_blocks
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
            train.optimize(
                self.model,
                self.trained,
                config,
                self.steps,
                self.rows,
                lambda: ({}, 0.0),
                Folder(Path(folder), world),
            )
        return peak(world.device)

    def planned_bytes(self, config: train.Config) -> float:
        load = memory_plan.Load(
            self.scale.config.shapes(),
            self.scale.config.num_attention_heads,
            frozenset(self.trained),
            torch.bfloat16,
            self.world.device.type,
            checkpoint_blocks=config.checkpoint_blocks,
        )
        return memory_plan.needed(
            train.step_of(config, self.streams, self.steps, 1).with_budget(load, config.pack_tokens)
        )

    def timed(self, rate: float, **changes: Any) -> dict[str, Any]:
        """Figures of the steps after the first under a changed configuration."""
        config, ends = dataclasses.replace(self.config, **changes), list[float]()
        memory = self.through(config, lambda *_: ends.append(time.perf_counter()))
        seconds, items = (
            ends[-1] - ends[0],
            torch.cat([self.drawn(step) for step in range(1, self.steps)]),
        )
        lengths = np.concatenate([stream.lengths for stream in self.streams.values()])[
            items.numpy()
        ]
        operations = useful(self.scale.config, lengths)
        return {
            "pack_tokens": config.pack_tokens,
            "checkpoint_blocks": config.checkpoint_blocks,
            "step_s": seconds / (self.steps - 1),
            "pairs_per_s": len(items) / seconds,
            "tokens_per_s": int(lengths.sum()) / seconds,
            "useful_operations": operations,
            "useful_share": operations / seconds / rate,
            **memory,
            "plan_bytes": self.planned_bytes(config),
        }


def pairs_of_steps(scale: Scale, steps: int) -> dict[str, Stream]:
    rng = np.random.default_rng(0)
    return {
        name: Stream(
            pairs_of(
                rng, draw_lengths(rng, scale.batch * steps) // scale.shrink, scale.config.vocab_size
            )
        )
        for name in ("safety", "helpfulness")
    }


@torch.no_grad()
def randomise(model: Mistral, _: Any) -> None:
    torch.manual_seed(0)
    for p in model.parameters():
        local = distributed.local_part(p)
        local.fill_(1.0) if p.dim() == 1 else local.normal_(0, 0.02)


def step(scale: Scale, device: str, say: Say, compiled: bool = False) -> None:
    """The largest pack without checkpointing comes last: where it does not fit, the process ends
    with it.
    """
    run, rows = Run(scale, device, scale.timed + 1), list[dict[str, Any]]()
    run.config = dataclasses.replace(
        run.config, lr=1e-20
    )  # moves no weight: each case's step 0 finds the policy at its reference
    rate = product_rate(scale.order, run.world.device)
    say(
        product_tflop_per_s=rate / 1e12,
        pairs_a_step=2 * scale.batch,
        timed_steps=scale.timed,
        reference_pairs_per_s=run.reference_pairs_per_s,
    )
    cases = [
        (scale.packs[0], False),
        (scale.packs[1], False),
        *((tokens, True) for tokens in scale.packs),
        (scale.packs[2], False),
    ]
    if compiled:
        cases = cases[:1]
        for block in run.model.model.layers:
            block.compile(dynamic=True)
    for pack_tokens, checkpoint_blocks in cases:
        say(doing=f"pack_tokens {pack_tokens}, checkpoint_blocks {checkpoint_blocks}")
        rows.append(run.timed(rate, pack_tokens=pack_tokens, checkpoint_blocks=checkpoint_blocks))
        say(rows=rows)


def compiled(scale: Scale, device: str, say: Say) -> None:
    if device == "cpu":
        raise NotMeasured(
            "a CPU's attention is planned pack by pack, and compiling it anew for each is no use to anyone"
        )
    step(scale, device, say, compiled=True)


def train20(scale: Scale, device: str, say: Say) -> None:
    run, losses = Run(scale, device, scale.steps), list[float]()
    say(steps=scale.steps, plan_bytes=run.planned_bytes(run.config))
    if device == "cuda":
        say(device_bytes=torch.cuda.get_device_properties(0).total_memory)

    def after(_: int, row: dict[str, Any]) -> None:
        losses.append(row["loss"])
        memory = peak(run.world.device)
        say(
            losses=losses,
            **memory,
            **({"under_80e9_bytes": memory["reserved_bytes"] < LIMIT_BYTES} if memory else {}),
        )

    run.through(run.config, after)


# --- others beside it, and inside it --------------------------------------------------------------


def trl_steps(scale: Scale, device: str, best: bool, at_once: int, say: Say) -> None:
    """DPOTrainer.train on the pairs of `step`: figures of the steps after the first, said after
    each.
    """
    import trl.trainer.dpo_trainer
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        MistralConfig,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import DPOConfig, DPOTrainer

    trl.trainer.dpo_trainer.hash_module = lambda module: (
        ""
    )  # the name of a cache that is not used here
    where, shape = (
        torch.device(device),
        MistralConfig(**{k: v for k, v in vars(scale.config).items() if k != "model_type"}),
    )
    with where:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    reference = None if best else copy.deepcopy(model)
    for name, p in model.named_parameters():
        p.requires_grad_("down_proj" in name)
        p.data = p.data.float() if p.requires_grad else p.data
    streams, steps, ends = pairs_of_steps(scale, scale.timed + 1), scale.timed + 1, list[float]()
    pairs = [stream.trees[i] for i in range(scale.batch * steps) for stream in streams.values()]
    cached = {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} if best else {}
    rows = [
        dict(
            zip(
                ("prompt_ids", "chosen_ids", "rejected_ids"),
                map(np.ndarray.tolist, pair),
                strict=True,
            )
        )
        | cached
        for pair in pairs
    ]

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenised already

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the columns are there; their values change no time

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(where)
            ends.append(time.perf_counter())
            if timed := len(ends) - 1:
                seconds = (ends[-1] - ends[0]) / timed
                say(
                    timed_steps=timed,
                    pairs_per_s=2 * scale.batch / seconds,
                    step_s=seconds,
                    **peak(where),
                )

    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=2 * scale.batch // at_once,
            max_steps=steps,
            bf16=True,
            use_cpu=device == "cpu",
            gradient_checkpointing=not best,
            precompute_ref_log_probs=best,
            save_strategy="no",
            train_sampling_strategy="sequential",
            report_to=[],
            disable_tqdm=True,
        )
        words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="</s>", pad_token="</s>"
        )
        trainer = Trainer(
            model,
            ref_model=reference,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        say(pairs_at_once=at_once, attention=model.config._attn_implementation)
        reset_peak(where)
        trainer.train()


def trl_part(scale: Scale, device: str, say: Say, best: bool) -> None:
    for name in ("trl", "datasets", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise NotMeasured(f"{name} is not installed")
    too_many, at_once = [], scale.at_once
    while at_once:
        say(doing=f"{at_once} pairs at a time", did_not_fit=too_many)
        try:
            return trl_steps(scale, device, best, at_once, say)
        except torch.OutOfMemoryError:
            too_many.append(at_once)
            say(
                **dict.fromkeys(
                    ("timed_steps", "pairs_per_s", "step_s", *peak(torch.device(device)))
                )
            )  # of the steps before
        at_once //= 2
        gc.collect()
        torch.cuda.empty_cache()
    raise NotMeasured("one pair at a time does not fit this GPU")


def attention(scale: Scale, device: str, say: Say) -> None:
    """Forward, and forward with backward; rotation of queries and keys is in both sides, making the
    pack's mask stands alone.
    """
    config, where, flex = scale.config, torch.device(device), flex_on(device)
    lengths = draw_lengths(np.random.default_rng(0), scale.packs[0])
    lengths = (lengths // scale.shrink)[
        np.cumsum((lengths // scale.shrink).sum(1)) <= scale.packs[0]
    ]
    lengths = lengths[: max(1, len(lengths) // scale.at_once) * scale.at_once]
    pack = Pack.build([[[0] * n for n in sizes] for sizes in lengths]).to(where)
    pack = pack.padded(FLEX_BLOCK) if flex else pack
    attend = pack_attend(pack, config, False)

    def qkv(*shape: int) -> list[Tensor]:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        return [
            torch.randn(
                *shape, n, config.head_dim, device=where, dtype=torch.bfloat16, requires_grad=True
            )
            for n in heads
        ]

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turns = turns_of[q.shape[1]]  # made once, as the pack's are
        q, k, v = (
            x.to(v.dtype).transpose(1, 2) for x in (rotated(q, *turns), rotated(k, *turns), v)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    groups = [lengths[i : i + scale.at_once] for i in range(0, len(lengths), scale.at_once)]
    sides = {
        "pack": (attend, [qkv(len(pack.tokens))]),
        "padded": (
            padded,
            [qkv(2 * len(each), int((each[:, :1] + each[:, 1:]).max())) for each in groups],
        ),
    }
    turns_of = {
        q.shape[1]: rotary(torch.arange(q.shape[1], device=where), config)
        for q, *_ in sides["padded"][1]
    }
    figures = {"mask": seconds_of(lambda: pack_attend(pack, config, False), where, 3) * 1e3}
    for name, (function, inputs) in sides.items():
        outs = [function(*each) for each in inputs]
        slopes = [torch.randn_like(out) for out in outs]
        flat = [x for each in inputs for x in each]

        def forward(function: Any = function, inputs: Any = inputs) -> list[Tensor]:
            return [function(*each) for each in inputs]

        def both(forward: Any = forward, flat: Any = flat, slopes: Any = slopes) -> None:
            torch.autograd.grad(forward(), flat, slopes)

        figures |= {
            f"{name}_forward": seconds_of(forward, where, 10) * 1e3,
            f"{name}_both": seconds_of(both, where, 10) * 1e3,
        }
    ratios = {key: figures[f"padded_{key}"] / figures[f"pack_{key}"] for key in ("forward", "both")}
    say(
        pairs=len(lengths),
        pack_tokens=len(pack.tokens),
        padded_tokens=sum(q.shape[0] * q.shape[1] for q, *_ in sides["padded"][1]),
        milliseconds=figures,
        padded_over_pack=ratios,
    )


def kind_of(name: str) -> str:
    return next(
        (
            kind
            for kind, parts in KINDS.items()
            if any(part.lower() in name.lower() for part in parts)
        ),
        "pointwise and other",
    )


def profile(scale: Scale, device: str, say: Say) -> None:
    from torch.profiler import ProfilerActivity, profile

    run, cuda, ends = Run(scale, device, 2), device == "cuda", list[float]()
    profiler = profile(
        activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    )  # on a GPU kernels alone: Python is not slowed

    def after(step: int, _: Any) -> None:
        if not step:
            profiler.start()  # seconds on a GPU, which are not the step's
        ends.append(time.perf_counter())
        if step:
            profiler.stop()

    run.through(run.config, after)
    events = [
        event
        for event in profiler.key_averages()
        if not event.is_user_annotation  # a span of kernels, FSDP2's or the compiler's
        and (not cuda or event.device_type == torch.autograd.DeviceType.CUDA)
    ]
    times = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        for event in events
    }
    if not sum(times.values()):
        raise NotMeasured("the profiler saw no kernels")
    kinds = dict.fromkeys([*KINDS, "pointwise and other"], 0.0)
    for name, each in times.items():
        kinds[kind_of(name)] += each
    top = sorted(times.items(), key=lambda entry: -entry[1])[:15]
    say(
        milliseconds=kinds,
        busy_share=sum(times.values()) / 1e3 / (ends[1] - ends[0]),
        top=[
            {"kernel": name[:160], "kind": kind_of(name), "milliseconds": each}
            for name, each in top
        ],
    )


def generate(scale: Scale, device: str, say: Say) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise NotMeasured("transformers is not installed")
    flags = {
        "device": device,
        "dtype": "bfloat16",
        "threads": str(torch.get_num_threads()),
        "rounds": "3",
    }
    command = [
        str(Path(__file__).with_name("generate.py")),
        *(part for name, value in flags.items() for part in (f"--{name}", value)),
    ]
    done = subprocess.run(
        [sys.executable, *command, *scale.generate], stdout=subprocess.PIPE, text=True, check=True
    )
    say(arguments=list(scale.generate), lines=done.stdout.splitlines()[-6:])


# --- all of it ------------------------------------------------------------------------------------

# part -> what measures it, and the seconds it may take; in the order of their worth, as all share
# the time
PARTS: dict[str, tuple[Callable[[Scale, str, Say], None], int]] = {
    "check": (check, 240),
    "step": (step, 170),
    "train20": (train20, 200),
    "trl_best": (lambda *a: trl_part(*a, best=True), 110),
    "trl_default": (lambda *a: trl_part(*a, best=False), 110),
    "attention": (attention, 60),
    "profile": (profile, 80),
    "compiled": (compiled, 120),
    "generate": (generate, 200),
}


def work(part: str, tiny: bool, out: Path) -> None:
    """A part, in its own process: what it says goes to `out` at once."""
    figures: dict[str, Any] = {}

    def say(**more: Any) -> None:
        figures.update(more)
        out.with_suffix(".aside").write_text(json.dumps(figures), encoding="utf-8")
        os.replace(out.with_suffix(".aside"), out)

    try:
        PARTS[part][0](TINY if tiny else FULL, "cuda" if torch.cuda.is_available() else "cpu", say)
    except NotMeasured as reason:
        say(not_measured=str(reason))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # not through the process group's and the compiler's shutdown, which may hang


def worker_command(part: str, tiny: bool, out: Path) -> list[str]:
    return [
        sys.executable,
        __file__,
        "--worker",
        part,
        "--out",
        str(out),
        *(["--tiny"] if tiny else []),
    ]


def run_part(part: str, tiny: bool, folder: Path, limit: float) -> dict[str, Any]:
    """What a part said, with "failed" and why when it died or outlasted its limit in seconds."""
    out, log, start = folder / f"{part}.json", folder / f"{part}.log", time.perf_counter()
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(folder),
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    }  # cuDNN's attention is planned anew for every width of TRL's batches
    with open(log, "w", encoding="utf-8") as file:
        command = worker_command(part, tiny, out)
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | quiet, start_new_session=True
        )
        try:
            reason = f"exit code {code}" if (code := process.wait(limit)) else ""
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, and what it started
        process.wait()
    figures: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    doing = figures.pop("doing", "")
    if reason:
        text = log.read_text(encoding="utf-8", errors="replace").strip()
        print(f"{part}: {reason}\n{text[-3000:]}", file=sys.stderr, flush=True)
        figures["failed"] = ": ".join(
            filter(None, [doing, reason, text.splitlines()[-1][:300] if text else ""])
        )
    return figures | {"part_s": time.perf_counter() - start}


def measure(
    chosen: Sequence[str], tiny: bool, seconds: float, done: Callable[[str, dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """Part -> figures, `check` first; each is given to `done` at once.

    After a check that does not agree nothing else is measured.
    """
    end, found, refused = time.monotonic() + seconds, dict[str, dict[str, Any]](), ""
    with tempfile.TemporaryDirectory() as folder:
        for part in (part for part in PARTS if part == "check" or part in chosen):
            limit = min(PARTS[part][1], end - time.monotonic())
            if refused or limit < 5:
                found[part] = {"not_measured": refused or NO_TIME}
            else:
                found[part] = run_part(part, tiny, Path(folder), limit)
            if part == "check" and (
                why := found[part].get("failed") or found[part].get("disagreement")
            ):
                refused = f"the check did not pass: {why}"
            done(part, found[part])
    return found


def table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Every part's figures as lines that a person reads; GB are 10^9 bytes."""
    lines: list[str] = []

    def gb(row: Mapping[str, Any]) -> str:
        cells = [
            f"{row[f'{key}_bytes'] / 1e9:.1f} {key}"
            for key in ("allocated", "reserved", "plan")
            if f"{key}_bytes" in row
        ]
        retries = (
            f", {row['alloc_retries']} times short of memory" if row.get("alloc_retries") else ""
        )
        return ", GB: " + ", ".join(cells) + retries if cells else ""

    for part, found in parts.items():
        lines.append(f"{part} ({found['part_s']:.0f} s)" if "part_s" in found else part)
        lines += [
            f"  {key.replace('_', ' ')}: {found[key]}"
            for key in ("failed", "not_measured", "disagreement")
            if found.get(key)
        ]
        if part == "check" and found.get("rows"):
            for dtype in AGREE:
                worst = max(
                    (row["largest_error"] for row in found["rows"] if row["dtype"] == dtype),
                    default=math.nan,
                )
                lines.append(
                    f"  {dtype}: largest relative error {worst:.1e}, at most {AGREE[dtype]}"
                )
        elif part in ("step", "compiled"):
            if "product_tflop_per_s" in found:
                rate, reference = found["product_tflop_per_s"], found["reference_pairs_per_s"]
                lines.append(
                    f"  matrix product {rate:.4g} TFLOP/s, reference {reference:.4g} pairs/s"
                )
            for row in found.get("rows", ()):
                activations = "recomputed" if row["checkpoint_blocks"] else "kept"
                lines.append(
                    f"  pack {row['pack_tokens']:6} {activations:10} {row['pairs_per_s']:8.4g} pairs/s {row['tokens_per_s']:8.0f} "
                    f"tokens/s, useful {row['useful_share']:.1%}{gb(row)}"
                )
        elif part.startswith("trl") and found.get("pairs_per_s"):
            step = parts.get("step", {})
            ours = [
                row["pairs_per_s"] for row in step.get("rows", ()) if not row["checkpoint_blocks"]
            ][:1]  # the default, not our best
            beside = (
                f", ours without checkpointing {ours[0] / found['pairs_per_s']:.2f} times as fast"
                if ours
                else ""
            )
            if ours and part == "trl_default":  # its step has the reference's forward
                both = 1 / (1 / ours[0] + 1 / step["reference_pairs_per_s"])
                beside += f", {both / found['pairs_per_s']:.2f} with the reference's forward"
            lines.append(
                f"  {found['pairs_per_s']:.4g} pairs/s, {found['pairs_at_once']} pairs at a time (did not fit: "
                f"{found['did_not_fit'] or 'none'}){gb(found)}{beside}"
            )
        elif part == "train20" and "losses" in found:
            verdict = (
                f"; under 80e9 bytes: {found['under_80e9_bytes']}"
                if "under_80e9_bytes" in found
                else ""
            )
            losses = found["losses"]
            lines.append(
                f"  {len(losses)} of {found['steps']} steps, loss {losses[0]:.6g} to {losses[-1]:.6g}{gb(found)}{verdict}"
            )
        elif part == "attention" and "milliseconds" in found:
            lines.append(
                "  ms: "
                + ", ".join(f"{name} {each:.3g}" for name, each in found["milliseconds"].items())
            )
            lines.append(
                "  padded / pack: "
                + ", ".join(
                    f"{name} {each:.2f}" for name, each in found["padded_over_pack"].items()
                )
            )
        elif part == "profile" and "milliseconds" in found:
            total = sum(found["milliseconds"].values())
            lines += [
                f"  {each:9.1f} ms {each / total:6.1%}  {kind}"
                for kind, each in found["milliseconds"].items()
            ]
            lines.append(f"  the device was busy {found['busy_share']:.1%} of the step")
            lines += [
                f"  {row['milliseconds']:9.1f} ms  {row['kind']}: {row['kernel'][:90]}"
                for row in found["top"]
            ]
        lines += [f"  {line}" for line in found.get("lines", ())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, on a CPU where there is no GPU"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9,
        help="for all parts together; what has no time left is not measured",
    )
    parser.add_argument(
        "--write", action="store_true", help="merge each part's figures into results.json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.tiny, options.out)
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU here; --tiny runs the same code on a CPU")
    if options.tiny and options.write:
        parser.error("--tiny's figures mean nothing and are not written; leave out --write")

    def done(part: str, figures: dict[str, Any]) -> None:
        print(table({part: figures}), flush=True)
        if (
            options.write and figures.get("not_measured") != NO_TIME
        ):  # an earlier run's figures stay
            record_part("gpu", "parts", part, figures)

    found = measure(options.parts, options.tiny, 60 * options.minutes, done)
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
