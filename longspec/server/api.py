"""The two HTTP applications: OpenAI's and Anthropic's APIs for the network, and JSON lines for `longspec run`, `chat`
and `command` on this machine.

Takes untrusted HTTP requests; gives answers, streams and refusals. Every error is reported in OpenAI's format.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from time import perf_counter, time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from longspec.engine.answer import Answer
from longspec.engine.scoring import score
from longspec.errors import BudgetError, ContextError, LongspecError, UsageError
from longspec.requests.anthropic import MESSAGES
from longspec.requests.fields import RequestError
from longspec.requests.replies import Event, Format
from longspec.server.asks import Ask, ask, local, scored
from longspec.server.bodies import Bodies
from longspec.server.desk import Desk, GoneError, Texts
from longspec.server.dialects import DIALECTS
from longspec.server.guard import Guard
from longspec.server.log import Log
from longspec.server.metrics import CONTENT_TYPE, Metrics
from longspec.server.models import Models
from longspec.server.refusals import RefusedError, encoded
from longspec.server.worker import Ended, Reading, UnreadError

__all__ = ["at_home", "open_to_clients"]

_EVENTS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def open_to_clients(
    desk: Desk,
    models: Models,
    hosts: frozenset[str] | None,
    key: str | None,
    say: Callable[[str], None],
    *,
    allow_special_tokens: bool = False,
    log: str = "none",
    origins: Sequence[str] = (),
) -> ASGIApp:
    """The APIs of DIALECTS, for requests whose Host is one of these (any, if None) and that have the API key, if there
    is one.

    log: the access log's format. origins: those whose pages may ask, beside programs.
    """
    bodies, metrics = Bodies(), Metrics(desk.__len__, models.__len__)

    async def health(request: Request) -> Response:
        said = "closing" if desk.closing else "ok"
        status = {"status": said, "model": models.names[0], "texts": len(desk), "most": desk.most}
        return _json(status, 503 if desk.closing else 200)

    async def measured(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def answer(request: Request) -> Response:
        dialect, began = DIALECTS[request.url.path], perf_counter()
        async with bodies.object(request) as body:
            chat, allowed = dialect.chat, allow_special_tokens
            wanted = ask(dialect.read(body), desk.most, chat=chat, allow_special_tokens=allowed)
            async with models.using(wanted.model) as worker:
                texts = desk.take(worker, wanted.texts, request.receive, began=began, ended=metrics.ended)
            prompts = await texts.opened()
        spelled = partial(worker.loaded.result().model.vocabulary.piece, first=False)
        reply = dialect.reply(wanted, wanted.model or models.names[0], spelled)
        if wanted.stream:
            events = _events(wanted, reply, texts, prompts, say)
            return StreamingResponse(events, media_type="text/event-stream", headers=_EVENTS)
        answers: dict[int, Answer] = {}
        async for place, event in texts.told():
            if isinstance(event, Ended):
                answers[place] = event.answer
        return _json(reply.whole([answers[i] for i in range(len(answers))], wanted.seeds, wanted.choices))

    routes = [
        *(Route(path, answer, methods=["POST"]) for path in DIALECTS),
        *_models(models),
        Route("/health", health),
        Route("/metrics", measured),
    ]
    app: ASGIApp = Guard(_application(routes, say), hosts, key)
    if origins:
        app = CORSMiddleware(app, origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return Log(app, log, say)


def _models(models: Models) -> list[Route]:
    """What tells of the models."""
    began = int(time())
    listed = {name: {"id": name, "object": "model", "created": began, "owned_by": "longspec"} for name in models.names}

    async def all_models(request: Request) -> Response:
        return _json({"object": "list", "data": [*listed.values()]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in listed:
            raise models.none(name)
        return _json(listed[name])

    return [Route("/v1/models", all_models), Route("/v1/models/{name:path}", one_model)]


def at_home(desk: Desk, models: Models, say: Callable[[str], None]) -> ASGIApp:
    """The API of `longspec run`, `chat` and `command` with the first model, over a socket that only this user opens."""
    running: dict[str, Texts] = {}
    bodies = Bodies()

    async def run(request: Request) -> Response:
        async with bodies.object(request) as body:
            prompt, options, began = local(body)
        began = None if began is None else min(began, perf_counter())
        async with models.using(None) as worker:
            texts = desk.take(worker, [(prompt, options)], request.receive, began=began, local=True)
        return StreamingResponse(lines(str(body.get("id")), texts), media_type="application/x-ndjson")

    async def lines(name: str, texts: Texts) -> AsyncIterator[bytes]:
        running[name] = texts
        try:
            yield _line({})  # accepted: the client needn't load a model itself
            async for _, event in texts.told():
                if isinstance(event, Ended):
                    report = event.answer.report()
                    yield _line({"answer": report, "notes": event.notes, "message": event.message})
                elif isinstance(event, Reading):
                    yield _line({"read": event.done, "of": event.total})
                else:
                    parted = {} if event.said == event.text else {"said": event.said}
                    yield _line({"text": event.text, "tokens": len(event.tokens), **parted})
        except LongspecError as error:
            yield _line({"error": str(error), "exit_code": error.exit_code})
        except GoneError:
            pass
        except Exception as error:  # noqa: BLE001  reported to the client and on stderr
            say(_failure(error))
            yield _line({"error": _failure(error), "exit_code": 1})
        finally:
            del running[name]

    async def end(request: Request) -> Response:
        async with bodies.object(request) as body:
            texts = running.get(str(body.get("id")))
        if texts is not None:
            texts.end()
        return _json({})

    async def weigh(request: Request) -> Response:
        async with bodies.object(request) as body:
            pairs = scored(body)
        async with models.using(None) as worker:
            scores = await asyncio.wrap_future(worker.ask(lambda engine: score(engine, pairs)))
        return _json({"scores": scores})

    routes = {"/run": run, "/end": end, "/score": weigh}
    return _application([Route(path, answer, methods=["POST"]) for path, answer in routes.items()], say)


async def _events(
    wanted: Ask, reply: Format, texts: Texts, prompts: Sequence[int], say: Callable[[str], None]
) -> AsyncIterator[bytes]:
    """Server-sent events: those of all answers as they come, then the format's end."""
    answers: dict[int, Answer] = {}
    try:
        for each in reply.begins(prompts):
            yield _event(each)
        async for place, event in texts.told():
            if isinstance(event, Ended):
                answers[place] = event.answer
                told = reply.ends(place, event.answer, wanted.seeds[place])
            elif isinstance(event, Reading):  # no API has a word for it
                continue
            else:
                told = reply.piece(place, event)
            for each in told:
                yield _event(each)
        for each in reply.closes([answers[i] for i in range(len(answers))], wanted.choices):
            yield _event(each)
    except GoneError:
        return
    except Exception as error:  # noqa: BLE001  the status is sent already: report the error within the stream
        say(_failure(error))
        yield _event(
            ("error", {"type": "error", **_refusal(error).body()}) if not reply.done else (None, _refusal(error).body())
        )
    yield reply.done


def _application(routes: list[Route], say: Callable[[str], None]) -> Starlette:
    """A Starlette application of these routes, with error handlers in OpenAI's format."""

    async def refused(request: Request, error: Exception) -> Response:
        refusal = _refusal(error)
        if refusal.status == 500:
            say(_failure(error))
        more = {"type": "error"} if request.url.path == MESSAGES else {}  # as Anthropic's clients know it
        return _json({**more, **refusal.body()}, refusal.status, refusal.headers)

    kinds = (RefusedError, LongspecError, HTTPException, ClientDisconnect, GoneError, Exception)
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, refused))


def _refusal(error: Exception) -> RefusedError:
    """An error as the client sees it; internal errors aren't disclosed."""
    match error:
        case RefusedError():
            return error
        case HTTPException(status_code=405):
            return RefusedError(405, "This address doesn't take that method; see docs/serve.md.", headers=error.headers)
        case HTTPException():
            sentence = f"There is nothing here; ask {', '.join(DIALECTS)}, /v1/models, /metrics or /health."
            return RefusedError(error.status_code, sentence, headers=error.headers)
        case RequestError():
            return RefusedError(400, str(error), param=error.param, code=error.code)
        case ContextError():
            return RefusedError(400, str(error), code="context_length_exceeded")
        case UsageError():
            return RefusedError(400, str(error))
        case BudgetError():
            return RefusedError(400, str(error), code="memory_budget_exceeded")
        case UnreadError():
            return RefusedError(503, str(error), code="ended")
        case GoneError() | ClientDisconnect():
            return RefusedError(499, "The client went away.")
    # Starlette re-raises such an error and uvicorn then drops the connection: the client must not reuse it.
    sentence = "The server failed at this; what happened is on its standard error."
    return RefusedError(500, sentence, headers={"connection": "close"})


def _failure(error: Exception) -> str:
    return str(error) if isinstance(error, LongspecError) else f"a request failed: {type(error).__name__}: {error}"


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encoded(value), status, headers, "application/json")


def _event(event: Event) -> bytes:
    name, value = event
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + encoded(value) + b"\n\n"


def _line(value: object) -> bytes:
    return encoded(value) + b"\n"
