"""The target in int8: every weight a code with a scale for its output, every row coded by its own largest value.

Takes a decoder in bf16 and tokens to calibrate on, and makes its layers and its head codes; half of the bytes are read,
and sums of codes are exact integers, so that a row's bits depend on nothing beside it. The embedding, attention and
norms stay as they are.

Some channels of a row are a hundred times larger than others and leave them few codes (LLM.int8(), 2208.07339). So
channels are divided by s and the weights' columns multiplied (SmoothQuant, 2211.10438), s = a^0.65 / w^0.35 by the
largest activation a that calibration saw and the largest weight w of the column. It costs nothing when decoding: norms
and the MLP's upper half take the division. Perplexity of the default model on 3,000 tokens of documents, against bf16:
+4.6% without it, +1.7% with an exponent of 0.5, +0.7% with 0.65, +3.5% with 0.8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["TEXT", "Coded", "Watched", "coded_layer", "divided", "smoothing"]

_EXPONENT = 0.65

TEXT = """\
The mill stood where the river bends, and for two hundred years nobody had thought of moving it. "You could," said the
engineer, "but you would have to move the river too." In 1894 it ground 3,200 tons of rye; ten years later, 410.

Question: A shop sells pens at $1.25 each. How much do 16 pens cost, with a discount of 10%? Answer: 16 x 1.25 = 20.00,
and 20.00 - 2.00 = 18.00, so they cost $18. First we multiply, then we subtract; the result must be smaller than 20.

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)

- Mix 200 g of flour, 2 eggs and a pinch of salt.
- Let it rest for 30 minutes; then roll it out thinly.

Dear Ms. Ito, thank you for your letter of 12 March. I'm sorry that the parcel hasn't arrived. We've sent another one.

Der Zug faehrt um 7:45 Uhr ab. Le chat dort sur la chaise. El museo abre a las diez.

| city | people | since |
| Oslo | 709,037 | 1048 |

In summary, photosynthesis turns light, water and carbon dioxide into sugar and oxygen, while respiration reverses it.
What matters is not only how much light there is, but also how warm the leaf becomes; above 40 degrees the enzymes fail.
"""
"""What a model is calibrated on, unless something else is given: prose, figures, code, lists, letters, tables."""


class Watched:
    """A linear layer that remembers the largest magnitude of each channel of what came in."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear
        self.largest: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        largest = rows.float().abs().amax(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        result: Tensor = self.linear(rows)
        return result


class Coded:
    """y = x W^T + b by codes, for x [r, in]: torch's form, and what a kernel needs to do it in its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Weight [out, in] fp32."""
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)  # [out] fp32
        self.weight = (weight / self.scale[:, None]).round().to(torch.int8)
        self.bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        values = rows.float()
        scale = (values.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
        # Sums of products of codes reach 127 * 127 * width, which fp32 doesn't hold exactly.
        sums = (values / scale).round().double() @ self.weight.double().T
        made = sums.float() * (scale * self.scale)
        return (made if self.bias is None else made + self.bias.float()).to(rows.dtype)


def smoothing(weight: Tensor, largest: Tensor) -> Tensor:
    """S [in] of one product's columns, fp32."""
    columns = weight.float().abs().amax(0).clamp(min=1e-5)
    return largest.clamp(min=1e-5) ** _EXPONENT / columns ** (1 - _EXPONENT)


def coded_layer(layer: Any, watched: Any) -> Any:
    """A decoder's layer in codes. watched: the same layer, with what came into its linear parts."""
    before = smoothing(layer.qkv.weight, watched.qkv.largest)
    middle = smoothing(layer.gate_up.weight, watched.gate_up.largest)
    inner = smoothing(layer.down.weight, watched.down.largest)
    gate_up = layer.gate_up.weight.float() * middle
    gate_up[len(inner) :] /= inner[:, None]
    bias = layer.gate_up.bias
    if bias is not None:
        bias = torch.cat((bias[: len(inner)], (bias[len(inner) :].float() / inner).to(bias.dtype)))
    return replace(
        layer,
        before_attention=divided(layer.before_attention, before),
        before_mlp=divided(layer.before_mlp, middle),
        qkv=Coded(layer.qkv.weight.float() * before, layer.qkv.bias),
        output=Coded(layer.output.weight.float(), layer.output.bias),
        gate_up=Coded(gate_up, bias),
        down=Coded(layer.down.weight.float() * inner, layer.down.bias),
    )


def divided(norm: Any, by: Tensor) -> Any:
    """The norm whose result is smaller by so much."""
    return replace(norm, weight=(norm.weight.float() / by).to(norm.weight.dtype))
