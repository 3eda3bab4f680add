"""A server whose model takes tools, for all clients of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.agents import agent
from support.servers import Served, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(agent(tmp_path_factory.mktemp("agent"))) as up:
        yield up
