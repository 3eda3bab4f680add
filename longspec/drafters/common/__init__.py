"""What drafters share: tree expansion, head caches, merging of drafts, layer-skipping search, suffix arrays."""
