"""From logits to the one token that follows a row, with noise that is fixed before anybody drafts.

    token(row) = argmax over v of  log p(v | row) + g(seed, session, position, v)

with g a standard Gumbel variate: an exact sample of p (Gumbel-max trick), and a function of where the token stands
alone, never of how many rows a pass had or what was drafted. Zero noise is greedy decoding.

g is counter-based: SplitMix64 (Steele, Lea, Flood 2014; passes BigCrush) from a key per (seed, session, position), with
the token as its counter. Integer arithmetic gives the same bits on every device; the two logarithms are fp64, so that
devices differ by 1e-16 relative.

Letters: r rows, V vocabulary size, m tokens that are still in play.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from longspec.kernels.build import library
from longspec.sampling.parameters import Sampling

__all__ = ["Sampling", "choose", "gumbel", "likeliest", "noise_key", "rank"]

_SOURCE = "sampler.c"
_KERNELS, _MOST = {torch.bfloat16: "16", torch.float32: "32"}, 64
"""How the C functions for each dtype end, and the most tokens that they look at."""

_LOOKS = (128, 4096)
"""Tokens that top-p and min-p look at, before all: sorting 49,152 logits costs 3 ms a row, their best 128 about 0.2."""


def choose(
    logits: Tensor, sampling: Sampling, keys: Sequence[int], contexts: Sequence[Collection[int]] | None = None
) -> Tensor:
    """The token [r] that follows each row of logits [r, V].

    keys: each row's `noise_key`, not read when greedy. contexts: per row the distinct tokens before the choice, read
    for a repetition penalty only.
    """
    if sampling.penalises:
        if contexts is None:
            raise ValueError("a repetition penalty needs each row's context")
        logits = _penalised(logits.float(), sampling.repetition_penalty, contexts)
    if sampling.is_greedy:
        return likeliest(logits, 1)[:, 0]
    kernel = _kernel(logits)
    if kernel is None:
        return _choose(logits, sampling, keys)
    logits, chosen = logits.contiguous(), torch.empty(len(logits), dtype=torch.int64)
    own = torch.tensor(keys, dtype=torch.int64)
    kernel(
        "choose",
        logits.data_ptr(),
        *logits.shape,
        ctypes.c_float(sampling.temperature),
        sampling.top_k,
        ctypes.c_float(sampling.top_p),
        ctypes.c_float(sampling.min_p),
        own.data_ptr(),
        chosen.data_ptr(),
    )
    far = (chosen < 0).nonzero()[:, 0]
    if len(far):  # rows that may keep more tokens than the kernel looks at
        chosen[far] = _choose(logits[far], sampling, own[far])
    return chosen


def _choose(logits: Tensor, sampling: Sampling, keys: Sequence[int] | Tensor) -> Tensor:
    """The same by torch's operators."""
    scores = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return _pick(scores, torch.arange(scores.shape[1], device=scores.device)[None], keys)
    return _pick_among_the_best(scores, sampling, torch.as_tensor(keys, dtype=torch.int64, device=scores.device))


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The `count` tokens [r, count] with the greatest logits [r, V], best first.

    On a CPU by the C kernel of `choose.c`: 8 of 49,152 take 4 us a row, and torch 100 and more. Else each group of 64
    columns can hold one only if its greatest is among the `count` greatest: half of topk's time.
    """
    rows, size = logits.shape
    kernel = _kernel(logits) if 0 < count <= min(_MOST, size) else None
    if kernel is not None:
        logits, best = logits.contiguous(), torch.empty(rows, count, dtype=torch.int64)
        kernel("best", logits.data_ptr(), rows, size, count, best.data_ptr())
        return best
    if count == 1:
        return logits.max(-1, keepdim=True).indices  # argmax takes four times as long
    if size % 64 or size // 64 < count:
        return logits.topk(min(count, size)).indices
    grouped = logits.view(rows, 64, size // 64)  # column c belongs to group c % (V / 64)
    groups = grouped.amax(1).topk(count).indices
    held = grouped.gather(2, groups[:, None].expand(-1, 64, -1)).flatten(1)
    best = held.topk(count).indices
    return best // count * (size // 64) + groups.gather(1, best % count)


def _kernel(logits: Tensor) -> Callable[..., None] | None:
    """Of `choose.c`, for these logits: given a function's name, and its arguments with addresses as integers."""
    kernel = library(_SOURCE) if logits.device.type == "cpu" and logits.dtype in _KERNELS else ""
    if isinstance(kernel, str):
        return None
    suffix = _KERNELS[logits.dtype]

    def call(name: str, *words: object) -> None:
        wide = (ctypes.c_int64(word) if isinstance(word, int) else word for word in words)
        getattr(kernel, name + suffix)(*wide)

    return call


def rank(
    logits: Tensor,
    sampling: Sampling,
    keys: Sequence[int],
    contexts: Sequence[Collection[int]] | None,
    count: int,
    vocabulary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` tokens [r, count] that would follow each row, best first, and a chance for each [r, count].

    For drafters, whose logits are only near the target's: what counts is who wins if they are a little off, so the
    chances are a softmax over the scores with their noise. Of a sampled row the best 128 tokens are looked at.
    vocabulary: the tokens [V] that the logits are of, rising; all, if left out.
    """
    if sampling.penalises:
        if contexts is None:
            raise ValueError("a repetition penalty needs each row's context")
        columns = contexts if vocabulary is None else [_columns(vocabulary, context) for context in contexts]
        logits = _penalised(logits.float(), sampling.repetition_penalty, columns)
    if sampling.is_greedy:
        values, tokens = logits.topk(min(count, logits.shape[1])) if count > 1 else logits.max(-1, keepdim=True)
        tokens = tokens if vocabulary is None else vocabulary[tokens]
        return tokens, torch.exp(values.float() - torch.logsumexp(logits.float(), -1, keepdim=True))
    scores = logits.float() / sampling.temperature
    values, tokens = scores.topk(min(sampling.top_k or _LOOKS[0], scores.shape[1]))
    whole = torch.logsumexp(values if sampling.top_k else scores, -1, keepdim=True)
    tokens = tokens if vocabulary is None else vocabulary[tokens]
    noisy = _nucleus(values, whole, sampling) + gumbel(keys, tokens)
    chances, best = torch.softmax(noisy, -1).topk(min(count, noisy.shape[1]))
    return tokens.gather(1, best), chances.float()


def noise_key(seed: int, session: str, position: int) -> int:
    """64 bits, as a signed integer, that no other (seed, session, position) is likely to share."""
    digest = hashlib.blake2b(f"{seed}\0{position}\0{session}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def gumbel(keys: Sequence[int] | Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise [r, m] in fp64 for tokens [r or 1, m], each row by its own key."""
    keys = torch.as_tensor(keys, dtype=torch.int64, device=tokens.device)
    state = keys[:, None] + (tokens + 1) * _signed(_GAMMA)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shifted(state, 31)
    uniform = (_shifted(state, 11).double() + 0.5) * 2.0**-53
    uniform = uniform.clamp_(max=1 - 2.0**-53)  # the largest of the 2^53 values rounds to 1, and its noise to infinity
    return -torch.log(-torch.log(uniform))


_GAMMA = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _penalised(logits: Tensor, penalty: float, contexts: Sequence[Collection[int]]) -> Tensor:
    logits = logits.clone()
    for row, context in zip(logits, contexts, strict=True):
        seen = torch.tensor(sorted(context), dtype=torch.int64, device=row.device)
        held = row[seen]
        row[seen] = torch.where(held > 0, held / penalty, held * penalty)
    return logits


def _columns(vocabulary: Tensor, context: Collection[int]) -> list[int]:
    """Where these tokens are in a rising vocabulary, those that are."""
    tokens = torch.tensor(sorted(context), device=vocabulary.device)
    places = torch.searchsorted(vocabulary, tokens).clamp(max=len(vocabulary) - 1)
    found: list[int] = places[vocabulary[places] == tokens].tolist()
    return found


def _pick(values: Tensor, tokens: Tensor, keys: Sequence[int] | Tensor) -> Tensor:
    """[r]: of tokens [r or 1, m] with these log-weights [r, m], the one that the noise makes the greatest."""
    best = (values + gumbel(keys, tokens)).argmax(-1, keepdim=True)
    return tokens.expand(len(values), -1).gather(1, best)[:, 0]


def _pick_among_the_best(scores: Tensor, sampling: Sampling, keys: Tensor) -> Tensor:
    """[r]: a token of each row of scores [r, V], by top-k, top-p and min-p. keys [r].

    A row looks at its best few tokens first, and at more where it may keep still more: most rows keep a handful, and
    what a row keeps doesn't depend on how far it looked.
    """
    size = scores.shape[1]
    chosen = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    total = torch.logsumexp(scores, -1, keepdim=True)
    for look in (sampling.top_k,) if sampling.top_k else (*_LOOKS, size):
        values, tokens = scores[rows].topk(min(look, size))
        whole = torch.logsumexp(values, -1, keepdim=True) if sampling.top_k else total[rows]
        kept = _nucleus(values, whole, sampling)
        done = kept[:, -1] == float("-inf")
        if look in (sampling.top_k, size) or look > size:
            done = torch.ones_like(done)
        chosen[rows[done]] = _pick(kept[done], tokens[done], keys[rows[done]])
        rows = rows[~done]
        if not len(rows):
            break
    return chosen


def _nucleus(values: Tensor, total: Tensor, sampling: Sampling) -> Tensor:
    """Top-p, then min-p, over values [r, m] in falling order whose log-normaliser is total [r, 1]."""
    probabilities = torch.exp(values - total)
    before = probabilities.cumsum(-1) - probabilities
    dropped = probabilities < sampling.min_p * probabilities[:, :1]
    if sampling.top_p < 1:
        dropped |= before >= sampling.top_p
    dropped[:, 0] = False
    return values.masked_fill(dropped, float("-inf"))
