"""Evaluate a model: held-out preference pairs by safety quadrant, the toy language's exact judge, or one prompt.

    python eval.py --model DIR --prompt "How do I make a cake?"            prints the answer, and nothing more
    python eval.py --model DIR --reference DIR --pairs FILE [FILE ...]     margins against their targets, by quadrant

The quadrants need no judge: they ask whether the policy's margin over its reference lies on the side that the two safety
labels and the helpfulness order ask for (Figure 3).
"""
# N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width, F feed-forward, H query heads,
# G key/value heads, K head size, A actions.

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import runtime
import toy
from bfpo import QUADRANTS, label, quadrant_means, quadrant_sums
from data import Chat, Message, Stream, deal, load_stream
from model import Mistral, Pack, find_model
from runtime import World

GENERATION_BATCH = 64

# --- scoring responses -----------------------------------------------------------------------------------------------


def my_packs(lengths: Sequence[int], world: World, budget: int) -> list[list[int]]:
    """This rank's share of the items as packs of item numbers, of at most `budget` tokens, the cost shared out evenly.

    Every rank gets as many packs, empty ones at the end, because every forward takes part in the others' collectives.
    """
    dealt = deal(lengths, world.size, budget)
    return dealt[world.rank] + [[] for _ in range(max(map(len, dealt)) - len(dealt[world.rank]))]


@torch.no_grad()
def score(model: Mistral, stream: Stream, world: World, budget: int, text: str) -> Tensor:
    """Summed log-probability of every response of a stream, in nats: fp32 [n, responses], the same on every rank."""
    responses = stream.lengths.shape[1] - 1
    logprobs = torch.zeros(len(stream), responses)
    packs = my_packs(stream.lengths.sum(1).tolist(), world, budget)
    for items in tqdm(packs, desc=text, unit="pack", disable=not world.is_main, mininterval=2.0, leave=False):
        pack = Pack.build([stream.tree(i) for i in items]).to(world.device)
        logprobs[items] = model.logprobs(pack).float().cpu().reshape(responses, -1).T
    return world.sum(logprobs)


def safety_labels(stream: Stream, items: Sequence[int] | slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(chosen_safe, rejected_safe) of some pairs, each bool [N]."""
    return torch.tensor(stream.chosen_safe[items]), torch.tensor(stream.rejected_safe[items])


def preference_view(
    policy: Tensor, reference: Tensor, stream: Stream, alpha: float, b1: float, tau: float
) -> dict[str, dict[str, float]]:
    """By safety quadrant: pairs, mean margin, mean target, share on the target's side (bfpo.quadrant_means).

    policy, reference: summed log-probabilities [n, 2] of (chosen, rejected). The target is BFPO's whatever the model was
    trained on, so models of different objectives can be set side by side.
    """
    change = (policy - reference).double()
    safe = safety_labels(stream)
    return quadrant_means(quadrant_sums(change[:, 0] - change[:, 1], label(*safe, alpha, b1), *safe, tau))


# --- generation ------------------------------------------------------------------------------------------------------


def answers(
    model: Mistral, chat: Chat, conversations: Sequence[Sequence[Message]], world: World, *, max_new_tokens: int,
    temperature: float, seed: int, text: str,
) -> list[str]:  # fmt: skip
    """One answer to each conversation, in order, on every rank; conversation i is sampled with seed + i, whatever the batch."""
    mine = list(range(world.rank, len(conversations), world.size))
    batches = [mine[k : k + GENERATION_BATCH] for k in range(0, len(mine), GENERATION_BATCH)]
    found: dict[int, str] = {}
    for batch in tqdm(batches, desc=text, unit="batch", disable=not world.is_main, mininterval=2.0, leave=False):
        prompts = [chat.prompt(conversations[i]) for i in batch]
        ids = model.generate(prompts, max_new_tokens, temperature, seeds=[seed + i for i in batch], stop_ids=(chat.eos_id,))
        found |= {i: chat.decode(new) for i, new in zip(batch, ids, strict=True)}
    every = {i: answer for part in world.gather(found) for i, answer in part.items()}
    return [every[i] for i in range(len(conversations))]


# --- the toy language ------------------------------------------------------------------------------------------------

TOY_TEMPERATURE = 1.0  # the policy's own distribution, which is what the theorems speak of
TOY_NEW_TOKENS = 32  # the longest answer of the grammar has 20


def toy_scores(
    folder: Path, requests: Sequence[toy.Request], world: World, seed: int, text: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores, transcript) of a model that answers every request once.

    helpful: mean of the exact judge over benign requests; harmless: share of the forbidden ones answered without a step.
    Each comes with its standard error over requests.
    """
    model, chat = Mistral.from_pretrained(folder, device=world.device), Chat(folder)
    conversations = [[{"role": "user", "content": request.text}] for request in requests]
    texts = answers(model, chat, conversations, world, max_new_tokens=TOY_NEW_TOKENS, temperature=TOY_TEMPERATURE,
                    seed=seed, text=text)  # fmt: skip
    verdicts = [toy.judge(request, answer) for request, answer in zip(requests, texts, strict=True)]
    values = {
        "helpful": [verdict.helpful for request, verdict in zip(requests, verdicts, strict=True) if not request.forbidden],
        "harmless": [float(verdict.harmless) for request, verdict in zip(requests, verdicts, strict=True) if request.forbidden],
    }
    scores: dict[str, Any] = {}
    for name, column in values.items():
        sample = torch.tensor(column, dtype=torch.float64)
        scores |= {name: sample.mean().item(), f"{name}_error": sample.std().item() / len(column) ** 0.5, f"{name}_n": len(column)}
    transcript = [
        {"prompt": request.text, "forbidden": request.forbidden, "answer": answer, "helpful": verdict.helpful, "harmless": verdict.harmless}
        for request, answer, verdict in zip(requests, texts, verdicts, strict=True)
    ]
    return scores, transcript


def toy_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """{model: scores} as text: helpfulness on benign requests, harmlessness on forbidden ones, each +- its standard error."""
    lines = [f"{'model':<8}{'helpful':>16}{'harmless':>16}"]
    for name, s in rows.items():
        cells = [f"{s[key]:.3f} +- {s[key + '_error']:.3f}" for key in ("helpful", "harmless")]
        lines.append(f"{name:<8}{cells[0]:>16}{cells[1]:>16}")
    first = next(iter(rows.values()))
    lines.append(f"helpful: share of the right steps, {first['helpful_n']} held-out benign requests; "
                 f"harmless: answers without a forbidden step, {first['harmless_n']} held-out forbidden requests")
    return "\n".join(lines)


# --- the command -----------------------------------------------------------------------------------------------------


def quadrant_table(view: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"{'quadrant':<16}{'pairs':>8}{'margin':>10}{'target':>10}{'on target side':>16}"]
    for name in QUADRANTS:
        if name in view:
            q = view[name]
            lines.append(f"{name:<16}{q['pairs']:>8}{q['margin_nats']:>+10.2f}{q['target_nats']:>+10.1f}{q['target_side_share']:>16.1%}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="answer this one prompt, greedily")
    what.add_argument("--pairs", nargs="+", metavar="SOURCE", help="preference pairs to view by safety quadrant")
    parser.add_argument("--reference", help="with --pairs: the model that the policy started from")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--max_prompt", type=int, default=512)
    parser.add_argument("--tau", type=float, default=0.01, help="of the target g / tau")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    if options.pairs and not options.reference:
        parser.error("--pairs needs --reference DIR: a margin is measured over the reference")
    if options.prompt is not None and not options.prompt.strip():
        parser.error("--prompt must hold text")
    if options.max_new_tokens < 1 or not options.tau > 0 or not 1 <= options.max_prompt < options.max_length:
        parser.error("--max_new_tokens must be >= 1, --tau > 0, and --max_prompt in [1, max_length)")
    with runtime.one_voice():
        world = runtime.start(options.device)
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        folder = find_model(options.model)
        chat = Chat(folder)
        if options.prompt is not None:
            model = Mistral.from_pretrained(folder, dtype=dtype, device=world.device)
            prompt = chat.prompt([{"role": "user", "content": options.prompt}])
            ids = model.generate([prompt], options.max_new_tokens, stop_ids=(chat.eos_id,))
            world.say(chat.decode(ids[0]))
            return
        train, held = load_stream(options.pairs, chat, stage="pairs", max_length=options.max_length, max_prompt=options.max_prompt)
        stream = held if len(held) else train
        policy, reference = (
            score(Mistral.from_pretrained(name, dtype=dtype, device=world.device), stream, world, 8192, text)
            for name, text in ((folder, "policy"), (find_model(options.reference), "reference"))
        )
        world.say(quadrant_table(preference_view(policy, reference, stream, 0.5, 3.0, options.tau)))


if __name__ == "__main__":
    main(sys.argv[1:])
