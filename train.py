"""Train by BFPO, DPO, IPO or supervised fine-tuning.

    python train.py             the toy language, from data to a table, on a laptop
    python train.py sft         the paper's first stage (§4.2), from Mistral-7B-v0.1
    torchrun --nproc_per_node 4 --shutdown-timeout 600 train.py bfpo --model runs/sft/model

The order below: settings and recipes; the model and its reference; a step of Algorithm 1; the
loop; a run. A step is a function of (seed, step) alone: which pairs it holds, and so its loss, is
the same on any number of processes.
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions.

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import math
import operator
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from bfpo import (
    QUADRANTS,
    check_targets,
    label,
    margin,
    pair_loss,
    preference_view,
    quadrant_means,
    quadrant_sums,
    quadrant_table,
)
from data import (
    Rows,
    Stream,
    batch_indices,
    describe,
    in_words,
    keep_questions,
    load_stream,
    my_packs,
    not_finite,
    safety_labels,
    score,
)
from model import Config as ModelConfig
from model import Mistral, Pack, find_model, load_weights, stored_weights
from support import distributed, memory_plan, plots, storage
from support.chat import Chat, must_fit
from support.distributed import StopRequest, World
from support.sources import cache_root, find_source
from support.storage import RunFolder, part_like

# --- configuration --------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def setting(default: Any, text: str, **bounds: Any) -> Any:
    """A field with its help and its bounds, least <= value and above < value < below, or its
    `choices`.
    """
    return dataclasses.field(default=default, metadata={"help": text, **bounds})


@dataclass(frozen=True)
class Config:
    """The settings of a run; each is a flag. Defaults are the paper's (§4.2) where it gives one."""

    recipe: str = "toy"
    # input and output
    out: str = setting("", "run folder; runs/<recipe> when empty")
    model: str = setting("", "starting model and reference: a folder or a hub name")
    fresh: bool = setting(False, "start over; an earlier run is kept until the first checkpoint")
    dry_run: bool = setting(False, "check all that can be checked; train and write nothing")
    save_every: int = setting(100, "steps between checkpoints", least=1)
    keep: int = setting(2, "checkpoints kept", least=1)
    eval_every: int = setting(0, "steps between held-out checks; 0 = only at the end", least=0)
    log_every: int = setting(10, "steps between printed lines; log.jsonl has every step", least=1)
    # data
    safety: tuple[str, ...] = setting((), "sources of pairs with safety labels")
    helpfulness: tuple[str, ...] = setting((), "sources of pairs that are all safe")
    sft: tuple[str, ...] = setting((), "sources of conversations, for the objective sft")
    held_out: float = setting(
        0.02, "share held out of sources without a test split", least=0, below=1
    )
    prefer: str = setting("helpful", "answer that counts as chosen", choices=("helpful", "safe"))
    chat_template: str = setting(
        "", "zephyr or a jinja file; default: the model's own, else zephyr"
    )
    max_length: int = setting(1024, "most tokens of prompt and longer response", least=2)
    max_prompt: int = setting(512, "prompt tokens kept of a pair that is too long", least=1)
    cache: str = setting("", "cache folder; $BFPO_CACHE or ~/.cache/bfpo when empty")
    # objective
    objective: str = setting("bfpo", "the loss", choices=("bfpo", "dpo", "ipo", "sft"))
    tau: float = setting(0.01, "strength of the KL term; the target margin is g / tau", above=0)
    alpha: float = setting(0.5, "alpha of the label (Figure 3)")
    b1: float = setting(3.0, "B_1 of the label (Figure 3)", above=1)
    selective: str = setting("down_proj", "name of the modules to train, or all")
    # optimizer: AdamW, betas 0.9 and 0.999, eps 1e-8, no weight decay; linear warm-up from 0, then
    # cosine to 0
    batch: int = setting(
        32, "pairs of each stream in a step, or conversations", least=1, below=2**16
    )
    epochs: int = setting(1, "passes over the first stream: safety, if given", least=1)
    steps: int = setting(0, "steps (of each stage in the toy); 0 = by epochs", least=0)
    lr: float = setting(5e-7, "peak learning rate", above=0, below=1)
    warmup: float = setting(0.1, "share of the steps used for warm-up from 0", least=0, below=1)
    clip_norm: float = setting(
        0.0, "gradient norm to clip at; 0 = off, as in the authors' code", least=0
    )
    seed: int = setting(42, "order of the data, and everything random in the toy", least=0)
    # system
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", "of computation and frozen weights", choices=("auto", *DTYPES))
    pack_tokens: int = setting(0, "tokens of a pack; 0 = 8192 on a GPU, 1536 on a CPU", least=0)
    checkpoint_blocks: bool = setting(False, "recompute activations in the backward pass")
    replicate: int = setting(1, "copies of the sharded model, usually one a node", least=1)


# Settings that may differ on resuming: they change where and how fast a run happens, and its
# numbers by rounding alone.
FREE: frozenset[str] = frozenset()
FREE |= {"out", "fresh", "dry_run", "save_every", "keep", "eval_every", "log_every", "cache"}
FREE |= {"device", "pack_tokens", "checkpoint_blocks", "replicate"}
ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
PKU = "PKU-Alignment/PKU-SafeRLHF@ff7ba91063016c78a225b0f74e1c0860bb18230f"
RECIPES: dict[str, dict[str, Any]] = {
    # the toy language's preference stage; its own tau because its answers are 5 to 20 tokens long,
    # not hundreds
    "toy": {
        "tau": 0.25,
        "lr": 5e-5,
        "epochs": 2,
        "max_length": 128,
        "max_prompt": 64,
        "log_every": 25,
    },
    "sft": {
        "objective": "sft",
        "model": "mistralai/Mistral-7B-v0.1",
        "sft": (ULTRACHAT, f"{PKU}[:20%]"),
        "lr": 1e-5,
        "max_length": 2048,
    },
    "bfpo": {
        "model": "runs/sft/model",
        "safety": (f"{PKU}[:30000]",),
        "helpfulness": (f"{ULTRAFEEDBACK}[:30000]",),
    },
    "redteam": {"model": "HuggingFaceH4/zephyr-7b-beta", "batch": 16},
}
PAIR_STREAMS = {"safety": "pairs", "helpfulness": "pairs"}
CHANGES = ("chosen_logprob_change_nats", "rejected_logprob_change_nats")  # since step 0
# Limits at step 0, in nats for each square root of a scored token. These are for two passes over
# the same packs. A CPU repeats its bits, in bfloat16 too; a GPU differs by its rounding error.
EQUAL_PACKS_NATS = {"cpu": 1e-3, "cuda": 0.03}
# These are for the policy and the kept reference, which saw other packs, as a root mean square over
# the batch. They are twice the dtype's error against fp64 on a random 16-layer model (0.03 in
# bfloat16).
OTHER_PACKS_NATS = {"float32": 1e-3, "bfloat16": 0.06}
REFERENCE_VERSION = 1  # of kept log-probabilities: count up when a change of the code alters them
REFERENCE_ROWS = 4096  # kept at a time: a minute or two of a 7B model on a GPU
# Enough to fill a GPU. On a CPU larger packs take more memory and are hardly faster.
PACK_TOKENS = {"cpu": 1536, "cuda": 8192}
SIGNS = {"least": ">=", "above": ">", "below": "<"}
HOLDS = {"least": operator.ge, "above": operator.gt, "below": operator.lt}


def check_bounds(config: Config) -> None:
    """ValueError that names the first number outside its bounds."""
    for field in dataclasses.fields(config)[1:]:
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        bounds = {name: n for name, n in field.metadata.items() if name in SIGNS}
        if isinstance(value, int):
            bounds.setdefault("below", 2**31)
        within = all(HOLDS[name](value, bound) for name, bound in bounds.items())
        if not (within and math.isfinite(value)):
            words = " and ".join(f"{SIGNS[name]} {bound}" for name, bound in bounds.items())
            raise ValueError(f"{field.name} must be {words or 'finite'}, got {value}")


def listed(settings: Mapping[str, Any]) -> str:
    """Settings as one line of names and values."""
    parts = []
    for name, value in settings.items():
        text = " ".join(value) if isinstance(value, tuple) else value
        parts.append(f"{name} {text}")
    return ", ".join(parts)


def check(config: Config) -> Config:
    """The configuration with `out` filled in. ValueError when settings contradict each other."""
    is_sft = config.objective == "sft"
    pairs = config.safety or config.helpfulness
    if not is_sft:
        if config.max_prompt >= config.max_length:
            lengths = f"{config.max_prompt} and {config.max_length}"
            raise ValueError(f"max_prompt must be below max_length, got {lengths}")
        check_targets(config.objective, config.alpha, config.b1, config.tau, 2 * config.batch)
    template = config.chat_template
    if template not in ("", "zephyr") and not Path(template).is_file():
        raise ValueError(f"chat_template must be zephyr or a jinja file, got {template!r}")
    if config.recipe == "toy":
        if config.model or pairs or config.sft or is_sft:
            raise ValueError("the toy makes its own model and data; for yours, take sft or bfpo")
    elif not config.model:
        raise ValueError("no starting model; pass --model FOLDER")
    elif is_sft and (pairs or not config.sft):
        raise ValueError("the objective sft takes --sft FILE alone; pairs may be given there too")
    elif not is_sft and (config.sft or not pairs):
        raise ValueError(
            f"the objective {config.objective} takes --safety FILE, --helpfulness FILE or both, "
            "and no --sft"
        )
    return replace(config, out=config.out or f"runs/{config.recipe}")


def flag_options(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The argparse options of a setting's flag."""
    shown = f"; default {field.default}" if field.default not in ("", (), False) else ""
    text = field.metadata["help"] + shown
    if isinstance(field.default, bool):
        return {"help": text, "action": argparse.BooleanOptionalAction}
    if isinstance(field.default, tuple):
        return {"help": text, "nargs": "+", "metavar": "SOURCE"}
    if "choices" in field.metadata:
        return {"help": text, "choices": field.metadata["choices"]}
    kind = type(field.default)
    return {"help": text, "type": kind, "metavar": kind.__name__.upper()}


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that a command line asks for: the recipe's settings, then the flags'.

    Wrong usage is said in one line, after the usage, and exits with code 2.
    """
    fields = dataclasses.fields(Config)[1:]
    recipes = [f"{name}: {listed(settings)}" for name, settings in RECIPES.items()]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        usage="train.py [recipe] [--setting value ...]; --help lists the settings",
        epilog="recipes: " + "; ".join(recipes),
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", nargs="?", choices=RECIPES, default=Config.recipe, help="default: %(default)s"
    )
    for field in fields:
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **flag_options(field))
    names = ["help", *(field.name for field in fields), *(f"no-{field.name}" for field in fields)]
    for word in arguments:
        # argparse would take the unknown flag's value for the recipe, and report that.
        flag = word.split("=")[0]
        if flag.startswith("--") and flag[2:] not in names:
            near = difflib.get_close_matches(flag, [f"--{name}" for name in names], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"unknown setting {flag}{hint}")
    given = vars(parser.parse_args(arguments))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
        elif isinstance(value, str):  # a shell does not expand the ~ of --out=~/run
            given[name] = os.path.expanduser(value)
    usual = dict(RECIPES[given["recipe"]])
    if (
        "safety" in given or "helpfulness" in given
    ):  # pairs of one's own replace both streams of the recipe
        usual.pop("safety", None)
        usual.pop("helpfulness", None)
    try:
        config = Config(**usual | given)
        check_bounds(config)
        return check(config)
    except ValueError as error:
        parser.error(str(error))


# --- the model, its trained part, the reference ---------------------------------------------------


def trains(config: Config, name: str) -> bool:
    """Whether the tensor of this checkpoint name trains: by its module's exact name."""
    return config.selective in ("all", name.split(".")[-2])


def shard(model: Mistral, world: World, dtype: torch.dtype) -> None:
    """FSDP2 in place: each block is a unit, the rest is the root. Computes in `dtype`, reduces
    gradients in fp32.

    Frozen parameters are stored in `dtype`, trained ones in fp32 (the masters). Both are cast when
    they are gathered.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    ignored = set()
    if world.size == 1:
        # One process gathers nothing, and what is stored in `dtype` needs no cast. FSDP2 would copy
        # it all the same, twice a pack.
        ignored = {p for p in model.parameters() if p.dtype == dtype}
    for block in model.model.layers:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, ignored_params=ignored)
    # By default the root stays gathered after a forward. Weights that are read into its shards
    # later, as on resuming after the reference pass, would be ignored by forward and export.
    fully_shard(
        model,
        mesh=world.mesh,
        mp_policy=policy,
        reshard_after_forward=True,
        ignored_params=ignored,
    )
    register_fsdp_forward_method(model, "logprobs")


def build(config: Config, source: Path, world: World) -> tuple[Mistral, dict[str, Tensor]]:
    """The sharded model with its weights, and {name: parameter} of what trains.

    Built on the meta device and filled slice by slice: frozen weights in the compute dtype, trained
    ones in fp32 (deviation 7).
    """
    dtype = DTYPES[config.dtype]
    with torch.device("meta"):
        model = Mistral(ModelConfig.read(source))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(config, name))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    shard(model, world, dtype)
    model.to_empty(device=world.device)
    load_weights(model, source)
    model.checkpoint_blocks = config.checkpoint_blocks
    trained: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter
    names = list(trained)
    ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    values = sum(p.numel() for p in trained.values())
    whole = sum(p.numel() for p in model.parameters())
    world.say(
        f"training {config.selective}: {len(names)} tensors, {ends}; {values:,} of {whole:,} "
        f"parameters; computing in {config.dtype}"
    )
    return model, trained


def open_streams(
    config: Config, chat: Chat, world: World
) -> tuple[dict[str, Stream], dict[str, Stream]]:
    """(training streams, held-out streams) by name: safety, helpfulness, or sft.

    The first counts the steps. Prints what was read.
    """
    training, held = {}, {}
    stages = {"sft": "sft"} if config.objective == "sft" else PAIR_STREAMS
    for name, stage in stages.items():
        sources = getattr(config, name)
        if not sources:
            continue
        training[name], held[name] = load_stream(
            sources,
            chat,
            stage=stage,
            max_length=config.max_length,
            max_prompt=config.max_prompt,
            held_out=config.held_out,
            prefer=config.prefer,
            labelled=name == "safety",
            cache_dir=config.cache or None,
        )
        world.same(f"the rows of {name}", training[name].fingerprint)
        world.say(describe(training[name].report))
    first, stream = next(iter(training.items()))
    if len(stream) < config.batch:
        raise ValueError(
            f"a step needs {config.batch} rows of {first}, got {len(stream)}; pass a smaller "
            "--batch"
        )
    for name, rows in training.items():
        if len(rows) < config.batch:
            copies = math.ceil(config.batch / len(rows))
            world.say(
                f"WARNING: {name} has {len(rows)} rows, and a step draws {config.batch}: a row may "
                f"be in it {copies} times"
            )
    return training, {name: rows for name, rows in held.items() if len(rows)}


def rows_used(config: Config, name: str, stream: Stream) -> list[int] | None:
    """The rows of a stream that a run of --steps draws, sorted; None if it may draw all."""
    draws = config.steps * config.batch
    if not config.steps or draws >= len(stream):
        return None
    # The first batch of that many rows has the rows of all the run's batches.
    return sorted(batch_indices(len(stream), draws, config.seed, 0, name).tolist())


def reference_logprobs(
    model: Mistral,
    weights: str,
    config: Config,
    chat: Chat,
    world: World,
    name: str,
    stream: Stream,
    used: Sequence[int] | None = None,
) -> Tensor:
    """pi_ref's log-probabilities of a stream, [n, 2] fp32: from the cache, else computed by the
    policy's own code path. used: the rows that the run draws, if not all; the others get NaN.

    Kept under a hash of weights, data (which covers tokenizer, chat format and lengths), dtype and
    device. A run that differs only in objective, tau, alpha, b1, lr or seed reuses it; with --steps
    also the seed must be the same. No second model is in memory (deviation 4). ValueError names the
    rows whose log-probability is not finite.
    """

    numbers = range(len(stream)) if used is None else used
    computed = 0

    def make(part: range) -> list[Any]:
        nonlocal computed
        computed += len(part)
        rows = [numbers[i] for i in part]
        logprobs = score(model, stream, world, config.pack_tokens, f"reference, {name}", rows)
        if bad := not_finite(logprobs, name, stream, chat, rows):
            raise ValueError(
                f"the starting weights {config.model} give rows a log-probability that is not "
                f"finite: {in_words(bad)}; use other weights, or remove these rows"
            )
        return logprobs.tolist()

    identity = [REFERENCE_VERSION, weights, stream.fingerprint, config.dtype, world.device.type]
    if used is not None:
        identity.append(list(used))
    store = cache_root(config.cache) / "reference"
    what = f"reference of {name} pairs"
    kept = storage.kept_parts(store, identity, len(numbers), REFERENCE_ROWS, make, world, what)
    read = len(kept) - computed
    world.say(f"{what}: {read:,} rows from the cache {store}, {computed:,} computed")
    logprobs = torch.full((len(stream), 2), math.nan)
    logprobs[torch.tensor(numbers)] = torch.tensor(kept, dtype=torch.float32)
    return logprobs


# --- a step of Algorithm 1 ------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear from 0 over ceil(warmup * steps) steps, then a cosine, which would reach 0 at `steps`.

    Steps count from 0.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * step / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass
class Outcome:
    """What one rank's packs gave in a step, moved to the CPU for the sums, the gate and the log."""

    items: Tensor  # [N] rows, pack by pack
    loss: Tensor  # [N]
    change: Tensor  # [N, 2] log-probability minus the reference's; SFT: [N, 1], itself


def own_packs(config: Config, rows: Rows, items: Tensor, world: World) -> list[Tensor]:
    """This rank's share of `items`, the global batch, as packs of rows."""
    dealt = my_packs(rows.tokens[items].tolist(), world, config.pack_tokens)
    return [items[torch.tensor(pack, dtype=torch.long)] for pack in dealt]


def forward_backward(
    model: Mistral, config: Config, rows: Rows, items: Tensor, world: World
) -> Outcome:
    """Add the gradient of the step's loss to the trained parameters. Each rank computes its share
    of `items`, the global batch.
    """
    is_sft = config.objective == "sft"
    # FSDP averages gradients over the ranks. The loss adds the means of the streams' pairs; SFT's
    # is the mean over all scored tokens.
    scale = world.size / (rows.scored[items].sum().item() if is_sft else config.batch)
    packs = own_packs(config, rows, items, world)
    own = torch.cat(packs)
    if not is_sft:
        # Copied to the device before the first pack, as results are copied back after the last, so
        # that no pack waits for a copy.
        sizes = [len(pack) for pack in packs]
        # Algorithm 1: the label, Figure 3
        g = label(rows.chosen_safe[own], rows.rejected_safe[own], config.alpha, config.b1)
        g_of_pack = torch.split_with_sizes(g.to(world.device), sizes)
        reference_of_pack = torch.split_with_sizes(rows.reference[own].to(world.device), sizes)
    losses = []
    changes = []
    for n, pack in enumerate(packs):
        trees = Pack.build([rows.tree(i) for i in pack.tolist()])
        logprobs_R = model.logprobs(trees.to(world.device))
        if is_sft:
            loss_N = -logprobs_R  # deviation 8
            change = logprobs_R[:, None]
        else:
            policy = logprobs_R.reshape(2, -1)  # Algorithm 1: log pi(y_w|x), log pi(y_l|x)
            reference = reference_of_pack[n].T
            h_N = margin(*policy, *reference)  # Algorithm 1: h
            # BFPO: (h - g / tau)^2
            loss_N = pair_loss(config.objective, h_N, g_of_pack[n], config.tau)
            change = (policy - reference).T
        (loss_N.sum() * scale).backward()  # type: ignore[no-untyped-call]
        losses.append(loss_N.detach())
        changes.append(change.detach())
    return Outcome(own, torch.cat(losses).float().cpu(), torch.cat(changes).float().cpu())


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all their gradients together, a scalar tensor, the same on every rank."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def step_figures(
    config: Config, rows: Rows, items: Tensor, outcome: Outcome, world: World
) -> dict[str, Any]:
    """The step's losses, changes of log-probabilities over the reference, and quadrants, over all
    ranks. One all-reduce, on the CPU.
    """
    loss = outcome.loss.double()
    change = outcome.change.double()
    if config.objective == "sft":
        return {"loss": world.sum(loss.sum()).item() / rows.scored[items].sum().item()}
    chosen_safe = rows.chosen_safe[outcome.items]
    rejected_safe = rows.rejected_safe[outcome.items]
    h = change[:, 0] - change[:, 1]
    view_QC = quadrant_sums(h, chosen_safe, rejected_safe, config.alpha, config.b1, config.tau)
    quadrant = 2 * (~chosen_safe).long() + (~rejected_safe).long()
    change_QC = torch.zeros(4, 2, dtype=torch.float64).index_add(0, quadrant, change)
    stream_losses = torch.zeros(len(rows.names), dtype=torch.float64)
    stream_losses.index_add_(0, rows.stream[outcome.items], loss)
    stream_losses, change_QC, view_QC = world.sum_all([stream_losses, change_QC, view_QC])

    losses = {}
    for name, value in zip(rows.names, (stream_losses / config.batch).tolist(), strict=True):
        losses[f"{name}_loss"] = value
    quadrants: dict[str, dict[str, float]] = quadrant_means(view_QC)
    for name, view in quadrants.items():
        means = change_QC[QUADRANTS.index(name)] / view["pairs"]
        view |= dict(zip(CHANGES, means.tolist(), strict=True))
    changes = dict(zip(CHANGES, (change_QC.sum(0) / len(items)).tolist(), strict=True))
    return {"loss": sum(losses.values()), **losses, **changes, "quadrants": quadrants}


@torch.no_grad()
def repeated(model: Mistral, config: Config, rows: Rows, items: Tensor, world: World) -> Tensor:
    """Log-probabilities [N, 2] of this rank's rows, by a second pass over the step's own packs."""
    logprobs = []
    for pack in own_packs(config, rows, items, world):
        trees = Pack.build([rows.tree(i) for i in pack.tolist()])
        logprobs.append(model.logprobs(trees.to(world.device)).reshape(2, -1).T)
    return torch.cat(logprobs).float().cpu()


def gate(
    model: Mistral,
    config: Config,
    rows: Rows,
    items: Tensor,
    outcome: Outcome,
    loss: float,
    world: World,
) -> None:
    """At step 0 the policy is the reference: h must be 0, and the loss that of h = 0.

    The kept reference saw other packs, and so differs by rounding. Therefore the policy is also
    compared with a second pass over the step's own packs, which hardly differs. ValueError, before
    any update: the reference is of other weights or of another chat format, or the model is not
    deterministic.
    """
    policy = outcome.change + rows.reference[outcome.items]
    again = repeated(model, config, rows, items, world)
    root = rows.scored[outcome.items].sqrt()
    h = outcome.change[:, 0] - outcome.change[:, 1]
    h_equal = margin(*policy.T, *again.T)
    largest = [0.0, 0.0]
    if len(h):
        largest = [h.abs().max().item(), (h_equal / root).abs().max().item()]
    nats, equal = (max(values) for values in zip(*world.gather(largest), strict=True))
    other = (world.sum((h / root).square().sum()).item() / len(items)) ** 0.5

    g = label(rows.chosen_safe[items], rows.rejected_safe[items], config.alpha, config.b1)
    at_zero = pair_loss(config.objective, torch.zeros_like(g), g, config.tau)
    expected = at_zero.mean().item() * len(rows.names)
    drift = 0.0  # most change of a pair's loss by a margin of +-max |h|
    for reach in (nats, -nats):
        moved = pair_loss(config.objective, torch.full_like(g, reach), g, config.tau)
        drift = max(drift, (moved - at_zero).abs().max().item())
    is_expected = abs(loss - expected) <= len(rows.names) * drift + 1e-6 * expected

    equal_share = equal / EQUAL_PACKS_NATS[world.device.type]
    other_share = other / OTHER_PACKS_NATS[config.dtype]
    words = (
        f"max |h| {nats:.2g} nats; error at {other_share:.1%} of its limit, in equal packs at "
        f"{equal_share:.1%}; loss {loss:.6g}, {expected:.6g} expected at h = 0"
    )
    if not (equal_share <= 1 and other_share <= 1 and is_expected):
        raise ValueError(
            f"step 0: the policy is not the reference: {words}; delete the folder reference of the "
            "cache, and start again with --fresh"
        )
    world.say(f"step-0 gate: {words}")


def memory_gib(device: torch.device) -> float:
    """GiB that this process holds: the most allocated on a GPU, anonymous resident memory on a CPU;
    0 if unknown.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # Linux; unlike ru_maxrss, it leaves out mapped files
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def train_step(
    model: Mistral,
    trained: dict[str, Tensor],
    optimizer: torch.optim.AdamW,
    config: Config,
    steps: int,
    step: int,
    rows: Rows,
    world: World,
) -> dict[str, Any]:
    """One step of Algorithm 1; returns its row of log.jsonl. ValueError, before the weights change,
    if the loss or the gradient is not finite, or if step 0 fails the gate.
    """
    began = time.monotonic()
    items = rows.draw(config.batch, config.seed, step)  # of each stream
    outcome = forward_backward(model, config, rows, items, world)  # the loss and its gradient
    norm = gradient_norm(trained.values())
    rate = learning_rate(step, steps, config.lr, config.warmup)
    row = {"step": step, "lr": rate, "grad_norm": norm.item()}
    row |= step_figures(config, rows, items, outcome, world)
    if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
        remedy = "The starting weights or --tau cause it; nothing was trained"
        if step:
            remedy = "Lower --lr, and start over with --fresh"
        raise ValueError(
            f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; the weights were "
            f"not changed; {rows.blame(outcome.items, outcome.loss, world)}. {remedy}"
        )
    if step == 0 and config.objective != "sft":
        gate(model, config, rows, items, outcome, row["loss"], world)
    if config.clip_norm:
        clip_grads_with_norm_(trained.values(), config.clip_norm, norm)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()  # the update
    optimizer.zero_grad()
    seconds = time.monotonic() - began
    row["rows_per_s"] = len(items) / seconds
    row["tokens_per_s"] = rows.tokens[items].sum().item() / seconds
    row["memory_gib"] = memory_gib(world.device)
    return row


# --- the loop -------------------------------------------------------------------------------------


def held_out_figures(
    model: Mistral,
    config: Config,
    held: dict[str, Stream],
    references: dict[str, Tensor],
    chat: Chat,
    world: World,
) -> tuple[dict[str, Any], float | None]:
    """Of the held-out rows: ({stream: its quadrants' margins, or SFT's loss per token}, the sum of
    the streams' losses, None without rows).

    Rows whose log-probability is not finite are left out of the margins and make the loss None.
    "not_finite" of their stream names them.
    """
    figures: dict[str, Any] = {}
    losses = []
    for name, stream in held.items():
        logprobs = score(model, stream, world, config.pack_tokens, f"held-out, {name}").double()
        if name == "sft":
            losses.append(-logprobs.sum().item() / int(stream.lengths[:, 1:].sum()))
            figures[name] = {"loss": losses[-1] if math.isfinite(losses[-1]) else None}
        else:
            reference = references[name]
            safe = safety_labels(stream)
            h = margin(*logprobs.unbind(1), *reference.double().unbind(1))
            g = label(*safe, config.alpha, config.b1).double()
            losses.append(pair_loss(config.objective, h, g, config.tau).mean().item())
            figures[name] = preference_view(
                logprobs, reference, *safe, config.alpha, config.b1, config.tau
            )
        if bad := not_finite(logprobs, name, stream, chat):
            figures[name]["not_finite"] = bad
            world.say(
                f"WARNING: held-out rows whose log-probability is not finite: {in_words(bad)}"
            )
    loss = sum(losses)
    return figures, loss if losses and math.isfinite(loss) else None


def say_held_out(figures: dict[str, Any], world: World) -> None:
    """Print held_out_figures as tables."""
    for name, view in figures.items():
        if name != "sft":
            world.say(f"held-out {name}:\n{quadrant_table(view)}")
        elif view["loss"] is not None:
            world.say(f"held-out {name}: loss {view['loss']:.4f} per token")


def must_be_finite(figures: dict[str, Any]) -> None:
    """ValueError if the exported model gives held-out rows a log-probability that is not finite; it
    names them.
    """
    bad = [title for view in figures.values() for title in view.get("not_finite", [])]
    if bad:
        raise ValueError(
            "the model is written, but gives held-out rows a log-probability that is not finite: "
            f"{in_words(bad)}; training has probably diverged: lower --lr, and start over with "
            "--fresh"
        )


def adam_state(optimizer: torch.optim.AdamW, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds: {name: tensor} of the trained weights and their moments.

    The moments are made here, as zeros, so that a checkpoint can be read into them. AdamW would
    make them at its first step.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        on_cpu = torch.zeros(())  # on a GPU, AdamW would wait for each
        optimizer.state[parameter] = {**moments, "step": on_cpu}
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": value for key, value in moments.items()}
    return tensors


def optimize(
    model: Mistral,
    trained: dict[str, Tensor],
    config: Config,
    steps: int,
    rows: Rows,
    evaluate: Callable[[], tuple[dict[str, Any], float | None]],
    folder: RunFolder,
) -> None:
    """Algorithm 1: from the newest checkpoint, or the start, to the last step.

    After SIGTERM or Ctrl-C it finishes the step, saves a checkpoint and exits.
    """
    world = folder.world
    checkpoints = folder.path / "checkpoints"
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    state = adam_state(optimizer, trained)
    first = storage.load_checkpoint(checkpoints, state, world)
    for moments in optimizer.state.values():
        moments["step"].fill_(first)
    if first:
        world.say(f"resuming after step {first} of {steps}")
    if config.objective != "sft":
        world.say("below, h is the mean margin -> BFPO's target, in nats, by safety quadrant")
    folder.start_log(first, steps, config.log_every)

    with StopRequest() as stop:
        for step in range(first, steps):
            row = train_step(model, trained, optimizer, config, steps, step, rows, world)
            folder.log_step(row)
            done = step + 1
            if config.eval_every and done % config.eval_every == 0 and done < steps:
                figures, loss = evaluate()
                folder.write_row({"step": step, "held_out": figures, "held_out_loss": loss})
            stopping = max(world.gather(stop.requested))
            if done % config.save_every == 0 or done == steps or stopping:
                storage.save_checkpoint(checkpoints, done, state, world, config.keep)
                folder.drop_earlier()
            if stopping:
                world.say(
                    f"stopped after step {done} of {steps}; the same command, without --fresh, "
                    "resumes from here"
                )
                sys.exit(128 + stopping)


# --- a run ----------------------------------------------------------------------------------------


def count_changed(
    trained: dict[str, Tensor], start: dict[str, Any], config: Config, world: World
) -> int:
    """How many of the trained values differ from the starting weights once both are in the exported
    dtype.

    start: a safetensors slice by name. Each rank compares its shards, one tensor at a time. Prints
    the share, and warns if it is small.
    """
    dtype = DTYPES[config.dtype]
    changed = 0
    for name, parameter in trained.items():
        local, before = part_like(parameter.detach(), start[name])
        changed += int((local.to(dtype) != before.to(local.device, dtype)).sum())
    changed = (
        int(world.sum(torch.tensor(changed))) // config.replicate
    )  # each replica counted the same values
    total = sum(parameter.numel() for parameter in trained.values())
    world.say(
        f"{changed:,} of {total:,} trained values ({changed / total:.1%}) differ from the starting "
        f"weights in {config.dtype}"
    )
    if changed < 0.1 * total:
        world.say(
            f"WARNING: most of the training is lost in the rounding of {config.dtype}; "
            "raise --lr or take more steps"
        )
    return changed


def step_of(config: Config, streams: dict[str, Stream], steps: int, ranks: int) -> memory_plan.Step:
    """The work of a step on each rank, by the rows that the first steps draw."""
    rows = Rows(streams, {})
    drawn = []
    for step in range(min(steps, memory_plan.STEPS_LOOKED_AT)):
        drawn.append(rows.draw(config.batch, config.seed, step).numpy())
    lengths = np.concatenate([stream.lengths for stream in streams.values()])
    return memory_plan.step_of(lengths, drawn, ranks)


def announce(
    config: Config,
    model: ModelConfig,
    trained: frozenset[str],
    streams: dict[str, Stream],
    steps: int,
    world: World,
) -> None:
    """Print the plan of a run. If it does not fit, warn; in a dry run, raise ValueError."""
    step = step_of(config, streams, steps, world.size)
    load = memory_plan.Load(
        model.shapes(),
        model.num_attention_heads,
        trained,
        DTYPES[config.dtype],
        world.device.type,
        shards=world.size // config.replicate,
        processes=world.size,
        checkpoint_blocks=config.checkpoint_blocks,
    )
    load = step.with_budget(load, config.pack_tokens)
    rows = sum(map(len, streams.values()))
    tokens = sum(int(stream.lengths.sum()) for stream in streams.values())
    cache_bytes = sum(stream.report["cache"]["bytes"] for stream in streams.values())
    work = memory_plan.Work(
        steps,
        sum(stream.lengths.sum(1).mean() for stream in streams.values()) * config.batch,
        tokens if config.objective != "sft" else 0,
        memory_plan.disk_bytes(model.shapes(), trained, config.keep, load.dtype),
        cache_bytes + 40 * rows,  # two log-probabilities as text
    )
    plan = partial(memory_plan.describe, load, step, config.pack_tokens, work, world.device)
    text, short = world.from_main(plan)
    world.say(text)
    if short and config.dry_run:
        raise ValueError(short)
    if short:
        world.say(f"WARNING: {short}")


def open_model(config: Config, folder: RunFolder) -> tuple[Path, Chat, ModelConfig]:
    """The starting model's folder, chat format and architecture. Headers of weights are checked."""
    if config.model == RECIPES["bfpo"]["model"] and not Path(config.model).is_dir():
        raise ValueError(
            f"the recipe bfpo starts from {config.model}, which is not there; run the recipe sft "
            "first, or pass --model"
        )
    # Sources are checked before weights are fetched or rows tokenised.
    for text in (*config.safety, *config.helpfulness, *config.sft):
        find_source(text, "sft" if config.sft else "pairs")
    source = find_model(config.model)
    chat = Chat(source, config.chat_template or None, folder.started)
    architecture = ModelConfig.read(source)
    must_fit(chat, architecture.vocab_size, source)
    for remark in chat.remarks:
        folder.world.say(remark)
    stored_weights(architecture, source)
    return source, chat, architecture


def settled(config: Config, world: World) -> Config:
    """The configuration with the device's own dtype and pack size in the place of auto and 0. This
    comes first, so that resuming on another device cannot change the precision.
    """
    auto = str(world.dtype).removeprefix("torch.")
    return replace(
        config,
        dtype=config.dtype.replace("auto", auto),
        pack_tokens=config.pack_tokens or PACK_TOKENS[world.device.type],
    )


class Prepared(NamedTuple):
    """What a run starts from."""

    source: Path  # the starting model's folder
    chat: Chat
    architecture: ModelConfig
    streams: dict[str, Stream]  # of training rows, by name; the first one's length sets the steps
    held: dict[str, Stream]  # of held-out rows
    steps: int


def prepare(config: Config, folder: RunFolder) -> Prepared:
    """Open model and data, and print the plan. Model, data, memory and disk are checked here,
    before anything is written.
    """
    world = folder.world
    source, chat, architecture = open_model(config, folder)
    names = frozenset(name for name in architecture.shapes() if trains(config, name))
    if not names:
        raise ValueError(
            f"{source} has no module named {config.selective}; pass --selective with another name, "
            "or all (a tied head is called embed_tokens)"
        )
    streams, held = open_streams(config, chat, world)
    # Rows that do not fill a last batch are left out.
    steps = config.steps or config.epochs * len(next(iter(streams.values()))) // config.batch
    if steps == 1 and config.warmup:
        raise ValueError(
            "a run of one step has learning rate 0; make it longer (--steps, --epochs, a smaller "
            "--batch), or pass --warmup 0"
        )
    announce(config, architecture, names, streams, steps, world)
    disk = partial(memory_plan.disk_bytes, architecture.shapes(), names, dtype=DTYPES[config.dtype])
    folder.must_hold(disk(keep=config.keep), disk(keep=0) if config.fresh else 0)
    return Prepared(source, chat, architecture, streams, held, steps)


def record(config: Config, made: Prepared, weights: str, folder: RunFolder) -> None:
    """Make the run folder, or open that of an unfinished run. Write run.json with sums of what the
    run reads, data.json with the streams' reports, and hashes of their questions.
    """
    inputs = {"weights": weights}
    inputs |= {name: stream.fingerprint for name, stream in made.streams.items()}
    facts = {"chat_template_source": made.chat.template_source, "end_ids": made.chat.end_ids}
    folder.create(dataclasses.asdict(config), inputs, config.fresh, facts)
    reports = {name: stream.report for name, stream in made.streams.items()}
    folder.world.from_main(partial(storage.write_json, folder.path / "data.json", reports))
    folder.world.from_main(partial(keep_questions, folder.path, made.streams, made.source))


def export(
    model: Mistral,
    trained: dict[str, Tensor],
    config: Config,
    made: Prepared,
    evaluate: Callable[[], tuple[dict[str, Any], float | None]],
    folder: RunFolder,
) -> dict[str, Any]:
    """Write the trained model, the curves and done.json; returns what that holds."""
    world = folder.world
    figures, loss = evaluate()
    ends = made.chat.end_ids
    dtype = DTYPES[config.dtype]
    model.save_pretrained(folder.path / "model", dtype, made.source, made.chat.template, ends)
    start = stored_weights(made.architecture, made.source)
    changed = count_changed(trained, start, config, world)
    world.from_main(
        lambda: plots.draw_curves(storage.log_rows(folder.log), folder.path / "curves.png")
    )
    result = {
        "steps": made.steps,
        "held_out": figures,
        "held_out_loss": loss,
        "changed_values": changed,
        "model": "model",
    }
    folder.finish(result)
    say_held_out(figures, world)
    world.say(f"wrote {folder.path}: model/, log.jsonl, curves.png, done.json, checkpoints/")
    return result


def run(config: Config, world: World) -> dict[str, Any]:
    """One run, from reading the data to the exported model. Returns what done.json holds, {} from a
    dry run.

    A finished run returns at once; an unfinished one resumes. ValueError: bad input, before the run
    folder is written; later a step 0 that fails the gate, or values that are not finite.
    """
    config = settled(config, world)
    folder = RunFolder(Path(config.out), world)
    settings = dataclasses.asdict(config)
    sources = (*config.safety, *config.helpfulness, *config.sft)
    reads = (config.model, config.chat_template, *sources)
    earlier = folder.check(settings, FREE, config.fresh, reads)
    if earlier is not None:
        world.say(
            f"{folder.path} is finished: {folder.path / 'model'}; its model and data are not "
            "looked at again (--fresh trains anew)"
        )
        say_held_out(earlier["held_out"], world)
        must_be_finite(earlier["held_out"])
        return earlier

    made = prepare(config, folder)
    if config.dry_run:
        world.say(f"dry run of {made.steps} steps: nothing was trained or written")
        return {}

    model, trained = build(config, made.source, world)
    chat = made.chat
    weights = storage.weights_sha256(made.source, world)
    record(config, made, weights, folder)

    references, held_references = {}, {}
    if config.objective != "sft":
        reference = partial(reference_logprobs, model, weights, config, chat, world)
        for name, stream in made.streams.items():
            references[name] = reference(name, stream, rows_used(config, name, stream))
        for name, stream in made.held.items():
            held_references[name] = reference(name, stream)
    evaluate = partial(held_out_figures, model, config, made.held, held_references, chat, world)
    rows = Rows(made.streams, references, chat)
    optimize(model, trained, config, made.steps, rows, evaluate, folder)

    result = export(model, trained, config, made, evaluate, folder)
    must_be_finite(result["held_out"])
    return result


# --- the toy language: data, both stages, a table ------------------------------------------------


def toy_stages(config: Config, folder: Path) -> tuple[Config, Config]:
    """The settings of SFT and of the preference stage; `folder` is what recipe.begin filled."""
    from toy import recipe

    both = replace(config, fresh=False, cache=config.cache or str(folder / "cache"))
    sft = replace(both, **recipe.sft_settings(folder))
    if config.chat_template:
        sft = replace(sft, chat_template=config.chat_template)
    return sft, replace(both, **recipe.preference_settings(folder, config.objective))


def try_toy(config: Config, world: World) -> None:
    """Dry runs of both stages, on data and a random model in a folder that is then removed."""
    from toy import recipe

    folder = Path(world.from_main(tempfile.mkdtemp))
    try:
        recipe.begin(folder, config.seed, world)
        sft, preference = toy_stages(replace(config, dry_run=True), folder)
        run(sft, world)
        run(replace(preference, model=str(folder / "start")), world)
    finally:
        if world.is_main:  # no collective here: when stopped, ranks may wait in different ones
            shutil.rmtree(folder, ignore_errors=True)


def check_toy(config: Config, pairs: int) -> None:
    """ValueError for what the second stage would refuse only after the first has trained."""
    steps = config.steps or config.epochs * pairs // config.batch
    if config.batch > pairs or (steps == 1 and config.warmup):
        raise ValueError(
            f"the toy has {pairs} pairs of each kind, and takes a --batch of at most that and 2 "
            f"steps or more, got --batch {config.batch}, --epochs {config.epochs} and --steps "
            f"{config.steps}"
        )


def run_toy(config: Config, world: World) -> dict[str, Any]:
    """The recipe toy, from nothing to a table: data and a small model with random weights, SFT of
    every weight, BFPO (or DPO, IPO) of `down_proj` alone, and answers to held-out requests that are
    judged exactly. Returns what done.json holds, {} from a dry run.
    """
    from toy import recipe

    folder = RunFolder(Path(config.out), world, stages=("sft", "bfpo", "dpo", "ipo"))
    settings = dataclasses.asdict(config)
    check_toy(config, recipe.PAIRS)
    result = folder.check(settings, FREE, config.fresh, (config.chat_template,))
    if result is not None:
        world.say(
            f"{folder.path} is finished, its model is {folder.path / result['model']}; "
            "--fresh starts over"
        )
        world.say(recipe.toy_table(result["scores"]))
        return result
    if config.dry_run:
        try_toy(config, world)
        return {}
    if config.fresh:  # the errors of a stage come before an earlier run is set aside
        with contextlib.redirect_stdout(io.StringIO()):
            try_toy(config, world)
    folder.create(settings, {}, config.fresh)
    sft, preference = toy_stages(config, folder.path)
    name = config.objective.upper()
    world.say(recipe.expected(config.steps, config.epochs, config.batch))
    world.say(f"[1/4] the toy language: {folder.path / 'data'}")
    recipe.begin(folder.path, config.seed, world)
    world.say(
        "[2/4] SFT: every weight, from random, on conversations that mix full, curt, compliant and "
        "refusing answers"
    )
    run(sft, world)
    folder.drop_earlier()
    world.say(f"[3/4] {name}: training {config.selective}, on safety and helpfulness pairs")
    run(preference, world)

    world.say("[4/4] answers to held-out requests, judged exactly")
    requests = recipe.held_out(folder.path / "data")
    scores = {}
    for title, stage in (("SFT", sft), (name, preference)):
        out = Path(stage.out)
        scores[title], transcript = recipe.toy_scores(out / "model", requests, world, config.seed)
        world.from_main(partial(storage.write_lines, out / "answers.jsonl", transcript))
    result = {"scores": scores, "model": f"{config.objective}/model"}
    folder.finish(result)
    world.say(recipe.toy_table(scores))
    world.say(
        "wrote model/, curves.png, answers.jsonl and log.jsonl to "
        f"{folder.path / config.objective} and {folder.path / 'sft'}"
    )
    return result


# --- the command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    with contextlib.redirect_stderr(
        sys.stderr if distributed.launched("RANK", 0) == 0 else io.StringIO()
    ):
        config = parse(arguments)
    with distributed.errors_in_one_line():
        world = distributed.start(config.device, config.replicate)
        usual = dataclasses.asdict(Config())
        settings = dataclasses.asdict(config).items()
        world.say(listed({k: v for k, v in settings if k == "recipe" or v != usual[k]}))
        if config.recipe == "toy":
            run_toy(config, world)
        else:
            run(config, world)


if __name__ == "__main__":
    main(sys.argv[1:])
