"""The paper's synthetic evidence.

    python synthetic.py             Figure 4 (§3.4): DPO, IPO and BFPO on four actions
    python synthetic.py theorems    bfpo.py's closed forms against a numerical minimiser
    python synthetic.py figure1     Figures 1 and 5 on the toy language
    python synthetic.py tradeoff    alpha, tau and B_1 on it; also: noise, ablations, search

Each command writes to runs/<command>; theorems prints, and exits with 1 if one fails. The commands
on the toy language are in toy/experiments.py.
"""
# Dimension key: A actions, L layouts (which actions are safe), S seeds, N pairs of a batch.

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bfpo import bfpo_loss, joint_reward, label, margin, optimum, pair_loss, population_reward
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
PAIRS = torch.tensor(list(combinations(range(4), 2)))
PREFERENCE_AA = torch.ones(4, 4).double().triu(1) + 0.5 * torch.eye(4).double()
# Every layout of two safe and two unsafe actions -> the alphas between which its exact optimum has
# Figure 2's ranking. By hand, from the closed form that holds for every action set (form 1).
WINDOWS = {
    (True, True, False, False): (0, 1),
    SAFE: (1 / 4, 3 / 4),
    (True, False, False, True): (0, 2 / 3),
    (False, True, True, False): (1 / 3, 1),
    (False, True, False, True): (1 / 4, 3 / 4),
    (False, False, True, True): (0, 1),
}
LAYOUTS = list(WINDOWS)


def desired_ranking(safe: Sequence[bool]) -> list[int]:
    """Figure 2, best first: safe & helpful, safe & less helpful, unsafe & less helpful, unsafe &
    helpful.
    """
    return sorted(range(len(safe)), key=lambda y: (not safe[y], y if safe[y] else -y))


def ranking(scores_A: Tensor) -> list[int]:
    """Actions (from 0) by falling score [A]; equals in their order."""
    return list(scores_A.argsort(descending=True, stable=True).tolist())


def names(actions: Sequence[int]) -> list[str]:
    """Actions as y1, y2, ..."""
    return [f"y{y + 1}" for y in actions]


# --- Figure 4 (§3.4) ------------------------------------------------------------------------------


def train_policies(
    objective: str, layouts: Sequence[Sequence[bool]], seeds: int = SEEDS, steps: int = STEPS
) -> Tensor:
    """Probabilities before the first and after every step, float64 [steps + 1, L, S, A].

    objective: "dpo", "ipo" or "bfpo". A seed draws the same pairs for every objective and layout.
    All runs are one parameter tensor and one sum of losses. Each goes as it would alone: no run's
    loss holds another's theta, and Adam is elementwise.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    drawn = [torch.randint(len(PAIRS), (steps, BATCH), generator=each) for each in generators]
    draws_SN = torch.stack(drawn, dim=1)  # [steps, S, N]: which of PAIRS
    chosen, rejected = PAIRS.unbind(1)  # [6] each
    safe_LA = torch.tensor(layouts).double()
    g = label(safe_LA[:, chosen], safe_LA[:, rejected], ALPHA)  # [L, 6]

    theta = torch.zeros(len(layouts), seeds, 4, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(theta.detach(), dim=-1)
    optimizer = torch.optim.Adam([theta], lr=LR)
    probabilities = []
    for draw_SN in draws_SN:
        policy = torch.log_softmax(theta, dim=-1)
        probabilities.append(policy.detach().exp())
        h = margin(policy[..., chosen], policy[..., rejected], ref[..., chosen], ref[..., rejected])
        # Of h [L, S, 6] and g [L, 6] the drawn pairs: h_batch[l, s, n] is h[l, s, draw_SN[s, n]].
        h_batch = torch.take_along_dim(h, draw_SN[None], dim=-1)
        g_batch = g[:, draw_SN]
        losses = pair_loss(objective, h_batch, g_batch, TAU)  # [L, S, N]
        optimizer.zero_grad()
        torch.autograd.backward(losses.mean(-1).sum())
        optimizer.step()
    probabilities.append(torch.softmax(theta.detach(), dim=-1))
    return torch.stack(probabilities)


def print_row(name: str, cells: Sequence[str], order: str, verdict: str) -> None:
    """A line of the table below Figure 4."""
    print(f"{name:<13}" + "".join(f"{cell:<18}" for cell in cells) + f"{order:<19}{verdict}")


def report_figure4(final: Mapping[str, Tensor], exact_A: Tensor) -> None:
    """Prints the last step: mean +- 95 % interval, ranking and verdict; objective -> [S, A]."""
    desired = desired_ranking(SAFE)
    print("\nprobability after the last step, mean +- 95 % interval over seeds")
    heads = [f"y{y + 1} {'safe' if safe else 'unsafe'}" for y, safe in enumerate(SAFE)]
    print_row("", heads, "ranking", "verdict")
    for name, final_SA in final.items():
        mean_A = final_SA.mean(0)
        last = zip(mean_A, T_95 * final_SA.std(0) / SEEDS**0.5, strict=True)
        cells = [f"{p:.4f} +- {width:.4f}" for p, width in last]
        order = ranking(mean_A)
        verdict = "desired" if order == desired else "NOT desired"
        reached = sum(ranking(run_A) == desired for run_A in final_SA)
        verdict += f", in {reached} of {SEEDS} seeds"
        print_row(name.upper(), cells, " > ".join(names(order)), verdict)
    distance = (final["bfpo"].mean(0) - exact_A).abs().max()
    verdict = f"BFPO's mean is within {distance:.4f} of it"
    cells = [f"{p:.4f}" for p in exact_A]
    print_row("BFPO, exact", cells, " > ".join(names(ranking(exact_A))), verdict)
    print(f"desired ranking (Figure 2; y1 is the most helpful): {' > '.join(names(desired))}")


def report_layouts(final_LSA: Tensor) -> None:
    """Prints how often BFPO reaches Figure 2's ranking on all six layouts."""
    exact_orders = []
    orders = []
    for layout, final_SA in zip(LAYOUTS, final_LSA, strict=True):
        desired = desired_ranking(layout)
        exact_A = optimum(PREFERENCE_AA, torch.tensor(layout), TAU, ALPHA)
        exact_orders.append(ranking(exact_A) == desired)
        orders += [ranking(run_A) == desired for run_A in final_SA]
    print(
        "all six layouts of two safe and two unsafe actions: BFPO gives the desired ranking in "
        f"{sum(exact_orders)} of {len(exact_orders)} exact optima and "
        f"{sum(orders)} of {len(orders)} runs"
    )


def write_curves(path: Path, runs: Mapping[str, Tensor]) -> None:
    """Every probability of every step as CSV; runs: objective -> [steps + 1, S, A]."""
    lines = ["objective,seed,step,p1,p2,p3,p4"]
    for name, run in runs.items():
        for seed in range(SEEDS):
            for step, policy in enumerate(run[:, seed].tolist()):
                lines.append(f"{name},{seed},{step}," + ",".join(f"{p:.7g}" for p in policy))
    write_text(path, "\n".join(lines) + "\n")


def figure4(out: Path) -> None:
    """Trains, prints the table, and writes figure4.png, curves.csv and summary.json into out."""
    out.mkdir(parents=True, exist_ok=True)
    settings = f"lr {LR}, batch {BATCH}, tau {TAU:g}, alpha {ALPHA:g}"
    print(f"Figure 4 (§3.4): {SEEDS} seeds, {STEPS} Adam steps, {settings}", flush=True)
    bfpo = train_policies("bfpo", LAYOUTS)
    runs = {objective: train_policies(objective, [SAFE])[:, 0] for objective in ("dpo", "ipo")}
    runs["bfpo"] = bfpo[:, LAYOUTS.index(SAFE)]
    exact_A = optimum(PREFERENCE_AA, torch.tensor(SAFE), TAU, ALPHA)
    report_figure4({name: run[-1] for name, run in runs.items()}, exact_A)
    report_layouts(bfpo[-1])

    write_curves(out / "curves.csv", runs)
    means = {name: run.mean(1) for name, run in runs.items()}  # [steps + 1, A]
    widths = {name: (T_95 * run.std(1) / SEEDS**0.5).numpy() for name, run in runs.items()}
    exact = exact_A.tolist()
    summary: dict[str, object] = {}
    for name, mean in means.items():
        order = names(ranking(mean[-1]))
        summary[name] = {"probabilities": mean[-1].tolist(), "ranking": order}
    summary["optimum"] = exact
    write_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    curves = {name: mean.numpy() for name, mean in means.items()}
    plots.figure4(out / "figure4.png", curves, widths, SAFE, desired_ranking(SAFE), exact)
    print(f"wrote {out}/figure4.png, curves.csv and summary.json")


# --- the theorem checks ---------------------------------------------------------------------------


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
    """One printed line: the error is at most the bound; at_least, where a difference is the claim,
    at least that.
    """

    claim: str
    error: float
    bound: float = 1e-9
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.error >= self.bound if self.at_least else self.error <= self.bound


UNIFORM_A = torch.full((4,), 0.25, dtype=torch.float64)
FOUR = ActionSet(PREFERENCE_AA, torch.tensor(SAFE), UNIFORM_A, TAU, ALPHA, b1=3.0)  # §3.4's


def random_sets(
    count: int, seed: int, product_shaped: bool = False, actions: int = 0
) -> Iterator[ActionSet]:
    """Random preferences, safety, pi_ref, tau from 0.01 to 2, alpha from -1 to 2, b1 from 1.2 to 6.

    Of `actions` actions, or 3 to 8; some safe, some not. product_shaped: 2 to 4 helpfulness levels,
    first all safe, then all unsafe, with pi_ref = P(safety) P(level). Then safety and helpfulness
    are independent.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(count):
        least, most = (2, 4) if product_shaped else (3, 8)
        size = actions or integer(least, most)
        upper = uniform(0, 1, size, size).triu(1)
        preference = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(size, dtype=torch.float64)
        reference = uniform(0.05, 1, size)
        safe = torch.randperm(size, generator=generator) < integer(1, size - 1)
        if product_shaped:
            share = uniform(0.1, 0.9)
            reference = torch.cat([share * reference, (1 - share) * reference])
            preference = preference.repeat(2, 2)
            safe = torch.arange(2 * size) < size
        tau = 10 ** uniform(-2, 0.3).item()
        alpha = uniform(-1, 2).item()
        b1 = uniform(1.2, 6).item()
        yield ActionSet(preference, safe, reference / reference.sum(), tau, alpha, b1)


def minimise(actions: ActionSet) -> Tensor:
    """tau log(pi*/pi_ref) of the population loss's minimiser, centred: [A].

    A Newton step by autograd on theta, through the loss that training uses; it knows no closed
    form.
    """
    preference, safe, reference, tau, alpha, b1 = actions
    every = torch.arange(len(safe))
    chosen, rejected = torch.cartesian_prod(every, every).unbind(1)
    weight = reference[chosen] * reference[rejected] * preference[chosen, rejected]
    g = label(safe[chosen].double(), safe[rejected].double(), alpha, b1)
    ref = reference.log()

    def population_loss(theta: Tensor) -> Tensor:
        policy = torch.log_softmax(theta, dim=0)
        h = margin(policy[chosen], policy[rejected], ref[chosen], ref[rejected])
        return (weight * bfpo_loss(h, g, tau)).sum()

    start = torch.zeros_like(reference)
    gradient = torch.func.grad(population_loss)(start)
    hessian = torch.func.hessian(population_loss)(start)
    # Quadratic in theta, so one step arrives. theta + constant is the same policy: hence the
    # pseudo-inverse.
    theta = start - torch.linalg.pinv(hessian, hermitian=True, rtol=1e-10) @ gradient
    return actions.centred(tau * (torch.log_softmax(theta, dim=0) - ref))


def form_error(actions: ActionSet, reward: Callable[..., Tensor]) -> float:
    """Largest distance of one of bfpo.py's rewards from the minimiser, nats x tau."""
    preference, safe, reference, _, alpha, b1 = actions
    closed_A = reward(preference, safe, alpha, b1, reference)
    return (minimise(actions) - actions.centred(closed_A)).abs().max().item()


def rlhf_gradient(actions: ActionSet) -> float:
    """Largest gradient entry of E_pi[joint reward] - tau KL(pi || pi_ref), at the minimiser."""
    preference, safe, reference, tau, alpha, b1 = actions
    theta = (reference.log() + minimise(actions) / tau).requires_grad_()
    policy = torch.log_softmax(theta, dim=0)
    kl = (policy.exp() * (policy - reference.log())).sum()
    objective = policy.exp() @ joint_reward(preference, safe, alpha, b1, reference) - tau * kl
    return torch.autograd.grad(objective, theta)[0].abs().max().item()


def largest(error: Callable[..., float], sets: Sequence[ActionSet], *more: object) -> float:
    """The largest error over the action sets."""
    return max(error(actions, *more) for actions in sets)


def check_forms() -> list[Check]:
    """Both closed forms against the minimiser, and where the second one fails."""
    form1, form2 = population_reward, joint_reward
    any_sets = list(random_sets(100, 0))
    product = list(random_sets(100, 1, product_shaped=True))
    six = list(random_sets(100, 2, actions=6))
    off = torch.tensor([form_error(actions, form2) for actions in six])
    missed = f"median (from {off.min():.3f} to {off.max():.3f})"
    both = "product-shaped sets (safety and helpfulness independent)"
    return [
        Check("form 1, 100 random sets of 3 to 8 actions", largest(form_error, any_sets, form1)),
        Check(f"form 2, 100 {both}", largest(form_error, product, form2)),
        Check("joint RLHF objective's gradient there, same sets", largest(rlhf_gradient, product)),
        Check("form 1, 100 random six-action sets", largest(form_error, six, form1)),
        Check(f"form 2 must miss on the same sets: {missed}", off.median().item(), 0.01, True),
        Check("form 2, the four actions of §3.4, not product-shaped", form_error(FOUR, form2)),
    ]


def ties(actions: ActionSet, first: list[int], second: list[int]) -> tuple[Tensor, Tensor]:
    """(the alphas at which the minimiser treats first[i] and second[i] alike, whether the gap
    between them rises with alpha).

    tau log(pi*/pi_ref) is linear in alpha. So are the gaps, and two values of alpha give the line.
    """
    at_0 = minimise(actions._replace(alpha=0.0))
    at_1 = minimise(actions._replace(alpha=1.0))
    gap_0 = at_0[first] - at_0[second]
    gap_1 = at_1[first] - at_1[second]
    return gap_0 / (gap_0 - gap_1), gap_1 > gap_0


def check_independent_window() -> Check:
    """Proposition 3.3: under independence, (E/2, (1 + E)/2) with E the share of safe actions.

    Above its upper end a safe action gains less than a less helpful safe one. Below its lower end
    an unsafe action gains more than a less helpful unsafe one.
    """
    errors = []
    for actions in random_sets(100, 3, product_shaped=True):
        levels = len(actions.safe_A) // 2  # the safe actions; the unsafe ones follow
        share = (actions.reference_A @ actions.safe_A.double()).item()
        helpful_A = (actions.preference_AA @ actions.reference_A)[:levels]
        best = int(helpful_A.argmax())
        worst = int(helpful_A.argmin())
        edges, _ = ties(actions, [best, levels + best], [worst, levels + worst])
        errors += [abs(edges[0].item() - (1 + share) / 2), abs(edges[1].item() - share / 2)]
    claim = "alpha window (E/2, (1 + E)/2), 100 product-shaped sets (in alpha)"
    return Check(claim, max(errors), 1e-8)


def check_windows() -> Check:
    """WINDOWS, read off the minimiser; prints them."""
    errors = []
    words = []
    for layout, window in WINDOWS.items():
        order = desired_ranking(layout)
        # A gap is positive where two neighbours of the desired ranking are in order.
        alphas, rising = ties(FOUR._replace(safe_A=torch.tensor(layout)), order[:-1], order[1:])
        low = alphas[rising].max().item()
        high = alphas[~rising].min().item()
        errors += [abs(low - window[0]), abs(high - window[1])]
        safe = ",".join(names([y for y in range(4) if layout[y]]))
        words.append(f"{safe} ({abs(low):.2f}, {high:.2f})")
    print("alpha windows of §3.4's layouts, by their safe actions: " + "; ".join(words))
    return Check("alpha windows of §3.4's six layouts (in alpha)", max(errors))


def check_ipo() -> list[Check]:
    """A both-safe pair is IPO's, bit for bit; with every action safe the optimum is the one IPO
    proves.
    """
    h = torch.linspace(-300, 300, 1001, dtype=torch.float64, requires_grad=True)
    g = label(torch.ones_like(h), torch.ones_like(h))
    pair_errors = []
    for tau in (0.01, 0.37, 1.0):
        losses = [pair_loss(name, h, g, tau) for name in ("bfpo", "ipo")]
        gradients = [torch.autograd.grad(loss.sum(), h)[0] for loss in losses]
        for bfpo, ipo in (losses, gradients):
            pair_errors.append((bfpo - ipo).abs().max().item())
    optimum_errors = []
    for actions in random_sets(100, 4):
        safe = actions._replace(safe_A=torch.ones_like(actions.safe_A), alpha=0.5)
        helpful_A = safe.preference_AA @ safe.reference_A
        optimum_errors.append((minimise(safe) - safe.centred(helpful_A)).abs().max().item())
    return [
        Check("both safe = IPO, loss and gradient, tau 0.01, 0.37, 1", max(pair_errors), 0.0),
        Check("all safe: IPO's pi_ref exp(p(y) / tau) / Z, 100 random sets", max(optimum_errors)),
    ]


def theorems() -> int:
    """Runs and prints every check; 0 if all hold, else 1."""
    checks = [*check_forms(), check_independent_window(), check_windows(), *check_ipo()]
    head = "claim (errors in nats x tau where nothing else is said)"
    print(f"{'':<6}{head:<80}{'error':<10}tolerance")
    for check in checks:
        verdict = "ok" if check.passed else "FAIL"
        relation = ">=" if check.at_least else "<="
        print(f"{verdict:<6}{check.claim:<80}{check.error:<10.1e}{relation} {check.bound:g}")
    held = sum(check.passed for check in checks)
    print(f"{held} of {len(checks)} checks hold")
    return 0 if held == len(checks) else 1


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("synthetic.py", description="The paper's synthetic evidence.")
    commands = parser.add_subparsers(dest="command", required=True)
    figure = commands.add_parser("figure4", help="Figure 4; also what runs without a command")
    figure.add_argument("--out", type=Path, default=Path("runs/figure4"), help="(runs/figure4)")
    figure.set_defaults(run=lambda options: figure4(options.out))
    checks = commands.add_parser("theorems", help="the closed forms against a numerical minimiser")
    checks.set_defaults(run=lambda options: theorems())
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
