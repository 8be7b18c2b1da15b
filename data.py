"""From anybody's rows to packs: schema, pair, token ids, truncation, batches, packs, scores.

A row of a file (support/sources.py) -> Pair(prompt, chosen, rejected, chosen_safe, rejected_safe)
-> chat text and token ids (support/chat.py) -> a tree in a Stream -> a place in a Pack (model.py).
chosen is y_w, the more helpful answer. The labels are I_safe.

    python data.py FILE --model DIR                 what training would see of these safety pairs
    python data.py FILE --model DIR --helpfulness   of pairs without labels, all safe
    python data.py FILE --model DIR --sft           of conversations
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import heapq
import math
import reprlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bfpo import QUADRANTS
from model import Mistral, Pack, find_model
from support.chat import Chat, Ids, Message, truncate
from support.distributed import World
from support.sources import Row, Source, boolean, cache_root, checked, file_rows, find_source, text
from support.storage import kept_folder, read_object, write_json

FORMAT = 10  # of kept arrays: count up when the same rows would give other arrays or counts
CHUNK_ROWS = 512  # tokenised at a time: about 50 MB of encodings, twice
GENERATION_BATCH = 64  # prompts answered at a time
HELD_OUT_ROWS = 1000  # of a source's test split, at most
HASHES = 2**64  # values of question_hash
SHOWN_PROBLEMS = 10  # malformed rows that an error names

# --- schemas --------------------------------------------------------------------------------------


class Schema(NamedTuple):
    """Names of columns. Without labels both answers count as safe."""

    mark: str  # the column that gives the schema away
    answers: tuple[str, ...]
    labels: tuple[str, ...] = ()
    better: str = ""  # id of the more helpful answer; without it, the first one
    safer: str = ""
    first_id: int = 0  # the ids count the answers from here


SCHEMAS = {  # the first whose mark is among a row's columns
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
    "TRL": Schema("chosen", ("chosen", "rejected")),  # and ultrafeedback_binarized
}


def _known(name: str) -> str:
    """A schema in words: the column that marks it, and all its columns."""
    schema = SCHEMAS[name]
    columns = [*schema.answers, *schema.labels, schema.better, schema.safer]
    return f"{name}, marked by {schema.mark}: prompt, {', '.join(filter(None, columns))}"


def find_schema(columns: Iterable[str], stage: str, labelled: bool = False) -> str:
    """The schema with these columns.

    SFT takes whole conversations, or the safer answer of pairs. labelled: rows that do not say
    which answers are safe are refused.
    """
    names = [name for name in SCHEMAS if stage == "sft" or name != "messages"]
    for name in names:
        if SCHEMAS[name].mark not in columns:
            continue
        if labelled and not SCHEMAS[name].labels:
            raise ValueError(
                "the row does not say which answers are safe; add the columns chosen_safe and "
                "rejected_safe, or pass the source as --helpfulness, where both answers count as "
                "safe"
            )
        return name
    hint = " (conversations: pass them as --sft)" if "messages" in columns else ""
    raise ValueError(
        f"columns must be those of a known schema{hint}, got {', '.join(columns)[:200]}; known: "
        + "; ".join(map(_known, names))
    )


# --- a row's pair ---------------------------------------------------------------------------------


class Pair(NamedTuple):
    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_safe: bool
    rejected_safe: bool


def read_messages(row: Row, name: str) -> list[Message]:
    """A column's conversation, of which role and content are kept."""

    def is_list(value: Any) -> bool:
        return bool(
            isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
        )

    roles = ("system", "user", "assistant")
    messages = []
    for turn in checked(row, name, is_list, "a list of {role, content}"):
        role = checked(turn, "role", lambda value: value in roles, "system, user or assistant")
        messages.append({"role": role, "content": text(turn, "content")})
    return messages


def read_prompt(row: Row) -> list[Message]:
    """The prompt, which is a question's text or a conversation."""
    if isinstance(row.get("prompt"), list):
        return read_messages(row, "prompt")
    return [{"role": "user", "content": text(row, "prompt")}]


def read_answers(row: Row, schema: Schema) -> tuple[list[Message], list[str]]:
    """(prompt, both answers), in the order of their columns.

    Answers are texts, or conversations that end with the answer. Such conversations may hold the
    prompt, as in ultrafeedback_binarized; then they hold all of it.
    """
    if not isinstance(row.get(schema.answers[0]), list):
        return read_prompt(row), [text(row, name) for name in schema.answers]
    first, second = (read_messages(row, name) for name in schema.answers)
    roles = [first[-1]["role"], second[-1]["role"]]
    if first[:-1] != second[:-1] or roles != ["assistant", "assistant"]:
        raise ValueError(
            f"{' and '.join(schema.answers)} must be one conversation with two last answers of "
            "the assistant"
        )
    return first[:-1] or read_prompt(row), [first[-1]["content"], second[-1]["content"]]


def read_number(row: Row, name: str, schema: Schema) -> int:
    """Which answer a column of ids names, 0 or 1; 0 without such a column."""
    if not name:
        return 0
    ids = [schema.first_id, schema.first_id + 1]

    def is_id(value: Any) -> bool:
        return type(value) is int and value in ids

    return ids.index(checked(row, name, is_id, f"{ids[0]} or {ids[1]}"))


def chosen_number(row: Row, schema: Schema, safe: Sequence[bool], prefer: str) -> int:
    """Which answer is chosen, 0 or 1, as `prefer` says.

    helpful: the better one. safe: the safe one if just one is safe, else the better one. safer
    (SFT): as safe, but of two with one label the safer one, where the schema says which it is.
    """
    better = read_number(row, schema.better, schema)
    safer = read_number(row, schema.safer, schema)
    if prefer == "helpful":
        return better
    if safe[0] != safe[1]:  # labels that differ decide, whatever safer_response_id says
        return safe.index(True)
    return safer if prefer == "safer" and schema.safer else better


def read_pair(row: Row, schema: Schema, prefer: str) -> Pair:
    """The pair of a row. prefer: helpful, safe or safer, as in chosen_number."""
    prompt, answers = read_answers(row, schema)
    if prompt[-1]["role"] != "user":
        raise ValueError(f"the prompt must end with a user's turn, got {prompt[-1]['role']}")
    safe = [boolean(row, name) for name in schema.labels] or [True, True]
    chosen = chosen_number(row, schema, safe, prefer)
    rejected = 1 - chosen
    return Pair(prompt, answers[chosen], answers[rejected], safe[chosen], safe[rejected])


# --- token ids ------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What a stream's arrays depend on, beside the rows and the chat format."""

    stage: str = "pairs"  # or sft
    prefer: str = "helpful"  # or safe, as in chosen_number
    max_length: int = 1024  # in tokens, with BOS and EOS
    max_prompt: int = 512
    held_out: float = 0.02  # share of all questions
    labelled: bool = False  # whether the rows must say which answers are safe


class Item(NamedTuple):
    """A row before its texts are tokenised."""

    texts: tuple[str, ...]  # for Chat.pair_ids or Chat.conversation_ids
    chosen_safe: bool
    rejected_safe: bool
    question: int  # its hash
    held_out: bool = False


def hashed(content: str, size: int) -> int:
    """The first `size` bytes of a text's sha256, as a number."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:size])


def question_hash(question: str) -> int:
    """Where a question stands in [0, HASHES): what decides whether it is held out."""
    return hashed(question, 8)


def make_item(row: Row, schema: Schema, chat: Chat, options: Options) -> Item | None:
    """What to tokenise of a row; None if there is nothing to learn from it, as a text is empty."""
    safe = (True, True)
    if schema.mark == "messages":
        messages = read_messages(row, "messages")
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not answers:
            raise ValueError("messages must have an assistant's turn")
    else:
        pair = read_pair(row, schema, options.prefer)
        messages = [*pair.prompt, {"role": "assistant", "content": pair.chosen}]
        answers = [pair.chosen]
        if options.stage == "pairs":
            answers.append(pair.rejected)
        safe = (pair.chosen_safe, pair.rejected_safe)
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not all(content.strip() for content in (*asked, *answers)):
        return None
    if options.stage == "pairs":
        texts = chat.pair_texts(messages[:-1], *answers)
    else:
        texts = chat.conversation_text(messages)
    question = question_hash(asked[0] if asked else "")
    return Item(texts, *safe, question)


def tokenise(items: Iterator[Item], chat: Chat, stage: str) -> Iterator[tuple[Item, list[Ids]]]:
    """Each item with its ids, not truncated: [prompt, chosen, rejected].

    For SFT they are [first token, the rest]. A chunk is tokenised in a thread while this one
    prepares the next. The tokenizer, which uses every core, lets Python run beside it.
    """
    encode = chat.pair_ids if stage == "pairs" else chat.conversation_ids
    under_way: deque[tuple[list[Item], Future[list[list[Ids]]]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        while chunk := list(islice(items, CHUNK_ROWS)):
            under_way.append((chunk, thread.submit(encode, [item.texts for item in chunk])))
            if len(under_way) == 2:
                earlier, ids = under_way.popleft()
                yield from zip(earlier, ids.result(), strict=True)
        for last, ids in under_way:
            yield from zip(last, ids.result(), strict=True)


# --- kept arrays ----------------------------------------------------------------------------------

COUNTS = ("rows", "empty", "identical", "prompts_cut", "answers_cut")
PERCENTILES = (0, 10, 50, 90, 99, 100)


def row_type(stage: str) -> np.dtype[Any]:
    """What is kept of a row beside its tokens: the lengths of its tree's parts, in tokens; labels;
    the number of its source; its question's hash.
    """
    lengths = ("lengths", np.int32, (3 if stage == "pairs" else 2,))
    flags = [(name, np.bool_) for name in ("chosen_safe", "rejected_safe", "held_out")]
    return np.dtype([lengths, *flags, ("source", np.int32), ("question", np.uint64)])


class Stream:
    """Token ids of a data set's training or held-out rows, in a memory-mapped array.

    tree(i) is one item of Pack.build: [prompt, chosen, rejected], for SFT [first token, the rest].
    lengths [n, 3] (SFT [n, 2]) in tokens; chosen_safe, rejected_safe bool [n]; questions: their
    hashes [n]. report: what describe prints. fingerprint: of all that the arrays depend on.
    """

    def __init__(self, folder: Path, held_out: bool, report: dict[str, Any]) -> None:
        every = np.load(folder / "rows.npy")
        is_mine = every["held_out"] == held_out
        rows = every[is_mine]
        self.tokens = np.memmap(folder / "tokens", report["token_type"], "r")
        self.ends = np.cumsum(every["lengths"].sum(axis=1, dtype=np.int64))[is_mine]
        self.lengths = np.ascontiguousarray(rows["lengths"])  # torch takes no fields in strides
        self.chosen_safe = rows["chosen_safe"]
        self.rejected_safe = rows["rejected_safe"]
        self.questions = rows["question"]
        self.report = report
        self.fingerprint = f"{folder.name}.{'held_out' if held_out else 'train'}"

    def __len__(self) -> int:
        return len(self.lengths)

    def tree(self, i: int) -> list[Ids]:
        start = self.ends[i] - self.lengths[i].sum()
        ids = self.tokens[start : self.ends[i]].astype(np.int64)
        return np.split(ids, np.cumsum(self.lengths[i][:-1]))


def read_items(
    source: Source, chat: Chat, options: Options, part: dict[str, Any], problems: list[str]
) -> Iterator[Item]:
    """The rows worth tokenising.

    Held out are the first HELD_OUT_ROWS of a source's test split, or where it has none, the
    questions whose hash is low. What is left out is counted in part. Malformed rows go to problems;
    after the first there are no more items.
    """
    count, rows = source.rows()
    tests = list(islice(file_rows(source.test), HELD_OUT_ROWS)) if options.held_out else []
    title = f"tokenising {source.text}"
    total = count + len(tests)
    wait = 0.1 if sys.stderr.isatty() else 10.0  # seconds, between two lines of progress
    every = tqdm(
        chain(rows, tests), title, total, unit=" rows", mininterval=wait, delay=wait, leave=False
    )
    for number, (place, row) in enumerate(every):
        part["rows"] += 1
        try:
            if isinstance(row, ValueError):
                raise row
            if not part["schema"]:
                part["schema"] = find_schema(row, options.stage, options.labelled)
            item = make_item(row, SCHEMAS[part["schema"]], chat, options)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if not part["schema"] and isinstance(row, dict):
                return  # unknown columns: the other rows would only say the same
            continue
        if item is None:
            part["empty"] += 1
        elif not problems:
            is_low = item.question < options.held_out * HASHES
            yield item._replace(held_out=number >= count if source.test else is_low)


def quadrant_counts(rows: Any) -> dict[str, int]:
    """How many rows, an array of row_type, are in each safety quadrant."""
    quadrant = 2 * (~rows["chosen_safe"]).astype(int) + (~rows["rejected_safe"]).astype(int)
    return dict(zip(QUADRANTS, np.bincount(quadrant, minlength=4).tolist(), strict=True))


def summarise(part: dict[str, Any], rows: Any, stage: str) -> None:
    """Add to a source's report what its kept rows say, an array of row_type."""
    train = rows[~rows["held_out"]]
    held = rows[rows["held_out"]]
    if not len(train):
        raise ValueError(
            f"{part['source']} must have rows to train on, got {part['rows']} rows, of which "
            f"{part['empty']} empty, {part['identical']} with identical answers and {len(held)} "
            "held out"
        )
    part |= {"training_rows": len(train), "held_out_rows": len(held), "tokens": {}}
    part |= {"quadrants": quadrant_counts(train), "held_out_quadrants": quadrant_counts(held)}
    columns = {"total": train["lengths"].sum(1)}
    if stage == "pairs":
        names = ("prompt", "chosen", "rejected")
        columns = dict(zip(names, train["lengths"].T, strict=True)) | columns
    for name, column in columns.items():
        values = np.percentile(column, PERCENTILES).astype(int).tolist()
        part["tokens"][name] = {f"p{q}": v for q, v in zip(PERCENTILES, values, strict=True)}


def example_of(chat: Chat, tree: Sequence[Ids]) -> list[str]:
    """A decoded tree, a line for each part, scored tokens between [[ and ]]."""
    short = reprlib.Repr()
    short.maxstring = 400
    prompt = chat.decode(tree[0], skip_special_tokens=False)
    lines = [short.repr(prompt)]
    for response in tree[1:]:
        whole = chat.decode([*tree[0], *response], skip_special_tokens=False)
        lines.append(short.repr(f"[[{whole[len(prompt) :]}]]"))
    return lines


def read_trees(
    source: Source, chat: Chat, options: Options, part: dict[str, Any], problems: list[str]
) -> Iterator[tuple[list[Ids], Item]]:
    """(tree, item) of each row that is kept; part and problems as of read_items.

    Part also counts the pairs whose answers are identical once cut, which are left out, and what
    the training rows lost to truncation.
    """
    items = read_items(source, chat, options, part, problems)
    for item, whole in tokenise(items, chat, options.stage):
        tree = truncate(whole, options.max_length, options.max_prompt, len(chat.front))
        if options.stage == "pairs" and np.array_equal(tree[1], tree[2]):
            part["identical"] += 1  # their margin is 0 whatever is learnt
            continue
        if not item.held_out:
            cut = [len(a) < len(b) for a, b in zip(tree, whole, strict=True)]
            part["prompts_cut"] += cut[0]
            part["answers_cut"] += sum(cut[1:])
        yield tree, item


def build(folder: Path, sources: Sequence[Source], chat: Chat, options: Options) -> None:
    """Fill a new folder: tokens, rows.npy (of row_type) and report.json.

    ValueError: malformed rows, the first of them and their number, or no row to train on.
    """
    token_type = "uint16" if chat.vocabulary <= 2**16 else "int32"
    parts: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    problems: list[str] = []
    example: list[str] = []
    with open(folder / "tokens", "wb") as tokens:
        for number, source in enumerate(sources):
            part: dict[str, Any] = {"source": source.text, "schema": "", **dict.fromkeys(COUNTS, 0)}
            parts.append(part)
            for tree, item in read_trees(source, chat, options, part, problems):
                tokens.write(np.concatenate(tree).astype(token_type).tobytes())
                lengths = tuple(map(len, tree))
                flags = (item.chosen_safe, item.rejected_safe, item.held_out)
                rows.append((lengths, *flags, number, item.question))
                if not (example or item.held_out):
                    example = example_of(chat, tree)
    if problems:
        head = f"malformed rows: {len(problems)}; the first ones:"
        raise ValueError("\n".join([head, *problems[:SHOWN_PROBLEMS]]))
    table = np.array(rows, dtype=row_type(options.stage))
    for number, part in enumerate(parts):
        summarise(part, table[table["source"] == number], options.stage)
    np.save(folder / "rows.npy", table)
    report = {"sources": parts, "example": example, "token_type": token_type, **options._asdict()}
    write_json(folder / "report.json", report)


def load_stream(
    sources: Sequence[str], chat: Chat, *, cache_dir: str | Path | None = None, **settings: Any
) -> tuple[Stream, Stream]:
    """(training rows, held-out rows) of some sources, tokenised once and kept under cache_dir.

    settings: those of Options. cache_dir: by default $BFPO_CACHE or ~/.cache/bfpo. Any number of
    processes may call at once. ValueError: rows that break their schema, the first ten with
    file:line, and their number; or a cache that cannot be written.
    """
    options = Options(**settings)
    if options.stage == "sft":  # the prompt is the first token
        options = options._replace(prefer="safer", max_prompt=1)
    found = [find_source(source, options.stage) for source in sources]
    identity = [FORMAT, chat.fingerprint, options, [(s.text, s.identity) for s in found]]
    fill = partial(build, sources=found, chat=chat, options=options)
    try:
        folder = kept_folder(cache_root(cache_dir), identity, fill)
    except OSError as error:
        raise ValueError(
            f"the token cache must be writable, got {error}; name another: train.py --cache, or "
            "BFPO_CACHE"
        ) from error
    report = read_object(folder / "report.json")
    size = sum(file.stat().st_size for file in folder.iterdir())
    report["cache"] = {"folder": str(folder), "bytes": size}
    return Stream(folder, False, report), Stream(folder, True, report)


# --- the batch of step n --------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, name: str, epoch: int) -> Ids:
    key = hashed(f"{seed} {name} {epoch}", 16)
    draws = np.random.Philox(key=key).random_raw(size)  # raw draws: the same in every numpy
    return np.argsort(draws, kind="stable")


def batch_indices(size: int, batch: int, seed: int, step: int, name: str) -> Ids:
    """[batch] rows of step `step` (from 0) of a stream of `size` rows: the next places in an
    endless sequence of permutations, each a new order. A pure function of its arguments.
    """
    places = range(step * batch, (step + 1) * batch)
    return np.array(
        [_permutation(size, seed, name, place // size)[place % size] for place in places]
    )


# --- packs dealt to ranks -------------------------------------------------------------------------

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
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    # Of each rank (tokens left, pack), sorted.
    rooms: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
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


def my_packs(lengths: Sequence[int], world: World, budget: int) -> list[list[int]]:
    """This rank's share of the items as packs of item numbers, of at most `budget` tokens, the cost
    shared out evenly.

    Every rank gets as many packs, empty ones at the end, because every forward takes part in the
    others' collectives.
    """
    dealt = deal(lengths, world.size, budget)
    own = dealt[world.rank]
    most = max(map(len, dealt))
    return own + [[] for _ in range(most - len(own))]


# --- rows of all streams --------------------------------------------------------------------------


def safety_labels(stream: Stream) -> tuple[Tensor, Tensor]:
    """(chosen_safe, rejected_safe) of its pairs, each bool [N]."""
    return torch.tensor(stream.chosen_safe), torch.tensor(stream.rejected_safe)


def title_of(name: str, stream: Stream, i: int, chat: Chat) -> str:
    """What a message calls row i of a stream: the stream's name, the number, and how the row begins
    and ends.
    """
    prompt, answer, *_ = stream.tree(i)
    return f"{name} {i} ({reprlib.repr(chat.decode([*prompt, *answer]))})"


def not_finite(
    logprobs: Tensor, name: str, stream: Stream, chat: Chat, rows: Sequence[int] | None = None
) -> list[str]:
    """Titles of a stream's rows whose log-probabilities [n, responses] are not all finite.

    rows: the numbers of the n rows; all by default.
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
        self.streams = list(streams.values())
        self.names = list(streams)
        self.chat = chat
        sizes = [len(stream) for stream in self.streams]
        self.starts = [0, *accumulate(sizes)]
        self.stream = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        lengths = torch.cat([torch.tensor(stream.lengths) for stream in self.streams])
        self.tokens = lengths.sum(1)
        self.scored = lengths[:, 1:].sum(1)
        labels = [safety_labels(stream) for stream in self.streams]
        self.chosen_safe = torch.cat([chosen for chosen, _ in labels])
        self.rejected_safe = torch.cat([rejected for _, rejected in labels])
        self.reference = torch.cat(list(references.values())) if references else torch.empty(0, 2)

    def draw(self, batch: int, seed: int, step: int) -> Tensor:
        """The global batch of a step: `batch` rows of each stream.

        A pure function of (seed, step).
        """
        drawn = []
        for name, stream, start in zip(self.names, self.streams, self.starts, strict=False):
            rows = batch_indices(len(stream), batch, seed, step, name)
            drawn.append(torch.from_numpy(rows) + start)
        return torch.cat(drawn)

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
        own = []
        for i, loss in zip(items.tolist(), losses.tolist(), strict=True):
            own.append((loss, self.title(i)))
        every = list(chain.from_iterable(world.gather(own)))
        if bad := [title for loss, title in every if not math.isfinite(loss)]:
            return f"rows whose loss is not finite: {in_words(bad)}"
        largest = [f"{loss:.3g} of {title}" for loss, title in sorted(every)[-3:]]
        return f"every row's loss is finite; the largest: {', '.join(largest)}"


# --- scoring and generating over ranks ------------------------------------------------------------


@torch.no_grad()
def score_trees(
    model: Mistral,
    trees: Sequence[Sequence[Sequence[int] | Ids]],
    world: World,
    budget: int,
    title: str = "",
) -> Tensor:
    """Summed log-probability of every response of (prompt ids, response ids, ...) trees, tree by
    tree, in nats: fp32 [R], the same on every rank. title: of a progress bar, if there is one.
    """
    if not trees:
        return torch.zeros(0)
    first = list(accumulate((len(tree) - 1 for tree in trees), initial=0))
    packs = my_packs([sum(map(len, tree)) for tree in trees], world, budget)
    places: list[int] = []
    found = []
    hidden = not (title and world.is_main)
    for items in tqdm(packs, title, unit="pack", disable=hidden, mininterval=2.0, leave=False):
        pack = Pack.build([trees[i] for i in items]).to(world.device)
        found.append(model.logprobs(pack).float())
        most = max((len(trees[i]) for i in items), default=1)
        for branch in range(1, most):  # the pack's order: every first response, then every second
            places += [first[i] + branch - 1 for i in items if branch < len(trees[i])]
    logprobs = torch.zeros(first[-1])
    # Off the device after the last pack: none waits for another.
    logprobs[places] = torch.cat(found).cpu()
    logprobs = world.sum(logprobs)
    if budget > 1 and not logprobs.isfinite().all():
        for i, tree in enumerate(trees):
            own = logprobs[first[i] : first[i + 1]]
            # A NaN spreads within its pack, masked or not. Only a tree that gives it alone has it.
            if not own.isfinite().all():
                own.copy_(score_trees(model, [tree], world, 1))
    return logprobs


def score(
    model: Mistral,
    stream: Stream,
    world: World,
    budget: int,
    title: str,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """score_trees of a stream's rows, or of these `rows`: fp32 [n, responses]."""
    numbers = range(len(stream)) if rows is None else rows
    logprobs = score_trees(model, [stream.tree(i) for i in numbers], world, budget, title)
    return logprobs.reshape(len(numbers), stream.lengths.shape[1] - 1)


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

    def ended(ids: list[int]) -> bool:
        decoded = chat.decode(ids)
        return any(string in decoded for string in stop)

    new = model.generate(
        [prompts[i] for i in numbers],
        max_new_tokens,
        temperature,
        top_p,
        seeds=[seed + i for i in numbers],
        stop_ids=chat.end_ids,
        ended=ended if stop else None,
        batch=GENERATION_BATCH,
    )
    answers: dict[int, Answer] = {}
    for i, ids in zip(numbers, new, strict=True):
        whole = chat.decode(ids)
        end = min((whole.find(string) for string in stop if string in whole), default=len(whole))
        at_limit = len(ids) == max_new_tokens and end == len(whole)
        answers[i] = Answer(whole[:end], len(ids), at_limit)
    every: dict[int, Answer] = {}
    for part in world.gather(answers):
        every |= part
    return [every[i] for i in range(len(prompts))]


# --- training prompts, for whoever evaluates ------------------------------------------------------

QUESTIONS = "questions.npy"  # in a run folder, beside its model


def trained_questions(model: Path) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Hashes of the questions that a run trained this exported model on, its earlier stages'
    included. None of a model that no run exported.
    """
    path = model.absolute().parent / QUESTIONS
    return np.load(path) if path.is_file() else np.empty(0, np.uint64)


def keep_questions(folder: Path, streams: Mapping[str, Stream], start: Path) -> None:
    """Write a run folder's trained_questions: its rows' and those of the model it starts from."""
    every = [stream.questions for stream in streams.values()]
    np.save(folder / QUESTIONS, np.unique(np.concatenate([trained_questions(start), *every])))


def count_trained(model: Path, entries: Iterable[Sequence[str]]) -> int:
    """How many entries have a text that is one of the model's training questions."""
    known = set(trained_questions(model).tolist())

    def is_trained(texts: Sequence[str]) -> bool:
        return any(question_hash(content) in known for content in texts)

    return len(list(filter(is_trained, entries)))


# --- report ---------------------------------------------------------------------------------------


def describe_source(part: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """A source's part of a report, as lines: what was lost first."""
    trained = part["training_rows"]
    lines = [
        f"{part['source']}: {part['schema']}, {part['rows']} rows read, {trained} to train on, "
        f"{part['held_out_rows']} held out",
        f"  dropped: {part['empty']} empty, {part['identical']} with identical answers; "
        f"cut to length: {part['prompts_cut']} prompts, {part['answers_cut']} answers",
    ]
    for name, percentiles in part["tokens"].items():
        values = "  ".join(f"{q} {value:5d}" for q, value in percentiles.items())
        lines.append(f"{name:>10} tokens  {values}")
    if report["stage"] == "sft":
        return lines
    pairs = {name: count for name, count in part["quadrants"].items() if count}
    shares = [f"{name} {count} ({count / trained:.1%})" for name, count in pairs.items()]
    lines.append(f"  {', '.join(shares)}")
    if unseen := [name for name in pairs if not part["held_out_quadrants"][name]]:
        remedy = "a larger --held_out SHARE holds out more"
        lines.append(f"  no held-out pair is {' or '.join(unseen)}; {remedy}")
    if report["labelled"] and len(pairs) == 1:
        lines.append(
            f"WARNING: every pair of {part['source']} is {next(iter(pairs))}; mixed labels are "
            "expected here"
        )
    return lines


def describe(report: Mapping[str, Any]) -> str:
    """A stream's report, as text."""
    lines = []
    for part in report["sources"]:
        lines += describe_source(part, report)
    lines.append("first row, scored tokens between [[ and ]]:")
    lines += [f"  | {line}" for line in report["example"]]
    cache = report["cache"]
    lines.append(f"token cache: {cache['folder']}, {cache['bytes'] / 2**20:.1f} MiB")
    return "\n".join(lines)


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    """The report on some rows, in the recipes' lengths; `train.py --dry_run` has it in any others.

    Exits with 2 for wrong usage, with 1 and a line for bad rows.
    """
    parser = argparse.ArgumentParser(description="What training would see of these rows.")
    add = parser.add_argument
    add("sources", nargs="+", metavar="FILE", help="NAME[@REVISION][:SPLIT][[START:STOP]]")
    add("--model", required=True, help="folder or hub name of the model whose tokenizer is used")
    add("--sft", action="store_true", help="conversations (of pairs: the safer answers)")
    add("--helpfulness", action="store_true", help="pairs without labels, all safe")
    add("--chat_template", help="zephyr, or a jinja file; default: the model's own, else Zephyr's")
    flags = parser.parse_args()

    try:
        chat = Chat(find_model(flags.model, weights=False), flags.chat_template)
        stream, _ = load_stream(
            flags.sources,
            chat,
            stage="sft" if flags.sft else "pairs",
            max_length=2048 if flags.sft else 1024,
            labelled=not (flags.sft or flags.helpfulness),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join([*chat.remarks, describe(stream.report)]))


if __name__ == "__main__":
    main()
