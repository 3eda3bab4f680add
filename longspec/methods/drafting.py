"""What drafts: n-grams and retrieval, the target's own layers and cache, smaller models, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from longspec.methods.method import Method

__all__ = ["DRAFTING"]

_FOUND = partial(Method, drafter="independent", centre="draft")
_GUESSED = partial(Method, drafter="self", centre="draft")
_BESIDE = partial(Method, drafter="independent", centre="model")
_OWN = partial(Method, drafter="self", centre="model")

_DATA = "it needs a training of the target, whose text would change"
_MODELS = "it needs a draft model trained for each target; any smaller model drafts as it is (`--draft-model`)"
_BLOCKS = "its checkpoints are drafters of several layers for a few large targets, whose format isn't read"
_READ = "those published in the layout of `speculators`, as trees of a block's chances"

_NGRAMS = (
    _FOUND("prompt lookup", "", "--drafter ngram", "a suffix automaton of all the text"),
    _FOUND("LLMA", "2304.04487", "--drafter suffix", "the reference is `--draft-from FILE`"),
    _FOUND("ANPD", "2404.08698", "--drafter ngram", "counts grow with the text; any length of n-gram"),
    _FOUND("SuffixDecoding", "2411.04975", "--drafter suffix", "also earlier answers: `--remember`"),
    _FOUND("SAM-Decoding", "2411.10666", "--drafter suffix", "automaton and suffix array side by side"),
    _FOUND("REST", "2311.08252", "--drafter suffix", "of the user's own files; no datastore is downloaded"),
    _GUESSED("Token Recycling", "2408.08696", "--drafter recycle", "the likeliest eight tokens after each"),
    _FOUND("Ouroboros", "2402.13720", "", "phrases of rejected drafts are what `recycle` and `lookahead` keep"),
    _GUESSED(
        "Lookahead Decoding", "2402.02057", "--drafter lookahead", "window, n-grams and the prompt's, as one tree"
    ),
    _GUESSED("Jacobi decoding", "2305.10427", "", "`lookahead` keeps the n-grams that it throws away"),
    _OWN("consistency LLMs", "2403.00835", "", _DATA),
    _OWN("Jacobi Forcing", "2512.14681", "", _DATA),
)

_LAYERS = (
    _OWN("Draft & Verify", "2309.08168", "--drafter skip", "sub-layers left out; `longspec tune` searches"),
    _OWN("SWIFT", "2410.06916", "--drafter skip", "the set is searched while a text is written"),
    _OWN("KnapSpec", "2602.20217", "--drafter skip", "priced by bytes, not solved as a knapsack by context"),
    _OWN("LayerSkip", "2404.16710", "--drafter exit", "for checkpoints that were trained for it"),
    _OWN("AdaDecode", "2506.03700", "--drafter exits", "deferred layers, its matrices from `longspec train exits`"),
    _OWN("SPEED", "2310.12072", "--drafter pipeline", "for looped models; their own readouts, no trained classifier"),
    _OWN("LoopSpec", "2609.17184", "--drafter pipeline", "one or two guesses; by fixed noise, without resampling"),
    _OWN("Kangaroo", "2404.18911", "", "its adapter is trained for each target, for less than EAGLE-3 gains"),
    _OWN("Hidden Transfer", "2404.12022", "--drafter transfer", "its rows have a pass of their own"),
)

_VIEWS = (
    _OWN("StreamingLLM", "2309.17453", "--drafter sparse:view=window", "first and last positions"),
    _OWN("MagicDec", "2408.11049", "--drafter sparse:view=window", "its cost model is `--control goodput`"),
    _OWN("Quest", "2406.10774", "--drafter sparse:view=pages", "pages by the bounds of their keys"),
    _OWN("TriForce", "2404.11912", "--drafter sparse:view=pages", "`model+sparse` is its third level"),
    _OWN("SparseSpec", "2512.01278", "--drafter sparse:view=pages", "chosen once in 64 tokens, by bounds"),
    _OWN("Vegas", "2602.07223", "--drafter sparse:view=pages", "pages, not single positions"),
    _OWN("SparseSpec-L", "2607.27735", "--drafter sparse:view=pages", "pages, not single positions"),
    _OWN("QuantSpec", "2502.10424", "--drafter sparse:view=upper --cache dual", "weights stay as they are"),
    _OWN("VeriCache", "2605.17613", "", "no store's rows are read for the verification alone"),
    _OWN("ASPIRE", "2609.17943", "", "batches are drafted for by one view for each text"),
)

_SMALLER = (
    _BESIDE("speculative decoding", "2211.17192", "--drafter model", "any model with the same tokens"),
    _BESIDE("speculative sampling", "2302.01318", "--drafter model", "the same, by the target's own noise"),
    _BESIDE("SpecInfer", "2305.09781", "--drafter model", "one draft model, and a tree of its guesses"),
    _BESIDE(
        "Staged Speculative Decoding",
        "2308.04623",
        "--drafter model+ngram",
        "one over another, to any depth; heads too",
    ),
    _BESIDE("cascade speculative drafting", "2312.11462", "--drafter model+ngram", "vertically; not by position"),
    _BESIDE("SpecDec", "2203.16487", "", _MODELS),
    _BESIDE("DistillSpec", "2310.08461", "", _MODELS),
    _BESIDE("online speculative decoding", "2310.07177", "", "nothing is trained while a text is written"),
    _BESIDE("GLIDE with CaPE", "2402.02082", "", _MODELS),
    _BESIDE(
        "LongSpec", "2502.17421", "", "its drafter reads the target's cache, which no head here does", planned=True
    ),
    _BESIDE("SpecExtend", "2505.20776", "", "a draft model keeps all of its cache"),
    _BESIDE("PEARL", "2408.11850", "", "drafting beside the verification takes cores from it"),
)

_HEADS = (
    _OWN("Clover", "2405.00263", "--drafter clover", "one cell for all depths; trained by `longspec train`"),
    _OWN("Clover-2", "2408.00264", "--drafter clover2", "comes along for the default model"),
    _OWN(
        "Medusa",
        "2401.10774",
        "--drafter medusa",
        "trained by `longspec train`; a folder's published heads too; typical acceptance is below",
    ),
    _OWN(
        "EAGLE-3", "2503.01840", "--drafter eagle3", "trained by `longspec train`; published ones too, in two layouts"
    ),
    _OWN("FastMTP", "2509.18362", "--drafter fastmtp", "one block for all depths; trained by `longspec train`"),
    _OWN("Gemma 4's assistant", "", "--drafter FOLDER", "queries only, over the target's own cache"),
    _OWN("EAGLE", "2401.15077", "", "EAGLE-3 took its place"),
    _OWN("P-EAGLE", "2602.01469", "", "its layout isn't read"),
    _OWN("Hydra", "2402.05109", "", "`clover` and `clover2` take the drafted token too"),
    _OWN("ReDrafter", "2403.09919", "", "`clover` is recurrent too; its layout isn't read"),
    _OWN("Cerberus heads", "2410.13344", "--drafter cerberus", "two blocks; each depth reads the one before it"),
    _OWN("ParallelSpec", "2410.05589", "--drafter parallelspec", "one layer; deep anchors dropped as P-EAGLE does it"),
    _OWN("SpecFormer", "2511.20340", "--drafter specformer", "a chain of one pass; its block reads both ways"),
    _OWN("PaSS", "2311.13581", "", "rows without a token can't enter a pass"),
    _OWN("BiTA", "2401.12522", "", "rows without a token can't enter a pass"),
    _OWN("multi-token prediction", "2404.19737", "--drafter mtp", "the checkpoint's own head, where it has one"),
    _OWN("speculative streaming", "2402.11131", "", _DATA),
    _OWN("TokenSwift", "2502.18890", "", "its heads are trained for each target; `ngram` reuses n-grams"),
    _OWN("OWL", "2510.07535", "", "its drafter is trained for each target"),
    _OWN("Windowed-MTP", "2607.21535", "", "a window over a head's own cache isn't there"),
    _BESIDE("DFlash", "2602.06036", "--drafter FOLDER", _READ),
    _BESIDE("JetSpec", "2606.18394", "", _BLOCKS),
    _BESIDE("DSpark", "2607.05147", "--drafter FOLDER", f"{_READ}; without its head of confidence"),
)

DRAFTING: Mapping[str, Sequence[Method]] = {
    "N-grams, retrieval and Jacobi iterations": _NGRAMS,
    "The target's own layers": _LAYERS,
    "The target over a view of its cache": _VIEWS,
    "Smaller models": _SMALLER,
    "Heads and block drafters": _HEADS,
}
