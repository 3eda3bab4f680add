"""Backend of the CPU in bf16: the C kernel of `attention.c`.

It takes all segments of a pass and merges them itself, dequantizes blocks in registers, and loads keys and values
once for all query heads and positions. A position's bits depend on the position and the columns it attends to, not on
the other positions or on the buffers: adjacent segments are computed as one. Milliseconds for one layer of the
default model at 7,000 columns on two cores with AMX, for 1 and for 9 positions:

    dense 0.35, 0.61    int8 0.30, 0.51    int4 0.37, 0.56    dual 0.50, 0.72    dense by torch 0.72, 1.01
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from longspec.cache.native import Pieces, kernel, reading_of, segment_of, unfit
from longspec.cache.stage import Segment
from longspec.kernels.boundary import workspace
from longspec.kernels.team import team

__all__ = ["USE", "attend", "missing", "refuses"]

USE = "bf16 on the CPU"


def missing() -> str | None:
    """The reason why this machine can't run it; None where it can."""
    found = kernel()
    return found if isinstance(found, str) else None


def refuses(queries: Tensor, part: Segment) -> str | None:
    """The reason why it can't take a pass with these queries [q, H, D] and this first segment; None where it can."""
    return unfit(queries.dtype, queries.device, queries.shape[2])


def attend(
    queries: Tensor, parts: Iterable[Segment], scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention of queries [q, H, D] over all segments, at least one of which has columns; [q, H, D].

    sinks: [H] in fp32, as of `longspec.attention.attend`.
    """
    library, (of_all, threads) = kernel(), team()
    if isinstance(library, str):
        raise RuntimeError(library)
    queries = queries.contiguous()
    output = torch.empty(queries.shape, dtype=queries.dtype)
    reading = state = None
    for run, is_last in _runs(parts):
        begin = reading is None
        if reading is None or state is None:
            reading = reading_of(queries, run[0], scale, softcap, sinks)
            state = torch.empty(library.attention_state(reading), dtype=torch.uint8)
        held: list[Tensor] = []
        segments = (Pieces * len(run))(*(segment_of(part, len(queries), queries.shape[2], held) for part in run))
        room = workspace("attention", library.attention_workspace(reading, segments, len(run), threads))
        target = output.data_ptr() if is_last else None
        library.attention_read(
            reading, segments, len(run), begin, room.data_ptr(), threads, state.data_ptr(), target, of_all
        )
        del held
    return output


def _runs(parts: Iterable[Segment]) -> Iterator[tuple[list[Segment], bool]]:
    """Groups of non-empty segments, adjacent dense ones together; and whether the group is the last."""
    run: list[Segment] = []
    for part in parts:
        if not part.columns:
            continue
        if run and not _follows(run[-1], part):
            yield run, False
            run = []
        run.append(part)
    if run:
        yield run, True


def _follows(before: Segment, part: Segment) -> bool:
    if before.chosen is not None:  # nothing waits behind codes whose exact rows are there
        return True
    return not before.is_coded and not part.is_coded and before.start + before.columns == part.start
