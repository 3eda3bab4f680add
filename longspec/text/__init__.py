"""Between characters and tokens: tokenizer, chat templates, prompt templates, reasoning sections, repetition."""
