"""The drawings of docs/how.md: what a step does, what a draft tree is, how a cache keeps its blocks.

`python docs/figures.py` writes docs/figures/*.svg; tests/project/test_docs.py holds that they are what this draws.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent / "figures"
TEXT, DRAFT, KEPT, BONUS, LEFT = "#e8eaf6", "#fff3cd", "#c8e6c9", "#90caf9", "#f5c6c6"
INK, FAINT = "#222", "#777"


class Drawing:
    """SVG, element by element, on white: it must be read on dark pages too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' font-family="system-ui, sans-serif" font-size="13" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto"><path d="M0 0L8 4L0 8z" fill="{FAINT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        ]

    def box(self, x: float, y: float, width: float, label: str, fill: str, *, dashed: bool = False) -> None:
        """30 high, its label in the middle."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="30" rx="4" fill="{fill}" stroke="{FAINT}"{dashes}/>'
        )
        self.say(x + width / 2, y + 20, label, anchor="middle")

    def say(self, x: float, y: float, text: str, *, anchor: str = "start", ink: str = INK, bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.lines.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{ink}"{weight}>{escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, arrow: bool = True, ink: str = FAINT) -> None:
        head = ' marker-end="url(#head)"' if arrow else ""
        width = 1.4 if ink == FAINT else 3
        self.lines.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{ink}" stroke-width="{width}" fill="none"{head}/>'
        )

    def svg(self) -> str:
        return "\n".join([*self.lines, "</svg>", ""])


def step() -> str:
    """Draft, one pass, verify, commit."""
    drawing = Drawing(830, 330, "One step: four tokens are drafted, one pass checks them all, three are kept")
    wide, gap, left = 74, 8, 130
    text, bets, truth = ["The", "sky", "is"], ["blue", "because", "of", "rain"], ["blue", "because", "of", "the"]

    def place(number: int) -> float:
        return left + number * (wide + gap)

    drawing.say(12, 40, "the text so far", bold=True)
    for number, word in enumerate(text):
        drawing.box(place(number), 20, wide, word, TEXT)
    drawing.say(12, 100, "1  draft", bold=True)
    for number, word in enumerate(bets):
        drawing.box(place(3 + number), 80, wide, word, DRAFT, dashed=True)
    drawing.say(place(0), 100, "a drafter bets on four tokens", ink=FAINT)
    drawing.say(12, 160, "2  one pass", bold=True)
    for number, word in enumerate([text[-1], *bets]):
        drawing.box(place(2 + number), 140, wide, word, TEXT if number == 0 else DRAFT, dashed=number > 0)
        drawing.line(place(2 + number) + wide / 2, 171, place(2 + number) + wide / 2, 196)
    drawing.say(place(0), 160, "five rows, together", ink=FAINT)
    drawing.say(12, 220, "3  verify", bold=True)
    for number, word in enumerate([*truth, "?"]):
        drawing.box(place(2 + number), 200, wide, word, [KEPT, KEPT, KEPT, BONUS, LEFT][number])
    drawing.say(place(0), 220, "what the target", ink=FAINT)
    drawing.say(place(0), 238, "writes after each", ink=FAINT)
    drawing.say(12, 290, "4  commit", bold=True)
    for number, word in enumerate([*text, *truth]):
        drawing.box(place(number), 270, wide, word, TEXT if number < 3 else KEPT if number < 6 else BONUS)
    drawing.say(place(7), 290, "4 tokens, 1 pass", ink=FAINT)
    return drawing.svg()


def tree() -> str:
    """Several continuations in one pass; the path that the target takes is kept."""
    drawing = Drawing(760, 315, "A draft tree: several ways to go on are verified in one pass, and one path is kept")
    nodes = {  # name: (label, chance, parent, x, y)
        "root": ("is", "", "", 40, 125),
        "blue": ("blue", "0.6", "root", 190, 65),
        "clear": ("clear", "0.3", "root", 190, 195),
        "because": ("because", "0.4", "blue", 360, 35),
        "today": ("today", "0.1", "blue", 360, 95),
        "tonight": ("tonight", "0.2", "clear", 360, 165),
        "and": ("and", "0.1", "clear", 360, 225),
        "of": ("of", "0.3", "because", 530, 35),
        "air": ("the", "", "of", 640, 35),
    }
    kept = {"blue", "because", "of"}
    wide = 84
    for name, (_, _, parent, x, y) in nodes.items():
        if parent:
            _, _, _, from_x, from_y = nodes[parent]
            ink = "#2e7d32" if name in kept else FAINT
            drawing.line(from_x + wide, from_y + 15, x, y + 15, arrow=False, ink=ink)
    for name, (label, chance, _, x, y) in nodes.items():
        fill = TEXT if name == "root" else BONUS if name == "air" else KEPT if name in kept else DRAFT
        drawing.box(x, y, wide, label, fill, dashed=name not in {*kept, "root", "air"})
        if chance:
            drawing.say(x + wide / 2, y + 44, chance, anchor="middle", ink=FAINT)
    drawing.say(12, 172, "the text's last token", ink=FAINT)
    drawing.say(640, 25, "the bonus", ink=FAINT)
    drawing.say(
        12, 300, "The number below a token is the chance that its drafter gives it; each row sees its own path only."
    )
    return drawing.svg()


def blocks() -> str:
    """Old blocks as codes, near ones dense, rows of a pass staged."""
    drawing = Drawing(760, 250, "A cache: blocks of 64 rows, old ones as codes, near ones dense, staged rows behind")
    x = 20.0
    for number in range(4):
        drawing.box(x, 60, 100, f"block {number}", "#d1c4e9")
        x += 106
    coded = x
    for number in (4, 5):
        drawing.box(x, 60, 100, f"block {number}", TEXT)
        x += 106
    drawing.say(20, 45, "codes of 8, 4 or 2 bits, with scales", ink=FAINT)
    drawing.say(coded, 45, "dense: the block being written, one before", ink=FAINT)
    drawing.box(x + 6, 60, 84, "staged", DRAFT, dashed=True)
    drawing.say(20, 130, "A pass", bold=True)
    drawing.say(90, 130, "stages its rows, the draft's among them, behind the text. Nothing of the text is touched.")
    drawing.say(20, 160, "Commit", bold=True)
    drawing.say(90, 160, "keeps the rows of the path that was verified. The others never were: nothing is undone.")
    drawing.say(20, 190, "Codes", bold=True)
    drawing.say(90, 190, "are made once, from rows that stay. A row reads a block as codes or dense by its own")
    drawing.say(90, 208, "position, never by the pass it came in, so that a draft can't change what is read.")
    return drawing.svg()


FIGURES = {"step.svg": step, "tree.svg": tree, "blocks.svg": blocks}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
