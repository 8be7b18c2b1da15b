"""What a training run will need: memory of each process, time and disk, from shapes alone, before
anything is allocated.

    python train.py bfpo --dry_run ...              prints the plan, and trains nothing
    python benchmarks/memory.py                     the plan beside what was measured

A step is walked through moment by moment, and the plan is its fullest one. The head, each block's
backward, the embedding's gradient and the optimizer each hold something that the others do not:
which is fullest depends on the model, on what trains and on the pack. Counted is what tensors hold;
the process itself, a GPU's context and the allocators' gaps come on top (USABLE).
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions. Here also: S scored
# rows.

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from support.distributed import duration, launched
from support.kernels import HEAD_CHUNK, MLP_ROWS
from support.storage import CHECKPOINT_FILE_BYTES

GIB = 2**30
USABLE = 0.95  # of the free memory; the rest is for what no tensor holds
RATE_SHARE = (
    0.5  # of the rate of a large matrix product, reached by a whole step: assumed, not measured
)
STEPS_LOOKED_AT = 100  # for the largest step

Moment = dict[str, float]  # what is held -> bytes


def _place(name: str) -> tuple[int, int]:
    """Where the forward comes to a weight: the embedding, the blocks, the last norm, the head."""
    if ".layers." in name:
        return 1, int(name.split(".")[2])
    return {"embed_tokens": 0, "norm": 2, "lm_head": 3}[name.split(".")[-2]], 0


class Architecture(Protocol):
    """What the plan asks of a model: the sizes in config.json, and its tensors' shapes by name."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...


@dataclass(frozen=True)
class Load:
    """All that a rank's memory depends on."""

    model: Architecture
    trained: frozenset[str]
    dtype: (
        torch.dtype
    )  # of the computation and of frozen weights; trained ones and their moments are fp32
    device: str  # cpu or cuda
    shards: int  # ranks that every parameter is shared out over
    tokens: int  # T, of the largest pack
    scored: int  # S, of that pack
    packs: int  # of a rank in a step: with two or more, gradients are there while activations are
    checkpoint_blocks: bool
    processes: int = 1  # of the run: FSDP2 gathers copies of a model too

    def walk(self) -> Iterator[tuple[str, int, tuple[int, ...], int, bool]]:
        """(name, block or -1, shape, rows, reached) of each weight in the order of the forward.
        reached: the gradient goes on below it.
        """
        reached, last = False, self.model.num_hidden_layers - 1
        for name, shape in sorted(self.model.shapes().items(), key=lambda entry: _place(entry[0])):
            block = int(name.split(".")[2]) if ".layers." in name else -1
            everywhere = name.split(".")[-2] in (
                "embed_tokens",
                "input_layernorm",
                "k_proj",
                "v_proj",
            )
            rows = self.tokens if everywhere or 0 <= block < last else self.scored
            yield name, block, shape, rows, reached
            reached = reached or name in self.trained

    def head(self) -> str:
        return "model.embed_tokens.weight" if self.model.tie_word_embeddings else "lm_head.weight"


# --- memory ---------------------------------------------------------------------------------------


def saved_bytes(load: Load) -> list[float]:
    """What autograd keeps of each block between forward and backward, in bytes, and last of what
    comes after the blocks.

    Every tensor that an operation needs again is counted once: the inputs of norms, of trained
    weights and of the functions of kernels.py. A frozen weight needs no input.
    """
    c, e, cuda = load.model, load.dtype.itemsize, load.device == "cuda"
    T, S, D, F = load.tokens, load.scored, c.hidden_size, c.intermediate_size
    H, HK, GK = (
        c.num_attention_heads,
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
    )
    kept = [0.0] * (c.num_hidden_layers + 1)
    inputs: set[tuple[int, int]] = (
        set()
    )  # of the q, k, v and of the gate, up projections: one tensor, kept once
    for name, block, _, rows, reached in load.walk():
        module, trains = name.split(".")[-2], name in load.trained
        flows = reached or trains
        if module.endswith("norm"):
            kept[block] += flows * rows * D * e
        elif module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and trains:
            part = (block, rows if module[0] in "qkv" else -1)
            kept[block] += 0 if part in inputs else rows * D * e
            inputs.add(part)
        elif module == "o_proj":
            attention = (
                rows * HK + 2 * T * GK + (rows * HK if cuda else 0)
            )  # q, k, v; FlexAttention its output and a sum a row too
            flows = reached  # nothing below it needs its gradient otherwise
            sums = 4 * H * rows if cuda else 0
            kept[block] += (
                flows * (attention * e + sums) + (trains and not (cuda and flows)) * rows * HK * e
            )
        elif module == "down_proj":
            kept[block] += flows * 2 * rows * F * e  # gate and up
    kept[-1] += S * D * e  # the head: its input, or the gradient by it
    return kept


def moments(load: Load) -> dict[str, Moment]:
    """Moment of a step -> what a rank holds then, in bytes by kind, as train.py, FSDP2 and AdamW go
    through it.
    """
    c, e, cuda = load.model, load.dtype.itemsize, load.device == "cuda"
    T, S, D, F, V, L = (
        load.tokens,
        load.scored,
        c.hidden_size,
        c.intermediate_size,
        c.vocab_size,
        c.num_hidden_layers,
    )
    whole, whole_trained = [0] * (L + 1), [0] * (L + 1)  # elements by block, and last of the root
    shard, shard_trained = (
        [0] * (L + 1),
        [0] * (L + 1),
    )  # of them on one rank; the largest trained tensor
    largest = 0
    for name, block, shape, *_ in load.walk():
        part = math.ceil(shape[0] / load.shards) * math.prod(shape[1:])
        whole[block] += math.prod(shape)
        shard[block] += part
        if name in load.trained:
            whole_trained[block] += math.prod(shape)
            shard_trained[block] += part
            largest = max(largest, part)
    trained = sum(shard_trained)
    fixed: Moment = {
        "frozen weights": e * (sum(shard) - trained),
        "trained weights, fp32": 4 * trained,
        "Adam moments, fp32": 8 * trained,
    }
    alone = max(load.shards, load.processes) == 1
    sharded = (
        not alone or e < 4
    )  # what FSDP2 has of the trained weights; runtime.shard keeps a single process's frozen ones from it
    root, here = (sharded * e * (whole_trained if alone else whole)[i] for i in (-1, 0))  # gathered
    ahead = here * (load.shards > 1)  # the next block, on its way
    saved = saved_bytes(load)
    kept = [e * T * D] * L if load.checkpoint_blocks else saved[:L]
    earlier = 4 * trained if load.packs > 1 else 0  # gradients of the packs before

    found: dict[str, Moment] = {}

    def note(
        name: str, gradients: float, gathered: float, activations: float, workspace: float
    ) -> None:
        held = fixed | {
            "gradients, fp32": gradients,
            "gathered layers": gathered,
            "saved activations": activations,
        }
        found[name] = held | {"workspace": workspace}

    head_trains = load.head() in load.trained
    rows = min(S, max(1, HEAD_CHUNK["cuda" if head_trains else load.device] // V))
    head = e * V * D if head_trains else 0  # its gradient waits for the embedding's
    summed = (
        0 if not head_trains else head if e == 4 else (4 + e) * V * D
    )  # in fp32, by products in the weight's dtype
    note(
        "the head",
        earlier,
        root + ahead,
        sum(kept) + saved[-1],
        8 * rows * V + summed + 2 * S * D * e,
    )
    for i in reversed(range(L)):
        rows = S if i == L - 1 else T
        pointwise = (
            3 * F * (min(rows, MLP_ROWS) if load.device == "cpu" and e == 4 else rows)
        )  # of SwiGLU's backward
        down = e * D * F if f"model.layers.{i}.mlp.down_proj.weight" in load.trained else 0
        waiting = (
            sharded * 4 * whole_trained[i + 1] if i < L - 1 else 0
        )  # the last reduction's input, freed by the next
        now = max(earlier, 4 * sum(shard_trained[i + 1 : L]))
        below = sum(kept[:i]) + load.checkpoint_blocks * kept[i]
        note(
            f"backward of block {i}",
            now,
            root + here + ahead,
            below + saved[i],
            e * (pointwise + rows * D) + waiting + down + head,
        )
        fresh = 4 * shard_trained[i]
        reduction = sharded * (
            4 * whole_trained[i]
            + max(e * whole_trained[i] - (0 if earlier else fresh), fresh if earlier else 0)
        )
        note(
            f"gradients of block {i}",
            max(earlier, 4 * sum(shard_trained[i:L])),
            root,
            below,
            reduction + head + T * D * e,
        )
    inside = max(earlier, 4 * sum(shard_trained[:L]))
    note(
        "the embedding's gradient",
        inside,
        root,
        0,
        e * whole_trained[-1] + sharded * 4 * whole_trained[0],
    )
    fresh = 4 * shard_trained[-1]
    reduction = sharded * (
        4 * whole_trained[-1]
        + max(e * whole_trained[-1] - (0 if earlier else fresh), fresh if earlier else 0)
    )
    note("gradients outside the blocks", 4 * trained, 0, 0, reduction)
    note(
        "the optimizer", 4 * trained, 0, 0, 4 * trained if cuda else 8 * largest
    )  # foreach on a GPU, a tensor at a time on a CPU
    if not cuda:
        note(
            "a checkpoint", 0, 0, 0, 2 * min(12 * trained, max(4 * largest, CHECKPOINT_FILE_BYTES))
        )  # a file's bytes, twice
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
    lines = (
        Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/meminfo").exists()
        else []
    )
    free = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return (free or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // launched(
        "LOCAL_WORLD_SIZE", 1
    )


# --- time -----------------------------------------------------------------------------------------


def operations(load: Load) -> tuple[float, float]:
    """Floating-point operations of a pack's forward, and of its backward; attention's, a few
    percent below 2,000 tokens, are left out.
    """
    forward = backward = again = 0.0
    for name, block, shape, rows, reached in load.walk():
        if len(shape) == 2 and (name == load.head() or "embed_tokens" not in name):
            product = 2.0 * (load.scored if name == load.head() else rows) * math.prod(shape)
            forward += product
            backward += product * ((reached or name == load.head()) + (name in load.trained))
            again += product * (block >= 0 and load.checkpoint_blocks)
    return forward, backward + again


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product here, one process, its usual threads: the best
    of three.
    """
    n = 4096 if device.type == "cuda" else 1024
    a, times = torch.ones(n, n, dtype=dtype, device=device), []
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
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    values = sum(sizes[name] for name in trained)
    return 12 * values * (keep + 1) + dtype.itemsize * sum(sizes.values())


# --- the plan of a run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What the data makes of a step, on one rank."""

    longest: int  # tokens of the longest row
    share: int  # tokens of a rank in the largest step
    scored: float  # share of the tokens that are scored

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
        )

    def largest_budget(self, load: Load, room: float) -> int:
        """The largest pack_tokens whose memory is at most `room`, 0 if there is none. A single pack
        may need less than two smaller ones, which hold gradients beside each other.
        """
        if needed(self.with_budget(load, self.share)) <= room:
            return self.share
        if needed(self.with_budget(load, self.longest)) > room:
            return 0
        low, high = self.longest, self.share + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if needed(self.with_budget(load, middle)) <= room else (low, middle)
            )
        return low


def step_of(lengths: np.ndarray, drawn: Sequence[np.ndarray], ranks: int) -> Step:
    """From the rows' lengths [n, prompt and responses], and the rows that each of the first steps
    draws.
    """
    trees = lengths.sum(1)
    longest = int(trees.max())
    largest_step = max(int(trees[rows].sum()) for rows in drawn)
    share = max(longest, math.ceil(largest_step / ranks))
    scored = int(lengths[:, 1:].sum()) / int(lengths.sum())
    return Step(longest, share, scored)


def memory_lines(load: Load, step: Step, pack_tokens: int, room: float) -> tuple[list[str], str]:
    """The table, and what does not fit, with what to change; "" when all fits."""
    load = step.with_budget(load, pack_tokens)
    name, held = fullest(load)
    total, best = sum(held.values()), step.largest_budget(load, room)
    lines = [f"  {held[kind] / GIB:9.2f}  {kind}" for kind in held]
    kept = held["saved activations"] / load.tokens / 2**20
    lines.append(
        f"  {total / GIB:9.2f}  in all, at the fullest moment ({name}; pack of {load.tokens:,} tokens, {kept:.2f} MiB saved each; "
        f"{load.packs} packs a step), of {room / GIB:.2f} usable"
    )
    if total <= room:
        several = needed(step.with_budget(load, step.longest)) <= room
        more = (
            f"up to --pack_tokens {best:,}"
            if best < step.share
            else "at any --pack_tokens"
            if several
            else "with a step in one pack"
        )
        return [*lines, f"  it fits, {more}"], ""
    remedies = [f"--pack_tokens {best}"] if best else []
    light = replace(load, checkpoint_blocks=True)
    lighter = (
        pack_tokens
        if needed(step.with_budget(light, pack_tokens)) <= room
        else step.largest_budget(light, room)
    )
    remedies += (
        [f"--checkpoint_blocks with --pack_tokens {lighter}"]
        if lighter and not load.checkpoint_blocks
        else []
    )
    ranks = (load.shards * 2**k for k in range(1, 11))
    enough = next(
        (
            n
            for n in ranks
            if needed(step.with_budget(replace(load, shards=n), pack_tokens)) <= room
        ),
        0,
    )
    remedies += [f"{enough // load.shards} times as many processes"] if enough else []
    change = ", or ".join(remedies) or "a smaller model"
    return (
        lines,
        f"memory: {total / GIB:.2f} GiB are needed and {room / GIB:.2f} usable; pass {change}",
    )


def clock_line(
    load: Load, device: torch.device, ranks: int, steps: int, step_tokens: float, reference: int
) -> str:
    """The time that the steps take, and the reference of so many tokens, at the rate of products."""
    rate = product_rate(device, load.dtype) * ranks
    forward, backward = (count / load.tokens / rate / RATE_SHARE for count in operations(load))
    line = (
        f"  time {duration(steps * step_tokens * (forward + backward))}"
        f" for {steps:,} steps of {step_tokens:,.0f} tokens"
    )
    if reference:
        line += f", {duration(reference * forward)} for the reference"
    return (
        f"{line}, if half of the {rate / 1e12:.3g} TFLOP/s"
        " that matrix products reach here is reached"
    )
