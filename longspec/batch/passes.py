"""How long a batch's passes took, by the texts and the prompt tokens in them: measured in one run, the model of others.

Takes seconds of passes; gives the table that --summary writes, and from such a table the expected seconds of any pass.
Knows no clock and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longspec.errors import UsageError

__all__ = ["PassTimes"]

_STEP = 64
"""Prompt tokens are counted in blocks, as chunks are cut."""


class PassTimes:
    """Passes by (texts, blocks of prompt tokens): how many, and their seconds, with all that lay between them."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], list[float]] = {}

    def add(self, texts: int, prompt_tokens: int, seconds: float, passes: int = 1) -> None:
        seen = self._seen.setdefault((texts, -(-prompt_tokens // _STEP)), [0, 0.0])
        seen[0] += passes
        seen[1] += seconds

    @property
    def seconds(self) -> float:
        """Of all passes."""
        return sum(seconds for _, seconds in self._seen.values())

    def report(self) -> list[dict[str, Any]]:
        """The table, for a file."""
        return [
            {"texts": texts, "prompt_tokens": blocks * _STEP, "passes": int(passes), "seconds": round(seconds, 6)}
            for (texts, blocks), (passes, seconds) in sorted(self._seen.items())
        ]

    @classmethod
    def of(cls, table: object, name: str) -> PassTimes:
        """A table that `report` made. name: the file's, for an error. UsageError where it isn't one."""
        times = cls()
        try:
            for row in table:  # type: ignore[attr-defined]
                texts, prompt, passes = (int(row[field]) for field in ("texts", "prompt_tokens", "passes"))
                seconds = float(row["seconds"])
                if not (0 <= texts <= 1 << 16 and 0 <= prompt <= 1 << 24 and passes > 0 and 0 < seconds < 1e12):
                    raise ValueError(row)
                times.add(texts, prompt, seconds, passes)
        except (TypeError, KeyError, ValueError) as error:
            raise UsageError(
                f"{name} has no passes that a run measured; give the --summary of a longspec batch on such a machine."
            ) from error
        if not any(texts for texts, _ in times._seen):
            raise UsageError(f"{name} has no pass that wrote; measure a longer run.")
        return times

    @property
    def widest(self) -> int:
        """The most texts of a measured pass."""
        return max(texts for texts, _ in self._seen)

    def expected(self, width: int, blocks: int) -> list[list[float]]:
        """Seconds of a pass by [texts][blocks of prompt tokens], up to so many of each.

        By least squares, weighted by passes: seconds = a + b texts + c texts^2 + d (some prompt) + e blocks, since a
        pass has a cost of its own (reading the weights), one for each text, and one for a prompt's rows. Where a cell
        was measured often its own mean is taken.
        """
        cells = np.array([[texts, part, passes, seconds] for (texts, part), (passes, seconds) in self._seen.items()])
        root = np.sqrt(cells[:, 2])
        fitted, *_ = np.linalg.lstsq(_terms(cells[:, 0], cells[:, 1]) * root[:, None], cells[:, 3] / root, rcond=None)
        texts, parts = np.meshgrid(np.arange(width + 1.0), np.arange(blocks + 1.0), indexing="ij")
        table = (_terms(texts.ravel(), parts.ravel()) @ fitted).reshape(texts.shape)
        floor = min(seconds / passes for passes, seconds in self._seen.values()) / 2
        table = np.maximum(table, floor)
        for (text, part), (passes, seconds) in self._seen.items():
            if text <= width and part <= blocks:
                weight = passes / (passes + _OFTEN)
                table[text, part] += weight * (seconds / passes - table[text, part])
        found: list[list[float]] = table.tolist()
        return found


_OFTEN = 20
"""Passes of a cell whose mean weighs as much as the fit: on a shared machine a pass varies by a tenth or more."""


def _terms(texts: Sequence[float] | np.ndarray, blocks: Sequence[float] | np.ndarray) -> np.ndarray:
    texts, blocks = np.asarray(texts), np.asarray(blocks)
    return np.stack([np.ones_like(texts), texts, texts**2, blocks > 0, blocks], axis=-1).astype(float)
