"""Heads that others have trained, in the layouts that they are published in."""
