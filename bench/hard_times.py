"""What else goes on in a soak: a website that is crawled, an owner at work, messages on their way
to the notify_url, and a machine whose disk fills up or is slow, and whose clock jumps."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from processes import Program
from rude_visitors import Json, Record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest  # whose tokens are signed as Google does

PAGES = 12
FULL_BYTES = 65536  # of each file, when the disk is full
FAULTS = ("full disk", "slow disk", "clock")
DISK_SECONDS, CLOCK_SECONDS = 3, 2 * 86400
PAUSE_SECONDS, FAULT_SECONDS = 15, 6
END_SECONDS = 30  # before the end nothing breaks any more; a shorter run crawls no website whole
DELIVERY_SECONDS = 150  # a minute until the second try, and one message after the other
SITE = "/api/admin/sites/bench"


class Surroundings:
    """The servers around leflux: a website, a notify_url that often fails, and Google's keys."""

    def __init__(self, record: Record) -> None:
        self.choose = random.Random(f"{record.seed} surroundings")
        self.delivered: set[str] = set()
        self.version = 0  # of the website's texts
        self.keys = conftest.KeyServer()
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/keys":
            return await self.keys.answer(request)
        if request.path == "/notify":
            if self.choose.random() < 0.2:
                return web.Response(status=500)
            self.delivered.add((await request.json())["message"])
            return web.Response()
        if not request.path.startswith("/p"):
            return web.Response(status=404)
        self.version += 1
        links = "".join(f'<a href="/p{number}">Page {number}</a>' for number in range(PAGES))
        text = f"<h1>{request.path}</h1><p>Version {self.version} of this page is the best.</p>"
        return web.Response(text=f"<title>Page</title>{text}{links}", content_type="text/html")

    def config(self) -> str:
        """The rest of config.toml, which ends in the table of a site."""
        return f"""
owners = ["olga"]
crawl = "{self.url}/p0"
crawl_hours = 0.005
notify_url = "{self.url}/notify"
[firebase]
project_id = "{conftest.PROJECT}"
keys_url = "{self.url}/keys"
"""


@contextlib.asynccontextmanager
async def surrounded(record: Record) -> AsyncIterator[Surroundings]:
    around = Surroundings(record)
    async with conftest.listening(around.answer) as around.url:
        around.url = around.url.replace("127.0.0.1", "localhost")
        yield around


class Machine:
    """The machine of the server: what is wrong with it, one thing at a time."""

    def __init__(self, record: Record, faults: Path) -> None:
        self.record, self.faults = record, faults
        self.whole = asyncio.Lock()  # held while a kill would lose what no disk has taken
        self.clock = 0.0  # by how many seconds it is wrong
        self.set()

    def set(self, clock: float = 0, disk: float = 0) -> None:
        new = self.faults.with_suffix(".new")
        new.write_text(f"{clock} {disk}")
        new.rename(self.faults)
        self.clock = clock

    async def break_at_times(self, program: Any) -> None:
        """One fault after the other; program() is the server in its present life."""
        choose = random.Random(f"{self.record.seed} faults")
        while True:
            await asyncio.sleep(PAUSE_SECONDS * choose.uniform(0.5, 1.5))
            if time.monotonic() > self.record.end - END_SECONDS:
                return  # a disk is felt to be full only while visitors write
            fault = choose.choice(FAULTS)
            async with self.whole:
                if fault == "full disk":
                    await self.fill_disk(program())
                elif fault == "slow disk":
                    self.set(disk=DISK_SECONDS)
                else:
                    self.record.clock_wrong_until = float("inf")
                    self.set(clock=CLOCK_SECONDS)
                await asyncio.sleep(FAULT_SECONDS)
                self.set()
                if fault == "clock":
                    self.record.clock_wrong_until = time.monotonic()
            self.record.seen[fault] += 1

    async def fill_disk(self, program: Program) -> None:
        """Let no file grow, until the server has felt it; then it must find back by itself."""
        pid = program.child.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_BYTES, hard))
        await self.expect_failing(program, 1)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        await self.expect_failing(program, 0)

    async def expect_failing(self, program: Program, wanted: int) -> None:
        async with aiohttp.ClientSession() as http:
            for _ in range(100):
                async with http.get(f"{program.url}/metrics") as response:
                    if f"leflux_store_failing {wanted}\n" in await response.text():
                        return
                await asyncio.sleep(0.1)
        self.record.problem(f"store_failing did not become {wanted}")


class Owner:
    """Somebody at the owner's page: reads, edits, crawls and erases, all the time."""

    def __init__(
        self, record: Record, http: aiohttp.ClientSession, url: str, machine: Machine
    ) -> None:
        self.record, self.http, self.url, self.machine = record, http, url, machine
        self.choose = random.Random(f"{record.seed} owner")
        self.erased: list[str] = []

    async def work(self) -> None:
        while True:
            await asyncio.sleep(self.choose.uniform(0, 1))
            await self.choose.choice((self.read, self.read, self.edit, self.crawl, self.erase))()

    async def call(
        self, method: str, path: str, body: Json | None = None, wanted: int = 200
    ) -> Any:
        """A request, repeated while the server is down, and once after a jump of the clock. A chat
        may have been deleted by its visitor meanwhile, or by this before the server was killed."""
        attempt, erased = 0, False
        while True:
            await self.record.up.wait()
            now = int(time.time() + self.machine.clock)
            times = {"exp": now + 3600, "iat": now - 60, "auth_time": now - 600}
            headers = {"Authorization": f"Bearer {conftest.make_token(times)}"}
            request = self.http.request(method, self.url + SITE + path, json=body, headers=headers)
            try:
                async with request as response:
                    answer = await response.json()
                gone = erased or path.rpartition("/")[2] in self.record.deleted
                if response.status == wanted or (gone and response.status == 404):
                    self.record.seen["owner"] += 1
                    return answer
                if response.status != 503 and (response.status != 401 or attempt):
                    problem = f"{response.status} {answer}"[:200]
                    self.record.problem(f"owner: {method} {path[:12]}: {problem}")
                    return {}
                attempt += 1
            except (aiohttp.ClientError, ConnectionError):
                erased = method == "DELETE"
            await asyncio.sleep(0.05)

    async def chats(self, query: str = "") -> list[Json]:
        answer = await self.call("GET", f"/sessions?limit=200{query}")
        return list(answer.get("sessions", ()))

    async def read(self) -> None:
        chats = await self.chats(self.choose.choice(("", "&q=word7", "&q=plain")))
        if chats and not (chat := self.choose.choice(chats))["live"]:
            await self.call("GET", f"/sessions/{chat['sessionId']}")
        for path in ("/activity?days=7", "/messages", "/pages"):
            await self.call("GET", path)

    async def edit(self) -> None:
        number = self.choose.randrange(10**6)
        await self.call("PATCH", "", {"snippets": [{"text": f"Number {number} is on sale."}]})
        if (await self.call("GET", "")).get("snippets") != [
            {"text": f"Number {number} is on sale."}
        ]:
            self.record.problem("a snippet did not hold")

    async def crawl(self) -> None:
        await self.call("POST", "/crawl", wanted=202)
        await asyncio.sleep(self.choose.uniform(0, 20))
        if (await self.call("GET", "/crawl")).get("failed"):
            self.record.problem("a page of the website failed")

    async def erase(self) -> None:
        """Erase a chat that has long been idle; it must never come back."""
        idle = [chat["sessionId"] for chat in await self.chats() if not chat["live"]]
        if idle:
            await self.call("DELETE", f"/sessions/{idle[-1]}")
            self.erased.append(idle[-1])

    async def look_back(self, delivered: set[str]) -> None:
        """At the end: what was erased is gone, the website is known, each message has arrived."""
        for session_id in self.erased[-50:]:
            await self.call("GET", f"/sessions/{session_id}", wanted=404)
        known = (await self.call("GET", "/pages"))["total"]
        if known < PAGES and self.record.end - self.record.began > END_SECONDS:
            self.record.problem("the website is not known")
        end = time.monotonic() + DELIVERY_SECONDS
        while self.record.letters - delivered and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        if missing := self.record.letters - delivered:
            self.record.problem(f"{len(missing)} messages to the owner did not arrive")
        kept = {one["message"] for one in (await self.call("GET", "/messages"))["messages"]}
        if self.record.letters - kept:
            self.record.problem("messages to the owner are lost")


def expected(line: str) -> bool:
    """Whether a line of the log is what a full disk must cause."""
    return any(what in line for what in ("cannot be written", "could not be crawled"))
