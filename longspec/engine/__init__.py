"""The engine: opens sessions, drafts, runs the target, verifies and commits, for one or many sequences per pass."""
