"""Input and output of the command line: prompts, answers, progress, signals, and the client of a running server."""
