"""An engine behind HTTP: what OpenAI's clients speak, and what `longspec run` speaks over a Unix socket.

    body -> asks -> desk -> worker (one thread: engine, schedule) -> desk -> requests.replies -> body

Needs starlette and uvicorn, the extra `serve`.
"""
