"""GGUF files: header, config, tokenizer, tensors."""
