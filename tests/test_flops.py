"""What a training step costs: its operations against the arithmetic, and that it neither waits for
the device nor works token by token.

Deterministic counts on fixed batches, so that a change that loses speed is seen whatever the
machine's load.
"""

import gc
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Rows
from model import Config, Mistral, Pack
from support import kernels
from support.distributed import World
from support.storage import RunFolder

CONFIG = Config(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=224,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
)
LENGTHS = [
    (200, 165, 90),
    (130, 64, 1),
    (20, 10, 9),
    (3, 2, 4),
    (70, 150, 201),
]  # pairs as in the public data, and small ones


def product_flops(_total: Sequence[int], a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    return 2 * math.prod(a) * b[-1]


IN_PLACE = {
    torch.ops.aten.addmm_: product_flops,
    torch.ops.aten.baddbmm_: product_flops,
}  # torch counts these as zero
COUNTED = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_"}


def pack_of(lengths: Sequence[Sequence[int]]) -> Pack:
    rng = np.random.default_rng(0)
    return Pack.build([[rng.integers(3, CONFIG.vocab_size, n) for n in sizes] for sizes in lengths])


def selective_model(device: str = "cpu") -> Mistral:
    with torch.device(device):
        model = Mistral(CONFIG)
    if device == "cpu":
        model.init_weights(0)
    for name, p in model.named_parameters():
        p.requires_grad_("down_proj" in name)
    return model


class Seen(TorchDispatchMode):
    """Counts the operations on a device, by name."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.names[func._schema.name.removeprefix("aten::")] += any(
            x.device.type == self.device for x in tensors
        )
        return out


def counted_flops(compute: Callable[[], object]) -> int:
    """Operations of all matrix products.

    Fails on a product under a name that the counter does not know.
    """
    with Seen("cpu") as seen:
        compute()
    products = {
        name
        for name in seen.names
        if any(part in name for part in ("mm", "attention", "conv", "linear", "dot", "matmul"))
    }
    assert products <= COUNTED, products - COUNTED
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        compute()
    return counter.get_total_flops()


# --- operations -----------------------------------------------------------------------------------


def attended(lengths: Sequence[Sequence[int]], scored: bool) -> int:
    """(query, key) pairs whose scores are computed: whole blocks of 64 rows, each up to its last
    row's own key.
    """
    total = 0
    small = [sum(sizes) for sizes in lengths if sum(sizes) <= 64]
    assert small == [39, 9]  # neighbours: one block holds both
    rows = sum(sum(sizes[1:]) for sizes in lengths if sum(sizes) <= 64) if scored else sum(small)
    total += rows * sum(small)
    for prompt, *responses in (sizes for sizes in lengths if sum(sizes) > 64):
        for b, length in enumerate(responses):
            first = (
                0 if b == 0 and not scored else prompt
            )  # the prompt's rows are computed once, with the first response's
            keys = prompt + length - scored  # a scored row is the one before its target
            edges = [*range(first - scored if scored else first, keys, 64), keys]
            total += sum((end - start) * end for start, end in pairwise(edges))
    return total


def minimum(lengths: Sequence[Sequence[int]], backward: bool, pairs: tuple[float, float]) -> int:
    """The arithmetic of a step with down_proj trained alone: linear layers, response-only head,
    attention over `pairs` of (query, key), those of all rows and those of the scored rows. Without
    backward: of a reference pass.
    """
    D, inner, V, L = (
        CONFIG.hidden_size,
        CONFIG.intermediate_size,
        CONFIG.vocab_size,
        CONFIG.num_hidden_layers,
    )
    query, key = (
        CONFIG.num_attention_heads * CONFIG.head_dim,
        CONFIG.num_key_value_heads * CONFIG.head_dim,
    )
    T, S = sum(map(sum, lengths)), sum(sum(sizes[1:]) for sizes in lengths)
    q_o, k_v, gate_up, down = 2 * D * query, 2 * D * key, 2 * D * inner, D * inner
    block = q_o + k_v + gate_up + down
    every, scored = pairs
    flops = (
        2 * T * (L - 1) * block + 2 * T * k_v + 2 * S * (block - k_v)
    )  # the last block: scored rows, but keys and values of all
    flops += 2 * S * V * D + 4 * query * ((L - 1) * every + scored)
    if backward:
        flops += (
            2 * T * (L - 2) * block + 2 * T * k_v + 2 * S * (block - k_v)
        )  # below the first down_proj nothing trains
        flops += 2 * T * (L - 1) * down + 2 * S * down  # its own gradient
        flops += 2 * S * V * D + 8 * query * ((L - 2) * every + scored)  # probabilities are kept
    return round(flops)


def exact_pairs(lengths: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(query, key) pairs that the definition lets see each other: of all rows, and of the scored
    ones.
    """
    every = scored = 0
    for p, *responses in lengths:
        every += p * (p + 1) // 2
        for r in responses:
            every += r * p + r * (r + 1) // 2
            scored += r * p + r * (r - 1) // 2  # rows p - 1 to p + r - 2 of the path
    return every, scored


@pytest.mark.parametrize("backward", [True, False])
def test_a_step_does_the_arithmetic_and_no_more(backward: bool) -> None:
    """Claim: matrix products of a training step, and of a reference pass, are exactly the
    arithmetic's, attention by blocks of 64 rows. Oracle: the closed form above; torch's counter,
    in-place products added. Blocks compute 32 masked keys a row at the diagonal, which at this
    small width, where attention weighs most, is under 7 % of the step.
    """
    model, pack = selective_model(), pack_of(LENGTHS)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            out = model.logprobs(pack)
        if backward:
            out.sum().backward()

    blocks = attended(LENGTHS, False), attended(LENGTHS, True)
    got = counted_flops(step)
    assert got == minimum(LENGTHS, backward, blocks)
    least = minimum(LENGTHS, backward, exact_pairs(LENGTHS))
    assert least < got < 1.07 * least


def test_padded_rows_cost_what_sharing_saves() -> None:
    """Claim: the same step as padded rows of prompt and answer does over 1.9 times the products.
    Oracle: model.forward, full logits, counted alike (attention, which torch counts as zero on a
    CPU, left out: the ratio is a lower bound).
    """
    model, pack = selective_model(), pack_of(LENGTHS)
    width = max(sizes[0] + max(sizes[1:]) for sizes in LENGTHS)
    tokens = torch.zeros(2 * len(LENGTHS), width, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as padded:
        model(tokens).log_softmax(-1).sum().backward()
    ours = counted_flops(lambda: model.logprobs(pack).sum().backward())
    assert padded.get_total_flops() > 1.9 * ours


# --- waiting, and work in Python ------------------------------------------------------------------


class Batch:
    """What train.py reads of a data.Stream: pairs of these lengths."""

    fingerprint = "test"

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        self.lengths = np.array(lengths)
        self.chosen_safe = np.arange(len(lengths)) % 2 == 0
        self.rejected_safe = np.arange(len(lengths)) % 3 == 0

    def __len__(self) -> int:
        return len(self.lengths)

    def tree(self, i: int) -> list[np.ndarray]:
        return [np.full(n, 5) for n in self.lengths[i]]


def rows_of(lengths: Sequence[Sequence[int]]) -> Rows:
    streams: Any = {"safety": Batch(lengths)}
    return Rows(streams, {"safety": torch.zeros(len(lengths), 2)}, cast(Any, None))


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose device holds no values, so that whoever asks for one fails, on the path that a
    GPU takes.

    FlexAttention refuses this device: one operation on its inputs stands in for it. Its block masks
    are the real ones.
    """

    def flex(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, enable_gqa: bool) -> Tensor:
        assert enable_gqa and block_mask.kv_indices.device.type == "meta"
        return q + k.sum() + v.sum()

    monkeypatch.setattr("support.kernels.flex_on", lambda kind: flex)
    monkeypatch.setitem(kernels.HEAD_CHUNK, "meta", kernels.HEAD_CHUNK["cuda"])
    return World(0, 1, torch.device("meta"), cast(Any, None))


def config_for(batch: int, pack_tokens: int) -> train.Config:
    return train.Config(
        recipe="bfpo", model="-", safety=("-",), batch=batch, pack_tokens=pack_tokens
    )


class Leaves(Exception):
    pass


def test_a_step_waits_for_the_device_only_to_log(
    gpu_like: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Claim: three steps of train.optimize, of one pack and of four, ask the device for values
    three times each: the losses, the log-probabilities and the gradient norm that the log shows.
    Oracle: on the meta device any other request raises.
    """
    asked: list[str] = []
    true = {name: getattr(Tensor, name) for name in ("item", "cpu")}

    def item(tensor: Tensor) -> Any:
        if tensor.device.type == "meta":
            asked.append("item")
            return 1.0
        return true["item"](tensor)

    def cpu(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            asked.append("cpu")
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return cast(Tensor, true["cpu"](tensor))

    monkeypatch.setattr(Tensor, "item", item)
    monkeypatch.setattr(Tensor, "cpu", cpu)
    monkeypatch.setattr(
        train, "gate", lambda *_: None
    )  # at step 0 alone; it reads what the log has
    steps: list[list[str]] = []

    class Folder(RunFolder):
        def log_step(self, row: Any) -> None:
            steps.append(asked.copy())
            asked.clear()
            if len(steps) == 2:
                raise Leaves

    lengths = [(40, 30, 20)] * 8
    for pack_tokens in (8192, 180):
        config, model = config_for(4, pack_tokens), selective_model("meta")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with pytest.raises(Leaves):
            train.optimize(
                model,
                trained,
                config,
                100,
                rows_of(lengths),
                lambda: ({}, 0.0),
                Folder(tmp_path, gpu_like),
            )
        assert steps == [["cpu", "cpu", "item"]] * 2, pack_tokens
        steps.clear()


def work(world: World, lengths: Sequence[Sequence[int]]) -> tuple[Counter[str], int]:
    """(operations on the device of one forward_backward of one pack, bytecodes that Python runs of
    this project's own code for it).
    """
    rows, config, model = rows_of(lengths), config_for(len(lengths), 10**6), selective_model("meta")
    ours, bytecodes = str(Path(train.__file__).parent), 0

    sys._getframe().f_trace_opcodes = (
        True  # Python 3.12 reports bytecodes if some frame asks for them before the tracing begins
    )

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal bytecodes
        file = frame.f_code.co_filename
        if not file.startswith(ours) or "site-packages" in file or file == __file__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        bytecodes += event == "opcode"
        return trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape))
        with Seen("meta") as seen:  # fills caches too, before bytecodes are counted
            train.forward_backward(model, config, rows, torch.arange(len(lengths)), world)
        before = sys.gettrace()
        gc.collect()
        gc.disable()  # what earlier tests left is not freed, by code of ours, while it is counted
        sys.settrace(trace)
        try:
            train.forward_backward(model, config, rows, torch.arange(len(lengths)), world)
        finally:
            sys.settrace(before)
            gc.enable()
    return +seen.names, bytecodes  # without the names that were seen on the host alone


def test_python_works_neither_by_token_nor_by_pair(gpu_like: World) -> None:
    """Claim: twice the tokens take the same Python, to the last bytecode; four times the pairs take
    the same operations on the device, and in Python no more than reading each pair's tokens,
    numbering its parts and finding it a pack. Oracle: counts of both.
    """
    base, bytecodes = work(gpu_like, [(120, 60, 70)] * 4)
    longer, longer_bytecodes = work(gpu_like, [(240, 120, 140)] * 4)
    assert longer == base and longer_bytecodes == bytecodes > 1000
    more, more_bytecodes = work(gpu_like, [(120, 60, 70)] * 16)
    assert more == base
    assert (
        more_bytecodes - bytecodes
    ) / 12 < 800  # 460 on Python 3.11; versions count a little differently
