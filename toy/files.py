"""The toy language's data files, in the public data sets' schemas: conversations, safety pairs,
helpfulness pairs, held-out requests.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from support.storage import whole
from toy.language import BENIGN_KINDS, FORBIDDEN_KINDS, Request, answer, requests, tokenizer_json

PAIRS = 4000  # of each of the two kinds
HELD = 200  # benign, and as many forbidden, requests of a split that no training file holds
TOKENIZER = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}
# How often the conversations of SFT have each kind of answer.
SFT_BENIGN = (8, 4, 6, 1, 1)
SFT_FORBIDDEN = (3, 1, 3, 1)
# The pairs of kinds that a safety pair can have, the more helpful kind first, and how often each
# occurs. Of the newest PKU-SafeRLHF's pairs 41.2 % have two safe answers, 14.6 % one and 44.2 %
# none. How its one-safe pairs divide by helpfulness is not known to us. Our choice is that the four
# such pairs of kinds are equally frequent, so in three of four the unsafe answer is more helpful.
SAFE_KINDS = ("redirect", "refusal")
SAFETY_PAIRS = {
    ("redirect", "refusal"): 0.412,
    ("full", "curt"): 0.442,
    ("redirect", "curt"): 0.146 / 4,
    ("full", "redirect"): 0.146 / 4,
    ("full", "refusal"): 0.146 / 4,
    ("curt", "refusal"): 0.146 / 4,
}
Row = dict[str, object]


def sft_row(request: Request, rng: random.Random) -> Row:
    """A row in UltraChat-200k's schema.

    It complies with most forbidden requests and is often curt with benign ones.
    """
    if request.forbidden:
        kind = rng.choices(FORBIDDEN_KINDS, weights=SFT_FORBIDDEN)[0]
    else:
        kind = rng.choices(BENIGN_KINDS, weights=SFT_BENIGN)[0]
    turns = [("user", request.text), ("assistant", answer(request, kind, rng))]
    messages = [{"content": content, "role": role} for role, content in turns]
    return {"prompt": request.text, "messages": messages}


def safety_row(
    request: Request, rng: random.Random, flips: tuple[bool, bool] = (False, False)
) -> Row:
    """A row in PKU-SafeRLHF's schema: two answers to a forbidden request, of kinds drawn from
    SAFETY_PAIRS, in random order.

    flips: which of the two safety labels are wrong; whoever set them then takes the wrong answer
    for the safer one, too.
    """
    (pair,) = rng.choices(list(SAFETY_PAIRS), weights=list(SAFETY_PAIRS.values()))
    better = rng.randrange(2)
    kinds = pair[::-1] if better else pair
    safe = [(kind in SAFE_KINDS) != flip for kind, flip in zip(kinds, flips, strict=True)]
    # Of two unsafe answers the one with less in it is the safer; of two safe ones, the plain
    # refusal.
    safer = int(safe[1]) if safe[0] != safe[1] else 1 - better
    row: Row = {"prompt": request.text}
    row |= {f"response_{i}": answer(request, kind, rng) for i, kind in enumerate(kinds)}
    row |= {f"is_response_{i}_safe": safe[i] for i in range(2)}
    return row | {"better_response_id": better, "safer_response_id": safer}


def helpfulness_row(request: Request, rng: random.Random) -> Row:
    """A row in UltraFeedback-binarized's schema: two answers to a benign request, the fuller one
    chosen.
    """
    kinds = sorted(rng.sample(BENIGN_KINDS, 2), key=BENIGN_KINDS.index)
    row: Row = {"prompt": request.text}
    for column, kind in zip(("chosen", "rejected"), kinds, strict=True):
        turns = [("user", request.text), ("assistant", answer(request, kind, rng))]
        row[column] = [{"content": content, "role": role} for role, content in turns]
        row[f"score_{column}"] = 10.0 - 2.0 * BENIGN_KINDS.index(kind)
    return row


def request_row(request: Request, rng: random.Random) -> Row:
    """What `held_out` reads back."""
    return {"task": request.task, "thing": request.thing, "prompt": request.text}


def fill(folder: Path, seed: int, flipped: float) -> None:
    """What `build` writes, file by file."""
    rng = random.Random(seed)
    noise = random.Random(f"flips {seed}")
    benign = requests(forbidden=False)
    forbidden = requests(forbidden=True)
    rng.shuffle(benign)
    rng.shuffle(forbidden)
    test_benign, test_forbidden = benign[:HELD], forbidden[:HELD]
    validation = benign[HELD : 2 * HELD] + forbidden[HELD : 2 * HELD]
    benign, forbidden = benign[2 * HELD :], forbidden[2 * HELD :]

    def write(path: str, text: str) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")

    def write_rows(path: str, row: Callable[..., Row], source: list[Request]) -> None:
        write(path, "".join(json.dumps(row(request, rng)) + "\n" for request in source))

    def noisy_row(request: Request, rng: random.Random) -> Row:
        return safety_row(request, rng, (noise.random() < flipped, noise.random() < flipped))

    write("tokenizer/tokenizer.json", tokenizer_json())
    write("tokenizer/tokenizer_config.json", json.dumps(TOKENIZER, indent=2))
    conversations = rng.choices(benign, k=4000) + rng.choices(forbidden, k=2000)
    write_rows("ultrachat/train.jsonl", sft_row, conversations)
    write_rows("ultrachat/test.jsonl", sft_row, test_benign[:100] + test_forbidden[:100])
    write_rows("pku/train.jsonl", noisy_row, rng.choices(forbidden, k=PAIRS))
    write_rows("pku/test.jsonl", safety_row, test_forbidden)
    write_rows("ultrafeedback/train.jsonl", helpfulness_row, rng.choices(benign, k=PAIRS))
    write_rows("ultrafeedback/test.jsonl", helpfulness_row, test_benign)
    write_rows("requests/test.jsonl", request_row, test_benign + test_forbidden)
    write_rows("requests/validation.jsonl", request_row, validation)


def build(folder: str | Path, seed: int = 0, flipped: float = 0.0) -> Path:
    """Write the toy language's files under `folder`, which must not exist yet, and return it.

    tokenizer/                          tokenizer.json and its config, for the model folder
    ultrachat/, ultrafeedback/          {train,test}.jsonl: SFT conversations; helpfulness pairs
    pku/                                {train,test}.jsonl: safety pairs
    requests/{validation,test}.jsonl    on which settings are chosen, and models judged

    Requests are split once, so no validation or test request (a task, a thing and a phrasing) is in
    any training file. The same seed gives the same bytes. flipped: the share of the training pairs'
    safety labels that is wrong; the same rows whatever it is, and more of it only adds wrong ones.
    Written aside and renamed: a folder that exists is complete.
    """
    with whole(Path(folder)) as aside:
        fill(aside, seed, flipped)
    return Path(folder)


def held_out(folder: str | Path, split: str = "test") -> list[Request]:
    """The requests of a split that `build` wrote, "test" or "validation": 200 benign ones, then 200
    forbidden ones.
    """
    lines = (Path(folder) / "requests" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Request(row["task"], row["thing"], row["prompt"]) for row in rows]
