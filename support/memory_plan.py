"""What a training run will need: memory of each process, time and disk, from shapes alone, before
anything is allocated.

    python train.py bfpo --dry_run ...              prints the plan, and trains nothing
    python benchmarks/memory.py                     the plan beside what was measured

A step is fullest at one of five moments: at the head, at the start or the end of the backward pass,
in the optimizer, or while a checkpoint is written. Between its start and its end the backward pass
gives up activations and gains gradients block by block, evenly, so no moment between them is fuller
than both. On a CPU the memory of freed activations and gradients stays with the process, and a
checkpoint comes on top. Counted is what tensors hold. What a process holds before the plan is
printed, a GPU's context and the allocators' gaps are not (USABLE).
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions. Here also: S scored
# rows.

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from support.distributed import LARGEST_KEPT, LARGEST_OF_SEVERAL, duration, launched
from support.kernels import ATTENTION_BLOCK, HEAD_CHUNK, KEPT_KEYS, MLP_ROWS
from support.storage import CHECKPOINT_FILE_BYTES

GIB = 2**30
USABLE = 0.95  # of the free memory; the rest is for what no tensor holds
RATE_SHARE = 0.5  # of a large matrix product's rate, reached by a whole step: assumed, not measured
KERNEL_BYTES = 160 * 2**20  # oneDNN's kernels of bfloat16 products and their gaps: measured
GAPS_OF_SEVERAL = 0.25  # of all that a process holds, on a CPU with several: measured
STEPS_LOOKED_AT = 100  # for the largest step

Moment = dict[str, float]  # what is held -> bytes
Held = tuple[float, float, float, float]  # the last four of KINDS
KINDS = (
    "frozen weights",
    "trained weights, fp32",
    "Adam moments, fp32",
    "gradients, fp32",
    "gathered layers",
    "saved activations",
    "workspace",
)

INPUTS = {  # projections that keep one input between them, where they train
    "q_proj": "input of attention",
    "k_proj": "input of attention",
    "v_proj": "input of attention",
    "gate_proj": "input of the feed-forward",
    "up_proj": "input of the feed-forward",
}


class Weight(NamedTuple):
    """A weight as the forward pass comes to it."""

    name: str
    module: str
    block: int  # -1 before the blocks, their number after them
    shape: tuple[int, ...]
    rows: int  # T or S: what it is applied to
    trains: bool
    reached: bool  # a weight before it trains, so a gradient flows to its input


@dataclass(frozen=True)
class Load:
    """All that a rank's memory depends on."""

    shapes: Mapping[str, tuple[int, ...]]  # of the model's tensors, by checkpoint name
    heads: int  # H
    trained: frozenset[str]
    dtype: torch.dtype  # of the computation and frozen weights; trained ones are fp32
    device: str  # cpu or cuda
    shards: int = 1  # ranks that every parameter is shared out over
    processes: int = 1  # of the run: FSDP2 gathers copies of a model too
    checkpoint_blocks: bool = False
    tokens: int = 1  # T, of the largest pack
    scored: int = 1  # S, of that pack
    packs: int = 1  # of a rank in a step: with two or more, gradients stay beside activations
    keys: float = 0.0  # on a CPU: of a row and head, the probabilities that attention keeps

    @property
    def blocks(self) -> int:
        return sum(name.endswith(".input_layernorm.weight") for name in self.shapes)

    @property
    def head(self) -> str:
        """The name of the head's weight: the embedding's when the two are tied."""
        own = "lm_head.weight"
        return own if own in self.shapes else "model.embed_tokens.weight"

    def walk(self) -> list[Weight]:
        """The weights in the order of the forward pass."""
        places = {}
        for name in self.shapes:
            outside = -1 if "embed_tokens" in name else self.blocks
            places[name] = int(name.split(".")[2]) if ".layers." in name else outside
        weights = []
        reached = False
        for name in sorted(places, key=places.__getitem__):
            module = name.split(".")[-2]
            trains = name in self.trained
            # In the last block only what becomes a key or a value is computed of every row.
            is_last = places[name] >= self.blocks - 1
            of_keys = module in ("input_layernorm", "k_proj", "k_norm", "v_proj")
            rows = self.scored if is_last and not of_keys else self.tokens
            weights.append(
                Weight(name, module, places[name], self.shapes[name], rows, trains, reached)
            )
            reached = reached or trains
        return weights

    def values(self, names: Iterable[str], shards: int = 1) -> int:
        """How many values these tensors have on one of `shards` ranks."""
        total = 0
        for name in names:
            rows, *others = self.shapes[name]
            total += math.ceil(rows / shards) * math.prod(others)
        return total


# --- memory ---------------------------------------------------------------------------------------


def kept_keys(lengths: np.ndarray) -> np.ndarray:
    """How many probabilities a head keeps of each tree on a CPU, [n], of these lengths [n, prompt
    and responses].

    A row sees the keys before its own part, and those of its part up to the end of its block of
    rows. Rows that see over KEPT_KEYS keep none.
    """
    kept = np.zeros(len(lengths))
    for part in range(lengths.shape[1]):
        before = lengths[:, 0] * (1.0 if part else 0.0)
        whole_blocks = (KEPT_KEYS - before) // ATTENTION_BLOCK * ATTENTION_BLOCK
        rows = np.clip(whole_blocks, 0, lengths[:, part])
        kept += rows * (before + (rows + ATTENTION_BLOCK) / 2)
    return kept


def attention_values(load: Load, projection: Weight) -> float:
    """What autograd keeps of attention up to its output projection, in values of the dtype."""
    rows = projection.rows
    width = projection.shape[1]
    on_gpu = load.device == "cuda"
    values = 0.0
    if projection.reached:
        key_width = load.shapes[projection.name.replace("o_proj", "k_proj")][0]
        # In fp32: the probabilities, or FlexAttention's sum of each row.
        in_fp32 = load.heads * rows * (1.0 if on_gpu else load.keys)
        values += rows * width + 2 * load.tokens * key_width + in_fp32 * 4 / load.dtype.itemsize
    if projection.trains or (projection.reached and on_gpu):  # the output, which both keep
        values += rows * width
    return values


def saved_bytes(load: Load) -> list[float]:
    """What autograd keeps of each block between forward and backward, in bytes, and last of what
    comes after the blocks.

    Every tensor that an operation needs again is counted once: the inputs of norms, of trained
    weights and of the functions of kernels.py. A frozen weight needs no input.
    """
    saved: dict[tuple[int, str, int], float] = {}  # (block, tensor, rows) -> values
    for weight in load.walk():
        width = weight.shape[-1]
        place = (weight.block, INPUTS.get(weight.module, weight.module), weight.rows)
        flows = weight.trains or weight.reached
        if weight.module == "o_proj":
            saved[place] = attention_values(load, weight)
        elif weight.module == "down_proj" and flows:
            saved[place] = 2 * weight.rows * width  # gate and up
        elif weight.module.endswith("norm") and flows:  # of a stream, or of what a projection gives
            saved[place] = weight.rows * load.shapes[weight.name.replace("_norm", "_proj")][0]
        elif weight.module in INPUTS and weight.trains:
            saved[place] = weight.rows * width
    hidden = load.values(["model.norm.weight"]) * load.scored
    saved[load.blocks, "head", load.scored] = hidden  # its input, or the gradient by it
    by_block = [0.0] * (load.blocks + 1)
    for (block, _, _), values in saved.items():
        by_block[block] += values * load.dtype.itemsize
    return by_block


def head_work(load: Load) -> float:
    """Bytes that the head works in beside what it keeps: a chunk of logits twice, the hidden state
    and its gradient, and its weight's gradient where that trains.
    """
    V, D = load.shapes[load.head]
    e = load.dtype.itemsize
    trains = load.head in load.trained
    chunk = HEAD_CHUNK["cuda" if trains else load.device]
    work = 8 * min(load.scored * V, max(V, chunk)) + 2 * load.scored * D * e
    if trains:  # summed in fp32
        work += V * D * (4 if e == 4 else 4 + e)
    return work


def block_work(load: Load, rows: int) -> float:
    """Bytes that the backward pass of a block of so many rows works in: three tensors of SwiGLU's,
    the gradient of the hidden state, and the one of down_proj.
    """
    down = "model.layers.0.mlp.down_proj.weight"
    D, F = load.shapes[down]
    at_once = rows
    if load.device == "cpu" and load.dtype == torch.float32:
        at_once = min(rows, MLP_ROWS)
    values = 3 * F * at_once + D * rows
    if down in load.trained:
        values += D * F
    return float(values * load.dtype.itemsize)


def gathered_bytes(load: Load) -> tuple[int, int, int]:
    """Bytes that FSDP2 makes: of the weights outside the blocks, of a block's, and of the larger
    unit's gradients, as they came and in fp32.
    """
    e = load.dtype.itemsize
    names = frozenset(load.shapes)
    if max(load.shards, load.processes) == 1:  # it has only the weights whose dtype it casts
        names = load.trained if e < 4 else frozenset()
    root = {name for name in names if ".layers." not in name}
    block = {name for name in names if ".layers.0." in name}
    unit = max(load.values(root & load.trained), load.values(block & load.trained))
    return e * load.values(root), e * load.values(block), (4 + e) * unit


def gradient_sizes(load: Load) -> list[int]:
    """Bytes of each trained tensor's gradient on a rank."""
    return [4 * load.values([name], load.shards) for name in load.trained]


def checkpoint_held(load: Load, activations: float) -> Held:
    """What a CPU holds while a checkpoint is written: a file's bytes, twice, on top of the step's
    freed memory, of which glibc keeps all but the largest tensors.
    """
    sizes = gradient_sizes(load)
    file = min(3 * sum(sizes), max(*sizes, CHECKPOINT_FILE_BYTES))
    kernels = KERNEL_BYTES if load.dtype == torch.bfloat16 else 0
    largest = LARGEST_KEPT if load.processes == 1 else LARGEST_OF_SEVERAL
    small = sum(size for size in sizes if size <= largest)
    return small, 0, activations, 2 * file + kernels


def moments(load: Load) -> dict[str, Moment]:
    """Moment of a step -> what a rank holds then, in bytes by kind, as train.py, FSDP2 and AdamW go
    through it.
    """
    e = load.dtype.itemsize
    root, block, reduction = gathered_bytes(load)
    ahead = block if load.shards > 1 else 0  # the next block, on its way
    saved = saved_bytes(load)
    kept = sum(saved[:-1])
    if load.checkpoint_blocks:  # the blocks' inputs, and one block computed again
        inputs = load.tokens * load.values(["model.norm.weight"]) * load.blocks
        kept = e * inputs + max(saved[:-1])
    trained = load.values(load.trained, load.shards)
    gradients = 4 * trained
    earlier = gradients if load.packs > 1 else 0  # of the packs before
    # The last block works on the scored rows; the head's gradient waits for the embedding's.
    at_start = block_work(load, load.scored) + e * load.values({load.head} & load.trained)
    at_end = max(block_work(load, load.tokens), reduction)

    held: dict[str, Held] = {
        "the head": (earlier, root + ahead, kept + saved[-1], head_work(load)),
        "backward, its start": (earlier, root + block + ahead, kept, at_start),
        "backward, its end": (gradients, root + block, saved[0], at_end),
        "the optimizer": (gradients, 0, 0, gradients),  # foreach
    }
    if load.device == "cpu":
        held["the optimizer"] = (gradients, 0, 0, 2 * max(gradient_sizes(load)))  # one at a time
        held["a checkpoint"] = checkpoint_held(load, kept + saved[-1])
    frozen = load.values(load.shapes.keys() - load.trained, load.shards)
    fixed = (e * frozen, 4 * trained, 8 * trained)
    found = {name: dict(zip(KINDS, fixed + rest, strict=True)) for name, rest in held.items()}
    if load.device == "cpu" and load.processes > 1:
        for kinds in found.values():
            kinds["gaps in the heap"] = GAPS_OF_SEVERAL * sum(kinds.values())
    return found


def fullest(load: Load) -> tuple[str, Moment]:
    """The moment of a step at which a rank holds most, and what it holds then."""
    return max(moments(load).items(), key=lambda entry: sum(entry[1].values()))


def needed(load: Load) -> float:
    """Bytes that a rank holds at the fullest moment of a step."""
    return sum(fullest(load)[1].values())


def free_bytes(device: torch.device) -> int:
    """Memory that one process may take now: the GPU's, or its share of what the processes of this
    machine may have together.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    table = Path("/proc/meminfo")
    if table.exists():
        available = table.read_text(encoding="utf-8").split("MemAvailable:")[1]
        free = int(available.split()[0]) * 1024
    return free // launched("LOCAL_WORLD_SIZE", 1)


# --- time -----------------------------------------------------------------------------------------


def operations(load: Load) -> tuple[float, float]:
    """Floating-point operations of a pack's forward, and of its backward; attention's, a few
    percent below 2,000 tokens, are left out.
    """
    forward = backward = 0.0
    for weight in load.walk():
        is_head = weight.name == load.head
        if len(weight.shape) == 1 or (weight.module == "embed_tokens" and not is_head):
            continue
        rows = load.scored if is_head else weight.rows
        product = 2.0 * rows * math.prod(weight.shape)
        forward += product
        if weight.reached or is_head:
            backward += product
        if weight.trains:
            backward += product
        if load.checkpoint_blocks and 0 <= weight.block < load.blocks:
            backward += product
    return forward, backward


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product here, one process, its usual threads: the best
    of three.
    """
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for it
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:])


# --- disk -----------------------------------------------------------------------------------------


def disk_bytes(
    shapes: Mapping[str, tuple[int, ...]], trained: frozenset[str], keep: int, dtype: torch.dtype
) -> int:
    """What the run folder may hold at once: `keep` checkpoints (12 bytes a trained value), one more
    while it is written, and the exported model in `dtype`.
    """
    trained_values = sum(math.prod(shapes[name]) for name in trained)
    values = sum(math.prod(shape) for shape in shapes.values())
    return 12 * trained_values * (keep + 1) + dtype.itemsize * values


# --- the plan of a run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What the data makes of a step, on one rank."""

    longest: int  # tokens of the longest row
    share: int  # tokens of a rank in the largest step
    scored: float  # share of the tokens that are scored
    keys: float = 0.0  # as Load's

    def with_budget(self, load: Load, pack_tokens: int) -> Load:
        """The load of packs of at most `pack_tokens` tokens; a longer row is a pack alone, and no
        pack holds more than the step.
        """
        tokens = min(max(pack_tokens, self.longest), self.share)
        return replace(
            load,
            tokens=tokens,
            scored=math.ceil(tokens * self.scored),
            packs=math.ceil(self.share / tokens),
            keys=self.keys,
        )

    def fits(self, load: Load, pack_tokens: int, room: float) -> bool:
        """Whether a rank's memory at this budget is at most `room`."""
        return needed(self.with_budget(load, pack_tokens)) <= room

    def largest_budget(self, load: Load, room: float) -> int:
        """The largest pack_tokens that fits, 0 if there is none. A single pack may need less than
        two smaller ones, which hold gradients beside each other.
        """
        if self.fits(load, self.share, room):
            return self.share
        if not self.fits(load, self.longest, room):
            return 0
        low = self.longest
        high = self.share
        while high - low > 1:
            middle = (low + high) // 2
            if self.fits(load, middle, room):
                low = middle
            else:
                high = middle
        return low


def step_of(lengths: np.ndarray, drawn: Sequence[np.ndarray], ranks: int) -> Step:
    """From the rows' lengths [n, prompt and responses], and the rows that each of the first steps
    draws.
    """
    tokens = lengths.sum(1)
    longest = int(tokens.max())
    largest_step = max(int(tokens[rows].sum()) for rows in drawn)
    return Step(
        longest=longest,
        share=max(longest, math.ceil(largest_step / ranks)),
        scored=int(lengths[:, 1:].sum()) / int(lengths.sum()),
        keys=float(kept_keys(lengths).sum()) / int(lengths.sum()),
    )


def remedies(load: Load, step: Step, pack_tokens: int, room: float) -> list[str]:
    """The settings that would make the run fit."""
    changes = []
    best = step.largest_budget(load, room)
    if best:
        changes.append(f"--pack_tokens {best}")
    light = replace(load, checkpoint_blocks=True)
    budget = pack_tokens
    if not step.fits(light, budget, room):
        budget = step.largest_budget(light, room)
    if budget and not load.checkpoint_blocks:
        changes.append(f"--checkpoint_blocks with --pack_tokens {budget}")
    for times in (2**k for k in range(1, 11)):
        if step.fits(replace(load, shards=load.shards * times), pack_tokens, room):
            changes.append(f"{times} times as many processes")
            break
    return changes or ["a smaller model"]


def memory_lines(load: Load, step: Step, pack_tokens: int, room: float) -> tuple[list[str], str]:
    """The table, and what does not fit, with what to change; "" when all fits."""
    load = step.with_budget(load, pack_tokens)
    name, held = fullest(load)
    total = sum(held.values())
    lines = [f"  {size / GIB:9.2f}  {kind}" for kind, size in held.items()]
    kept = held["saved activations"] / load.tokens / 2**20
    lines.append(
        f"  {total / GIB:9.2f}  in all, at the fullest moment ({name}; pack of {load.tokens:,} "
        f"tokens, {kept:.2f} MiB saved each; {load.packs} packs a step), of {room / GIB:.2f} usable"
    )
    if total > room:
        change = ", or ".join(remedies(load, step, pack_tokens, room))
        need = f"{total / GIB:.2f} GiB are needed and {room / GIB:.2f} usable"
        return lines, f"memory: {need}; pass {change}"
    best = step.largest_budget(load, room)
    return [*lines, f"  it fits, up to --pack_tokens {best:,}"], ""


def clock_line(
    load: Load, device: torch.device, ranks: int, steps: int, step_tokens: float, reference: int
) -> str:
    """The time that steps take, and the reference of so many tokens, at the rate of products."""
    rate = product_rate(device, load.dtype) * ranks
    seconds_a_token = 1 / load.tokens / rate / RATE_SHARE
    forward, backward = operations(load)
    training = steps * step_tokens * (forward + backward) * seconds_a_token
    line = f"  time {duration(training)} for {steps:,} steps of {step_tokens:,.0f} tokens"
    if reference:
        line += f", {duration(reference * forward * seconds_a_token)} for the reference"
    return (
        f"{line}, if half of the {rate / 1e12:.3g} TFLOP/s"
        " that matrix products reach here is reached"
    )


class Work(NamedTuple):
    """What a run does beside its memory."""

    steps: int
    step_tokens: float  # of all ranks, on average
    reference_tokens: int  # that the reference scores, 0 without one
    disk_bytes: int  # of checkpoints and the exported model
    cache_bytes: int


def describe(
    load: Load, step: Step, pack_tokens: int, work: Work, device: torch.device
) -> tuple[str, str]:
    """The plan in words, a line if it is under 1 GiB; and what does not fit, "" when all fits."""
    room = USABLE * free_bytes(device)
    clock = clock_line(
        load, device, load.processes, work.steps, work.step_tokens, work.reference_tokens
    )
    disk = f"disk up to {work.disk_bytes / 1e9:.3g} GB"
    moment, held = fullest(load)
    gib = sum(held.values()) / GIB
    if gib < min(1.0, room / GIB):
        where = f"on each of {load.processes} processes, at the fullest moment ({moment})"
        return f"plan: {gib:.2f} GiB {where}; {clock.strip()}; {disk}", ""
    memory, short = memory_lines(load, step, pack_tokens, room)
    dtype = str(load.dtype).removeprefix("torch.")
    lines = [
        f"plan: GiB on each of {load.processes} processes, computing in {dtype}; from shapes "
        "alone, before anything is allocated",
        *memory,
        clock,
        f"  {disk} for checkpoints and the exported model, and in the cache "
        f"{work.cache_bytes / 1e9:.3g} GB of tokens and reference log-probabilities",
    ]
    return "\n".join(lines), short
