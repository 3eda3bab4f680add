"""One finished answer with its figures: the object that `--json` prints and that every line of a batch holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longspec.calls.call import Call
from longspec.engine.session import Session
from longspec.machine.system import peak_bytes
from longspec.memory.plan import Plan
from longspec.model.decoder import Decoder
from longspec.model.weights.footprint import parameters
from longspec.model.weights.pool import Pool
from longspec.model.weights.ring import Ring
from longspec.types import TokenLogprob

__all__ = ["Answer", "memory", "on_disk", "speculation", "timing", "usage"]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, its reasoning, its finish reason and its figures, in seconds and bytes; names as in docs/cli.md."""

    text: str
    reasoning: str | None  # None without a reasoning section
    tokens: tuple[int, ...]
    finish_reason: str
    model: str
    dtype: str
    exactness: str  # exact: plain decoding's tokens, bit for bit; rounding: but for flips of near-ties; lossy
    cache: str
    cache_lossless: bool
    usage: dict[str, int]
    speculation: dict[str, Any]
    timing: dict[str, Any]
    memory: dict[str, Any]
    calls: tuple[Call, ...] = ()  # of tools
    logprobs: tuple[TokenLogprob, ...] | None = None  # of each of `tokens`, where they were asked for
    parsed: Any = None  # the answer as an object of the pydantic class that was given as its schema

    def report(self) -> dict[str, Any]:
        """The object that `longspec run --json` prints."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "text": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self.finish_reason,
            "exactness": self.exactness,
            "cache": self.cache,
            "cache_lossless": self.cache_lossless,
            "usage": self.usage,
            "speculation": self.speculation,
            "timing": self.timing,
            "memory": self.memory,
        }


def usage(session: Session) -> dict[str, int]:
    return {
        "prompt_tokens": session.prompt_length,
        "completion_tokens": len(session.answer),
        "cached_tokens": session.cached,
        "reasoning_tokens": 0 if session.section is None else min(session.section.tokens, len(session.answer)),
    }


def speculation(session: Session, drafter: str, *, lossy: bool = False) -> dict[str, Any]:
    """lossy: drafts may be accepted by their meaning; `meant` then counts the tokens that were by it alone."""
    stats, meant = session.stats, {"meant": session.meant} if lossy else {}
    return {
        "drafter": drafter,
        "steps": stats.steps,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "tokens_per_step": stats.tokens_per_step,
        "steps_without_a_bet": stats.steps_without_a_bet,
        "bets": dict(session.bets.most_common()),
        **meant,
    }


def timing(session: Session, began: float | None = None) -> dict[str, Any]:
    """The seconds of prefill and decoding. Decoding runs from the first token to the last: the prefill gives the
    first token, so only later ones count.

    began: when the wait for the first token began, on `perf_counter`'s clock; if left out, when the session was
    opened.
    """
    prefilled = session.prefilled or session.began
    first, last = session.first_token, session.last_token
    decode = last - first if first is not None and last is not None else 0.0
    tokens = len(session.answer)
    return {
        "prefill_s": prefilled - session.began,
        "decode_s": decode,
        "draft_s": session.drafting,
        "verify_s": session.verifying,
        "time_to_first_token_s": None if first is None else first - (session.began if began is None else began),
        "tokens_per_second": (tokens - 1) / decode if decode > 0 and tokens > 1 else None,
    }


def on_disk(ring: Ring, pool: Pool | None, session: Session, pruned: int) -> dict[str, Any]:
    """What a pass reads of layers on disk, what that is for a token, and what the process has read and waited for; of
    experts on disk, how many were chosen, and how many of these had to be read.
    """
    rate = session.stats.tokens_per_step
    experts = {} if pool is None else {"experts_chosen": pool.chosen, "experts_read": pool.missed}
    return {
        **experts,
        "bytes_per_pass": ring.streamed,
        "bytes_per_token": round(ring.streamed / rate) if rate else None,
        "read_bytes": ring.file.nbytes_read,
        "wait_s": ring.waited,
        "pruned_rows": pruned,
    }


def memory(
    session: Session, decoder: Decoder, drafters: int, plan: Plan | None = None, pruned: int = 0
) -> dict[str, Any]:
    """Bytes of weights (in all, by their format, and in bits per weight), drafters and cache (as allocated; per row:
    divided by its rows), and the plan's budget if there is one.

    A drafter's bytes are its weights and tables; its notes on sequences aren't counted. pruned: rows of drafts that
    left passes on the way.
    """
    cache, ring = session.cache, decoder.ring
    budget = {} if plan is None else {"budget": {**plan.report(), "notes": list(session.notes)}}
    return {
        "weights_bytes": decoder.nbytes,
        "weights_formats": decoder.formats,
        "weights_bits": round(8 * decoder.nbytes / parameters(decoder.config, tied=decoder.config.tied), 2),
        "drafter_bytes": drafters,
        "cache_bytes": cache.nbytes,
        "cache_bytes_per_token": cache.nbytes / cache.length if cache.length else None,
        "peak_bytes": peak_bytes(),
        **({} if ring is None else {"weights_on_disk": on_disk(ring, decoder.pool, session, pruned)}),
        **budget,
    }
