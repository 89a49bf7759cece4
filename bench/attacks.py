"""What strangers can do to everybody else: the longest waits of /health while they attack.

    python bench/attacks.py [--seconds 5]

For each attack a server and a fake model are started, the attackers run in a process of their own,
and /health is asked every 10 ms over a connection that was open before. Prints a Markdown table,
beside the waits how long the server was on a CPU meanwhile: on a busy machine that tells its part
from the others'. The exit code is 0 only if that is below 100 ms for 99 of 100 answers, each time.
Linux only; everything stays on 127.0.0.0/8.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import resource
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from processes import ORIGIN, SERVER, Program, running, write_config

Json = dict[str, Any]
LIMIT_MS = 100
OPEN_FILES = 300  # what the server may have in the attack on these
WIDE = "\ufdfa"  # NFKC makes 18 characters of it
FORMS_PAGE: Json = {
    "url": ORIGIN + "/",
    "indexedElements": [
        {"id": number, "type": "submit", "text": f"Send {number}", "parent": WIDE * 300}
        for number in range(50)
    ],
    "forms": [{"fields": WIDE * 1000} for _ in range(20)],
}
CLICKS = {
    "type": "execute_generic_sequence",
    "steps": [{"action": "click", "elementId": number} for number in range(50)],
}
MODEL_SAYS: Mapping[bytes, bytes] = {  # by what stands in the question
    b"#forms": b"data: %b\n\n"
    % json.dumps(
        {"choices": [{"delta": {"content": json.dumps({"message": "", "action": CLICKS})}}]}
    ).encode(),
    b"#half": b'data: {"choices": [{"delta": [[[[{"\n' * (840_000 // 37),
    b"#brackets": b"data: " + b"[" * 840_000 + b"\n\n",
}


async def raw(url: str, *parts: bytes, source: str = "127.0.0.1") -> None:
    """Send bytes on a connection of their own, and read until the server closes it."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        while await reader.read(65536):
            pass
    finally:
        writer.close()


def request(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Origin: {ORIGIN}", "Connection: close"]
    lines += [f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def unpack(url: str) -> None:
    """500 MB in 510 KB, to a path that nobody serves."""
    while True:
        await raw(url, request("/nope", packed(), "Content-Encoding: gzip"))


@functools.cache
def packed() -> bytes:
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    parts = [packer.compress(bytes(2**20)) for _ in range(500)]
    return b"".join([*parts, packer.flush()])


async def brackets(url: str) -> None:
    """256 KB of deep arrays."""
    arrays = b"[" + b",".join([b"[" * 61 + b"]" * 61] * 2_000) + b"]"
    while True:
        await raw(url, request("/api/chat", arrays))


async def ping(url: str) -> None:
    """Pings as fast as they go on a socket, and on the next one when that is closed."""
    upgrade = (
        f"GET / HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    pings = [b"\x89\x80\0\0\0\0" * 10_000] * 1000
    while True:
        with contextlib.suppress(ConnectionError):
            await raw(url, upgrade.encode(), *pings)


async def connect(url: str) -> None:
    """More connections than files may be open, from many addresses; none asks for anything."""
    async with asyncio.TaskGroup() as group:
        for number in range(1000):
            group.create_task(hold(url, f"127.0.1.{1 + number % 200}"))


async def hold(url: str, source: str) -> None:
    while True:
        with contextlib.suppress(OSError):
            await raw(url, source=source)
        await asyncio.sleep(0.1)


async def chat(url: str, kind: str, page: Json | None = None) -> None:
    """One question after the other, whose answers are made to be hard to read or to judge."""
    async with aiohttp.ClientSession(headers={"Origin": ORIGIN}) as http:
        async with http.post(url + "/api/session/init") as response:
            session = (await response.json())["sessionId"]
        async with http.ws_connect(f"{url}/?sessionId={session}", max_msg_size=0) as socket:
            while True:
                body = {"sessionId": session, "message": kind, "pageContext": page}
                async with http.post(url + "/api/chat", json=body) as response:
                    response.raise_for_status()
                async for frame in socket:
                    if any(end in frame.data[:30] for end in ('"message"', '"confirm', '"action')):
                        break


Attack = Callable[[str], Awaitable[None]]
ATTACKS: dict[str, tuple[int, Attack]] = {  # how many at once, and what each does
    "compressed bodies": (3, unpack),
    "brackets": (4, brackets),
    "pings": (4, ping),
    "connections beyond the files": (1, connect),
    "forms that grow when read": (2, lambda url: chat(url, "#forms", FORMS_PAGE)),
    "half lines from a model": (2, lambda url: chat(url, "#half")),
    "brackets from a model": (2, lambda url: chat(url, "#brackets")),
}


async def answer(request: web.Request) -> web.StreamResponse:
    """The model."""
    asked = await request.read()
    said = next(reply for kind, reply in MODEL_SAYS.items() if kind in asked)
    return web.Response(body=said + b"data: [DONE]\n\n", content_type="text/event-stream")


async def probe(program: Program, name: str, seconds: float) -> tuple[list[float], list[float]]:
    """Ask for /health while an attack goes on; returns the milliseconds that each answer took, and
    those that the server's main thread was on a CPU meanwhile, sorted."""
    took, busy = [], []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as http:
        async with http.get(program.url + "/health") as response:
            response.raise_for_status()
        command = (__file__, "--attack", name, "--url", program.url)
        attackers = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert attackers.stdout is not None
            await attackers.stdout.readline()  # they begin
            await asyncio.sleep(0.5)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                asked, before = time.perf_counter(), program.busy_ms()
                async with http.get(program.url + "/health") as response:
                    await response.read()
                took.append((time.perf_counter() - asked) * 1000)
                busy.append(program.busy_ms() - before)
                await asyncio.sleep(0.01)
            if attackers.returncode is not None:
                raise SystemExit(f"the attackers ended: {name}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                attackers.send_signal(signal.SIGKILL)
            await attackers.wait()
    return sorted(took), sorted(busy)


async def measure(seconds: float) -> bool:
    """Print a row for each attack; returns whether all are harmless."""
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", answer)
    model = web.AppRunner(app, access_log=None)
    await model.setup()
    await web.TCPSite(model, "127.0.0.1", 0).start()
    model_url = f"http://127.0.0.1:{model.addresses[0][1]}"
    print("| attack | p50, ms | p99, ms | longest | on a CPU, p99 | server's CPU | log, lines |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    harmless = True
    for name in ATTACKS:
        with tempfile.TemporaryDirectory() as folder:
            config = write_config(Path(folder), model_url, store=False)
            text = config.read_text().replace("[server]", "[server]\ntrusted_proxies = []")
            config.write_text(text.replace("connections_per_address = 1_000_000", ""))
            log = Path(folder) / "server.log"
            async with running(log, SERVER, "--config", str(config)) as program:
                if "files" in name:
                    limits = (OPEN_FILES, OPEN_FILES)
                    resource.prlimit(program.child.pid, resource.RLIMIT_NOFILE, limits)
                before, begun = program.cpu_seconds(), time.monotonic()
                took, busy = await probe(program, name, seconds)
                cpu = (program.cpu_seconds() - before) / (time.monotonic() - begun)
            lines = log.read_text().count("\n")
        ms = [took[len(took) // 2], took[len(took) * 99 // 100], took[-1]]
        ms.append(on_cpu := busy[len(busy) * 99 // 100])
        waits = " | ".join(f"{one:.1f}" for one in ms)
        print(f"| {name} | {waits} | {cpu:.0%} | {lines} |", flush=True)
        harmless &= on_cpu < LIMIT_MS
    await model.cleanup()
    return harmless


async def attack(name: str, url: str) -> None:
    count, one = ATTACKS[name]
    if one is unpack:
        packed()
    print("begun", flush=True)
    await asyncio.gather(*(one(url) for _ in range(count)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Attacks leflux, and watches the others wait.")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--attack", choices=ATTACKS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        asyncio.run(attack(options.attack, options.url))
    return 0 if asyncio.run(measure(options.seconds)) else 1


if __name__ == "__main__":
    sys.exit(main())
