"""Shared components of drafters: tree expansion, KV caches of heads, merging, layer-skipping search, suffix arrays."""
