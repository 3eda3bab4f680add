"""The machine and its files: cores, memory, cache folders, tuned settings."""
