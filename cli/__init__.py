"""The command. `main` is the process around it, `app` its subcommands; each of those has a file of its own."""

from time import perf_counter, process_time

# On perf_counter's clock. An interpreter that starts is busy, so the seconds of processor that it has had are its age.
# The system's own record counts from the fork, which may be long before the `exec` of a patient shell.
BEGAN = perf_counter() - process_time()
"""When this process began."""
