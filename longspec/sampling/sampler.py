"""The sampler: from logits to the next token, with noise that is fixed before drafting.

    token(row) = argmax over v of  log p(v | row) + g(seed, session, position, v)

with g a standard Gumbel variate: an exact sample of p (Gumbel-max trick). g is a function of the token's position in
its session; it depends neither on the draft nor on the other positions of the forward pass. Zero noise is greedy
decoding.

g is counter-based: SplitMix64 (Steele, Lea, Flood 2014; passes BigCrush) from a key per (seed, session, position), with
the token as its counter. Integer arithmetic gives the same bits on every device; the two logarithms are fp64, so that
devices differ by 1e-16 relative.

Symbols: r rows (token positions), V vocabulary size, m candidate tokens.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Collection, Sequence
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from longspec.kernels.build import library
from longspec.kernels.team import team
from longspec.sampling.parameters import Sampling

__all__ = ["Sampling", "choose", "gumbel", "likeliest", "looks_in_place", "noise_key", "rank", "sound"]

_SOURCE = "sampler.c"
_KERNELS, _MOST = {torch.bfloat16: "16", torch.float32: "32"}, 128
"""Suffix of the C functions by dtype, and the largest `count` of the C kernel."""

_MOST_LOGIT = 1e30
"""Of a penalised token: it stays finite when it is divided by the least temperature."""

_LOOKS = (128, 4096)
"""Candidates that top-p and min-p sort at first and second try, before the whole vocabulary: a full sort is slow."""


def choose(
    logits: Tensor, sampling: Sampling, keys: Sequence[int], contexts: Sequence[Collection[int]] | None = None
) -> Tensor:
    """Sample the next token [r] from each row of logits [r, V].

    keys: each row's `noise_key`, unused when greedy. contexts: per row the distinct tokens before it, used for a
    repetition penalty only.
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
    own, kept = torch.tensor(keys, dtype=torch.int64), (sampling.top_k, sampling.top_p, sampling.min_p)
    at, to = logits.data_ptr(), chosen.data_ptr()
    kernel.choose(at, *logits.shape, sampling.temperature, *kept, own.data_ptr(), to, *team())
    for row in (chosen < 0).nonzero()[:, 0].tolist():  # the kernel's candidates may not suffice
        one = slice(row, row + 1)  # torch sorts copies: of one row at a time, which is what a memory plan counts
        chosen[one] = _choose(logits[one], sampling, own[one])
    return chosen


def looks_in_place() -> bool:
    """Whether a CPU's logits are looked through by the kernel, which copies none."""
    return not isinstance(library(_SOURCE), str)


def _choose(logits: Tensor, sampling: Sampling, keys: Sequence[int] | Tensor) -> Tensor:
    """`choose` in torch, after the repetition penalty; not for greedy."""
    scores = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return _pick(scores, torch.arange(scores.shape[1], device=scores.device)[None], keys)
    return _pick_among_the_best(scores, sampling, torch.as_tensor(keys, dtype=torch.int64, device=scores.device))


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The `count` tokens [r, count] with the greatest logits [r, V], best first.

    On a CPU by the kernel of `sampler.c`. Otherwise top-k in two stages: a group of 64 columns can hold one of them
    only if its maximum is among the `count` greatest maxima.
    """
    rows, size = logits.shape
    kernel = _kernel(logits) if 0 < count <= min(_MOST, size) else None
    if kernel is not None:
        logits, best = logits.contiguous(), torch.empty(rows, count, dtype=torch.int64)
        kernel.best(logits.data_ptr(), rows, size, count, best.data_ptr())
        return best
    if count == 1:
        return logits.max(-1, keepdim=True).indices  # faster than argmax
    if size % 64 or size // 64 < count:
        return logits.topk(min(count, size)).indices
    grouped = logits.view(rows, 64, size // 64)  # column c belongs to group c % (V / 64)
    groups = grouped.amax(1).topk(count).indices
    held = grouped.gather(2, groups[:, None].expand(-1, 64, -1)).flatten(1)
    best = held.topk(count).indices
    return best // count * (size // 64) + groups.gather(1, best % count)


def sound(logits: Tensor) -> Tensor:
    """Whether one can choose among a row's logits [r, V]: none is NaN or positive infinity, as their sum is too then.

    On a CPU by the kernel: torch shares a sum of more than 32,768 values among its own threads, which then spin where
    the kernels' team works (the default model wrote 90 tokens a second and not 170 on two cores).
    """
    kernel = _kernel(logits)
    if kernel is None:
        return logits.sum(-1, dtype=torch.float32) < float("inf")
    logits, found = logits.contiguous(), torch.empty(len(logits), dtype=torch.int64)
    kernel.sound(logits.data_ptr(), *logits.shape, found.data_ptr())
    return found.bool()


def _mass(logits: Tensor, temperature: float) -> Tensor:
    """The logarithm [r, 1] of the sum of e^(logit / temperature) over a row of logits [r, V]."""
    kernel = _kernel(logits)
    if kernel is None:
        return torch.logsumexp(logits.float() / temperature, -1, keepdim=True)
    logits, mass = logits.contiguous(), torch.empty(len(logits), 1)
    kernel.mass(logits.data_ptr(), *logits.shape, temperature, mass.data_ptr())
    return mass


def _kernel(logits: Tensor) -> SimpleNamespace | None:
    """The C functions of `sampler.c` for these logits, which take addresses as integers; or None."""
    found = library(_SOURCE) if logits.device.type == "cpu" and logits.dtype in _KERNELS else ""
    return None if isinstance(found, str) else _declared(found, _KERNELS[logits.dtype])


@cache
def _declared(found: ctypes.CDLL, suffix: str) -> SimpleNamespace:
    place, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    kinds = {
        "best": (place, number, number, number, place),
        "sound": (place, number, number, place),
        "mass": (place, number, number, real, place),
        "choose": (place, number, number, real, number, real, real, place, place, place, number),
    }
    kernel = SimpleNamespace(**{name: getattr(found, name + suffix) for name in kinds})
    for name, kind in kinds.items():
        getattr(kernel, name).argtypes = kind
    return kernel


def rank(
    logits: Tensor,
    sampling: Sampling,
    keys: Sequence[int],
    contexts: Sequence[Collection[int]] | None,
    count: int,
    vocabulary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` most probable next tokens [r, count], best first, and their probabilities [r, count].

    For drafters, whose logits approximate the target's. When sampling, tokens are ranked by score plus the session's
    noise, and the probabilities are a softmax over these: estimates of which token wins the target's argmax. Without
    top-k the best 128 tokens are candidates. vocabulary: [V], ascending, tokens of the logits' columns; default all.
    """
    if sampling.penalises:
        if contexts is None:
            raise ValueError("a repetition penalty needs each row's context")
        columns = contexts if vocabulary is None else [_columns(vocabulary, context) for context in contexts]
        logits = _penalised(logits.float(), sampling.repetition_penalty, columns)
    if sampling.is_greedy:
        tokens = likeliest(logits, min(count, logits.shape[1]))
        chances = torch.exp(logits.gather(1, tokens).float() - _mass(logits, 1.0))
        return tokens if vocabulary is None else vocabulary[tokens], chances
    tokens = likeliest(logits, min(sampling.top_k or _LOOKS[0], logits.shape[1]))
    values = logits.gather(1, tokens).float() / sampling.temperature
    whole = torch.logsumexp(values, -1, keepdim=True) if sampling.top_k else _mass(logits, sampling.temperature)
    tokens = tokens if vocabulary is None else vocabulary[tokens]
    noisy = _nucleus(values, whole, sampling) + gumbel(keys, tokens)
    chances, best = torch.softmax(noisy, -1).topk(min(count, noisy.shape[1]))
    return tokens.gather(1, best), chances.float()


def noise_key(seed: int, session: str, position: int) -> int:
    """64-bit hash of (seed, session, position), as a signed integer."""
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
        row[seen] = torch.where(held > 0, held / penalty, held * penalty).clamp(max=_MOST_LOGIT)
    return logits


def _columns(vocabulary: Tensor, context: Collection[int]) -> list[int]:
    """Indices of these tokens in an ascending vocabulary; tokens outside it are left out."""
    tokens = torch.tensor(sorted(context), device=vocabulary.device)
    places = torch.searchsorted(vocabulary, tokens).clamp(max=len(vocabulary) - 1)
    found: list[int] = places[vocabulary[places] == tokens].tolist()
    return found


def _pick(values: Tensor, tokens: Tensor, keys: Sequence[int] | Tensor) -> Tensor:
    """[r]: of tokens [r or 1, m] with unnormalised log-probabilities values [r, m], the argmax after adding noise."""
    best = (values + gumbel(keys, tokens)).argmax(-1, keepdim=True)
    return tokens.expand(len(values), -1).gather(1, best)[:, 0]


def _pick_among_the_best(scores: Tensor, sampling: Sampling, keys: Tensor) -> Tensor:
    """[r]: a token of each row of scores [r, V], by top-k, top-p and min-p. keys [r].

    Only a row's best few tokens are sorted at first, and more if the nucleus may be larger: the result is the same.
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
    """Top-p, then min-p, over values [r, m], descending, with log-normaliser total [r, 1]; dropped ones are -inf."""
    probabilities = torch.exp(values - total)
    before = probabilities.cumsum(-1) - probabilities
    dropped = probabilities < sampling.min_p * probabilities[:, :1]
    if sampling.top_p < 1:
        dropped |= before >= sampling.top_p
    dropped[:, 0] = False
    return values.masked_fill(dropped, float("-inf"))
