"""Plots of committed results, by matplotlib (`pip install 'longspec[bench]'`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from longspec.errors import UsageError

__all__ = ["draw_batches", "draw_caches", "draw_drafters", "draw_engines", "draw_heads", "load_matplotlib"]


def draw_caches(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot perplexity, bytes and speed of each kind over dense's, at the longest context that all kinds have."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    contexts = [{row["context"] for row in rows if row["kind"] == kind} for kind in kinds]
    context = max(set.intersection(*contexts))
    by = {row["kind"]: row for row in rows if row["context"] == context}
    figure = _figure(10, 0.32 * len(kinds) + 1.2)
    panels = (("bytes_per_token", "bytes per token"), ("perplexity", "perplexity"), ("tokens_per_second", "tokens/s"))
    for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        _bars(axes, {kind: by[kind][name] / by["dense"][name] for kind in kinds}, "{:.2f}", {"dense"})
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(f"{title}, dense = 1", fontsize=10)
    figure.suptitle(f"behind {context:,} tokens", fontsize=10)
    figure.savefig(path)


def draw_drafters(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot each drafter's speed-up over `none`: a bar for all prompts, and a point for each category."""
    names = [name for name in dict.fromkeys(row["drafter"] for row in rows) if name != "none"]
    ratio = {(row["drafter"], row["category"]): row["ratio"] for row in rows}
    categories = [category for category in dict.fromkeys(row["category"] for row in rows) if category != "all"]
    figure = _figure(8, 0.42 * len(names) + 1.2)
    axes = figure.subplots()
    _bars(axes, {name: ratio[name, "all"] for name in names}, "{:.2f}", set())
    for place, name in enumerate(names):
        axes.plot(
            [ratio[name, each] for each in categories], [place] * len(categories), "|", color="black", markersize=9
        )
        best = max(categories, key=lambda each: ratio[name, each], default=None)
        if best is not None:
            axes.annotate(best, (ratio[name, best], place), (6, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("tokens/s, none = 1; a stroke for each category of prompts, the best one named", fontsize=9)
    figure.savefig(path)


def draw_engines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot each engine's tokens per second: of all chats together and of each long text, one or several at once."""
    cases = list(dict.fromkeys((row["case"], row["width"]) for row in rows))
    lengths = {name: name.replace(",", "") for name, _ in cases if name.replace(",", "").isdecimal()}
    summed = [case for case in cases if case[0] == "all" or case[0] in lengths] or cases
    panels = [[row for row in rows if (row["case"], row["width"]) == case] for case in summed]
    sizes = [len(panel) for panel in panels]
    figure = _figure(8, 0.3 * sum(sizes) + 0.5 * len(panels) + 0.6)
    for axes, case, panel in zip(_stacked(figure, sizes), summed, panels, strict=True):
        rates = {row["engine"]: row["tokens_per_second"] for row in panel}
        ours = {name for name in rates if not name.startswith(("transformers", "llama"))}
        _bars(axes, {name: rate["median"] for name, rate in rates.items()}, "{:.1f}", rates.keys() - ours)
        for place, rate in enumerate(rates.values()):
            axes.plot([rate["least"], rate["most"]], [place, place], color="black", linewidth=1.2)
        what = "chats" if case[0] == "all" else case[0]
        what = f"behind {int(lengths[what]):,} tokens" if what in lengths else what
        axes.set_title(f"{what}, {'one' if case[1] == 1 else case[1]} at a time", fontsize=10, loc="left")
        axes.set_xlim(0, 1.15 * max(rate["most"] for row in rows for rate in [row["tokens_per_second"]]))
    figure.supxlabel("tokens/s: the median of the rounds, and a line from the least to the most", fontsize=9)
    figure.savefig(path)


def _bars(axes: Any, values: Mapping[str, float], form: str, others: Collection[str]) -> None:
    """Bars that lie, the first one at the top, each with its name and value; those of `others` are hatched."""
    names = list(values)
    bars = axes.barh(range(len(names)), list(values.values()), 0.7, color="#7fb2d9", edgecolor="#35506b")
    for bar, name in zip(bars, names, strict=True):
        if name in others:
            bar.set(facecolor="white", hatch="///")
        axes.annotate(form.format(values[name]), (0, bar.get_y() + bar.get_height() / 2), (4, 0),
                      textcoords="offset points", va="center", fontsize=8,
                      bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "linewidth": 0})  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _stacked(figure: Any, sizes: Sequence[int]) -> Sequence[Any]:
    """Axes below each other, as high as what they hold."""
    made = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=[size + 0.6 for size in sizes])
    return [row[0] for row in made]


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
    """Plot each head's accuracy over the depths, and its tokens per step with a chain and with a tree, 95 % intervals
    drawn in.
    """
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for row in rows:
        left.plot(range(1, len(row["accuracy"]) + 1), row["accuracy"], marker="o", label=row["head"])
    left.set(xlabel="depth", ylabel="right behind true tokens", ylim=(0, 1))
    left.legend(fontsize=8)
    for i, name in enumerate(("chain", "tree")):
        values = [row["tokens_per_step"][name] for row in rows]
        edges = [[abs(row["tokens_per_step_95"][name][side] - value) for row, value in zip(rows, values, strict=True)]
                 for side in (0, 1)]  # fmt: skip
        right.bar([place + i * 0.4 for place in range(len(rows))], values, 0.4, label=name, yerr=edges, capsize=2)
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
