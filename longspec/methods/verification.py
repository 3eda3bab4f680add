"""Which drafts are verified, and by what rule: trees, lengths, greedy, sampled and lossy acceptance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from longspec.methods.method import Method

__all__ = ["VERIFICATION"]

_CHOICE = partial(Method, centre="draft")
_OTHER = "it keeps more by writing another text than plain decoding does with the same seed"
_LOSSY = "it changes what is written"
_CONTROL = "--control goodput"

_TREES = (
    _CHOICE("token trees", "2305.09781", "--num-speculative-tokens N", "every draft is a tree"),
    _CHOICE("EAGLE-2", "2406.16858", _CONTROL, "the likeliest nodes, by calibrated path probabilities"),
    _CHOICE(
        "Lever",
        "2605.16786",
        "--weights disk",
        "nodes by gain over a pass's cost with reading; a mixture's rows leave on the way",
    ),
    _CHOICE("SpecExec", "2406.02532", _CONTROL, "best first; 64 nodes at most"),
    _CHOICE("OPT-Tree", "2406.17276", _CONTROL, "nodes by path probability, anew in each step"),
    _CHOICE("DySpec", "2410.11744", _CONTROL, "a heap of paths"),
    _CHOICE("DDTree", "2604.12989", "", "there is no block drafter whose marginals it could grow over"),
    _CHOICE("UBTree", "2609.39972", "", "there is no block drafter whose marginals it could grow over"),
    _CHOICE("Sequoia", "2402.12374", "", "a tree of fixed shape keeps less than one by this step's chances"),
)

_LENGTHS = (
    _CHOICE("a fixed length", "2211.17192", "--control fixed", "always as much as may be"),
    _CHOICE("Su et al.", "2310.18813", _CONTROL, "by batch size, in each step; `longspec bench batch` shows it"),
    _CHOICE("Nightjar", "2512.22420", _CONTROL, "measured tokens per second, none among the choices; memory back"),
    _CHOICE(
        "Cerberus' gate", "2410.13344", "--control entropy", "limits by the last entropy, which `longspec tune` fits"
    ),
    _CHOICE("SpecDec++", "2405.19715", "", "calibrated probabilities say where to stop, without a trained predictor"),
)

_EXACT = (
    Method("greedy verification", "1811.03115", "--temperature 0", "blockwise parallel decoding's rule"),
    Method(
        "speculative sampling's rule",
        "2302.01318",
        "",
        "the target's own sampled token is compared: noise is fixed by "
        "position, so that the text is plain decoding's token for token, which min(1, p/q) isn't",
    ),
    Method("tokens by fixed noise", "", "--drafter none", "plain decoding: what every other drafter's text is held to"),
    Method("SpecTr", "2310.15141", "", _OTHER),
    Method("block verification", "2403.10444", "", _OTHER),
    Method("greedy multi-path block verification", "2602.16961", "", _OTHER),
    Method("batches done right", "2510.22876", "--strict", "tests hold each text of a batch to the one written alone"),
    Method("what bf16 does to greedy paths", "2609.15504", "--dtype fp32", "the C kernels are exact in bf16 too"),
    Method("Lossless but Not Free", "2607.17283", _CONTROL, "what doesn't pay on a machine isn't drafted there"),
)

_INEXACT = (
    Method("typical acceptance", "2401.10774", "", _LOSSY),
    Method("BiLD", "2302.07863", "", _LOSSY),
    Method("judge decoding", "2501.19309", "", _LOSSY),
    Method(
        "SemanticSpec",
        "2602.03708",
        "--accept semantic:FOLDER",
        "lossy, and never by itself: one probe and a threshold; `longspec train semantic`",
    ),
    Method("SpecReason", "2504.07891", "", _LOSSY),
    Method("Lookahead Reasoning", "2506.19830", "", "it changes what is written, and takes three models"),
    Method("SpecPV", "2512.02337", "", _LOSSY),
    Method("Dustin", "2606.24957", "", _LOSSY),
)

VERIFICATION: Mapping[str, Sequence[Method]] = {
    "Trees": _TREES,
    "How much is drafted": _LENGTHS,
    "Exact verification": _EXACT,
    "Lossy verification": _INEXACT,
}
