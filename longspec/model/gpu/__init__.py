"""CUDA graphs of the decoder, and their Triton kernels."""
