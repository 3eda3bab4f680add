"""Weights from safetensors and GGUF files, dense or quantized."""
