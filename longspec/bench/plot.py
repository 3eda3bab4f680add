"""Plots of committed results, by matplotlib (`pip install 'longspec[bench]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longspec.errors import UsageError

__all__ = ["draw_batches", "draw_caches", "draw_drafters", "draw_engines", "draw_heads", "load_matplotlib"]


def draw_caches(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot perplexity, bytes and speed of each kind against dense, at each context, as three panels in one file."""
    contexts = sorted({row["context"] for row in rows})
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    by = {(row["kind"], row["context"]): row for row in rows}
    figure = _figure(11, 3.6)
    panels = (("bytes_per_token", "bytes per token"), ("perplexity", "perplexity"), ("tokens_per_second", "tokens/s"))
    for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for i, context in enumerate(contexts):
            found = [(place, by[kind, context][name] / by["dense", context][name]) for place, kind in enumerate(kinds)
                     if (kind, context) in by and ("dense", context) in by]  # fmt: skip
            width = 0.8 / len(contexts)
            axes.bar(
                [place + i * width for place, _ in found], [value for _, value in found], width, label=f"{context:,}"
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks([place + 0.4 for place in range(len(kinds))], kinds, rotation=35)
        axes.set_title(f"{title}, dense = 1")
    axes.legend(title="context", fontsize=8)
    figure.savefig(path)


def draw_drafters(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot each drafter's speed-up over `none`, by category, as groups of bars."""
    categories = list(dict.fromkeys(row["category"] for row in rows))
    names = [name for name in dict.fromkeys(row["drafter"] for row in rows) if name != "none"]
    ratio = {(row["category"], row["drafter"]): row["ratio"] for row in rows}
    figure = _figure(max(6.0, 0.9 * len(categories) + 1), 3.6)
    axes = figure.subplots()
    width = 0.8 / len(names) if names else 0.8
    for i, name in enumerate(names):
        places = [place + i * width for place in range(len(categories))]
        axes.bar(places, [ratio[category, name] for category in categories], width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(categories))], categories, rotation=35, ha="right")
    axes.set_ylabel("tokens/s, none = 1")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars
    figure.savefig(path)


def draw_engines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot each engine's tokens per second by case, as groups of bars with the spread over rounds."""
    cases = list(dict.fromkeys((row["case"], row["width"]) for row in rows))
    names = list(dict.fromkeys(row["engine"] for row in rows))
    figure = _figure(max(6.0, 1.1 * len(cases) + 1), 3.8)
    axes = figure.subplots()
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in rows if row["engine"] == name]
        rates = [row["tokens_per_second"] for row in mine]
        below = [rate["median"] - rate["least"] for rate in rates]
        above = [rate["most"] - rate["median"] for rate in rates]
        places = [cases.index((row["case"], row["width"])) + i * width for row in mine]
        axes.bar(places, [rate["median"] for rate in rates], width, yerr=[below, above], label=name,
                 error_kw={"linewidth": 0.7})  # fmt: skip
    said = [name if side == 1 else f"{name} x {side}" for name, side in cases]
    axes.set_xticks([place + 0.425 - width / 2 for place in range(len(cases))], said, rotation=35, ha="right")
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars
    figure.savefig(path)


def draw_batches(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot tokens per second over the number of texts, a line for each draft length, and the control's."""
    figure = _figure(6.4, 3.8)
    axes = figure.subplots()
    texts = [row["texts"] for row in rows]
    for name in rows[0]["tokens_per_second"]:
        style = {"color": "black", "linewidth": 2, "linestyle": "--"} if name == "auto" else {"marker": "o"}
        label = "auto" if name == "auto" else f"{name} drafted"
        axes.plot(texts, [row["tokens_per_second"][name] for row in rows], label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(texts, [str(count) for count in texts])
    axes.set_xlabel("texts side by side")
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines
    figure.savefig(path)


def draw_heads(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot each head's accuracy over the depths, and its tokens per step with a chain and with a tree."""
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for row in rows:
        left.plot(range(1, len(row["accuracy"]) + 1), row["accuracy"], marker="o", label=row["head"])
    left.set(xlabel="depth", ylabel="right behind true tokens", ylim=(0, 1))
    left.legend(fontsize=8)
    for i, name in enumerate(("chain", "tree")):
        values = [row["tokens_per_step"][name] for row in rows]
        right.bar([place + i * 0.4 for place in range(len(rows))], values, 0.4, label=name)
    right.set_xticks(
        [place + 0.2 for place in range(len(rows))], [row["head"] for row in rows], rotation=35, ha="right"
    )
    right.set_ylabel("tokens per step")
    right.legend(fontsize=8)
    figure.savefig(path)


def load_matplotlib() -> Any:
    """The module of figures. Raises UsageError where matplotlib isn't installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("A plot needs matplotlib: pip install 'longspec[bench]'.") from error
    return Figure


def _figure(width: float, height: float) -> Any:
    return load_matplotlib()(figsize=(width, height), layout="constrained")
