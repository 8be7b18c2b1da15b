"""The rows of real_model.py: prompts in families and folds, pairs with derived safety labels, and
the files that train.py reads.

XSTest has 450 prompts and, of each, one answer of each of five models. People labelled every answer
as compliance or refusal; nobody labelled its safety. Safety is derived here: a refusal is safe, and
a compliance is as safe as its prompt. Types that begin with contrast_ are unsafe prompts.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import common  # noqa: F401  # puts the program's folder on the path

from data import SCHEMAS, Pair, find_schema, read_pair
from support import sources
from support.chat import Chat
from support.storage import write_lines

FOLDS = 5  # fold 0 is for validation; run k tests on fold k
ADVBENCH_PROMPTS = 100
HELPFUL_PAIRS = {"train": 400, "test": 100}  # at most
MAX_LENGTH = 384  # tokens of a prompt and its longer answer
MAX_PROMPT = 192
# Prompts that share this many of their different words are near-copies, as "How do I stab someone?"
# and "How do I kill someone?". Three of five would join most families with each other.
NEAR_COPY = 0.6
# XSTest's safe types that share an unsafe type. Each other type has one of its own.
CONTRAST = {
    "nons_group_real_discr": "contrast_discr",
    "real_group_nons_discr": "contrast_discr",
    "privacy_public": "contrast_privacy",
    "privacy_fictional": "contrast_privacy",
}
TYPES = ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions")
TYPES += ("historical_events",)
TYPES += tuple(f"contrast_{kind}" for kind in TYPES)
TYPES += (*CONTRAST, *dict.fromkeys(CONTRAST.values()))
COMPLIANCE, REFUSAL, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"

Row = dict[str, Any]


class Prompt(NamedTuple):
    """A prompt of XSTest. family: it and its near-copies have one."""

    text: str
    kind: str
    family: str
    fold: int

    @property
    def safe(self) -> bool:
        return not self.kind.startswith("contrast_")


class Completion(NamedTuple):
    """A model's answer to a prompt, a full compliance or a full refusal."""

    prompt: Prompt
    author: str
    text: str
    complies: bool


class Rows(NamedTuple):
    """All rows of the experiment."""

    prompts: list[Prompt]
    completions: list[Completion]
    advbench: list[str]
    helpful: dict[str, list[Row]]  # train and test


def prompt_hash(text: str) -> str:
    """What a committed file calls a prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- families and folds ---------------------------------------------------------------------------


def families_of(kinds: Mapping[int, str]) -> dict[int, str]:
    """The family of each prompt, by XSTest's number and type: the k-th prompt of an unsafe type
    with the k-th prompts of its safe types.
    """
    ranks: Counter[str] = Counter()
    families = {}
    for number in sorted(kinds):
        kind = kinds[number]
        ranks[kind] += 1
        contrast = kind
        if not kind.startswith("contrast_"):
            contrast = CONTRAST.get(kind, f"contrast_{kind}")
        families[number] = f"{contrast.removeprefix('contrast_')} {ranks[kind]}"
    return families


def join_near_copies(families: Mapping[int, str], texts: Mapping[int, str]) -> dict[int, str]:
    """Families that have near-copies of each other's prompts become one, with the first's name."""
    words = {number: set(re.findall(r"\w+", text.lower())) for number, text in texts.items()}
    joined = dict(families)
    for a, b in combinations(sorted(texts), 2):
        is_near = len(words[a] & words[b]) >= NEAR_COPY * len(words[a] | words[b])
        first, second = joined[a], joined[b]
        if is_near and first != second:
            joined |= {number: first for number, name in joined.items() if name == second}
    return joined


def folds_of(families: Mapping[int, str]) -> dict[str, int]:
    """The fold of each family: large ones first, each to the fold that has the fewest prompts of
    its type, then the fewest of all.
    """
    sizes = Counter(families.values())
    order = sorted(sizes, key=lambda name: (-sizes[name], prompt_hash(name)))
    loads: Counter[Any] = Counter()
    folds = {}
    for name in order:
        kind = name.rpartition(" ")[0]
        fold = min(range(FOLDS), key=lambda i, kind=kind: (loads[i, kind], loads[i], i))
        loads[fold, kind] += sizes[name]
        loads[fold] += sizes[name]
        folds[name] = fold
    return folds


# --- reading --------------------------------------------------------------------------------------


def read_each(source: str, read: Callable[[sources.Row], Any], use: str = "task") -> Iterator[Any]:
    """What `read` makes of each row of a source. ValueError names the row that it refuses."""
    _, rows = sources.find_source(source, use).rows()
    for place, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            value = read(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        yield value


def number_of(row: sources.Row) -> int:
    """XSTest's number of a prompt: 12 of "v2-12"."""
    name = str(row.get("id", ""))
    digits = name.rpartition("-")[2]
    if not digits.isdecimal():
        raise ValueError(f"id must end with a number, got {name!r}")
    return int(digits)


class Labelled(NamedTuple):
    """A row of completions."""

    number: int
    kind: str
    prompt: str
    author: str
    text: str
    label: str


def read_completions(source: str) -> list[Labelled]:
    """One model's answers to XSTest. The model's name is that of the file."""
    file = sources.find_source(source, "task").files[0]
    author = sources.stem(file).removeprefix("xstest_v2_completions_")

    def read(row: sources.Row) -> Labelled:
        return Labelled(
            number_of(row),
            sources.one_of(row, "type", *TYPES),
            sources.some_text(row, "prompt"),
            author,
            sources.text(row, "completion"),
            sources.one_of(row, "final_label", COMPLIANCE, REFUSAL, PARTIAL),
        )

    return list(read_each(source, read))


def read_xstest(names: Sequence[str]) -> tuple[list[Prompt], list[Completion]]:
    """XSTest's prompts, in families and folds, and their full compliances and full refusals."""
    labelled = [row for name in names for row in read_completions(name)]
    kinds: dict[int, str] = {}
    texts: dict[int, str] = {}
    for row in labelled:
        known = (kinds.setdefault(row.number, row.kind), texts.setdefault(row.number, row.prompt))
        if known != (row.kind, row.prompt):
            raise ValueError(
                f"all --completions must hold the same prompts, but number {row.number} of "
                f"{row.author} is another"
            )
    families = join_near_copies(families_of(kinds), texts)
    folds = folds_of(families)
    prompts = {}
    for number, family in families.items():
        prompts[number] = Prompt(texts[number], kinds[number], family, folds[family])
    completions = []
    for row in labelled:
        if row.label != PARTIAL and row.text.strip():
            complies = row.label == COMPLIANCE
            completions.append(Completion(prompts[row.number], row.author, row.text, complies))
    return list(prompts.values()), completions


def read_advbench(source: str) -> list[str]:
    """AdvBench's prompts, at most ADVBENCH_PROMPTS of them, drawn by their hashes."""
    texts = set(read_each(source, lambda row: sources.some_text(row, "goal", "prompt")))
    return sorted(texts, key=prompt_hash)[:ADVBENCH_PROMPTS]


def short_pairs(source: str, chat: Chat) -> Iterator[Row]:
    """The pairs of a source that fit into MAX_LENGTH, both answers safe."""

    def read(row: sources.Row) -> Pair:
        return read_pair(row, SCHEMAS[find_schema(row, "pairs")], "helpful")

    for pair in read_each(source, read, "pairs"):
        ids = chat.pair_ids([chat.pair_texts(pair.prompt, pair.chosen, pair.rejected)])[0]
        prompt, *answers = map(len, ids)
        has_answers = pair.chosen.strip() and pair.rejected.strip()
        if has_answers and pair.chosen != pair.rejected and prompt + max(answers) <= MAX_LENGTH:
            row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            yield row | {"chosen_safe": True, "rejected_safe": True}


def read_rows(
    completions: Sequence[str], advbench: str, ultrafeedback: Sequence[str], chat: Chat
) -> Rows:
    """Everything, checked. ValueError: a source that cannot be read, or one without rows."""
    prompts, answered = read_xstest(completions)
    helpful = {}
    for (name, most), source in zip(HELPFUL_PAIRS.items(), ultrafeedback, strict=True):
        helpful[name] = list(islice(short_pairs(source, chat), most))
        if not helpful[name]:
            raise ValueError(f"{source} must hold pairs of at most {MAX_LENGTH} tokens, got none")
    return Rows(prompts, answered, read_advbench(advbench), helpful)


# --- what a run trains and is tested on -----------------------------------------------------------


def pairs_of(completions: Iterable[Completion]) -> list[Row]:
    """Of one prompt, each compliance with each refusal. The compliance is the more helpful one.

    A pair of a safe prompt has two safe answers. Of an unsafe prompt's pair only the refusal, which
    is rejected, is safe.
    """
    by_prompt: dict[Prompt, list[Completion]] = {}
    for completion in completions:
        by_prompt.setdefault(completion.prompt, []).append(completion)
    rows = []
    for prompt, answers in by_prompt.items():
        compliances = [answer for answer in answers if answer.complies]
        refusals = [answer for answer in answers if not answer.complies]
        for chosen in compliances:
            for rejected in refusals:
                turns = [{"role": "user", "content": prompt.text}]
                row: Row = {"prompt": turns, "chosen": chosen.text, "rejected": rejected.text}
                row |= {"chosen_safe": prompt.safe, "rejected_safe": True}
                rows.append(row | {"author": chosen.author, "family": prompt.family})
    return rows


def sft_rows(completions: Iterable[Completion], helpful: Sequence[Row]) -> list[Row]:
    """Conversations: refusals of unsafe prompts, and as many answers, drawn by hash from the
    compliances with safe prompts and UltraFeedback's better answers.
    """
    declining, answering = [], []
    for completion in completions:
        user: Row = {"role": "user", "content": completion.prompt.text}
        assistant = {"role": "assistant", "content": completion.text}
        if completion.prompt.safe and completion.complies:
            answering.append([user, assistant])
        elif not completion.prompt.safe and not completion.complies:
            declining.append([user, assistant])
    for row in helpful:
        answering.append([*row["prompt"], {"role": "assistant", "content": row["chosen"]}])
    answering.sort(key=lambda turns: prompt_hash(turns[0]["content"] + turns[-1]["content"]))
    kept = min(len(declining), len(answering))
    return [{"messages": turns} for turns in declining + answering[:kept]]


def write_run(rows: Rows, fold: int, folder: Path) -> dict[str, Path]:
    """Run `fold`'s files to train on: sft, safety and helpfulness."""
    training = [answer for answer in rows.completions if answer.prompt.fold not in (0, fold)]
    tables = {
        "sft": sft_rows(training, rows.helpful["train"]),
        "safety": pairs_of(training),
        "helpfulness": rows.helpful["train"],
    }
    files = {}
    for name, table in tables.items():
        if not table:
            raise ValueError(f"fold {fold} has no rows for {name}; pass all five --completions")
        files[name] = folder / f"{name}.jsonl"
        write_lines(files[name], table)
    return files
