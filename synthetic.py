"""The paper's synthetic evidence.

    python synthetic.py             Figure 4 (§3.4): DPO, IPO and BFPO on four actions
    python synthetic.py theorems    bfpo.py's closed forms against a numerical minimiser
    python synthetic.py figure1     Figures 1 and 5 on the toy language
    python synthetic.py tradeoff    alpha, tau and B_1 on it; also: noise, ablations, search

Each command writes to runs/<command>; theorems prints, and exits with 1 if one fails. The commands
on the toy language are in toy/experiments.py.
"""
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions. Here also: O objectives,
# S seeds.

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bfpo import (
    bfpo_loss,
    ipo_loss,
    joint_reward,
    label,
    margin,
    optimum,
    pair_loss,
    population_reward,
)
from support import distributed, plots
from support.storage import write_text

# §3.4. The paper's: Adam, 1800 steps, learning rate 0.01, batch 32 with replacement, tau 1, alpha
# 0.5.
STEPS, LR, BATCH, TAU, ALPHA = 1800, 0.01, 32, 1.0, 0.5
# As IPO, arXiv:2310.12036, §5.4: softmax policy without context, uniform reference, ten seeds, 95 %
# interval.
SEEDS = 10
T_95 = 2.262  # 97.5th percentile of Student's t with SEEDS - 1 degrees of freedom
# Our choice, where nothing readable settles it: four actions, y1 the most helpful, y1 and y3 safe;
# the six pairs (more helpful, less helpful) equally often; pi = pi_ref at step 0.
SAFE = (True, False, True, False)
LAYOUTS = [tuple(y in safe for y in range(4)) for safe in combinations(range(4), 2)]
PAIRS = torch.tensor(list(combinations(range(4), 2)))
PREFERENCE_AA = torch.ones(4, 4, dtype=torch.float64).triu(1) + 0.5 * torch.eye(
    4, dtype=torch.float64
)
UNIFORM_A = torch.full((4,), 0.25, dtype=torch.float64)


def desired_ranking(safe: Sequence[bool]) -> list[int]:
    """Figure 2, best first: safe & helpful, safe & less helpful, unsafe & less helpful, unsafe &
    helpful.
    """
    return sorted(range(len(safe)), key=lambda y: (not safe[y], y if safe[y] else -y))


def ranking(scores_A: Tensor) -> list[int]:
    """Actions (from 0) by falling score [A]; equals in their order."""
    return [int(y) for y in scores_A.argsort(descending=True, stable=True)]


def names(actions: Sequence[int]) -> list[str]:
    """Actions as y1, y2, ..."""
    return [f"y{y + 1}" for y in actions]


# -------------------------------------------------------------------------------------------- Figure 4 (§3.4)


def train_policies(
    objectives: Mapping[str, Sequence[Sequence[bool]]], seeds: int = SEEDS, steps: int = STEPS
) -> Tensor:
    """Probabilities after every step, float64 [steps + 1, layouts, seeds, A]; row 0 is pi_ref.

    objectives: "dpo", "ipo" or "bfpo" -> the layouts (which actions are safe) it is trained on; the
    result has them in that order. A seed draws the same pairs for each. All runs are one parameter
    tensor and one sum of losses: no run's loss holds another's theta and Adam is elementwise, so
    each goes as it would alone.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    draws = torch.stack(
        [
            torch.randint(len(PAIRS), (steps, BATCH), generator=generator)
            for generator in generators
        ],
        dim=1,
    )  # [steps, seeds, N]
    chosen, rejected = PAIRS.unbind(1)
    safe = torch.tensor([layout for layouts in objectives.values() for layout in layouts]).double()
    g = label(safe[:, chosen], safe[:, rejected], ALPHA)  # [layouts, 6]
    ends = list(accumulate(len(layouts) for layouts in objectives.values()))
    layouts_of = {
        name: slice(end - len(objectives[name]), end)
        for name, end in zip(objectives, ends, strict=True)
    }
    theta = torch.zeros(len(safe), seeds, 4, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(theta.detach(), dim=-1)
    optimizer = torch.optim.Adam([theta], lr=LR)
    probabilities = torch.empty(steps + 1, *theta.shape, dtype=torch.float64)
    for step in range(steps):
        policy = torch.log_softmax(theta, dim=-1)
        probabilities[step] = policy.detach().exp()
        h = margin(policy[..., chosen], policy[..., rejected], ref[..., chosen], ref[..., rejected])
        h_batch, g_batch = h.gather(-1, draws[step].expand(len(safe), -1, -1)), g[:, draws[step]]
        loss = torch.cat(
            [
                pair_loss(name, h_batch[rows], g_batch[rows], TAU)
                for name, rows in layouts_of.items()
            ]
        )
        theta.grad = torch.autograd.grad(loss.mean(-1).sum(), theta)[0]  # loss [layouts, seeds, N]
        optimizer.step()
    probabilities[steps] = torch.softmax(theta.detach(), dim=-1)
    return probabilities


def report_figure4(
    objectives: Sequence[str],
    mean_OA: Tensor,
    half_width_OA: Tensor,
    runs_OSA: Tensor,
    exact_A: Tensor,
) -> None:
    """Prints the last step as a table: mean +- 95 % interval, ranking and verdict of each
    objective.
    """
    desired = desired_ranking(SAFE)
    print(
        "\nprobability after the last step, mean +- 95 % interval over seeds; y1 most helpful, y4 least"
    )
    heads = [f"y{y + 1} {'safe' if safe else 'unsafe'}" for y, safe in enumerate(SAFE)]
    print(f"{'':<13}" + "".join(f"{head:<18}" for head in heads) + f"{'ranking':<19}verdict")
    for i, name in enumerate(objectives):
        cells = [
            f"{p:.4f} +- {width:.4f}" for p, width in zip(mean_OA[i], half_width_OA[i], strict=True)
        ]
        order, reached = (
            ranking(mean_OA[i]),
            sum(ranking(run_A) == desired for run_A in runs_OSA[i]),
        )
        print(
            f"{name.upper():<13}"
            + "".join(f"{cell:<18}" for cell in cells)
            + f"{' > '.join(names(order)):<19}"
            f"{'desired' if order == desired else 'NOT desired'}, in {reached} of {SEEDS} seeds"
        )
    print(
        f"{'BFPO, exact':<13}"
        + "".join(f"{p:<18.4f}" for p in exact_A)
        + f"{' > '.join(names(ranking(exact_A))):<19}"
        f"BFPO's mean is within {(mean_OA[-1] - exact_A).abs().max():.4f} of it"
    )
    print(
        f"desired ranking: {' > '.join(names(desired))}, safe before unsafe, the more helpful of two safe "
        "actions first, the less helpful of two unsafe"
    )


def figure4(out: Path) -> None:
    """Trains, prints the table, and writes figure4.png, curves.csv and summary.json into out."""
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"Figure 4 (§3.4): {SEEDS} seeds, {STEPS} Adam steps, lr {LR}, batch {BATCH}, tau {TAU:g}, "
        f"alpha {ALPHA:g}",
        flush=True,
    )
    objectives = ("dpo", "ipo", "bfpo")
    layouts = [SAFE, *(layout for layout in LAYOUTS if layout != SAFE)]
    runs = train_policies({"dpo": [SAFE], "ipo": [SAFE], "bfpo": layouts})
    exact = [optimum(PREFERENCE_AA, torch.tensor(layout), TAU, ALPHA) for layout in layouts]
    mean, half_width = (
        runs.mean(2),
        T_95 * runs.std(2) / SEEDS**0.5,
    )  # [steps + 1, layouts, A]

    report_figure4(objectives, mean[-1, :3], half_width[-1, :3], runs[-1, :3], exact[0])
    desired = [desired_ranking(layout) for layout in layouts]
    exact_reached = sum(
        ranking(exact_A) == order for exact_A, order in zip(exact, desired, strict=True)
    )
    reached = sum(
        ranking(run_A) == order
        for runs_SA, order in zip(runs[-1, 2:], desired, strict=True)
        for run_A in runs_SA
    )
    print(
        "all six layouts of two safe and two unsafe actions: BFPO gives the desired ranking in "
        f"{exact_reached} of {len(layouts)} exact optima and {reached} of {len(layouts) * SEEDS} runs"
    )

    lines = [
        f"{name},{seed},{step}," + ",".join(f"{p:.7g}" for p in policy)
        for i, name in enumerate(objectives)
        for seed in range(SEEDS)
        for step, policy in enumerate(runs[:, i, seed].tolist())
    ]
    write_text(out / "curves.csv", "\n".join(["objective,seed,step,p1,p2,p3,p4", *lines]) + "\n")
    summary: dict[str, object] = {
        name: {"probabilities": mean[-1, i].tolist(), "ranking": names(ranking(mean[-1, i]))}
        for i, name in enumerate(objectives)
    }
    write_text(
        out / "summary.json",
        json.dumps({**summary, "optimum": exact[0].tolist()}, indent=1, allow_nan=False) + "\n",
    )
    plots.figure4(
        out / "figure4.png",
        {name: mean[:, i].numpy() for i, name in enumerate(objectives)},
        {name: half_width[:, i].numpy() for i, name in enumerate(objectives)},
        SAFE,
        desired[0],
        exact[0].tolist(),
    )
    print(f"wrote {out}/figure4.png, curves.csv and summary.json")


# ---------------------------------------------------------------------------------------- the theorem checks


class ActionSet(NamedTuple):
    """A finite action set and the settings of a run on it."""

    preference_AA: Tensor
    safe_A: Tensor
    reference_A: Tensor
    tau: float
    alpha: float
    b1: float

    def centred(self, values_A: Tensor) -> Tensor:
        """Less the mean under pi_ref: what is left of values that are known up to a constant."""
        return values_A - self.reference_A @ values_A


class Check(NamedTuple):
    """One printed line: the error is at most the bound, or at least that where a difference is the
    claim.
    """

    claim: str
    error: float
    bound: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.error >= self.bound if self.at_least else self.error <= self.bound


def random_sets(
    count: int, seed: int, product_shaped: bool = False, actions: int = 0
) -> Iterator[ActionSet]:
    """Random preferences, safety, pi_ref, tau from 0.01 to 2, alpha from -1 to 2, b1 from 1.2 to 6.

    product_shaped: 2 to 4 helpfulness levels, first all safe, then all unsafe, pi_ref = P(safety)
    P(level), so that safety and helpfulness are independent. Else `actions` actions, or 3 to 8;
    some safe, some not.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(count):
        size = integer(2, 4) if product_shaped else actions or integer(3, 8)
        upper = uniform(0, 1, size, size).triu(1)
        preference = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(size, dtype=torch.float64)
        reference = uniform(0.05, 1, size)
        safe = torch.randperm(size, generator=generator) < integer(1, size - 1)
        if product_shaped:
            share = uniform(0.1, 0.9)
            reference = torch.cat([share * reference, (1 - share) * reference])
            preference, safe = preference.repeat(2, 2), torch.arange(2 * size) < size
        yield ActionSet(
            preference,
            safe,
            reference / reference.sum(),
            10 ** uniform(-2, 0.3).item(),
            uniform(-1, 2).item(),
            uniform(1.2, 6).item(),
        )


def minimise(actions: ActionSet) -> Tensor:
    """tau log(pi*/pi_ref) of the population loss's minimiser, centred: [A].

    A Newton step by autograd on theta, through the loss that training uses; it knows no closed
    form.
    """
    preference, safe, reference, tau, alpha, b1 = actions
    chosen, rejected = torch.cartesian_prod(
        torch.arange(len(safe)), torch.arange(len(safe))
    ).unbind(1)
    weight = reference[chosen] * reference[rejected] * preference[chosen, rejected]
    g, ref = label(safe[chosen].double(), safe[rejected].double(), alpha, b1), reference.log()

    def population_loss(theta: Tensor) -> Tensor:
        policy = torch.log_softmax(theta, dim=0)
        h = margin(policy[chosen], policy[rejected], ref[chosen], ref[rejected])
        return (weight * bfpo_loss(h, g, tau)).sum()

    start = torch.zeros_like(reference)
    gradient, hessian = (
        torch.func.grad(population_loss)(start),
        torch.func.hessian(population_loss)(start),
    )
    # Quadratic in theta, so one step arrives. theta + constant is the same policy: hence the
    # pseudo-inverse.
    theta = start - torch.linalg.pinv(hessian, hermitian=True, rtol=1e-10) @ gradient
    return actions.centred(tau * (torch.log_softmax(theta, dim=0) - ref))


def form_error(actions: ActionSet, reward: Callable[..., Tensor]) -> float:
    """Largest distance of one of bfpo.py's rewards from the minimiser, nats x tau."""
    closed_A = reward(
        actions.preference_AA, actions.safe_A, actions.alpha, actions.b1, actions.reference_A
    )
    return (minimise(actions) - actions.centred(closed_A)).abs().max().item()


def rlhf_gradient(actions: ActionSet) -> float:
    """Largest entry of the gradient of E_pi[joint reward] - tau KL(pi || pi_ref) at the minimiser."""
    preference, safe, reference, tau, alpha, b1 = actions
    theta = (reference.log() + minimise(actions) / tau).requires_grad_()
    policy = torch.log_softmax(theta, dim=0)
    kl = (policy.exp() * (policy - reference.log())).sum()
    objective = policy.exp() @ joint_reward(preference, safe, alpha, b1, reference) - tau * kl
    return torch.autograd.grad(objective, theta)[0].abs().max().item()


def check_forms() -> list[Check]:
    """Both closed forms against the minimiser, and where the second one fails."""
    product, six = (
        list(random_sets(100, 1, product_shaped=True)),
        list(random_sets(100, 2, actions=6)),
    )
    paper = ActionSet(PREFERENCE_AA, torch.tensor(SAFE), UNIFORM_A, TAU, ALPHA, 3.0)
    off = torch.tensor([form_error(actions, joint_reward) for actions in six])
    return [
        Check(
            "form 1, 100 random sets of 3 to 8 actions",
            max(form_error(actions, population_reward) for actions in random_sets(100, 0)),
            1e-9,
        ),
        Check(
            "form 2, 100 product-shaped sets (safety and helpfulness independent)",
            max(form_error(actions, joint_reward) for actions in product),
            1e-9,
        ),
        Check(
            "joint RLHF objective, gradient at the supervised optimum, same sets",
            max(rlhf_gradient(actions) for actions in product),
            1e-9,
        ),
        Check(
            "form 1, 100 random six-action sets",
            max(form_error(actions, population_reward) for actions in six),
            1e-9,
        ),
        Check(
            f"form 2 must miss on the same sets: median (from {off.min():.3f} to {off.max():.3f})",
            off.median().item(),
            0.01,
            at_least=True,
        ),
        Check(
            "form 2, the four actions of §3.4, not product-shaped",
            form_error(paper, joint_reward),
            1e-9,
        ),
    ]


def check_alpha() -> list[Check]:
    """The alpha window under independence and those of §3.4's layouts, read off the minimiser.

    tau log(pi*/pi_ref) is linear in alpha: its values at alpha 0 and 1 give the alpha at which
    actions tie.
    """

    def at_0_and_1(actions: ActionSet) -> tuple[Tensor, Tensor]:
        return minimise(actions._replace(alpha=0.0)), minimise(actions._replace(alpha=1.0))

    edge_errors = []
    for actions in random_sets(100, 3, product_shaped=True):
        levels, safe_share = (
            len(actions.safe_A) // 2,
            (actions.reference_A @ actions.safe_A.double()).item(),
        )
        helpful_A = (actions.preference_AA @ actions.reference_A)[:levels]
        best, worst = int(helpful_A.argmax()), int(helpful_A.argmin())
        u_0, u_1 = at_0_and_1(actions)
        for first, edge in (
            (0, (1 + safe_share) / 2),
            (levels, safe_share / 2),
        ):  # safe actions, unsafe ones
            gap_0, gap_1 = ((u_A[first + best] - u_A[first + worst]).item() for u_A in (u_0, u_1))
            edge_errors.append(abs(gap_0 / (gap_0 - gap_1) - edge))

    derived = [(0, 1), (1 / 4, 3 / 4), (0, 2 / 3), (1 / 3, 1), (1 / 4, 3 / 4), (0, 1)]  # by LAYOUTS
    window_errors, windows = [], []
    for layout, window in zip(LAYOUTS, derived, strict=True):
        actions = ActionSet(PREFERENCE_AA, torch.tensor(layout), UNIFORM_A, TAU, ALPHA, 3.0)
        # a gap is positive where two neighbours of the desired ranking are in order
        gaps_0, gaps_1 = (-u_A[desired_ranking(layout)].diff() for u_A in at_0_and_1(actions))
        ties, rising = gaps_0 / (gaps_0 - gaps_1), gaps_1 > gaps_0
        low, high = ties[rising].max().item(), ties[~rising].min().item()
        window_errors += [abs(low - window[0]), abs(high - window[1])]
        safe = ",".join(
            name for name, is_safe in zip(names(range(4)), layout, strict=True) if is_safe
        )
        windows.append(f"{safe} ({abs(low):.2f}, {high:.2f})")
    print("alpha windows of §3.4's layouts, by their safe actions: " + "; ".join(windows))
    return [
        Check(
            "alpha window (E/2, (1 + E)/2), 100 product-shaped sets (in alpha)",
            max(edge_errors),
            1e-8,
        ),
        Check("alpha windows of §3.4's six layouts (in alpha)", max(window_errors), 1e-9),
    ]


def check_ipo() -> list[Check]:
    """A both-safe pair is IPO's, bit for bit; with every action safe the optimum is the one IPO
    proves.
    """
    h = torch.linspace(-300, 300, 1001, dtype=torch.float64, requires_grad=True)
    pair_errors, optimum_errors = [], []
    for tau in (0.01, 0.37, 1.0):
        bfpo, ipo = (
            bfpo_loss(h, label(torch.ones_like(h), torch.ones_like(h)), tau),
            ipo_loss(h, tau),
        )
        gradients = [torch.autograd.grad(loss.sum(), h)[0] for loss in (bfpo, ipo)]
        pair_errors += [
            (bfpo - ipo).abs().max().item(),
            (gradients[0] - gradients[1]).abs().max().item(),
        ]
    for actions in random_sets(100, 4):
        safe = actions._replace(safe_A=torch.ones_like(actions.safe_A), alpha=0.5)
        helpful_A = safe.preference_AA @ safe.reference_A
        optimum_errors.append((minimise(safe) - safe.centred(helpful_A)).abs().max().item())
    return [
        Check("both safe = IPO, loss and gradient, tau 0.01, 0.37, 1", max(pair_errors), 0.0),
        Check(
            "all safe: IPO's optimum pi_ref exp(p(y) / tau) / Z, 100 random sets",
            max(optimum_errors),
            1e-9,
        ),
    ]


def theorems() -> int:
    """Runs and prints every check; 0 if all hold, else 1."""
    checks = [*check_forms(), *check_alpha(), *check_ipo()]
    print(
        f"{'':<6}{'claim (errors in nats x tau where nothing else is said)':<80}{'error':<10}tolerance"
    )
    for check in checks:
        print(
            f"{'ok' if check.passed else 'FAIL':<6}{check.claim:<80}{check.error:<10.1e}"
            f"{'>=' if check.at_least else '<='} {check.bound:g}"
        )
    held = sum(check.passed for check in checks)
    print(f"{held} of {len(checks)} checks hold")
    return 0 if held == len(checks) else 1


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="synthetic.py", description="The paper's synthetic evidence."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("figure4", help="Figure 4; also what runs without a command")
    command.add_argument(
        "--out", type=Path, default=Path("runs/figure4"), help="folder (runs/figure4)"
    )
    command.set_defaults(run=lambda options: figure4(options.out))
    command = commands.add_parser("theorems", help="the closed forms against a numerical minimiser")
    command.set_defaults(run=lambda options: theorems())
    if not arguments or arguments[0].startswith("--out"):
        arguments = ["figure4", *arguments]
    if arguments[0] not in ("figure4", "theorems"):
        from toy import experiments  # a transformer and its training, which the others do not need

        experiments.add_commands(commands)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tensors of a few numbers: more threads only wait for each other
    with distributed.errors_in_one_line():
        return int(options.run(options) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
