"""Batch jobs: many prompts from a file, their answers to a file, streamed line by line and resumable.

    inputs -> Item or Fault -> fresh (not finished yet) -> job -> Written or Fault -> order -> output

Nothing here prints, draws or catches signals.
"""

FORMATS = ("jsonl", "openai", "csv", "tsv", "lines", "files")
"""What an input may be."""
