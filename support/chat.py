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

import hashlib
import json
import re
import reprlib
import secrets
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from support.storage import read_object

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Ids = np.ndarray[Any, np.dtype[np.int64]]

# Zephyr's chat format. The empty system turn is Zephyr's alone; the newline after the last </s> is
# not kept.
NO_TEMPLATE = "zephyr, as the model has none"
ZEPHYR = """\
{% if messages[0]['role'] != 'system' %}{{ '<|system|>\\n' + eos_token + '\\n' }}{% endif %}
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""


def _common(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    return int(np.cumprod(a[:shorter] == b[:shorter]).sum())


def _same_start(a: str, b: str) -> int:
    """Characters of the longest common prefix."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the texts; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _respell(tokenizer: str, spelling: dict[str, str]) -> str:
    """tokenizer.json with other spellings of its control tokens, which keep their ids and flags.
    The old spellings are then in no vocabulary and no merge, so no text can give them.
    """
    content = json.loads(tokenizer)
    for token in content["added_tokens"]:
        if token["content"] in spelling:
            token.update(content=spelling[token["content"]], special=False)
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {
            spelling.get(token, token): number for token, number in model["vocab"].items()
        }
    else:  # Unigram
        model["vocab"] = [[spelling.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [
            [a, b] for a, b in model["merges"] if not {a, b, a + b} & spelling.keys()
        ]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
    return json.dumps(content | {"truncation": None, "padding": None, "post_processor": None})


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text: {error}") from error


def _find_template(folder: Path, config: dict[str, Any], template: str | None) -> tuple[str, str]:
    """(the template, where it comes from)."""
    if template == "zephyr":
        return ZEPHYR, "zephyr"
    if template:
        if not Path(template).is_file():
            raise ValueError(
                f"template must be 'zephyr' or a file with a jinja template, got {template}"
            )
        return _read_template(Path(template)), template
    if (file := folder / "chat_template.jinja").is_file():
        return _read_template(file), "the model's"
    own = config.get("chat_template")
    if not own:
        return ZEPHYR, NO_TEMPLATE
    try:
        named = (
            {entry["name"]: entry["template"] for entry in own} if isinstance(own, list) else own
        )
        default = named if isinstance(named, str) else named["default"]
    except (TypeError, LookupError):
        default = None
    if not isinstance(default, str):
        raise ValueError(
            f"{folder} must have a chat template, or several by name with one named default, got {reprlib.repr(own)}; "
            "pass one as --chat_template FILE"
        )
    return default, "the model's"


def _configured_ends(folder: Path) -> set[int]:
    """The end tokens that a model's own files name: eos_token_id, a number or a list of numbers."""
    ends: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        value = read_object(folder / file).get("eos_token_id")
        listed = value if isinstance(value, list) else [value]
        if any(type(number) is not int and number is not None for number in listed):
            raise ValueError(
                f"{folder / file}: eos_token_id must be a token id or a list of them, got {reprlib.repr(value)}"
            )
        ends.update(number for number in listed if number is not None)
    return ends


def _is_marker(text: str) -> bool:
    """Whether an added token looks like a control token, whatever its flag: <|user|> or [INST], not
    "assistant" or a space.
    """
    ends = text[:1] + text[-1:]
    return len(text) > 2 and not any(letter.isalnum() or letter.isspace() for letter in ends)


def _compile(template: str, strftime_now: Callable[[str], str]) -> Any:
    """The template in a sandbox, with the settings, filters and functions that transformers renders
    it with.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    marks = r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})"  # they only say which part is scored
    template = re.sub(
        marks, lambda mark: mark[1] + ("endif" if mark[2] else "if true") + mark[3], template
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template must be valid jinja: {error}") from error


class Chat:
    """template: None takes the model's own (chat_template.jinja or tokenizer_config.json), or
    Zephyr's if it has none; "zephyr" takes Zephyr's; anything else names a file that holds a jinja
    template. The attribute `template` has BOS in front if this one writes none, because servers add
    none; it is what training renders and what is exported. `template_source` says which one it is.
    now: the time for templates that write today's date.

    end_id: the control token with which the template ends an answer, EOS if it uses none. end_ids:
    the tokens at which a generated answer is over; end_id comes first, then EOS and what
    config.json and generation_config.json name. remarks: what a user should hear once before
    training, in sentences.

    Ids come from a copy of the tokenizer in which every control token is spelled with 64 random
    bits, which no data can contain. Only the control tokens that the template itself wrote are
    respelled so; "</s>" inside an answer is four characters of text like any other, and all other
    text gives the ids that the tokenizer always gives.
    """

    def __init__(
        self, folder: str | Path, template: str | None = None, now: datetime | None = None
    ) -> None:
        from tokenizers import AddedToken, Tokenizer

        folder = Path(folder)
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no narrower type
            raise ValueError(
                f"a model folder must hold a readable tokenizer.json, got {folder} ({error}); transformers'"
                " tokenizer.save_pretrained writes one"
            ) from error
        config = read_object(folder / "special_tokens_map.json") | read_object(
            folder / "tokenizer_config.json"
        )
        spelled = {
            name: value.get("content") if isinstance(value, dict) else value
            for name, value in config.items()
        }
        self.named = {
            name: text
            for name, text in spelled.items()
            if name.endswith("_token") and isinstance(text, str)
        }
        for name in ("bos_token", "eos_token"):
            if self.tokenizer.token_to_id(self.named.get(name, "")) is None:
                raise ValueError(
                    f"{folder} must name a {name} of its vocabulary; set it in tokenizer_config.json"
                )
        bos, eos = self.named["bos_token"], self.named["eos_token"]
        known = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        self.tokenizer.add_special_tokens(
            [AddedToken(text, normalized=False) for text in (bos, eos) if text not in known]
        )
        self.entries: dict[str, int] = self.tokenizer.get_vocab()
        self.vocabulary = 1 + max(self.entries.values())

        self.now, self.dates = (
            now or datetime.now(),
            dict[str, str](),
        )  # format -> the date as the template writes it
        self.template, self.template_source = _find_template(folder, config, template)
        self._jinja = _compile(self.template, self._date)
        self._know_controls()
        front, own_bos, _ = self.render([{"role": "user", "content": "?"}]).partition(
            self._spelling[bos]
        )
        if own_bos and front and not front.strip():
            raise ValueError(
                f"the chat template must write nothing before its {bos}, got {front!r}; delete it there"
            )
        if front:
            unindented = re.sub(
                r"^[ \t]+(?=\{[%#])", "", self.template
            )  # as lstrip_blocks would have it, at a line's start alone
            self.template = "{{ bos_token }}" + unindented
            self._jinja = _compile(self.template, self._date)
        self.remarks: list[str] = []
        if self.template_source == NO_TEMPLATE:
            self.remarks.append(
                f"{folder} has no chat template; Zephyr's is used. Pass another as --chat_template FILE"
            )
        self._probe()
        self.end_ids = tuple(
            dict.fromkeys([self.end_id, self.eos_id, *sorted(_configured_ends(folder))])
        )
        depends_on = [self.tokenizer.to_str(), self.template, self.named]
        if self.dates:
            depends_on.append(self.dates)
        self.fingerprint = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()

    def _date(self, form: str) -> str:
        """strftime_now of templates: `now`, and not the clock, so that a run has one date from its
        start to its end.
        """
        self.dates[form] = self.now.strftime(form)
        return self.dates[form]

    def _know_controls(self) -> None:
        """Finds the control tokens and makes the encoder in which only templates can write them.

        Control tokens are BOS, EOS, what is flagged special, and added tokens of any flag that the
        template writes.
        """
        from tokenizers import Tokenizer

        added = self.tokenizer.get_added_tokens_decoder()
        self._spelling: dict[str, str] = {}
        self._controls = any_of(
            ()
        )  # a first rendering shows which added tokens the template puts together
        self._seal = f"\ufdd1{secrets.randbits(64)}\ufdd1"
        bos, eos = self.named["bos_token"], self.named["eos_token"]
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
        written = self.template + self.render(turns[:1], header=True) + self.render(turns)
        self._ids: dict[str, int] = {}
        for number, token in added.items():
            used = _is_marker(token.content) and token.content in written
            if token.special or used or token.content in (bos, eos):
                self._ids[token.content] = number
        self.bos_id, self.eos_id = self._ids[bos], self._ids[eos]
        self._spelling = {
            text: f"\ufdd0{secrets.randbits(64)}.{number}\ufdd0"
            for text, number in self._ids.items()
        }
        self._controls = any_of(self._ids)
        self._cuts = any_of(
            self._spelling[token.content]
            for token in added.values()
            if token.content in self._spelling
            and not (token.normalized or token.single_word or token.content == bos)
        )
        self._encoder = Tokenizer.from_str(_respell(self.tokenizer.to_str(), self._spelling))

    def _probe(self) -> None:
        """Renders a short conversation, to check the template and to see how it ends an answer."""
        question, answer, reply = (str(secrets.randbits(64)) for _ in range(3))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        header, whole = self.render(turns[:1], header=True), self.render(turns)
        front, _, self._tail = whole.rpartition(answer)
        if front.rstrip() != header.rstrip() or question not in header:
            said = {spelling: text for text, spelling in self._spelling.items()} | {
                question: "QUESTION",
                answer: "ANSWER",
            }
            wanted, got = (
                any_of(said).sub(lambda found: said[found[0]], text) for text in (header, front)
            )
            raise ValueError(
                "the chat template must write before an answer what it writes as the generation prompt,"
                f" {wanted!r}, got {got!r}; take another one, such as --chat_template zephyr"
            )
        ids = self._encoder.encode(whole, add_special_tokens=False).ids
        for text, spelling in self._spelling.items():
            if spelling in whole and ids.count(self._ids[text]) != whole.count(spelling):
                raise ValueError(
                    f"the tokenizer must read the template's {text!r} as one token, wherever it is; in"
                    " tokenizer.json, make it an added token with normalized false"
                )
        self._find_end(turns, answer, reply)
        self._find_seam(turns[:1], header)

    def _find_end(self, turns: Sequence[Message], answer: str, reply: str) -> None:
        """Sets end_id, and _end: what the template writes after an answer up to its end token.

        The end token is the first control token that follows an answer whether or not another turn
        comes: a template may write the next header after the last answer. EOS is taken for it where
        it ends the last answer alone, or none does.
        """
        after = self._tail
        try:
            longer = self.render([*turns, {"role": "user", "content": reply}])
        except ValueError:  # a template may refuse a second question
            pass
        else:
            between = longer.rpartition(reply)[0].rpartition(answer)[2]
            after = between[: _same_start(self._tail, between)]
        eos = self.named["eos_token"]
        first = any_of(self._spelling.values()).search(after) or re.search(
            re.escape(self._spelling[eos]), self._tail
        )
        if first:
            self._end = self._tail[: first.end()]
            self._end_spelling = first[0]
        else:
            self._end = self._end_spelling = self._spelling[eos]
            if marker := after.strip():
                self.remarks.append(
                    f"the chat template ends an answer with {marker!r}, which holds no control token of this tokenizer; "
                    f"{eos} ends answers in its place. Add the token to tokenizer.json, or pass --chat_template zephyr"
                )
        self.end_id = next(
            number
            for text, number in self._ids.items()
            if self._spelling[text] == self._end_spelling
        )

    def _find_seam(self, question: Sequence[Message], header: str) -> None:
        """Sets _seam, "" as a rule: a token of our own between prompt and answer, where the
        prompt's own ids do not begin those of the answered conversation. Text on either side of it
        is tokenised apart; `encode` drops it.
        """
        from tokenizers import AddedToken

        self._seam, self._seam_id = "", -1
        texts = [
            self.render([*question, {"role": "assistant", "content": text}])
            for text in ("Sure", "I", "7")
        ]
        served, *answered = self.encode([header, *texts])
        if all(np.array_equal(served, ids[: len(served)]) for ids in answered):
            return
        self._seam = f"\ufdd2{secrets.randbits(64)}\ufdd2"
        self._encoder.add_tokens([AddedToken(self._seam, normalized=False)])
        self._seam_id = self._encoder.token_to_id(self._seam) or -1
        self.remarks.append(
            f"the chat template's generation prompt ends in {header[-12:]!r}, and its token ids do not begin those of an "
            "answered conversation; answers are tokenised apart, so that the model is trained on the prompt it is served"
        )

    def render(self, messages: Sequence[Message], header: bool = False) -> str:
        """The conversation as text, control tokens respelled; header: with the header of the answer
        to come.
        """
        import jinja2

        # What only looks like a control token is broken up: those left in the text are the
        # template's.
        masked = [
            message
            | {
                "content": self._controls.sub(
                    lambda found: self._seal.join(("", *found[0], "")), message["content"]
                )
            }
            for message in messages
        ]
        try:
            text = self._jinja.render(
                messages=masked,
                add_generation_prompt=header,
                tools=None,
                documents=None,
                **self.named,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return self.control(text).replace(self._seal, "")

    def control(self, text: str) -> str:
        """Text for `encode` that someone trusted wrote: what is spelled like a control token in it
        is one.
        """
        return self._controls.sub(lambda found: self._spelling[found[0]], text)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text (render's, control's, or plain), without the BOS in front; those that
        open or close turns stay.
        """
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        every = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        if self._seam:
            every = [ids[ids != self._seam_id] for ids in every]
        return [ids[1:] if len(ids) and ids[0] == self.bos_id else ids for ids in every]

    def _closed(self, text: str) -> str:
        """A rendered conversation up to the end token of its last answer: what the template writes
        after it is dropped.
        """
        if text.endswith(self._tail):
            return text.removesuffix(self._tail) + self._end
        front, end, _ = text.rpartition(self._end_spelling)  # it ends with a question
        return front + end if end else text + self._end_spelling

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """[BOS, ...]: the conversation and the header of the answer to come, as in training."""
        return self.text(self.render(messages, header=True))

    def text(self, text: str) -> list[int]:
        """[BOS, ...]: plain text outside any chat format; nothing in it is a control token."""
        return [self.bos_id, *self.encode([text])[0].tolist()]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; without control tokens, or with them."""
        return str(
            self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        )

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
        answered = [
            self.render([*prompt, {"role": "assistant", "content": answer}]) for answer in answers
        ]
        if not all(text.startswith(header.rstrip()) for text in answered):
            raise ValueError(
                "the chat template writes this prompt otherwise once an answer follows; take another one, such as zephyr"
            )
        closed = [self._closed(text) for text in answered]
        if self._seam:
            starts = [_same_start(header, text) for text in closed]
            header += self._seam
            closed = [header + text[start:] for start, text in zip(starts, closed, strict=True)]
        return header, *closed

    def pair_ids(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """[prompt, chosen, rejected] of each pair_texts, not truncated. The ids are those of whole
        conversations, as an answer alone gives other ids; the prompt is the longest common prefix
        of the three, so a token that spans the boundary belongs to the answer. The prompt starts
        with BOS, an answer ends with the template's end token. Deviations 1 and 2 (README).
        """
        pieces = [piece for three in texts for piece in self._cut(three)]
        ids, trees = iter(self.encode(pieces)), []
        for front, *tails in zip(ids, ids, ids, ids, strict=True):
            header, chosen, rejected = (
                np.concatenate([front, tail[len(front) > 0 :]]) for tail in tails
            )
            shared = min(_common(header, chosen), _common(header, rejected))
            prompt = np.concatenate([[self.bos_id], header[:shared]])
            trees.append([prompt, chosen[shared:], rejected[shared:]])
        return trees

    def _cut(self, texts: Sequence[str]) -> tuple[str, ...]:
        """(front, *tails): what the texts share up to their last shared control token, and the rest
        of each, which starts with that token again. Tokenizers treat text on either side of a
        control token apart, so that ids(text) = ids(front) + ids(tail)[1:], and the prompt is
        tokenised once and not three times.
        """
        header, *whole = texts
        cuts = (
            list(self._cuts.finditer(header))
            if all(text.startswith(header) for text in whole)
            else []
        )
        start, end = cuts[-1].span() if cuts else (0, 0)
        return header[:end], *(text[start:] for text in texts)

    def conversation_ids(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """[[BOS], everything after it] of each conversation_text:

        SFT scores every token, as the authors do.
        """
        return [[np.array([self.bos_id]), ids] for ids in self.encode([text for (text,) in texts])]


def truncate(tree: Sequence[Ids], max_length: int, max_prompt: int) -> list[Ids]:
    """[prompt, *responses], cut. If prompt + longest response > max_length, the prompt keeps BOS
    (deviation 3) and its last max_prompt - 1 tokens; if still too long, each response keeps its
    first max_length - max_prompt (§4.2).
    """
    prompt, *responses = tree
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length and len(prompt) > max_prompt:
        prompt = np.concatenate([prompt[:1], prompt[len(prompt) - max_prompt + 1 :]])
    if len(prompt) + longest > max_length:
        responses = [response[: max_length - max_prompt] for response in responses]
    return [prompt, *responses]


def must_fit(chat: Chat, entries: int, model: str | Path) -> None:
    """ValueError where the tokenizer gives ids that a model with so many entries in its embedding
    does not have.
    """
    if chat.vocabulary > entries:
        raise ValueError(
            f"{model}: the tokenizer has {chat.vocabulary} entries, the model {entries}; they do not match"
        )
