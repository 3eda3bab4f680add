"""Text processing: tokenizer, detokenizer, chat templates, prompt templates, reasoning sections, repetition."""
