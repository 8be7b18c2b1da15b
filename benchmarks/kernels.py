"""What each fast form of support/kernels.py saves of a training step on a CPU, beside the formula
that it equals: processor time, and what autograd keeps between forward and backward.

    python benchmarks/kernels.py --write            # 10 minutes, one thread; results.json

    python benchmarks/kernels.py --dtype bfloat16 --selective all

The step is of four pairs in packs; by default the selective recipe's, in fp32. A round runs it as
it is, twice with one formula in the fast form's place, and as it is again, for each of them; the
median of the rounds' ratios counts.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import draw_lengths, pairs_of, parameters_of, record
from step import SIZES
from torch import Tensor

import model as model_file
import train
from data import deal
from model import Config, Mistral, Pack, plain_attend, rotary, visible
from support import kernels


def plain_pack_attend(pack: Pack, config: Config, scored: bool) -> Any:
    tokens = torch.arange(len(pack.tokens))
    rows = pack.rows if scored else tokens
    cos, sin = rotary(pack.positions, config)
    mask = visible(pack, config.sliding_window)(0, 0, rows.unsqueeze(-1), tokens)
    return plain_attend(mask, (cos[rows], sin[rows]), (cos, sin))


def plain_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def plain_row_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


FORMULAS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "attention of a pack": (model_file, "pack_attend", plain_pack_attend),
    "feed-forward": (kernels, "swiglu", plain_swiglu),
    "norm": (kernels, "rms_norm", plain_rms_norm),
    "log-probabilities": (kernels, "row_logprobs", plain_row_logprobs),
}


def kept_mib(model: Mistral, pack: Pack) -> float:
    """What autograd keeps of a forward beside the parameters, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.logprobs(pack)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="30M")
    parser.add_argument("--vocabulary", type=int, help="tokens; default: the size's")
    parser.add_argument("--dtype", choices=train.DTYPES, default="float32")
    parser.add_argument("--selective", default="down_proj", help="modules that train, or all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    vocabulary, *sizes = SIZES[options.size]
    config = Config(options.vocabulary or vocabulary, *sizes, sliding_window=None)
    model = Mistral(config)
    model.init_weights(0)
    model.to(train.DTYPES[options.dtype])
    for name, p in model.named_parameters():
        p.requires_grad_(options.selective == "all" or options.selective in name)
    rng = np.random.default_rng(0)
    lengths = draw_lengths(rng, 4)
    pairs = pairs_of(rng, lengths, config.vocab_size)
    packs = [
        Pack.build([pairs[i] for i in items])
        for items in deal(lengths.sum(1).tolist(), 1, train.PACK_TOKENS["cpu"])[0]
    ]

    def step() -> float:
        began = time.process_time()
        for pack in packs:
            model.logprobs(pack).square().sum().backward()
        model.zero_grad()
        return time.process_time() - began

    kept = kept_mib(model, packs[0])
    figures: dict[str, dict[str, Any]] = {}
    for name, (module, attribute, formula) in FORMULAS.items():
        fast = getattr(module, attribute)
        setattr(module, attribute, formula)
        of_formula = kept_mib(model, packs[0])
        setattr(module, attribute, fast)
        figures[name] = {"ratios": [], "kept_mib": kept, "kept_mib_of_formula": of_formula}
    step()
    for _ in range(options.rounds):
        for name, (module, attribute, formula) in FORMULAS.items():
            fast = getattr(module, attribute)
            before = step()
            setattr(module, attribute, formula)
            slow = step() + step()
            setattr(module, attribute, fast)
            figures[name]["ratios"].append(slow / (before + step()))
    parameters = parameters_of(config)
    print(
        f"{parameters / 1e6:.0f} M parameters, {options.rounds} rounds; with the formula a step is"
    )
    for name, row in figures.items():
        ratios = sorted(row["ratios"])
        print(
            f"{name:22} {statistics.median(ratios):.3f} times as long ({ratios[0]:.3f} to "
            f"{ratios[-1]:.3f}); kept {row['kept_mib_of_formula']:.1f} MiB instead of {kept:.1f}"
        )
    if options.write:
        settings = {
            "threads": 1,
            "size": options.size,
            "vocabulary": config.vocab_size,
            "dtype": options.dtype,
            "selective": options.selective,
        }
        name = f"kernels {options.size} {options.dtype} {options.selective}"
        record(name, settings | {"rounds": options.rounds, "formulas": figures})


if __name__ == "__main__":
    main()
