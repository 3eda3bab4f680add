"""An engine behind HTTP: OpenAI's API, and a Unix socket for `longspec run`.

    body -> asks -> desk -> worker (one thread: engine, schedule) -> desk -> requests.replies -> body

Needs starlette and uvicorn, the extra `serve`.
"""
