"""bfpo.py's quadrants against loops over pairs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo import QUADRANTS, quadrant_means, quadrant_sums

CHOSEN_SAFE = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)  # in the order of QUADRANTS
REJECTED_SAFE = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(-200, 200)), max_size=30))
def test_quadrant_means_equal_a_loop_over_pairs(pairs):
    """Claim: means, targets and shares of each quadrant, empty ones left out.

    Oracle: a loop with ifs, no masks.
    """
    safe = torch.tensor([pair[:2] for pair in pairs], dtype=torch.bool).reshape(-1, 2)
    h = torch.tensor([x for _, _, x in pairs], dtype=torch.float64)
    means = quadrant_means(quadrant_sums(h, safe[:, 0], safe[:, 1], 0.5, 3.0, 0.01))
    for quadrant, labels, target in zip(
        QUADRANTS, [(1, 1), (1, 0), (0, 1), (0, 0)], [50, 100, -100, -50], strict=True
    ):
        mine = [x for a, b, x in pairs if (a, b) == labels]
        assert (quadrant in means) == bool(mine)
        if mine:
            found = means[quadrant]
            assert found["pairs"] == len(mine) and isinstance(found["pairs"], int)
            # fp32 labels / tau: 1e-6 relative; a float64 sum in another order: 1e-12
            assert found["target_nats"] == pytest.approx(target, rel=1e-6)
            assert found["margin_nats"] == pytest.approx(
                sum(mine) / len(mine), rel=1e-12, abs=1e-12
            )
            assert found["target_side_share"] == sum(
                x > 0 if target > 0 else x < 0 for x in mine
            ) / len(mine)


def test_target_side_follows_the_targets_sign():
    """Claim: h > 0 fails where h < 0 is asked for, h = 0 is on no side, a target of 0 has none.

    Oracle: defect 6 of the authors' code.
    """
    for h, shares in ((5.0, [1, 1, 0, 0]), (-5.0, [0, 0, 1, 1]), (0.0, [0, 0, 0, 0])):
        means = quadrant_means(
            quadrant_sums(torch.full((4,), h), CHOSEN_SAFE, REJECTED_SAFE, 0.5, 3.0, 1.0)
        )
        assert [means[quadrant]["target_side_share"] for quadrant in QUADRANTS] == shares
    for alpha, quadrant in ((1.0, "both_safe"), (0.0, "both_unsafe")):  # their targets are 0
        means = quadrant_means(
            quadrant_sums(torch.ones(4), CHOSEN_SAFE, REJECTED_SAFE, alpha, 3.0, 1.0)
        )
        assert [name for name in QUADRANTS if "target_side_share" not in means[name]] == [quadrant]


def test_quadrant_sums_add_up_and_do_not_leak():
    """Claim: sums of parts are the sum of the whole; a NaN or an infinity counts nowhere; no
    gradient; labels of any dtype. Oracle: the whole batch in one call.
    """
    generator = torch.Generator().manual_seed(0)
    safe = torch.randint(2, (2, 40), generator=generator)
    h, setting = torch.randn(40, generator=generator, requires_grad=True), (0.8, 1.5, 0.5)
    whole = quadrant_sums(h, *safe, *setting)
    parts = [
        quadrant_sums(h[part], *safe[:, part].bool(), *setting)
        for part in (slice(0, 7), slice(7, 7), slice(7, 40))
    ]
    assert whole.dtype == torch.float64 and whole.shape == (4, 4) and not whole.requires_grad
    torch.testing.assert_close(
        sum(parts), whole, rtol=0, atol=1e-12
    )  # float64 sums in another order
    broken = h.detach().clone()
    broken[3], broken[11] = math.nan, -math.inf
    kept = [i for i in range(40) if i not in (3, 11)]
    assert torch.equal(
        quadrant_sums(broken, *safe, *setting), quadrant_sums(h[kept], *safe[:, kept], *setting)
    )


def test_quadrant_sums_refuse_what_is_no_pair():
    """Claim: a label other than 0 and 1, labels of two shapes, and margins of another shape than
    theirs are errors. Oracle: the message.
    """
    with pytest.raises(ValueError, match="must hold only"):
        quadrant_sums(torch.zeros(2), torch.tensor([1.0, math.nan]), torch.zeros(2), 0.5, 3.0, 1.0)
    with pytest.raises(ValueError, match="shapes must be equal"):
        quadrant_sums(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1), 0.5, 3.0, 1.0)
    with pytest.raises(RuntimeError, match="equal size"):
        quadrant_sums(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3), 0.5, 3.0, 1.0)
