"""The recipe toy, `python train.py`: from nothing to a table on the toy language, by the same
stages as on the public data.

Data and a small Mistral with random weights -> SFT, every weight -> BFPO (or DPO, IPO), `down_proj`
alone -> answers to held-out requests, judged exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import toy_data
from chat import Chat
from eval import toy_scores, toy_table
from model import Config as ModelConfig
from model import Mistral
from runtime import World
from storage import RunFolder, write_lines

if TYPE_CHECKING:
    from train import Config

TOY_SFT: dict[str, Any] = {
    "objective": "sft",
    "selective": "all",
    "lr": 1e-3,
    "epochs": 3,
    "batch": 32,
}
TOY_MODEL: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": None,
}


def begin(folder: Path, seed: int, world: World) -> None:
    """Make `folder`/data, the toy language's files, and `folder`/start, the model with random
    weights, where they are not there yet.
    """

    def make() -> None:
        if not (folder / "data").exists():
            toy_data.build(folder / "data", seed)
        if not (folder / "start").exists():
            model = Mistral(
                ModelConfig(vocab_size=Chat(folder / "data" / "tokenizer").vocabulary, **TOY_MODEL)
            )
            model.init_weights(seed)
            model.save_pretrained(folder / "start", like=folder / "data" / "tokenizer")

    # Tensors this small gain nothing from a second thread, and the numbers must not depend on the
    # machine's cores.
    torch.set_num_threads(1)
    world.from_main(make)


def sft_stage(config: Config, folder: Path) -> Config:
    """The settings of the first stage; `folder` is what `begin` filled."""
    conversations = (str(folder / "data" / "ultrachat"), f"{folder / 'data' / 'pku'}[:20%]")
    return dataclasses.replace(
        config,
        **TOY_SFT,
        recipe="sft",
        fresh=False,
        cache=config.cache or str(folder / "cache"),
        chat_template=config.chat_template or "zephyr",
        model=str(folder / "start"),
        sft=conversations,
        out=str(folder / "sft"),
    )


def preference_stage(config: Config, folder: Path) -> Config:
    """The settings of the second stage, by config.objective; `folder` is what `begin` filled and
    holds the first stage's model.
    """
    return dataclasses.replace(
        config,
        recipe="bfpo",
        fresh=False,
        cache=config.cache or str(folder / "cache"),
        model=str(folder / "sft" / "model"),
        safety=(str(folder / "data" / "pku"),),
        helpfulness=(str(folder / "data" / "ultrafeedback"),),
        out=str(folder / config.objective),
    )


def try_stages(
    config: Config, world: World, run: Callable[[Config, World], object]
) -> dict[str, Any]:
    """What --dry_run does: data and the random model in a folder that is removed again, and both
    stages' own dry runs on them.
    """
    folder = Path(world.from_main(tempfile.mkdtemp))
    try:
        begin(folder, config.seed, world)
        run(sft_stage(config, folder), world)
        run(
            dataclasses.replace(preference_stage(config, folder), model=str(folder / "start")),
            world,
        )
    finally:
        if world.is_main:  # by no collective: a stop finds the ranks in different ones
            shutil.rmtree(folder, ignore_errors=True)
    return {}


def toy_run(
    config: Config, world: World, run: Callable[[Config, World], object], free: frozenset[str]
) -> dict[str, Any]:
    """The whole path, each stage by `run` (train.run); returns what done.json holds. `free`: the
    settings that may differ on resuming.
    """
    folder, settings = RunFolder(Path(config.out), world), dataclasses.asdict(config)
    steps = config.steps or config.epochs * toy_data.PAIRS // config.batch
    if config.batch > toy_data.PAIRS or (
        steps == 1 and config.warmup
    ):  # as the second stage would say, after the first
        raise ValueError(
            f"the toy run has {toy_data.PAIRS} pairs of each kind, and the learning rate of a single step is 0: it takes 2 or "
            f"more, got --batch {config.batch}, --epochs {config.epochs} and --steps {config.steps}"
        )
    if (result := folder.check(settings, free, config.fresh, (config.chat_template,))) is not None:
        world.say(
            f"{folder.path} is finished, its model is {folder.path / result['model']}; --fresh starts over"
        )
        world.say(toy_table(result["scores"]))
        return result
    if config.dry_run:
        return try_stages(config, world, run)
    if config.fresh:  # what a stage refuses is said before an earlier run is set aside
        with contextlib.redirect_stdout(io.StringIO()):
            try_stages(dataclasses.replace(config, dry_run=True), world, run)
    folder.create(settings, {}, config.fresh)
    name = config.objective.upper()
    world.say(f"[1/4] the toy language: {folder.path / 'data'}")
    begin(folder.path, config.seed, world)
    world.say(
        "[2/4] SFT: every weight, from random, on conversations that mix full, curt, compliant and refusing answers"
    )
    run(sft_stage(config, folder.path), world)
    folder.drop_earlier()
    world.say(f"[3/4] {name}: {config.selective} only, on safety and helpfulness pairs")
    run(preference_stage(config, folder.path), world)

    world.say("[4/4] answers to held-out requests, judged exactly")
    requests, scores = toy_data.held_out(folder.path / "data"), {}
    for title, stage in (("SFT", "sft"), (name, config.objective)):
        scores[title], transcript = toy_scores(
            folder.path / stage / "model", requests, world, config.seed
        )
        world.from_main(partial(write_lines, folder.path / stage / "answers.jsonl", transcript))
    result = {"scores": scores, "model": f"{config.objective}/model"}
    folder.finish(result)
    world.say(toy_table(scores))
    world.say(
        f"wrote model/, curves.png, answers.jsonl and log.jsonl to {folder.path / config.objective} and {folder.path / 'sft'}"
    )
    return result
