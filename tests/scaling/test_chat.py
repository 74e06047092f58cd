"""The page to talk to a model, by real HTTP over loopback: what it streams, and what it refuses."""

import http.client
import itertools
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from urllib.parse import urlsplit

import numpy as np
import pytest

from models.errors import InputError
from scaling.chat import server, talk
from scaling.data.tokenizers import Symbols
from scaling.load import load

pytest.importorskip("starlette", reason="starlette is not installed (extra: chat)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: chat)")


@pytest.fixture(scope="module")
def model(trained_run):
    return load(trained_run)


@pytest.fixture
def url(model):
    with server.started([model, model], ["base", "child"]) as address:
        yield address


def request(url, method, path, body=None, headers=None, host=None):
    """(status, headers, content) of one request on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if content is not None else {}
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": host or parts.netloc, **given, **(headers or {})}.items():
            if value is not None:
                connection.putheader(name, value)
        if content is not None:
            connection.putheader("Content-Length", str(len(content)))
        connection.endheaders(content)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def refused(url, status, message, body, path="/answer", **rest):
    got, _, content = request(url, "POST", path, body, **rest)
    assert got == status, content
    error = json.loads(content)["error"]
    assert message in error
    assert "\n" not in error


def events(content: bytes) -> list[dict]:
    return [json.loads(part.removeprefix("data: ")) for part in content.decode().split("\n\n") if part]


def test_an_answer_is_streamed_as_the_model_writes_it(url, model):
    """The pieces together are what `generate` writes by the same seed, with the same log-probabilities."""
    asked = {"model": 1, "prompt": "the union of ", "max_tokens": 30, "seed": 3, "temperature": 0.8}
    status, headers, content = request(url, "POST", "/answer", asked)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    begin, *tokens, end = events(content)
    wanted = model.generate("the union of ", max_tokens=30, seed=3, temperature=0.8)
    assert begin == {"event": "begin", "ids": list(b"the union of "), "text": "the union of "}
    assert "".join(event["text"] for event in tokens) == wanted.texts[0][0]
    assert [i for event in tokens for i in event["ids"]] == wanted.ids().tolist()
    np.testing.assert_allclose(
        [e["logprob"] for e in tokens], wanted.logprobs[0, 0, : len(tokens)], rtol=1e-4, atol=1e-5
    )
    assert end == {"event": "end", "reason": "length"}


def test_an_answer_ends_where_the_window_does(url, model):
    status, _, content = request(url, "POST", "/answer", {"model": 0, "prompt": "a" * 60, "max_tokens": 64})
    assert status == 200
    *tokens, end = events(content)[1:]
    assert end["reason"] == "window"
    assert sum(len(event["ids"]) for event in tokens) == model.window + 1 - 60


def test_a_template_is_what_the_model_continues(url):
    asked = {"model": 0, "prompt": "debts", "template": "the {prompt} of ", "max_tokens": 1}
    assert events(request(url, "POST", "/answer", asked)[2])[0]["text"] == "the debts of "
    refused(url, 400, "template = 'no place'", {"model": 0, "prompt": "x", "template": "no place"})


def test_what_follows_is_the_models_distribution(url, model):
    ids = list(b"the uni")
    status, _, content = request(url, "POST", "/following", {"model": 0, "ids": ids})
    assert status == 200
    likely = json.loads(content)["likely"]
    logits = model.logits(np.array([ids]))[0, -1].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    assert [row["id"] for row in likely] == np.argsort(-p, kind="stable")[: len(likely)].tolist()
    np.testing.assert_allclose([row["p"] for row in likely], np.sort(p)[::-1][: len(likely)], rtol=1e-6)
    assert likely[0]["name"] == "o"


def test_the_page_may_run_nothing_but_its_own_script(url):
    status, headers, content = request(url, "GET", "/")
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert status == 200
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    nonce = policy["script-src"].removeprefix("'nonce-").removesuffix("'")
    page = content.decode()
    assert len(nonce) >= 20
    assert page.count(f'nonce="{nonce}"') == 2
    assert "innerHTML" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert request(url, "GET", "/")[1]["content-security-policy"] != headers["content-security-policy"]


def test_about_says_which_models_these_are(url, model):
    first, second = json.loads(request(url, "GET", "/about")[2])["models"]
    assert (first["name"], second["name"]) == ("base", "child")
    assert first["run"] == model.config.run_id
    assert first["loss"] == model.result.loss
    assert first["template"] == "{prompt}"


@pytest.mark.parametrize("path", ["/", "/about"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1.evil.example:{port}"])
def test_another_name_is_not_answered(url, path, host):
    """A site whose name was made to point here (DNS rebinding) would otherwise read all that the page can."""
    status, _, content = request(url, "GET", path, host=host.format(port=urlsplit(url).port))
    assert status == 421
    assert b"model" not in content


def test_localhost_is_this_machine(url):
    port = urlsplit(url).port
    assert request(url, "GET", "/about", host=f"localhost:{port}")[0] == 200
    assert request(url, "GET", "/about", host=f"LOCALHOST:{port}")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_page_of_another_site_may_not_ask(url, headers):
    headers = {name: value.format(port=urlsplit(url).port) for name, value in headers.items()}
    refused(url, 403, "only this server's own page", {"model": 0, "prompt": "x"}, headers=headers)


def test_its_own_page_may_ask(url):
    headers = {"Origin": url.removesuffix("/"), "Sec-Fetch-Site": "same-origin"}
    assert request(url, "POST", "/answer", {"model": 0, "prompt": "x", "max_tokens": 1}, headers)[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": 0, "prompt": "a" * 65}, 400, "65 tokens, longer than the window of 64"),
        ({"model": 0, "prompt": "a" * 70_000}, 413, "longer than 65,536 bytes"),
        ({"model": 0, "prompt": "x", "max_tokens": 65}, 400, "this model's window is 64"),
        ({"model": 0, "prompt": "x", "max_tokens": 0}, 400, "max_tokens = 0"),
        ({"model": 0, "prompt": "x", "temperature": 0}, 400, "temperature = 0.0: expected a number from 1e-06"),
        ({"model": 0, "prompt": "x", "top_p": 0}, 400, "top_p = 0.0"),
        ({"model": 0, "prompt": "x", "top_k": -1}, 400, "top_k = -1"),
        ({"model": 0, "prompt": "x", "seed": -1}, 400, "seed = -1"),
        ({"model": 0, "prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ({"model": 0, "prompt": "x", "tempreature": 1}, 400, "did you mean 'temperature'"),
        ({"model": 0, "prompt": 5}, 400, "prompt"),
        ({"model": 0}, 400, "prompt"),
        ({"model": 2, "prompt": "x"}, 400, "model: expected a number of 0 to 1"),
        ({"model": True, "prompt": "x"}, 400, "model"),
        ({"prompt": "x"}, 400, "model"),
        ({"model": 0, "prompt": "a\0b"}, 400, "NUL"),
        ({"model": 0, "prompt": "\ud800"}, 400, "half a character"),
        ([1, 2], 400, "expected a JSON object"),
        (b"{", 400, "expected a JSON object"),
        (b"\xff\xfe", 400, "expected a JSON object"),
        (b"[" * 60_000, 400, "expected a JSON object"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_gets_one_line(url, body, status, message):
    refused(url, status, message, body)


@pytest.mark.parametrize("ids", [None, "ab", [0.5], [True], [-1], [256], [], [1] * 65, [2**40]])
def test_tokens_that_are_none_get_one_line(url, ids):
    refused(url, 400, "", {"model": 0, "ids": ids}, path="/following")


def test_a_form_of_another_site_is_not_json(url):
    """What a browser sends across sites without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        refused(url, 415, "application/json", {"model": 0, "prompt": "x"}, headers={"Content-Type": kind})


def test_other_paths_and_methods_are_not_there(url):
    assert request(url, "GET", "/../../etc/passwd")[0] == 404
    assert request(url, "GET", "/answer")[0] == 405
    assert request(url, "POST", "/", {})[0] == 405


@pytest.fixture
def slow(monkeypatch):
    """A model that writes a word and then waits: (asked, go on, left because nobody reads)."""
    asked, go, left = threading.Semaphore(0), threading.Event(), threading.Semaphore(0)

    def write(model, prompt, question, stopped):
        asked.release()
        yield talk.Piece("word", (1,), -1.0)
        while not go.wait(0.01):
            if stopped():
                left.release()
                return
        yield talk.End("stop")

    monkeypatch.setattr(server, "write", write)
    return asked, go, left


def test_who_comes_when_the_queue_is_full_is_told_so(url, slow):
    """So many are answered, so many wait, the next is refused at once; and all who waited get their answer."""
    _, go, _ = slow
    places, more = server.ANSWERING + server.WAITING, 3
    asked = {"model": 0, "prompt": "x"}
    with ThreadPoolExecutor(places + more) as people:
        came = [people.submit(request, url, "POST", "/answer", asked) for _ in range(places + more)]
        try:
            for sent_away in itertools.islice(as_completed(came, timeout=60), more):
                status, _, content = sent_away.result()
                assert status == 503
                assert "too many questions" in json.loads(content)["error"]
        finally:
            go.set()
        answered = [content for status, _, content in (one.result() for one in came) if status == 200]
    assert len(answered) == places
    assert all(events(content)[-1]["event"] == "end" for content in answered)
    assert request(url, "POST", "/answer", asked)[0] == 200


def test_who_never_asks_is_shown_out_and_keeps_nobody_from_asking(url, model, monkeypatch):
    """Heads that never end, in number: the others are answered at once, and the connections are closed in the end."""
    parts, asked = urlsplit(url), {"model": 0, "prompt": "the ", "max_tokens": 1}
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
    mute = [socket.create_connection((parts.hostname, parts.port), timeout=60) for _ in range(server.REQUESTS + 6)]
    for connection in mute:
        connection.sendall(b"POST /answer HTTP/1.1\r\nHost: ")
    assert request(url, "POST", "/answer", asked)[0] == 200
    for connection in mute:
        with connection:
            assert connection.recv(1) == b"", "an open connection waits for ever"
    monkeypatch.setattr(server, "REQUESTS", 0)
    refused(url, 503, "too many requests at a time", asked)


def test_an_answer_may_take_longer_than_asking(url, slow, monkeypatch):
    """A connection whose answer is under way is no mute one."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.05)
    asked, go, _ = slow
    with ThreadPoolExecutor(1) as people:
        answer = people.submit(request, url, "POST", "/answer", {"model": 0, "prompt": "x"})
        assert asked.acquire(timeout=30)
        with pytest.raises(TimeoutError):
            answer.result(timeout=0.5)
        go.set()
        assert events(answer.result()[2])[-1]["event"] == "end"


def test_nothing_is_written_for_who_has_left(url, slow):
    asked, _, left = slow
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    body = json.dumps({"model": 0, "prompt": "x"})
    connection.request("POST", "/answer", body, {"Content-Type": "application/json"})
    assert asked.acquire(timeout=30)
    connection.sock.close()
    connection.close()
    assert left.acquire(timeout=30), "an answer is written on for a reader who has gone"


def test_a_server_that_ends_leaves_no_answer_under_way(model, slow):
    asked, _, left = slow
    with ThreadPoolExecutor(1) as people:
        with server.started([model], ["base"]) as url:
            answer = people.submit(request, url, "POST", "/answer", {"model": 0, "prompt": "x"})
            assert asked.acquire(timeout=30)
        assert left.acquire(timeout=30)
        assert events(answer.result()[2])[1]["text"] == "word"


def test_a_worker_that_fails_says_so_in_the_stream(url, monkeypatch):
    def write(*_):
        yield talk.Piece("word", (1,), -1.0)
        raise InputError("the model is gone")

    monkeypatch.setattr(server, "write", write)
    got = events(request(url, "POST", "/answer", {"model": 0, "prompt": "x"})[2])
    assert got[-1] == {"event": "error", "error": "the model is gone"}


def test_an_address_that_is_taken_is_named(url, model):
    for wrong, message in {urlsplit(url).port: "Address already in use", 99_999: "must be 0-65535"}.items():
        with pytest.raises(InputError, match=message), server.started([model], ["base"], port=wrong):
            pass


def test_a_character_waits_for_its_last_byte():
    """Bytes of one character are shown together; what never becomes one is shown all the same."""
    from scaling.data.tokenizers import Bytes

    tokens = [(byte, -1.0) for byte in "aé€".encode()]
    pieces, held = talk.split(Bytes(), tokens[:5], last=False)
    assert [piece.text for piece in pieces] == ["a", "é"]
    assert len(held) == 2
    pieces, held = talk.split(Bytes(), tokens[3:], last=True)
    assert [(piece.text, piece.logprob) for piece in pieces] == [("€", -3.0)]
    pieces, held = talk.split(Bytes(), [(0xFF, -1.0)] * 6, last=True)
    assert sum(len(piece.ids) for piece in pieces) == 6
    assert not held


def test_symbols_are_told_apart_by_blanks():
    pieces, _ = talk.split(Symbols(("start", "a", "b")), [(1, -1.0), (2, -2.0)], last=False)
    assert [piece.text for piece in pieces] == [" a", " b"]
