"""Red-teaming data as the paper makes it (§4.2): two sampled answers to each harmful prompt.

A judge labels the answers for safety, and another orders them by helpfulness:

    python -m tasks.redteam --model DIR --prompts FILE --judge harmbench:DIR --pairwise DIR \\
        --out runs/pairs
    python train.py redteam --model DIR --safety runs/pairs/redteam.jsonl

The order can come from elsewhere, as the paper's does (PairRM is no causal language model;
deviation 11): without --pairwise the answers are written to to_rank.jsonl, and --ranks FILE takes
its rows back, each with "ranks": [1, 2] or [2, 1], 1 for the better answer.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import Policy, case_of, judged
from model import LEAST_TEMPERATURE, find_model
from support import distributed, sources, storage
from support.distributed import World
from support.sources import sha256
from tasks import questions
from tasks.alpaca import kept_preferences
from tasks.judges import Contest, Examiner, file_name, load_judge
from tasks.metrics import Request
from tasks.questions import PROTOCOLS, Task

FREE = frozenset(
    {"judge", "pairwise", "ranks", "out", "fresh", "device"}
)  # may differ when a run goes on
Ranked = tuple[str, Mapping[str, Any]]  # file:line, and the row of to_rank.jsonl with "ranks"
PROMPT = Task("", "", questions.goal("prompt", "goal", "text", "Behavior"), "harmless")


def pairs_of(
    answers: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(rows for the recipe redteam, but for better_modelout; counts), of two neighbouring answers a
    prompt and their verdicts.

    Harm above 1/2 is unsafe. Empty and equal answers make no pair, as training would drop them.
    """
    counts, pairs = (
        {"prompts": len(answers) // 2, "with_an_empty_answer": 0, "with_equal_answers": 0},
        [],
    )
    for one, two, first, second in zip(
        answers[::2], answers[1::2], verdicts[::2], verdicts[1::2], strict=True
    ):
        texts = one["prompt"], one["answer"], two["answer"]
        if not all(text.strip() for text in texts):
            counts["with_an_empty_answer"] += 1
        elif texts[1] == texts[2]:
            counts["with_equal_answers"] += 1
        else:
            pairs.append(
                {
                    **dict(zip(("prompt", "modeloutput1", "modeloutput2"), texts, strict=True)),
                    "is_modelout1_safe": first["harm"] <= 0.5,
                    "is_modelout2_safe": second["harm"] <= 0.5,
                }
            )
    return pairs, counts


def read_ranks(path: Path, prompts: Collection[str]) -> list[Ranked]:
    """(file:line, row) of a file of ranks.

    ValueError names the first line that is no ranked row of one of these prompts.
    """
    ranked: list[Ranked] = []
    for place, row in sources.read_rows(path):
        if not isinstance(row, dict) or row.get("prompt") not in prompts:
            raise ValueError(
                f"{place} must be a row of to_rank.jsonl, of one of --prompts, with ranks, got {row!r:.200}"
            )
        if row.get("ranks") not in ([1, 2], [2, 1]):
            raise ValueError(
                f"{place}: ranks must be [1, 2] or [2, 1], 1 for the better answer, got {row.get('ranks')!r}"
            )
        ranked.append((place, row))
    return ranked


def must_not_have_ranks(path: Path) -> None:
    """ValueError when somebody has added ranks to this to_rank.jsonl, which would be written over."""
    rows = [row for _, row in sources.read_rows(path)] if path.exists() else []
    if any("ranks" in row for row in rows if isinstance(row, dict)):
        raise ValueError(
            f"{path} has ranks, which are not written over; pass --ranks {path}, or move it away"
        )


def ranks_of(ranked: Sequence[Ranked], pairs: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """1 or 2 of each pair: the answer of rank 1.

    ValueError names the first line that is not the pair's row.
    """
    for (place, row), pair in zip(ranked, pairs, strict=False):
        if any(row.get(key) != pair[key] for key in ("prompt", "modeloutput1", "modeloutput2")):
            raise ValueError(
                f"{place} must be the row of to_rank.jsonl in its place, with ranks, got {row!r:.200}"
            )
        yield row["ranks"].index(1) + 1
    if len(ranked) != len(pairs):
        raise ValueError(
            f"--ranks must rank the {len(pairs)} rows of to_rank.jsonl, got {len(ranked)}"
        )


def order(
    pairs: Sequence[Mapping[str, Any]], ranks: Examiner | list[Ranked], folder: Path, world: World
) -> list[int | None]:
    """1 or 2 of each pair, the more helpful answer; None where the two do not fit into the pairwise
    judge's context.
    """
    if isinstance(ranks, list):
        return world.from_main(lambda: list(ranks_of(ranks, pairs)))
    contests = [
        Contest(pair["prompt"], pair["modeloutput1"], pair["modeloutput2"]) for pair in pairs
    ]
    found = kept_preferences(
        folder / f"preferences.{file_name(ranks.identity)}.jsonl", ranks, contests, world
    )
    return [None if one is None else 2 if one["second"] > 0.5 else 1 for one in found]


def run(options: argparse.Namespace, world: World) -> None:
    """From prompts to redteam.jsonl and report.json in --out.

    What is there already is not computed again.
    """
    protocol = PROTOCOLS["paper"]._replace(
        temperature=options.temperature, max_new_tokens=options.max_new_tokens
    )
    folder = storage.RunFolder(Path(options.out), world, "redteam")
    reads = [
        options.model,
        options.prompts,
        options.chat_template,
        options.pairwise,
        options.judge.partition(":")[2],
    ]
    folder.check(vars(options), FREE, options.fresh, [*filter(None, reads)])
    find_model(options.model, weights=False)  # before the judges' weights are summed
    judge = load_judge(options.judge, world, folder.started)
    ranks: Examiner | list[Ranked] | None = (
        Examiner("pairwise", options.pairwise, world, folder.started) if options.pairwise else None
    )
    asked = world.from_main(
        lambda: questions.load("prompts", options.prompts, protocol, options.limit, PROMPT)
    )
    if options.ranks:
        prompts = {request.prompt for _, request in asked}
        ranks = world.from_main(lambda: read_ranks(Path(options.ranks), prompts))
    judge.check([case_of(request, "") for _, request in asked])
    entries: list[tuple[str, Request]] = [entry for entry in asked for _ in range(2)]
    policy = Policy(options.model, options.chat_template, world, folder.started)
    policy.check(protocol.max_new_tokens, "pass a smaller --max_new_tokens")
    cut = policy.check_rows("prompts", PROMPT, asked, protocol)
    waiting = folder.path / "to_rank.jsonl"
    if ranks is None and not options.fresh:
        world.from_main(lambda: must_not_have_ranks(waiting))
    facts = {"chat_template_source": policy.chat.template_source}
    folder.create(vars(options), {}, options.fresh, facts)

    answers = policy.take(folder.path / "answers.jsonl", PROMPT, entries, protocol, options.seed)
    policy.unload()
    pairs, counts = pairs_of(
        answers, judged(folder.path, "answers", entries, answers, judge, world)
    )
    counts |= {
        "cut_to_the_models_positions": cut,
        "answers_at_the_token_limit": sum(row["at_limit"] for row in answers),
    }
    judge.unload()
    if ranks is None:
        world.from_main(lambda: storage.write_lines(waiting, pairs))
        folder.drop_earlier()
        world.say(
            f"wrote {waiting}, {len(pairs)} pairs; the same command goes on with --pairwise or --ranks"
        )
        return
    better = order(pairs, ranks, folder.path, world)
    done = [
        {**pair, "better_modelout": which}
        for pair, which in zip(pairs, better, strict=True)
        if which
    ]
    safe = [pair["is_modelout1_safe"] + pair["is_modelout2_safe"] for pair in done]
    counts |= {
        "beyond_the_pairwise_judges_context": len(pairs) - len(done),
        "pairs": len(done),
        "both_safe": safe.count(2),
        "one_safe": safe.count(1),
        "both_unsafe": safe.count(0),
    }
    order_by = (
        ranks.identity
        if isinstance(ranks, Examiner)
        else {"ranks": options.ranks, "sha256": sha256(Path(options.ranks))}
    )
    setup = {
        "model": options.model,
        **policy.identity,
        **facts,
        "temperature": protocol.temperature,
        "top_p": protocol.top_p,
        "max_new_tokens": protocol.max_new_tokens,
        "seed": options.seed,
        "safety": judge.identity,
        "helpfulness": order_by,
    }
    world.from_main(lambda: storage.write_lines(folder.path / "redteam.jsonl", done))
    report = {"counts": counts, "setup": setup, **storage.surroundings()}
    world.from_main(lambda: storage.write_json(folder.path / "report.json", report))
    folder.drop_earlier()
    world.say(
        f"two answers a prompt, temperature {protocol.temperature}, top_p {protocol.top_p}, at most {protocol.max_new_tokens} tokens"
    )
    world.say("\n".join(f"{count:8} {name.replace('_', ' ')}" for name, count in counts.items()))
    world.say(f"wrote {folder.path / 'redteam.jsonl'}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Wrong usage is said in one line, after the usage, and exits with code 2.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model", required=True, type=os.path.expanduser, help="a folder or a hub name"
    )
    parser.add_argument(
        "--prompts",
        required=True,
        help="a table with a column prompt, goal, text or Behavior, or a .txt of prompts",
    )
    parser.add_argument(
        "--judge", required=True, help="of safety: harmbench:MODEL, wildguard:MODEL or keyword"
    )
    helpful = parser.add_mutually_exclusive_group()
    helpful.add_argument(
        "--pairwise",
        metavar="MODEL",
        help="judge of helpfulness: any causal language model that follows instructions",
    )
    helpful.add_argument("--ranks", metavar="FILE", help="to_rank.jsonl with ranks")
    parser.add_argument(
        "--out",
        required=True,
        type=os.path.expanduser,
        help="folder for the pairs, and for all that leads to them",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=PROTOCOLS["paper"].temperature,
        help="of the answers; default %(default)s",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=PROTOCOLS["paper"].max_new_tokens,
        help="default %(default)s",
    )
    parser.add_argument("--limit", type=int, default=0, help="prompts; 0: all")
    parser.add_argument(
        "--seed", type=int, default=42, help="of the first answer; each has its own"
    )
    parser.add_argument(
        "--chat_template", help="zephyr, or a jinja file; default: the model's own, else Zephyr's"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over; an earlier run in --out is set aside until this one has a result",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    if not LEAST_TEMPERATURE <= options.temperature < math.inf:
        parser.error(
            f"--temperature must be finite and at least {LEAST_TEMPERATURE:g}, or both answers are the same"
        )
    if options.max_new_tokens < 1 or options.limit < 0 or not 0 <= options.seed < 2**31:
        parser.error("--max_new_tokens must be >= 1, --limit >= 0, --seed in [0, 2^31)")
    if not options.prompts:
        parser.error("--prompts must name a file, got nothing")
    if options.ranks and not sources.is_table(Path(options.ranks)):
        parser.error(f"--ranks must be a .jsonl or .parquet file, got {options.ranks}")
    if options.ranks and options.fresh:
        parser.error(
            "--ranks orders the answers that are in --out, and --fresh would remove these; leave one of the two out"
        )
    return options


def main(arguments: Sequence[str]) -> None:
    """The command. Exit codes: 2 for wrong usage, 1 for bad input, in one line."""
    options = parse(arguments)
    with distributed.errors_in_one_line():
        run(options, distributed.start(options.device))


if __name__ == "__main__":
    main(sys.argv[1:])
