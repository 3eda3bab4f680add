"""A deduplication set of records: 64-bit hashes, in 11 to 21 bytes each.

Among 20 million ids the probability of a collision is 1 in 90,000 (n^2 / 2^65); a record whose hash is taken counts
as a duplicate. A Python set of the ids takes one to two gigabytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator

from longspec.batch.requests import Fault, Id, Item

__all__ = ["Marks", "fresh", "mark_id", "mark_index"]

DUPLICATE = "duplicate_id"


class Marks:
    """A set of 64-bit hashes: open addressing in one array, which doubles at a load of three quarters."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, mark: int) -> bool:
        return self._slots[self._find(mark)] == mark

    def add(self, mark: int) -> bool:
        """Add a hash; returns whether it is new."""
        slot = self._find(mark)
        if self._slots[slot] == mark:
            return False
        self._slots[slot] = mark
        self._count += 1
        if self._count * 4 > len(self._slots) * 3:
            old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for each in old:
                if each:
                    self._slots[self._find(each)] = each
        return True

    def _find(self, mark: int) -> int:
        """The hash's slot, or the empty slot for it."""
        slots, last = self._slots, len(self._slots) - 1  # a power of two
        slot = mark & last
        while slots[slot] not in (0, mark):
            slot = (slot + 1) & last
        return slot


def mark_id(name: Id) -> int:
    """The hash of a record's id; 1 and "1" are equal, as they would have the same sampling noise."""
    return _mark(f"id {name}")


def mark_index(index: int) -> int:
    """The hash of a record without an id of its own, by its index."""
    return _mark(f"index {index}")


def _mark(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def fresh(records: Iterator[Item | Fault], finished: Marks) -> Iterator[Item | Fault]:
    """The records that aren't finished; one with an earlier record's id is a fault."""
    seen = Marks()
    for record in records:
        if record.id is None:
            mark = mark_index(record.index)
        elif seen.add(mark := mark_id(record.id)):
            pass
        else:
            mark = mark_index(record.index)
            record = Fault(record.index, record.id, "an earlier line has the same id", DUPLICATE)
        if mark not in finished:
            yield record
