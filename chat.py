"""Conversations to token ids and back: a model folder's tokenizer and chat format, with nothing guessed.

What training sees is what a server of the exported model sends: the ids equal transformers' apply_chat_template with
Chat.template and this tokenizer.json, but for what a template writes after the last EOS (dropped). One thing differs on
purpose: text is data, so "</s>" inside a question or an answer never becomes the control token of that name (deviation 13).
(Of a folder whose model_type is llama, transformers 5 makes a LlamaTokenizer by its `legacy` entry, whatever tokenizer.json says.)
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import secrets
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Ids = np.ndarray[Any, np.dtype[np.int64]]

# Zephyr's chat format. The empty system turn is Zephyr's alone; the newline after the last </s> is not kept.
ZEPHYR = """\
{% if messages[0]['role'] != 'system' %}{{ '<|system|>\\n' + eos_token + '\\n' }}{% endif %}
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""


def _common(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    return int(np.cumprod(a[:shorter] == b[:shorter]).sum())


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the texts; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_object(path: Path, content: dict[str, Any]) -> None:
    """A JSON object as a file, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _respell(tokenizer: str, spelling: dict[str, str]) -> str:
    """tokenizer.json with other spellings of its control tokens, which keep their ids and flags. The old spellings are
    then in no vocabulary and no merge, so no text can give them."""
    content = json.loads(tokenizer)
    for token in content["added_tokens"]:
        if token["content"] in spelling:
            token.update(content=spelling[token["content"]], special=False)
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelling.get(token, token): number for token, number in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[spelling.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [[a, b] for a, b in model["merges"] if not {a, b, a + b} & spelling.keys()]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
    return json.dumps(content | {"truncation": None, "padding": None, "post_processor": None})


def _find_template(folder: Path, config: dict[str, Any], template: str | None) -> str:
    if template == "zephyr":
        return ZEPHYR
    file = Path(template) if template else folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} must be UTF-8 text: {error}") from error
    if template:
        raise ValueError(f"template must be 'zephyr' or a file with a jinja template, got {template}")
    own = config.get("chat_template") or ZEPHYR
    try:
        named = {entry["name"]: entry["template"] for entry in own} if isinstance(own, list) else own
        default = named if isinstance(named, str) else named["default"]
    except (TypeError, LookupError):
        default = None
    if not isinstance(default, str):
        raise ValueError(f"{folder} must have a chat template, or several by name with one named default, got {reprlib.repr(own)}; pass "
                         "one as --chat_template FILE")  # fmt: skip
    return default


def _compile(template: str) -> Any:
    """The template in a sandbox, with the settings, filters and functions that transformers renders it with."""
    from datetime import datetime

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    marks = r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})"  # they only say which part is scored
    template = re.sub(marks, lambda mark: mark[1] + ("endif" if mark[2] else "if true") + mark[3], template)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template must be valid jinja: {error}") from error


class Chat:
    """template: None takes the model's own (chat_template.jinja or tokenizer_config.json), or Zephyr's if it has none;
    "zephyr" takes Zephyr's; anything else names a file that holds a jinja template. The attribute `template` has BOS in
    front if this one writes none, because servers add none; it is what training renders and what is exported.

    Ids come from a copy of the tokenizer in which every control token is spelled with 64 random bits, which no data can
    contain. Only the control tokens that the template itself wrote are respelled so; "</s>" inside an answer is four
    characters of text like any other, and all other text gives the ids that the tokenizer always gives.
    """

    def __init__(self, folder: str | Path, template: str | None = None) -> None:
        from tokenizers import AddedToken, Tokenizer

        folder = Path(folder)
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no narrower type
            raise ValueError(f"a model folder must hold a readable tokenizer.json, got {folder} ({error}); transformers'"
                             " tokenizer.save_pretrained writes one") from error
        config = read_object(folder / "special_tokens_map.json") | read_object(folder / "tokenizer_config.json")
        spelled = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
        self.named = {name: text for name, text in spelled.items() if name.endswith("_token") and isinstance(text, str)}
        for name in ("bos_token", "eos_token"):
            if self.tokenizer.token_to_id(self.named.get(name, "")) is None:
                raise ValueError(f"{folder} must name a {name} of its vocabulary; set it in tokenizer_config.json")
        bos, eos = self.named["bos_token"], self.named["eos_token"]
        known = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        self.tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (bos, eos) if text not in known])
        added = self.tokenizer.get_added_tokens_decoder().items()
        self._ids = {token.content: number for number, token in added if token.special or token.content in (bos, eos)}
        self.bos_id, self.eos_id = self._ids[bos], self._ids[eos]
        self.entries: dict[str, int] = self.tokenizer.get_vocab()
        self.vocabulary = 1 + max(self.entries.values())

        self._spelling = {text: f"\ufdd0{secrets.randbits(64)}.{number}\ufdd0" for text, number in self._ids.items()}
        self._seal = f"\ufdd1{secrets.randbits(64)}\ufdd1"
        self._controls = any_of(self._ids)
        self._cuts = any_of(self._spelling[token.content] for _, token in added if token.content in self._spelling
                            and not (token.normalized or token.single_word or token.content == bos))
        canonical = self.tokenizer.to_str()
        self._encoder = Tokenizer.from_str(_respell(canonical, self._spelling))
        self.template = _find_template(folder, config, template)
        self._jinja = _compile(self.template)
        front, own_bos, _ = self.render([{"role": "user", "content": "?"}]).partition(self._spelling[bos])
        if own_bos and front and not front.strip():
            raise ValueError(f"the chat template must write nothing before its {bos}, got {front!r}; delete it there")
        if front:
            unindented = re.sub(r"^[ \t]+(?=\{[%#])", "", self.template)  # as lstrip_blocks would have it, at a line's start alone
            self.template = "{{ bos_token }}" + unindented
            self._jinja = _compile(self.template)
        self.fingerprint = hashlib.sha256(json.dumps([canonical, self.template, self.named]).encode()).hexdigest()
        self._probe()

    def _probe(self) -> None:
        """Renders a short conversation, to check the template and to see how it ends an answer."""
        question, answer = f"{secrets.randbits(64)}", f"{secrets.randbits(64)}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        header, whole = self.render(turns[:1], header=True), self.render(turns)
        front, _, end = whole.rpartition(answer)
        if front.rstrip() != header.rstrip() or question not in header:
            said = {spelling: text for text, spelling in self._spelling.items()} | {question: "QUESTION", answer: "ANSWER"}
            wanted, got = (any_of(said).sub(lambda found: said[found[0]], text) for text in (header, front))
            raise ValueError("the chat template must write before an answer what it writes as the generation prompt,"
                             f" {wanted!r}, got {got!r}; take another one, such as --chat_template zephyr")
        self._closes = self._spelling[self.named["eos_token"]] in end  # if not, we end an answer with EOS ourselves
        ids = self._encoder.encode(whole, add_special_tokens=False).ids
        for text, spelling in self._spelling.items():
            if spelling in whole and ids.count(self._ids[text]) != whole.count(spelling):
                raise ValueError(f"the tokenizer must read the template's {text!r} as one token, wherever it is; in"
                                 " tokenizer.json, make it an added token with normalized false")

    def render(self, messages: Sequence[Message], header: bool = False) -> str:
        """The conversation as text, control tokens respelled; header: with the header of the answer to come."""
        import jinja2

        # What only looks like a control token is broken up: those left in the text are the template's.
        masked = [message | {"content": self._controls.sub(lambda found: self._seal.join(("", *found[0], "")), message["content"])}
                  for message in messages]
        try:
            text = self._jinja.render(messages=masked, add_generation_prompt=header, tools=None, documents=None, **self.named)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return self.control(text).replace(self._seal, "")

    def control(self, text: str) -> str:
        """Text for `encode` that someone trusted wrote: what is spelled like a control token in it is one."""
        return self._controls.sub(lambda found: self._spelling[found[0]], text)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text (render's, control's, or plain), without the BOS in front; those that open or close turns stay."""
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        every = (np.array(encoding.ids, dtype=np.int64) for encoding in encodings)
        return [ids[1:] if len(ids) and ids[0] == self.bos_id else ids for ids in every]

    def _close(self, ids: Ids) -> Ids:
        """Exactly one EOS at the end: what a template puts after it is dropped, and one it lacks is added."""
        ends = np.flatnonzero(ids == self.eos_id)
        if not (len(ends) and self._closes):
            return np.append(ids, self.eos_id)
        end = ends[-1]
        while end and ids[end - 1] == self.eos_id:
            end -= 1
        return ids[:end + 1]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """[BOS, ...]: the conversation and the header of the answer to come, as in training."""
        return self.text(self.render(messages, header=True))

    def text(self, text: str) -> list[int]:
        """[BOS, ...]: plain text outside any chat format; nothing in it is a control token."""
        return [self.bos_id, *self.encode([text])[0].tolist()]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; without control tokens, or with them."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def conversation_text(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """What conversation_ids takes: the conversation, alone. ValueError as pair_texts', of one that ends with an answer."""
        *prompt, last = messages
        return self.pair_texts(prompt, last["content"])[1:] if prompt and last["role"] == "assistant" else (self.render(messages),)

    def pair_texts(self, prompt: Sequence[Message], *answers: str) -> tuple[str, ...]:
        """What pair_ids takes: the prompt with the answer's header, and the conversation with each answer, chosen and rejected.
        ValueError where the template writes the prompt otherwise once it is answered, as some do with a system turn."""
        whole = ([*prompt, {"role": "assistant", "content": answer}] for answer in answers)
        header, *answered = self.render(prompt, header=True), *map(self.render, whole)
        if not all(text.startswith(header.rstrip()) for text in answered):
            raise ValueError("the chat template writes this prompt otherwise once an answer follows; take another one, such as zephyr")
        return header, *answered

    def pair_ids(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """[prompt, chosen, rejected] of each pair_texts, not truncated. The ids are those of whole conversations, as an
        answer alone gives other ids; the prompt is the longest common prefix of the three, so a token that spans the
        boundary belongs to the answer. The prompt starts with BOS, an answer ends with its only EOS.
        Deviations 1 and 2 (README)."""
        pieces = [piece for three in texts for piece in self._cut(three)]
        ids, trees = iter(self.encode(pieces)), []
        for front, *tails in zip(ids, ids, ids, ids, strict=True):
            header, chosen, rejected = (np.concatenate([front, tail[len(front) > 0:]]) for tail in tails)
            shared = min(_common(header, chosen), _common(header, rejected))
            prompt = np.concatenate([[self.bos_id], header[:shared]])
            trees.append([prompt, self._close(chosen[shared:]), self._close(rejected[shared:])])
        return trees

    def _cut(self, texts: Sequence[str]) -> tuple[str, ...]:
        """(front, *tails): what the texts share up to their last shared control token, and the rest of each, which starts
        with that token again. Tokenizers treat text on either side of a control token apart, so that
        ids(text) = ids(front) + ids(tail)[1:], and the prompt is tokenised once and not three times."""
        header, *whole = texts
        cuts = list(self._cuts.finditer(header)) if all(text.startswith(header) for text in whole) else []
        start, end = cuts[-1].span() if cuts else (0, 0)
        return header[:end], *(text[start:] for text in texts)

    def conversation_ids(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """[[BOS], everything after it] of each rendered conversation: SFT scores every token, as the authors do."""
        return [[np.array([self.bos_id]), self._close(ids)] for ids in self.encode([text for text, in texts])]


def truncate(tree: Sequence[Ids], max_length: int, max_prompt: int) -> list[Ids]:
    """[prompt, *responses], cut. If prompt + longest response > max_length, the prompt keeps BOS (deviation 3) and its
    last max_prompt - 1 tokens; if still too long, each response keeps its first max_length - max_prompt (§4.2)."""
    prompt, *responses = tree
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length and len(prompt) > max_prompt:
        prompt = np.concatenate([prompt[:1], prompt[len(prompt) - max_prompt + 1:]])
    if len(prompt) + longest > max_length:
        responses = [response[:max_length - max_prompt] for response in responses]
    return [prompt, *responses]


def must_fit(chat: Chat, entries: int, model: str | Path) -> None:
    """ValueError where the tokenizer gives ids that a model with so many entries in its embedding does not have."""
    if chat.vocabulary > entries:
        raise ValueError(f"{model}: the tokenizer has {chat.vocabulary} entries, the model {entries}; they do not match")
