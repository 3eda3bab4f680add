"""Templates and vocabularies of models that think before they answer."""

from __future__ import annotations

from support.letters import tokenizer_of
from tokenizers import AddedToken

from longspec.text.tokenizer import Vocabulary

# In the manner of DeepSeek-R1's distilled models: the prompt opens the section, the history leaves thoughts out.
OPENS = """{% for m in messages %}{% if m.role == 'assistant' and '</think>' in m.content %}\
{{ 'a' + m.content.split('</think>')[-1] }}{% else %}{{ m.role[0] + m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'a<think>\n' }}{% endif %}"""
LEVELLED = "{% for m in messages %}{{ m.content }}{% endfor %}[{{ reasoning_effort|default('medium') }}]<think></think>"

ONE_TOKEN = ("<think>", "</think>")


def vocabulary(template: str | None, added: tuple[str, ...] = ONE_TOKEN, *, special: bool = False) -> Vocabulary:
    """Token i is one character, but for some special and some added ones; 2 ends a text, 5 is a newline."""
    names = ["<pad>", "<s>", "</s>", *(added or ("«", "»")), "\n", *(chr(33 + i) for i in range(90))]
    tokenizer = tokenizer_of(names)
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in added])
    return Vocabulary(tokenizer, {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}, template)
