"""Many prompts from a file, their answers to a file: read as a stream, written line by line, resumed where it ended.

    inputs -> Item or Fault -> fresh (what isn't finished) -> job -> Written or Fault -> order -> output

Nothing here prints, draws or catches signals.
"""

FORMATS = ("jsonl", "openai", "csv", "tsv", "lines", "files")
"""What an input may be."""
