"""Soak and faults: visitors who behave badly, a model that does, and a server that is killed.

    python bench/soak.py [--minutes 15] [--visitors 40] [--seed 1]

Visitors chat, drop their sockets, reload, stall, send nonsense and delete their sessions, while
the model errs, stalls and floods (faulty_model.py). In the first half of the time the
server is killed (SIGKILL, at times SIGTERM) and started again; in the second its memory is
watched, if there are 8 minutes or more in all. Meanwhile a website is crawled, an owner works, and
the machine errs: a full disk, a slow one, a clock that jumps by two days and back
(hard_times.py). The exit code is 0 only if

* every acknowledged message, and every answer a visitor saw the end of, is in the history, once
  and in order, also after a restart; what was deleted stays deleted;
* every turn of an acknowledged message ended visibly;
* every message to the owner that a visitor saw go arrived; what the owner erased stays erased;
* the server's memory and its open files are flat, its log has no error and no session id, and
  its database is sound.

Linux only; everything stays on 127.0.0.1. The seed repeats the visitors' choices, not the timing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web
from faulty_model import answer
from hard_times import Machine, Owner, expected, surrounded
from processes import HERE, ORIGIN, Program, free_port, last_words, start, write_config
from rude_visitors import IDLE_MINUTES, Lost, Record, Visitor

# A server that was made to keep its turns (events, messages, task) grew by 11 KiB a turn. What is
# found without a leak, up to 2, is garbage in cycles: some MiB of it wait for the collector.
LEAK_KIB_PER_TURN = 4.0
JUDGED_MINUTES = 2  # in a shorter time such garbage is all that there is to see
MAIN_COUNTS = (
    *("SIGKILL", "SIGTERM", "full disk", "slow disk", "clock", "turns", "sessions checked"),
    *("owner", "files open at the end"),
)
# With the first checkpoint the store's own view of the log; the knowledge's log; a crawl that runs
# has a lock, and a connection.
FILES_OPENED_LATER = 4


class Soak(Record):
    """The run: the server in its successive lives, and what it takes of the machine."""

    def __init__(self, folder: Path, seconds: float, seed: str) -> None:
        super().__init__(seconds, seed)
        self.folder = folder
        self.program: Program
        self.machine = Machine(self, folder / "faults")
        self.samples: list[tuple[int, float, float, int]] = []  # life, time, RSS in KiB, turns
        self.longest_start = 0.0

    async def start(self, config: Path, port: int) -> None:
        asked = time.monotonic()
        log = self.folder / "server.log"
        arguments = (str(self.machine.faults), "--config", str(config))
        self.program = await start(log, port, HERE / "bad_machine.py", *arguments)
        self.longest_start = max(self.longest_start, time.monotonic() - asked)
        self.life += 1
        self.up.set()

    async def stop(self, signal_number: int) -> None:
        """End the server and look at what it leaves on the disk."""
        if (code := self.program.child.returncode) is not None:
            self.problem(f"the server ended by itself ({code}):\n{last_words(self.program.log)}")
        self.up.clear()
        code = await self.program.end(signal_number)
        if code != (0 if signal_number == signal.SIGTERM else -signal_number):
            self.problem(f"the server ended with {code}")
        self.seen[signal.Signals(signal_number).name] += 1
        copy = self.folder / "copy"  # reading the database itself would change it
        shutil.copytree(self.folder / "state", copy)
        with contextlib.closing(sqlite3.connect(copy / "leflux.db")) as db:
            if (verdict := db.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                self.problem(f"integrity_check: {verdict}")
        shutil.rmtree(copy)

    async def kill_at_times(self, config: Path, port: int) -> None:
        """Restart the server for half of the time, just when it has promised to keep something."""
        choose = random.Random(f"{self.seed} kills")
        last = (self.began + self.end) / 2
        average = min(10, (last - self.began) / 4)
        while (now := time.monotonic()) < last:
            await asyncio.sleep(min(average * choose.uniform(0.1, 1.9), last - now))
            self.promised.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.promised.wait(), 5)
            async with self.machine.whole:
                await self.stop(choose.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
                await self.start(config, port)

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(1)
            if self.up.is_set():
                row = time.monotonic(), self.program.rss_kib(), self.seen["turns"]
                self.samples.append((self.life, *row))

    async def expect_files(self, at_most: int) -> None:
        """With all visitors gone, no file may be left open but those of the start."""
        for _ in range(100):
            if (found := self.program.open_files()) <= at_most:
                break
            await asyncio.sleep(0.2)
        else:
            self.problem(f"{found} files are open where {at_most} were expected")
        self.seen["files open at the end"] = found

    def slope(self, life: int) -> tuple[float, float, float] | None:
        """KiB a minute, KiB a turn and minutes of a life, its first half left out as warm-up."""
        rows = [(at, rss, turns) for one, at, rss, turns in self.samples if one == life]
        rows = rows[len(rows) // 2 :]
        if len(rows) < 10:
            return None
        times, sizes, turns = zip(*rows, strict=True)
        per_minute = statistics.linear_regression(times, sizes).slope * 60
        minutes = (times[-1] - times[0]) / 60
        return per_minute, per_minute * minutes / max(1, turns[-1] - turns[0]), minutes


async def run(soak: Soak, count: int) -> None:
    """The whole run, in the order in which it is checked."""
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", answer)
    model = web.AppRunner(app, access_log=None, handler_cancellation=True, keepalive_timeout=1)
    await model.setup()
    await web.TCPSite(model, "127.0.0.1", 0).start()
    model_url = f"http://127.0.0.1:{model.addresses[0][1]}"
    config = write_config(soak.folder, model_url, store=True, idle_minutes=IDLE_MINUTES)
    try:
        async with surrounded(soak) as around:
            with config.open("a") as file:
                file.write(around.config())
            await live(soak, count, config, around.delivered)
    finally:
        await soak.program.end(signal.SIGKILL)
        await model.cleanup()


async def live(soak: Soak, count: int, config: Path, delivered: set[str]) -> None:
    await soak.start(config, port := free_port())
    url, quiet_files = f"http://127.0.0.1:{port}", soak.program.open_files()
    watcher = asyncio.create_task(soak.watch())
    async with visitors_of(soak, count, url) as visitors:
        owner = Owner(soak, visitors[0].http, url, soak.machine)
        others = [owner.work(), soak.machine.break_at_times(lambda: soak.program)]
        tasks = [asyncio.create_task(one) for one in others]
        killer = asyncio.create_task(soak.kill_at_times(config, port))
        await asyncio.gather(*(visitor.live() for visitor in visitors))
        await killer
        async with soak.machine.whole:  # no fault is under way
            for task in tasks:
                task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await soak.expect_files(quiet_files + FILES_OPENED_LATER)
    watcher.cancel()
    await soak.stop(signal.SIGKILL)
    await soak.start(config, port)
    async with visitors_of(soak, count, url) as last:
        for one, then in zip(last, visitors, strict=True):
            one.left, one.deleted = then.left, then.deleted
            with contextlib.suppress(Lost):
                await one.look_back()
        owner.http = last[0].http
        await owner.look_back(delivered)
    await soak.stop(signal.SIGTERM)


@contextlib.asynccontextmanager
async def visitors_of(soak: Soak, count: int, url: str) -> AsyncIterator[list[Visitor]]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, socket_factory=small_socket),
        timeout=aiohttp.ClientTimeout(total=60),
        headers={"Origin": ORIGIN},
    ) as http:
        yield [Visitor(soak, http, number, url) for number in range(count)]


def small_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that takes little unread, so that a visitor who stalls is soon felt."""
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    return made


def verdict(soak: Soak) -> str:
    """Look at the memory and the log, and say it all in a table."""
    text = (soak.folder / "server.log").read_text(errors="replace")
    for record in re.split(r"(?m)^(?=\d{4}-\d\d-\d\d )", text):
        if not expected(record) and re.search(
            r"ERROR|CRITICAL|Traceback|Unclosed|never (awaited|retrieved)|Warning:", record
        ):
            soak.problem(f"in the log: {record.strip()}")
        if re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab]", record):
            soak.problem("a session id is in the log")
    rows = [("seed", soak.seed), ("lives of the server", str(soak.life))]
    longest = max(range(1, soak.life + 1), key=lambda life: sum(r[0] == life for r in soak.samples))
    if slope := soak.slope(longest):
        per_minute, per_turn, minutes = slope
        rows.append(("memory, KiB a minute", f"{per_minute:+.0f} over {minutes:.1f} min"))
        rows.append(("memory, KiB a turn", f"{per_turn:+.2f} (at most {LEAK_KIB_PER_TURN})"))
        if minutes >= JUDGED_MINUTES and per_turn > LEAK_KIB_PER_TURN:
            soak.problem(f"memory grows by {per_turn:.2f} KiB a turn")
    sizes = [rss / 1024 for _, _, rss, _ in soak.samples]
    rows.append(("memory, MiB", f"{min(sizes):.0f} to {max(sizes):.0f}"))
    rows.append(("longest start, s", f"{soak.longest_start:.2f}"))
    rows += [(name, str(soak.seen.pop(name, 0))) for name in MAIN_COUNTS]
    rows.append(("problems", str(len(soak.problems))))
    table = "\n".join(f"{name:<22}  {value}" for name, value in rows)
    others = ", ".join(f"{name} {number}" for name, number in sorted(soak.seen.items()))
    return f"{table}\n\n{textwrap.fill('Of these: ' + others, 90)}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Soaks leflux in faults.")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--visitors", type=int, default=40)
    parser.add_argument("--seed", default="1")
    options = parser.parse_args()
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # of the model's cut connections
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.minutes * 60, options.seed)
        asyncio.run(run(soak, options.visitors))
        print(verdict(soak))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
