"""The page to talk to trained models, served on this machine alone unless told otherwise.

What a request can cost is bounded: its size, the time its head and its body take, the tokens that are written, how many
are answered at a time and how many wait. A page of another site can ask nothing: Host and Origin must be ours.

Starlette and uvicorn are an extra, so they are imported where a page is served.
"""

import asyncio
import dataclasses
import json
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import InputError
from models.sizing import counts
from scaling.chat.talk import LIKELY, End, Question, likely, prompt_of, template_of, write
from scaling.fields import from_plain
from scaling.load import Trained

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

BODY = 2**16  # bytes
HEAD_SECONDS = 10.0  # in which a connection has to ask something
BODY_SECONDS = 10.0
ANSWERING = 2  # at a time: two models, side by side
WAITING = 8  # more are told to come back
REQUESTS = 64  # whose bodies are read at a time
LEAVE_SECONDS = 2  # for what is under way, when the server is told to end
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Refused(Exception):
    """A request that is not answered: its status and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(eq=False)
class Desk:
    """The models, and who is asking them."""

    models: Sequence[Trained]
    names: Sequence[str]
    hosts: frozenset[str]  #: that a request may name, with the port
    workers: ThreadPoolExecutor
    ending: threading.Event = field(default_factory=threading.Event)
    asking: int = 0
    requests: int = 0  #: that are being read

    @contextmanager
    def door(self) -> Iterator[None]:
        """Open to so many requests at a time. Raises Refused to more."""
        if self.requests >= REQUESTS:
            raise Refused(503, "too many requests at a time; try again in a moment")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue. Raises Refused where it is full."""
        if self.asking >= ANSWERING + WAITING:
            raise Refused(503, "too many questions at a time; try again in a moment")
        self.asking += 1
        try:
            yield
        finally:
            self.asking -= 1


def application(desk: Desk) -> "Starlette":
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    page = resources.files("scaling.chat").joinpath("page.html").read_text(encoding="utf-8")

    async def show(request: "Request") -> "Response":
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(page.replace("NONCE", nonce), headers={"content-security-policy": policy(nonce)})

    async def about(request: "Request") -> "Response":
        return JSONResponse({"models": [facts(*named) for named in zip(desk.names, desk.models, strict=True)]})

    async def answer(request: "Request") -> "Response":
        body = await body_of(request)
        model = chosen(desk, body.pop("model", None))
        question = question_of(body, model)
        prompt = prompt_of(model, question)
        place = desk.place()
        place.__enter__()
        events = written(desk, model, prompt, question)
        return stream_of(events, lambda: place.__exit__(None, None, None))

    async def following(request: "Request") -> "Response":
        body = await body_of(request)
        model, ids = chosen(desk, body.get("model")), body.get("ids")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise Refused(400, "ids: expected a list of tokens")
        with desk.place():
            loop = asyncio.get_running_loop()
            return JSONResponse({"likely": await loop.run_in_executor(desk.workers, likely, model, np.array(ids))})

    routes = [
        Route("/", guarded(desk, show)),
        Route("/about", guarded(desk, about)),
        Route("/answer", guarded(desk, answer), methods=["POST"]),
        Route("/following", guarded(desk, following), methods=["POST"]),
    ]
    return Starlette(routes=routes)


def policy(nonce: str) -> str:
    own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def guarded(desk: Desk, handler: Callable) -> Callable:
    """The handler for requests that come from our own page, or from no page; what it refuses is one line of JSON."""
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, PlainTextResponse

    async def handle(request: "Request") -> "Response":
        try:
            check_origin(desk, request)
            with desk.door():
                response = await handler(request)
        except Refused as refused:
            response = JSONResponse({"error": refused.reason}, refused.status)
        except InputError as error:
            response = JSONResponse({"error": str(error)}, 400)
        except ClientDisconnect:
            response = PlainTextResponse("", 400)
        response.headers["x-content-type-options"] = "nosniff"
        response.headers["referrer-policy"] = "no-referrer"
        response.headers["cross-origin-resource-policy"] = "same-origin"
        response.headers["cache-control"] = "no-store"
        return response

    return handle


def check_origin(desk: Desk, request: "Request") -> None:
    """A name that another site has made to point here is not ours (DNS rebinding), nor is that site's page."""
    hosts = request.headers.getlist("host")
    if len(hosts) != 1 or hosts[0].lower() not in desk.hosts:
        raise Refused(421, "this server is not of that name; --allow-host adds one")
    origins = request.headers.getlist("origin")
    if origins and (len(origins) > 1 or origins[0].lower() != f"http://{hosts[0].lower()}"):
        raise Refused(403, "only this server's own page may ask")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused(403, "only this server's own page may ask")


async def body_of(request: "Request") -> dict[str, Any]:
    """The JSON object of a request, of at most BODY bytes, that arrives in time."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "expected content of type application/json")
    content = bytearray()

    async def read() -> None:
        async for part in request.stream():
            content.extend(part)
            if len(content) > BODY:
                raise Refused(413, f"longer than {BODY:,} bytes")

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
        body = json.loads(content)
    except TimeoutError:
        raise Refused(408, "the request took too long to arrive") from None
    except (ValueError, RecursionError):
        raise Refused(400, "expected a JSON object") from None
    if not isinstance(body, dict):
        raise Refused(400, "expected a JSON object")
    return body


def chosen(desk: Desk, which: Any) -> Trained:
    if type(which) is not int or not 0 <= which < len(desk.models):
        raise Refused(400, f"model: expected a number of 0 to {len(desk.models) - 1}")
    return desk.models[which]


def question_of(body: dict[str, Any], model: Trained) -> Question:
    defaults = {f.name: f.default for f in dataclasses.fields(Question) if f.default is not dataclasses.MISSING}
    question = from_plain(Question, defaults | {"template": template_of(model)} | body, "question")
    if question.max_tokens > model.window:
        raise Refused(400, f"max_tokens = {question.max_tokens}: this model's window is {model.window}")
    return question


def stream_of(events: AsyncIterator[dict[str, Any]], after: Callable[[], None]) -> "Response":
    """Server-sent events; `after` is called once, however it ends."""
    from starlette.responses import StreamingResponse

    class Stream(StreamingResponse):
        async def __call__(self, *args: Any) -> None:
            try:
                await super().__call__(*args)
            finally:
                after()

    lines = (f"data: {json.dumps(event)}\n\n" async for event in events)
    return Stream(lines, media_type="text/event-stream")


async def written(desk: Desk, model: Trained, prompt: np.ndarray, question: Question) -> AsyncIterator[dict[str, Any]]:
    """begin with the prompt's tokens, a token event a piece, and end; a worker writes, and stops where nobody reads."""
    loop, events, gone = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

    def put(event: dict[str, Any] | None) -> None:
        if not gone.is_set() and not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    def work() -> None:
        try:
            for piece in write(model, prompt, question, lambda: gone.is_set() or desk.ending.is_set()):
                if isinstance(piece, End):
                    put({"event": "end", "reason": piece.reason})
                else:
                    put({"event": "token", "text": piece.text, "ids": piece.ids, "logprob": piece.logprob})
        except Exception as error:
            put({"event": "error", "error": str(error) if isinstance(error, InputError) else type(error).__name__})
        finally:
            put(None)

    try:
        yield {"event": "begin", "ids": prompt.tolist(), "text": question.text}
        if not desk.ending.is_set():
            job = desk.workers.submit(work)
            try:
                while (event := await events.get()) is not None:
                    yield event
            finally:
                job.cancel()
    finally:
        gone.set()


def facts(name: str, model: Trained) -> dict[str, Any]:
    config = model.config
    return {
        "name": name,
        "run": config.run_id,
        "n": counts(config.model).n_compute,
        "tokens": config.trained_tokens,
        "source": config.data.source,
        "loss": model.result.loss,
        "window": model.window,
        "template": template_of(model),
        "likely": LIKELY,
    }


def in_time() -> type[asyncio.Protocol]:
    """HTTP as uvicorn speaks it, but a connection that asks nothing for HEAD_SECONDS is closed: uvicorn waits for the
    end of a request's head for ever.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class InTime(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.look_again()

        def connection_lost(self, exc: Exception | None) -> None:
            self.next_look.cancel()
            super().connection_lost(exc)

        def asked_last(self) -> tuple[Any, bool]:
            """The last request, and whether it has its answer."""
            return self.cycle, self.cycle is None or self.cycle.response_complete

        def look_again(self) -> None:
            self.next_look = self.loop.call_later(HEAD_SECONDS, self.look, self.asked_last())

        def look(self, before: tuple[Any, bool]) -> None:
            if before[1] and self.asked_last() == before:
                self.transport.close()
            else:
                self.look_again()

    return InTime


def serve(
    models: Sequence[Trained],
    names: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 0,
    allowed: Sequence[str] = (),
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves until SIGINT or SIGTERM; `ready` is called with the page's address. For the main thread.

    Raises InputError where the address cannot be bound.
    """
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with started(models, names, host, port, allowed) as url:
            ready(url)
            told.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def started(
    models: Sequence[Trained], names: Sequence[str], host: str = "127.0.0.1", port: int = 0, allowed: Sequence[str] = ()
) -> Iterator[str]:
    """The page's address, served within the block. Raises InputError where it cannot be bound."""
    import uvicorn

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended holds its port
        listening.bind((host, port))
        listening.listen()
    except (OSError, OverflowError, UnicodeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--host {host} --port {port}: {reason}; choose another") from None
    with listening, ThreadPoolExecutor(ANSWERING) as workers:
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        known = {shown, *allowed, *(LOOPBACK if shown in LOOPBACK else ())}
        desk = Desk(models, names, frozenset(f"{name.lower()}:{port}" for name in known), workers)
        settings = uvicorn.Config(
            application(desk),
            http=in_time(),
            log_level="critical",
            access_log=False,
            lifespan="off",
            loop="asyncio",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=LEAVE_SECONDS,
        )
        server = uvicorn.Server(settings)
        # Outside the main thread uvicorn leaves signals alone, which it would raise again at its end.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://{shown}:{port}/"
        finally:
            desk.ending.set()
            server.should_exit = True
            thread.join()
