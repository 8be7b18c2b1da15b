"""Conversations to token ids and back: a model folder's tokenizer and chat format, with nothing
guessed.

What training sees is what a server of the exported model sends: the ids equal transformers'
apply_chat_template with Chat.template and this tokenizer.json. Three things differ on purpose. What
a template writes after the end of the last answer is dropped. Text is data: "</s>" inside a
question or an answer never becomes the control token of that name (deviation 13). Where the
prompt's own ids do not begin those of the answered conversation, the answer is tokenised apart. (Of
a folder whose model_type is llama, transformers 5 makes a LlamaTokenizer by its `legacy` entry,
whatever tokenizer.json says.)
"""

from __future__ import annotations

import json
import re
import reprlib
import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from support.storage import digest, read_object

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Ids = np.ndarray[Any, np.dtype[np.int64]]

# Zephyr's chat format. The empty system turn is Zephyr's alone; the newline after the last </s> is
# not kept.
ZEPHYR = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\\n' + eos_token + '\\n' }}{% endif %}\n"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content']"
    " + eos_token + '\\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}\n"
)
NO_TEMPLATE = "zephyr, as the model has none"

# Qwen3's template writes an empty thinking block before the last answer of a conversation, but
# leaves it out of a generation prompt unless it is asked not to think. This line makes that the
# default. The sign + keeps a newline after it.
NO_THINKING = "{% set enable_thinking = enable_thinking | default(false) +%}"

# Every template is tried on these.
QUESTION = {"role": "user", "content": "THE-QUESTION"}
ANSWER = {"role": "assistant", "content": "THE-ANSWER"}

# An added token that looks like a control token, whatever its flag: <|user|> or [INST], not
# "assistant" or a space.
MARKER = re.compile(r"(?s)[^\w\s].+[^\w\s]")


# --- text and ids ---------------------------------------------------------------------------------


def _common(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    return int(np.cumprod(a[:shorter] == b[:shorter]).sum())


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the texts; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def truncate(tree: Sequence[Ids], max_length: int, max_prompt: int, front: int = 1) -> list[Ids]:
    """[prompt, *responses], cut. If prompt + longest response > max_length, the prompt keeps its
    last max_prompt tokens, of which the first `front` are those in front of it: BOS, if there is
    one (deviation 3). If still too long, each response keeps its first max_length - max_prompt
    (§4.2).
    """
    prompt, *responses = tree
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length and len(prompt) > max_prompt:
        prompt = np.concatenate([prompt[:front], prompt[len(prompt) - max_prompt + front :]])
    if len(prompt) + longest > max_length:
        responses = [response[: max_length - max_prompt] for response in responses]
    return [prompt, *responses]


# --- a model folder's files -----------------------------------------------------------------------


def _open_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises no narrower type
        raise ValueError(
            f"a model folder must hold a readable tokenizer.json, got {folder} ({error});"
            " transformers' tokenizer.save_pretrained writes one"
        ) from error


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...}, as templates know them."""
    named = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            named[name] = text
    return named


def _find_template(folder: Path, config: dict[str, Any], template: str | None) -> tuple[str, str]:
    """(the template, where it comes from)."""
    if template == "zephyr":
        return ZEPHYR, "zephyr"
    file = Path(template or folder / "chat_template.jinja")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig"), template or "the model's"
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} must be UTF-8 text: {error}") from error
    if template:
        raise ValueError(f"template must be 'zephyr' or a file that holds one, got {template}")

    own = config.get("chat_template")
    if not own:
        return ZEPHYR, NO_TEMPLATE
    if isinstance(own, list):
        named = [entry for entry in own if isinstance(entry, dict)]
        own = next((e.get("template") for e in named if e.get("name") == "default"), own)
    if not isinstance(own, str):
        raise ValueError(
            f"{folder} must have a chat template, or several by name with one named default, got"
            f" {reprlib.repr(own)}; pass one as --chat_template FILE"
        )
    return own, "the model's"


def _configured_ends(folder: Path) -> list[int]:
    """The end tokens that a model's own files name: eos_token_id, a number or a list of numbers."""
    ends = set()
    for file in ("config.json", "generation_config.json"):
        value = read_object(folder / file).get("eos_token_id")
        listed = value if isinstance(value, list) else [value]
        ends |= {number for number in listed if type(number) is int}
    return sorted(ends)


# --- templates and control tokens -----------------------------------------------------------------


def _compile(template: str, strftime_now: Any) -> jinja2.Template:
    """The template in a sandbox, with the settings, filters and functions that transformers renders
    it with.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals |= {"tools": None, "documents": None}
    # Marks of what is scored: a block of no effect stands in their place.
    template = re.sub(r"({%[-+]?\s*(?:end)?)generation(\s*[-+]?%})", r"\1with\2", template)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template must be valid jinja: {error}") from error


def _respell(tokenizer: str, spelling: dict[str, str]) -> str:
    """tokenizer.json with other spellings of its control tokens, which keep their ids and flags.
    The old spellings are then in no vocabulary and no merge, so no text can give them.
    """
    content = json.loads(tokenizer) | {"truncation": None, "padding": None, "post_processor": None}
    if "merges" in content["model"]:
        content["model"]["merges"] = [
            [a, b] for a, b in content["model"]["merges"] if not {a, b, a + b} & spelling.keys()
        ]
    quoted = {json.dumps(control): json.dumps(other) for control, other in spelling.items()}
    return any_of(quoted).sub(lambda control: quoted[control[0]], json.dumps(content))


class Chat:
    """template: None takes the model's own (chat_template.jinja or tokenizer_config.json), or
    Zephyr's if it has none; "zephyr" takes Zephyr's; anything else names a file that holds a jinja
    template. now: the time for templates that write today's date.

    The attribute `template` is what training renders and what is exported. `template_source` says
    where it comes from. It has BOS in front if the file's writes none, because servers add none,
    and NO_THINKING if it asks whether to think.

    bos_id: None if the tokenizer has no BOS. front: the ids that every text begins with, [BOS] or
    none. prefix_id: what an empty context is, BOS, or EOS without one, as in
    lm-evaluation-harness. end_id: the control token with which the template ends an answer, EOS if
    it uses none. end_ids: the tokens at which a generated answer is over; end_id comes first, then
    EOS and what config.json and generation_config.json name. remarks: what a user should hear once
    before training, in sentences.

    Ids come from a copy of the tokenizer in which every control token is spelled with 64 random
    bits, which no data can contain. Only the control tokens that the template itself wrote are
    respelled so; "</s>" inside an answer is four characters of text like any other, and all other
    text gives the ids that the tokenizer always gives.
    """

    def __init__(
        self, folder: str | Path, template: str | None = None, now: datetime | None = None
    ) -> None:
        folder = Path(folder)
        self.tokenizer = _open_tokenizer(folder)
        config = read_object(folder / "special_tokens_map.json")
        config |= read_object(folder / "tokenizer_config.json")
        self.named = _named_tokens(config)
        self.entries: dict[str, int] = self.tokenizer.get_vocab()
        self.vocabulary = 1 + max(self.entries.values())

        self.now = now or datetime.now()
        self.template, self.template_source = _find_template(folder, config, template)
        self._jinja = _compile(self.template, self.now.strftime)
        self._know_controls(folder)
        self._complete_template()

        self.remarks: list[str] = []
        if self.template_source == NO_TEMPLATE:
            self.remarks.append(
                f"{folder} has no chat template; Zephyr's is used."
                " Pass another as --chat_template FILE"
            )
        self._probe()
        self.end_ids = tuple(dict.fromkeys([self.end_id, self.eos_id, *_configured_ends(folder)]))
        depends_on = [self.tokenizer.to_str(), self.template, self.named]
        if "strftime_now" in self.template:
            depends_on.append(str(self.now.date()))
        self.fingerprint = digest(depends_on)

    def _know_controls(self, folder: Path) -> None:
        """Finds the control tokens and makes the encoder in which only templates can write them.

        Control tokens are BOS, EOS, what is flagged special, and added tokens of any flag that the
        template writes, itself or put together.
        """
        self._eos = self.named.get("eos_token", "")
        self._bos = self.named.get("bos_token", self._eos)
        added = self.tokenizer.get_added_tokens_decoder()
        if missing := {self._eos, self._bos} - {token.content for token in added.values()}:
            raise ValueError(
                f"{folder} must name an eos_token, and may name a bos_token, among its added"
                f" tokens, got {missing.pop()!r}; set it in tokenizer_config.json"
            )
        asked = self._write([QUESTION], header=True)
        written = self.template + asked + self._write([QUESTION, ANSWER], header=False)
        self._spelling: dict[str, str] = {}
        self._ids: dict[str, int] = {}  # of spellings
        cuts = []
        for number, token in added.items():
            text = token.content
            used = MARKER.fullmatch(text) and text in written
            if token.special or used or text in (self._bos, self._eos):
                self._spelling[text] = f"\ufdd0{secrets.randbits(64)}.{number}\ufdd0"
                self._ids[self._spelling[text]] = number
                if not (token.normalized or token.single_word or text == self._bos):
                    cuts.append(self._spelling[text])
        self.eos_id = self._ids[self._spelling[self._eos]]
        self.prefix_id = self._ids[self._spelling[self._bos]]
        self.bos_id = self.prefix_id if "bos_token" in self.named else None
        self.front = [] if self.bos_id is None else [self.bos_id]

        self._controls = any_of(self._spelling)
        self._cuts = any_of(cuts)
        self._encoder = Tokenizer.from_str(_respell(self.tokenizer.to_str(), self._spelling))
        self._seal = f"\ufdd1{secrets.randbits(64)}\ufdd1"
        self._encoder.add_tokens([AddedToken(self._seal, normalized=False)])
        self._seal_id = self._encoder.token_to_id(self._seal)

    def _complete_template(self) -> None:
        """Puts in front of the template what servers would not add."""
        front = ""
        if "enable_thinking" in self.template and NO_THINKING not in self.template:
            front = NO_THINKING
        if self.front:
            bos = self._spelling[self._bos]
            before, own_bos, _ = self.render([QUESTION]).partition(bos)
            if own_bos and before and not before.strip():
                raise ValueError(
                    f"the chat template writes {before!r} before its {self._bos}; delete that"
                )
            if before:
                front = "{{ bos_token }}" + front
        if front:
            # Blanks before the first block, which lstrip_blocks drops only where a line starts.
            self.template = front + re.sub(r"^[ \t]+(?=\{[%#])", "", self.template)
            self._jinja = _compile(self.template, self.now.strftime)

    def _probe(self) -> None:
        """Renders a short conversation, to check the template and to see how it ends an answer."""
        header = self.render([QUESTION], header=True)
        whole = self.render([QUESTION, ANSWER])
        front, _, self._tail = whole.rpartition(ANSWER["content"])
        if front.rstrip() != header.rstrip():
            raise ValueError(
                "the chat template must write before an answer what it writes as the generation"
                f" prompt, {self._readable(header)!r}, got {self._readable(front)!r};"
                " take another one, such as --chat_template zephyr"
            )
        ids = self._encoder.encode(whole, add_special_tokens=False).ids
        for spelling, number in self._ids.items():
            if spelling in whole and ids.count(number) != whole.count(spelling):
                raise ValueError(
                    "the tokenizer must always read the template's"
                    f" {self._readable(spelling)!r} as one token; in tokenizer.json, make it an"
                    " added token with normalized false"
                )
        self._find_end()
        self._find_seam(header)

    def _find_end(self) -> None:
        """Sets end_id, and _end: what the template writes after an answer up to its end token.

        The end token is the first control token that follows an answer whether or not another turn
        comes: a template may write the next header after the last answer. EOS is taken for it where
        it ends the last answer alone, or none does.
        """
        longer = self.render([QUESTION, ANSWER, QUESTION])
        between = longer.rpartition(QUESTION["content"])[0].rpartition(ANSWER["content"])[2]
        eos = self._spelling[self._eos]
        end = any_of(self._ids).search(between)
        if not end or not self._tail.startswith(between[: end.end()]):
            end = any_of([eos]).search(self._tail)
        self._end_spelling = end[0] if end else eos
        self._end = self._tail[: end.end()] if end else eos
        self.end_id = self._ids[self._end_spelling]
        if not end and self._tail.strip():
            self.remarks.append(
                f"the chat template ends an answer with {self._tail.strip()!r}, which holds no"
                f" control token of this tokenizer; {self._eos} ends answers in its place."
                " Add the token to tokenizer.json, or pass --chat_template zephyr"
            )

    def _find_seam(self, header: str) -> None:
        """Sets _seam, "" as a rule: a token of our own between prompt and answer, where the
        prompt's own ids do not begin those of the answered conversation. Text on either side of it
        is tokenised apart, and `encode` drops it.
        """
        self._seam = ""
        served, *answered = self.encode(self.pair_texts([QUESTION], "Sure", "I", "7"))
        if all(np.array_equal(served, ids[: len(served)]) for ids in answered):
            return
        self._seam = self._seal
        self.remarks.append(
            f"the chat template's generation prompt ends in {self._readable(header)[-12:]!r}, and"
            " its token ids do not begin those of an answered conversation; answers are tokenised"
            " apart, so that the model is trained on the prompt it is served"
        )

    def _readable(self, text: str) -> str:
        """A rendered text with the control tokens' own spellings, for messages."""
        for control, spelling in self._spelling.items():
            text = text.replace(spelling, control)
        return text

    def _write(self, messages: Sequence[Message], header: bool) -> str:
        """What the template makes of the messages as they are."""
        try:
            return self._jinja.render(messages=messages, add_generation_prompt=header, **self.named)
        except Exception as error:  # whatever goes wrong in a template
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def render(self, messages: Sequence[Message], header: bool = False) -> str:
        """The conversation as text, control tokens respelled; header: with the header of the answer
        to come.
        """

        def sealed(control: re.Match[str]) -> str:
            return self._seal.join(("", *control[0], ""))

        # What only looks like a control token is broken up: those left in the text are the
        # template's.
        masked = [
            message | {"content": self._controls.sub(sealed, message["content"])}
            for message in messages
        ]
        return self.control(self._write(masked, header)).replace(self._seal, "")

    def control(self, text: str) -> str:
        """Text for `encode` that someone trusted wrote: what is spelled like a control token in it
        is one.
        """
        return self._controls.sub(lambda control: self._spelling[control[0]], text)

    def encode(self, texts: Iterable[str]) -> list[Ids]:
        """Ids of each text (render's, control's, or plain), without the BOS in front; those that
        open or close turns stay.
        """
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        every = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        if self._seam:
            every = [ids[ids != self._seal_id] for ids in every]
        return [ids[1:] if len(ids) and ids[0] == self.bos_id else ids for ids in every]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """[*front, ...]: the conversation and the header of the answer to come, as in training."""
        return self.text(self.render(messages, header=True))

    def text(self, text: str) -> list[int]:
        """[*front, ...]: plain text outside any chat format; nothing in it is a control token."""
        return [*self.front, *self.encode([text])[0].tolist()]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; without control tokens, or with them."""
        numbers = [int(number) for number in ids]
        return str(self.tokenizer.decode(numbers, skip_special_tokens=skip_special_tokens))

    def _closed(self, text: str) -> str:
        """A rendered conversation up to the end token of its last answer: what the template writes
        after it is dropped.
        """
        if text.endswith(self._tail):
            return text.removesuffix(self._tail) + self._end
        front, end, _ = text.rpartition(self._end_spelling)  # it ends with a question
        return front + end if end else text + self._end_spelling

    def conversation_text(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """What conversation_ids takes: the conversation, alone.

        ValueError as pair_texts', of one that ends with an answer.
        """
        *prompt, last = messages
        if prompt and last["role"] == "assistant":
            return self.pair_texts(prompt, last["content"])[1:]
        return (self._closed(self.render(messages)),)

    def pair_texts(self, prompt: Sequence[Message], *answers: str) -> tuple[str, ...]:
        """What pair_ids takes: the prompt with the answer's header, and the conversation with each
        answer, chosen and rejected. ValueError where the template writes the prompt otherwise once
        it is answered, as some do with a system turn.
        """
        header = self.render(prompt, header=True)
        texts = [header + self._seam]
        for answer in answers:
            text = self.render([*prompt, {"role": "assistant", "content": answer}])
            if not text.startswith(header.rstrip()):
                raise ValueError(
                    "the chat template writes this prompt otherwise once an answer follows;"
                    " take another one, such as zephyr"
                )
            text = self._closed(text)
            if self._seam:
                shared = header if text.startswith(header) else header.rstrip()
                text = header + self._seam + text.removeprefix(shared)
            texts.append(text)
        return tuple(texts)

    def _cut(self, texts: Sequence[str]) -> tuple[str, ...]:
        """(front, *tails): what the texts share up to their last shared control token, and the rest
        of each, which starts with that token again. Tokenizers treat text on either side of a
        control token apart, so that ids(text) = ids(front) + ids(tail)[1:], and the prompt is
        tokenised once and not three times.
        """
        header, *answered = texts
        cuts = list(self._cuts.finditer(header))
        if not cuts or not all(text.startswith(header) for text in answered):
            return "", *texts
        start, end = cuts[-1].span()
        return header[:end], *(text[start:] for text in texts)

    def pair_ids(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """[prompt, chosen, rejected] of each pair_texts, not truncated. The ids are those of whole
        conversations, as an answer alone gives other ids; the prompt is the longest common prefix
        of the three, so a token that spans the boundary belongs to the answer. The prompt starts
        with BOS, if there is one, and holds the empty thinking block of a template that writes one.
        An answer ends with the template's end token. Deviations 1 and 2.
        """
        ids = iter(self.encode(chain.from_iterable(map(self._cut, texts))))
        bos = np.array(self.front, dtype=np.int64)
        trees = []
        for front, *tails in zip(ids, ids, ids, ids, strict=True):
            if len(front):  # its last token starts each tail again
                tails = [np.concatenate([front, tail[1:]]) for tail in tails]
            header, chosen, rejected = tails
            shared = min(_common(header, chosen), _common(header, rejected))
            prompt = np.concatenate([bos, header[:shared]])
            trees.append([prompt, chosen[shared:], rejected[shared:]])
        return trees

    def conversation_ids(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """[[the first token], everything after it] of each conversation_text. SFT scores every
        token that something stands before, headers and thinking blocks included, as the authors
        do. The first is BOS, if there is one.
        """
        bos = np.array(self.front, dtype=np.int64)
        every = [np.concatenate([bos, ids]) for ids in self.encode(chain.from_iterable(texts))]
        return [[ids[:1], ids[1:]] for ids in every]


def must_fit(chat: Chat, entries: int, model: str | Path) -> None:
    """ValueError where the tokenizer gives ids that a model with so many entries in its embedding
    does not have.
    """
    if chat.vocabulary > entries:
        raise ValueError(
            f"{model}: the tokenizer has {chat.vocabulary} entries, the model {entries};"
            " they do not match"
        )
