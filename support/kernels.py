"""The computations that decide a training step's time and memory, as autograd functions: the
attention of a pack on a CPU, the feed-forward, the norm, and log-probabilities without logits. Each
equals a formula of one line, its test's oracle. What a GPU compiles instead goes through
`compiled_on`. Imports torch alone.
"""
# mypy: allow-untyped-calls, disable-error-code="no-any-return"
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width,
# F feed-forward, H query heads, G key/value heads, K head size, A actions. Here also: S scored
# rows, P query heads of a key head (H/G).

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_BLOCK = 64  # query rows whose scores a CPU computes at once
KEPT_KEYS = 768  # keys that a block may see for its probabilities to be kept for the backward: each is 4 bytes a head and row
MLP_ROWS = 512  # rows of the feed-forward's pointwise part that a CPU holds at once
HEAD_CHUNK = {
    "cpu": 2**20,
    "cuda": 2**25,
}  # logits alive at once: 4 MiB of fp32 stay in a CPU's cache, 128 MiB fill a GPU


def rotary(positions: Tensor, theta: float, K: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, 1, K/2] of rotated(x [..., T, heads, K]) by positions [..., T]. fp32,
    and made here: to_empty would lose a buffer, and FSDP2 cast an argument of a block. 1 / theta^x
    and not theta^-x: the rounding that checkpoints were trained with.
    """
    frequency = 1 / theta ** (torch.arange(0, K, 2, device=positions.device).float() / K)
    angle = (positions.float().unsqueeze(-1) * frequency).unsqueeze(-2)
    return angle.cos(), angle.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., K] turned by the angles of cos and sin [..., K/2]: its halves (a, b) become (a cos -
    b sin, b cos + a sin), in fp32.
    """
    a, b = x.float().chunk(2, -1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)


class BlockedAttention(torch.autograd.Function):
    """Attention of a pack on a CPU, rotation included: a block of rows at a time against the keys
    it may see. Probabilities are kept for the backward, or computed again of blocks that see over
    KEPT_KEYS. A plan lists (spans, blocks): the tokens of the spans are the keys of the blocks,
    each (rows, the keys they see, bias); bias [rows, 1, c], 0 or -inf, masks the last c of these.
    Faster than two SDPA calls a pair: the query heads of a key head are rows of one product, and
    nothing masked is computed but at the diagonal. Inside, key heads come first: q [G, T P, K], k
    and v [G, T, K].
    """

    @staticmethod
    def _group_first(x: Tensor, G: int, tables: tuple[Tensor, ...] = ()) -> Tensor:
        x = x.unflatten(1, (G, -1)).transpose(0, 1)  # [T, H, K] -> [G, T, P, K]
        return (rotated(x, *tables).to(x.dtype) if tables else x).flatten(1, 2)

    @staticmethod
    def _token_first(x: Tensor, T: int) -> Tensor:
        return x.unflatten(1, (T, -1)).transpose(0, 1).flatten(1, 2)  # and back

    @staticmethod
    def _keys(x: Tensor, spans: Any) -> Tensor:
        """What x [G, T, K] holds of these tokens, in fp32: itself where it can be."""
        return (
            x[:, spans[0]] if len(spans) == 1 else torch.cat([x[:, span] for span in spans], 1)
        ).float()

    @staticmethod
    def _probabilities(q: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        scores = torch.baddbmm(q.new_empty(()), q, keys.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        if bias is not None:
            scores.unflatten(1, (len(bias), -1))[..., -bias.shape[-1] :].add_(bias)
        return scores.softmax(-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tables: Any, plan: Any) -> Tensor:
        this, (T, H, _), G = BlockedAttention, q.shape, k.shape[1]
        q, k, v = (
            this._group_first(q, G, tables[:2]),
            this._group_first(k, G, tables[2:]),
            this._group_first(v, G),
        )
        ctx.tables, ctx.plan, ctx.T, P, out = (
            tables,
            plan,
            T,
            H // G,
            torch.empty_like(q, dtype=torch.float32),
        )
        limit, kept = KEPT_KEYS * any(ctx.needs_input_grad), list[Tensor | None]()
        for spans, blocks in plan:
            keys, values = this._keys(k, spans), this._keys(v, spans)
            for rows, seen, bias in blocks:
                block = slice(rows.start * P, rows.stop * P)
                p = this._probabilities(q[:, block].float(), keys[:, seen], bias)
                torch.bmm(p, values[:, seen], out=out[:, block])
                kept.append(p if p.shape[-1] <= limit else None)
        ctx.save_for_backward(q, k, v, *kept)
        return this._token_first(out, T).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        this, (q, k, v, *kept), (cos, sin, cos_keys, sin_keys) = (
            BlockedAttention,
            ctx.saved_tensors,
            ctx.tables,
        )
        scale, P, dout = (
            q.shape[-1] ** -0.5,
            q.shape[1] // ctx.T,
            this._group_first(grads[0], len(q)),
        )
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        next_kept = iter(kept)
        for spans, blocks in ctx.plan:
            keys, values, dkeys, dvalues = (this._keys(x, spans) for x in (k, v, dk, dv))
            for rows, seen, bias in blocks:
                block = slice(rows.start * P, rows.stop * P)
                q_block, dout_block = q[:, block].float(), dout[:, block].float()
                p = next(next_kept)
                p = this._probabilities(q_block, keys[:, seen], bias) if p is None else p
                dvalues[:, seen].baddbmm_(p.mT, dout_block)
                dscores = torch.ops.aten._softmax_backward_data(
                    torch.bmm(dout_block, values[:, seen].mT), p, -1, p.dtype
                )
                dkeys[:, seen].baddbmm_(dscores.mT, q_block, alpha=scale)
                dq[:, block].baddbmm_(dscores, keys[:, seen], alpha=scale)
            if len(spans) > 1:
                for x, dx in ((dk, dkeys), (dv, dvalues)):
                    for span, part in zip(
                        spans, dx.split([span.stop - span.start for span in spans], 1), strict=True
                    ):
                        x[:, span] = part
        dq, dk, dv = (
            this._token_first(x, T) for x, T in ((dq, ctx.T), (dk, k.shape[1]), (dv, k.shape[1]))
        )
        dq, dk = rotated(dq, cos, -sin), rotated(dk, cos_keys, -sin_keys)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def blocked_plan(
    lengths: Sequence[tuple[int, ...]],
    sees: Callable[..., Tensor],
    rows: Tensor,
    scored: bool,
    window: int | None,
) -> list[Any]:
    """BlockedAttention's plan for a pack of trees with these lengths (prompt, response, ...), whose
    queries are the tokens `rows`: all of them, or the `scored` ones. `sees` (mask_mod form) says
    who sees whom. Small neighbouring trees share a block and its mask.
    """
    bunches: list[list[tuple[int, ...]]] = [[]]  # of trees
    for sizes in lengths:
        if sum(map(sum, bunches[-1])) + sum(sizes) > ATTENTION_BLOCK:
            bunches.append([])
        bunches[-1].append(sizes)
    plan, token, row = list[Any](), 0, 0  # of a bunch: its first key and query
    biases: dict[
        tuple[int, int], Tensor
    ] = {}  # blocks of a response that have the same size mask alike

    def block(
        row: int, end: int, keys: Tensor, first: int, masked: int, alike: bool = False
    ) -> tuple[slice, slice, Tensor | None]:
        size = end - row, len(keys) - masked
        bias = biases.get(size) if alike else None
        if bias is None and size[1]:
            bias = (
                torch.zeros(size)
                .masked_fill_(~sees(0, 0, rows[row:end, None], keys[masked:]), -math.inf)
                .unsqueeze(1)
            )
            if alike:
                biases[size] = bias
        return slice(row, end), slice(first, len(keys)), bias

    for bunch in filter(None, bunches):
        tokens = sum(map(sum, bunch))
        if tokens <= ATTENTION_BLOCK:
            end = row + (sum(sum(sizes[1:]) for sizes in bunch) if scored else tokens)
            plan.append(
                (
                    (slice(token, token + tokens),),
                    [block(row, end, torch.arange(token, token + tokens), 0, 0)],
                )
            )
            token, row = token + tokens, end
            continue
        prompt, *responses = bunch[0]
        start = token + prompt
        for b, length in enumerate(responses):
            keys = torch.cat(
                (torch.arange(token, token + prompt), torch.arange(start, start + length))
            )
            extra = (
                prompt if not scored and b == 0 else 0
            )  # the prompt's rows go with the first response's
            stop, ahead = (
                row + extra + length,
                prompt - scored - extra - row,
            )  # keys before row i's own: i + ahead
            blocks = []
            for i in range(row, stop, ATTENTION_BLOCK):
                end = min(i + ATTENTION_BLOCK, stop)
                first = max(0, i + ahead + 1 - window) if window else 0
                cut = (
                    window is not None and end + ahead - window > first
                )  # some rows do not see the first keys
                blocks.append(
                    block(
                        i,
                        end,
                        keys[: end + ahead],
                        first,
                        first if cut else i + ahead + 1,
                        alike=True,
                    )
                )
            apart = (slice(token, token + prompt), slice(start, start + length))
            plan.append((apart if b else (slice(token, start + length),), blocks))
            start, row = start + length, stop
        token = start
    return plan


class SwiGLU(torch.autograd.Function):
    """(silu(x @ gate.T) * (x @ up.T)) @ down.T of [..., D], weights [F, D], [F, D] and [D, F].
    Keeps the two inner products, and x where gate or up trains. The rest is computed again in the
    backward, on a CPU a few rows at a time, so that it stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        gate_TF, up_TF, out_TD = F.linear(x_TD, gate), F.linear(x_TD, up), torch.empty_like(x_TD)
        ctx.save_for_backward(
            x_TD if any(ctx.needs_input_grad[1:3]) else None, gate_TF, up_TF, gate, up, down
        )
        rows = (
            MLP_ROWS if x.device.type == "cpu" and x.dtype == torch.float32 else max(1, len(x_TD))
        )
        ctx.parts = [slice(i, i + rows) for i in range(0, len(x_TD), rows)]
        for part in ctx.parts:
            out_TD[part] = F.linear(F.silu(gate_TF[part]).mul_(up_TF[part]), down)
        return out_TD.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD, gate_TF, up_TF, *weights), (wanted, *trained) = (
            ctx.saved_tensors,
            ctx.needs_input_grad,
        )
        dout_TD, (gate, up, down) = grads[0].flatten(0, -2), weights
        dx_TD = torch.empty_like(dout_TD) if wanted else None
        dgate, dup, ddown = (
            torch.zeros_like(w) if needed else None
            for w, needed in zip(weights, trained, strict=True)
        )
        for part in ctx.parts:
            silu, up_part, dout = F.silu(gate_TF[part]), up_TF[part], dout_TD[part]
            if ddown is not None:
                ddown.addmm_(dout.mT, silu * up_part)
            if not any((wanted, *trained[:2])):
                continue
            dhidden = dout @ down
            dup_part = silu.mul_(dhidden)
            dgate_part = torch.ops.aten.silu_backward(dhidden.mul_(up_part), gate_TF[part])
            if dx_TD is not None:
                dx_TD[part] = (dgate_part @ gate).addmm_(dup_part, up)
            for dweight, slope in ((dgate, dgate_part), (dup, dup_part)):
                if dweight is not None:
                    dweight.addmm_(slope.mT, x_TD[part])
        return dx_TD if dx_TD is None else dx_TD.view_as(grads[0]), dgate, dup, ddown


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU; for torch.compile as plain operations, since its loop over rows would be compiled
    anew for every number of them.
    """
    if torch.compiler.is_compiling():
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return SwiGLU.apply(x, gate, up, down)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, by a third of the passes
    that autograd makes of it. No output is a tensor changed in place, or cast to the dtype it has:
    torch 2.11 compiles a gradient of zeros for that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, scale), (wanted, trained, _) = ctx.saved_tensors, ctx.needs_input_grad
        (dout,), exact, dx, dweight = grads, x.float(), None, None
        if wanted:
            slope = dout * weight
            along = (
                torch.linalg.vecdot(slope, exact).unsqueeze(-1).mul_(scale**3).div_(-x.shape[-1])
            )
            dx = torch.addcmul(slope.mul_(scale), exact, along).to(x.dtype)
        if trained:
            dweight = (dout * exact).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, by torch's own kernel on a GPU."""
    return (
        F.rms_norm(x, weight.shape, weight, eps)
        if x.is_cuda
        else RMSNorm.apply(x, weight, eps).to(x.dtype)
    )


class RowLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] of each row, in fp32 (on a CPU a bf16 product is
    rounded to bf16 first), by chunks of rows. By the logits its gradient is onehot(target) - p.
    With a frozen weight the gradient by the hidden state is formed in the forward, and no logits
    are wanted again; with a trained one they are computed again in the backward. Either way nothing
    of size S x V outlives a chunk.
    """

    @staticmethod
    def _chunks(
        hidden_SD: Tensor, weight: Tensor, targets_S: Tensor, rows: int, slopes: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part in (slice(i, i + rows) for i in range(0, len(targets_S), rows)):
            if hidden_SD.is_cuda and hidden_SD.dtype != torch.float32:
                logits = torch.mm(
                    hidden_SD[part], weight.mT, out_dtype=torch.float32
                )  # products of bf16 numbers, never rounded to bf16
            else:
                logits = F.linear(hidden_SD[part], weight).float()
            target, table = targets_S[part, None], logits.sub_(logits.logsumexp(-1, keepdim=True))
            logp = table.gather(-1, target)
            if slopes:
                table.exp_().neg_().scatter_add_(-1, target, torch.ones_like(logp))
            yield part, logp.squeeze(-1), table

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, weight: Tensor, targets_S: Tensor, rows: int
    ) -> Tensor:
        (wanted, trained, *_), ctx.rows = ctx.needs_input_grad, rows
        logp_S, slope_SD = (
            hidden_SD.new_empty(len(targets_S), dtype=torch.float32),
            torch.empty_like(hidden_SD),
        )
        for part, logp, slope in RowLogProbs._chunks(
            hidden_SD, weight, targets_S, rows, wanted and not trained
        ):
            logp_S[part] = logp
            if wanted and not trained:
                slope_SD[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(*((hidden_SD, weight, targets_S) if trained else (slope_SD,)))
        return logp_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            (slope_SD,) = ctx.saved_tensors
            return (slope_SD * grads[0].unsqueeze(-1)).to(slope_SD.dtype), None, None, None
        hidden_SD, weight, targets_S = ctx.saved_tensors
        dhidden_SD, dweight = (
            torch.empty_like(hidden_SD),
            torch.zeros_like(weight, dtype=torch.float32),
        )
        for part, _, slope in RowLogProbs._chunks(hidden_SD, weight, targets_S, ctx.rows, True):
            slope = slope.mul_(grads[0][part, None]).to(weight.dtype)
            dhidden_SD[part] = slope @ weight
            if weight.dtype == torch.float32:
                dweight.addmm_(slope.mT, hidden_SD[part])
            else:  # summed over chunks in fp32 all the same
                dweight += slope.mT @ hidden_SD[part]
        return dhidden_SD, dweight.to(weight.dtype), None, None


def row_logprobs(hidden_SD: Tensor, weight: Tensor, targets_S: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each row, fp32 [S]."""
    device = (
        "cuda" if weight.requires_grad else hidden_SD.device.type
    )  # every chunk adds a weight gradient: few of them
    return RowLogProbs.apply(
        hidden_SD, weight, targets_S, max(1, HEAD_CHUNK[device] // len(weight))
    )


@functools.cache
def compiled_on(kind: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function compiled on a GPU, in a few graphs for shapes of every length."""
    if kind != "cuda":
        return None
    torch._dynamo.config.recompile_limit = (
        64  # each model of a process has its own; past the limit fullgraph raises an error
    )
    return torch.compile(function, dynamic=True, fullgraph=True)
