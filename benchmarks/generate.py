"""Tokens a second of model.generate beside transformers' generate, on the same random checkpoint
and prompts, greedy, to the same ids. On a GPU beside its static cache too, with which transformers
compiles its steps.

    python benchmarks/generate.py                     # 30 M parameters, 32 prompts, 128 new tokens, fp32, one CPU thread
    python benchmarks/generate.py --device cuda --dtype bfloat16 --hidden 4096 --inner 14336
    --layers 32 --heads 32 --vocabulary 32000
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import record

from model import Config, Mistral


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("hidden", 512),
        ("inner", 1792),
        ("layers", 8),
        ("heads", 8),
        ("vocabulary", 2000),
        ("prompts", 32),
        ("new", 128),
        ("rounds", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    from transformers import AutoModelForCausalLM

    config = Config(
        options.vocabulary,
        options.hidden,
        options.inner,
        options.layers,
        options.heads,
        max(1, options.heads // 4),
        options.hidden // options.heads,
    )
    model = Mistral(config)
    model.init_weights(0)
    for p in model.parameters():
        p.data.mul_(4 if p.dim() == 2 else 1)  # 0.02 leaves near-ties, which rounding would decide
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model", dtype=dtype)
        ours = Mistral.from_pretrained(Path(folder) / "model", dtype=dtype, device=options.device)
        theirs = (
            AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
            .to(options.device)
            .eval()
        )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (options.prompts,), generator=generator).tolist()
    prompts = [
        torch.randint(3, options.vocabulary, (n,), generator=generator).tolist() for n in lengths
    ]
    width = max(lengths)
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=options.device)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths], device=options.device)
    greedy = {
        "max_new_tokens": options.new,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    def transformers_ids(**more: str) -> list[list[int]]:
        ids: list[list[int]] = theirs.generate(tokens, attention_mask=mask, **greedy, **more)[
            :, width:
        ].tolist()
        return ids

    sides: dict[str, Callable[[], list[list[int]]]] = {"transformers": transformers_ids}
    if options.device == "cuda":
        sides["transformers, static cache"] = partial(
            transformers_ids, cache_implementation="static"
        )
    sides["ours"] = lambda: ours.generate(prompts, options.new, batch=options.prompts)
    answers = {name: side() for name, side in sides.items()}  # warms both up
    same = sum(a == b for a, b in zip(answers["transformers"], answers["ours"], strict=True))
    if dtype == torch.float32 and same < 0.9 * len(
        prompts
    ):  # a near-tie or two may fall either way
        raise SystemExit(
            f"the two sides must agree before they are timed, but only {same} of {len(prompts)} answers are the same"
        )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    count = options.new * len(prompts)
    print(
        f"{options.device} {options.dtype} {sum(p.numel() for p in ours.parameters()) / 1e6:.0f} M parameters, {len(prompts)} prompts of "
        f"20 to 200 tokens, {options.new} new tokens, {options.threads} threads; {same} of {len(prompts)} answers the same"
    )
    for name, times in seconds.items():
        print(
            f"{name:27} {count / statistics.median(times):8.0f} tokens_per_s (median of {len(times)})"
        )
    ours_s = seconds["ours"]
    ratios = {
        name: sorted(a / b for a, b in zip(times, ours_s, strict=True))
        for name, times in seconds.items()
        if times is not ours_s
    }
    for name, each in ratios.items():
        print(f"ours / {name}: {statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})")
    if options.write:
        settings = {key: value for key, value in vars(options).items() if key != "write"}
        record(
            "generate",
            {
                "settings": settings,
                "answers_the_same": same,
                "seconds": seconds,
                "times_faster": ratios,
            },
        )


if __name__ == "__main__":
    main()
