"""Preference pairs by safety quadrant (Figure 3): their mean margins, and the targets that BFPO
sets these. The log has them for every step, `python train.py` and `python eval.py --pairs` print
them for held-out pairs:

    quadrant           pairs    margin    target  on target side
    both_safe            212     +1.31      +2.0           75.5%
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width, F feed-forward,
# H query heads, G key/value heads, K head size, A actions.  Here also: Q safety quadrants, C columns of sums.

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bfpo import QUADRANTS, label, pair_loss

if TYPE_CHECKING:
    from data import Stream


def check_targets(objective: str, alpha: float, b1: float, tau: float, pairs: int = 1) -> None:
    """ValueError when fp32 cannot hold a quadrant's target g / tau, or the loss at h = 0 of so many
    pairs.
    """
    g = label(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0]), alpha, b1)
    losses = pair_loss(objective, torch.zeros(4), g, tau)
    if not (torch.isfinite(g / tau).all() and torch.isfinite(losses * pairs).all()):
        raise ValueError(
            f"targets g / tau and their squares must be finite in fp32, got alpha {alpha}, b1 {b1} and tau {tau}; take values "
            "nearer to the usual 0.5, 3 and 0.01"
        )


def quadrant_sums(
    h: Tensor, chosen_safe: Tensor, rejected_safe: Tensor, alpha: float, b1: float, tau: float
) -> Tensor:
    """Sums over each quadrant's pairs, float64 [4, 4]; additive over packs, ranks and batches.

    Rows: QUADRANTS. Columns: pairs, sum of h (nats), sum of g / tau (nats), pairs with h on the
    target's side: h and g have one sign. Two of the four quadrants ask for h < 0, so a share of h >
    0, as the authors' accuracy is, would count their failures (deviation 5). h = 0 is on no side. A
    pair whose h is not finite is left out. All inputs are 1-D over pairs. ValueError: as label's.
    """
    h, g = h.detach().double(), label(chosen_safe, rejected_safe, alpha, b1).double()
    s_w, s_l = chosen_safe.bool(), rejected_safe.bool()
    masks_QN = torch.stack([s_w & s_l, s_w & ~s_l, ~s_w & s_l, ~s_w & ~s_l])  # deviation 6
    on_target_side = (h.sign() * g.sign() > 0).double()
    columns_NC = torch.stack([torch.ones_like(h), h, g / tau, on_target_side], dim=-1)
    counts_QN = masks_QN & h.isfinite()
    return torch.where(counts_QN[..., None], columns_NC, 0.0).sum(1)  # mask * x spreads a NaN


def quadrant_means(sums: Tensor) -> dict[str, dict[str, float]]:
    """quadrant -> {"pairs" (int), "margin_nats", "target_nats", "target_side_share" (0 to 1)}.

    sums is [4, 4] from quadrant_sums; quadrants without a pair are left out, and the share where
    the target is 0, which has no side.
    """
    means: dict[str, dict[str, float]] = {}
    for quadrant, (pairs, h, target, on_target_side) in zip(QUADRANTS, sums.tolist(), strict=True):
        if pairs:
            means[quadrant] = {
                "pairs": int(pairs),
                "margin_nats": h / pairs,
                "target_nats": target / pairs,
            }
            means[quadrant] |= {"target_side_share": on_target_side / pairs} if target else {}
    return means


def safety_labels(stream: Stream) -> tuple[Tensor, Tensor]:
    """(chosen_safe, rejected_safe) of its pairs, each bool [N]."""
    return torch.tensor(stream.chosen_safe), torch.tensor(stream.rejected_safe)


def preference_view(
    policy: Tensor, reference: Tensor, stream: Stream, alpha: float, b1: float, tau: float
) -> dict[str, dict[str, float]]:
    """quadrant_means of a stream's pairs by their summed log-probabilities [n, 2] (chosen,
    rejected) under policy and reference.

    The target is BFPO's whatever the model was trained on, so models of different objectives can be
    set side by side.
    """
    change = (policy - reference).double()
    return quadrant_means(
        quadrant_sums(change[:, 0] - change[:, 1], *safety_labels(stream), alpha, b1, tau)
    )


def quadrant_table(view: Mapping[str, Mapping[str, float]]) -> str:
    """quadrant_means in lines, as above."""
    lines = [f"{'quadrant':<16}{'pairs':>8}{'margin':>10}{'target':>10}{'on target side':>16}"]
    for name in QUADRANTS:
        if name in view:
            q = view[name]
            share = f"{q['target_side_share']:.1%}" if "target_side_share" in q else "-"
            lines.append(
                f"{name:<16}{q['pairs']:>8}{q['margin_nats']:>+10.2f}{q['target_nats']:>+10.1f}{share:>16}"
            )
    return "\n".join(lines)
