"""Vocabularies of which each token is one letter, but for some special ones."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


def tokenizer_of(names: Sequence[str], merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """Token i is names[i]; what is no letter is made of two tokens, or is a special one."""
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, list(merges)))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
