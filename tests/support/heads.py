"""Heads of all kinds."""

from __future__ import annotations

from typing import Any

import torch

from longspec.heads.format import Trained, new_head
from longspec.model.load import Model


def shaken(kind: str, model: Model, **options: Any) -> Trained:
    """A head whose every parameter matters."""
    head = new_head(kind, model, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return head


def some(model: Model) -> torch.Tensor:
    """Two thirds of the vocabulary."""
    return torch.tensor([i for i in range(model.decoder.config.vocabulary) if i % 3])
