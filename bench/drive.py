"""Visitors for the benchmark, and what is measured while they chat. Speaks to leflux and floor."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import statistics
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

import aiohttp
import orjson
from processes import ORIGIN, Program

Figures = dict[str, float]
PAGE: dict[str, Any] = {
    "url": ORIGIN + "/pricing",
    "title": "Pricing",
    "indexedElements": [
        {"id": number, "type": "button", "text": f"Button {number}", "parent": "Hero"}
        for number in range(40)
    ],
    "visibleText": "Choose a plan. " * 60,
    "forms": [],
    "previouslyFilledFields": [],
}
CONNECTING_AT_ONCE = 50
TURN_SECONDS = 120


class Visitor:
    """A session and a socket that is always read, as a browser does."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http, self._url = http, url
        self._id = ""
        self._first = 0.0  # when the first chunk of the turn came
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def connect(self) -> None:
        async with self._http.post(self._url + "/api/session/init", json={}) as response:
            response.raise_for_status()
            self._id = (await response.json())["sessionId"]
        await self._open(f"/?sessionId={self._id}")
        await self.ws.receive()  # session_joined
        self._reader = asyncio.create_task(self._read())

    async def _open(self, path: str) -> None:
        self.ws = await self._http.ws_connect(self._url + path, max_msg_size=0, autoping=True)

    async def _read(self) -> None:
        async for frame in self.ws:
            await self._hear(frame.data)
        if not self._ended.done():
            self._ended.cancel()

    async def _hear(self, text: str) -> None:
        if '"message_chunk"' in text:
            self._first = self._first or time.perf_counter()
        elif not self._ended.done():
            if '"message_done"' in text:
                self._ended.set_result(text)
            else:
                self._ended.set_exception(RuntimeError(text[:300]))

    async def _send(self, message: str) -> None:
        body = {"sessionId": self._id, "message": message, "pageContext": PAGE}
        async with self._http.post(self._url + "/api/chat", data=orjson.dumps(body)) as response:
            response.raise_for_status()
            await response.read()

    async def ask(self, script: str) -> tuple[int, float, float]:
        """One turn: tokens, seconds to the answer of /api/chat, seconds to the first chunk."""
        self._first, self._ended = 0.0, asyncio.get_running_loop().create_future()
        asked = time.perf_counter()
        await self._send(f"{script} please")
        answered = time.perf_counter()
        async with asyncio.timeout(TURN_SECONDS):
            tokens = (await self._ended).count("tok")
        wanted = int(script[2:].partition(",")[0])
        if tokens != wanted:
            raise RuntimeError(f"{tokens} of {wanted} tokens arrived")
        return tokens, answered - asked, self._first - asked

    async def leave(self) -> None:
        await self.ws.close()
        await self._reader


class Crowd(contextlib.AsyncExitStack):
    """Connected visitors of one program; they leave with the end of the block."""

    def __init__(self, program: Program, kind: type[Visitor] = Visitor) -> None:
        super().__init__()
        self.program, self._kind = program, kind
        self.visitors: list[Visitor] = []

    async def __aenter__(self) -> Crowd:
        await super().__aenter__()
        http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=TURN_SECONDS),
            headers={"Origin": ORIGIN, "Content-Type": "application/json"},
        )
        self._http = await self.enter_async_context(http)
        self.push_async_callback(self._leave)
        return self

    async def _leave(self) -> None:
        await asyncio.gather(*(visitor.leave() for visitor in self.visitors))

    async def grow(self, count: int) -> None:
        """Connect visitors until there are count of them."""
        while (missing := count - len(self.visitors)) > 0:
            some = min(missing, CONNECTING_AT_ONCE)
            more = [self._kind(self._http, self.program.url) for _ in range(some)]
            await asyncio.gather(*(visitor.connect() for visitor in more))
            self.visitors += more
        gc.collect()
        gc.freeze()  # the client shall not collect garbage while it measures

    async def stream(self, count: int, turns: int, script: str) -> Figures:
        """The first count visitors ask all at once, turns times each."""

        async def visit(visitor: Visitor) -> list[tuple[int, float, float]]:
            return [await visitor.ask(script) for _ in range(turns)]

        before = self.program.cpu_seconds()
        heard = await asyncio.gather(*map(visit, self.visitors[:count]))
        return figures(self.program.cpu_seconds() - before, list(itertools.chain(*heard)))

    async def go_steadily(
        self, seconds: float, per_minute: float, script: str, ramp: float
    ) -> Figures:
        """Each visitor asks per_minute questions, evenly spread; measured after a ramp."""
        assert per_minute * (ramp + seconds) <= 60, "it must not ask while its answer comes"
        loop = asyncio.get_running_loop()
        gap, start = 60 / per_minute / len(self.visitors), loop.time()
        turns: list[asyncio.Task[tuple[int, float, float]]] = []

        async def ask_until(end: float) -> None:
            while (due := start + gap * len(turns)) < end:
                await asyncio.sleep(due - loop.time())
                visitor = self.visitors[len(turns) % len(self.visitors)]
                turns.append(asyncio.create_task(visitor.ask(script)))
            await asyncio.sleep(end - loop.time())

        await ask_until(start + ramp)
        ramped, before = len(turns), self.program.cpu_seconds()
        await ask_until(start + ramp + seconds)
        spent = self.program.cpu_seconds() - before
        heard = await asyncio.gather(*turns)
        return figures(spent, heard[ramped:]) | {"cpu_percent": spent / seconds * 100}


def figures(cpu_seconds: float, turns: Sequence[tuple[int, float, float]]) -> Figures:
    tokens, chats, firsts = zip(*turns, strict=True)
    return {
        "cpu_us_per_token": cpu_seconds / sum(tokens) * 1e6,
        "first_ms_p50": statistics.median(firsts) * 1e3,
        "first_ms_p95": sorted(firsts)[int(len(firsts) * 0.95)] * 1e3,
        "chat_ms_p50": statistics.median(chats) * 1e3,
    }


class Wire:
    """A kept connection with ready-made requests: so cheap that the server is what is measured."""

    async def __aenter__(self) -> Wire:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    def __init__(self, url: str) -> None:
        address = urllib.parse.urlsplit(url)
        self._host, self._port = address.hostname, address.port

    async def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Send a request and return the answer's body; raise RuntimeError unless it is 200."""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: {ORIGIN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = answer.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        content = await self._reader.readexactly(int(length))
        if not answer.startswith(b"http/1.1 200"):
            raise RuntimeError(answer.decode() + content.decode())
        return content


async def post_all(url: str, path: str, bodies: Sequence[bytes], wires: int = 32) -> list[bytes]:
    """Post every body, several at a time; the answers come in another order."""

    async def post(some: Sequence[bytes]) -> list[bytes]:
        async with Wire(url) as wire:
            return [await wire.call("POST", path, body) for body in some]

    answers = await asyncio.gather(*(post(bodies[n::wires]) for n in range(wires)))
    return list(itertools.chain(*answers))


async def open_sessions(url: str, count: int) -> list[str]:
    """Return the ids of new sessions."""
    answers = await post_all(url, "/api/session/init", [b"{}"] * count)
    return [orjson.loads(answer)["sessionId"] for answer in answers]


async def longest_wait_ms(url: str, seconds: float) -> float:
    """Ask for /health again and again; the longest answer shows how long the loop was blocked."""
    longest, end = 0.0, time.perf_counter() + seconds
    async with Wire(url) as wire:
        while (asked := time.perf_counter()) < end:
            await wire.call("GET", "/health")
            longest = max(longest, time.perf_counter() - asked)
            await asyncio.sleep(0.0005)
    return longest * 1e3
