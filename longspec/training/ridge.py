"""Least squares over a training's texts, with which heads begin.

Takes a target and its features; gives the `Fit` that `Head.start` calls. It takes seconds: the sums X'X and X'Y over
some ten thousand rows, and one solution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspec.heads.format import Trained
from longspec.heads.head import Batch, unit
from longspec.heads.seen import Seen, batch_of
from longspec.model.load import Model
from longspec.training.features import Features
from longspec.training.lanes import Lanes

__all__ = ["begin", "ridge"]

ROWS = 32_768
"""Rows that are summed: 14 for each column of three layers and a token of the default model."""

STRENGTH = 0.01
"""Of the penalty, for inputs of a root mean square of 1."""


def begin(model: Model, head: Trained, features: Features, lanes: Lanes) -> None:
    """Set what least squares can find of an untrained head."""
    chosen, rows = [], 0
    for i in range(len(features)):
        number = i * 7919 % len(features)  # a prime, so that they are from all over; the same ones each time
        if number not in chosen:
            chosen.append(number)
            rows += len(features.seen(number, ()).tokens)
        if rows > ROWS:
            break
    layers = head.reads(model)
    with torch.no_grad():
        head.module.start(ridge(model, [features.seen(number, layers) for number in sorted(chosen)], layers, lanes))


def ridge(model: Model, texts: Sequence[Seen], layers: Sequence[int], lanes: Lanes) -> Callable[..., Tensor]:
    """The `Fit` over these texts, whose sums are added in their order."""

    def fit(inputs: Callable[[Batch], Tensor], behind: int, layer: int | None = None) -> Tensor:
        @torch.no_grad()
        def summed(text: Seen) -> tuple[Tensor, Tensor, int]:
            batch, target = batch_of(model, [text], layers)
            final = unit(batch.states[model.decoder.config.layers if layer is None else layer])[0, behind:]
            given = inputs(batch)[0, : len(final)].float()
            final = final[: len(given)]
            counted = target.counted[0, behind : behind + len(given)]
            given, final = given[counted], final[counted]
            return given.T @ given, given.T @ final, len(given)

        squares: Tensor | float = 0.0
        products: Tensor | float = 0.0
        count = 0
        for square, product, rows in lanes.map(summed, texts):
            squares, products, count = squares + square, products + product, count + rows
        assert isinstance(squares, Tensor)
        assert isinstance(products, Tensor)
        penalty = STRENGTH * max(1, count) * torch.eye(len(squares), dtype=torch.float64, device=squares.device)
        solved: Tensor = torch.linalg.solve(squares.double() + penalty, products.double())
        return solved.T.float()

    return fit
