"""A batch as a Ray Dataset: read once by one task, written by a pool of actors, and given back group by group.

Takes an input as `longspec.batch.inputs` does; gives reports as they come. A group is a block, a call and a block
again, whole or not at all: what Ray repeats after an actor or a node was lost is a whole group, whichever texts were
done. So nothing is lost; who takes the reports leaves out what it has already.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import chdir, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspec.batch.inputs import open_input
from longspec.batch.marks import Marks, fresh
from longspec.errors import LongspecError
from longspec.ray.actor import Actor, Order, Report

if TYPE_CHECKING:
    from longspec.batch.requests import Fault, Item
    from longspec.ray.cluster import Places

__all__ = ["Source", "group_size", "reports"]

MOST = 32
"""Records of a call at most: a call costs some 20 ms, and all texts of a call that an actor died with are written anew.
"""

_SHARES = 8
"""Of an input of known length an eighth is given out at a time at most: no actor is left with much at the end."""

_RETRIES = 8
"""Times that a group is given out again after its actor has died: a record that kills its process must not do so for
ever."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input that a task opens on the driver's node: parameters of `open_input`, and how many records to take."""

    given: tuple[str, ...]
    form: str | None
    template: str | None
    files_from: str | None
    null: bool
    limit: int | None
    folder: str
    group: int = 1  # records of a call

    def groups(self, finished: Marks) -> Iterator[list[Item | Fault]]:
        """The records that aren't finished, some at a time."""
        with (
            chdir(self.folder) if Path(self.folder).is_dir() else nullcontext(),
            open_input(
                self.given, form=self.form, template=self.template, files_from=self.files_from, null=self.null
            ) as source,
        ):
            records = fresh(islice(source.records, self.limit), finished)
            while group := [*islice(records, self.group)]:
                yield group


def group_size(records: int, texts: int) -> int:
    """Records of a call. records: how many there are, about; 0 if unknown. texts: those in the passes of all actors,
    each of which has as many calls at once: its passes are full even where every call waits for its last text.
    """
    return min(MOST, max(1, records // (_SHARES * texts))) if records else MOST // 4


def reports(source: Source, finished: Marks, order: Order, places: Places, width: int) -> Iterator[Report]:
    """Write the batch on the cluster that this process is connected to. width: texts in an actor's pass.

    Raises:
        LongspecError: the input can't be read, or Ray gave up.
    """
    import ray.data
    from ray.exceptions import RayError

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # a group is a block: Ray would gather them up to 128 MB
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        with warnings.catch_warnings():
            # Ray 2.60 says that `max_task_retries` and the like go in 2.64, and has no other way yet.
            warnings.simplefilter("ignore", DeprecationWarning)
            dataset = _dataset(ray, source, finished, order, places, width)
        try:
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                for data in batch["report"]:
                    yield pickle.loads(data)  # noqa: S301  from our own actors
        except RayError as error:
            raise _told(error) from error


def _dataset(ray: Any, source: Source, finished: Marks, order: Order, places: Places, width: int) -> Any:
    read = ray.data.read_datasource(_datasource(source, finished), override_num_blocks=1, num_cpus=0)
    pool = ray.data.ActorPoolStrategy(
        size=places.actors, max_tasks_in_flight_per_actor=width + 2, enable_true_multi_threading=True
    )
    return read.map_batches(
        Actor,
        batch_size=1,
        batch_format="numpy",
        compute=pool,
        fn_constructor_args=(order,),
        max_concurrency=width,
        max_task_retries=_RETRIES,
        **places.needs,
    )


def _datasource(source: Source, finished: Marks) -> Any:
    """Ray's view of the input: one task that yields it."""
    import pyarrow
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Groups(Datasource):
        def get_read_tasks(self, parallelism: int, *args: Any, **keywords: Any) -> list[Any]:
            return [ReadTask(read, BlockMetadata(None, None, None, None))]

        def estimate_inmemory_data_size(self) -> None:
            return None

        @property
        def supports_distributed_reads(self) -> bool:
            return False  # it is read on the driver's node

    def read() -> Iterator[Any]:
        for group in source.groups(finished):
            yield pyarrow.table({"group": pyarrow.array([pickle.dumps(group)], pyarrow.large_binary())})

    return Groups()  # type: ignore[no-untyped-call]


def _told(error: BaseException) -> LongspecError:
    """Ray's error as one of ours: the one that a task raised, or Ray's own in a sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LongspecError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    if "No module named 'longspec" in str(error):
        return LongspecError("A node of the Ray cluster has no longspec; install the same version on every node.")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = (lines or [""])[-1][:300].rstrip(".")
    return LongspecError(
        f"Ray gave up on the batch ({type(error).__name__}: {said}); the same command goes on from there."
    )
