"""What the tests have in common: a model that follows scripts, servers, visitors, a browser.

The servers and the model are real ones on free ports; nothing of aiohttp is mocked.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import importlib.resources
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID
from multidict import CIMultiDict
from playwright.async_api import ConsoleMessage, Page, async_playwright

import leflux_server as lf

Json = dict[str, Any]
Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture
Request = pytest.FixtureRequest
ORIGIN = "https://acme.com"
SHOP: Json = {"id": "shop", "name": "Acme Shop", "allowed_hosts": ["acme.com", "localhost"]}
OTHER: Json = {"id": "other", "name": "Other", "allowed_hosts": ["other.example"]}
PATIENCE_SECONDS = 15  # for what must happen; nothing waits so long unless it fails
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TURN_ENDS = "message_done message ui_block action_plan confirmation_required task_complete".split()


# ---------------------------------------------------------------------------------------------
# A model that follows scripts


def sse(*events: Any) -> bytes:
    """Encode Server-Sent Events; a string is its own data."""
    lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in events]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def chunk(content: Any, **choice: Any) -> Json:
    return {"choices": [{"index": 0, "delta": {"content": content}, **choice}]}


def reply(message: str) -> list[bytes]:
    """A script that answers with the JSON the model is asked for."""
    return [sse(chunk(json.dumps({"message": message})), "[DONE]")]


def act(message: str = "", action: Any = None) -> list[bytes]:
    """A script that answers with a message and an action."""
    return [sse(chunk(json.dumps({"message": message, "action": action})), "[DONE]")]


def using(tokens: int, text: str = "ok") -> list[bytes]:
    """A script that reports its usage."""
    usage = {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens}
    end = {"choices": [], "usage": usage}
    return [sse(chunk(json.dumps({"message": text})), end, "[DONE]")]


Step = bytes | Callable[[web.Request], Awaitable[object]]
Script = Sequence[Step] | Callable[[web.Request], Awaitable[web.StreamResponse]]


async def forever(_: web.Request) -> None:
    await asyncio.Event().wait()


async def cut_wire(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


async def reset(request: web.Request) -> web.Response:
    await cut_wire(request)
    return web.Response()


def status(code: int, body: Any = None, **headers: str) -> Script:
    """A script that answers with a status and a JSON body."""

    async def answer(_: web.Request) -> web.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response(body, status=code, headers=named)

    return answer


def complaint(text: str, code: int = 400) -> Script:
    return status(code, {"error": {"message": text, "type": "invalid_request_error"}})


class FakeModel:
    """A chat/completions endpoint: each request gets the next script, then "ok" or another."""

    def __init__(self) -> None:
        self.url = ""
        self.scripts: deque[Script] = deque()
        self.otherwise: Script = reply("ok")  # when there is no script
        self.requests: list[Json] = []
        self.headers: list[Mapping[str, str]] = []
        self.hung_up = 0  # streams that the server did not hear to their end
        self.gate = asyncio.Semaphore(0)

    async def at_gate(self, _: web.Request) -> None:
        """A step that waits for the test to say gate.release()."""
        await self.gate.acquire()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.headers.append(request.headers)
        script = self.scripts.popleft() if self.scripts else self.otherwise
        if callable(script):
            return await script(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for step in script:
                await (response.write(step) if isinstance(step, bytes) else step(request))
        except ConnectionError:
            self.hung_up += 1
        except asyncio.CancelledError:
            self.hung_up += 1
            raise
        return response

    def prompt(self, number: int = -1) -> str:
        """Everything a request told the model."""
        return "\n".join(m["content"] for m in self.requests[number]["messages"])


@contextlib.asynccontextmanager
async def hosted(
    app: web.Application, tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[int]:
    """Serve an app on a free port of 127.0.0.1; yields the port."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, **options)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def listening(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """Serve every path with a handler; yields its URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    async with hosted(app, tls) as port:
        yield f"{'https' if tls else 'http'}://localhost:{port}"


@pytest.fixture
async def model() -> AsyncIterator[FakeModel]:
    fake = FakeModel()
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", fake.answer)
    async with hosted(app, handler_cancellation=True) as port:
        fake.url = f"http://127.0.0.1:{port}/v1"
        yield fake


# ---------------------------------------------------------------------------------------------
# Tokens: keys as Google publishes them, and what they sign

PROJECT = "leflux-test"
ISSUER = f"https://securetoken.google.com/{PROJECT}"
NOW = int(time.time())
MISSING = object()
CLAIMS: Json = {
    **{"aud": PROJECT, "iss": ISSUER, "sub": "olga", "user_id": "olga", "exp": NOW + 3600},
    **{"iat": NOW - 60, "auth_time": NOW - 600, "firebase": {"sign_in_provider": "google.com"}},
}
HEADER: Json = {"alg": "RS256", "kid": "key-1", "typ": "JWT"}


@functools.cache
def private_key(number: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@functools.cache
def certificate(number: int) -> str:
    """A self-signed X.509 certificate as Google publishes them; number 0 is not RSA."""
    key = private_key(number) if number else ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "securetoken.test")])
    today = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(today - timedelta(1)).not_valid_after(today + timedelta(1))
    signed = builder.sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign_rsa(signed: bytes, number: int = 1, digest: hashes.HashAlgorithm | None = None) -> bytes:
    return private_key(number).sign(signed, padding.PKCS1v15(), digest or hashes.SHA256())


Signer = Callable[[bytes], bytes]


def join_token(header: bytes, payload: bytes, sign: Signer = sign_rsa) -> str:
    signed = f"{base64url(header)}.{base64url(payload)}"
    return f"{signed}.{base64url(sign(signed.encode()))}"


def changed(original: Json, changes: Mapping[str, Any]) -> bytes:
    fields = {**original, **changes}
    return json.dumps({k: v for k, v in fields.items() if v is not MISSING}).encode()


def make_token(
    claims: Mapping[str, Any] | None = None,
    header: Mapping[str, Any] | None = None,
    sign: Signer = sign_rsa,
) -> str:
    """A Firebase ID token with changed claims and header fields, rightly signed all the same."""
    return join_token(changed(HEADER, header or {}), changed(CLAIMS, claims or {}), sign)


class KeyServer:
    """Publishes certificates as Google does."""

    def __init__(self) -> None:
        self.url = ""
        self.certificates: Any = {"key-1": certificate(1)}
        self.cache_control = "public, max-age=3600, must-revalidate, no-transform"
        self.fetches = 0
        self.instead: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.fetches += 1
        if self.instead is not None:
            return await self.instead(request)
        headers = {"Cache-Control": self.cache_control} if self.cache_control else {}
        return web.json_response(self.certificates, headers=headers)


@pytest.fixture
async def key_server() -> AsyncIterator[KeyServer]:
    published = KeyServer()
    async with listening(published.answer) as url:
        published.url = f"{url}/keys"
        yield published


# ---------------------------------------------------------------------------------------------
# The admin API: two sites, and who comes to it

CUT_SHORT = "\n\n" + lf.ENGLISH("cut_short")
REFUSAL = "Enough for today, see you tomorrow."
MANAGED: Json = {
    **SHOP,
    "owners": ["olga", "Owner@Example.com"],
    "instructions": "Be kind.",
    "refusal": REFUSAL,
    "config": {"greeting": "Welcome!", "launcher": {"shape": "pill", "size": "lg"}},
}
FOREIGN: Json = {**OTHER, "owners": ["otto"]}
MANAGED_CONFIG: Json = {
    **{"layout": "floating", "primaryColor": "#a855f7", "greeting": "Welcome!"},
    **{"position": "bottom-right", "nudge": {"enabled": False}, "quickChips": []},
    "launcher": {"hidden": False, "shape": "pill", "size": "lg", "icon": "chat", "glow": True},
}
MANAGED_SITE: Json = {
    **{"id": "shop", "name": "Acme Shop", "allowedHosts": ["acme.com", "localhost"]},
    **{"owners": ["olga", "Owner@Example.com"], "instructions": "Be kind.", "refusal": REFUSAL},
    **{"restrictions": [], "crawl": "", "crawlPages": 200, "crawlHours": 24, "snippets": []},
    **{"notifyUrl": "", "paused": False, "config": MANAGED_CONFIG},
    "usage": {"messagesToday": 0, "tokensToday": 0},
    "budget": {"messagesPerDay": 0, "tokensPerDay": 0},
}
PEOPLE: dict[str, Json] = {
    "owner": {"sub": "olga"},
    "owner by mail": {"sub": "o1", "email": "OWNER@example.COM", "email_verified": True},
    "other owner": {"sub": "otto"},
    "admin": {"sub": "root"},
    "admin by mail": {"sub": "r1", "email": "boss@EXAMPLE.com", "email_verified": True},
    "stranger": {"sub": "eve"},
    "unverified owner": {"sub": "e1", "email": "owner@example.com", "email_verified": False},
    "unverified admin": {"sub": "e2", "email": "boss@example.com"},
    "half verified admin": {"sub": "e3", "email": "boss@example.com", "email_verified": "true"},
    "look-alike": {"sub": "OLGA", "email": "owner@example.com.evil.test", "email_verified": True},
    "nameless": {"sub": "e4", "email": "", "email_verified": True},
    "long s": {"sub": "e5", "email": "bo\u017fs@example.com", "email_verified": True},
}


@functools.cache
def bearer(who: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {make_token(PEOPLE[who])}"}


class Hook:
    """A notify_url: notes what comes, and answers with the next of its statuses, else 204."""

    def __init__(self) -> None:
        self.url = ""
        self.statuses: deque[int] = deque()
        self.got: list[Json] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.got.append(await request.json())
        code = self.statuses.popleft() if self.statuses else 204
        return web.Response(status=code, headers={"Location": "/elsewhere"})


@pytest.fixture
async def hook() -> AsyncIterator[Hook]:
    there = Hook()
    async with listening(there.answer) as url:
        there.url = f"{url}/hook?key=s3cret"
        yield there


# ---------------------------------------------------------------------------------------------
# A server and its visitors


def make_config(model: FakeModel | None = None, folder: Path = lf.HERE, **tables: Any) -> lf.Config:
    """The configuration of a test server: tables as in config.toml over small defaults."""
    table: Json = {"llm": {"base_url": model.url} if model else {}, "sites": [SHOP, OTHER]}
    for name, values in tables.items():
        table[name] = values if name == "sites" else {**table.get(name, {}), **values}
    server = {"port": 0, "state_dir": "", "shutdown_seconds": 0.1}
    table["server"] = {**server, **table.get("server", {})}
    # Of budgets a test has what it sets, and one address may use it all.
    limits = {"site_messages_per_day": 0, "site_tokens_per_day": 0, "address_share": 1}
    table["limits"] = {**limits, **table.get("limits", {})}
    return lf.parse_config(table, {}, folder)


@dataclasses.dataclass
class Answer:
    status: int
    body: Any
    headers: Mapping[str, str]
    raw: bytes

    @property
    def error(self) -> tuple[int, str]:
        """Status and code of an error."""
        assert self.headers["Content-Type"].startswith("application/json")
        return self.status, error_code(self.body)


def error_code(body: Any) -> str:
    """The code of an error, once its shape is proven."""
    assert isinstance(body, dict)
    assert isinstance(body["error"], str)
    assert isinstance(body["message"], str)
    assert body["message"]
    assert isinstance(body["details"], dict)
    more = {"host", "signupUrl"} if body["error"] == "host_not_registered" else set()
    assert body.keys() == {"error", "message", "details"} | more
    assert "Traceback" not in json.dumps(body)
    return body["error"]


class Server:
    """A running server as its callers see it."""

    def __init__(self, url: str, app: lf.AppState | None = None, **connection: Any) -> None:
        self.url, self._app, self.connection = url, app, connection
        self.sockets: list[aiohttp.ClientWebSocketResponse] = []

    async def __aenter__(self) -> Server:
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, **self.connection),
            timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(ws.close() for ws in self.sockets))
        await self.http.close()

    @property
    def app(self) -> lf.AppState:
        assert self._app is not None
        return self._app

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        origin: str | None = ORIGIN,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> Answer:
        sent: CIMultiDict[str] = CIMultiDict(headers or {})
        if origin is not None:
            sent.add("Origin", origin)
        if body is not None:
            data = json.dumps(body).encode()
            sent.setdefault("Content-Type", "text/plain")  # any will do
        async with self.http.request(method, self.url + path, data=data, headers=sent) as response:
            raw = await response.read()
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        parsed = json.loads(raw) if is_json else None
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers.get("Server", "") in ("", "nginx")  # and no version
        return Answer(response.status, parsed, response.headers, raw)

    async def init(self, **more: Any) -> Answer:
        return await self.call("POST", "/api/session/init", {}, **more)

    async def visitor(
        self, origin: str = ORIGIN, *, connect: bool = True, page: str = ""
    ) -> Visitor:
        """A new session, and a socket that has joined it."""
        body = {"pageUrl": page} if page else {}
        answer = await self.call("POST", "/api/session/init", body, origin=origin)
        assert answer.status == 200, answer.raw
        visitor = Visitor(self, answer.body["sessionId"], origin)
        if connect:
            await visitor.connect()
        return visitor

    async def socket(
        self, path: str = "/", origin: str | None = ORIGIN, **options: Any
    ) -> aiohttp.ClientWebSocketResponse:
        headers = {} if origin is None else {"Origin": origin}
        ws: aiohttp.ClientWebSocketResponse = await self.http.ws_connect(
            self.url + path, headers=headers, max_msg_size=0, **options
        )
        self.sockets.append(ws)
        return ws

    async def manage(
        self, method: str, path: str = "", body: Any = None, who: str = "owner"
    ) -> Answer:
        """A request of one of PEOPLE to /api/admin/sites<path>."""
        path = f"/api/admin/sites{path}"
        return await self.call(method, path, body, origin=None, headers=bearer(who))

    async def details(self, site_id: str = "shop") -> Json:
        """A site as an admin sees it."""
        answer = await self.manage("GET", f"/{site_id}", who="admin")
        assert answer.status == 200, answer.raw
        return cast(Json, answer.body)


class Visitor:
    """A session and the socket that reads it."""

    def __init__(self, server: Server, session_id: str, origin: str = ORIGIN) -> None:
        self.server, self.id, self.origin = server, session_id, origin
        self.ws: aiohttp.ClientWebSocketResponse = cast(Any, None)
        self.frames: list[Json] = []  # everything heard, on all its sockets

    async def connect(self, last_seq: int | None = None) -> Json:
        """Open a socket, join by query, return what session_joined says."""
        last = "" if last_seq is None else f"&lastSeq={last_seq}"
        path = f"/?sessionId={self.id}{last}"
        self.ws = await self.server.socket(path, self.origin)
        joined = await self.next()
        assert joined["event"] == "session_joined"
        return cast(Json, joined["data"])

    async def next(self) -> Json:
        frame = await read_frame(self.ws)
        self.frames.append(frame)
        return frame

    async def turn(self) -> list[Json]:
        """Hear frames to the end of a turn."""
        heard = [await self.next()]
        while heard[-1]["event"] not in TURN_ENDS or await self.goes_on_after(heard[-1]):
            heard.append(await self.next())
        return heard

    async def goes_on_after(self, frame: Json) -> bool:
        """Whether an event follows the text that a message_done has locked."""
        if frame["event"] != "message_done":
            return False
        if self.server._app is None:  # a program of its own: what follows comes at once
            await asyncio.sleep(0.1)
            return any(m.type is WSMsgType.TEXT for m, _ in cast(Any, self.ws)._reader._buffer)
        return self.id in self.server.app.sessions and self.session.next_seq - 1 > frame["seq"]

    async def post(self, message: Any = "Hello", **fields: Any) -> Answer:
        body = {"sessionId": self.id, "message": message, **fields}
        return await self.server.call("POST", "/api/chat", body, origin=self.origin)

    async def chat(self, message: str = "Hello", **fields: Any) -> str:
        """Say something and return its messageId."""
        answer = await self.post(message, **fields)
        assert answer.status == 200, answer.raw
        assert answer.body == {"messageId": answer.body["messageId"], "status": "processing"}
        assert re.fullmatch(r"msg-[0-9]{13}", answer.body["messageId"])
        return cast(str, answer.body["messageId"])

    async def ask(self, message: str = "Hello", **fields: Any) -> Json:
        """Say something and return the event that ends the turn."""
        await self.chat(message, **fields)
        return (await self.turn())[-1]

    async def send(self, event: str, **data: Any) -> None:
        await self.ws.send_json({"event": event, "data": {"sessionId": self.id, **data}})

    async def get(self) -> Answer:
        return await self.server.call("GET", f"/api/session/{self.id}", origin=self.origin)

    async def delete(self) -> Answer:
        return await self.server.call("DELETE", f"/api/session/{self.id}", origin=self.origin)

    @property
    def session(self) -> lf.Session:
        """The session as the server has it."""
        return self.server.app.sessions[self.id]

    def age(self, seconds: float) -> None:
        """Let the session have been idle for so much longer."""
        self.session.last_active -= seconds

    async def history(self) -> list[tuple[str, str]]:
        answer = await self.get()
        return [(m["role"], m["content"]) for m in answer.body["history"]]

    async def expect_open(self) -> None:
        """The socket still takes frames: a wrong one is answered."""
        await self.ws.send_str("barrier")
        while (frame := await self.next())["event"] != "error":
            pass
        assert frame["data"]["code"] == "invalid_event"


async def read_frame(ws: aiohttp.ClientWebSocketResponse) -> Json:
    message = await ws.receive(PATIENCE_SECONDS)
    assert message.type is WSMsgType.TEXT, message
    frame = json.loads(message.data)
    assert frame.keys() == {"event", "data", "seq"}
    assert type(frame["seq"]) is int
    return cast(Json, frame)


async def read_close(ws: aiohttp.ClientWebSocketResponse) -> tuple[list[str], int | None]:
    """Read to the close: the codes of the errors before it, and its own code."""
    codes: list[str] = []
    while (message := await ws.receive(PATIENCE_SECONDS)).type is WSMsgType.TEXT:
        frame = json.loads(message.data)
        if frame["event"] == "error":
            assert frame["data"]["message"]
            codes.append(frame["data"]["code"])
    assert message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING), message
    # Where the connection ends before its reply is out, aiohttp's client forgets the code.
    return codes, message.data if message.type is WSMsgType.CLOSE else ws.close_code


def deltas(frames: Sequence[Json]) -> str:
    return "".join(f["data"]["delta"] for f in frames if f["event"] == "message_chunk")


def expect_no_gaps(frames: Sequence[Json], first: int = 1) -> None:
    """The events of a conversation are numbered one by one."""
    numbers = [f["seq"] for f in frames if f["event"] not in ("session_joined", "error")]
    assert numbers == list(range(first, first + len(numbers)))


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 (the state of the server has no event to wait for)
            await asyncio.sleep(0.005)


async def dial(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection to a server."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def raw_http(url: str, request: bytes) -> tuple[int, str, Any]:
    """Send bytes; return the status, head and JSON of the answer."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        reader, writer = await dial(url)
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"content-length: (\d+)", head, re.I)
        body = await reader.readexactly(int(length[1]) if length else 0)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return int(head.split()[1]), head, json.loads(body) if body.startswith(b"{") else None


def needs(*names: str) -> str:
    """The path of a program, by the first of its names that is there.

    Without it the test is skipped; a CI machine must have it.
    """
    places = os.environ.get("PATH", os.defpath) + ":/usr/sbin"
    path = next(filter(None, (shutil.which(name, path=places) for name in names)), None)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{names[0]} is not installed")
    return path


Serve = Callable[..., Awaitable[Server]]
with_config = pytest.mark.config  # @with_config(limits={...}): tables for the server of a test
with_constants = pytest.mark.constants  # @with_constants(PING_SECONDS=0.1): in the server's file


def cases(names: str, *rows: Any) -> pytest.MarkDecorator:
    """The cases of a test: the names of its columns ("given, expected"), and their rows."""
    return pytest.mark.parametrize(names, rows)


def marked(request: Request, name: str) -> Json:
    """What a mark of the test says."""
    mark = request.node.get_closest_marker(name)
    return mark.kwargs if mark else {}


@pytest.fixture
async def serve(request: Request, monkeypatch: Patch) -> AsyncIterator[Serve]:
    """Start servers: serve(model, limits={...}, ...) takes what make_config takes."""
    for name, value in marked(request, "constants").items():
        monkeypatch.setattr(lf, name, value)
    async with contextlib.AsyncExitStack() as stack:

        async def start(model: FakeModel | None = None, **tables: Any) -> Server:
            serving = lf.serving(make_config(model, **tables))
            app, url = await stack.enter_async_context(serving)
            return await stack.enter_async_context(Server(url, app[lf.APP_STATE]))

        yield start


@pytest.fixture
async def server(request: Request, serve: Serve, model: FakeModel) -> Server:
    """A server with a fake model."""
    return await serve(model, **marked(request, "config"))


@pytest.fixture
async def visitor(server: Server) -> Visitor:
    """A visitor of that server, on a page of the shop, with an open socket."""
    return await server.visitor()


@pytest.fixture
async def keeper(request: Request, serve: Serve, model: FakeModel, tmp_path: Path) -> Visitor:
    """A visitor of a server with a fake model that keeps its state in tmp_path."""
    server = await serve(model, server=on_disk(tmp_path), **marked(request, "config"))
    return await server.visitor()


def office(key_server: KeyServer | None, **tables: Any) -> Json:
    """The tables of a server with an admin API; without a key server it has none."""
    firebase: Json = {"admins": ["root", "Boss@Example.com"]}
    if key_server is not None:
        firebase |= {"project_id": PROJECT, "keys_url": key_server.url}
    return {"sites": [MANAGED, FOREIGN], "firebase": firebase, **tables}


@pytest.fixture
async def admin(request: Request, serve: Serve, model: FakeModel, key_server: KeyServer) -> Server:
    """A server with an admin API, a fake model, and two sites to manage."""
    return await serve(model, **office(key_server, **marked(request, "config")))


@pytest.fixture
async def archive(
    request: Request, serve: Serve, model: FakeModel, key_server: KeyServer, tmp_path: Path
) -> Server:
    """A server with an admin API that keeps chats on disk."""
    tables = {"server": on_disk(tmp_path), **marked(request, "config")}
    return await serve(model, **office(key_server, **tables))


@pytest.fixture(autouse=True)
def quiet_log(caplog: Log) -> Iterator[None]:
    """Nothing that visitors or providers do wrong is an error of ours, and ids stay secret."""
    caplog.set_level(logging.INFO)
    yield
    for record in caplog.get_records("call"):
        if record.name == "aiohttp.server":  # of the models and proxies that tests play
            continue
        assert record.levelno < logging.ERROR, record.getMessage()
        assert not record.exc_info, record.getMessage()
        assert not UUID.search(record.getMessage())


# ---------------------------------------------------------------------------------------------
# The server as a program


async def start_program(
    *arguments: str, constants: str = "", **environ: str
) -> asyncio.subprocess.Process:
    """Start the server's file, with other constants perhaps: "lf.SWEEP_SECONDS = 1"."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LEFLUX_")}
    changed = f"import sys; import leflux_server as lf; {constants}; sys.exit(lf.main())"
    start = ("-c", changed) if constants else (str(lf.__file__),)
    inherited["PYTHONPATH"] = str(lf.HERE)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, *start, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**inherited, **environ},
    )


async def run_program(*arguments: str, constants: str = "", **environ: str) -> tuple[int, str, str]:
    """Run the server's file; return its exit code, output and errors."""
    child = await start_program(*arguments, constants=constants, **environ)
    out, err = await asyncio.wait_for(child.communicate(), PATIENCE_SECONDS)
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()


@dataclasses.dataclass
class Program:
    """The running server program."""

    child: asyncio.subprocess.Process
    server: Server
    first_line: str

    async def end(self) -> tuple[int, str]:
        """Wait for its end; return the exit code and everything it wrote."""
        out, err = await asyncio.wait_for(self.child.communicate(), PATIENCE_SECONDS)
        assert self.child.returncode is not None
        return self.child.returncode, self.first_line + out.decode() + err.decode()

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> str:
        """End it, with exit code 0 unless it is killed; returns everything it wrote."""
        self.child.send_signal(how)
        code, written = await self.end()
        assert code == (-how if how is signal.SIGKILL else 0)
        return written


@contextlib.asynccontextmanager
async def program(
    folder: Path, more: str = "", constants: str = "", **environ: str
) -> AsyncIterator[Program]:
    """Start the server's file with a configuration, and end it in any case."""
    path = folder / "config.toml"
    site = '[[sites]]\nid = "shop"\nname = "Shop"\nallowed_hosts = ["acme.com"]\n'
    path.write_text(f"{more}\n{site}")
    environ = {"LEFLUX_PORT": "0", "STATE_DIRECTORY": str(folder), **environ}
    child = await start_program("--config", str(path), constants=constants, **environ)
    try:
        assert child.stdout is not None
        line = (await asyncio.wait_for(child.stdout.readline(), PATIENCE_SECONDS)).decode()
        found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", line)
        assert found, line
        async with Server(found[0]) as server:
            yield Program(child, server, line)
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()


async def run_tool(*command: str) -> tuple[int, str]:
    """Run a program; return its exit code and all that it wrote."""
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(child.communicate(), 4 * PATIENCE_SECONDS)
    assert child.returncode is not None
    return child.returncode, out.decode()


# ---------------------------------------------------------------------------------------------
# State on disk: servers that are started again, a disk that is slow, clocks that go wrong


@contextlib.asynccontextmanager
async def running(config: lf.Config) -> AsyncIterator[Server]:
    """A server for the length of a block."""
    async with lf.serving(config) as (app, url), Server(url, app[lf.APP_STATE]) as server:
        yield server


def on_disk(folder: Path) -> Json:
    return {"state_dir": str(folder)}


def opened(folder: Path, name: str = "leflux.db") -> contextlib.closing[sqlite3.Connection]:
    """A server's database, as another program opens it."""
    return contextlib.closing(sqlite3.connect(folder / name, isolation_level=None))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a server's database to another program; closing lets go of it."""
    with opened(folder) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield


def query(folder: Path, sql: str, name: str = "leflux.db") -> list[tuple[Any, ...]]:
    """What another program reads from the database."""
    with opened(folder, name) as db:
        return db.execute(sql).fetchall()


def kept_messages(folder: Path, session_id: str) -> list[tuple[str, str]]:
    rows = query(
        folder,
        "SELECT json_extract(state, '$.id'), body FROM message JOIN session ON row = session"
        " ORDER BY number",
    )
    bodies = [json.loads(body) for session, body in rows if session == session_id]
    return [(body["role"], body["content"]) for body in bodies]


def traces(folder: Path, *secrets: str) -> list[str]:
    """The files of a folder that hold one of these texts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [p.name for p in files if any(s.encode() in p.read_bytes() for s in secrets)]


def snapshot(folder: Path, copy: Path) -> Path:
    """What kill -9 would leave of a server that has nothing to write."""
    copy.mkdir()
    for path in folder.glob("leflux.db*"):
        shutil.copy(path, copy)
    return copy


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def names(frames: list[Json]) -> list[str]:
    return [frame["event"] for frame in frames]


def errors_in(caplog: Log, *, clear: bool = False) -> list[str]:
    """The errors in the log, which may begin anew with that."""
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    if clear:
        caplog.clear()
    return errors


class Clock:
    """The time module as the server sees it: a test may move it ahead or stop the calendar."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.stopped_at: float | None = None

    def time(self) -> float:
        return time.time() + self.ahead if self.stopped_at is None else self.stopped_at

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: Patch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(lf, "time", moved)
    return moved


@pytest.fixture
async def kept(model: FakeModel, tmp_path: Path) -> Path:
    """A folder with the state of a server that has ended: long conversations in one file."""
    folder = tmp_path / "kept"
    async with running(make_config(model, server=on_disk(folder))) as server:
        for _ in range(4):
            visitor = await server.visitor()
            for number in range(3):
                await visitor.ask(f"{number} " + "Lorem ipsum " * 300)
    assert files_in(folder) == {"leflux.db", "knowledge.db"}
    return folder


def damage(folder: Path, name: str) -> None:
    path = folder / "leflux.db"
    size = path.stat().st_size
    if name == "not a database":
        path.write_bytes(b"This is no database. " * 1000)
    elif name == "truncated":
        os.truncate(path, size // 2)
    elif name == "pages overwritten":
        with path.open("r+b") as file:
            for page in range(4096, size, 8192):
                file.seek(page)
                file.write(b"\xff" * 4096)
    elif name == "a folder":
        path.unlink()
        path.mkdir()
    elif name == "a file in the folder's place":
        shutil.rmtree(folder)
        folder.touch()
    else:
        with opened(folder) as db:
            db.executescript(name)


DAMAGES = (
    "not a database",
    "truncated",
    "pages overwritten",
    "a folder",
    "a file in the folder's place",
    "PRAGMA user_version = 99",
    "PRAGMA journal_mode = DELETE; PRAGMA page_size = 8192; VACUUM",
    "PRAGMA journal_mode = DELETE; PRAGMA auto_vacuum = FULL; VACUUM",
    "DROP TABLE usage",
    "ALTER TABLE site RENAME COLUMN patch TO path",
)


# ---------------------------------------------------------------------------------------------
# A browser: Debian's Chromium, started once; each visit has cookies and storage of its own

# Headless and quiet: nothing is looked up or updated over the network.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --remote-debugging-port=0"
).split()
# What Chromium itself complains of when a test cuts a wire, or leaves a page with a socket.
NO_FAULT = re.compile("net::ERR|Failed to load resource|Back-Forward Cache")
Visit = Callable[..., Awaitable[Page]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", action="store_true", help="draw the README's pictures anew")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Chromium; yields the address that playwright connects to."""
    program = needs("chromium", "chromium-browser")
    folder = tmp_path_factory.mktemp("chromium")
    with subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        stderr=subprocess.PIPE,
        text=True,
    ) as browser:
        assert browser.stderr is not None
        for line in browser.stderr:
            if found := re.search(r"DevTools listening on (ws://\S+)", line):
                break
        else:
            pytest.fail("chromium did not start")
        yield found[1]
        browser.kill()


@pytest.fixture
async def visit(chromium: str, serve: Serve) -> AsyncIterator[Visit]:
    """Open pages as visitors: visit(url, width=..., dark=True, ...). Errors of a page fail.

    It names `serve` so that browsers leave before servers do.
    """
    problems: list[str] = []
    async with async_playwright() as playwright, contextlib.AsyncExitStack() as stack:
        browser = await playwright.chromium.connect_over_cdp(chromium)

        def hear(line: ConsoleMessage) -> None:
            if line.type == "error" and not NO_FAULT.search(line.text):
                problems.append(line.text)

        async def start(
            url: str, width: int = 1280, height: int = 800, dark: bool = False, **options: Any
        ) -> Page:
            context = await browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                **options,
            )
            stack.push_async_callback(context.close)
            page = await context.new_page()
            page.set_default_timeout(10_000)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", hear)
            await page.goto(url)
            return page

        yield start
    assert not problems


AXE = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
AXE_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


async def axe(page: Page) -> list[str]:
    """What axe-core finds wrong with the page, the widget included."""
    if not await page.evaluate("Boolean(window.axe)"):
        await page.evaluate(AXE)
    found = await page.evaluate("(runOnly) => axe.run(document, { runOnly })", AXE_RULES)
    return [
        f"{violation['id']} {node['target']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


# ---------------------------------------------------------------------------------------------
# Pages of a website that loads the widget


class Pages:
    """A website on localhost: pages["/path"] = (html, headers). Its origin is not the server's."""

    def __init__(self) -> None:
        self.url = ""
        self.server = ""
        self.html: dict[str, tuple[str, dict[str, str]]] = {}
        self.visits: list[str] = []

    def add(self, path: str, body: str, script: str = "async", **headers: str) -> str:
        """Put a page there whose body is followed by the widget's tag; returns its address."""
        tag = f'<script src="{self.server}/embed.js" {script}></script>'
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        title = f"<title>Page {path}</title>"
        self.html[path] = (f"<!doctype html><html lang=en>{title}<body>{body}{tag}", named)
        return self.url + path

    async def answer(self, request: web.Request) -> web.Response:
        self.visits.append(request.path_qs)
        if request.path not in self.html:
            raise web.HTTPNotFound
        html, headers = self.html[request.path]
        return web.Response(text=html, content_type="text/html", headers=headers)


@pytest.fixture
async def pages() -> AsyncIterator[Pages]:
    site = Pages()
    async with listening(site.answer) as site.url:
        yield site
