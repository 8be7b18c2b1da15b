import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from bfpo import (
    bfpo_loss,
    dpo_loss,
    ipo_loss,
    joint_reward,
    label,
    margin,
    optimum,
    pair_loss,
    population_reward,
)

CHOSEN_SAFE = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)  # in the order of QUADRANTS
REJECTED_SAFE = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
SETTINGS = [
    (0.5, 3.0, 0.01),
    (0.5, 3.0, 1.0),
    (0.0, 3.0, 0.37),
    (0.8, 1.5, 2.5),
    (-0.3, 7.0, 0.05),
]  # alpha, b1, tau
PAPER_PREFERENCE = torch.ones(4, 4, dtype=torch.float64).triu(1) + 0.5 * torch.eye(
    4, dtype=torch.float64
)
PAPER_SAFE = torch.tensor([1, 0, 1, 0])


# ------------------------------------------------------------------------------------------------------ label and margin


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.float32, torch.float64]
)
def test_label_gives_figure_3_for_every_dtype(dtype):
    """Claim: the four targets in units of 1/tau are +1/2, +1, -1, -1/2.

    Oracle: Figure 3; exact in binary.
    """
    g = label(CHOSEN_SAFE.to(dtype), REJECTED_SAFE.to(dtype))
    assert g.tolist() == [0.5, 1.0, -1.0, -0.5]
    assert g.dtype == (dtype if dtype.is_floating_point else torch.get_default_dtype())


@pytest.mark.parametrize("alpha, b1, tau", SETTINGS)
def test_label_is_the_papers_formula(alpha, b1, tau):
    """Claim: g = B_3 (B_1 I_w - I_l + B_2) - alpha away from the defaults.

    Oracle: the formula in Python floats.
    """
    b3 = 1 / (b1 - 1)
    expected = [b3 * (b1 * w - l) - alpha for w, l in [(1, 1), (1, 0), (0, 1), (0, 0)]]  # noqa: E741
    # 1e-15: a few float64 roundings of numbers near 1
    assert label(CHOSEN_SAFE, REJECTED_SAFE, alpha, b1).tolist() == pytest.approx(
        expected, abs=1e-15
    )


def test_label_does_not_cancel_with_b1_near_1():
    """Claim: with b1 = 1.00000001 both safe and both unsafe differ by 1, in the labels' dtype.

    Oracle: the formula by hand.
    """
    for labels in (
        (CHOSEN_SAFE.bool(), REJECTED_SAFE.bool()),
        (CHOSEN_SAFE.float(), REJECTED_SAFE.float()),
    ):
        both_safe, chosen_safe, rejected_safe, both_unsafe = label(
            *labels, 0.5, 1.00000001
        ).tolist()
        assert (both_safe, both_unsafe) == (0.5, -0.5)
        # 1e-7: fp32 rounds numbers near 1e8; b1 - 1 itself is known to 1e-8 of itself
        assert [chosen_safe, rejected_safe] == pytest.approx([1e8, -1e8], rel=1e-7)
    assert label(CHOSEN_SAFE.half(), REJECTED_SAFE.float()).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 2.0, 0.5])
@pytest.mark.parametrize("side", [0, 1])
def test_label_refuses_what_is_not_a_label(bad, side):
    """Claim: anything but 0 and 1 is a ValueError that names the argument and the value.

    Oracle: the message.
    """
    pair = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])]
    pair[side][1] = bad
    with pytest.raises(
        ValueError, match=rf"{('chosen_safe', 'rejected_safe')[side]} must .*got {bad}"
    ):
        label(*pair)
    with pytest.raises(ValueError, match="got 2"):
        label(torch.tensor([2, 0]), torch.tensor([1, 0]))


@pytest.mark.parametrize(
    "alpha, b1",
    [
        (math.nan, 3),
        (math.inf, 3),
        (0.5, 1.0),
        (0.5, 0.0),
        (0.5, -3),
        (0.5, math.inf),
        (0.5, math.nan),
    ],
)
def test_label_refuses_bad_settings(alpha, b1):
    """Claim: b1 <= 1 and settings that are not finite are ValueErrors with a remedy, everywhere.

    Oracle: the message.
    """
    for call in (
        lambda: label(CHOSEN_SAFE, REJECTED_SAFE, alpha, b1),
        lambda: population_reward(PAPER_PREFERENCE, PAPER_SAFE, alpha, b1),
        lambda: joint_reward(PAPER_PREFERENCE, PAPER_SAFE, alpha, b1),
        lambda: optimum(PAPER_PREFERENCE, PAPER_SAFE, 1.0, alpha, b1),
    ):
        with pytest.raises(ValueError, match=r"(alpha|b1) must be finite.*; pass"):
            call()


def test_margin_is_the_log_of_the_four_probabilities():
    """Claim: h = log [pi(w) ref(l) / (pi(l) ref(w))].

    Oracle: that quotient of probabilities, and its gradient +1, -1, -1, +1.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(4, 50, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    logprobs = p.log().requires_grad_()
    h = margin(*logprobs)
    # 1e-14: six roundings of logs below 3 in size
    torch.testing.assert_close(h, (p[0] * p[3] / (p[1] * p[2])).log(), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(h.sum(), logprobs)
    assert torch.equal(
        gradient, torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)[:, None].expand(4, 50)
    )


def test_margin_is_zero_when_policy_is_reference():
    """Claim: step 0 has h = 0 with no rounding, in bf16 and fp32 too. Oracle: zero."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        chosen, rejected = (
            -700 * torch.rand(100, generator=torch.Generator().manual_seed(s)).to(dtype)
            for s in (0, 1)
        )
        assert margin(chosen, rejected, chosen, rejected).abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("quadrant", range(4))
@pytest.mark.parametrize("alpha, b1, tau", SETTINGS)
def test_bfpo_loss_values_and_gradients_in_every_quadrant(alpha, b1, tau, quadrant):
    """Claim: (h - (B_3 (B_1 I_w - I_l) - alpha) / tau)^2 and 2 (h - target). Oracle: these in Python floats."""
    w, l = CHOSEN_SAFE[quadrant].item(), REJECTED_SAFE[quadrant].item()  # noqa: E741
    target = ((b1 * w - l) / (b1 - 1) - alpha) / tau
    h = torch.tensor([-120.0, -3.2, 0.0, 0.7, 80.0], dtype=torch.float64, requires_grad=True)
    g = label(torch.full_like(h, w), torch.full_like(h, l), alpha, b1).detach()
    loss = bfpo_loss(h, g, tau)
    # 1e-13 relative: a difference and a square of float64; the numbers stay away from h = target
    assert loss.tolist() == pytest.approx(
        [(x - target) ** 2 for x in h.tolist()], rel=1e-13, abs=1e-20
    )
    (gradient,) = torch.autograd.grad(loss.sum(), h)
    assert gradient.tolist() == pytest.approx(
        [2 * (x - target) for x in h.tolist()], rel=1e-13, abs=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.01, 0.37, 1.0, 3.0])
def test_both_safe_pair_is_exactly_ipo(tau, dtype):
    """Claim: BFPO on a both-safe pair is IPO bit for bit, and IPO is (h - 1/(2 tau))^2. Oracle: each other;
    the formula.
    """
    h = torch.linspace(-200, 200, 801, dtype=dtype, requires_grad=True)
    bfpo, ipo = bfpo_loss(h, label(torch.ones_like(h), torch.ones_like(h)), tau), ipo_loss(h, tau)
    assert torch.equal(bfpo, ipo)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), h)[0] for loss in (bfpo, ipo)))
    # 1e-12 (fp32: 1e-4) relative to the largest: float rounding of one difference and one square
    scale = (200 + 0.5 / tau) ** 2
    expected = [(x - 1 / (2 * tau)) ** 2 / scale for x in h.tolist()]
    assert (ipo / scale).tolist() == pytest.approx(
        expected, abs=1e-12 if dtype == torch.float64 else 1e-5
    )


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0, 5.0])
def test_dpo_loss_is_minus_log_sigmoid(tau):
    """Claim: -log sigmoid(tau h), gradient -tau sigmoid(-tau h), finite far out.

    Oracle: math.log1p and math.exp.
    """
    h = torch.tensor([-80.0, -2.0, 0.0, 0.3, 60.0], dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(h, tau)
    # 1e-12: log1p and exp differ in the last digits between libm and torch
    assert loss.tolist() == pytest.approx(
        [math.log1p(math.exp(-abs(tau * x))) + max(0.0, -tau * x) for x in h.tolist()], rel=1e-12
    )
    (gradient,) = torch.autograd.grad(loss.sum(), h)
    assert gradient.tolist() == pytest.approx(
        [-tau / (1 + math.exp(tau * x)) for x in h.tolist()], rel=1e-12
    )
    assert dpo_loss(torch.tensor([-1e4, 1e4]), 1.0).isfinite().all()


def test_pair_loss_is_the_one_that_is_named():
    """Claim: bfpo, ipo and dpo are each their own loss, three different ones, bit for bit.

    Oracle: the functions.
    """
    h, g = torch.linspace(-3, 3, 7), torch.linspace(-1, 1, 7)
    losses = [pair_loss(objective, h, g, 0.3) for objective in ("bfpo", "ipo", "dpo")]
    assert all(map(torch.equal, losses, [bfpo_loss(h, g, 0.3), ipo_loss(h, 0.3), dpo_loss(h, 0.3)]))
    with pytest.raises(KeyError):
        pair_loss("sft", h, g, 0.3)


def test_step_0_loss_is_2500_or_10000():
    """Claim: at h = 0 and tau = 0.01 a pair loses (g / tau)^2 = 2500 or 10000.

    Oracle: PAPER's numbers; fp32 to 1e-6.
    """
    loss = bfpo_loss(torch.zeros(4), label(CHOSEN_SAFE.float(), REJECTED_SAFE.float()), 0.01)
    assert loss.tolist() == pytest.approx([2500, 10000, 10000, 2500], rel=1e-6)


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan, math.inf, -math.inf])
def test_every_function_refuses_a_bad_tau(tau):
    """Claim: tau <= 0 or not finite is a ValueError that gives the value and the remedy.

    Oracle: the message.
    """
    h = torch.zeros(4)
    for call in (
        lambda: bfpo_loss(h, h, tau),
        lambda: ipo_loss(h, tau),
        lambda: dpo_loss(h, tau),
        lambda: optimum(PAPER_PREFERENCE, PAPER_SAFE, tau),
    ):
        with pytest.raises(ValueError, match=rf"tau must be finite and > 0, got {tau}; pass"):
            call()


def test_shapes_that_would_broadcast_are_refused():
    """Claim: [N] with [N, 1] is an error in every pairwise function, not N x N pairs.

    Oracle: the message.
    """
    row, column = torch.zeros(3), torch.zeros(3, 1)
    for call in (
        lambda: label(row, column),
        lambda: margin(row, row, column, row),
        lambda: bfpo_loss(row, column, 1.0),
    ):
        with pytest.raises(ValueError, match=r"shapes must be equal, got .*\[3, 1\]"):
            call()


# ---------------------------------------------------------------------------------------------------- the exact optimum


def random_set(seed, actions):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((actions, actions)), 1)
    preference = upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(actions)
    reference = rng.random(actions) + 0.1
    safe = rng.permutation(actions) < rng.integers(1, actions)
    return preference, safe.astype(float), reference / reference.sum()


def scipy_minimum(preference, safe, reference, tau, alpha, b1):
    """The population loss written out by hand in numpy, minimised over theta by BFGS; shares no
    line with bfpo.py.
    """
    b3 = 1 / (b1 - 1)
    target = (b3 * (b1 * safe[:, None] - safe[None, :]) - alpha) / tau
    weight = reference[:, None] * reference[None, :] * preference

    def loss(theta):
        ratio = theta - np.log(reference)
        off = ratio[:, None] - ratio[None, :] - target
        slope = 2 * weight * off * tau**2
        return (weight * off**2).sum() * tau**2, slope.sum(1) - slope.sum(0)

    theta = minimize(
        loss, np.log(reference), jac=True, method="BFGS", options={"gtol": 1e-13, "maxiter": 10_000}
    ).x
    return np.exp(theta - theta.max()) / np.exp(theta - theta.max()).sum()


@pytest.mark.parametrize(
    "alpha, b1, tau",
    [(0.5, 3.0, 1.0), (0.5, 3.0, 0.3), (0.0, 3.0, 0.7), (0.8, 1.5, 1.5), (-0.3, 7.0, 0.5)],
)
@pytest.mark.parametrize("seed, actions", [(0, 2), (1, 4), (2, 6), (3, 8)])
def test_optimum_equals_an_independent_minimiser(seed, actions, alpha, b1, tau):
    """Claim: form 1 on random sets, any reference, alpha, b1, tau.

    Oracle: scipy's BFGS on a hand-written loss.
    """
    preference, safe, reference = random_set(seed, actions)
    exact = optimum(
        *(torch.from_numpy(x) for x in (preference, safe)),
        tau,
        alpha,
        b1,
        torch.from_numpy(reference),
    )
    # 1e-6: BFGS stops on a gradient of about 1e-8 when its line search can gain no more
    np.testing.assert_allclose(
        exact.numpy(), scipy_minimum(preference, safe, reference, tau, alpha, b1), atol=1e-6
    )


def test_optimum_of_section_3_4():
    """Claim: pi* of §3.4, its log-ratios, and integer, bool and fp32 input.

    Oracle: the numbers of PAPER.md, 4 decimals.
    """
    for safe, preference in (
        (PAPER_SAFE, PAPER_PREFERENCE),
        (PAPER_SAFE.bool(), PAPER_PREFERENCE.float()),
    ):
        pi = optimum(preference, safe, tau=1.0)
        assert pi.dtype == torch.float64
        assert pi.tolist() == pytest.approx([0.4110, 0.1177, 0.3201, 0.1512], abs=5e-5)
    log_ratio = (4 * pi).log()
    expected = [0.625, -0.625, 0.375, -0.375]
    assert (log_ratio - log_ratio.mean()).tolist() == pytest.approx(
        expected, abs=1e-12
    )  # float64 logs
    uniform = torch.full((4,), 0.25)
    assert torch.equal(optimum(PAPER_PREFERENCE, PAPER_SAFE, 1.0, reference_A=uniform), pi)


def test_alpha_half_orders_all_six_layouts_and_alpha_zero_none():
    """Claim: alpha = 1/2 gives Figure 2's order in all six layouts, 0 in none; the four-action
    windows. Oracle: PAPER.md.
    """
    windows = {
        (0, 1): (0, 1),
        (2, 3): (0, 1),
        (0, 3): (0, 2 / 3),
        (1, 2): (1 / 3, 1),
        (0, 2): (1 / 4, 3 / 4),
        (1, 3): (1 / 4, 3 / 4),
    }
    for safe, (low, high) in windows.items():
        indicator = torch.tensor([y in safe for y in range(4)])
        unsafe = [y for y in range(4) if y not in safe]
        order = [*safe, *reversed(unsafe)]  # safe: more helpful first; unsafe: less helpful first

        def right(alpha, indicator=indicator, order=order):
            ranked = population_reward(PAPER_PREFERENCE, indicator, alpha)[order]
            return bool((ranked.diff() < -1e-12).all())  # a tie within rounding is not an order

        assert right(0.5) and not right(0.0)
        for edge, inside in ((low, low + 1e-6), (high, high - 1e-6)):
            assert right(inside) and not right(2 * edge - inside)


@pytest.mark.parametrize("alpha, b1", [(0.5, 3.0), (0.0, 3.0), (0.8, 1.5)])
def test_joint_reward_is_the_optimum_under_independence_only(alpha, b1):
    """Claim: form 2 = form 1 + constant on a product-shaped set, not on others; b1 = 3, alpha = 0
    is the RLHF reward. Oracle: form 1, itself held against scipy above; the reward written out.
    """
    preference, _, reference = (torch.from_numpy(x) for x in random_set(5, 3))
    preference = preference.repeat(2, 2)
    reference = torch.cat([0.3 * reference, 0.7 * reference])
    safe = torch.tensor([1, 1, 1, 0, 0, 0])
    difference = joint_reward(preference, safe, alpha, b1, reference) - population_reward(
        preference, safe, alpha, b1, reference
    )
    assert (difference - difference[0]).abs().max() < 1e-14  # float64 rounding of numbers near 1
    shuffled = torch.tensor([1, 0, 1, 0, 1, 0])
    difference = joint_reward(preference, shuffled, alpha, b1, reference) - population_reward(
        preference, shuffled, alpha, b1, reference
    )
    assert (difference - difference[0]).abs().max() > 1e-3
    rlhf = (safe.double() + 0.3) * (preference @ reference + 0.5)
    torch.testing.assert_close(
        joint_reward(preference, safe, 0.0, 3.0, reference), rlhf, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preference_AA": torch.full((4, 4), 0.6)}, "use 1/2 on the diagonal"),
        ({"preference_AA": torch.full((4, 4), math.nan)}, "preference_AA must"),
        (
            {"preference_AA": PAPER_PREFERENCE + torch.tensor([[0, 0.5], [-0.5, 0]]).repeat(2, 2)},
            "preference_AA must",
        ),
        ({"preference_AA": torch.full((3, 3), 0.5)}, r"must be \[A, A\], \[A\], \[A\]"),
        ({"safe_A": torch.tensor([0, 1, 2, 0])}, "safe_A must hold only"),
        ({"safe_A": torch.tensor(1)}, r"must be \[A, A\]"),
        ({"reference_A": torch.tensor([0.5, 0.5, 0.5, 0.5])}, "reference_A must .* sum of 2"),
        ({"reference_A": torch.tensor([0.5, 0.5, 0.0, 0.0])}, "reference_A must be > 0"),
        ({"reference_A": torch.tensor([1.0])}, r"must be \[A, A\]"),
    ],
)
def test_optimum_refuses_what_is_no_action_set(change, message):
    """Claim: preferences that do not mirror, labels, shapes and a pi_ref that is none are refused.

    Oracle: the message.
    """
    arguments = {"preference_AA": PAPER_PREFERENCE, "safe_A": PAPER_SAFE, "tau": 1.0} | change
    with pytest.raises(ValueError, match=message):
        optimum(**arguments)
