"""`longspec serve`: a loaded model behind OpenAI's API on this machine, and behind every `longspec run` that fits it.

Loads in the thread that will write; listens once that is done. What it says goes to stderr, stdout stays empty.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli.io import server_client as remote
from longspec.cli.io.progress import Progress
from longspec.cli.options import conflicts as precedence
from longspec.cli.options import shared as options
from longspec.cli.options.parsers import number, whole
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.engine.engine import Engine

__all__ = ["EPILOG", "serve"]

EPILOG = """\b
Examples:
  longspec serve
  longspec serve -m ~/models/qwen3 --port 9000 --parallel 8
  LONGSPEC_API_KEY=... longspec serve --host 0.0.0.0

\b
Clients of OpenAI's API take http://127.0.0.1:8000/v1 as their base URL.
While it is up, `longspec run` with the same model and method loads nothing.
It ends on Ctrl-C or SIGTERM: running answers get some seconds, then end with
what they have.
"""

_GRACE_SECONDS = 10.0
"""For answers that are being written when the process is asked to end."""

_PLANNED = "under a memory budget its cache may be another than the one that run would choose"
_NO_FOLDER = "the folder for its socket is missing, or isn't this user's alone"
_SERVER = "Server"


def serve(
    ctx: typer.Context,
    host: Annotated[
        str,
        typer.Option(
            "--host", metavar="NAME", rich_help_panel=_SERVER, help="The address to listen on: 127.0.0.1 if left out."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port",
            metavar="N",
            parser=whole(0, 65535),
            rich_help_panel=_SERVER,
            help="Its port: 8000; 0 takes a free one.",
        ),
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            rich_help_panel=_SERVER,
            help="What clients must send as their bearer token; needed where others reach the address. Better set as "
            "LONGSPEC_API_KEY, since every user of a machine can read arguments.",
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            "--parallel",
            metavar="N",
            parser=whole(1),
            rich_help_panel=_SERVER,
            help="Texts written at a time: 16, or with --memory 1, if left out.",
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting",
            metavar="N",
            parser=whole(0),
            rich_help_panel=_SERVER,
            help="Texts that may wait for their turn: 64. Whoever comes then is told to try again later.",
        ),
    ] = 64,
    time_limit: Annotated[
        float,
        typer.Option(
            "--time-limit",
            metavar="SECONDS",
            parser=number(0, open_below=True),
            rich_help_panel=_SERVER,
            help="An answer over the network ends after so long with what it has: 3600.",
        ),
    ] = 3600.0,
    model: options.Model = "smollm2",
    drafter: options.Drafter = "auto",
    draft_model: options.DraftModel = None,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    control: options.Control = "goodput",
    skip_set: options.SkipSet = None,
    draft_from: options.DraftFrom = None,
    cache: options.Cache = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    all_rows: options.AllRows = False,
    memory: options.Memory = None,
    strict: options.Strict = False,
    quiet: options.Quiet = False,
) -> None:
    """Keep a model loaded, and answer OpenAI's API with it on this machine."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"longspec serve needs {error.name}; install it with pip install 'longspec[serve]'.") from None
    from longspec.server.hosts import is_loopback

    if not is_loopback(host) and not api_key:
        raise UsageError(f"Others reach {host}, so clients need a key; set LONGSPEC_API_KEY, or leave --host out.")
    loading: dict[str, Any] = {
        "drafter": drafter,
        "draft_model": draft_model,
        "num_speculative_tokens": num_speculative_tokens,
        "control": control,
        "skip_set": skip_set,
        "draft_from": draft_from or (),
        "cache": cache,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "all_rows": all_rows,
        "strict": strict,
        "memory": memory,
    }
    precedence.betting(ctx, loading)
    if memory is not None:  # as for `batch`: each text is planned at the model's whole context
        parallel = loading["texts"] = parallel or 1
    with Progress(model, quiet=quiet) as progress:
        _serve(model, loading, host, port, api_key or None, parallel, max_waiting, time_limit, progress)


def _serve(
    model: str,
    loading: dict[str, Any],
    host: str,
    port: int,
    key: str | None,
    parallel: int | None,
    waiting: int,
    seconds: float,
    progress: Progress,
) -> None:
    import asyncio

    from longspec.engine.scheduler import WIDTH
    from longspec.server.api import at_home, open_to_clients
    from longspec.server.desk import Desk
    from longspec.server.hosts import names
    from longspec.server.listen import bind, bound_unix, listen
    from longspec.server.worker import Worker

    width = parallel or WIDTH
    folder, planned = remote.folder(make=True), loading["memory"] is not None
    # Of the files as they are now.
    path = None if folder is None or planned else remote.address(folder, model, loading)
    with bind(host, port) as door, ExitStack() as stack:
        worker = Worker(lambda: _load(model, loading, progress), width)
        worker.loaded.result()
        desk = Desk(worker, width + waiting, seconds)
        doors = [(open_to_clients(desk, model, names(host), key, progress.say), door)]
        home = None if path is None else stack.enter_context(bound_unix(path))
        if home is not None:
            doors.append((at_home(desk, progress.say), home))
        else:
            why = "another is used" if path else _PLANNED if planned else _NO_FOLDER
            progress.say(f"longspec run doesn't use this server: {why}")
        shown = f"[{host}]" if ":" in host else host
        said = f"{model} is served at http://{shown}:{door.getsockname()[1]}/v1; Ctrl-C ends it"
        asyncio.run(listen(desk, doors, _GRACE_SECONDS, lambda: progress.say(said)))
        worker.stop(_GRACE_SECONDS)


def _load(model: str, loading: dict[str, Any], progress: Progress) -> Engine:
    """In the worker's thread."""
    progress.report(f"loading {model}")
    from longspec.engine.engine import Engine

    if not progress.drawn:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    engine = Engine.load(model, report=progress.report, **loading)
    if engine.plan is not None:
        progress.say(str(engine.plan))
    return engine
