"""The command line. `main` is the process around it, `app` its subcommands; each of those has a file of its own."""

from time import perf_counter, process_time

# On perf_counter's clock. An interpreter's start is CPU-bound, so its CPU time so far is its age. The system's start
# time of the process counts from the fork, which may be long before a shell's `exec`.
BEGAN = perf_counter() - process_time()
"""When this process began."""
