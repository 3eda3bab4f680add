"""The engine: open a session, draft, run the target, verify, commit, and many of them side by side."""
