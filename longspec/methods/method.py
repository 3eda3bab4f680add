"""One row of the table of methods."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Method"]


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a paper. Without an option it isn't here, and `note` continues "not here, because".

    drafter: independent (something beside the target drafts) or self (its own weights or states do); centre: model (the
    method is about what drafts) or draft (it is about which drafts there are); empty where the question doesn't arise.
    """

    name: str
    paper: str  # its arXiv number; empty for what no paper there describes
    option: str  # how the command is asked for it
    note: str  # what of it is here, or the reason why nothing is
    drafter: str = ""
    centre: str = ""
    planned: bool = False  # not here as yet

    @property
    def reference(self) -> str:
        """Its name, and its paper's number."""
        return f"{self.name} ({self.paper})" if self.paper else self.name
