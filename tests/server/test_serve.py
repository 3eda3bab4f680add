"""`longspec serve`: OpenAI's own client against it, what is refused, who ends what."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import openai
import pytest
from support.commands import SECONDS
from support.engines import engine, prompts, tiny
from support.servers import Served, serving, until

from longspec.engine.engine import Engine
from longspec.server.bodies import MOST_NBYTES

LONG = 100_000  # tokens that nobody waits for


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """It never ends a text by itself."""
    return engine(tiny(tmp_path_factory.mktemp("tiny"), end_tokens=(), max_position_embeddings=200_000), "ngram")


@pytest.fixture(scope="module")
def served(made: Engine) -> Iterator[Served]:
    with serving(made) as up:
        yield up


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as made:
        yield made


CHAT: Any = [{"role": "system", "content": "ABC"}, {"role": "user", "content": "hello"}]


def test_a_chat_is_what_the_engine_writes(served: Served, client: openai.OpenAI) -> None:
    alone = served.engine.generate(CHAT, max_new_tokens=40)
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=40)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (alone.usage["prompt_tokens"], 40)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40
    told: Any = choice.model_extra
    assert told["longspec"]["speculation"]["drafter"] == "ngram"
    assert told["longspec"]["timing"]["prefill_s"] > 0
    assert told["longspec"]["cache"] == "dense"
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    whole: Any = [{"role": "user", "content": "hello"}]
    one, other = (client.chat.completions.create(model="tiny", messages=m, max_tokens=9) for m in (parts, whole))
    assert one.choices[0].message.content == other.choices[0].message.content


def test_a_stream_is_the_whole_text_in_pieces(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": CHAT, "max_tokens": 60, "temperature": 0.9, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert len(pieces) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    ending: Any = chunks[-2].choices[0].model_extra
    assert ending["longspec"]["seed"] == 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stream_ends_with_done(served: Served) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)) as connection:
        body = {"prompt": "ABC", "stream": True, "max_tokens": 3}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.read().endswith(b"\n\ndata: [DONE]\n\n")


def test_the_same_seed_gives_the_same_text(served: Served, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "ABCABC", "max_tokens": 30, "temperature": 0.8, "seed": 7}
    first, second = (client.completions.create(**asked, n=3) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    own: Any = {"raw": True, "max_new_tokens": 30, "temperature": 0.8, "seed": 7}
    assert texts == [served.engine.generate("ABCABC", key=key, **own).text for key in ("", "1", "2")]
    assert len(set(texts)) == 3
    del asked["seed"]
    one, other = (client.completions.create(**asked).choices[0] for _ in range(2))
    assert one.text != other.text
    told: Any = one.model_extra
    assert client.completions.create(**asked, seed=told["longspec"]["seed"]).choices[0].text == one.text


def test_choices_of_several_prompts(served: Served, client: openai.OpenAI) -> None:
    asked = prompts(2, 40)
    answer = client.completions.create(model="tiny", prompt=asked, n=2, max_tokens=8, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = [served.engine.generate(prompt, raw=True, max_new_tokens=8).text for prompt in asked]
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, asked))
    assert answer.usage.completion_tokens == 32


def test_a_stop_string_is_not_in_the_text(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": prompts(1)[0], "max_tokens": 60}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[20:23]
    at = whole.index(stop)
    for stops in (stop, ["never at all", stop]):
        choice = client.completions.create(**asked, stop=stops).choices[0]
        assert (choice.text, choice.finish_reason) == (whole[:at], "stop")
    chunks = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:at]


def test_other_samplings(served: Served, client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2}
    own: Any = {"temperature": 1.0, "top_p": 0.9, "seed": 3, **extra}
    alone = served.engine.generate("ABC", raw=True, max_new_tokens=20, **own).text
    asked: Any = {"model": "tiny", "prompt": "ABC", "max_tokens": 20, "top_p": 0.9, "seed": 3, "extra_body": extra}
    assert client.completions.create(**asked, temperature=1.0).choices[0].text == alone
    greedy = client.completions.create(**asked, temperature=0).choices[0].text  # as other servers take it
    assert greedy == served.engine.generate("ABC", raw=True, max_new_tokens=20, repetition_penalty=1.2).text


def test_models_and_health(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)) as connection:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["status"]) == (200, "ok")


def test_thirty_two_clients_get_what_each_would_get_alone(served: Served, client: openai.OpenAI) -> None:
    asked = [prompts(4)[i % 4] + chr(60 + i) * 3 for i in range(32)]
    own: Any = {"raw": True, "max_new_tokens": 24, "temperature": 0.7}
    alone = [served.engine.generate(prompt, seed=i, **own).text for i, prompt in enumerate(asked)]

    def one(i: int) -> str:
        body: Any = {"model": "tiny", "prompt": asked[i], "max_tokens": 24, "temperature": 0.7, "seed": i}
        if i % 2:
            return str(client.completions.create(**body).choices[0].text)
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**body, stream=True))

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(one, range(32))) == alone
    until(lambda: not len(served.desk))
    assert len(served.worker) == 0


# --- who ends what


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_session(served: Served, stream: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
    body = json.dumps({"prompt": "ABC", "max_tokens": LONG, "stream": stream, "n": 2})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    if stream:
        connection.getresponse().read(10)
    until(lambda: len(served.worker) == 2)
    connection.close()
    until(lambda: len(served.worker) == 0)
    assert len(served.desk) == 0
    assert served.said == []


def test_too_many_are_told_to_come_again(made: Engine) -> None:
    with serving(made, most=2) as served, served.client() as client:
        running = client.completions.create(model="tiny", prompt="ABC", max_tokens=LONG, n=2, stream=True)
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="ABC")
        assert refused.value.response.headers["retry-after"] == "5"
        running.close()
        until(lambda: len(served.desk) == 0)
        assert client.completions.create(model="tiny", prompt="ABC").choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="takes 2 together"):
            client.completions.create(model="tiny", prompt="ABC", n=3)


def test_a_time_limit_ends_an_answer_with_what_it_has(made: Engine) -> None:
    with serving(made, seconds=0.5) as served, served.client() as client:
        choice = client.completions.create(model="tiny", prompt="ABC", max_tokens=LONG).choices[0]
        assert choice.text
        told: Any = choice.model_extra
        assert (choice.finish_reason, told["longspec"]["finish_reason"]) == ("length", "interrupted")


def test_shutdown_lets_answers_end_with_what_they_have(made: Engine) -> None:
    with serving(made) as served, served.client() as client:
        running = client.completions.create(model="tiny", prompt="ABC", max_tokens=LONG, stream=True)
        chunks = iter(running)
        next(chunks)
        served.stop()
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(model="tiny", prompt="ABC")


def test_a_pass_that_fails_ends_its_answers_and_no_others(made: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret path")

    with serving(made) as served, served.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(made, "step", broken)
            for _ in range(40):  # each is answered: the connection of one that failed isn't left for the next
                with pytest.raises(openai.InternalServerError) as failed:
                    client.completions.create(model="tiny", prompt="ABC")
            with pytest.raises(openai.APIError):
                list(client.completions.create(model="tiny", prompt="ABC", stream=True))
        assert "secret" not in str(failed.value)
        assert served.said == ["The text could not be written: RuntimeError: a secret path."] * 41
        assert client.completions.create(model="tiny", prompt="ABC").choices[0].text


def test_a_text_that_fails_ends_beside_one_that_goes_on(made: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step, length = made.step, 60

    def failing(sessions: Any, *rest: Any) -> Any:
        if any(session.prompt_length == 7 for session in sessions):
            raise RuntimeError("the short one is heavy")
        return step(sessions, *rest)

    alone = made.generate("ABCDEFGHIJKL", raw=True, max_new_tokens=length).text
    monkeypatch.setattr(made, "step", failing)
    with serving(made) as served, served.client() as client:
        asked: Any = {"model": "tiny", "temperature": 0}
        chunks = iter(client.completions.create(prompt="ABCDEFGHIJKL", max_tokens=length, stream=True, **asked))
        said = next(chunks).choices[0].text
        with pytest.raises(openai.InternalServerError):
            client.completions.create(prompt="ABCDEFG", **asked)
        assert said + "".join(chunk.choices[0].text for chunk in chunks) == alone


# --- what is refused


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "isn't JSON"),
        (b"\xff", "isn't JSON"),
        (b"[" * 100_000, "isn't JSON"),
        (b"[]", "The body is []"),
        ({}, "prompt is null"),
        ({"prompt": []}, "prompt is []"),
        ({"prompt": [1, 2]}, "prompt is [1, 2]"),
        ({"prompt": "", "max_tokens": 2}, "prompt is empty"),
        ({"prompt": "A", "max_tokens": "3"}, 'max_tokens is "3"'),
        ({"prompt": "A", "max_tokens": True}, "max_tokens is true"),
        ({"prompt": "A", "max_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "A", "max_tokens": 1 << 62}, "context is 200000"),
        ({"prompt": "A", "max_tokens": 1 << 70}, "it must be a whole number"),
        ({"prompt": "A", "temperature": -1}, "temperature is -1"),
        (b'{"prompt": "A", "temperature": NaN}', "temperature is nan"),
        (b'{"prompt": "A", "temperature": 1e999}', "temperature is inf"),
        ({"prompt": "A", "temperature": 1, "top_p": 0}, "top_p is 0"),
        ({"prompt": "A", "n": 0}, "n is 0"),
        ({"prompt": "A", "n": 1 << 40}, "more texts than this server takes"),
        ({"prompt": "A", "seed": 1.5}, "seed is 1.5"),
        ({"prompt": "A", "stop": [""]}, "stop string is empty"),
        ({"prompt": "A", "stop": {"a": 1}}, "stop is"),
        ({"prompt": "A", "stop": ["A"] * 17}, "stop has 17"),
        ({"prompt": "A", "stream": 1}, "stream is 1"),
        ({"prompt": "A", "stream_options": {"include_usage": True}}, "set stream to true"),
        ({"prompt": "A", "logprobs": 3}, "logprobs isn't supported"),
        ({"prompt": "A", "echo": True}, "echo isn't supported"),
        ({"prompt": "A", "\ud800": "\ud800"}, "isn't supported"),
        ({"prompt": "\ud800"}, "lone surrogate"),
    ],
)
def test_a_completion_that_is_malformed(served: Served, body: object, said: str) -> None:
    status, answer = served.ask(body)
    assert status == 400
    assert said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages is missing"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hello"]}, "messages[0] is"),
        ({"messages": [{"content": "A"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "wizard", "content": "A"}]}, 'messages[0].role is "wizard"'),
        ({"messages": [{"role": "tool", "content": "A"}]}, "messages[0].tool_call_id is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a list of parts of type text"),
        (
            {"messages": [{"role": "user", "content": "A"}], "tools": [{"type": "function"}]},
            "tools[0].function is missing",
        ),
        (
            {
                "messages": [{"role": "user", "content": "A"}],
                "tools": [{"type": "function", "function": {"name": "a"}}],
            },
            "This model's chat template takes no tools",
        ),
        ({"messages": [{"role": "user", "content": "A"}], "logprobs": True}, "logprobs isn't supported"),
        ({"messages": [{"role": "user", "content": "A"}], "audio": {"voice": "x"}}, "audio isn't supported"),
        ({"messages": [{"role": "user", "content": "A"}], "prompt": "A"}, "prompt isn't supported"),
    ],
)
def test_a_chat_that_is_malformed(served: Served, body: object, said: str) -> None:
    status, answer = served.ask(body, "/v1/chat/completions")
    assert status == 400
    assert said in answer["error"]["message"]


def test_what_asks_for_nothing_is_let_through(served: Served) -> None:
    idle = {"frequency_penalty": 0, "logit_bias": {}, "user": "me", "response_format": {"type": "text"}, "top_p": 1}
    body = {"messages": CHAT, "max_tokens": 2, "tools": [], "stop": None, "model": None, **idle}
    assert served.ask(body, "/v1/chat/completions")[0] == 200


def test_statuses_of_refusals(served: Served) -> None:
    body = {"prompt": "A", "max_tokens": 1}
    assert served.ask({**body, "model": "gpt-5"})[0] == 404
    assert served.ask(body, "/v1/embeddings")[0] == 404
    assert served.ask(body, "/v1/models")[0] == 405
    assert served.ask(body, content_type="text/plain")[0] == 415
    assert served.ask(body, content_type="application/json; charset=utf-8")[0] == 200
    status, answer = served.ask(b" " * (MOST_NBYTES + 1))
    assert (status, answer["error"]["message"]) == (413, "The body has more than 8 MiB; send a shorter prompt.")
    assert served.ask({**body, "max_tokens": 1 << 20})[1]["error"]["code"] == "context_length_exceeded"


def test_a_page_whose_name_means_this_machine_is_refused(served: Served) -> None:
    body = {"prompt": "A", "max_tokens": 1}
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", ""):
        assert served.ask(body, host=host or " ")[0] == 421
    for host in ("localhost", f"localhost:{served.port}", "127.0.0.1", f"[::1]:{served.port}"):
        assert served.ask(body, host=host)[0] == 200


def test_a_key_is_asked_for(made: Engine) -> None:
    with serving(made, key="sésame") as served:
        body = {"prompt": "A", "max_tokens": 1}
        for given in ("", "Bearer", "Bearer wrong", "Basic s\xe9same", "Bearer sesame"):
            status, answer = served.ask(body, authorization=given)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        with served.client("wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
    with serving(made, key="sesame") as served, served.client("sesame") as client:
        assert client.completions.create(model="tiny", prompt="A", max_tokens=1).choices
