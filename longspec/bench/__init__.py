"""Benchmarks whose results are committed: each takes a loaded engine and gives plain values."""
