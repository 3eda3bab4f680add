"""The walk along the target's choices, against the plainest thing that it must equal: one token after another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longspec.sampling.verify import verify
from longspec.types import Commit, Draft, Stats, Verdict


def test_rejected_at_once() -> None:
    assert verify([5, 6], [-1, 0], [9, 6, 7]) == Verdict((), 9)


def test_rejected_in_the_middle() -> None:
    assert verify([5, 6, 7], [-1, 0, 1], [5, 8, 7, 1]) == Verdict((0,), 8)


def test_all_kept() -> None:
    assert verify([5, 6], [-1, 0], [5, 6, 7]) == Verdict((0, 1), 7)


def test_no_bet() -> None:
    assert verify([], [], [4]) == Verdict((), 4)


def test_the_branch_that_is_right() -> None:
    tokens, parents = [5, 6, 7, 8, 7], [-1, -1, 0, 1, 1]
    assert verify(tokens, parents, [6, 0, 7, 0, 0, 3]) == Verdict((1, 4), 3)


def test_of_twins_the_first() -> None:
    assert verify([5, 5, 6], [-1, -1, 1], [5, 6, 6, 0]) == Verdict((0,), 6)


@given(st.data())
def test_what_is_written_is_what_plain_decoding_writes(data: st.DataObject) -> None:
    """The target is any function of the path: what a verdict writes is that function applied again and again."""
    n = data.draw(st.integers(0, 12))
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(n)]
    tokens = [data.draw(st.integers(0, 2)) for _ in range(n)]
    salt = data.draw(st.integers(0, 1000))

    def target(path: tuple[int, ...]) -> int:
        return hash((salt, path)) % 3

    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*paths[parent + 1], token))
    verdict = verify(tokens, parents, [target(path) for path in paths])
    written = (*(tokens[i] for i in verdict.kept), verdict.bonus)
    plain: tuple[int, ...] = ()
    for _ in written:
        plain = (*plain, target(plain))
    assert written == plain
    assert all(b > a for a, b in zip(verdict.kept, verdict.kept[1:], strict=False))


def test_statistics_are_a_sum_of_commits() -> None:
    commits = [Commit((1, 2, 3), "abc", 4, 2), Commit((4,), "d", 0, 0), Commit((5,), "e", 2, 0, "stop")]
    total = sum(map(Stats.of, commits), Stats())
    assert total == Stats(steps=3, drafted=6, accepted=2, committed=5, steps_without_a_bet=1)
    assert total.tokens_per_step == 5 / 3
    assert total.acceptance == 2 / 6
    assert Stats().tokens_per_step == Stats().acceptance == 0


def test_a_draft_is_a_tree_and_a_chain_is_one() -> None:
    assert Draft.chain([4, 5, 6]).parents.tolist() == [-1, 0, 1]
    assert len(Draft.chain([])) == 0
    assert len(Draft.tree([4, 5], [-1, -1])) == 2
