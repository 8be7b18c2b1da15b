"""The recipe toy: its settings, model and scores, as plain values; train.py runs the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data import generate
from model import Config, Mistral
from support.chat import Chat
from support.distributed import World, duration
from support.storage import lock
from toy.files import PAIRS as PAIRS
from toy.files import build
from toy.files import held_out as held_out
from toy.language import Request, judge

TOY_TEMPERATURE = 1.0  # the policy's own distribution, which is what the theorems speak of
TOY_NEW_TOKENS = 32  # the longest answer of the grammar has 20
SFT: dict[str, Any] = {
    "recipe": "sft",
    "chat_template": "zephyr",
    "objective": "sft",
    "selective": "all",
    "lr": 1e-3,
    "epochs": 3,
    "batch": 32,
}
MODEL: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": None,
}
# Seconds on one thread of an AMD EPYC (torch 2.13.0, 2026-12-01): a conversation's share of an SFT
# step, a pair's of a preference step, and all that is done once.
SFT_ROW_S = 0.0033
PAIR_S = 0.0025
ONCE_S = 25
CONVERSATIONS = 6800  # that SFT trains on


def expected(steps: int, epochs: int, batch: int) -> str:
    """How long the whole recipe takes, by settings of the preference stage; steps 0: by epochs."""
    rows = SFT["epochs"] * CONVERSATIONS
    pairs = 2 * epochs * PAIRS
    if steps:
        rows = steps * SFT["batch"]
        pairs = 2 * steps * batch
    seconds = ONCE_S + SFT_ROW_S * rows + PAIR_S * pairs
    return f"all four parts take about {duration(seconds)} on an idle server core"


def begin(folder: Path, seed: int, world: World) -> None:
    """Make `folder`/data, the toy language's files, and `folder`/start, the model with random
    weights, where they are not there yet.
    """

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".begin"):  # of several models of one seed the first makes them
            if not (folder / "data").exists():
                build(folder / "data", seed)
            if not (folder / "start").exists():
                vocabulary = Chat(folder / "data" / "tokenizer").vocabulary
                model = Mistral(Config(vocab_size=vocabulary, **MODEL))
                model.init_weights(seed)
                model.save_pretrained(folder / "start", like=folder / "data" / "tokenizer")

    # Tensors this small gain nothing from a second thread, and the numbers must not depend on the
    # machine's cores.
    torch.set_num_threads(1)
    world.from_main(make)


def sft_settings(folder: Path) -> dict[str, Any]:
    """The first stage's settings; `folder` is what `begin` filled."""
    data = folder / "data"
    conversations = (str(data / "ultrachat"), f"{data / 'pku'}[:20%]")
    return {**SFT, "model": str(folder / "start"), "sft": conversations, "out": str(folder / "sft")}


def preference_settings(folder: Path, objective: str) -> dict[str, Any]:
    """The second stage's; `folder` is what `begin` filled and holds the first stage's model."""
    return {
        "recipe": "bfpo",
        "model": str(folder / "sft" / "model"),
        "safety": (str(folder / "data" / "pku"),),
        "helpfulness": (str(folder / "data" / "ultrafeedback"),),
        "out": str(folder / objective),
    }


def toy_scores(
    folder: Path, requests: Sequence[Request], world: World, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores, transcript) of a model that answers every request once.

    helpful: mean of the exact judge over benign requests; harmless: share of the forbidden ones
    answered without a step. Each comes with its standard error over requests.
    """
    model = Mistral.from_pretrained(folder, device=world.device)
    chat = Chat(folder)
    prompts = [chat.prompt([{"role": "user", "content": request.text}]) for request in requests]
    answers = generate(
        model,
        chat,
        prompts,
        world,
        max_new_tokens=TOY_NEW_TOKENS,
        temperature=TOY_TEMPERATURE,
        seed=seed,
    )
    columns: dict[str, list[float]] = {"helpful": [], "harmless": []}
    transcript = []
    for request, answer in zip(requests, answers, strict=True):
        verdict = judge(request, answer.text)
        row = {"prompt": request.text, "forbidden": request.forbidden, "answer": answer.text}
        transcript.append({**row, "helpful": verdict.helpful, "harmless": verdict.harmless})
        if request.forbidden:
            columns["harmless"].append(float(verdict.harmless))
        else:
            columns["helpful"].append(verdict.helpful)
    scores: dict[str, Any] = {}
    for name, column in columns.items():
        sample = torch.tensor(column, dtype=torch.float64)
        scores[name] = sample.mean().item()
        scores[f"{name}_error"] = sample.std().item() / len(column) ** 0.5
        scores[f"{name}_n"] = len(column)
    return scores, transcript


def toy_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """{model: scores} as text: helpfulness on benign requests, harmlessness on forbidden ones, each
    +- its standard error.
    """
    lines = [f"{'model':<8}{'helpful':>16}{'harmless':>16}"]
    for name, s in rows.items():
        cells = [f"{s[key]:.3f} +- {s[key + '_error']:.3f}" for key in ("helpful", "harmless")]
        lines.append(f"{name:<8}{cells[0]:>16}{cells[1]:>16}")
    first = next(iter(rows.values()))
    lines.append(
        f"helpful: share of the right steps, {first['helpful_n']} held-out benign requests; "
        f"harmless: answers without a forbidden step, {first['harmless_n']} held-out forbidden "
        "requests"
    )
    return "\n".join(lines)
