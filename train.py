"""Train by BFPO, DPO, IPO or supervised fine-tuning: recipes, the reference, the loop that is
Algorithm 1, the export.

    python train.py                                         the toy language, from data to a table, on a laptop
    python train.py sft                                     the paper's first stage (§4.2), from Mistral-7B-v0.1
    torchrun --nproc_per_node 4 --shutdown-timeout 600 train.py bfpo --model runs/sft/model

A step is a function of (seed, step) alone: which pairs it holds, and so its loss, is the same on
any number of processes.
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width, F feed-forward,
# H query heads, G key/value heads, K head size, A actions.

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

import curves
import plan
import runtime
import storage
from bfpo import label, margin, pair_loss
from chat import Chat, must_fit
from data import Stream
from eval import my_packs, score
from model import CHECKPOINT_NAMES, Mistral, Pack, find_model, load_weights, stored_weights
from model import Config as ModelConfig
from quadrants import check_targets, preference_view, quadrant_table, safety_labels
from rows import Outcome, Rows, gate, in_words, memory_gib, not_finite, open_streams, summarise
from runtime import StopRequest, World
from settings import from_command_line, listed, setting
from sources import cache_root, find_source, sha256
from storage import RunFolder
from toy_run import toy_run
from weights import part_like

# --- configuration ---------------------------------------------------------------------------------------------------

MODULES = sorted({name.split(".")[-2] for name in CHECKPOINT_NAMES})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; each is a flag. Defaults are the paper's (§4.2) where it has one."""

    recipe: str = "toy"
    # input and output
    out: str = setting("", "run folder; runs/<recipe> when empty")
    model: str = setting("", "starting model and reference: a folder or a hub name")
    fresh: bool = setting(
        False, "remove an earlier run in the folder and start over; leave it out to resume"
    )
    dry_run: bool = setting(
        False,
        "check settings, data, model, memory and disk, and leave: nothing is trained or written to the folder",
    )
    save_every: int = setting(100, "steps between checkpoints", least=1)
    keep: int = setting(2, "checkpoints kept", least=1)
    eval_every: int = setting(0, "steps between held-out evaluations; 0 = only at the end", least=0)
    log_every: int = setting(10, "steps between printed lines; log.jsonl has every step", least=1)
    # data
    safety: tuple[str, ...] = setting(
        (), "sources of pairs with safety labels; they count the steps"
    )
    helpfulness: tuple[str, ...] = setting(
        (), "sources of pairs that are all safe (the paper's buffer)"
    )
    sft: tuple[str, ...] = setting((), "sources of conversations, for the objective sft")
    prefer: str = setting(
        "helpful",
        "which answer is chosen: the more helpful (the paper), or the safe one",
        choices=("helpful", "safe"),
    )
    chat_template: str = setting(
        "",
        "zephyr, or a file with a jinja chat template; the model's own, else Zephyr's, when empty",
    )
    max_length: int = setting(1024, "tokens of prompt and longer response", least=2)
    max_prompt: int = setting(
        512, "tokens a prompt keeps, from its end, when the pair is too long", least=1
    )
    cache: str = setting(
        "",
        "folder for tokenised data and reference log-probabilities; $BFPO_CACHE or ~/.cache/bfpo when empty",
    )
    # objective
    objective: str = setting("bfpo", "bfpo, dpo, ipo or sft", choices=("bfpo", "dpo", "ipo", "sft"))
    tau: float = setting(0.01, "strength of the KL term; the target margin is g / tau", above=0)
    alpha: float = setting(0.5, "shift of the label")
    b1: float = setting(3.0, "B_1 of the label", above=1)
    selective: str = setting(
        "down_proj", "name of the modules that train, or all", choices=("all", *MODULES)
    )
    # optimizer: AdamW, betas 0.9 and 0.999, eps 1e-8, no weight decay; linear warm-up from 0, then
    # cosine to 0
    batch: int = setting(
        32, "pairs of each stream, or conversations, in a step", least=1, below=2**16
    )
    epochs: int = setting(1, "passes over the stream that counts the steps", least=1)
    steps: int = setting(
        0,
        "steps of a shorter or longer run, of the toy recipe's both stages; 0 = by epochs",
        least=0,
    )
    lr: float = setting(5e-7, "peak learning rate", above=0, below=1)
    warmup: float = setting(
        0.1, "share of the steps that warm up; the first has learning rate 0", least=0, below=1
    )
    clip_norm: float = setting(
        0.0, "gradient norm to clip at; 0 = off, as in the authors' launch", least=0
    )
    seed: int = setting(42, "order of the data, and everything random in the toy language", least=0)
    # system
    device: str = setting("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto",
        "compute and frozen weights; auto = bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16"),
    )
    pack_tokens: int = setting(
        0,
        "tokens of a pack; a longer pair is a pack alone; 0 = 8192 on a GPU, 1536 on a CPU",
        least=0,
    )
    checkpoint_blocks: bool = setting(False, "recompute activations in the backward pass")
    replicate: int = setting(
        1, "copies of the sharded model (nodes, usually); processes are shared out evenly", least=1
    )


# These change where and how fast a run happens, not what comes out: they may differ when it
# resumes.
FREE = frozenset(
    {
        "out",
        "fresh",
        "dry_run",
        "save_every",
        "keep",
        "log_every",
        "eval_every",
        "cache",
        "pack_tokens",
        "checkpoint_blocks",
        "replicate",
        "device",
    }
)
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACK_TOKENS = {
    "cpu": 1536,
    "cuda": 8192,
}  # what fills a GPU; a larger pack makes a CPU hardly faster, and holds more


def check(config: Config) -> Config:
    """The configuration with its folder named. ValueError when settings make no sense together."""
    if config.objective != "sft" and config.max_prompt >= config.max_length:
        raise ValueError(
            f"max_prompt must be below max_length, got {config.max_prompt} and {config.max_length}"
        )
    if config.chat_template not in ("", "zephyr") and not Path(config.chat_template).is_file():
        raise ValueError(
            f"chat_template must be zephyr or a file with a jinja template, got {config.chat_template!r}"
        )
    if config.objective != "sft":
        check_targets(config.objective, config.alpha, config.b1, config.tau, 2 * config.batch)
    if config.recipe == "toy":
        if (
            config.model
            or config.safety
            or config.helpfulness
            or config.sft
            or config.objective == "sft"
        ):
            raise ValueError(
                "the recipe toy makes its own model and data; name another recipe: sft, bfpo or redteam"
            )
    elif not config.model:
        raise ValueError("no starting model; pass --model FOLDER")
    elif config.objective == "sft" and (not config.sft or config.safety or config.helpfulness):
        raise ValueError(
            "the objective sft reads conversations, and pairs only as such; take the recipe sft, and pass --sft FILE alone"
        )
    elif config.objective != "sft" and config.sft:
        raise ValueError(
            f"the objective {config.objective} reads no conversations; take the recipe bfpo or redteam, without --sft"
        )
    elif config.objective != "sft" and not (config.safety or config.helpfulness):
        raise ValueError("no preference pairs; pass --safety FILE, --helpfulness FILE or both")
    return replace(config, out=config.out or f"runs/{config.recipe}")


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that a command line asks for.

    Wrong usage is said in one line, after the usage, and exits with code 2.
    """
    return from_command_line(
        Config, RECIPES, arguments, "train.py", (__doc__ or "").split("\n")[0], check
    )


# --- the model, its trained part, the reference ----------------------------------------------------------------------


def trains(config: Config, name: str) -> bool:
    """Whether the tensor of this checkpoint name trains: by its module's exact name."""
    return config.selective in ("all", name.split(".")[-2])


def build(config: Config, source: Path, world: World) -> tuple[Mistral, dict[str, Tensor]]:
    """The model with its weights, as runtime.shard shares it out, and {name: parameter} of what
    trains.

    Built on the meta device and filled slice by slice: frozen weights in the compute dtype, trained
    ones in fp32 (deviation 7).
    """
    dtype = DTYPES[config.dtype]
    with torch.device("meta"):
        model = Mistral(ModelConfig.read(source))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(config, name))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    sizes = [
        sum(p.numel() for p in parameters) for parameters in (trained.values(), model.parameters())
    ]
    ends = " to ".join(dict.fromkeys([next(iter(trained)), next(reversed(trained))]))
    world.say(
        f"training {config.selective}: {len(trained)} tensors, {ends}; {sizes[0]:,} of {sizes[1]:,} parameters; "
        f"computing in {config.dtype}"
    )
    runtime.shard(model, list(model.model.layers), world, dtype)
    model.to_empty(device=world.device)
    load_weights(model, source)
    model.checkpoint_blocks = config.checkpoint_blocks
    return model, {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear from 0 over ceil(warmup * steps) steps, then a cosine to 0 at `steps`.

    Steps count from 0.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * step / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def reference_logprobs(
    model: Mistral,
    name: str,
    stream: Stream,
    weights: str,
    config: Config,
    chat: Chat,
    world: World,
) -> Tensor:
    """pi_ref's log-probabilities of a stream, [n, 2] fp32: from the cache, else computed by the
    policy's own code path.

    Kept under a hash of weights, data (which covers tokenizer, chat format and lengths), dtype,
    device and the model's code: a run that differs only in objective, tau, alpha, b1, lr or seed
    reuses it. Deviation 4: no second model in memory. ValueError names the rows whose
    log-probability is not finite.
    """

    def make(rows: range) -> Tensor:
        logprobs = score(model, stream, world, config.pack_tokens, f"reference, {name}", rows)
        if bad := not_finite(logprobs, name, stream, chat, rows.start):
            raise ValueError(
                f"the starting weights {config.model} give rows a log-probability that is not finite: {in_words(bad)}; "
                "take other weights, or leave these rows out"
            )
        return logprobs

    code = [
        sha256(Path(__file__).with_name(file)) for file in ("model.py", "kernels.py", "weights.py")
    ]
    key = hashlib.sha256(
        json.dumps([weights, stream.fingerprint, config.dtype, world.device.type, *code]).encode()
    ).hexdigest()
    path = cache_root(config.cache) / "reference" / key
    return storage.cached_rows(path, (len(stream), 2), make, world, f"reference of {name} pairs")


# --- the loop --------------------------------------------------------------------------------------------------------


def forward_backward(
    model: Mistral, config: Config, rows: Rows, items: Tensor, world: World
) -> Outcome:
    """Add the gradient of the step's loss to the trained parameters; every rank brings its share of
    `items`.
    """
    sft = config.objective == "sft"
    # FSDP averages gradients over the ranks; the loss is a mean over the global batch, or over its
    # scored tokens
    scale = world.size / (rows.scored[items].sum().item() if sft else config.batch)
    packs = my_packs(rows.tokens[items].tolist(), world, config.pack_tokens)
    mine = items[[i for pack in packs for i in pack]]  # this rank's rows, pack by pack
    sizes = [len(pack) for pack in packs]
    if not sft:  # on the device before any pack, and the losses off it after all of them: none waits for another
        g = label(
            rows.chosen_safe[mine], rows.rejected_safe[mine], config.alpha, config.b1
        )  # Algorithm 1: the label, Figure 3
        g_of, reference_of = (
            torch.split_with_sizes(x.to(world.device), sizes) for x in (g, rows.reference[mine])
        )
    losses, changes = [], []
    for n, pack in enumerate(torch.split_with_sizes(mine, sizes)):
        trees = Pack.build([rows.tree(i) for i in pack.tolist()])
        logprobs_R = model.logprobs(
            trees.to(world.device)
        )  # Algorithm 1: log pi(y_w|x), log pi(y_l|x)
        if sft:  # deviation 8
            loss, change = -logprobs_R, logprobs_R[:, None]
        else:
            policy, reference = logprobs_R.reshape(2, -1), reference_of[n].T
            h = margin(*policy, *reference)  # Algorithm 1: h
            loss, change = (
                pair_loss(config.objective, h, g_of[n], config.tau),
                (policy - reference).T,
            )  # Algorithm 1: (h - g / tau)^2
        (loss.sum() * scale).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        changes.append(change.detach())
    return Outcome(mine, torch.cat(losses).float().cpu(), torch.cat(changes).float().cpu())


def held_out_figures(
    model: Mistral,
    config: Config,
    held: dict[str, Stream],
    references: dict[str, Tensor],
    chat: Chat,
    world: World,
) -> tuple[dict[str, Any], float | None]:
    """Of the held-out rows: (by stream its loss a token, or its quadrants' margins; the loss of
    all, None without rows).

    A row whose log-probability is not finite counts in no margin and leaves the loss None;
    "not_finite" of its stream names it.
    """
    figures: dict[str, Any] = {}
    losses = []
    for name, stream in held.items():
        logprobs = score(model, stream, world, config.pack_tokens, f"held-out, {name}").double()
        if name == "sft":
            losses.append(-logprobs.sum().item() / int(stream.lengths[:, 1:].sum()))
            figures[name] = {"loss": losses[-1] if math.isfinite(losses[-1]) else None}
        else:
            h = margin(*logprobs.unbind(1), *references[name].double().unbind(1))
            g = label(*safety_labels(stream), config.alpha, config.b1).double()
            losses.append(pair_loss(config.objective, h, g, config.tau).mean().item())
            figures[name] = preference_view(
                logprobs, references[name], stream, config.alpha, config.b1, config.tau
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
            world.say(f"held-out {name}: loss {view['loss']:.4f} a token")


def must_be_finite(figures: dict[str, Any]) -> None:
    """ValueError names the held-out rows to which the exported model gives no finite
    log-probability.
    """
    bad = [title for view in figures.values() for title in view.get("not_finite", [])]
    if bad:
        raise ValueError(
            f"the model is written, but gives held-out rows a log-probability that is not finite: {in_words(bad)}; "
            "its training diverged: lower --lr, and start over with --fresh"
        )


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

    Exits after a SIGTERM or Ctrl-C.
    """
    world, checkpoints = folder.world, folder.path / "checkpoints"
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    state = runtime.adam_state(optimizer, trained)
    first = storage.load_checkpoint(checkpoints, state, world)
    for moments in optimizer.state.values():
        moments["step"].fill_(first)
    if first:
        world.say(f"resuming after step {first} of {steps}")
    if world.size > 1:
        world.say(rows.unevenness(config, steps, world))
    if config.objective != "sft":
        world.say("h: mean margin -> BFPO's target in nats, by (chosen answer)/(rejected answer)")
    folder.start_log(first, steps, config.log_every)

    with StopRequest() as stop:
        for step in range(first, steps):  # Algorithm 1
            began = time.monotonic()
            items = rows.draw(
                config.batch, config.seed, step
            )  # Algorithm 1: a batch of safety pairs, and one of helpfulness pairs
            outcome = forward_backward(
                model, config, rows, items, world
            )  # Algorithm 1: the loss and its gradient
            norm = runtime.gradient_norm(trained.values())
            row = {
                "step": step,
                "lr": learning_rate(step, steps, config.lr, config.warmup),
                "grad_norm": norm.item(),
            }
            row |= summarise(config, rows, items, outcome, world)
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                remedy = (
                    "Lower --lr, and start over with --fresh"
                    if step
                    else "The starting weights or --tau give it; nothing was trained"
                )
                raise ValueError(
                    f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; the weights were not changed; "
                    f"{rows.blame(outcome.items, outcome.loss, world)}. {remedy}"
                )
            if step == 0 and config.objective != "sft":
                gate(config, rows, items, outcome, row["loss"], world)
            if config.clip_norm:
                clip_grads_with_norm_(trained.values(), config.clip_norm, norm)
            optimizer.param_groups[0]["lr"] = row["lr"]
            optimizer.step()  # Algorithm 1: the update
            optimizer.zero_grad()

            done, seconds = step + 1, time.monotonic() - began
            row |= {
                "rows_per_s": len(items) / seconds,
                "tokens_per_s": rows.tokens[items].sum().item() / seconds,
            }
            row["memory_gib"] = memory_gib(world.device)
            folder.log_step(row)
            if config.eval_every and done % config.eval_every == 0 and done < steps:
                figures, held_out_loss = evaluate()
                folder.write_row(
                    {"step": step, "held_out": figures, "held_out_loss": held_out_loss}
                )
            stopping = max(world.gather(stop.requested))
            if done % config.save_every == 0 or done == steps or stopping:
                storage.save_checkpoint(checkpoints, done, state, world, config.keep)
                folder.drop_earlier()
            if stopping:
                world.say(
                    f"stopped after step {done} of {steps}; the same command, without --fresh, goes on from here"
                )
                sys.exit(128 + stopping)


# --- a run -----------------------------------------------------------------------------------------------------------


def count_changed(
    trained: dict[str, Tensor], start: dict[str, Any], config: Config, world: World
) -> int:
    """How many of the trained values are others than the starting weights' once both are in the
    exported dtype.

    start: a safetensors slice by name. Each rank compares its shards, one tensor at a time. Says
    the share, and warns of a small one.
    """
    dtype = DTYPES[config.dtype]
    changed = 0
    for name, parameter in trained.items():
        local, before = part_like(parameter.detach(), start[name])
        changed += int((local.to(dtype) != before.to(local.device, dtype)).sum())
    changed = int(world.sum(torch.tensor(changed))) // config.replicate  # every replica has counted
    total = sum(parameter.numel() for parameter in trained.values())
    world.say(
        f"{changed:,} of {total:,} trained values ({changed / total:.1%}) differ from the starting weights in {config.dtype}"
    )
    if changed < 0.1 * total:
        world.say(
            f"WARNING: most of the training is lost in the rounding of {config.dtype}; raise --lr or take more steps"
        )
    return changed


def run(config: Config, world: World) -> dict[str, Any]:
    """One run from its folder, data and model to the exported model; returns what done.json holds,
    {} from a dry run.

    A finished run returns at once; an unfinished one goes on. ValueError for bad input, before the
    run folder is written, and from the loop when the policy of step 0 is not the reference, or a
    loss is not finite.
    """
    # dtype auto is settled first, so that a run cannot go on in another precision on another device
    auto = str(world.dtype).removeprefix("torch.")
    config = replace(
        config,
        dtype=config.dtype.replace("auto", auto),
        pack_tokens=config.pack_tokens or PACK_TOKENS[world.device.type],
    )
    folder, settings = RunFolder(Path(config.out), world), dataclasses.asdict(config)
    reads = (config.model, config.chat_template, *config.safety, *config.helpfulness, *config.sft)
    if (result := folder.check(settings, FREE, config.fresh, reads)) is not None:
        world.say(
            f"{folder.path} is finished: {folder.path / 'model'}; its model and data are not looked at again (--fresh trains anew)"
        )
        say_held_out(result["held_out"], world)
        must_be_finite(result["held_out"])
        return result
    if config.model == RECIPES["bfpo"]["model"] and not Path(config.model).is_dir():
        raise ValueError(
            f"the recipe bfpo starts from {config.model}, which is not there; run the recipe sft first, or pass --model"
        )
    for text in (
        *config.safety,
        *config.helpfulness,
        *config.sft,
    ):  # before weights are fetched, or the first one's rows tokenised
        find_source(text, "sft" if config.sft else "pairs")
    source = find_model(config.model)
    chat, architecture = (
        Chat(source, config.chat_template or None, folder.started),
        ModelConfig.read(source),
    )
    must_fit(chat, architecture.vocab_size, source)
    for remark in chat.remarks:
        world.say(remark)
    stored_weights(architecture, source)
    trained_names = frozenset(name for name in architecture.shapes() if trains(config, name))
    if not trained_names:
        raise ValueError(
            f"selective {config.selective} names no tensor of {source}, whose head is tied to its embedding; pass another"
        )
    streams, held = open_streams(config, chat, world)
    steps = (
        config.steps or config.epochs * len(next(iter(streams.values()))) // config.batch
    )  # what fills no batch is left out
    if steps == 1 and config.warmup:
        raise ValueError(
            "a run of one step has learning rate 0; make it longer (--steps, --epochs, a smaller --batch), or pass --warmup 0"
        )
    plan.announce(config, architecture, trained_names, streams, steps, world)
    first = (
        plan.disk_bytes(replace(config, keep=0), architecture, trained_names) if config.fresh else 0
    )
    folder.must_hold(plan.disk_bytes(config, architecture, trained_names), first)
    if config.dry_run:
        left = "what is left of " * (not config.fresh and (folder.path / "run.json").exists())
        world.say(
            f"dry run: nothing was trained, nothing written to {folder.path}; without --dry_run, {left}{steps} steps"
        )
        return {}

    model, trained = build(config, source, world)
    weights = storage.weights_sha256(source, world)
    inputs = {"weights": weights, **{name: stream.fingerprint for name, stream in streams.items()}}
    folder.create(
        settings,
        inputs,
        config.fresh,
        {"chat_template_source": chat.template_source, "end_ids": chat.end_ids},
    )
    world.from_main(
        lambda: storage.write_json(
            folder.path / "data.json", {name: stream.report for name, stream in streams.items()}
        )
    )
    references: list[dict[str, Tensor]] = [{}, {}]  # of the training and the held-out streams
    if config.objective != "sft":
        references = [
            {
                name: reference_logprobs(model, name, stream, weights, config, chat, world)
                for name, stream in part.items()
            }
            for part in (streams, held)
        ]

    evaluate = partial(held_out_figures, model, config, held, references[1], chat, world)
    optimize(model, trained, config, steps, Rows(streams, references[0], chat), evaluate, folder)
    figures, loss = evaluate()
    model.save_pretrained(
        folder.path / "model", DTYPES[config.dtype], source, chat.template, chat.end_ids
    )
    moved = count_changed(trained, stored_weights(architecture, source), config, world)
    world.from_main(lambda: curves.draw(folder.rows(), folder.path / "curves.png"))
    result = {
        "steps": steps,
        "held_out": figures,
        "held_out_loss": loss,
        "changed_values": moved,
        "model": "model",
    }
    folder.finish(result)
    say_held_out(figures, world)
    world.say(f"wrote {folder.path}: model/, log.jsonl, curves.png, checkpoints/")
    must_be_finite(figures)
    return result


def main(arguments: Sequence[str]) -> None:
    with contextlib.redirect_stderr(
        sys.stderr if runtime.launched("RANK", 0) == 0 else io.StringIO()
    ):
        config = parse(arguments)
    with runtime.errors_in_one_line():
        world = runtime.start(config.device, config.replicate)
        usual = dataclasses.asdict(Config())
        world.say(
            listed(
                {
                    key: value
                    for key, value in dataclasses.asdict(config).items()
                    if key == "recipe" or value != usual[key]
                }
            )
        )
        if config.recipe == "toy":
            toy_run(config, world, run, FREE)
        else:
            run(config, world)


if __name__ == "__main__":
    main(sys.argv[1:])
