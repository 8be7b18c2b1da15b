"""The fast forms of model.py's formulas: the attention of a pack on a CPU and on a GPU, the
feed-forward, the norm, and log-probabilities without logits.

Each names the formula that it equals. A test compares the two, and docs/performance.md says what
each saves of a step's time and memory. Imports torch alone.
"""
# mypy: allow-untyped-calls, disable-error-code="no-any-return"
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions. Here also: S scored
# rows, P query heads of a key head (H/G).

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ATTENTION_BLOCK = 64  # query rows whose scores a CPU computes at once
KEPT_KEYS = 768  # that a block may see for its probabilities to be kept for the backward
MLP_ROWS = 512  # rows of the feed-forward's pointwise part that a CPU holds at once
# Logits alive at once: 4 MiB of fp32 stay in a CPU's cache, 128 MiB fill a GPU.
HEAD_CHUNK = {"cpu": 2**20, "cuda": 2**25}

# q [..., T, H, K], k and v [..., T, G, K] -> [..., T, H, K]; it rotates q and k
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# batch, head, query token, key token -> whether the one sees the other: FlexAttention's mask_mod
Sees = Callable[[Any, Any, Any, Any], Tensor]
Turns = tuple[Tensor, Tensor]  # cos and sin, as model.rotary gives them


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., K] turned by the angles of cos and sin [..., K/2]: its halves (a, b) become (a cos -
    b sin, b cos + a sin), in fp32.
    """
    a, b = x.float().chunk(2, -1)
    turned_a = torch.addcmul(a * cos, b, sin, value=-1)
    turned_b = torch.addcmul(b * cos, a, sin)
    return torch.cat((turned_a, turned_b), -1)


@functools.cache
def compiled_on(kind: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function compiled on a GPU, in few graphs for shapes of every length; elsewhere None."""
    if kind != "cuda":
        return None
    # Each model of a process has graphs of its own. Past the limit fullgraph raises an error.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True, fullgraph=True)


# --- attention of a pack on a GPU -----------------------------------------------------------------


def flex_on(kind: str) -> Callable[..., Any] | None:
    """FlexAttention where it has a backward, on a GPU; elsewhere None."""
    return compiled_on(kind, flex_attention)


def flex_attend(
    flex: Callable[..., Any], sees: Sees, rows: Tensor, turns: Turns, key_turns: Turns
) -> Attend:
    """model.plain_attend by FlexAttention, which skips blocks of keys that no row sees."""

    def rows_see(batch: Any, head: Any, s: Any, j: Any) -> Tensor:
        return sees(batch, head, rows[s], j)

    keys = len(key_turns[0])
    mask = create_block_mask(rows_see, None, None, len(rows), keys, device=rows.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = rotated(q, *turns), rotated(k, *key_turns), v
        heads_first = (x.to(v.dtype).transpose(0, 1).unsqueeze(0) for x in turned)
        out = flex(*heads_first, block_mask=mask, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return attend


# --- attention of a pack on a CPU -----------------------------------------------------------------


class Block(NamedTuple):
    """Query rows, the keys of their span that they see, and what is added to the scores of the last
    c of these: 0, or -inf where a row does not see one, [rows, 1, c].
    """

    rows: slice
    seen: slice
    bias: Tensor | None


class Span(NamedTuple):
    """The tokens that are the keys of some blocks: small trees, or a prompt and one response. A
    slice, where they are neighbours, needs no copy.
    """

    keys: slice | Tensor
    blocks: list[Block]


def by_key_head(x: Tensor, G: int) -> Tensor:
    """[T, H, K] -> [G, T, P, K]: the query heads of a key head become rows beside each other."""
    return x.unflatten(1, (G, -1)).transpose(0, 1)


def by_token(x: Tensor, T: int) -> Tensor:
    """[G, T P, K] -> [T, H, K], the way back."""
    return x.unflatten(1, (T, -1)).transpose(0, 1).flatten(1, 2)


def probabilities(q: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q @ keys.T / sqrt(K) + bias) of a block, [G, rows P, keys]."""
    scores = torch.baddbmm(q.new_empty(()), q, keys.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    if bias is not None:
        scores.unflatten(1, (len(bias), -1))[..., -bias.shape[-1] :].add_(bias)
    return scores.softmax(-1)


def softmax_backward(dp: Tensor, p: Tensor) -> Tensor:
    """The gradient by the scores of p = softmax(scores): p * (dp - (p * dp).sum(-1))."""
    return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)


class BlockedAttention(torch.autograd.Function):
    """model.plain_attend on a CPU, a block of rows at a time against the keys that it may see.

    Nothing masked is computed but at the diagonal, and the query heads of a key head are rows of
    one product. Probabilities are kept for the backward, or computed again of blocks that see over
    KEPT_KEYS. Inside, key heads come first: q [G, T P, K], k and v [G, T, K].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, ...], plan: list[Span]
    ) -> Tensor:
        T, H, _ = q.shape
        G, dtype = k.shape[1], q.dtype
        P = H // G
        q = rotated(by_key_head(q, G), *tables[:2]).to(dtype).flatten(1, 2)
        k = rotated(by_key_head(k, G), *tables[2:]).to(dtype).flatten(1, 2)
        v = by_key_head(v, G).flatten(1, 2)
        out = torch.empty_like(q, dtype=torch.float32)
        limit = KEPT_KEYS if any(ctx.needs_input_grad) else 0
        kept: list[Tensor | None] = []
        for tokens, blocks in plan:
            keys, values = (x[:, tokens].float() for x in (k, v))
            for rows, seen, bias in blocks:
                block = slice(rows.start * P, rows.stop * P)
                p = probabilities(q[:, block].float(), keys[:, seen], bias)
                torch.bmm(p, values[:, seen], out=out[:, block])
                kept.append(p if p.shape[-1] <= limit else None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.T, ctx.P, ctx.tables, ctx.plan = T, P, tables, plan
        return by_token(out, T).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        next_kept = iter(kept)
        cos, sin, cos_keys, sin_keys = ctx.tables
        scale = q.shape[-1] ** -0.5
        P = ctx.P
        dout = by_key_head(grads[0], len(q)).flatten(1, 2)
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for tokens, blocks in ctx.plan:
            keys, values, dkeys, dvalues = (x[:, tokens].float() for x in (k, v, dk, dv))
            for rows, seen, bias in blocks:
                block = slice(rows.start * P, rows.stop * P)
                q_block, dout_block = (x[:, block].float() for x in (q, dout))
                p = next(next_kept)
                if p is None:
                    p = probabilities(q_block, keys[:, seen], bias)
                dvalues[:, seen].baddbmm_(p.mT, dout_block)
                dp = torch.bmm(dout_block, values[:, seen].mT)
                dscores = softmax_backward(dp, p)
                dkeys[:, seen].baddbmm_(dscores.mT, q_block, alpha=scale)
                dq[:, block].baddbmm_(dscores, keys[:, seen], alpha=scale)
            dk[:, tokens] = dkeys  # earlier spans' included
            dv[:, tokens] = dvalues
        dq = rotated(by_token(dq, ctx.T), cos, -sin)
        dk = rotated(by_token(dk, k.shape[1]), cos_keys, -sin_keys)
        dv = by_token(dv, v.shape[1])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def bias_of(sees: Sees, queries: Tensor, keys: Tensor) -> Tensor:
    """[queries, 1, keys] of tokens of a pack: 0 where the query sees the key, -inf elsewhere."""
    hidden = ~sees(0, 0, queries.unsqueeze(-1), keys)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf).unsqueeze(1)


@functools.cache
def diagonal(rows: int) -> Tensor | None:
    """[rows, 1, rows - 1] of neighbouring tokens, against the keys after the first one's own: none
    sees a later one.
    """
    if rows == 1:
        return None
    return torch.full((rows, rows - 1), -math.inf).triu().unsqueeze(1)


def bunches(lengths: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Neighbouring trees of at most ATTENTION_BLOCK tokens together; a larger tree comes alone."""
    bunch: list[tuple[int, ...]] = []
    for sizes in lengths:
        if bunch and sum(map(sum, bunch)) + sum(sizes) > ATTENTION_BLOCK:
            yield bunch
            bunch = []
        bunch.append(sizes)
    if bunch:
        yield bunch


def response_blocks(
    sees: Sees, queries: Tensor, keys: Tensor, row: int, own: int, window: int | None
) -> list[Block]:
    """Blocks of a response's query tokens, the first of which is query number `row` of the pack and
    stands at keys[own].
    """
    blocks = []
    for i in range(0, len(queries), ATTENTION_BLOCK):
        block = queries[i : i + ATTENTION_BLOCK]
        end = i + len(block)
        first = max(0, own + i + 1 - window) if window else 0
        # All rows see the keys from `first` to row i's own token, and the mask is on those after
        # it; or on all of them, where a later row's window begins after `first`.
        bias = diagonal(len(block))
        if window is not None and own + end - window > first:
            bias = bias_of(sees, block, keys[first : own + end])
        blocks.append(Block(slice(row + i, row + end), slice(first, own + end), bias))
    return blocks


def blocked_plan(
    lengths: Sequence[tuple[int, ...]], sees: Sees, rows: Tensor, scored: bool, window: int | None
) -> list[Span]:
    """BlockedAttention's plan for a pack of trees with these lengths (prompt, response, ...), whose
    queries are the tokens `rows`: all of them, or the `scored` ones.

    Small neighbouring trees share a block and its mask. Of a larger tree each response has blocks
    of its own, over the prompt and itself.
    """
    plan: list[Span] = []
    token = row = 0  # of a bunch: its first key, and the next query
    for bunch in bunches(lengths):
        tokens = sum(map(sum, bunch))
        if tokens <= ATTENTION_BLOCK:
            keys = torch.arange(token, token + tokens)
            count = tokens - sum(sizes[0] for sizes in bunch) if scored else tokens
            bias = bias_of(sees, rows[row : row + count], keys)
            block = Block(slice(row, row + count), slice(0, tokens), bias)
            plan.append(Span(slice(token, token + tokens), [block]))
            token += tokens
            row += count
            continue

        prompt, *responses = bunch[0]
        start = token + prompt
        for b, length in enumerate(responses):
            response = torch.arange(start, start + length)
            keys = torch.cat((torch.arange(token, token + prompt), response))
            # The first query's own key. Scored rows begin with the prompt's last token. Of all
            # rows, the prompt's go with the first response's.
            if scored:
                own = prompt - 1
            elif b:
                own = prompt
            else:
                own = 0
            count = length if scored or b else prompt + length
            blocks = response_blocks(sees, rows[row : row + count], keys, row, own, window)
            plan.append(Span(keys if b else slice(token, start + length), blocks))
            start += length
            row += count
        token = start
    return plan


def blocked_attend(plan: list[Span], turns: Turns, key_turns: Turns) -> Attend:
    """model.plain_attend by BlockedAttention, with queries and keys turned by these angles."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return BlockedAttention.apply(q, k, v, turns + key_turns, plan)

    return attend


# --- feed-forward ---------------------------------------------------------------------------------


class SwiGLU(torch.autograd.Function):
    """(silu(x @ gate.T) * (x @ up.T)) @ down.T of [..., D], weights [F, D], [F, D] and [D, F].

    Keeps the two inner products, and x where gate or up trains. The rest is computed again in the
    backward, on a CPU a few rows at a time, so that it stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        gate_TF = F.linear(x_TD, gate)
        up_TF = F.linear(x_TD, up)
        out_TD = torch.empty_like(x_TD)
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
        rows = MLP_ROWS if on_cpu else max(1, len(x_TD))
        ctx.parts = [slice(i, i + rows) for i in range(0, len(x_TD), rows)]
        for part in ctx.parts:
            out_TD[part] = F.linear(F.silu(gate_TF[part]).mul_(up_TF[part]), down)
        kept_TD = x_TD if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(kept_TD, gate_TF, up_TF, gate, up, down)
        return out_TD.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_TF, up_TF, gate, up, down = ctx.saved_tensors
        wants_x, wants_gate, wants_up, wants_down = ctx.needs_input_grad
        dout_TD = grads[0].flatten(0, -2)
        dx_TD = torch.empty_like(dout_TD) if wants_x else None
        dgate = torch.zeros_like(gate) if wants_gate else None
        dup = torch.zeros_like(up) if wants_up else None
        ddown = torch.zeros_like(down) if wants_down else None
        for part in ctx.parts:
            up_part, dout = up_TF[part], dout_TD[part]
            silu = F.silu(gate_TF[part])
            if ddown is not None:
                ddown.addmm_(dout.mT, silu * up_part)
            if not (wants_x or wants_gate or wants_up):
                continue
            dhidden = dout @ down
            dup_part = silu.mul_(dhidden)
            dgate_part = torch.ops.aten.silu_backward(dhidden.mul_(up_part), gate_TF[part])
            if dx_TD is not None:
                dx_TD[part] = (dgate_part @ gate).addmm_(dup_part, up)
            if dgate is not None:
                dgate.addmm_(dgate_part.mT, x_TD[part])
            if dup is not None:
                dup.addmm_(dup_part.mT, x_TD[part])
        dx = None if dx_TD is None else dx_TD.view_as(grads[0])
        return dx, dgate, dup, ddown


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU; for torch.compile as plain operations, since its loop over rows would be compiled
    anew for every number of them.
    """
    if torch.compiler.is_compiling():
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return SwiGLU.apply(x, gate, up, down)


# --- norm -----------------------------------------------------------------------------------------


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, by a third of the passes
    that autograd makes of it.

    No output is a tensor changed in place, or cast to the dtype it has: torch 2.11 compiles a
    gradient of zeros for that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        (dout,) = grads
        exact = x.float()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            slope = dout * weight
            along = torch.linalg.vecdot(slope, exact).unsqueeze(-1)
            along = along.mul_(scale**3).div_(-x.shape[-1])
            dx = torch.addcmul(slope.mul_(scale), exact, along).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dout * exact).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, by torch's own kernel on a GPU."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return RMSNorm.apply(x, weight, eps).to(x.dtype)


# --- log-probabilities ----------------------------------------------------------------------------


class RowLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] of each row, in fp32, by chunks of rows. On a CPU a
    bf16 product is rounded to bf16 first.

    By the logits its gradient is onehot(target) - p. With a frozen weight the gradient by the
    hidden state is formed in the forward, and no logits are wanted again. With a trained one they
    are computed again in the backward. Nothing of size S x V outlives a chunk.
    """

    @staticmethod
    def _chunks(
        hidden_SD: Tensor, weight: Tensor, targets_S: Tensor, rows: int, slopes: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, log-probabilities, slopes or scratch) of each chunk."""
        for start in range(0, len(targets_S), rows):
            part = slice(start, start + rows)
            if hidden_SD.is_cuda and hidden_SD.dtype != torch.float32:
                # Products of bf16 numbers, never rounded to bf16.
                logits = torch.mm(hidden_SD[part], weight.mT, out_dtype=torch.float32)
            else:
                logits = F.linear(hidden_SD[part], weight).float()
            table = logits.sub_(logits.logsumexp(-1, keepdim=True))
            target = targets_S[part, None]
            logp = table.gather(-1, target)
            if slopes:
                table.exp_().neg_().scatter_add_(-1, target, torch.ones_like(logp))
            yield part, logp.squeeze(-1), table

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, weight: Tensor, targets_S: Tensor, rows: int
    ) -> Tensor:
        wanted, trained, *_ = ctx.needs_input_grad
        slopes = wanted and not trained
        ctx.rows = rows
        logp_S = hidden_SD.new_empty(len(targets_S), dtype=torch.float32)
        slope_SD = torch.empty_like(hidden_SD)
        for part, logp, slope in RowLogProbs._chunks(hidden_SD, weight, targets_S, rows, slopes):
            logp_S[part] = logp
            if slopes:
                slope_SD[part] = slope.to(weight.dtype) @ weight
        if trained:
            ctx.save_for_backward(hidden_SD, weight, targets_S)
        else:
            ctx.save_for_backward(slope_SD)
        return logp_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dlogp_S,) = grads
        if not ctx.needs_input_grad[1]:
            (slope_SD,) = ctx.saved_tensors
            return (slope_SD * dlogp_S.unsqueeze(-1)).to(slope_SD.dtype), None, None, None
        hidden_SD, weight, targets_S = ctx.saved_tensors
        dhidden_SD = torch.empty_like(hidden_SD)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for part, _, slope in RowLogProbs._chunks(hidden_SD, weight, targets_S, ctx.rows, True):
            slope = slope.mul_(dlogp_S[part, None]).to(weight.dtype)
            dhidden_SD[part] = slope @ weight
            if weight.dtype == torch.float32:
                dweight.addmm_(slope.mT, hidden_SD[part])
            else:  # summed over chunks in fp32 all the same
                dweight += slope.mT @ hidden_SD[part]
        return dhidden_SD, dweight.to(weight.dtype), None, None


def row_logprobs(hidden_SD: Tensor, weight: Tensor, targets_S: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each row, fp32 [S]."""
    # Every chunk of a trained weight adds a gradient of its size, so there are few of them.
    device = "cuda" if weight.requires_grad else hidden_SD.device.type
    rows = max(1, HEAD_CHUNK[device] // len(weight))
    return RowLogProbs.apply(hidden_SD, weight, targets_S, rows)
