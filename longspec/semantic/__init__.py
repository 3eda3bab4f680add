"""Acceptance by meaning: where reasoning steps end, when two of them mean the same, and the probe that judges one.

steps     tokens -> where a step ends
meaning   two steps -> whether they mean the same
probe     the target's hidden states over a step -> whether it stays

Lossy: what is accepted isn't what the target would have written.
"""
