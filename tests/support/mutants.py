"""Mutants: bytes and JSON values, damaged by a generator of random numbers, and so the same for the same seed."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64 - 1,
]
"""Where arithmetic breaks."""
VALUES: list[Callable[[], Any]] = [
    *(lambda n=n: n for n in NUMBERS),
    *(lambda x=x: x for x in (0.5, 1e30, -1e30, 1e-45, float("nan"), float("inf"), -float("inf"), 10**40)),
    *(lambda x=x: x for x in (None, True, False, "", "a", "\0", "../a", "\ud800", "a" * 5000, "1e999")),
    list, dict, lambda: [1], lambda: [None], lambda: ["a"], lambda: {"a": 1}, lambda: [[[[]]]],
]  # fmt: skip


def of_bytes(data: bytes, random: Random, head: int = 4096) -> bytes:
    """One to four changes, four of five within the first `head` bytes: that is where lengths and names are."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        most = min(head, len(made)) if random.random() < 0.8 else len(made)
        at = random.randrange(most) if most else 0
        size = random.choice((1, 2, 4, 8, 16, 64, 1000))
        match random.randrange(8):
            case 0 if made:
                made[at] ^= 1 << random.randrange(8)
            case 1 if made:
                made[at] = random.randrange(256)
            case 2:
                form, mask = random.choice((("<H", 2**16), ("<I", 2**32), ("<Q", 2**64)))
                number = struct.pack(form, random.choice(NUMBERS) % mask)
                made[at : at + len(number)] = number
            case 3:
                del made[at : at + size]
            case 4:
                made[at:at] = made[at : at + size]
            case 5:
                made[at:at] = random.randbytes(size)
            case 6:
                del made[at:]
            case 7:
                other = random.randrange(len(made)) if made else 0
                made[at : at + size] = made[other : other + size]
    return bytes(made)


def of_json(value: Any, random: Random) -> Any:
    """One to three changes of values, names, or the shape of a JSON value, which stays as it is."""
    made = [copy.deepcopy(value)]
    for _ in range(random.choice((1, 1, 2, 3))):
        held, name = random.choice(_places(made))
        match random.randrange(6):
            case 0 | 1 | 2:
                held[name] = random.choice(VALUES)()
            case 3:
                number = held[name]
                plain = isinstance(number, int | float) and not isinstance(number, bool)
                held[name] = random.choice((-number, number * 2, number + 1, number / 2)) if plain else [number]
            case 4 if isinstance(held, dict):
                held[random.choice(("a", "\0", f"{name} ", "tokens"))] = held.pop(name)
            case _ if held is not made:
                del held[name]
    return made[0]


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Every value within lists and objects, by what holds it and where; of a long list, its ends."""
    found: list[tuple[Any, Any]] = []
    left: list[Any] = [root]
    while left:
        held = left.pop()
        names = list(held) if isinstance(held, dict) else [*range(min(len(held), 3)), *range(len(held))[3:][-2:]]
        found += [(held, name) for name in names]
        left += [held[name] for name in names if isinstance(held[name], dict | list)]
    return found or [(root, 0)]
