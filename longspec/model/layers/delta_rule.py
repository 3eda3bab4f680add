"""The gated delta rule over the rows of one block, by torch (`longspec.model.layers.gated_delta` has the equations).

Takes a history, a branch of it, and what the pass's rows bring; writes what the branch's rows read, and keeps in the
history what they leave: u, and the sum of log decays since the block's start. `chunked` is for all rows of a block at
once, a tree's too: ancestors are the triangle's mask. `recurrence` is the definition: the test of the other forms, and
what `--strict` runs where there is no kernel, since its sums don't depend on what else is in the pass.

Shapes: n rows, H value heads, K key heads, D their dimensions. All in fp32 but the sums, which reach -1000 in a block:
their differences would lose four digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longspec.cache.layout import Branch
from longspec.cache.state_stage import History

__all__ = ["Form", "Ingredients", "chunked", "recurrence"]


class Ingredients(NamedTuple):
    """What the rows of a pass bring; their keys are in the history too."""

    queries: Tensor  # [n, K, D]
    keys: Tensor  # [n, K, D]
    values: Tensor  # [n, H, D]
    decays: Tensor  # [n, H]: log a
    strengths: Tensor  # [n, H]: b

    def of(self, rows: slice | Tensor, key_of: Tensor) -> Ingredients:
        """Of these rows, with queries and keys [n, H, D] for each value head."""
        queries, keys, *others = (each[rows] for each in self)
        return Ingredients(queries[:, key_of], keys[:, key_of], *others)


Form = Callable[[History, Branch, Ingredients, Tensor, Tensor], None]
"""Computes a branch: history, branch, what the pass's rows bring, where what they read goes, each value head's key
head.
"""


def chunked(history: History, branch: Branch, every: Ingredients, read: Tensor, key_of: Tensor) -> None:
    """By one triangular solve: what is written at each row is a sum over what its ancestors write."""
    rows = every.of(branch.new, key_of)
    state, mask = history.state(branch), branch.mask.to(rows.queries.device)
    known, held = branch.known, history.rows
    count = branch.known_count
    queries, keys, values = (each.transpose(0, 1) for each in rows[:3])  # [H, n, D]
    k = torch.cat((held["k"][known][:, key_of], rows.keys)).transpose(0, 1)
    before = held["decay"][known][..., 0]  # [known, H]
    sums = mask[:, count:].double() @ rows.decays.double()
    if count:
        root = branch.roots.to(mask.device)
        sums = sums + torch.where(root[:, None] < 0, 0.0, before[root.clamp(min=0)])
    gaps = sums.T[:, :, None] - torch.cat((before, sums)).T[:, None]  # [H, n, known + n]
    weights = gaps.masked_fill(~mask, float("-inf")).float().exp()
    by_keys = (keys @ k.transpose(1, 2)) * weights
    faded, strength = sums.T[..., None].float().exp(), rows.strengths.T[..., None]
    u = held["u"][known].transpose(0, 1)
    wanted = strength * (values - faded * (keys @ state) - by_keys[..., :count] @ u)
    if len(rows.queries) > 1:
        triangle = strength * by_keys[..., count:]
        wanted = torch.linalg.solve_triangular(triangle, wanted, upper=False, unitriangular=True)
    history.keep(branch, u=wanted.transpose(0, 1), decay=sums[..., None])
    found = faded * (queries @ state) + ((queries @ k.transpose(1, 2)) * weights) @ torch.cat((u, wanted), 1)
    read[branch.new] = found.transpose(0, 1)


def recurrence(history: History, branch: Branch, every: Ingredients, read: Tensor, key_of: Tensor) -> None:
    """By the definition: each row's state from its parent's, one row after the other."""
    rows, held, known = every.of(branch.new, key_of), history.rows, branch.known
    keys, written, sums = held["k"][known][:, key_of], held["u"][known], held["decay"][known][..., 0]
    states, decays = {-1: history.state(branch)}, {-1: torch.zeros_like(rows.decays[0].double())}
    found, u, decay = (torch.empty_like(each) for each in (rows.values, rows.values, rows.decays.double()))
    for row, parent in enumerate(branch.parents):
        i = row - branch.known_count
        decays[row] = sums[row] if i < 0 else decays[parent] + rows.decays[i]
        faded = states[parent] * (decays[row] - decays[parent]).float().exp()[:, None, None]
        key = keys[row] if i < 0 else rows.keys[i]
        if i >= 0:
            u[i] = rows.strengths[i, :, None] * (rows.values[i] - (key[:, None] @ faded)[:, 0])
            decay[i] = decays[row]
        states[row] = faded + key[:, :, None] * (written[row] if i < 0 else u[i])[:, None]
        if i >= 0:
            found[i] = (rows.queries[i][:, None] @ states[row])[:, 0]
    history.keep(branch, u=u, decay=decay[..., None])
    read[branch.new] = found
