"""OpenAI's client of npm and the AI SDK, where node and both are: NODE_CLIENTS names the folder whose node_modules has
them (`make test-clients`: build/clients).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.agents import agent
from support.commands import ROOT, SECONDS
from support.servers import serving

FOLDER = Path(os.environ.get("NODE_CLIENTS", ROOT / "build" / "clients"))
SCRIPT = Path(__file__).with_name("agent.mjs")


def test_the_clients_of_npm(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (FOLDER / "node_modules" / "ai").is_dir():
        pytest.skip("node, or its clients, aren't installed (make test-clients)")
    script = FOLDER / SCRIPT.name  # modules are looked for beside it
    shutil.copy(SCRIPT, script)
    with serving(agent(tmp_path)) as served:
        address = f"http://127.0.0.1:{served.port}/v1"
        done = subprocess.run([node, script, address], capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
