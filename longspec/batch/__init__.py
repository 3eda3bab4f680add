"""Batch jobs: many prompts from a file, their answers to a file, streamed line by line and resumable.

    inputs -> Item or Fault -> fresh (not finished yet) -> job -> Written or Fault -> order -> output

Nothing here prints, draws or catches signals.
"""

from pathlib import Path

FORMATS = ("jsonl", "openai", "csv", "tsv", "parquet", "lines", "files")
"""What an input may be."""


def meta_path(output: Path) -> Path:
    """The file of the settings that an output was begun with."""
    return output.with_name(f"{output.name}.meta.json")


def beside(output: Path) -> Path:
    """The file that an output is copied to without its error lines."""
    return output.with_name(f"{output.name}.tmp")


def is_parts(output: str) -> bool:
    """Whether an output of this name is a folder of files."""
    return "://" in output or output.endswith(("/", ".parquet"))
