"""Mistral and Llama (one architecture): scores preference pairs, generates, reads and writes the
ecosystem's checkpoints.

    model = Mistral.from_pretrained("mistralai/Mistral-7B-v0.1", dtype=torch.bfloat16,
    device="cuda")
    pack = Pack.build([(prompt_ids, chosen_ids, rejected_ids), ...]).to("cuda")    # prompts computed once, no padding
    chosen, rejected = model.logprobs(pack).chunk(2)                               # log pi(y|x), summed over y: the terms of the margin h

It knows nothing of labels or of training. Parameters carry the checkpoint's names, so a state dict
is a checkpoint.
"""
# mypy: allow-untyped-calls, disable-error-code="no-any-return"
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions. Here also: S scored
# rows, B sequences of a batch.

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from support.kernels import (
    BlockedAttention,
    blocked_plan,
    compiled_on,
    rms_norm,
    rotary,
    rotated,
    row_logprobs,
    swiglu,
)
from support.sources import snapshot
from support.storage import (
    INDEX,
    begin_aside,
    fill,
    must_be_replaceable,
    put_in_place,
    read_object,
    slices,
    weight_files,
    write_object,
    write_safetensors,
)

LEAST_TEMPERATURE = (
    1e-6  # of sampled answers: no fp32 logit overflows when it is divided by this; 0 is greedy
)
PREFILL_ROWS = 8  # prompts of neighbouring length that generation pads to one width
FLEX_BLOCK = 128  # on a GPU packs are padded to whole FlexAttention blocks
SHARD_BYTES = 5 * 10**9

# A checkpoint's tensors and their shapes; {i} counts the blocks. A tied head has no lm_head of its
# own.
CHECKPOINT_NAMES = {
    "model.embed_tokens.weight": "V D",
    "model.layers.{i}.input_layernorm.weight": "D",
    "model.layers.{i}.self_attn.q_proj.weight": "HK D",
    "model.layers.{i}.self_attn.k_proj.weight": "GK D",
    "model.layers.{i}.self_attn.v_proj.weight": "GK D",
    "model.layers.{i}.self_attn.o_proj.weight": "D HK",
    "model.layers.{i}.post_attention_layernorm.weight": "D",
    "model.layers.{i}.mlp.gate_proj.weight": "F D",
    "model.layers.{i}.mlp.up_proj.weight": "F D",
    "model.layers.{i}.mlp.down_proj.weight": "D F",
    "model.norm.weight": "D",
    "lm_head.weight": "V D",
}
# What a server needs beside weights and config.json, copied from the source folder.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

# Entries of config.json beside Config's own. ONLY_VALUES: those that change the computation, with
# the values that this file implements. NO_EFFECT: those that never change it. Any other is refused
# by name.
ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("mistral", "llama"),
    "hidden_act": ("silu", "swish"),
    "rope_scaling": (None, {"rope_type": "default"}),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "rope_parameters.rope_type": ("default",),
    "rope_parameters.type": ("default",),
    "rope_parameters.partial_rotary_factor": (1,),
}
NO_EFFECT = {
    "architectures",
    "dtype",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "max_length",
    "max_sequence_length",
    "model_max_length",
    "neftune_noise_alpha",
    "sep_token_id",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}

Attend = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # q [..., T, H, K], k and v [..., T, G, K] -> [..., T, H, K]; rotates q and k


@dataclass(frozen=True)
class Config:
    """The architecture, in the words of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = None  # a token sees this many positions, its own included
    max_position_embeddings: int = (
        32768  # the longest text of servers and eval.py; not looked at here
    )
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    model_type: str = "mistral"

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, constraint: str) -> None:
            if not fine:
                raise ValueError(f"{name} must be {constraint}, got {getattr(self, name)!r}")

        for name, value in list(vars(self).items())[:7]:  # vocab_size to head_dim
            check(name, type(value) is int and value >= 1, "an integer >= 1")
        check("model_type", self.model_type in ONLY_VALUES["model_type"], "mistral or llama")
        check(
            "num_attention_heads",
            self.num_attention_heads % self.num_key_value_heads == 0,
            "a multiple of num_key_value_heads",
        )
        check("head_dim", self.head_dim % 2 == 0, "even, as positions rotate pairs")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            check(name, type(value) in (int, float) and 0 < value < float("inf"), "a number > 0")
        window = self.sliding_window
        seen = type(window) is int and window >= 1 and self.model_type == "mistral"
        check("sliding_window", window is None or seen, "null, or an integer >= 1 in a mistral")
        positions = self.max_position_embeddings
        check(
            "max_position_embeddings", type(positions) is int and positions >= 1, "an integer >= 1"
        )
        check("tie_word_embeddings", isinstance(self.tie_word_embeddings, bool), "true or false")

    @staticmethod
    def read(folder: Path) -> Config:
        """The Config of a checkpoint folder.

        ValueError names every entry of config.json that asks for another computation.
        """
        path, fields = folder / "config.json", [field.name for field in dataclasses.fields(Config)]
        raw = {name: value for name, value in read_object(path).items() if not name.startswith("_")}
        rope = raw.pop("rope_parameters", None) or {}
        raw |= (
            {f"rope_parameters.{name}": value for name, value in rope.items()}
            if isinstance(rope, dict)
            else {"rope_parameters": rope}
        )
        theta = raw.setdefault("rope_theta", raw.get("rope_parameters.rope_theta", 10000.0))
        free, only = (
            NO_EFFECT | (set(fields) - {"model_type"}),
            ONLY_VALUES | {"rope_parameters.rope_theta": (theta,)},
        )
        refused = [
            f"{name} = {value!r}"
            for name, value in raw.items()
            if name not in free and value not in only.get(name, ())
        ]
        if refused:
            raise ValueError(
                f"{path} must describe a plain Mistral or Llama, got {', '.join(refused)}: not implemented; delete an entry "
                "only if you know that it does not change the computation"
            )
        if missing := [name for name in ("model_type", *fields[:5]) if raw.get(name) is None]:
            raise ValueError(f"{path} must be there and give {', '.join(missing)}, got none")
        # Absent entries are what transformers takes them for.
        mistral, heads = raw["model_type"] == "mistral", raw["num_attention_heads"]
        absent = {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072 if mistral else 2048}
        absent |= {"sliding_window": 4096, "num_key_value_heads": 8} if mistral else {}
        known = absent | {name: raw[name] for name in fields if name in raw}
        try:
            usual = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // max(1, heads)}
            return Config(
                **known | {name: value for name, value in usual.items() if known.get(name) is None}
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the checkpoint."""
        names, size = (
            dict(CHECKPOINT_NAMES),
            {"V": self.vocab_size, "D": self.hidden_size, "F": self.intermediate_size},
        )
        size |= {
            "HK": self.num_attention_heads * self.head_dim,
            "GK": self.num_key_value_heads * self.head_dim,
        }
        if self.tie_word_embeddings:
            del names["lm_head.weight"]
        return {
            name.format(i=i): tuple(size[letter] for letter in shape.split())
            for name, shape in names.items()
            for i in range(self.num_hidden_layers if "{i}" in name else 1)
        }


@dataclass(frozen=True)
class Pack:
    """Trees of a prompt and its responses (two: a preference pair; one: a conversation) as one flat
    row, without padding.

    The pairs (prompt 5 6, chosen 7 8 9, rejected 7 4) and (prompt 3, chosen 2, rejected 8 2) are

        tokens     5 6 | 7 8 9 | 7 4 | 3 | 2 | 8 2
        positions  0 1 | 2 3 4 | 2 3 | 0 | 1 | 1 2      both responses continue at the prompt's length
        tree       0 0 | 0 0 0 | 0 0 | 1 | 1 | 1 1
        branch     0 0 | 1 1 1 | 2 2 | 0 | 1 | 2 2      0 = prompt

    A row predicts the next token of its path: rows 1 2 3, 1 5, 7, 7 9 predict targets 7 8 9, 7 4,
    2, 8 2 of response 0 0 0, 2 2, 1, 3 3. Responses count branch by branch: every chosen one, then
    every rejected one.
    """

    tokens: Tensor  # [T], like positions, tree and branch
    positions: Tensor
    tree: Tensor
    branch: Tensor
    rows: Tensor  # [S], like targets and response
    targets: Tensor
    response: Tensor
    lengths: tuple[tuple[int, ...], ...]  # per tree: prompt, response, response ...

    @staticmethod
    def build(trees: Sequence[Sequence[Sequence[int] | np.ndarray]]) -> Pack:
        """The pack of (prompt ids, response ids, ...) trees, each part at least one token long; no
        trees make a legal, empty pack.
        """
        lengths = tuple(tuple(len(part) for part in tree) for tree in trees)
        for i, sizes in enumerate(lengths):
            if len(sizes) < 2 or min(sizes) < 1:
                raise ValueError(
                    f"tree {i} of a pack must be a prompt and responses of at least 1 token each, got lengths {sizes}"
                )
        parts = [(i, b) for i, sizes in enumerate(lengths) for b in range(len(sizes))]
        number = {
            (i, b): r for r, (b, i) in enumerate(sorted((b, i) for i, b in parts if b))
        }  # branch by branch
        length = np.array([lengths[i][b] for i, b in parts], dtype=np.int64)
        of_part = np.array(
            [(i, b, lengths[i][0] if b else 0, number.get((i, b), -1)) for i, b in parts],
            dtype=np.int64,
        )
        tree, branch, before, response = np.repeat(of_part.reshape(-1, 4), length, axis=0).T.copy()
        tokens = np.concatenate(
            [
                np.zeros(0, np.int64),
                *(np.asarray(part, dtype=np.int64) for t in trees for part in t),
            ]
        )
        index, start = np.arange(len(tokens)), np.repeat(np.cumsum(length) - length, length)
        prompt_end = np.maximum.accumulate(np.where(branch == 0, index, 0))
        scored = np.flatnonzero(branch)
        rows = np.where(index == start, prompt_end, index - 1)[scored]
        columns = (
            tokens,
            index - start + before,
            tree,
            branch,
            rows,
            tokens[scored],
            response[scored],
        )
        return Pack(*map(torch.from_numpy, columns), lengths)  # type: ignore[call-arg, arg-type]  # seven columns

    def to(self, device: torch.device | str) -> Pack:
        """The pack, made on a CPU, on `device`: to a GPU from pinned memory, so that it is copied
        without waiting.
        """
        columns, pinned = (
            {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:-1]},
            torch.device(device).type == "cuda",
        )
        moved = {
            name: (x.pin_memory() if pinned else x).to(device, non_blocking=True)
            for name, x in columns.items()
        }
        return dataclasses.replace(self, **moved)

    def padded(self, multiple: int) -> Pack:
        """T and S rounded up: padding tokens are a tree of their own that no row reads, padding
        rows predict for no response.
        """

        def pad(x: Tensor, value: int = 0) -> Tensor:
            return F.pad(x, (0, -len(x) % multiple), value=value)

        tokens, positions, branch, rows = map(
            pad, (self.tokens, self.positions, self.branch, self.rows)
        )
        return dataclasses.replace(
            self,
            tokens=tokens,
            positions=positions,
            tree=pad(self.tree, -1),
            branch=branch,
            rows=rows,
        )


def in_reach(i: Tensor, j: Tensor, window: int | None) -> Tensor:
    """Whether position i may see position j: not after it, and fewer than `window` positions back."""
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def visible(pack: Pack, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
    """Who sees whom in a pack, as FlexAttention's mask_mod (batch, head, query token, key token) ->
    bool: the one definition.

    Token i sees token j of its own tree if j is in the prompt or in i's own response, is not after
    i, and is fewer than
    `window` positions back. The tree of prompt a, chosen b, rejected c:      a b c
                                                                          a   x . .
                                                                          b   x x .
                                                                          c   x . x
    """
    positions, tree, branch = pack.positions, pack.tree, pack.branch
    oldest = positions - (
        2**40 if window is None else window
    )  # a tensor: compiled FlexAttention misreads a number that may change

    def mask_mod(_batch: Any, _head: Any, i: Any, j: Any) -> Tensor:
        mine = (tree[i] == tree[j]) & ((branch[j] == 0) | (branch[j] == branch[i]))
        return mine & (positions[j] <= positions[i]) & (positions[j] > oldest[i])

    return mask_mod


def flex_on(kind: str) -> Callable[..., Any] | None:
    """FlexAttention where it has a backward, on a GPU."""
    return compiled_on(kind, flex_attention)


def pack_attend(
    pack: Pack, config: Config, scored: bool, flex: Callable[..., Any] | None
) -> Attend:
    """Attention of a pack, its masks made once for all layers: with the scored rows as queries, or
    all. By FlexAttention if it is given.
    """
    sees, rows = (
        visible(pack, config.sliding_window),
        pack.rows if scored else torch.arange(len(pack.tokens), device=pack.tokens.device),
    )
    key_turns = rotary(pack.positions, config.rope_theta, config.head_dim)
    turns = tuple(table[rows] for table in key_turns)
    if flex is None:
        plan = blocked_plan(pack.lengths, sees, rows, scored, config.sliding_window)
        return lambda q, k, v: BlockedAttention.apply(q, k, v, turns + key_turns, plan)

    def rows_see(batch: Any, head: Any, s: Any, j: Any) -> Tensor:
        return sees(batch, head, rows[s], j)

    mask = create_block_mask(rows_see, None, None, len(rows), len(pack.tokens), device=rows.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            x.to(v.dtype).transpose(0, 1).unsqueeze(0)
            for x in (rotated(q, *turns), rotated(k, *key_turns), v)
        )
        return flex(q, k, v, block_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)

    return attend


linear = functools.partial(nn.Linear, bias=False)


class Norm(nn.RMSNorm):
    """RMSNorm by kernels.rms_norm."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # type: ignore[arg-type]  # given


class Block(nn.Module):
    """Attention and feed-forward, each on the normed stream and added to it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, inner, self.K = config.hidden_size, config.intermediate_size, config.head_dim
        HK, GK = config.num_attention_heads * self.K, config.num_key_value_heads * self.K
        self.input_layernorm, self.post_attention_layernorm = (
            Norm(D, config.rms_norm_eps) for _ in range(2)
        )
        projections = {
            "q_proj": linear(D, HK),
            "k_proj": linear(D, GK),
            "v_proj": linear(D, GK),
            "o_proj": linear(HK, D),
        }
        self.self_attn: Any = nn.ModuleDict(projections)
        self.mlp: Any = nn.ModuleDict(
            {
                "gate_proj": linear(D, inner),
                "up_proj": linear(D, inner),
                "down_proj": linear(inner, D),
            }
        )

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """[..., T, D] -> the same; with `rows` only these go on, [S, D], and the others give no
        more than keys and values.
        """
        normed = queries = self.input_layernorm(x)
        if rows is not None:
            x, queries = x[rows], normed[rows]
        heads = (
            self.self_attn.q_proj(queries),
            self.self_attn.k_proj(normed),
            self.self_attn.v_proj(normed),
        )
        x = x + self.self_attn.o_proj(
            attend(*(y.unflatten(-1, (-1, self.K)) for y in heads)).flatten(-2)
        )
        normed = self.post_attention_layernorm(x)
        return x + swiglu(
            normed, self.mlp.gate_proj.weight, self.mlp.up_proj.weight, self.mlp.down_proj.weight
        )


def choose(logits: Tensor, draw: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row of logits [B, V]: in order of falling probability, the first at which the
    kept mass exceeds draw * its total.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits.double() / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    mass = p.cumsum(-1)
    mass = mass.where(mass - p < top_p, 0.0).cummax(-1).values  # tokens past top_p add nothing
    place = torch.searchsorted(mass, draw.to(mass).unsqueeze(-1) * mass[:, -1:], right=True)
    return ids.gather(-1, place).squeeze(-1)


class Cache:
    """Keys and values of a batch of sequences of different lengths: every row goes on at its own
    position.
    """

    def __init__(self, model: Mistral, rows: int, capacity: int) -> None:
        config, like = model.config, model.head
        self.model, self.lengths = model, torch.zeros(rows, dtype=torch.long, device=like.device)
        self.capacity = -(-capacity // 8) * 8  # as compiled attention wants its mask aligned
        shape = (2, rows, self.capacity, config.num_key_value_heads, config.head_dim)
        # zeros, not empty: a masked key of garbage that is not finite would still reach the output,
        # as 0 x NaN
        self.layers = [
            torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in model.model.layers
        ]

    def extend(
        self, parts: Sequence[Sequence[int] | np.ndarray], rows: slice = slice(None)
    ) -> Tensor:
        """Logits [B, V] after one more part of each of these rows, padded on the right: causality
        hides what pads it, and the next part is written over it.
        """
        config, device = self.model.config, self.lengths.device
        tokens = pad_sequence(
            [torch.as_tensor(part, dtype=torch.long) for part in parts], batch_first=True
        ).to(device)
        counts, (B, n) = torch.tensor([len(part) for part in parts], device=device), tokens.shape
        positions, row = (
            self.lengths[rows, None] + torch.arange(n, device=device),
            torch.arange(B, device=device),
        )
        # One token of each of several rows: a GPU would wait for Python between its small kernels.
        # Over all places shapes stay alike.
        step = compiled_on(device.type, Block.forward) if n == 1 < B else None
        known = torch.arange(self.capacity if step else int(positions.max()) + 1, device=device)
        turns, seen = (
            rotary(positions, config.rope_theta, config.head_dim),
            in_reach(positions.unsqueeze(-1), known, config.sliding_window),
        )
        G, group = (
            config.num_key_value_heads,
            config.num_attention_heads // config.num_key_value_heads,
        )
        mask = seen.repeat_interleave(group, 1).unsqueeze(
            1
        )  # a group's query heads are rows of one product with its keys

        def attend_with(cached: Tensor) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cached[:, row.unsqueeze(-1), positions] = torch.stack(
                    (rotated(k, *turns).to(v.dtype), v)
                )
                keys, values = cached[:, :, : len(known)].transpose(2, 3)
                grouped = (
                    rotated(q, *turns)
                    .to(v.dtype)
                    .unflatten(2, (G, group))
                    .transpose(1, 2)
                    .flatten(2, 3)
                )
                out = F.scaled_dot_product_attention(grouped, keys, values, mask)
                return out.unflatten(2, (n, group)).transpose(1, 2).flatten(2, 3)

            return attend

        x = self.model.model.embed_tokens(tokens)
        for block, layer in zip(self.model.model.layers, self.layers, strict=True):
            attend = attend_with(layer[:, rows])
            x = step(block, x, attend) if step else block(x, attend)
        self.lengths[rows] += counts
        return F.linear(self.model.model.norm(x[row, counts - 1]), self.model.head).float()


def find_model(path_or_hub_name: str | Path, weights: bool = True) -> Path:
    """The folder of a model: the path, or huggingface_hub's snapshot (its cache, offline mode and
    token) of ORG/NAME or ORG/NAME@REVISION, where no more is fetched than this file reads: the
    `weights` only if config.json describes such a model.
    """
    name = str(path_or_hub_name)
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    try:
        folder = snapshot(repository, revision, ["config.json", *COMPANIONS])
        if weights:
            Config.read(folder)  # before the gigabytes
            snapshot(repository, folder.name, [INDEX, "model.safetensors"])
            snapshot(repository, folder.name, weight_files(folder))
    except OSError as error:
        raise ValueError(
            f"model must be a folder here or a Hugging Face repository that can be read, got {name!r}: {error}"
        ) from error
    return folder


def stored_weights(config: Config, folder: str | Path) -> dict[str, Any]:
    """Name -> safetensors slice, read when indexed, of every tensor that the architecture asks for.
    Reads the files' headers alone.

    ValueError names a damaged file, and lists every missing, unexpected and mis-shaped tensor.
    """
    stored = slices(Path(folder))
    if config.num_hidden_layers > len(stored):  # before as many names are made
        raise ValueError(
            f"{folder} must hold the {config.num_hidden_layers} layers that config.json describes, got {len(stored)} tensors"
        )
    if (
        config.tie_word_embeddings and "lm_head.weight" in stored
    ):  # the one tensor under its other name, or under both
        head = stored.pop("lm_head.weight")
        embedding = stored.setdefault("model.embed_tokens.weight", head)
        if embedding is not head and not torch.equal(head[:], embedding[:]):
            raise ValueError(
                f"{folder}: lm_head.weight must equal model.embed_tokens.weight, which config.json ties, got another tensor"
            )
    wanted, found = config.shapes(), {name: tuple(s.get_shape()) for name, s in stored.items()}
    wrong = [f"missing {name}" for name in wanted if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in wanted]
    wrong += [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    wrong += [
        f"{name} of type {s.get_dtype()}"
        for name, s in stored.items()
        if s.get_dtype() not in ("F64", "F32", "F16", "BF16")
    ]
    if wrong:
        raise ValueError(
            f"{folder} must hold the tensors that config.json describes, got {', '.join(wrong)}"
        )
    return stored


def load_weights(model: Mistral, folder: str | Path) -> None:
    """Fills the parameters in place from the folder's safetensors, cast to each parameter's dtype.

    ValueError as in stored_weights.
    """
    stored = stored_weights(model.config, folder)
    for name, parameter in model.named_parameters():
        fill(parameter, stored[name])


class Mistral(nn.Module):
    """The language model.

    Blocks are called as modules, for the hooks of FSDP2 and torch.compile. `generate` needs it
    unsharded.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, blocks = (
            config.hidden_size,
            nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
        )
        body = {
            "embed_tokens": nn.Embedding(config.vocab_size, D),
            "layers": blocks,
            "norm": Norm(D, config.rms_norm_eps),
        }
        self.config, self.model = config, cast(Any, nn.ModuleDict(body))
        self.origin = "the model"  # what messages call it
        if not config.tie_word_embeddings:
            self.lm_head = linear(D, config.vocab_size)
        self.checkpoint_blocks = (
            False  # True: the backward finds the blocks' inputs alone and computes the rest again
        )

    @property
    def head(self) -> Tensor:
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def _block(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of sequences [B, T], every token seeing those up to itself."""
        positions, window = (
            torch.arange(tokens.shape[1], device=tokens.device),
            self.config.sliding_window,
        )
        turns = rotary(positions, self.config.rope_theta, self.config.head_dim)
        mask = (
            in_reach(positions.unsqueeze(-1), positions, window)
            if window is not None and window < len(positions)
            else None
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (
                x.to(v.dtype).transpose(1, 2) for x in (rotated(q, *turns), rotated(k, *turns), v)
            )
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, enable_gqa=True
            ).transpose(1, 2)

        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = self._block(block, x, attend)
        return F.linear(self.model.norm(x), self.head)

    def logprobs(self, pack: Pack) -> Tensor:
        """log pi(y | x) = sum over t of log pi(y_t | x, y_<t) for every response of the pack, fp32
        [R], chosen ones first. An empty pack gives shape [0] after the same collectives, forward
        and backward, as any other.
        """
        R, device = sum(len(sizes) - 1 for sizes in pack.lengths), pack.tokens.device
        pack = pack if R else Pack.build([([0], [0])]).to(device)
        positions_S, S = pack.positions[pack.rows], len(pack.rows)
        flex = flex_on(device.type)
        pack = pack.padded(FLEX_BLOCK) if flex else pack
        attend, attend_scored = (
            pack_attend(pack, self.config, scored, flex) for scored in (False, True)
        )
        x = self.model.embed_tokens(pack.tokens)
        for block in self.model.layers[:-1]:
            x = self._block(block, x, attend)
        x = self._block(self.model.layers[-1], x, attend_scored, pack.rows)[:S]
        logp_S = row_logprobs(self.model.norm(x), self.head, pack.targets)
        # Row sums of a table, responses by positions: the same bits on every run, which index_add
        # does not promise on a GPU.
        longest = max(prompt + max(responses) for prompt, *responses in pack.lengths)
        table = logp_S.new_zeros(max(R, 1), longest).index_put((pack.response, positions_S), logp_S)
        return table.sum(1)[:R].clone()  # FSDP2 hooks what comes out, and must not be given a view

    def init_weights(self, seed: int) -> None:
        """Weights to train from scratch: normal(0, 0.02), norms 1; the same numbers on any device
        and under any sharding.
        """
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            norm = parameter.dim() == 1
            fill(
                parameter,
                torch.ones(parameter.shape)
                if norm
                else 0.02 * torch.randn(parameter.shape, generator=generator),
            )

    @staticmethod
    def from_pretrained(
        path_or_hub_name: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Mistral:
        """The model of a checkpoint folder or of a Hugging Face repository."""
        folder = find_model(path_or_hub_name)
        config = Config.read(folder)
        stored_weights(
            config, folder
        )  # all is there, and of these shapes, before the model is built
        with torch.device("meta"):
            model = Mistral(config).to(dtype)
        model.to_empty(device=device)
        load_weights(model, folder)
        model.origin = str(path_or_hub_name)
        return model

    @torch.no_grad()
    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        like: str | Path | None = None,
        chat_template: str | None = None,
        end_ids: Sequence[int] = (),
    ) -> None:
        """Writes a folder that transformers and servers load: config.json, safetensors of at most 5
        GB in `dtype` (default: the widest of the parameters'), and the tokenizer's and
        generation_config.json of the folder `like` (default: the older model's in this place, which
        is replaced); `chat_template` replaces the one found there. `end_ids`, the tokens that end
        an answer, become eos_token_id of config.json and generation_config.json, in this order.
        ValueError: no folder `like`, or other files in the way. Under FSDP2 every rank calls it:
        tensors are gathered one at a time, rank 0 writes. Written aside and renamed.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        folder = Path(folder).resolve()  # the target of a link is replaced, not the link
        must_be_replaceable(folder, {"config.json", *COMPANIONS})
        if like is not None and not Path(like).is_dir():
            raise ValueError(f"like must be a folder with a tokenizer's files, got {like}")
        getattr(
            self, "reshard", lambda: None
        )()  # FSDP2's defaults leave the root gathered, in the compute dtype
        parameters = dict(self.named_parameters())
        dtype = dtype or max(
            (p.dtype for p in parameters.values()), key=lambda dtype: dtype.itemsize
        )
        layout = {
            name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in parameters.items()
        }
        split = split_torch_state_dict_into_shards(layout, max_shard_size=SHARD_BYTES)
        sharded = any(isinstance(p, DTensor) for p in parameters.values())
        writes = not sharded or dist.get_rank() == 0
        aside = begin_aside(folder) if writes else folder
        for file, shard in split.filename_to_tensors.items():
            write_safetensors(
                aside / file, {name: parameters[name] for name in shard}, dtype, writes
            )
        if not writes:
            return dist.barrier()
        if split.is_sharded:
            write_object(
                aside / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            )
        # `rope_theta` and `torch_dtype` are the spellings that both old and new servers read.
        entries = {
            "architectures": [f"{self.config.model_type.capitalize()}ForCausalLM"],
            "hidden_act": "silu",
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        ends = (
            {"eos_token_id": end_ids[0] if len(end_ids) == 1 else list(end_ids)} if end_ids else {}
        )
        write_object(aside / "config.json", entries | dataclasses.asdict(self.config) | ends)
        write_object(
            aside / "generation_config.json",
            {name: x for name, x in vars(self.config).items() if name.endswith("_token_id")},
        )
        for source in (Path(like or folder, file) for file in COMPANIONS):
            if source.is_file():
                shutil.copyfile(source, aside / source.name)
        if ends:
            generation = aside / "generation_config.json"
            write_object(generation, read_object(generation) | ends)
        if chat_template is not None:
            (aside / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
            if (path := aside / "tokenizer_config.json").is_file():
                write_object(path, read_object(path) | {"chat_template": chat_template})
        put_in_place(aside, folder)
        if sharded:
            dist.barrier()

    @torch.no_grad()
    @sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )  # cuDNN plans anew for every length
    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        batch: int = 64,
    ) -> list[list[int]]:
        """New token ids of every prompt: the most probable at temperature 0, else drawn from
        softmax(logits / temperature) cut to `top_p`. Each prompt has a seed of its own (default:
        its index), so that the batch changes an answer by rounding alone (bf16).

        A prompt ends before a stop id, after the token that completes a stop string in the text of
        `decode`, or at max_new_tokens. ValueError: impossible arguments, or weights whose logits
        are not finite.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        if not all(map(len, prompts)):
            raise ValueError(
                "prompts must hold at least 1 token each, got an empty one; start it with the bos token"
            )
        warm = temperature == 0 or LEAST_TEMPERATURE <= temperature < float("inf")
        if not warm or not 0 < top_p <= 1 or batch < 1 or len(seeds) != len(prompts):
            raise ValueError(
                f"temperature must be 0 or from {LEAST_TEMPERATURE:g} up, top_p in (0, 1], batch >= 1 and seeds one a "
                f"prompt, got {temperature}, {top_p}, {batch} and {len(seeds)} seeds for {len(prompts)} prompts"
            )
        if (
            isinstance(stop_strings, str)
            or not all(stop_strings)
            or (stop_strings and decode is None)
        ):
            raise ValueError(
                f"stop_strings must be texts of at least 1 character, with decode, got {stop_strings!r}, decode {decode}"
            )

        def ended(ids: list[int]) -> bool:
            if ids[-1] in stop_ids:
                ids.pop()
                return True
            text = decode(ids) if decode and stop_strings else ""
            return len(ids) == max_new_tokens or any(s in text for s in stop_strings)

        answers: list[list[int]] = [[] for _ in prompts]
        order = (
            sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if max_new_tokens > 0 else []
        )  # like lengths share a batch
        for alive in (order[start : start + batch] for start in range(0, len(order), batch)):
            draws = torch.stack(
                [
                    torch.rand(
                        max_new_tokens, generator=torch.Generator().manual_seed(int(seeds[i]))
                    )
                    for i in alive
                ]
            )
            cache = Cache(self, len(alive), len(prompts[alive[-1]]) + max_new_tokens)
            several = [slice(k, k + PREFILL_ROWS) for k in range(0, len(alive), PREFILL_ROWS)]
            logits = torch.cat(
                [cache.extend([prompts[i] for i in alive[rows]], rows) for rows in several]
            )
            while alive:
                if not logits.isfinite().all():
                    raise ValueError(
                        f"{self.origin} gives logits that are not finite; "
                        "its weights may be damaged, or trained to divergence"
                    )
                ids = choose(logits, draws[:, len(answers[alive[0]])], temperature, top_p).tolist()
                for i, token in zip(alive, ids, strict=True):
                    answers[i].append(token)
                kept = [b for b, i in enumerate(alive) if not ended(answers[i])]
                if len(kept) < len(alive):  # finished rows leave the batch
                    alive, draws = [alive[b] for b in kept], draws[kept]
                    cache.lengths = cache.lengths[kept]
                    for n in range(len(cache.layers)):  # one by one: never two whole caches
                        cache.layers[n] = cache.layers[n][:, kept]
                logits = cache.extend([answers[i][-1:] for i in alive]) if alive else logits
        return answers
