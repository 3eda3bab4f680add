"""The options of a batch that is written by the engines of a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from longspec.cli.options.groups import group, option
from longspec.cli.options.parsers import whole
from longspec.errors import UsageError

__all__ = ["Cluster"]


@group("Cluster")
class Cluster:
    """Where the engines run, and how many."""

    on: str | None = option(
        None,
        "Write the answers with several engines, on a Ray cluster: ray:HOST:PORT is one that runs, ray starts one on "
        "this machine. Needs pip install 'longspec[ray]'.",
        metavar="ray[:ADDRESS]",
    )
    actors: int | None = option(
        None,
        "At most N engines at a time. Each takes --threads CPUs, or a GPU; as many as the cluster has, if left out.",
        metavar="N",
        parser=whole(1),
    )

    @property
    def address(self) -> str | None:
        """The cluster's; None of one that is started on this machine. UsageError: Ray isn't installed."""
        from longspec.ray.cluster import where

        assert self.on is not None
        return where(self.on)

    def check(self, inputs: Sequence[str], files_from: str | None, *, in_order: bool) -> None:
        """Raise UsageError for what a cluster can't do, before anything is read."""
        if self.on is None:
            if self.actors is not None:
                raise UsageError("--actors says how many engines a cluster runs; add --on ray.")
            return
        _ = self.address
        if in_order:
            raise UsageError("--in-order would wait for the slowest engine of a cluster; leave it or --on out.")
        if "-" in (*inputs, files_from):
            raise UsageError("A pipe can't be read by a cluster's task; give --on a file.")
