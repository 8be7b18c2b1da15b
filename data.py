"""Rows to streams of token ids, batches and packs, with nothing guessed.

A row of a file (support/sources.py) -> Pair(prompt, chosen, rejected, chosen_safe, rejected_safe) -> chat
text -> token ids (support/chat.py) -> a tree in a Stream -> a place in a Pack (model.py). chosen is y_w,
the more helpful answer; the labels are I_safe.

    python data.py FILE --model DIR          what training would see of these pairs: labels, targets, lengths, what is
    python data.py FILE --model DIR --sft    dropped or cut, and a decoded example; FILE may be any source
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import heapq
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bfpo import QUADRANTS, label
from model import Mistral, Pack, find_model
from support.chat import Chat, Ids, Message, truncate
from support.distributed import World
from support.sources import Source, cache_root, checked, find_source, source_rows, text_of
from support.storage import kept_folder, read_object

FORMAT = 9  # of the token cache: count up when the same rows would give other arrays or counts
CHUNK_ROWS = 512  # tokenised at a time: about 50 MB of encodings, twice
GENERATION_BATCH = 64  # prompts answered at a time
HELD_OUT_ROWS = 1000  # of a source's test split, at most

# --- schemas --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_safe: bool
    rejected_safe: bool


class Schema(NamedTuple):
    """Names of columns. Without labels, the answers are whole conversations and both safe."""

    mark: str  # the column that gives the schema away
    answers: tuple[str, ...]
    labels: tuple[str, ...] = ()
    better: str = ""  # id of the more helpful answer; without it, the first one
    safer: str = ""
    first_id: int = 0  # the ids count the answers from here
    scores: tuple[str, ...] = ()  # of chosen and rejected; they order nothing, and are counted


SCHEMAS = {
    "messages": Schema("messages", ("messages",)),  # SFT alone: ultrachat_200k
    "PKU-SafeRLHF": Schema(
        "response_0",
        ("response_0", "response_1"),
        ("is_response_0_safe", "is_response_1_safe"),
        "better_response_id",
        "safer_response_id",
    ),
    "red-teaming": Schema(
        "modeloutput1",
        ("modeloutput1", "modeloutput2"),
        ("is_modelout1_safe", "is_modelout2_safe"),
        "better_modelout",
        first_id=1,
    ),
    "bfpo": Schema("chosen_safe", ("chosen", "rejected"), ("chosen_safe", "rejected_safe")),
    "ultrafeedback_binarized": Schema(
        "score_chosen", ("chosen", "rejected"), scores=("score_chosen", "score_rejected")
    ),
}


def find_schema(columns: Sequence[str], stage: str) -> str:
    """The schema with these columns.

    SFT takes whole conversations, or the safer answer of pairs.
    """
    known = {
        name: schema for name, schema in SCHEMAS.items() if stage == "sft" or name != "messages"
    }
    for name, schema in known.items():
        if schema.mark in columns:
            return name
    hint = " (conversations: pass them as --sft)" if "messages" in columns else ""
    wanted = []
    for name, schema in known.items():
        names = (
            "prompt",
            *schema.answers,
            *schema.labels,
            schema.better,
            schema.safer,
            *schema.scores,
        )
        wanted.append(f"{name}: {', '.join(filter(None, names))}")
    raise ValueError(
        f"columns must be those of a known schema{hint}, got {', '.join(columns)[:200]}; known: {'; '.join(wanted)}"
    )


def _messages(row: dict[str, Any], name: str) -> list[Message]:
    turns = checked(
        row,
        name,
        lambda value: (
            isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
        ),
        "a list of {role, content}",
    )
    roles = ("system", "user", "assistant")
    return [
        {
            "role": checked(
                turn, "role", lambda value: value in roles, "system, user or assistant"
            ),
            "content": text_of(turn, "content"),
        }
        for turn in turns
    ]


def read_pair(row: dict[str, Any], schema: Schema, prefer: str) -> Pair:
    """prefer says which answer is chosen. helpful: the better one. safe: the safe one if just one
    is safe, else the better one. safer (SFT): as safe, but of two with one label the safer one,
    where the schema says which it is.
    """
    if not schema.labels:
        chosen, rejected = (_messages(row, name) for name in schema.answers)
        roles = [chosen[-1]["role"], rejected[-1]["role"]]
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1] or roles != ["assistant", "assistant"]:
            raise ValueError(
                "chosen and rejected must be one conversation with two last answers of the assistant"
            )
        prompt = chosen[:-1]
    elif isinstance(row.get("prompt"), list):
        prompt = _messages(row, "prompt")
    else:
        prompt = [{"role": "user", "content": text_of(row, "prompt")}]
    if prompt[-1]["role"] != "user":
        raise ValueError(f"the prompt must end with a user's turn, got {prompt[-1]['role']}")
    if not schema.labels:
        return Pair(prompt, chosen[-1]["content"], rejected[-1]["content"], True, True)
    answers = [text_of(row, name) for name in schema.answers]
    safe = [
        bool(
            checked(
                row, name, lambda value: isinstance(value, int) and value in (0, 1), "true or false"
            )
        )
        for name in schema.labels
    ]
    ids = [schema.first_id, schema.first_id + 1]
    better, safer = (
        ids.index(
            checked(
                row,
                name,
                lambda value: type(value) is int and value in ids,
                f"{ids[0]} or {ids[1]}",
            )
        )
        if name
        else None
        for name in (schema.better, schema.safer)
    )
    first = safer if prefer == "safer" and safer is not None else better or 0
    if (
        prefer != "helpful" and safe[0] != safe[1]
    ):  # labels that differ say it, whatever safer_response_id does
        first = safe.index(True)
    return Pair(prompt, answers[first], answers[1 - first], safe[first], safe[1 - first])


def doubt(row: dict[str, Any], schema: Schema) -> str:
    """Why a row's scores do not say that chosen is better: missing, tied or inverted, or "" if they
    do.
    """
    scores: list[Any] = [row.get(name) for name in schema.scores]
    if not all(isinstance(score, int | float) and abs(score) < math.inf for score in scores):
        return "missing"
    if not scores or scores[0] > scores[1]:
        return ""
    return "tied" if scores[0] == scores[1] else "inverted"


# --- streams of token ids -------------------------------------------------------------------------

COUNTS = (
    "rows",
    "malformed",
    "empty",
    "identical",
    "scores_missing",
    "scores_tied",
    "scores_inverted",
    "prompts_cut",
    "answers_cut",
)


class Options(NamedTuple):
    stage: str
    prefer: str
    max_length: int
    max_prompt: int
    held_out: float


class Item(NamedTuple):
    texts: tuple[str, ...]  # for Chat.pair_ids or Chat.conversation_ids
    safe: tuple[bool, bool]
    held_out: bool
    doubt: str


class Stream:
    """Token ids of a data set's training or held-out rows, in a memory-mapped array. tree(i) is one
    item of Pack.build: [prompt, chosen, rejected], for SFT [BOS, the rest]. lengths [n, 3] (SFT [n,
    2]) in tokens; chosen_safe, rejected_safe bool [n]; report: what describe prints; fingerprint:
    of all that the arrays depend on.
    """

    def __init__(self, folder: Path, held_out: bool, report: dict[str, Any]) -> None:
        rows = np.load(folder / "rows.npy")
        mine = rows[:, -2] == held_out
        self.tokens = np.memmap(folder / "tokens", report["token_type"], "r")
        self.ends = np.cumsum(rows[:, :-4].sum(axis=1, dtype=np.int64))[mine]
        self.lengths, self.chosen_safe, self.rejected_safe = (
            rows[mine, :-4],
            rows[mine, -4] != 0,
            rows[mine, -3] != 0,
        )
        self.report, self.fingerprint = (
            report,
            f"{folder.name}.{'held_out' if held_out else 'train'}",
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def tree(self, i: int) -> list[Ids]:
        flat = self.tokens[self.ends[i] - self.lengths[i].sum() : self.ends[i]].astype(np.int64)
        return np.split(flat, np.cumsum(self.lengths[i][:-1]))


def _open_cache(folder: Path, mixed: bool) -> tuple[Stream, Stream]:
    report = read_object(folder / "report.json")
    report["cache"] = {
        "folder": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }
    for part in report["sources"]:
        one = [
            quadrant
            for quadrant, pairs in part["quadrants"].items()
            if mixed and pairs == part["training_rows"]
        ]
        part["warning"] = (
            f"every pair of {part['source']} is {one[0]}; mixed labels are expected here"
            if one
            else ""
        )
    return Stream(folder, False, report), Stream(folder, True, report)


def _summarise(part: dict[str, Any], table: Ids, stage: str) -> None:
    """Adds to a source's report what its kept rows say, [n, parts + 4] as in rows.npy."""
    train = table[table[:, -2] == 0]
    if not len(train):
        raise ValueError(
            f"{part['source']} must have rows to train on, got {part['rows']} rows, of which {part['empty']} empty,"
            f" {part['identical']} with identical answers and {len(table)} held out"
        )
    lengths, unsafe = train[:, :-4], 1 - train[:, -4:-2]
    columns = [*(lengths.T if stage == "pairs" else ()), lengths.sum(1)]
    part |= {"training_rows": len(train), "held_out_rows": len(table) - len(train)}
    part["quadrants"] = dict(
        zip(QUADRANTS, np.bincount(unsafe @ (2, 1), minlength=4).tolist(), strict=True)
    )
    part["tokens"] = {
        name: {f"p{q}": int(np.percentile(column, q)) for q in (0, 10, 50, 90, 99, 100)}
        for name, column in zip(
            ("prompt", "chosen", "rejected", "total")[-len(columns) :], columns, strict=True
        )
    }


def _item(
    row: dict[str, Any], chat: Chat, options: Options, part: dict[str, Any], share: float
) -> Item | None:
    """None if there is nothing to learn from the row; share: of all questions, held out."""
    pairs, safe = options.stage == "pairs", (True, True)
    schema = SCHEMAS[part["schema"]]
    if part["schema"] == "messages":
        messages = _messages(row, "messages")
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not answers:
            raise ValueError("messages must have an assistant's turn")
    else:
        pair = read_pair(row, schema, options.prefer)
        messages, safe = [*pair.prompt, {"role": "assistant", "content": pair.chosen}], pair[3:]
        answers = [pair.chosen, pair.rejected][: 1 + pairs]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not all(text.strip() for text in (*asked, *answers)):
        part["empty"] += 1
        return None
    texts = chat.pair_texts(messages[:-1], *answers) if pairs else chat.conversation_text(messages)
    held_out = (
        int.from_bytes(hashlib.sha256("".join(asked[:1]).encode()).digest()[:8]) < share * 2**64
    )
    return Item(texts, safe, held_out, doubt(row, schema))


def _items(
    source: Source, chat: Chat, options: Options, part: dict[str, Any], problems: list[str]
) -> Iterator[Item]:
    """The rows worth tokenising.

    What is left out is counted in part; the first malformed rows go to problems.
    """
    total, rows = source_rows(source, HELD_OUT_ROWS if options.held_out else 0)
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # between lines
    for place, row, test in tqdm(
        rows,
        f"tokenising {source.text}",
        total,
        unit=" rows",
        mininterval=seconds,
        delay=seconds,
        leave=False,
    ):
        part["rows"] += 1
        try:
            if not isinstance(row, dict):
                raise (
                    row
                    if isinstance(row, ValueError)
                    else ValueError(f"a row must be an object, got {reprlib.repr(row)}")
                )
            part["schema"] = part["schema"] or find_schema(list(row), options.stage)
            item = _item(
                row,
                chat,
                options,
                part,
                share=1 if test else 0 if source.test else options.held_out,
            )
        except ValueError as error:
            part["malformed"] += 1
            problems += [f"{place}: {error}"] if len(problems) < 10 else []
            if not part["schema"] and isinstance(row, dict):
                break  # unknown columns: the other rows would only say the same
        else:
            if item and not problems:
                yield item


def _tokenise(items: Iterator[Item], chat: Chat, stage: str) -> Iterator[tuple[Item, list[Ids]]]:
    """Each item with its ids, not truncated. A chunk is tokenised in a thread while this one
    prepares the next: the tokenizer, which uses every core, lets Python run beside it.
    """
    tokenise = chat.pair_ids if stage == "pairs" else chat.conversation_ids
    chunks = iter(lambda: list(islice(items, CHUNK_ROWS)), [])
    with ThreadPoolExecutor(1) as thread:
        jobs = (
            (chunk, thread.submit(tokenise, [item.texts for item in chunk]))
            for chunk in chain(chunks, [[]])
        )
        for (chunk, job), _ in pairwise(
            jobs
        ):  # the next chunk is submitted before this one is waited for
            yield from zip(chunk, job.result(), strict=True)


def _example(chat: Chat, tree: Sequence[Ids], most: int = 600) -> str:
    """A decoded tree, scored tokens between [[ and ]], without the middle of long parts."""

    def short(text: str) -> str:
        return (
            text
            if len(text) <= most
            else f"{text[: most // 2]} [... {len(text) - most} ...] {text[-most // 2 :]}"
        )

    prompt = chat.decode(tree[0], skip_special_tokens=False)
    answers = [
        chat.decode([*tree[0], *response], skip_special_tokens=False)[len(prompt) :]
        for response in tree[1:]
    ]
    return short(prompt) + "\n".join(f"[[{short(answer)}]]" for answer in answers)


def _build(folder: Path, sources: Sequence[Source], chat: Chat, options: Options) -> None:
    """Fills a new cache folder with tokens, rows.npy and report.json."""
    problems: list[str] = []
    report: dict[str, Any] = {
        "stage": options.stage,
        "sources": [],
        "example": "",
        "token_type": "uint16" if chat.vocabulary <= 2**16 else "int32",
    }
    rows: list[
        list[int]
    ] = []  # tokens of each part, chosen_safe, rejected_safe, held out, number of the source
    with open(folder / "tokens", "wb") as tokens:
        for number, source in enumerate(sources):
            part: dict[str, Any] = {
                "source": source.text,
                "schema": "",
                **dict.fromkeys(COUNTS, 0),
            }
            report["sources"].append(part)
            for item, whole in _tokenise(
                _items(source, chat, options, part, problems), chat, options.stage
            ):
                tree = truncate(whole, options.max_length, options.max_prompt)
                if options.stage == "pairs" and np.array_equal(
                    tree[1], tree[2]
                ):  # a margin of 0 whatever is learnt
                    part["identical"] += 1
                    continue
                tokens.write(np.concatenate(tree).astype(report["token_type"]).tobytes())
                rows.append([*map(len, tree), *item.safe, item.held_out, number])
                if not item.held_out:
                    cut = [len(a) < len(b) for a, b in zip(tree, whole, strict=True)]
                    part["prompts_cut"] += cut[0]
                    part["answers_cut"] += sum(cut[1:])
                    if item.doubt:
                        part[f"scores_{item.doubt}"] += 1
                    report["example"] = report["example"] or _example(chat, tree)
    if problems:
        raise ValueError(
            "\n".join(
                [
                    f"malformed rows: {sum(p['malformed'] for p in report['sources'])}; the first ones:",
                    *problems,
                ]
            )
        )
    table = np.array(rows, dtype=np.int32).reshape(-1, 7 if options.stage == "pairs" else 6)
    for number, part in enumerate(report["sources"]):
        _summarise(part, table[table[:, -1] == number], options.stage)
    np.save(folder / "rows.npy", table)
    (folder / "report.json").write_text(
        json.dumps(report, indent=1, allow_nan=False), encoding="utf-8"
    )


def load_stream(
    sources: Sequence[str],
    chat: Chat,
    *,
    stage: str = "pairs",
    prefer: str = "helpful",
    max_length: int = 1024,
    max_prompt: int = 512,
    held_out: float = 0.02,
    mixed: bool = False,
    cache_dir: str | Path | None = None,
) -> tuple[Stream, Stream]:
    """(training rows, held-out rows) of some sources, tokenised once and kept under cache_dir.

    stage "pairs" or "sft"; prefer "helpful" or "safe", as in read_pair; lengths in tokens, with BOS
    and EOS. Held-out rows: the first HELD_OUT_ROWS of a source's test split; where it has none, the
    questions whose hash falls in the first held_out of all hashes, so that none of such sources is
    on both sides; held_out=0: none. mixed: warn of a source whose pairs all fall in one safety
    quadrant. cache_dir: by default $BFPO_CACHE or ~/.cache/bfpo. Any number of processes may call
    at once: one builds, the others wait, however long it takes. ValueError: wrong arguments, or
    rows that break their schema: the first ten with file:line, and their number.
    """
    known = stage in ("pairs", "sft") and prefer in ("helpful", "safe")
    if stage == "sft":
        prefer, max_prompt = "safer", 1  # the prompt is BOS
    if not (sources and known and 1 <= max_prompt < max_length and 0 <= held_out < 1):
        raise ValueError(
            "sources must be one or more, stage pairs or sft, prefer helpful or safe, max_prompt in [1, max_length),"
            f" held_out in [0, 1), got {list(sources)}, {stage}, {prefer}, {max_prompt} with max_length {max_length},"
            f" {held_out}"
        )
    found = [find_source(text, stage) for text in sources]
    options = Options(stage, prefer, max_length, max_prompt, held_out)
    identity = [FORMAT, chat.fingerprint, options, [(s.text, s.identity) for s in found]]
    try:
        folder = kept_folder(
            cache_root(cache_dir), identity, lambda new: _build(new, found, chat, options)
        )
    except OSError as error:
        raise ValueError(
            f"the token cache must be writable, got {error}; name another: train.py --cache, or BFPO_CACHE"
        ) from error
    return _open_cache(folder, mixed)


# --- report ---------------------------------------------------------------------------------------


def _scores(part: dict[str, Any]) -> str:
    return (
        f"  scores of chosen and rejected: {part['scores_missing']} rows without both, {part['scores_tied']} tied,"
        f" {part['scores_inverted']} with the lower one for chosen"
    )


def describe(report: dict[str, Any]) -> str:
    """A stream's report, as text."""
    lines = []
    for part in report["sources"]:
        shares = ", ".join(
            f"{name} {n} ({n / part['training_rows']:.1%})" for name, n in part["quadrants"].items()
        )
        lines += [
            f"{part['source']}: {part['schema']}, {part['rows']} rows read, {part['training_rows']} to train on,"
            f" {part['held_out_rows']} held out",
            f"  dropped: {part['empty']} empty, {part['identical']} with identical answers;"
            f" cut to length: {part['prompts_cut']} prompts, {part['answers_cut']} answers",
            *([f"  {shares}"] if report["stage"] == "pairs" else []),
            *([_scores(part)] if SCHEMAS[part["schema"]].scores else []),
            *(
                f"{name:>10} tokens  "
                + "  ".join(f"{q} {value:5d}" for q, value in quantiles.items())
                for name, quantiles in part["tokens"].items()
            ),
        ]
    lines += [
        "first row, scored tokens between [[ and ]]:",
        *(f"  | {line}" for line in report["example"].split("\n")),
    ]
    lines.append(
        f"token cache: {report['cache']['folder']}, {report['cache']['bytes'] / 2**20:.1f} MiB; delete it at will, or"
        " move it and name its new folder: train.py --cache, or BFPO_CACHE"
    )
    lines += [f"WARNING: {part['warning']}" for part in report["sources"] if part["warning"]]
    for part in report["sources"]:
        if part["scores_inverted"]:
            lines.append(
                f"WARNING: in {part['scores_inverted']} rows of {part['source']} chosen has the lower score;"
                " they are used as they are; correct the scores, or swap the answers"
            )
    return "\n".join(lines)


# --- batches and packs ----------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, name: str, epoch: int) -> Ids:
    key = hashlib.sha256(f"{seed} {name} {epoch}".encode()).digest()
    draws = np.random.Philox(key=int.from_bytes(key[:16])).random_raw(
        size
    )  # raw draws: the same in every numpy
    return np.argsort(draws, kind="stable")


def batch_indices(size: int, batch: int, seed: int, step: int, name: str) -> Ids:
    """[batch] rows of step `step` (from 0) of a stream of `size` rows: the next places in an
    endless sequence of permutations, each a new order. A pure function of its arguments.
    """
    if size < 1 or batch < 1 or step < 0:
        raise ValueError(
            f"size and batch must be >= 1 and step >= 0, got {size}, {batch} and {step}"
        )
    places = range(step * batch, (step + 1) * batch)
    return np.array(
        [_permutation(size, seed, name, place // size)[place % size] for place in places]
    )


# In a tree's forward attention takes 4 x layers x width x T^2 / 2 FLOPs, the linear layers 2 x
# parameters x T. At Mistral-7B's shapes (32 layers, width 4096, 6.98e9 parameters in the body) both
# are equal at 53,000 tokens.
EQUAL_COST_TOKENS = 53_000
SCORED_PACK_TOKENS = 8192  # of a pack without gradients, which keeps no activations


def cost(tokens: int) -> float:
    """Of a tree, relative to a token's linear layers."""
    return tokens * (1 + tokens / EQUAL_COST_TOKENS)


def deal(tokens: Sequence[int], world_size: int, budget: int) -> list[list[list[int]]]:
    """[rank][pack][item]: indices into tokens, the trees' lengths. Costs are nearly equal between
    ranks (longest first, each to the rank with the least); a pack holds at most `budget` tokens, or
    one longer tree alone. Ranks may get different numbers of packs, also none.
    """
    if world_size < 1 or budget < 1:
        raise ValueError(f"world_size and budget must be >= 1, got {world_size} and {budget}")
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    rooms: list[list[tuple[int, int]]] = [
        [] for _ in range(world_size)
    ]  # (tokens left, pack), sorted
    loads = [(0.0, rank) for rank in range(world_size)]
    for item in sorted(range(len(tokens)), key=lambda item: (-tokens[item], item)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + cost(tokens[item]), rank))
        fullest = bisect.bisect_left(rooms[rank], (tokens[item], 0))
        if fullest == len(rooms[rank]):
            ranks[rank].append([])
            rooms[rank].append((budget, len(ranks[rank]) - 1))
        room, pack = rooms[rank].pop(fullest)
        ranks[rank][pack].append(item)
        bisect.insort(rooms[rank], (room - tokens[item], pack))
    return ranks


def unevenness(tokens: Sequence[int], ranks: Sequence[Sequence[Sequence[int]]]) -> float:
    """Of what deal returned: the costliest rank's cost over the cheapest one's, minus 1."""
    costs = [sum(cost(tokens[item]) for pack in packs for item in pack) for packs in ranks]
    return max(costs) / min(costs) - 1 if min(costs) else float("inf")


# --- rows of all streams ----------------------------------------------------------------------


def safety_labels(stream: Stream) -> tuple[Tensor, Tensor]:
    """(chosen_safe, rejected_safe) of its pairs, each bool [N]."""
    return torch.tensor(stream.chosen_safe), torch.tensor(stream.rejected_safe)


def title_of(name: str, stream: Stream, i: int, chat: Chat) -> str:
    """What a message calls row i of a stream: the stream's name, the number, and how the row begins
    and ends.
    """
    text = chat.decode([token for part in stream.tree(i)[:2] for token in part])
    return f"{name} {i} ({reprlib.repr(text)})"


def not_finite(
    logprobs: Tensor, name: str, stream: Stream, chat: Chat, rows: Sequence[int] | None = None
) -> list[str]:
    """Titles of a stream's rows whose log-probabilities [n, responses] are not all finite. rows: the
    numbers of the n rows; all by default.
    """
    numbers = range(len(stream)) if rows is None else rows
    bad = (~logprobs.isfinite().all(1)).nonzero().flatten().tolist()
    return [title_of(name, stream, numbers[i], chat) for i in bad]


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
        self,
        streams: dict[str, Stream],
        references: dict[str, Tensor],
        chat: Chat | None = None,
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

    def unevenness(self, batch: int, seed: int, steps: int, ranks: int, pack_tokens: int) -> str:
        """How evenly steps are dealt to ranks, in words: the mean of the first hundred steps."""
        dealt = [
            self.tokens[self.draw(batch, seed, step)].tolist() for step in range(min(steps, 100))
        ]
        parts = [unevenness(tokens, deal(tokens, ranks, pack_tokens)) for tokens in dealt]
        mean = sum(parts) / len(parts)
        if mean == math.inf:
            return "in some steps a rank has no rows; pass a larger --batch, or use fewer processes"
        return f"a step costs its costliest rank {mean:.1%} more than its cheapest, on average"

    def tree(self, i: int) -> list[Ids]:
        """Row i as an item of Pack.build: [prompt, response, ...] in token ids."""
        return self.streams[self.stream[i]].tree(i - self.starts[self.stream[i]])

    def title(self, i: int) -> str:
        """What an error calls row i of all."""
        assert self.chat is not None  # whoever trains names rows
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


# --- scoring and generating over ranks ---------------------------------------------------------


def my_packs(lengths: Sequence[int], world: World, budget: int) -> list[list[int]]:
    """This rank's share of the items as packs of item numbers, of at most `budget` tokens, the cost
    shared out evenly.

    Every rank gets as many packs, empty ones at the end, because every forward takes part in the
    others' collectives.
    """
    dealt = deal(lengths, world.size, budget)
    return dealt[world.rank] + [[] for _ in range(max(map(len, dealt)) - len(dealt[world.rank]))]


@torch.no_grad()
def score(
    model: Mistral,
    stream: Stream,
    world: World,
    budget: int,
    text: str,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Summed log-probability of every response of a stream, or of these `rows`, in nats: fp32 [n,
    responses], the same on every rank.
    """
    rows, responses = range(len(stream)) if rows is None else rows, stream.lengths.shape[1] - 1
    logprobs = torch.zeros(len(rows), responses)
    packs, found = my_packs(stream.lengths[list(rows)].sum(1).tolist(), world, budget), []
    for items in tqdm(
        packs, desc=text, unit="pack", disable=not world.is_main, mininterval=2.0, leave=False
    ):
        pack = Pack.build([stream.tree(rows[i]) for i in items]).to(world.device)
        found.append(
            model.logprobs(pack).float().reshape(responses, -1).T
        )  # off the device after the last: none waits for another
    logprobs[[i for items in packs for i in items]] = torch.cat(found).cpu()
    logprobs = world.sum(logprobs)
    bad = (~logprobs.isfinite().all(1)).nonzero().flatten().tolist()
    if (
        bad and budget > 1
    ):  # a NaN spreads within its pack, masked or not: only a row that gives it alone has it
        logprobs[bad] = score(
            model, stream, world, 1, f"{text}, not finite", [rows[i] for i in bad]
        )
    return logprobs


class Answer(NamedTuple):
    """A generated answer; at_limit: it ran into the token limit, and neither an end token nor a
    stop string ended it.
    """

    text: str
    tokens: int
    at_limit: bool


def generate(
    model: Mistral,
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    world: World,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int,
    stop: Sequence[str] = (),
) -> list[Answer]:
    """The answer to each prompt, in order, on every rank; prompt i is sampled with seed + i,
    whatever the batch.
    """
    numbers = range(world.rank, len(prompts), world.size)
    new = model.generate(
        [prompts[i] for i in numbers],
        max_new_tokens,
        temperature,
        top_p,
        seeds=[seed + i for i in numbers],
        stop_ids=chat.end_ids,
        stop_strings=stop,
        decode=chat.decode,
        batch=GENERATION_BATCH,
    )
    answers: dict[int, Answer] = {}
    for i, ids in zip(numbers, new, strict=True):
        text = chat.decode(ids)
        end = min((text.find(string) for string in stop if string in text), default=len(text))
        answers[i] = Answer(text[:end], len(ids), len(ids) == max_new_tokens and end == len(text))
    every = {i: answer for part in world.gather(answers) for i, answer in part.items()}
    return [every[i] for i in range(len(prompts))]


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    """The command. Exits with 2 for wrong usage, with 1 and a line for bad rows."""
    parser = argparse.ArgumentParser(description="What training would see of these rows.")
    parser.add_argument(
        "sources", nargs="+", metavar="FILE", help="NAME[@REVISION][:SPLIT][[START:STOP]]"
    )
    parser.add_argument(
        "--model", required=True, help="folder or hub name of the model whose tokenizer is used"
    )
    parser.add_argument(
        "--sft", action="store_true", help="conversations (of pairs: the safer answers)"
    )
    parser.add_argument(
        "--prefer", choices=("helpful", "safe"), default="helpful", help="which answer is chosen"
    )
    parser.add_argument(
        "--chat_template", help="zephyr, or a jinja file; default: the model's own, else Zephyr's"
    )
    parser.add_argument("--max_length", type=int, help="tokens; default 1024, with --sft 2048")
    parser.add_argument("--max_prompt", type=int, default=512, help="tokens")
    flags = parser.parse_args()
    max_length = (2048 if flags.sft else 1024) if flags.max_length is None else flags.max_length
    if not 1 <= (1 if flags.sft else flags.max_prompt) < max_length:
        parser.error(
            f"max_prompt must be in [1, max_length), got {flags.max_prompt} with max_length {max_length}"
        )
    try:
        chat = Chat(find_model(flags.model, weights=False), flags.chat_template)
        stream, _ = load_stream(
            flags.sources,
            chat,
            stage="sft" if flags.sft else "pairs",
            prefer=flags.prefer,
            max_length=max_length,
            max_prompt=flags.max_prompt,
            mixed=not flags.sft,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    parts = stream.report["sources"]
    for part in parts:
        part["warning"] *= bool(
            SCHEMAS[part["schema"]].labels
        )  # a schema without labels is one quadrant by its nature
    print("\n".join([*chat.remarks, describe(stream.report)]))
    safe = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]])
    for quadrant, labels, target in zip(
        QUADRANTS, safe.tolist(), label(*safe.T).tolist(), strict=True
    ):
        if not flags.sft:
            pairs = sum(part["quadrants"][quadrant] for part in parts)
            print(
                f"{quadrant:>14}: labels {labels[0]} {labels[1]}, {pairs} pairs, target {target:+.2f}/tau (alpha 1/2, B_1 3)"
            )


if __name__ == "__main__":
    main()
