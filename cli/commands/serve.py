"""`longspec serve`: a loaded model behind OpenAI's and Anthropic's APIs on this machine, and for every `longspec run`
with equal settings.

Loads in the worker's thread; listens once that is done. Messages go to stderr, stdout stays empty.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli.io import server_client as remote
from longspec.cli.io.progress import Progress
from longspec.cli.io.stream_answer import say_choices
from longspec.cli.options.groups import Only, Without, group, option
from longspec.cli.options.loading import DRAFTERS, Loading, models
from longspec.cli.options.parsers import number, one_of, whole
from longspec.cli.options.reporting import Reporting
from longspec.errors import UsageError
from longspec.sampling.parameters import Bounds

if TYPE_CHECKING:
    from longspec.engine.engine import Engine
    from longspec.server.worker import Worker

__all__ = ["EPILOG", "serve"]

EPILOG = """\b
Examples:
  longspec serve
  longspec serve -m ~/models/qwen3 --port 9000 --parallel 8
  LONGSPEC_API_KEY=... longspec serve --host 0.0.0.0
  longspec serve -m qwen3-4b --also smollm2 --memory 8GiB

\b
Clients of OpenAI's API take http://127.0.0.1:8000/v1 as their base URL.
While it is up, `longspec run` with the same model and method loads nothing.
It ends on Ctrl-C or SIGTERM: running answers get some seconds, then end with
what they have.
"""

_GRACE_SECONDS = 10.0
"""For answers that are being written when the process is asked to end."""

_PASS_SECONDS = 4.0
"""For the pass that runs then, and rows that are put into a folder; the process doesn't wait longer."""

_IDLE_SECONDS = 600.0
"""After which one of several models is unloaded."""

_SWITCH_SECONDS = 0.0005
"""For which the thread that writes waits for the interpreter where another one parses a request. It lets go of it and
takes it back ten times a pass, and Python's own 5 ms each time are a pass of a small model.
"""

_PLANNED = "under a memory budget its cache may be another than the one that run would choose"
_NO_FOLDER = "the folder for its socket is missing, or isn't this user's alone"


@group("Server")
class Serving:
    """The address, and the limits of requests."""

    host: str = option("127.0.0.1", "The address to listen on: 127.0.0.1 if left out.", metavar="NAME")
    port: int = option(8000, "Its port: 8000; 0 takes a free one.", metavar="N", parser=whole(0, 65535))
    api_key: str | None = option(
        None,
        "What clients must send as their bearer token; needed where others reach the address. Better set as "
        "LONGSPEC_API_KEY, since every user of a machine can read arguments.",
        metavar="KEY",
    )
    parallel: int | None = option(
        None, "Texts written at a time: 16, or with --memory 1, if left out.", metavar="N", parser=whole(1)
    )
    max_waiting: int = option(
        64,
        "Texts that may wait for their turn: 64. Whoever comes then is told to try again later.",
        metavar="N",
        parser=whole(0),
    )
    prefix_cache: int = option(
        1024,
        "MiB for the rows of finished texts, so that a chat's next turn reads its new tokens only: 1024; 0 keeps none. "
        "With --memory at most half of what the plan leaves.",
        metavar="MIB",
        parser=whole(0),
    )
    prefix_folder: str | None = option(
        None,
        "A folder for rows that --prefix-cache doesn't hold, up to ten times as much, and for all of them at the end: "
        "a server that is started again has them. They tell what was written, so it should be yours alone.",
        metavar="DIR",
    )
    also: list[str] | None = option(
        None,
        "A further model, named as --model is: loaded when a request names it, with the same options, and within "
        "--memory, where the model that was used least recently makes room. May be repeated.",
        metavar="MODEL",
        autocompletion=models,
    )
    idle: float | None = option(
        None,
        "A model that nobody has used for so long is unloaded; its next request loads it. With --also 600, if left "
        "out, else never.",
        metavar="SECONDS",
        parser=number(Bounds(float, 0, open_below=True)),
    )
    log_format: str = option(
        "none",
        "The access log on stderr, a line for each request: none, text or json.",
        metavar="FORM",
        parser=one_of("none", "text", "json"),
    )
    cors: list[str] | None = option(
        None, "An origin whose pages may ask, such as http://localhost:3000. May be repeated.", metavar="ORIGIN"
    )
    time_limit: float = option(
        3600.0,
        "An answer over the network ends after so long with what it has: 3600.",
        metavar="SECONDS",
        parser=number(Bounds(float, 0, open_below=True)),
    )
    allow_special_tokens: bool = option(
        False,
        "Let every client's messages hold special tokens, so that a text can end a turn and begin another. Else they "
        "are plain text.",
        once=True,
    )


def serve(
    ctx: typer.Context,
    serving: Serving,
    loading: Annotated[Loading, Without("remember")],
    reporting: Annotated[Reporting, Only("quiet", "verbose")],
) -> None:
    """Keep a model loaded, and answer OpenAI's API with it on this machine."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"longspec serve needs {error.name}; install it with pip install 'longspec[serve]'.") from None
    from longspec.server.hosts import is_loopback

    if not is_loopback(serving.host) and not serving.api_key:
        raise UsageError(
            f"Others reach {serving.host}, so clients need a key; set LONGSPEC_API_KEY, or leave --host out."
        )
    options, reporting = loading.engine_options(ctx), reporting.settled(ctx)
    parallel = serving.parallel
    if loading.memory is not None:  # as in `batch`: each sequence is planned at the model's whole context
        parallel = options["texts"] = parallel or 1
    with Progress(loading.model, quiet=reporting.quiet, verbose=reporting.verbose) as progress:
        _serve(loading.model, options, serving, parallel, progress)


def _serve(model: str, options: dict[str, Any], serving: Serving, parallel: int | None, progress: Progress) -> None:
    import asyncio

    from longspec.engine.scheduler import WIDTH
    from longspec.server.api import at_home, open_to_clients
    from longspec.server.desk import Desk
    from longspec.server.hosts import names
    from longspec.server.listen import bind, bound_unix, listen
    from longspec.server.models import Models

    sys.setswitchinterval(_SWITCH_SECONDS)
    width = parallel or WIDTH
    folder, planned = remote.folder(make=True), options["memory"] is not None
    # The address depends on the files' present state.
    path = None if folder is None or planned else remote.address(folder, model, options)
    with bind(serving.host, serving.port) as door, ExitStack() as stack:
        desk = Desk(width + serving.max_waiting, serving.time_limit)
        idle = serving.idle or (_IDLE_SECONDS if serving.also else None)
        models = Models(desk, _starts(model, options, serving, width, progress), idle)
        models.begin()
        app = open_to_clients(
            desk,
            models,
            names(serving.host),
            serving.api_key or None,
            progress.say,
            allow_special_tokens=serving.allow_special_tokens,
            log=serving.log_format,
            origins=serving.cors or (),
        )
        doors = [(app, door)]
        home = None if path is None else stack.enter_context(bound_unix(path))
        if home is not None:
            doors.append((at_home(desk, models, progress.say), home))
        else:
            why = "another is used" if path else _PLANNED if planned else _NO_FOLDER
            progress.say(f"longspec run doesn't use this server: {why}")
        shown = f"[{serving.host}]" if ":" in serving.host else serving.host
        served = f"{', '.join(models.names)} {'are' if serving.also else 'is'} served"
        sentence = f"{served} at http://{shown}:{door.getsockname()[1]}/v1; Ctrl-C ends it"
        asyncio.run(listen(desk, doors, _GRACE_SECONDS, lambda: progress.say(sentence)))
        models.stop(_PASS_SECONDS)


def _starts(
    model: str, options: dict[str, Any], serving: Serving, width: int, progress: Progress
) -> dict[str, Callable[[int | None], Worker]]:
    """What loads each model, the first one at the front; the further ones are looked for, and fetched, at once."""
    from longspec.model.files.hub import find
    from longspec.server.worker import Worker

    folder = None if serving.prefix_folder is None else Path(serving.prefix_folder).expanduser()
    further = [name for name in serving.also or () if name != model]
    for name in further:
        find(name, report=progress.report)
    # What was made for the first one, a head or a smaller model, fits no other.
    drafter = options["drafter"] if options["drafter"] in DRAFTERS and options["drafter"] != "model" else "auto"
    others = {**options, "drafter": drafter, "draft_model": None, "skip_set": None}

    def start(name: str, memory: int | None) -> Worker:
        own = {**(options if name == model else others)}
        own |= {} if memory is None else {"memory": memory}
        return Worker(lambda: _load(name, own, progress), width, serving.prefix_cache << 20, folder)

    return {name: partial(start, name) for name in (model, *further)}


def _load(model: str, options: dict[str, Any], progress: Progress) -> Engine:
    """Load the engine; runs in the worker's thread."""
    progress.report(f"loading {model}")
    from longspec.engine.engine import Engine

    if not progress.drawn:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    engine = Engine.load(model, report=progress.report, **options)
    say_choices(engine, progress)
    return engine
