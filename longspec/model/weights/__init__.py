"""Weights from safetensors and packed files, dense and as quantized codes."""
