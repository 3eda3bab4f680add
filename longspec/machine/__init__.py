"""The machine and its files: cores, memory, cache folders, settings that were tuned for it."""
