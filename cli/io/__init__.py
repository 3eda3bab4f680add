"""Streams of the command: prompts in, answers out, progress, signals, the warm server."""
