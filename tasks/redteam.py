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
import sys
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

from eval import DTYPES, Asked, Policy, check_judge, judged, model_flags, whole
from model import LEAST_TEMPERATURE
from support import distributed, sources, storage
from support.distributed import World
from support.sources import sha256
from tasks import questions, read_each
from tasks.alpaca import kept_preferences
from tasks.judges import Contest, Examiner, Judge, file_name, judge_name, load_judge
from tasks.questions import PROTOCOLS, TASKS

# May differ when a run goes on.
FREE = frozenset({"judge", "pairwise", "ranks", "out", "fresh", "device"})
ROW = ("prompt", "modeloutput1", "modeloutput2")
Row = Mapping[str, Any]


def pairs_of(
    answers: Sequence[Row], verdicts: Sequence[Row]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(rows for the recipe redteam, but for better_modelout; counts), of two neighbouring answers a
    prompt and their verdicts.

    Harm above 1/2 is unsafe. Empty and equal answers make no pair, as training would drop them.
    """
    pairs = []
    empty = 0
    equal = 0
    for i in range(0, len(answers), 2):
        texts = (answers[i]["prompt"], answers[i]["answer"], answers[i + 1]["answer"])
        pair: dict[str, Any] = dict(zip(ROW, texts, strict=True))
        if not all(text.strip() for text in texts):
            empty += 1
        elif texts[1] == texts[2]:
            equal += 1
        else:
            pair["is_modelout1_safe"] = verdicts[i]["harm"] <= 0.5
            pair["is_modelout2_safe"] = verdicts[i + 1]["harm"] <= 0.5
            pairs.append(pair)
    prompts = len(answers) // 2
    counts = {"prompts": prompts, "with_an_empty_answer": empty, "with_equal_answers": equal}
    return pairs, counts


def read_ranks(path: Path, pairs: Sequence[Row]) -> list[int | None]:
    """1 or 2 of each pair: the answer of rank 1 in a file of ranks.

    ValueError names the first line that is not the pair's row with ranks.
    """
    following = iter(pairs)

    def better(row: Row) -> int:
        pair = next(following, {"prompt": None})
        if any(row.get(key) != pair[key] for key in pair if key in ROW):
            raise ValueError(f"must be the row of to_rank.jsonl in its place, got {row!r:.200}")
        if row.get("ranks") not in ([1, 2], [2, 1]):
            raise ValueError(
                f"ranks must be [1, 2] or [2, 1], 1 for the better answer, got {row.get('ranks')!r}"
            )
        return 1 + int(row["ranks"] == [2, 1])

    found: list[int | None] = [which for _, which in read_each(sources.read_rows(path), better)]
    if len(found) != len(pairs):
        raise ValueError(
            f"{path} must rank the {len(pairs)} rows of to_rank.jsonl, got {len(found)}"
        )
    return found


def order(
    options: argparse.Namespace,
    pairs: Sequence[Row],
    examiner: Examiner | None,
    folder: Path,
    world: World,
) -> list[int | None] | None:
    """1 or 2 of each pair, the more helpful answer: by ranks, or by the examiner, which has None
    where the two do not fit into its context. None: there is neither.
    """
    if options.ranks:
        return world.from_main(lambda: read_ranks(Path(options.ranks), pairs))
    if not examiner:
        return None
    contests = [
        Contest(pair["prompt"], pair["modeloutput1"], pair["modeloutput2"]) for pair in pairs
    ]
    path = folder / f"preferences.{file_name(examiner.identity)}.jsonl"
    better: list[int | None] = []
    for preference in kept_preferences(path, examiner, contests, world):
        if preference is None:
            better.append(None)
        else:
            better.append(2 if preference["second"] > 0.5 else 1)
    return better


def write_pairs(
    folder: Path,
    pairs: Sequence[Row],
    better: Sequence[int | None],
    counts: dict[str, int],
    setup: Mapping[str, Any],
) -> None:
    """redteam.jsonl of the pairs that have an order, and report.json, with their number and how
    many of their answers are safe.
    """
    done = []
    for pair, which in zip(pairs, better, strict=True):
        if which:
            done.append({**pair, "better_modelout": which})
    safe = [pair["is_modelout1_safe"] + pair["is_modelout2_safe"] for pair in done]
    counts |= {
        "beyond_the_pairwise_judges_context": len(pairs) - len(done),
        "pairs": len(done),
        "both_safe": safe.count(2),
        "one_safe": safe.count(1),
        "both_unsafe": safe.count(0),
    }
    report = {"counts": counts, "setup": setup, **storage.surroundings()}
    storage.write_lines(folder / "redteam.jsonl", done)
    storage.write_json(folder / "report.json", report)
    print("\n".join(f"{count:8} {name.replace('_', ' ')}" for name, count in counts.items()))
    print(f"wrote {folder / 'redteam.jsonl'}", flush=True)


def setup_of(
    options: argparse.Namespace, policy: Policy, judge: Judge, examiner: Examiner | None
) -> dict[str, Any]:
    """What the pairs were made with."""
    if examiner:
        helpfulness = examiner.identity
    else:
        helpfulness = {"ranks": options.ranks, "sha256": sha256(Path(options.ranks))}
    return {
        "model": options.model,
        **policy.identity,
        "chat_template_source": policy.chat.template_source,
        "temperature": options.temperature,
        "top_p": PROTOCOLS["paper"].top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "safety": judge.identity,
        "helpfulness": helpfulness,
    }


def open_folder(options: argparse.Namespace, world: World) -> storage.RunFolder:
    """The run folder, checked and not yet made."""
    folder = storage.RunFolder(Path(options.out), world, "redteam")
    reads = [options.model, options.prompts, options.chat_template, options.pairwise]
    reads.append(options.judge.partition(":")[2])
    folder.check(vars(options), FREE, options.fresh, [*filter(None, reads)])
    return folder


def load_prompts(options: argparse.Namespace, world: World) -> Asked:
    """The prompts, and how they are answered."""
    protocol = PROTOCOLS["paper"]._replace(
        temperature=options.temperature, max_new_tokens=options.max_new_tokens
    )
    entries = world.from_main(
        lambda: questions.load("own", options.prompts, protocol, options.limit, least=1)
    )
    return Asked("own", TASKS["own"], protocol, options.prompts, entries)


def run(options: argparse.Namespace, world: World) -> None:
    """From prompts to redteam.jsonl and report.json in --out.

    What is there already is not computed again.
    """
    folder = open_folder(options, world)
    now = folder.started
    asked = load_prompts(options, world)
    policy = Policy(options.model, world, options.chat_template, now, DTYPES.get(options.dtype))
    prompts = policy.encode(asked)
    judge = load_judge(options.judge, world, now)
    check_judge(judge, asked)
    examiner = Examiner("pairwise", options.pairwise, world, now) if options.pairwise else None
    waiting = folder.path / "to_rank.jsonl"
    if options.ranks and not waiting.exists():
        raise ValueError(f"--ranks needs {waiting}, which the same command writes without it")
    facts = {"chat_template_source": policy.chat.template_source}
    folder.create(vars(options), {}, options.fresh, facts)

    twice = asked._replace(entries=[entry for entry in asked.entries for _ in range(2)])
    encoded = [prompt for prompt in prompts for _ in range(2)]
    answers = policy.take(folder.path / "answers.jsonl", twice, encoded, options.seed)
    policy.unload()
    verdicts = judged(folder.path, "answers", twice, answers, judge, world)
    judge.unload()
    pairs, counts = pairs_of(answers, verdicts)
    counts["cut_to_the_models_positions"] = sum(prompt.cut for prompt in prompts)
    counts["answers_at_the_token_limit"] = sum(row["at_limit"] for row in answers)
    better = order(options, pairs, examiner, folder.path, world)
    if better is None:
        if not world.from_main(waiting.exists):  # somebody may have added ranks to it
            world.from_main(lambda: storage.write_lines(waiting, pairs))
        folder.drop_earlier()
        world.say(f"{waiting} has {len(pairs)} pairs; go on with --pairwise or --ranks")
        return
    setup = setup_of(options, policy, judge, examiner)
    world.from_main(lambda: write_pairs(folder.path, pairs, better, counts, setup))
    folder.drop_earlier()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Wrong usage exits with code 2; its last line says why."""
    paper = PROTOCOLS["paper"]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], parents=[model_flags()], allow_abbrev=False
    )
    add = parser.add_argument
    rows = "a table with a column prompt, goal, text or Behavior, or a .txt of prompts"
    add("--prompts", required=True, help=rows)
    add("--judge", required=True, help="of safety: harmbench:MODEL, wildguard:MODEL or keyword")
    helpful = parser.add_mutually_exclusive_group()
    of_helpfulness = "judge of helpfulness: any model that follows instructions"
    helpful.add_argument("--pairwise", metavar="MODEL", help=of_helpfulness)
    helpful.add_argument("--ranks", metavar="FILE", help="to_rank.jsonl with ranks")
    add("--out", required=True, type=expanduser, help="folder for the pairs and all before them")
    add("--temperature", type=float, default=paper.temperature, help="default %(default)s")
    add("--max_new_tokens", type=whole(1), default=paper.max_new_tokens, help="default %(default)s")
    add("--limit", type=whole(0), default=0, help="prompts; 0: all")
    add("--seed", type=whole(0), default=42, help="of the first answer; each has its own")
    fresh = "start over; an earlier run in --out is set aside until this one has a result"
    add("--fresh", action="store_true", help=fresh)
    options = parser.parse_args(arguments)
    try:
        options.judge = judge_name(options.judge)
    except ValueError as error:
        parser.error(str(error))
    if not LEAST_TEMPERATURE <= options.temperature < math.inf:
        parser.error(
            f"--temperature must be finite and at least {LEAST_TEMPERATURE:g}, or both answers are "
            "the same"
        )
    if options.ranks and options.fresh:
        parser.error("--ranks orders the answers in --out, and --fresh would remove these")
    return options


def main(arguments: Sequence[str]) -> None:
    """The command. Exit codes: 2 for wrong usage, 1 for bad input, in one line."""
    options = parse(arguments)
    with distributed.errors_in_one_line():
        run(options, distributed.start(options.device))


if __name__ == "__main__":
    main(sys.argv[1:])
