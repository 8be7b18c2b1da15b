"""Bi-Factorial Preference Optimization (ICLR 2025, arXiv:2408.15313).

Label, loss, safety quadrants and exact optimum: the paper's §3 on plain tensors, without a model or
a trainer. Of a pair, y_w is the more HELPFUL answer, whether or not it is safe. `python
synthetic.py` draws Figure 4 with this file, and `python synthetic.py theorems` compares its closed
forms with a numerical minimiser.

paper symbol                   identifier                  shape  range or unit       authors' code
y_w, y_l                       chosen, rejected                                       same names
log pi(y_w|x), log pi(y_l|x)   policy_chosen, _rejected    N      nats, token sum     policy_*_logps
the same under pi_ref          ref_chosen, _rejected       N      nats, token sum     reference_*
h                              h; margin_nats              N      nats                logits
I, I': I_safe of y_w, of y_l   chosen_safe, rejected_safe  N      1 safe, 0 unsafe    safe_factor_*
B_3(B_1 I - I' + B_2) - alpha  g                           N      nats x tau          safe_factor
g / tau                        target_nats                 N      nats; the target h
B_1                            b1                                 > 1; paper 3        b1
B_2                            no parameter                       fixed at paper's 0  none
B_3                            1 / (b1 - 1)                       paper 1/2           b3
alpha                          alpha                              finite; paper 1/2   alpha
tau                            tau                                > 0; paper 0.01     beta
pi_ref(y)                      reference_A                 A      > 0, sums to 1
p(y, y')                       preference_AA               A, A   P(y beats y')
p(y) = E_y'~pi_ref p(y, y')    helpful_A                   A      0 to 1
I_safe(y)                      safe_A                      A      0 or 1
E_safe = E_y~pi_ref I_safe(y)  safe_share                         0 to 1
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions. In this file also: Q
# quadrants, C columns.

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# The four cases of Figure 3, in this order in all of the code. The quadrant "chosen_safe" has pairs
# of which only the chosen answer is safe. The tensor chosen_safe says of every pair whether its
# chosen answer is safe.
QUADRANTS = ("both_safe", "chosen_safe", "rejected_safe", "both_unsafe")


def _check_tau(tau: float) -> None:
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(
            f"tau must be finite and > 0, got {tau}; pass 0.01, the paper's for language models"
        )


def _check_label_settings(alpha: float, b1: float) -> None:
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}; pass 0.5, the paper's value")
    if not (math.isfinite(b1) and b1 > 1):
        raise ValueError(f"b1 must be finite and > 1, got {b1}; pass 3, the paper's value")


def _check_shapes(**tensors: Tensor) -> None:
    """ValueError when shapes differ: [N] and [N, 1] would broadcast to [N, N] without an error."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be equal, got {shapes}; pass one value per pair in each")


def _as_indicator(labels: Tensor, name: str) -> Tensor:
    wrong = ~((labels == 0) | (labels == 1))  # NaN is neither
    if wrong.any():
        raise ValueError(
            f"{name} must hold only 1 (safe) and 0 (unsafe), got {labels[wrong][0].item()}; "
            "label these rows or drop them"
        )
    return labels if labels.is_floating_point() else labels.to(torch.get_default_dtype())


# --- the objective --------------------------------------------------------------------------------


def label(
    chosen_safe: Tensor, rejected_safe: Tensor, alpha: float = 0.5, b1: float = 3.0
) -> Tensor:
    """g = (b1 I_safe(y_w) - I_safe(y_l)) / (b1 - 1) - alpha, a float tensor of the labels' shape.

    At the defaults: both safe +1/2, only chosen safe +1, only rejected safe -1, both unsafe -1/2
    (Figure 3). With the paper's tau of 0.01 the margins asked for are +50, +100, -100 and -50 nats.
    These signs hold for 0 < alpha < 1. The safety labels are bool, int or float tensors of 1 (safe)
    and 0 (unsafe). The result has their dtype, or torch's default for bool and int. g is computed
    in float64, because its numerator cancels when b1 is near 1. ValueError: a label other than 0 or
    1, shapes that differ, b1 <= 1, alpha or b1 not finite.
    """
    _check_label_settings(alpha, b1)
    _check_shapes(chosen_safe=chosen_safe, rejected_safe=rejected_safe)
    s_w = _as_indicator(chosen_safe, "chosen_safe")
    s_l = _as_indicator(rejected_safe, "rejected_safe")
    # Figure 3, with B_2 = 0 and B_3 = 1 / (b1 - 1): two safe answers have 1 - alpha for every b1.
    g = (b1 * s_w.double() - s_l.double()) / (b1 - 1) - alpha
    return g.to(torch.promote_types(s_w.dtype, s_l.dtype))


def margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """h = log [ pi(y_w|x) pi_ref(y_l|x) / (pi(y_l|x) pi_ref(y_w|x)) ], nats, one per pair.

    Log-probabilities are SUMMED over the tokens of a response. Averages would make it another
    objective. ValueError: shapes that differ.
    """
    _check_shapes(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    # Nearly equal values are subtracted first, which loses least precision.
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def bfpo_loss(h: Tensor, g: Tensor, tau: float) -> Tensor:
    """(h - g / tau)^2, one per pair, not reduced.

    Training begins with the policy at the reference, so h = 0 and the loss is exactly (g / tau)^2.
    ValueError: tau <= 0 or not finite, shapes that differ.
    """
    _check_tau(tau)
    _check_shapes(h=h, g=g)
    return (h - g / tau) ** 2  # the supervised form, §3; Algorithm 1


def ipo_loss(h: Tensor, tau: float) -> Tensor:
    """(h - 1 / (2 tau))^2, one per pair.

    It equals BFPO's loss where both answers are safe and alpha = 1/2, bit for bit if b1 = 3.
    ValueError: tau <= 0 or not finite.
    """
    return bfpo_loss(h, torch.full_like(h, 0.5), tau)  # IPO, arXiv:2310.12036; Lemmas B.2 and B.3


def dpo_loss(h: Tensor, tau: float) -> Tensor:
    """-log sigmoid(tau h), one per pair; log 2 at h = 0. ValueError: tau <= 0 or not finite."""
    _check_tau(tau)
    return -torch.nn.functional.logsigmoid(tau * h)  # DPO, arXiv:2305.18290; Lemma B.2


def pair_loss(objective: str, h: Tensor, g: Tensor, tau: float) -> Tensor:
    """The loss named "bfpo", "ipo" or "dpo", one per pair; only BFPO's depends on g.

    KeyError: another name. ValueError: as in the loss of that name.
    """
    if objective == "bfpo":
        return bfpo_loss(h, g, tau)
    return {"ipo": ipo_loss, "dpo": dpo_loss}[objective](h, tau)


# --- the four quadrants, Figure 3 -----------------------------------------------------------------
# The training log has each quadrant's figures for every step. `python train.py` and `python eval.py
# pairs` print them for held-out pairs. For example, with tau = 0.25:
#
#     quadrant           pairs    margin    target  on target side
#     both_safe            212     +1.31      +2.0           75.5%


def check_targets(objective: str, alpha: float, b1: float, tau: float, pairs: int = 1) -> None:
    """ValueError when fp32 cannot hold a quadrant's target g / tau, or the sum of the losses of
    `pairs` pairs at h = 0.
    """
    g = label(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0]), alpha, b1)
    losses = pair_loss(objective, torch.zeros(4), g, tau)
    if not (torch.isfinite(g / tau).all() and torch.isfinite(losses * pairs).all()):
        raise ValueError(
            f"targets g / tau and their squares must be finite in fp32, got alpha {alpha}, b1 {b1} "
            f"and tau {tau}; use values closer to alpha 0.5, b1 3 and tau 0.01"
        )


def quadrant_sums(
    h: Tensor, chosen_safe: Tensor, rejected_safe: Tensor, alpha: float, b1: float, tau: float
) -> Tensor:
    """Sums over each quadrant's pairs, float64 [4, 4]; additive over packs, ranks and batches.

    Rows: QUADRANTS. Columns: pairs, sum of h (nats), sum of g / tau (nats), and pairs whose h has
    the sign of g, and so is on the target's side. The authors' accuracy counts every pair with h >
    0, also where g < 0 (deviation 5). h = 0 is on neither side. A pair whose h is not finite is
    left out. All inputs are [N]. ValueError: as in label.
    """
    h = h.detach().double()
    g = label(chosen_safe, rejected_safe, alpha, b1).double()
    s_w = chosen_safe.bool()
    s_l = rejected_safe.bool()
    # Masks, where the authors' code indexes with 0 and 1 (deviation 6).
    masks_QN = torch.stack([s_w & s_l, s_w & ~s_l, ~s_w & s_l, ~s_w & ~s_l])
    on_target_side = (h.sign() * g.sign() > 0).double()
    columns_NC = torch.stack([torch.ones_like(h), h, g / tau, on_target_side], dim=-1)
    counts_QN = masks_QN & h.isfinite()
    # A product with the mask would spread a NaN, as NaN * 0 is NaN.
    return torch.where(counts_QN[..., None], columns_NC, 0.0).sum(1)


def quadrant_means(sums: Tensor) -> dict[str, dict[str, float]]:
    """quadrant -> {"pairs" (int), "margin_nats", "target_nats", "target_side_share" (0 to 1)}.

    sums is [4, 4] from quadrant_sums. Quadrants without a pair are left out. A target of 0 has no
    side, so its quadrant has no share.
    """
    means: dict[str, dict[str, float]] = {}
    for quadrant, row in zip(QUADRANTS, sums.tolist(), strict=True):
        pairs, h_sum, target_sum, on_target_side = row
        if pairs:
            means[quadrant] = {
                "pairs": int(pairs),
                "margin_nats": h_sum / pairs,
                "target_nats": target_sum / pairs,
            }
            if target_sum:
                means[quadrant]["target_side_share"] = on_target_side / pairs
    return means


def preference_view(
    policy: Tensor,
    reference: Tensor,
    chosen_safe: Tensor,
    rejected_safe: Tensor,
    alpha: float,
    b1: float,
    tau: float,
) -> dict[str, dict[str, float]]:
    """quadrant_means of pairs whose summed log-probabilities under the policy and the reference are
    given, each [N, 2] (chosen, rejected).

    The targets are always BFPO's, whichever objective trained the policy, so that models can be
    compared.
    """
    change = (policy - reference).double()
    return quadrant_means(
        quadrant_sums(change[:, 0] - change[:, 1], chosen_safe, rejected_safe, alpha, b1, tau)
    )


def quadrant_table(view: Mapping[str, Mapping[str, float]]) -> str:
    """quadrant_means as text, like the example above quadrant_sums."""
    lines = [f"{'quadrant':<16}{'pairs':>8}{'margin':>10}{'target':>10}{'on target side':>16}"]
    for name in QUADRANTS:
        if name in view:
            q = view[name]
            share = f"{q['target_side_share']:.1%}" if "target_side_share" in q else "-"
            lines.append(
                f"{name:<16}{q['pairs']:>8}{q['margin_nats']:>+10.2f}{q['target_nats']:>+10.1f}{share:>16}"
            )
    return "\n".join(lines)


# --- the exact optimum on a finite action set -----------------------------------------------------
# Pairs (y, y') are drawn from pi_ref x pi_ref, and y is the more helpful one with probability
# p(y, y'). The population loss is E (h - g / tau)^2. Where its derivative by log pi is zero,
#     tau log(pi*/pi_ref)(y) = E_y'[ p(y, y') g(y, y') - p(y', y) g(y', y) ] + constant.
# Call the right side the reward. Then pi* also maximises E_pi[reward] - tau KL(pi || pi_ref), so
# supervised learning solves the RLHF problem (Theorems 3.2 and B.4, whose wording was not at hand).
# `python synthetic.py theorems` checks the equation and the maximiser.


def _action_set(
    preference_AA: Tensor, safe_A: Tensor, reference_A: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments in float64, with the uniform reference in place of None. ValueError: sums that
    are off by more than 1e-6, which fp32 input is not, or wrong shapes.
    """
    preference_AA = preference_AA.double()
    safe_A = _as_indicator(safe_A, "safe_A").double()
    uniform_A = torch.ones_like(safe_A) / max(safe_A.numel(), 1)
    reference_A = uniform_A if reference_A is None else reference_A.double()
    shapes = [list(tensor.shape) for tensor in (preference_AA, safe_A, reference_A)]
    if not safe_A.numel() or shapes != [2 * shapes[1], shapes[1], shapes[1]]:
        raise ValueError(
            "preference_AA, safe_A, reference_A must be [A, A], [A], [A] with A > 0, got "
            f"{shapes[0]}, {shapes[1]}, {shapes[2]}; give each action one entry"
        )
    least_preference = preference_AA.min().item()
    mirror_error = (preference_AA + preference_AA.T - 1).abs().max().item()
    if not (least_preference >= 0 and mirror_error <= 1e-6):
        raise ValueError(
            "preference_AA must be >= 0 with p(y, y') + p(y', y) = 1, got a minimum of "
            f"{least_preference:.3g} and an error of {mirror_error:.3g}; use 1/2 on the diagonal"
        )
    least_reference = reference_A.min().item()
    total = reference_A.sum().item()
    if not (least_reference > 0 and abs(total - 1) <= 1e-6):
        raise ValueError(
            "reference_A must be > 0 and sum to 1, got a minimum of "
            f"{least_reference:.3g} and a sum of {total:.6g}; leave out actions that pi_ref never "
            "takes, then divide by the sum"
        )
    return preference_AA, safe_A, reference_A


def population_reward(
    preference_AA: Tensor,
    safe_A: Tensor,
    alpha: float = 0.5,
    b1: float = 3.0,
    reference_A: Tensor | None = None,
) -> Tensor:
    """tau log(pi*/pi_ref) of the exact minimiser, up to a constant, float64 [A]. This form 1 holds
    for every action set. joint_reward is form 2.

        [ s (1 + (b1 - 1) p(y)) + (b1 - 1) E_y'[ s(y') p(y, y') ] ] / (b1 - 1) - 2 alpha p(y)

    with s = I_safe(y).

    preference_AA [A, A] >= 0 with p + p^T = 1; safe_A [A] of 1 and 0; reference_A [A] > 0 with sum
    1, or None for the uniform one. ValueError: arguments that are not so, b1 <= 1, alpha or b1 not
    finite.
    """
    _check_label_settings(alpha, b1)
    preference_AA, safe_A, reference_A = _action_set(preference_AA, safe_A, reference_A)
    helpful_A = preference_AA @ reference_A
    beats_safe_A = preference_AA @ (reference_A * safe_A)
    scaled_A = safe_A * (1 + (b1 - 1) * helpful_A) + (b1 - 1) * beats_safe_A
    return scaled_A / (b1 - 1) - 2 * alpha * helpful_A


def joint_reward(
    preference_AA: Tensor,
    safe_A: Tensor,
    alpha: float = 0.5,
    b1: float = 3.0,
    reference_A: Tensor | None = None,
) -> Tensor:
    """(I_safe(y) + E_safe - 2 alpha) (p(y) + 1 / (b1 - 1)), float64 [A]: form 2, for independent
    labels.

    With b1 = 3 and alpha = 0 it is the paper's joint reward (r_safe + E_safe)(r_help + 1/2), where
    r_safe = I_safe and r_help = p. It differs from population_reward by a constant if and only if
    E_y'[ s(y') p(y, y') ] differs from E_safe p(y) by a constant. Independence of safety and
    helpfulness under pi_ref is enough. Arguments and errors as in population_reward.
    """
    _check_label_settings(alpha, b1)
    preference_AA, safe_A, reference_A = _action_set(preference_AA, safe_A, reference_A)
    helpful_A = preference_AA @ reference_A
    safe_share = reference_A @ safe_A
    # Theorem 3.2; the shift by alpha: Prop. 3.3
    return (safe_A + safe_share - 2 * alpha) * (helpful_A + 1 / (b1 - 1))


def optimum(
    preference_AA: Tensor,
    safe_A: Tensor,
    tau: float,
    alpha: float = 0.5,
    b1: float = 3.0,
    reference_A: Tensor | None = None,
) -> Tensor:
    """pi* = pi_ref exp(population_reward / tau) / Z, float64 [A]: the exact minimiser of the
    population loss, in the form of Theorem 3.1.

    Arguments and errors as in population_reward, and ValueError for tau <= 0 or not finite.
    """
    _check_tau(tau)
    reward_A = population_reward(preference_AA, safe_A, alpha, b1, reference_A)
    log_optimum_A = reward_A / tau
    if reference_A is not None:  # the uniform one adds a constant, which softmax drops
        log_optimum_A = reference_A.double().log() + log_optimum_A
    return torch.softmax(log_optimum_A, dim=0)  # Theorem 3.1, as in IPO, arXiv:2310.12036
