"""Mutants of files, requests, records and templates are read or refused: nothing crashes, hangs, or grows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import targets
from support.hostile import survey, survey_here
from support.sanitized import sanitized

FILES = ["ggufs", "folders", "heads", "snapshots"]
TARGETS = {name: f"hostile.targets:{name}" for name in FILES} | {
    "requests": "server.test_mutants:requests",
    "records": "server.test_mutants:records",
    "templates": "hostile.test_templates:templates",
}
"""All kinds; those that are no files have their hundred where they are tested."""


@pytest.mark.parametrize("name", FILES)
def test_a_hundred_mutants_are_read_or_refused(name: str, home: Path, tmp_path: Path) -> None:
    assert survey_here(getattr(targets, name), tmp_path, range(100)).failures == {}


@pytest.mark.full
@pytest.mark.parametrize("name", TARGETS)
def test_thousands_of_mutants_are_read_or_refused(
    name: str, home: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    made = survey(TARGETS[name], tmp_path, pytestconfig.option.mutants, pytestconfig.option.seed)
    print(f"\n{name}: {made}")
    assert made.failures == {}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return sanitized(tmp_path_factory.mktemp("sanitized"))


@pytest.mark.full
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_under_the_sanitizers_find_nothing_in_mutants(
    name: str, built: dict[str, str], home: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    count = pytestconfig.option.mutants
    made = survey(TARGETS[name], tmp_path, count, pytestconfig.option.seed, built)
    print(f"\n{name} under the sanitizers: {made}")
    assert made.failures == {}
