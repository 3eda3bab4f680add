"""Sampling: parameters, the sampler with its fixed noise, and verification by token equality."""
