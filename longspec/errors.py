"""What can go wrong, as a tree. Each error is one sentence for a person, and knows its exit code.

    LongspecError          1  failed while running
    ├── UsageError         2  a wrong option, or input that can't be used
    │   └── ContextError   2  more tokens than the model's context holds
    ├── ModelError         3  the model can't be had, read, or isn't supported
    └── BudgetError        4  the memory budget can't be met

A message says what was seen, what was wanted, and what to do. The command prints it and exits with `exit_code`.
"""

__all__ = ["BudgetError", "ContextError", "LongspecError", "ModelError", "UsageError"]


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
