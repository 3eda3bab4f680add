"""The names of tokens that end a text or a turn, whatever a checkpoint's files say of them.

Converters forget to name them, and give them wrong types. llama.cpp knows them by name, and many files rely on that.
Takes nothing; gives names.
"""

from __future__ import annotations

__all__ = ["TURN_ENDS"]

TURN_ENDS = frozenset(
    (
        "<|endoftext|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<turn|>",
        "<|tool_response>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "<｜end▁of▁sentence｜>",
        # The fill-in-the-middle models' padding, and what begins their next file or repository.
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<reponame>",
        "<|file_sep|>",
    )
)
