"""The language model. It scores preference pairs, generates, and reads and writes Hugging Face
checkpoints of Mistral, Llama, Qwen2 and Qwen3.

    model = Mistral.from_pretrained("mistralai/Mistral-7B-v0.1", torch.bfloat16, device="cuda")
    pack = Pack.build([(prompt_ids, chosen_ids, rejected_ids), ...]).to("cuda")
    chosen, rejected = model.logprobs(pack).chunk(2)  # log pi(y|x) of each answer

Labels and training are elsewhere. Parameters carry the checkpoint's names, so a state dict is a
checkpoint. The formulas of norm, SwiGLU, rotation and log-probability, and faster forms of
attention in a pack, are in support/kernels.py.
"""
# mypy: allow-untyped-calls, disable-error-code="no-any-return"
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions. In this file also: S
# scored rows, B sequences of a batch, P query heads of a key head (H/G).

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from support import kernels, storage
from support.kernels import Attend, Sees, Turns, rotated
from support.sources import snapshot

# The least temperature above 0, which is greedy.
LEAST_TEMPERATURE = 1e-6
PREFILL_ROWS = 8  # prompts of similar length that generation pads and runs together
FLEX_BLOCK = 128  # on a GPU packs are padded to whole FlexAttention blocks
SHARD_BYTES = 5 * 10**9

# What a server needs besides weights and config.json, copied from the source folder.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What sets one architecture apart from the others; they share the block."""

    architecture: str  # its class in transformers
    qkv_bias: bool = False  # a bias on the projections to q, k and v
    qk_norm: bool = False  # a norm on every head of q and of k, before they are rotated
    window: bool = False  # may have a sliding window
    absent: Mapping[str, Any] = field(
        default_factory=dict
    )  # values for entries that config.json lacks


MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    # Mistral v0.1 to v0.3, Nemo
    "mistral": Family("MistralForCausalLM", window=True, absent=MISTRAL),
    # Llama 2 to 3.3, SmolLM2, TinyLlama
    "llama": Family("LlamaForCausalLM", absent={"max_position_embeddings": 2048}),
    # Qwen2, Qwen2.5
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, absent=QWEN),
    # Qwen3, dense
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, absent=QWEN | {"head_dim": 128}),
}
READS = (
    "this program reads Mistral, Llama 2 to 3.3, Qwen2, Qwen2.5 and dense Qwen3, unquantised, with "
    "rotary positions of type default or llama3"
)

# Entries of config.json that change the computation, with the values that this file implements.
# Absent and null are fine too. An entry that neither this table, `not_implemented` nor Config names
# is ignored.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(FAMILIES),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "rope_type": ("default", "llama3"),
    "quantization_config": (),
    "num_experts": (),
    "num_local_experts": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_entries(raw: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of config.json, which may stand in it twice: as rope_theta and
    rope_scaling, and as rope_parameters. ValueError: the two differ.
    """
    rope = {"rope_theta": raw.get("rope_theta")}
    for spelling in ("rope_scaling", "rope_parameters"):
        entries = raw.get(spelling) or {}
        if not isinstance(entries, dict):
            raise ValueError(f"{spelling} must be an object, got {entries!r}")
        for name, value in entries.items():
            key = "rope_type" if name == "type" else name
            if rope.get(key) is None:
                rope[key] = value
            elif value is not None and value != rope[key]:
                raise ValueError(f"{spelling}.{name} = {value!r} contradicts {rope[key]!r}")
    return rope


def not_implemented(entries: dict[str, Any]) -> list[str]:
    """The entries that ask for something this file does not implement."""
    refused = []
    for name, value in entries.items():
        if value is not None and value not in IMPLEMENTED.get(name, (value,)):
            refused.append(f"{name} = {value!r}")
    layers = entries.get("layer_types")
    if isinstance(layers, list) and any(kind != "full_attention" for kind in layers):
        refused.append(f"layer_types = {layers!r}")
    return refused


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
    rope_scaling: dict[str, Any] | None = None  # the parameters of type llama3
    sliding_window: int | None = None  # a token sees this many positions, its own included
    max_position_embeddings: int = 32768  # servers and eval.py take no longer text
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    model_type: str = "mistral"

    def __post_init__(self) -> None:
        entries: dict[str, Any] = vars(self) | (self.rope_scaling or {})

        def check(name: str, fine: bool, constraint: str) -> None:
            if not fine:
                raise ValueError(f"{name} must be {constraint}, got {entries.get(name)!r}")

        for name in (*list(vars(self))[:7], "max_position_embeddings"):  # vocab_size to head_dim
            fine = type(entries[name]) is int and entries[name] >= 1
            check(name, fine, "an integer >= 1")
        scaling = LLAMA3 if self.rope_scaling else ()
        for name in ("rms_norm_eps", "rope_theta", *scaling):
            value: Any = entries.get(name)
            check(name, type(value) in (int, float) and 0 < value < math.inf, "a number > 0")
        if scaling:
            ordered = entries["low_freq_factor"] < entries["high_freq_factor"]
            check("high_freq_factor", ordered, "greater than low_freq_factor")
        check("model_type", self.model_type in FAMILIES, f"one of {', '.join(FAMILIES)}")
        grouped = self.num_attention_heads % self.num_key_value_heads == 0
        check("num_attention_heads", grouped, "a multiple of num_key_value_heads")
        check("head_dim", self.head_dim % 2 == 0, "even, as its dimensions are rotated in pairs")
        window = self.sliding_window
        fine = type(window) is int and window >= 1 and self.family.window
        check("sliding_window", window is None or fine, "null, or for a mistral an integer >= 1")
        check("tie_word_embeddings", isinstance(self.tie_word_embeddings, bool), "true or false")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the checkpoint."""
        with torch.device("meta"):
            model = Mistral(self)
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    @staticmethod
    def read(folder: Path) -> Config:
        """The Config of a checkpoint folder.

        ValueError names every entry of config.json that asks for something not implemented here.
        """
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} holds a PEFT adapter (adapter_config.json) and no model of its own; "
                "merge it into its base model first (merge_and_unload), and pass the merged folder"
            )
        path = folder / "config.json"
        raw = storage.read_object(path)
        names = [entry.name for entry in dataclasses.fields(Config)]
        try:
            rope = rope_entries(raw)
            if refused := not_implemented(raw | rope):
                raise ValueError(f"it asks for {', '.join(refused)}; {READS}")
            if missing := [name for name in ("model_type", *names[:5]) if raw.get(name) is None]:
                raise ValueError(f"it must have {', '.join(missing)}")

            # Absent entries get the values that transformers gives them.
            family = FAMILIES[raw["model_type"]]
            entries = {"rms_norm_eps": 1e-6} | dict(family.absent)
            entries |= {name: raw[name] for name in names if name in raw}
            entries["rope_theta"] = 10000.0 if rope["rope_theta"] is None else rope["rope_theta"]
            entries["rope_scaling"] = None
            if rope.get("rope_type") == "llama3":
                scaling = {name: rope.get(name) for name in LLAMA3}
                entries["rope_scaling"] = {"rope_type": "llama3"} | scaling
            if not family.window:  # other families may set a window, but do not use it
                entries["sliding_window"] = None
            heads = raw["num_attention_heads"]
            if entries.get("num_key_value_heads") is None:
                entries["num_key_value_heads"] = heads
            if entries.get("head_dim") is None:
                entries["head_dim"] = raw["hidden_size"] // max(1, heads)
            return Config(**entries)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


# --- rotary positions -----------------------------------------------------------------------------


def rotary(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, 1, K/2], fp32, with which `rotated` turns x [..., T, heads, K] to
    positions [..., T].

    They are computed for each call. As a buffer to_empty would lose them, and as an argument of a
    block FSDP2 would cast them.
    """
    K = config.head_dim
    exponent = torch.arange(0, K, 2, device=positions.device).float() / K
    frequency = 1 / config.rope_theta**exponent  # theta**-x rounds differently than transformers
    if config.rope_scaling:
        # Llama 3.1. A frequency that turns often within the original context length stays. One that
        # turns seldom is divided by the factor. In between, the two are blended.
        factor, low, high, original = (config.rope_scaling[name] for name in LLAMA3)
        turns = original / (2 * math.pi / frequency)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - blend) * frequency / factor + blend * frequency
    angle = (positions.float().unsqueeze(-1) * frequency).unsqueeze(-2)
    return angle.cos(), angle.sin()


def in_reach(i: Tensor, j: Tensor, window: int | None) -> Tensor:
    """Whether position i sees position j: not after it, and fewer than `window` positions back."""
    if window is None:
        return j <= i
    return (j <= i) & (j > i - window)


def plain_attend(mask: Tensor | None, turns: Turns, key_turns: Turns) -> Attend:
    """Attention under a dense mask [queries, keys]; None means causal. `turns` are cos and sin of
    the queries' positions, `key_turns` those of the keys'.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = rotated(q, *turns), rotated(k, *key_turns), v
        q, k, v = (x.to(v.dtype).transpose(-3, -2) for x in turned)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(-3, -2)

    return attend


# --- the block ------------------------------------------------------------------------------------


class Norm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)  # type: ignore[arg-type]  # eps is set


class Attention(nn.Module):
    """Projections to and from heads. `attend` rotates q and k, and knows which token sees which."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        HK = config.num_attention_heads * K
        GK = config.num_key_value_heads * K
        bias = config.family.qkv_bias
        self.head_dim = K
        self.q_proj = nn.Linear(D, HK, bias=bias)
        self.k_proj = nn.Linear(D, GK, bias=bias)
        self.v_proj = nn.Linear(D, GK, bias=bias)
        self.o_proj = nn.Linear(HK, D, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.family.qk_norm:
            self.q_norm = Norm(K, config.rms_norm_eps)
            self.k_norm = Norm(K, config.rms_norm_eps)

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        """[..., T, D] -> the same. With `rows`, only these tokens have queries, and the result is
        [S, D]. Every token has keys and values.
        """
        heads = (-1, self.head_dim)
        q = self.q_proj(x if rows is None else x[rows]).unflatten(-1, heads)
        k = self.k_proj(x).unflatten(-1, heads)
        v = self.v_proj(x).unflatten(-1, heads)
        return self.o_proj(attend(self.q_norm(q), self.k_norm(k), v).flatten(-2))


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Block(nn.Module):
    """Attention, then feed-forward. Each reads the normed residual stream, and its output is added
    to the residual stream.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """[..., T, D] -> the same; with `rows`, these tokens' part of it alone, [S, D]."""
        attended = self.self_attn(self.input_layernorm(x), attend, rows)
        if rows is not None:
            x = x[rows]
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


# --- packs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """Trees of a prompt and its responses as one flat sequence, without padding. A preference pair
    is a prompt with two responses, a conversation a prompt with one.

    The pairs (prompt 5 6, chosen 7 8 9, rejected 7 4) and (prompt 3, chosen 2, rejected 8 2) are

        tokens     5 6 | 7 8 9 | 7 4 | 3 | 2 | 8 2
        positions  0 1 | 2 3 4 | 2 3 | 0 | 1 | 1 2      both responses continue the prompt
        tree       0 0 | 0 0 0 | 0 0 | 1 | 1 | 1 1
        branch     0 0 | 1 1 1 | 2 2 | 0 | 1 | 2 2      0 is the prompt

    A scored row is the place of a token from which the next token of a response is predicted:

        rows       1 2 3 | 1 5 | 7 | 7 9
        targets    7 8 9 | 7 4 | 2 | 8 2
        response   0 0 0 | 2 2 | 1 | 3 3      all chosen ones come first, then all rejected ones
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
        """The pack of (prompt ids, response ids, ...) trees, each part at least one token long.
        Without trees the pack is empty, which is allowed.
        """
        lengths = tuple(tuple(map(len, tree)) for tree in trees)
        for i, sizes in enumerate(lengths):
            if len(sizes) < 2 or min(sizes) < 1:
                raise ValueError(
                    f"tree {i} of a pack must be a prompt and responses of at least 1 token each, "
                    f"got lengths {sizes}"
                )

        number: dict[tuple[int, int], int] = {}  # (tree, branch) -> response
        for b in range(1, max(map(len, trees), default=0)):
            for i, tree in enumerate(trees):
                if b < len(tree):
                    number[i, b] = len(number)

        columns = [column.name for column in dataclasses.fields(Pack)[:-1]]
        parts = {name: [np.zeros(0, np.int64)] for name in columns}
        start = 0  # place in the pack of the part's first token
        for i, tree in enumerate(trees):
            prompt_end = start + len(tree[0])
            for b, ids in enumerate(tree):
                length = len(ids)
                before = len(tree[0]) if b else 0
                parts["tokens"].append(np.asarray(ids, np.int64))
                parts["positions"].append(np.arange(before, before + length))
                parts["tree"].append(np.full(length, i))
                parts["branch"].append(np.full(length, b))
                if b:
                    rows = np.arange(start - 1, start - 1 + length)
                    rows[0] = prompt_end - 1
                    parts["rows"].append(rows)
                    parts["targets"].append(parts["tokens"][-1])
                    parts["response"].append(np.full(length, number[i, b]))
                start += length
        whole = {name: torch.from_numpy(np.concatenate(parts[name])) for name in columns}
        return Pack(lengths=lengths, **whole)

    def to(self, device: torch.device | str) -> Pack:
        """A copy on `device` of a pack that is on a CPU. To a GPU it goes through pinned memory, so
        that the CPU need not wait.
        """
        moved = {}
        for column in dataclasses.fields(self)[:-1]:
            x = getattr(self, column.name)
            if torch.device(device).type == "cuda":
                x = x.pin_memory()
            moved[column.name] = x.to(device, non_blocking=True)
        return dataclasses.replace(self, **moved)

    def padded(self, multiple: int) -> Pack:
        """The pack with T and S rounded up. Padding tokens form a tree of their own, which no other
        token sees. The caller drops the padding rows, which have no targets.
        """
        padded: dict[str, Any] = {}
        for name in ("tokens", "positions", "tree", "branch", "rows"):
            x = getattr(self, name)
            padded[name] = F.pad(x, (0, -len(x) % multiple), value=-1 if name == "tree" else 0)
        return dataclasses.replace(self, **padded)


def visible(pack: Pack, window: int | None) -> Sees:
    """Which token of a pack sees which, as FlexAttention's mask_mod (batch, head, query token, key
    token) -> bool. Every form of attention in a pack uses this function.

    Token i sees token j of its own tree if j is in the prompt or in i's own response, is not after
    i, and is fewer than `window` positions back. The tree of prompt a, chosen b, rejected c:

          a b c
        a x . .
        b x x .
        c x . x
    """
    positions, tree, branch = pack.positions, pack.tree, pack.branch
    # A tensor, because compiled FlexAttention gets a Python number wrong when it changes.
    oldest = positions - (2**40 if window is None else window)

    def mask_mod(_batch: Any, _head: Any, i: Any, j: Any) -> Tensor:
        own = (tree[i] == tree[j]) & ((branch[j] == 0) | (branch[j] == branch[i]))
        return own & (positions[j] <= positions[i]) & (positions[j] > oldest[i])

    return mask_mod


def pack_attend(pack: Pack, config: Config, scored: bool) -> Attend:
    """Attention of a pack, for every layer. The queries are the scored rows if `scored`, else all
    tokens.

    It computes what plain_attend computes with the mask of `visible`, in a faster form where the
    device has one.
    """
    device, window = pack.tokens.device, config.sliding_window
    tokens = torch.arange(len(pack.tokens), device=device)
    rows = pack.rows if scored else tokens
    sees = visible(pack, window)
    cos, sin = rotary(pack.positions, config)
    turns = cos[rows], sin[rows]
    if flex := kernels.flex_on(device.type):
        return kernels.flex_attend(flex, sees, rows, turns, (cos, sin))
    if device.type == "cpu":
        plan = kernels.blocked_plan(pack.lengths, sees, rows, scored, window)
        return kernels.blocked_attend(plan, turns, (cos, sin))
    return plain_attend(sees(0, 0, rows.unsqueeze(-1), tokens), turns, (cos, sin))


# --- checkpoint files -----------------------------------------------------------------------------


def find_model(path_or_hub_name: str | Path, weights: bool = True) -> Path:
    """The folder of a model: the path itself, or the local copy of ORG/NAME or ORG/NAME@REVISION
    that huggingface_hub makes. Its cache, offline mode and token apply.

    Only files that the program reads are fetched. `weights` are fetched after config.json has been
    found to describe a model that this file implements.
    """
    name = str(path_or_hub_name)
    if Path(name).is_dir():
        return Path(name)
    folder = snapshot(name, ["config.json", "adapter_config.json", *COMPANIONS])
    if weights:
        Config.read(folder)  # before the gigabytes
        pinned = f"{name.partition('@')[0]}@{folder.name}"
        snapshot(pinned, [storage.INDEX, "model.safetensors"])
        snapshot(pinned, storage.weight_files(folder))
    return folder


def stored_weights(config: Config, folder: str | Path) -> dict[str, Any]:
    """Name -> safetensors slice, read when indexed, of every tensor of the architecture. Only
    headers are read, but for a tied head that is stored twice.

    ValueError names a damaged file, and lists every missing, unexpected and mis-shaped tensor.
    """
    stored = storage.slices(Path(folder))
    if config.num_hidden_layers > len(stored):  # else a wrong number could build a huge model
        raise ValueError(
            f"{folder} must hold the {config.num_hidden_layers} layers that config.json describes, "
            f"got {len(stored)} tensors"
        )
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        # A tied head is stored under either name, or under both.
        head = stored.pop("lm_head.weight")
        embedding = stored.setdefault("model.embed_tokens.weight", head)
        if embedding is not head and not torch.equal(head[:], embedding[:]):
            raise ValueError(
                f"{folder}: lm_head.weight must equal model.embed_tokens.weight, as config.json "
                "ties them, got different values"
            )
    shapes = config.shapes()
    wrong = [f"missing {name}" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        shape = tuple(tensor.get_shape())
        if name not in shapes:
            wrong.append(f"unexpected {name}")
        elif shape != shapes[name]:
            wrong.append(f"{name} {shape} instead of {shapes[name]}")
        if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            wrong.append(f"{name} of type {tensor.get_dtype()}")
    if wrong:
        raise ValueError(
            f"{folder} must hold the tensors that config.json describes: {', '.join(wrong)}"
        )
    return stored


def load_weights(model: Mistral, folder: str | Path) -> None:
    """Fills the parameters in place from the folder's safetensors, cast to each parameter's dtype.

    ValueError as in stored_weights.
    """
    stored = stored_weights(model.config, folder)
    for name, parameter in model.named_parameters():
        storage.fill(parameter, stored[name])


def write_weights(
    folder: Path, parameters: dict[str, nn.Parameter], dtype: torch.dtype, writes: bool
) -> None:
    """Writes safetensors of at most SHARD_BYTES, and their index if there are several. Under FSDP2
    every rank calls it, and the rank with `writes` true writes.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    layout = {
        name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in parameters.items()
    }
    split = split_torch_state_dict_into_shards(layout, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: parameters[name] for name in names}
        storage.write_safetensors(folder / file, tensors, dtype, writes)
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        storage.write_json(folder / storage.INDEX, index)


def write_settings(
    folder: Path, config: Config, dtype: torch.dtype, like: Path, ends: dict[str, Any]
) -> None:
    """Writes config.json and generation_config.json, whose entries `ends` replaces, and copies the
    tokenizer's files of the folder `like`.
    """
    entries = dataclasses.asdict(config) | ends
    entries["architectures"] = [config.family.architecture]
    entries["hidden_act"] = "silu"
    # torch_dtype and not dtype, because old and new servers both read it.
    entries["torch_dtype"] = str(dtype).removeprefix("torch.")
    storage.write_json(folder / "config.json", entries)
    for name in COMPANIONS:
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)
    generation = folder / "generation_config.json"
    if not generation.is_file():
        tokens = {name: entries[name] for name in entries if name.endswith("_token_id")}
        storage.write_json(generation, tokens)
    elif ends:
        storage.write_json(generation, storage.read_object(generation) | ends)


def write_template(folder: Path, template: str) -> None:
    """Puts a chat template where old and new tokenizers look for it."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        entries = storage.read_object(tokenizer)
        storage.write_json(tokenizer, entries | {"chat_template": template})


# --- generation -----------------------------------------------------------------------------------


def choose(logits: Tensor, draw: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row of logits [B, V]. At temperature 0 it is the most probable one. Else tokens
    are taken in order of falling probability, and it is the first at which the sum of the kept
    probabilities exceeds draw times their total.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits.double() / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    mass = p.cumsum(-1)
    mass = mass.where(mass - p < top_p, 0.0).cummax(-1).values  # tokens past top_p add nothing
    place = torch.searchsorted(mass, draw.to(mass).unsqueeze(-1) * mass[:, -1:], right=True)
    return ids.gather(-1, place).squeeze(-1)


def cached_attend(cached: Tensor, positions: Tensor, turns: Turns, mask: Tensor) -> Attend:
    """Attention of new tokens at `positions` [B, n] to the keys and values of their sequences in
    `cached` [2, B, places, G, K]. Their own keys and values are written there before that. mask is
    [B, 1, n P, keys], since the P query heads of a key head are folded into the query axis.
    """
    row = torch.arange(len(positions), device=positions.device).unsqueeze(-1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cached[:, row, positions] = torch.stack((rotated(k, *turns).to(v.dtype), v))
        keys, values = cached[:, :, : mask.shape[-1]].transpose(2, 3)
        grouped = rotated(q, *turns).to(v.dtype).unflatten(2, (v.shape[2], -1))  # [B, n, G, P, K]
        queries = grouped.transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(queries, keys, values, mask)
        return out.unflatten(2, (q.shape[1], -1)).transpose(1, 2).flatten(2, 3)

    return attend


class Cache:
    """Keys and values of a batch of sequences of different lengths. Each row continues at its own
    position.
    """

    def __init__(self, model: Mistral, rows: int, capacity: int) -> None:
        config, like = model.config, model.head
        self.model = model
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.capacity = -(-capacity // 8) * 8  # compiled attention needs an aligned mask
        shape = (2, rows, self.capacity, config.num_key_value_heads, config.head_dim)
        # Zeros, since a masked key that is not finite would still reach the output, as 0 x NaN.
        self.layers = [
            torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in model.model.layers
        ]

    def keep(self, rows: list[int]) -> None:
        """Keeps only these rows of the batch."""
        self.lengths = self.lengths[rows]
        for n in range(len(self.layers)):  # one by one, so that two whole caches never exist
            self.layers[n] = self.layers[n][:, rows]

    def extend(
        self, parts: Sequence[Sequence[int] | np.ndarray], rows: slice = slice(None)
    ) -> Tensor:
        """Appends a part to each of these rows, and returns the logits [B, V] after it. Parts are
        padded on the right. Causality hides the padding, and the next part overwrites it.
        """
        config, device = self.model.config, self.lengths.device
        ids = [torch.as_tensor(part, dtype=torch.long) for part in parts]
        tokens = pad_sequence(ids, batch_first=True).to(device)
        counts = torch.tensor([len(part) for part in parts], device=device)
        B, n = tokens.shape
        positions = self.lengths[rows, None] + torch.arange(n, device=device)
        # The step of one token for each of several rows is compiled, since a GPU would wait for
        # Python between its small kernels. It attends over all places, so that shapes stay the
        # same.
        step = kernels.compiled_on(device.type, Block.forward) if n == 1 < B else None
        places = self.capacity if step else int(positions.max()) + 1
        turns = rotary(positions, config)
        known = torch.arange(places, device=device)
        seen = in_reach(positions.unsqueeze(-1), known, config.sliding_window)
        group = config.num_attention_heads // config.num_key_value_heads
        mask = seen.repeat_interleave(group, 1).unsqueeze(1)

        x = self.model.model.embed_tokens(tokens)
        for block, layer in zip(self.model.model.layers, self.layers, strict=True):
            attend = cached_attend(layer[:, rows], positions, turns, mask)
            x = step(block, x, attend) if step else block(x, attend)
        self.lengths[rows] += counts
        last = x[torch.arange(B, device=device), counts - 1]
        return F.linear(self.model.model.norm(last), self.model.head).float()


# --- the model ------------------------------------------------------------------------------------


class Mistral(nn.Module):
    """The language model, of any of the FAMILIES.

    Training calls blocks as modules, so that the hooks of FSDP2 and torch.compile apply. `generate`
    needs an unsharded model.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D = config.hidden_size
        body = {
            "embed_tokens": nn.Embedding(config.vocab_size, D),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": Norm(D, config.rms_norm_eps),
        }
        self.config = config
        self.model = cast(Any, nn.ModuleDict(body))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.origin = "the model"  # its name in error messages
        # True: only the blocks' inputs are kept for the backward, which computes the rest again.
        self.checkpoint_blocks = False

    @property
    def head(self) -> Tensor:
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def _block(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of sequences [B, T], causal, within the sliding window if any."""
        T, window = tokens.shape[1], self.config.sliding_window
        positions = torch.arange(T, device=tokens.device)
        turns = rotary(positions, self.config)
        mask = None
        if window is not None and window < T:
            mask = in_reach(positions.unsqueeze(-1), positions, window)
        attend = plain_attend(mask, turns, turns)
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = self._block(block, x, attend)
        return F.linear(self.model.norm(x), self.head)

    def logprobs(self, pack: Pack) -> Tensor:
        """log pi(y | x) = sum over t of log pi(y_t | x, y_<t) for every response of the pack, fp32
        [R], chosen ones first.

        An empty pack gives shape [0]. It computes one token, so that each rank takes part in the
        same collectives, forward and backward.
        """
        device = pack.tokens.device
        R = sum(len(sizes) - 1 for sizes in pack.lengths)
        if R == 0:
            pack = Pack.build([([0], [0])]).to(device)
        S = len(pack.rows)
        positions_S = pack.positions[pack.rows]
        if kernels.flex_on(device.type):
            pack = pack.padded(FLEX_BLOCK)
        attend = pack_attend(pack, self.config, scored=False)
        attend_scored = pack_attend(pack, self.config, scored=True)

        x = self.model.embed_tokens(pack.tokens)
        for block in self.model.layers[:-1]:
            x = self._block(block, x, attend)
        x = self._block(self.model.layers[-1], x, attend_scored, pack.rows)[:S]
        logp_S = kernels.row_logprobs(self.model.norm(x), self.head, pack.targets)

        # A table of responses by positions is summed along its rows. That gives the same bits on
        # every run, which index_add does not promise on a GPU.
        longest = max(prompt + max(responses) for prompt, *responses in pack.lengths)
        table = logp_S.new_zeros(max(R, 1), longest).index_put((pack.response, positions_S), logp_S)
        return table.sum(1)[:R].clone()  # FSDP2 hooks the output, which must not be a view

    def init_weights(self, seed: int) -> None:
        """Weights to train from scratch: normal(0, 0.02), norms 1, biases 0; the same numbers on
        any device and under any sharding.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                whole = torch.zeros(parameter.shape)
            elif parameter.dim() == 1:
                whole = torch.ones(parameter.shape)
            else:
                whole = 0.02 * torch.randn(parameter.shape, generator=generator)
            storage.fill(parameter, whole)

    @staticmethod
    def from_pretrained(
        path_or_hub_name: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Mistral:
        """The model of a checkpoint folder or of a Hugging Face repository."""
        folder = find_model(path_or_hub_name)
        config = Config.read(folder)
        stored = stored_weights(config, folder)  # checked before the model is built
        with torch.device("meta"):
            model = Mistral(config).to(dtype)
        model.to_empty(device=device)
        for name, parameter in model.named_parameters():
            storage.fill(parameter, stored[name])
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
        """Writes a folder that transformers and servers load. It is written under a temporary name,
        and then renamed.

        It holds config.json and safetensors in `dtype` (default: the widest of the parameters').
        The tokenizer's files and generation_config.json come from the folder `like` (default: the
        model folder that is replaced). `chat_template` replaces theirs. `end_ids`, the tokens that
        end an answer, become eos_token_id. ValueError: `like` is no folder, or `folder` holds other
        files. Under FSDP2 every rank calls it. Tensors are gathered one at a time, and rank 0
        writes.
        """
        folder = Path(folder).resolve()  # the target of a link is replaced, not the link
        storage.must_be_replaceable(folder, {"config.json", *COMPANIONS})
        if like is not None and not Path(like).is_dir():
            raise ValueError(f"like must be a folder that is there, got {like}")
        if reshard := getattr(self, "reshard", None):
            reshard()  # FSDP2's defaults leave the root gathered, in the compute dtype
        parameters = dict(self.named_parameters())
        if dtype is None:
            dtype = max((p.dtype for p in parameters.values()), key=lambda dtype: dtype.itemsize)
        sharded = any(isinstance(p, DTensor) for p in parameters.values())
        writes = not sharded or dist.get_rank() == 0
        with storage.whole(folder) if writes else contextlib.nullcontext(folder) as aside:
            if writes:
                aside.mkdir()
            write_weights(aside, parameters, dtype, writes)
            if writes:
                ends: dict[str, Any] = {}
                if end_ids:
                    ends["eos_token_id"] = end_ids[0] if len(end_ids) == 1 else list(end_ids)
                write_settings(aside, self.config, dtype, Path(like or folder), ends)
            if writes and chat_template is not None:
                write_template(aside, chat_template)
        if sharded:
            dist.barrier()

    @torch.no_grad()
    # cuDNN is left out, because it makes a new plan for every length.
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
        ended: Callable[[list[int]], bool] | None = None,
        batch: int = 64,
    ) -> list[list[int]]:
        """New token ids of every prompt. At temperature 0 they are the most probable ones, else
        drawn from softmax(logits / temperature) cut to `top_p`. Each prompt has a seed of its own
        (default: its index), so that batching changes an answer by bf16 rounding alone.

        An answer ends before a stop id, once `ended(ids)` is true, or at max_new_tokens.
        ValueError: impossible arguments, or weights whose logits are not finite.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        if not all(map(len, prompts)):
            raise ValueError(
                "prompts must hold at least 1 token each, got an empty one; start it with the bos "
                "token"
            )
        possible = temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf
        if not possible or not 0 < top_p <= 1 or len(seeds) != len(prompts):
            raise ValueError(
                f"temperature must be 0 or at least {LEAST_TEMPERATURE:g}, top_p in (0, 1], with a "
                f"seed for each prompt, got {temperature}, {top_p} and {len(seeds)} seeds"
            )

        def finished(answer: list[int]) -> bool:
            if answer[-1] in stop_ids:
                answer.pop()
                return True
            return len(answer) == max_new_tokens or (ended is not None and ended(answer))

        answers: list[list[int]] = [[] for _ in prompts]
        if max_new_tokens < 1:
            return answers
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch):  # similar lengths share a batch
            together = order[start : start + batch]
            draws = [
                torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(int(seeds[i])))
                for i in together
            ]
            self._answer(
                [prompts[i] for i in together],
                [answers[i] for i in together],
                lambda logits, draw: choose(logits, draw, temperature, top_p),
                torch.stack(draws),
                finished,
            )
        return answers

    def _answer(
        self,
        prompts: list[Sequence[int] | np.ndarray],
        answers: list[list[int]],
        chosen: Callable[[Tensor, Tensor], Tensor],
        draws: Tensor,
        finished: Callable[[list[int]], bool],
    ) -> None:
        """Extends each answer of a batch until it has finished. Prompts are sorted by length. draws
        [B, n] has one number for each token that an answer may have.
        """
        cache = Cache(self, len(prompts), len(prompts[-1]) + draws.shape[1])
        logits_of_part = []
        for start in range(0, len(prompts), PREFILL_ROWS):
            rows = slice(start, start + PREFILL_ROWS)
            logits_of_part.append(cache.extend(prompts[rows], rows))
        logits = torch.cat(logits_of_part)
        step = 0
        while answers:
            if not logits.isfinite().all():
                raise ValueError(
                    f"{self.origin} gives logits that are not finite; its weights may be damaged, "
                    "or trained to divergence"
                )
            ids = chosen(logits, draws[:, step]).tolist()
            for answer, token in zip(answers, ids, strict=True):
                answer.append(token)
            kept = [row for row, answer in enumerate(answers) if not finished(answer)]
            if len(kept) < len(answers):  # finished rows leave the batch
                answers = [answers[row] for row in kept]
                draws = draws[kept]
                cache.keep(kept)
            if answers:
                logits = cache.extend([answer[-1:] for answer in answers])
            step += 1
