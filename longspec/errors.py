"""What can go wrong, as a tree. Each error is one sentence for a person, and knows its exit code.

    LongspecError          1  failed while running
    ├── UsageError         2  a wrong option, or input that can't be used
    │   └── ContextError   2  more tokens than the model's context holds
    ├── ModelError         3  the model can't be had, read, or isn't supported
    └── BudgetError        4  the memory budget can't be met

A message says what was seen, what was wanted, and what to do. The command prints it and exits with `exit_code`.
`reported` makes one of any exception, for places that go on with other texts after one has failed.
"""

__all__ = ["BudgetError", "ContextError", "LongspecError", "ModelError", "UsageError", "reported"]


class LongspecError(Exception):
    """Anything that longspec itself reports; catch this one to catch them all."""

    exit_code = 1


class UsageError(LongspecError):
    """The request can't be carried out as it was written."""

    exit_code = 2


class ContextError(UsageError):
    """The text, or the text that was asked for, is longer than the model's context."""


class ModelError(LongspecError):
    """The model's files can't be found, can't be trusted, or name an architecture that isn't supported."""

    exit_code = 3


class BudgetError(LongspecError):
    """No allowed choice of cache, chunk and drafter fits the memory budget."""

    exit_code = 4


def reported(error: Exception) -> LongspecError:
    """The error as longspec reports it: itself, a BudgetError where memory ran out, else one that names its type.

    The original exception is the result's `__cause__`.
    """
    if isinstance(error, LongspecError):
        return error
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        failure: LongspecError = BudgetError(
            f"The machine has no memory left for this text ({said[:200] or 'out of memory'}); write fewer texts at a "
            "time, give --memory, or take a smaller cache."
        )
    else:
        failure = LongspecError(
            f"The text could not be written: {type(error).__name__}: {said[:500]}".rstrip(": ") + "."
        )
    failure.__cause__ = error
    return failure


def _is_torch_out_of_memory(error: Exception) -> bool:
    """Whether torch could not allocate, on a GPU (a class of its own) or on the CPU (a RuntimeError that says so)."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
