"""Drafters that draft with a head: one file a way of drafting."""
