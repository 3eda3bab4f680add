"""Constraints on an answer: a grammar, and a thinking budget."""
