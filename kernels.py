"""The three computations that decide a training step's time and memory, as autograd functions: the attention of a pack on a CPU, the
feed-forward's second half, and log-probabilities without logits. Each equals a formula of one line, its test's oracle. Imports torch alone.
"""
# mypy: allow-untyped-calls, disable-error-code="no-any-return"
# Dimension key: N pairs, R responses (2N, chosen first), T tokens of a pack, V vocabulary, D width, F feed-forward,
# H query heads, G key/value heads, K head size, A actions.  Here also: S scored rows.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_BLOCK = 64  # query rows whose scores a CPU holds at once
MLP_ROWS = 256  # rows of the feed-forward's pointwise part that a CPU holds at once
HEAD_CHUNK = {"cpu": 2**20, "cuda": 2**25}  # logits alive at once: 4 MiB of fp32 stay in a CPU's cache, 128 MiB fill a GPU


class BlockedAttention(torch.autograd.Function):
    """Attention of a pack on a CPU: a block of rows at a time against the keys it may see, scores computed again in the backward. A plan
    lists (key spans, blocks): the spans' rows, one after the other, are the keys of its blocks (row, end, first key, last key, hidden);
    hidden [rows, 1, c] masks the last c keys. Faster than two SDPA calls a pair: a group's query heads are rows of one product,
    nothing masked is computed but at the diagonal, and the backward adds into one buffer."""

    @staticmethod
    def _gather(x: Tensor, spans: Any) -> Tensor:
        return torch.cat([x[a:b] for a, b in spans]).transpose(0, 1).float()  # [G, keys, K]

    @staticmethod
    def _by_group(x: Tensor, G: int) -> Tensor:
        n, H, K = x.shape
        return x.reshape(n, G, H // G, K).transpose(0, 1).reshape(G, -1, K).float()  # [n, H, K] -> [G, n H/G, K]

    @staticmethod
    def _by_row(x: Tensor, n: int) -> Tensor:
        return x.view(len(x), n, -1, x.shape[-1]).transpose(0, 1).reshape(n, -1, x.shape[-1])  # and back

    @staticmethod
    def _probabilities(q: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        scores = torch.baddbmm(q.new_empty(()), q, keys.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        if hidden is not None:
            scores.view(len(q), len(hidden), -1, keys.shape[1])[..., -hidden.shape[-1] :].masked_fill_(hidden, -math.inf)
        return scores.softmax(-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        this, ctx.plan, out = BlockedAttention, plan, torch.empty_like(q)
        for spans, blocks in plan:
            keys, values = this._gather(k, spans), this._gather(v, spans)
            for row, end, first, last, hidden in blocks:
                p = this._probabilities(this._by_group(q[row:end], len(keys)), keys[:, first:last], hidden)
                out[row:end] = this._by_row(torch.bmm(p, values[:, first:last]), end - row)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        this, (q, k, v) = BlockedAttention, ctx.saved_tensors
        scale, dq = q.shape[-1] ** -0.5, torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for spans, blocks in ctx.plan:
            keys, values = this._gather(k, spans), this._gather(v, spans)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for row, end, first, last, hidden in blocks:
                q_block, dout = (this._by_group(x[row:end], len(keys)) for x in (q, grads[0]))
                p = this._probabilities(q_block, keys[:, first:last], hidden)
                dvalues[:, first:last].baddbmm_(p.mT, dout)
                dscores = torch.ops.aten._softmax_backward_data(torch.bmm(dout, values[:, first:last].mT), p, -1, p.dtype)
                dkeys[:, first:last].baddbmm_(dscores.mT, q_block, alpha=scale)
                dq[row:end] = this._by_row(torch.bmm(dscores, keys[:, first:last]), end - row).mul_(scale)
            start = 0
            for a, b in spans:
                dk[a:b] += dkeys[:, start : start + b - a].transpose(0, 1)
                dv[a:b] += dvalues[:, start : start + b - a].transpose(0, 1)
                start += b - a
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def blocked_plan(
    lengths: Sequence[tuple[int, ...]], sees: Callable[..., Tensor], rows: Tensor, scored: bool, window: int | None
) -> list[Any]:
    """BlockedAttention's plan for a pack of trees with these lengths (prompt, response, ...), whose queries are the tokens `rows`: all of
    them, or the `scored` ones. `sees` (mask_mod form) says who sees whom. Small neighbouring trees share a block and its mask."""
    groups: list[list[tuple[int, ...]]] = []
    for sizes in lengths:
        if groups and sum(map(sum, groups[-1])) + sum(sizes) <= ATTENTION_BLOCK:
            groups[-1].append(sizes)
        else:
            groups.append([sizes])
    plan: list[Any] = []
    token = row = 0  # where the group's keys and queries start

    def block(end: int, keys: Tensor, first: int, masked: int) -> tuple[Any, ...]:
        hidden = ~sees(0, 0, rows[row:end, None], keys[masked:]).unsqueeze(1) if masked < len(keys) else None
        return row, end, first, len(keys), hidden

    for group in groups:
        T = sum(map(sum, group))
        if T <= ATTENTION_BLOCK:
            end = row + (sum(sum(sizes[1:]) for sizes in group) if scored else T)
            plan.append((((token, token + T),), [block(end, torch.arange(token, token + T), 0, 0)]))
            token, row = token + T, end
            continue
        prompt, *responses = group[0]
        start = token + prompt
        for b, length in enumerate(responses):
            spans = ((token, token + prompt), (start, start + length))
            keys = torch.cat([torch.arange(*span) for span in spans])
            with_prompt = not scored and b == 0  # the prompt's rows go with the first response's
            stop = row + length + (prompt if with_prompt else 0)
            seen = 0 if with_prompt else prompt - scored  # keys before the row's own; a scored row's own is the token before its target
            blocks = []
            while row < stop:
                end = min(row + ATTENTION_BLOCK, stop)
                first = max(0, seen + 1 - window) if window else 0
                last = seen + end - row
                blocks.append(block(end, keys[:last], first, first if window and last - window > first else seen + 1))
                row, seen = end, last
            plan.append((spans, blocks))
            start += length
        token = start
    return plan


class SwiGLUDown(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T of [..., F], keeping gate and up alone: the pointwise part is computed again in the backward, on a CPU
    a few rows at a time, so that it stays in the cache and nothing more of size T x F is made than the two gradients."""

    @staticmethod
    def _parts(gate: Tensor) -> list[slice]:
        rows = MLP_ROWS if gate.device.type == "cpu" and gate.dtype == torch.float32 else max(1, len(gate))
        return [slice(i, i + rows) for i in range(0, len(gate), rows)]

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        out = gate.new_empty(*gate.shape[:-1], len(weight))
        gate_TF, up_TF, out_TD = (x.flatten(0, -2) for x in (gate, up, out))
        for part in SwiGLUDown._parts(gate_TF):
            out_TD[part] = F.linear(F.silu(gate_TF[part]).mul_(up_TF[part]), weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate, up, weight), need = ctx.saved_tensors, ctx.needs_input_grad
        dgate, dup = (torch.empty_like(x) if needed else None for x, needed in ((gate, need[0]), (up, need[1])))
        dweight = torch.zeros_like(weight) if need[2] else None
        gate_TF, up_TF, dout_TD = (x.flatten(0, -2) for x in (gate, up, grads[0]))
        for part in SwiGLUDown._parts(gate_TF):
            silu = F.silu(gate_TF[part])
            if dweight is not None:
                dweight.addmm_(dout_TD[part].mT, silu * up_TF[part])
            if dgate is not None or dup is not None:
                dhidden = dout_TD[part] @ weight
            if dgate is not None:
                dgate.flatten(0, -2)[part] = torch.ops.aten.silu_backward(dhidden * up_TF[part], gate_TF[part])
            if dup is not None:
                dup.flatten(0, -2)[part] = dhidden.mul_(silu)
        return dgate, dup, dweight


class RowLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] of each row, in fp32, by chunks of rows. By the logits its gradient is onehot(target) - p.
    With a frozen weight the gradient by the hidden state is formed in the forward, and no logits are wanted again; with a trained one they
    are computed again in the backward. Either way nothing of size S x V outlives a chunk."""

    @staticmethod
    def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight.mT, out_dtype=torch.float32)  # products of bf16 numbers, never rounded to bf16
        return F.linear(hidden, weight).float()

    @staticmethod
    def _slope(logits: Tensor, log_sum: Tensor, target: Tensor) -> Tensor:
        return logits.sub_(log_sum).exp_().neg_().scatter_add_(-1, target, torch.ones_like(log_sum))

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, weight: Tensor, targets_S: Tensor, chunk: int) -> Tensor:
        (wanted, trained, *_), ctx.chunk = ctx.needs_input_grad, chunk
        logp_S, slope_SD = hidden_SD.new_empty(len(targets_S), dtype=torch.float32), torch.empty_like(hidden_SD)
        for i in range(0, len(targets_S), chunk):
            part, target = slice(i, i + chunk), targets_S[i : i + chunk, None]
            logits = RowLogProbs._logits(hidden_SD[part], weight)
            log_sum = logits.logsumexp(-1, keepdim=True)
            logp_S[part] = (logits.gather(-1, target) - log_sum).squeeze(-1)
            if wanted and not trained:
                slope_SD[part] = RowLogProbs._slope(logits, log_sum, target).to(weight.dtype) @ weight
        ctx.save_for_backward(*((hidden_SD, weight, targets_S) if trained else (slope_SD,)))
        return logp_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            (slope_SD,) = ctx.saved_tensors
            return (slope_SD * grads[0].unsqueeze(-1)).to(slope_SD.dtype), None, None, None
        hidden_SD, weight, targets_S = ctx.saved_tensors
        dhidden_SD, dweight = torch.empty_like(hidden_SD), torch.zeros_like(weight)
        for i in range(0, len(targets_S), ctx.chunk):
            part, target = slice(i, i + ctx.chunk), targets_S[i : i + ctx.chunk, None]
            logits = RowLogProbs._logits(hidden_SD[part], weight)
            slope = RowLogProbs._slope(logits, logits.logsumexp(-1, keepdim=True), target)
            slope = slope.mul_(grads[0][part, None]).to(weight.dtype)
            dhidden_SD[part] = slope @ weight
            dweight.addmm_(slope.mT, hidden_SD[part])
        return dhidden_SD, dweight, None, None


def row_logprobs(hidden_SD: Tensor, weight: Tensor, targets_S: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each row, fp32 [S]."""
    device = "cuda" if weight.requires_grad else hidden_SD.device.type  # every chunk adds a weight gradient: few of them
    return RowLogProbs.apply(hidden_SD, weight, targets_S, max(1, HEAD_CHUNK[device] // len(weight)))
