"""support/memory_plan.py against what autograd keeps, against the memory of real runs, and on the
paper's recipe at 7B.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import train
from model import Config, Mistral, Pack, visible
from support import distributed, memory_plan
from support.kernels import ATTENTION_BLOCK, KEPT_KEYS, blocked_plan
from support.memory_plan import Load, Step

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import load
import memory

SMALL = Config(1000, 256, 640, 4, 8, 2, 32)
SEVEN_B = Config(32000, 4096, 14336, 32, 32, 8, 128)
# The public pairs' means: 213 tokens of prompt, 173 and 160 of answers; at max length 1024 the
# longest pair is 2 + 2 x 1022.
PAPER = Step(longest=2046, share=64 * 546, scored=333 / 546)


def trained(config: Config, selective: str) -> frozenset[str]:
    return frozenset(name for name in config.shapes() if selective in ("all", name.split(".")[-2]))


def load_of(config: Config, trained: frozenset[str], dtype: torch.dtype, **changes: Any) -> Load:
    return replace(
        Load(config.shapes(), config.num_attention_heads, trained, dtype, "cpu"), **changes
    )


def seven_b(shards: int = 1, device: str = "cuda") -> Load:
    down = trained(SEVEN_B, "down_proj")
    return load_of(SEVEN_B, down, torch.bfloat16, device=device, shards=shards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "selective", ["down_proj", "all", "q_proj", "o_proj", "gate_proj", "input_layernorm", "lm_head"]
)
def test_saved_activations_are_what_autograd_keeps(selective: str, dtype: torch.dtype) -> None:
    """Claim: saved_bytes counts the tensors that autograd keeps. Oracle: torch's saved-tensor
    hooks, each storage once, parameters left out. 4 %: rotary tables, row indices and the norms'
    scales are not in the plan; they weigh most in a model this narrow.
    """
    model = Mistral(SMALL).to(dtype)
    names = trained(SMALL, selective)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    generator = torch.Generator().manual_seed(0)
    trees = [
        [torch.randint(0, 1000, (n,), generator=generator).numpy() for n in tree]
        for tree in [(60, 70, 80), (50, 100, 40)]
    ]
    pack, weights = Pack.build(trees), {p.data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.logprobs(pack)
    tokens = len(pack.tokens)
    keys = memory_plan.kept_keys(np.array(pack.lengths)).sum() / tokens
    load = load_of(SMALL, names, dtype, tokens=tokens, scored=len(pack.rows), keys=keys)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert sum(memory_plan.saved_bytes(load)) == pytest.approx(measured, rel=0.04)


def test_kept_keys_are_those_of_the_blocks() -> None:
    """Claim: the probabilities that attention on a CPU keeps are counted within 5 %. Oracle: the
    blocks of its plan, a tree at a time. A part's last block is counted as if it were a whole one.
    """
    draw = np.random.default_rng(0)
    lengths = draw.integers((50, 50, 50), (600, 500, 500), (40, 3)).astype(np.int32)
    expected = 0
    for sizes in lengths.tolist():
        pack = Pack.build([[[0] * n for n in sizes]])
        rows = torch.arange(len(pack.tokens))
        plan = blocked_plan(pack.lengths, visible(pack, None), rows, False, None)
        for _, blocks in plan:
            for own, seen, _ in blocks:
                keys = seen.stop - seen.start
                expected += (own.stop - own.start) * keys * (keys <= KEPT_KEYS)
    assert lengths[:, :2].sum(1).max() > KEPT_KEYS + ATTENTION_BLOCK
    assert memory_plan.kept_keys(lengths).sum() == pytest.approx(expected, rel=0.05)


def test_paper_recipe_at_7b_fits_one_80_gb_gpu() -> None:
    """Claim: 32 + 32 pairs a step fit 80e9 bytes at train.py's default pack budget, accumulated
    over packs; the state is 12 + 4 bytes a trained value and 2 a frozen one; twice the packs hold
    no more; four processes hold about a quarter of the state. Oracle: arithmetic.
    """
    load = PAPER.with_budget(seven_b(), train.PACK_TOKENS["cuda"])
    held = memory_plan.fullest(load)[1]
    values = sum(torch.Size(shape).numel() for shape in SEVEN_B.shapes().values())
    down = 32 * 4096 * 14336
    assert held["frozen weights"] == 2 * (values - down)
    assert (
        held["trained weights, fp32"] + held["Adam moments, fp32"] + held["gradients, fp32"]
        == 16 * down
    )
    room = memory_plan.USABLE * 80e9
    lines, short = memory_plan.memory_lines(load, PAPER, 8192, room)
    assert load.packs == 5 and not short and "it fits, up to --pack_tokens" in lines[-1]
    best = PAPER.largest_budget(load, room)
    assert (
        memory_plan.needed(PAPER.with_budget(load, best))
        <= room
        < memory_plan.needed(PAPER.with_budget(load, best + 1))
    )
    assert memory_plan.needed(replace(load, packs=10)) == memory_plan.needed(load)
    four = memory_plan.fullest(replace(load, shards=4))[1]
    assert (
        four["frozen weights"] == held["frozen weights"] / 4
        and four["Adam moments, fp32"] == held["Adam moments, fp32"] / 4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_gathered_is_what_fsdp2_has(dtype: torch.dtype) -> None:
    """Claim: one process gathers a block's trained weights in bfloat16, where they are cast, and
    nothing in fp32; more processes gather whole blocks. Oracle: the parameters that
    train.shard gives to FSDP2.
    """
    config = Config(61, 32, 48, 2, 4, 2, 8)
    down = trained(config, "down_proj")
    alone = load_of(config, down, dtype, tokens=100, scored=50, packs=2)
    with torch.device("meta"):
        model = Mistral(config).to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(name in alone.trained)
        p.data = p.data.float() if name in alone.trained else p.data
    train.shard(model, distributed.start("cpu"), dtype)
    assert isinstance(model, FSDPModule) and all(
        isinstance(block, FSDPModule) for block in model.model.layers
    )
    managed = sum(p.numel() for p in model.model.layers[0].parameters() if isinstance(p, DTensor))
    assert managed == (32 * 48 if dtype == torch.bfloat16 else 0)
    assert (
        max(moment["gathered layers"] for moment in memory_plan.moments(alone).values())
        == managed * dtype.itemsize
    )
    whole = sum(
        p.numel() for name, p in model.named_parameters() if ".layers.1." not in name
    )  # the root and a block
    copies = max(
        moment["gathered layers"]
        for moment in memory_plan.moments(replace(alone, processes=2)).values()
    )
    assert copies == whole * dtype.itemsize


def test_what_does_not_fit_is_told_what_to_change() -> None:
    """Claim: on 40 GB the recipe does not fit one process, and the remedy named fits; a budget that
    is too large is told a smaller one.
    """
    lines, short = memory_plan.memory_lines(seven_b(), PAPER, 8192, 0.95 * 40e9)
    assert "usable; pass 4 times as many processes" in short and "fits" not in lines[-1]
    assert (
        memory_plan.needed(PAPER.with_budget(seven_b(4), 8192))
        <= 0.95 * 40e9
        < memory_plan.needed(PAPER.with_budget(seven_b(2), 8192))
    )
    _, short = memory_plan.memory_lines(seven_b(), PAPER, 30000, 0.95 * 80e9)
    assert (
        f"--pack_tokens {PAPER.largest_budget(seven_b(), 0.95 * 80e9)}" in short
        and "--checkpoint_blocks" in short
    )


def test_one_pack_may_fit_where_two_do_not() -> None:
    """Claim: where gradients weigh more than activations, a step in one pack needs less than in
    two, and that pack is what is named: the largest budget where all fits, the remedy where it does
    not. Oracle: the plan's own needs, room between the two.
    """
    load = replace(seven_b(8), trained=trained(SEVEN_B, "all"), processes=8)
    step = Step(longest=2046, share=2511, scored=0.6)
    one, two = (memory_plan.needed(step.with_budget(load, budget)) for budget in (2511, 2046))
    assert one < two
    room = (one + two) / 2
    assert step.largest_budget(load, room) == 2511
    lines, short = memory_plan.memory_lines(load, step, 8192, room)
    assert not short and lines[-1] == "  it fits, up to --pack_tokens 2,511"
    assert "pass --pack_tokens 2511" in memory_plan.memory_lines(load, step, 2046, room)[1]
    less = replace(load, trained=trained(SEVEN_B, "down_proj"))
    light = [
        memory_plan.needed(step.with_budget(replace(less, checkpoint_blocks=True), budget))
        for budget in (2511, 2046)
    ]
    short = memory_plan.memory_lines(less, step, 2046, sum(light) / 2)[1]
    assert light[0] < light[1] and "--checkpoint_blocks with --pack_tokens 2511" in short


def test_operations_are_those_of_the_arithmetic() -> None:
    """Claim: forward and backward of the mean pair at 7B are 17.1 TFLOP in all. Oracle: 2 T B for
    the forward of all rows; with the head, the last layer's pruned rows, the frozen layers' single
    backward product and down_proj's second one, by hand.
    """
    T, S, D, F, kv, V, L = 5460, 3330, 4096, 14336, 1024, 32000, 32
    forward, backward = memory_plan.operations(replace(seven_b(), tokens=T, scored=S))
    every, scored = 2 * D * kv, 2 * D * D + 3 * D * F  # k and v; the rest of a block
    assert forward == 2 * (T * L * every + (T * (L - 1) + S) * scored + S * V * D)
    first = T * (
        2 * D * D + every + 3 * D * F
    )  # nothing trains below block 0's down_proj: only its weight gradient
    assert backward == forward - 2 * first + 2 * (T * (L - 1) + S) * D * F


LONGER = [name for name in memory.CASES if name != "deep"]


@pytest.mark.slow  # half a minute each: a run as a user starts it
@pytest.mark.parametrize(
    "name",
    ["deep", *LONGER],
)
def test_plan_agrees_with_the_measured_peak(name: str) -> None:
    """Claim: the plan is within 15 % of the most anonymous memory that a run of train.py takes,
    loading to export, as a user starts it. Oracle: the system.
    """
    found = memory.measure(memory.CASES[name])
    assert found["measured_mib"] > 300 * 1e6 / 2**20
    assert found["plan_mib"] == pytest.approx(found["measured_mib"], rel=0.15)


@pytest.mark.slow  # twenty seconds: four processes
def test_no_rank_holds_the_whole_model(tmp_path: Path) -> None:
    """Claim: filling a sharded model takes a rank its shard and one tensor, nowhere near the whole.
    Oracle: the system's count of its anonymous memory. 64 MiB: what FSDP2 and safetensors make on
    the way, 26 MiB with a model of 3.
    """
    config = Config(2000, 1024, 3584, 16, 16, 4, 64)
    load.write_checkpoint(tmp_path / "model", config)
    whole = 2 * sum(map(math.prod, config.shapes().values())) / 2**20
    largest = 2 * max(map(math.prod, config.shapes().values())) / 2**20
    taken = load.measure("ours, 4 processes", tmp_path / "model", cold=False)["memory_mib"]
    assert whole / 4 < taken < whole / 4 + largest + 64 < whole / 2
