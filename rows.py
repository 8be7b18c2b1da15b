"""What a step holds: the rows of all streams numbered through, and which of them step n draws, a
pure function of (seed, n); and what came of them: the gate that step 0 must pass, and the step's
figures.
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width, F feed-forward,
# H query heads, G key/value heads, K head size, A actions.  Here also: Q safety quadrants, C columns of sums.

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bfpo import QUADRANTS, label, pair_loss
from chat import Chat, Ids
from data import Stream, batch_indices, deal, describe, load_stream, unevenness
from quadrants import quadrant_means, quadrant_sums, safety_labels
from runtime import World

if TYPE_CHECKING:
    from train import Config

CHANGES = (
    "chosen_logprob_change_nats",
    "rejected_logprob_change_nats",
)  # since step 0; over the step, and by quadrant
# |h| that rounding may leave at step 0, in nats for each square root of a response token: twice the compute dtype's error
# on a random 16-layer model (0.03 in bfloat16), times five for the largest of a batch; fp32 likewise, rounded up.
GATE_NATS = {"float32": 1e-3, "bfloat16": 0.3}


def open_streams(
    config: Config, chat: Chat, world: World
) -> tuple[dict[str, Stream], dict[str, Stream]]:
    """(training streams, held-out streams) by name: safety, helpfulness, or sft.

    The first counts the steps. Prints what was read.
    """
    training, held = {}, {}
    for name in ("sft",) if config.objective == "sft" else ("safety", "helpfulness"):
        if sources := getattr(config, name):
            training[name], held[name] = load_stream(
                sources,
                chat,
                stage="sft" if name == "sft" else "pairs",
                max_length=config.max_length,
                max_prompt=config.max_prompt,
                prefer=config.prefer,
                mixed=name == "safety",
                cache_dir=config.cache or None,
            )
            world.same(f"the rows of {name}", training[name].fingerprint)
            world.say(describe(training[name].report))
    first, stream = next(iter(training.items()))
    if len(stream) < config.batch:
        raise ValueError(
            f"a step needs {config.batch} rows of {first}, got {len(stream)}; pass a smaller --batch"
        )
    for name, rows in training.items():
        if 0 < len(rows) < config.batch:
            world.say(
                f"WARNING: {name} has {len(rows)} rows, and a step draws {config.batch} of them: a row is in it "
                f"up to {math.ceil(config.batch / len(rows))} times"
            )
    return training, {name: rows for name, rows in held.items() if len(rows)}


def title_of(name: str, stream: Stream, i: int, chat: Chat) -> str:
    """What a message calls row i of a stream: the stream's name, the number, and how the row begins
    and ends.
    """
    text = chat.decode([token for part in stream.tree(i)[:2] for token in part])
    return f"{name} {i} ({reprlib.repr(text)})"


def not_finite(
    logprobs: Tensor, name: str, stream: Stream, chat: Chat, first: int = 0
) -> list[str]:
    """Titles of a stream's rows, from `first` on, whose log-probabilities [n, responses] are not
    all finite.
    """
    bad = (~logprobs.isfinite().all(1)).nonzero().flatten().tolist()
    return [title_of(name, stream, first + i, chat) for i in bad]


def in_words(titles: list[str]) -> str:
    """The first five titles, and how many others there are."""
    more = f" and {len(titles) - 5} more" if len(titles) > 5 else ""
    return ", ".join(titles[:5]) + more


class Rows:
    """The rows of all streams, numbered through, with what the objective asks of them beside their
    tokens.

    tokens, scored [n]: a row's tokens, and those of its responses. stream [n]: its place in
    `names`. chosen_safe, rejected_safe: bool [n]. reference: log-probabilities of the chosen and
    the rejected answer under pi_ref, summed, nats, fp32 [n, 2].
    """

    def __init__(
        self, streams: dict[str, Stream], references: dict[str, Tensor], chat: Chat
    ) -> None:
        self.streams, self.names, self.chat = list(streams.values()), list(streams), chat
        self.starts = [0, *accumulate(len(stream) for stream in self.streams)]
        self.stream = torch.cat(
            [torch.full((len(stream),), k) for k, stream in enumerate(self.streams)]
        )
        lengths = torch.cat([torch.tensor(stream.lengths) for stream in self.streams])
        self.tokens, self.scored = lengths.sum(1), lengths[:, 1:].sum(1)
        self.chosen_safe, self.rejected_safe = map(
            torch.cat, zip(*map(safety_labels, self.streams), strict=True)
        )
        self.reference = torch.cat(list(references.values())) if references else torch.empty(0, 2)

    def draw(self, batch: int, seed: int, step: int) -> Tensor:
        """The global batch of a step: `batch` rows of each stream, a pure function of (seed, step)."""
        drawn = (
            batch_indices(len(stream), batch, seed, step, name)
            for stream, name in zip(self.streams, self.names, strict=True)
        )
        return torch.cat(
            [
                torch.from_numpy(rows) + start
                for rows, start in zip(drawn, self.starts, strict=False)
            ]
        )

    def unevenness(self, config: Config, steps: int, world: World) -> str:
        """How evenly steps are dealt to ranks, in words: the mean of the first hundred steps."""
        dealt = [
            self.tokens[self.draw(config.batch, config.seed, step)].tolist()
            for step in range(min(steps, 100))
        ]
        mean = sum(
            unevenness(tokens, deal(tokens, world.size, config.pack_tokens)) for tokens in dealt
        ) / len(dealt)
        if mean == math.inf:
            return "in some steps a rank has no rows; pass a larger --batch, or use fewer processes"
        return f"a step costs its costliest rank {mean:.1%} more than its cheapest, on average"

    def tree(self, i: int) -> list[Ids]:
        """Row i as an item of Pack.build: [prompt, response, ...] in token ids."""
        return self.streams[self.stream[i]].tree(i - self.starts[self.stream[i]])

    def title(self, i: int) -> str:
        """What an error calls row i of all."""
        k = self.stream[i]
        return title_of(self.names[k], self.streams[k], i - self.starts[k], self.chat)

    def blame(self, items: Tensor, losses: Tensor, world: World) -> str:
        """Which rows make a step's loss or gradient not finite, of the items and losses [N] that
        each rank brings.
        """
        mine = [
            (loss, self.title(i)) for i, loss in zip(items.tolist(), losses.tolist(), strict=True)
        ]
        every = [pair for part in world.gather(mine) for pair in part]
        if bad := [title for loss, title in every if not math.isfinite(loss)]:
            return f"rows whose loss is not finite: {in_words(bad)}"
        return "every row's loss is finite; the largest: " + ", ".join(
            f"{loss:.3g} of {title}" for loss, title in sorted(every)[-3:]
        )


@dataclass
class Outcome:
    """What one rank's packs gave in a step, on the CPU: for the sums, the gate and the log."""

    items: Tensor  # [N]
    loss: Tensor  # [N]
    change: Tensor  # [N, responses]: log-probability minus the reference's; for sft the log-probability itself


def summarise(
    config: Config, rows: Rows, items: Tensor, outcome: Outcome, world: World
) -> dict[str, Any]:
    """The step's figures over all ranks: losses, log-probability changes, quadrants.

    One all-reduce, on the CPU.
    """
    loss, change = outcome.loss.double(), outcome.change.double()
    if config.objective == "sft":
        return {"loss": world.sum(loss.sum()).item() / rows.scored[items].sum().item()}
    chosen_safe, rejected_safe = rows.chosen_safe[outcome.items], rows.rejected_safe[outcome.items]
    view_QC = quadrant_sums(
        change[:, 0] - change[:, 1], chosen_safe, rejected_safe, config.alpha, config.b1, config.tau
    )
    change_QC = (
        torch.zeros(4, 2)
        .double()
        .index_add(0, 2 * (~chosen_safe).long() + (~rejected_safe).long(), change)
    )
    stream_losses = (
        torch.zeros(len(rows.names)).double().index_add(0, rows.stream[outcome.items], loss)
    )
    stream_losses, change_QC, view_QC = world.sum_all([stream_losses, change_QC, view_QC])
    quadrants = quadrant_means(view_QC)
    for name, view in quadrants.items():
        view |= dict(
            zip(CHANGES, (change_QC[QUADRANTS.index(name)] / view["pairs"]).tolist(), strict=True)
        )
    losses = {
        f"{name}_loss": value
        for name, value in zip(rows.names, (stream_losses / config.batch).tolist(), strict=True)
    }
    changes = dict(zip(CHANGES, (change_QC.sum(0) / len(items)).tolist(), strict=True))
    return {"loss": sum(losses.values()), **losses, **changes, "quadrants": quadrants}


def gate(
    config: Config, rows: Rows, items: Tensor, outcome: Outcome, loss: float, world: World
) -> None:
    """At step 0 pi = pi_ref: h must be 0, and the loss what the objective gives there. ValueError
    when not.

    A reference of other weights, another chat format or a model that is not deterministic ends
    here, before any update.
    """
    h = (outcome.change[:, 0] - outcome.change[:, 1]).abs()
    allowed = GATE_NATS[config.dtype] * rows.scored[outcome.items].sqrt()
    ratio, nats = map(
        max,
        zip(
            *world.gather([x.max().item() if len(x) else 0.0 for x in (h / allowed, h)]),
            strict=True,
        ),
    )
    g = label(rows.chosen_safe[items], rows.rejected_safe[items], config.alpha, config.b1)
    at_zero = pair_loss(config.objective, torch.zeros_like(g), g, config.tau)
    expected = at_zero.mean().item() * len(rows.names)
    moved = (
        pair_loss(config.objective, torch.full_like(g, reach), g, config.tau)
        for reach in (nats, -nats)
    )
    drift = max((loss_there - at_zero).abs().max().item() for loss_there in moved)
    found = f"max |h| {nats:.2g} nats ({ratio:.1%} of what rounding may leave), loss {loss:.6g}, {expected:.6g} expected at h = 0"
    if not (ratio <= 1 and abs(loss - expected) <= len(rows.names) * drift + 1e-6 * expected):
        raise ValueError(
            f"step 0: the policy is not the reference: {found}; remove the reference cache and start again with --fresh"
        )
    world.say(f"step-0 gate: {found}")


def memory_gib(device: torch.device) -> float:
    """GiB that this process holds: peak allocated on a GPU; anonymous resident memory on a CPU (0
    where unknown).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path(
        "/proc/self/status"
    )  # Linux; mapped weight files do not count, as ru_maxrss would
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20
