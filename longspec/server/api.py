"""The two HTTP applications: OpenAI's API for the network, and JSON lines for `longspec run` on this machine.

Takes untrusted HTTP requests; gives answers, streams and refusals. Every error is reported in OpenAI's format.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from time import perf_counter, time
from uuid import uuid4

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from longspec.engine.answer import Answer
from longspec.errors import BudgetError, ContextError, LongspecError, UsageError
from longspec.requests.fields import RequestError
from longspec.requests.openai import CHAT, COMPLETIONS
from longspec.requests.replies import Reply
from longspec.server.asks import Ask, ask, local
from longspec.server.bodies import Bodies
from longspec.server.desk import Desk, GoneError, Texts
from longspec.server.guard import Guard
from longspec.server.refusals import RefusedError, encoded
from longspec.server.worker import Ended, UnreadError

__all__ = ["at_home", "open_to_clients"]

_EVENTS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def open_to_clients(
    desk: Desk,
    model: str,
    hosts: frozenset[str] | None,
    key: str | None,
    say: Callable[[str], None],
    *,
    allow_special_tokens: bool = False,
) -> ASGIApp:
    """OpenAI's API, for requests whose Host is one of these (any, if None) and that have the API key, if there is
    one.
    """
    created, bodies = int(time()), Bodies()

    async def models(request: Request) -> Response:
        listed = {"id": model, "object": "model", "created": created, "owned_by": "longspec"}
        return _json({"object": "list", "data": [listed]})

    async def health(request: Request) -> Response:
        status = {"status": "closing" if desk.closing else "ok", "model": model, "texts": len(desk), "most": desk.most}
        return _json(status, 503 if desk.closing else 200)

    async def answer(request: Request) -> Response:
        chat = request.url.path == CHAT
        reply = Reply(chat, f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}", int(time()), model)
        async with bodies.object(request) as body:
            wanted = ask(body, model, desk.most, chat=chat, allow_special_tokens=allow_special_tokens)
            texts = desk.take(wanted.texts, request.receive)
            await texts.opened()
        if wanted.stream:
            events = _events(wanted, reply, texts, say)
            return StreamingResponse(events, media_type="text/event-stream", headers=_EVENTS)
        answers: dict[int, Answer] = {}
        async for place, event in texts.told():
            if isinstance(event, Ended):
                answers[place] = event.answer
        return _json(reply.whole([answers[i] for i in range(len(answers))], wanted.seeds, wanted.choices))

    routes = [
        Route(CHAT, answer, methods=["POST"]),
        Route(COMPLETIONS, answer, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    return Guard(_application(routes, say), hosts, key)


def at_home(desk: Desk, say: Callable[[str], None]) -> ASGIApp:
    """The API of `longspec run`, over a socket that only this user can open."""
    running: dict[str, Texts] = {}
    bodies = Bodies()

    async def run(request: Request) -> Response:
        async with bodies.object(request) as body:
            prompt, options, began = local(body)
        began = None if began is None else min(began, perf_counter())
        texts = desk.take([(prompt, options)], request.receive, began=began, local=True)
        return StreamingResponse(lines(str(body.get("id")), texts), media_type="application/x-ndjson")

    async def lines(name: str, texts: Texts) -> AsyncIterator[bytes]:
        running[name] = texts
        try:
            yield _line({})  # accepted: the client needn't load a model itself
            async for _, event in texts.told():
                if isinstance(event, Ended):
                    yield _line({"answer": event.answer.report(), "notes": event.notes})
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

    return _application([Route("/run", run, methods=["POST"]), Route("/end", end, methods=["POST"])], say)


async def _events(wanted: Ask, reply: Reply, texts: Texts, say: Callable[[str], None]) -> AsyncIterator[bytes]:
    """Server-sent events: chunks of all answers as they come, then [DONE]."""
    answers: dict[int, Answer] = {}
    more = {"usage": None} if wanted.include_usage else {}
    try:
        for place in range(len(wanted.texts)):
            if (first := reply.first(place)) is not None:
                yield _event(first | more)
        async for place, event in texts.told():
            if isinstance(event, Ended):
                answers[place] = event.answer
                yield _event(reply.last(place, event.answer, wanted.seeds[place]) | more)
            elif event.thought or event.said:
                yield _event(reply.piece(place, event.thought, event.said) | more)
        if wanted.include_usage:
            yield _event(reply.closing([answers[i] for i in range(len(answers))], wanted.choices))
    except GoneError:
        return
    except Exception as error:  # noqa: BLE001  the status is sent already: report the error within the stream
        say(_failure(error))
        yield _event(_refusal(error).body())
    yield b"data: [DONE]\n\n"


def _application(routes: list[Route], say: Callable[[str], None]) -> Starlette:
    """A Starlette application of these routes, with error handlers in OpenAI's format."""

    async def refused(request: Request, error: Exception) -> Response:
        refusal = _refusal(error)
        if refusal.status == 500:
            say(_failure(error))
        return _json(refusal.body(), refusal.status, refusal.headers)

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
            sentence = "There is nothing here; ask /v1/chat/completions, /v1/completions, /v1/models or /health."
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


def _event(value: object) -> bytes:
    return b"data: " + encoded(value) + b"\n\n"


def _line(value: object) -> bytes:
    return encoded(value) + b"\n"
