"""What many chats cost: 100,000 kept ones on the disk, 10,000 full ones in memory; and a crawl.

    python bench/archive.py [--kept 100000] [--sessions 10000] [--pages 500]

Everything is written by the server's own functions. Owners' requests are timed while a task looks
how long the event loop stands still. The website to crawl is that of test_traps, half of it traps,
read without the pauses between pages. Prints a Markdown table. Takes some minutes and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import functools
import http.client
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from processes import SERVER, Program, running

import leflux_server as lf

KEPT_DAYS, PAIRS = 28, 3
DICE = random.Random(1)
WORDS = [f"w{number:05}" for number in range(30_000)]
SITE = {"id": "shop", "name": "Shop", "allowed_hosts": ["localhost"]}


def text(count: int) -> str:
    """Words as often as in a language: some always, most hardly ever."""
    ranks = (int(DICE.paretovariate(0.6)) for _ in range(count))
    return " ".join(WORDS[min(rank, len(WORDS) - 1)] for rank in ranks)


def session_at(number: int, age_seconds: float) -> lf.Session:
    page, now = f"https://localhost/page/{number % 500}", time.monotonic()
    created = time.time() - age_seconds
    return lf.Session(f"session-{number}", "shop", "localhost", page, created, now - age_seconds)


def fill(path: Path, count: int) -> None:
    """Write chats of six messages, from four weeks ago to an hour ago."""
    store, popular = lf.Store(path), [text(8) for _ in range(300)]
    store.db.execute("BEGIN")
    for row in range(1, count + 1):
        age = KEPT_DAYS * 86400 * (1 - row / count) + 3600
        session = session_at(row, age)
        session.row, session.home = row, store
        for _ in range(PAIRS):
            session.remember("user", DICE.choice(popular) if DICE.random() < 0.3 else text(12))
            session.remember("assistant", text(40))
        session.unanswered = [0] if row % 20 == 0 else []
        with mock.patch("time.time", return_value=session.created_at):
            session.last_active = time.monotonic()
            lf.write_session(store.db, session)
    store.db.execute("COMMIT")
    store.close()


async def timed(look: Callable[[], Any], count: int = 20) -> tuple[float, float]:
    """Return the p95 of so many calls, and how long the loop stood at most meanwhile, in ms."""
    times, stops = [], [0.0]

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            stops[0] = max(stops[0], time.perf_counter() - before)

    watcher = asyncio.create_task(watch())
    for _ in range(count):
        before = time.perf_counter()
        await look()
        times.append(time.perf_counter() - before)
    watcher.cancel()
    return sorted(times)[int(0.95 * count) - 1] * 1000, stops[0] * 1000


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * lf.PAGE_BYTES / 1e6


async def kept_rows(folder: Path, count: int) -> list[str]:
    path = folder / "leflux.db"
    fill(path, count)
    rows = [f"| {count} kept chats, the file (MB) | {path.stat().st_size / 1e6:.0f} |"]
    before = time.perf_counter()
    config = folder / "config.toml"
    site = '[[sites]]\nid = "shop"\nname = "Shop"\nallowed_hosts = ["localhost"]\n'
    config.write_text(f'[server]\nstate_dir = "."\n{site}')
    async with running(folder / "log", SERVER, "--config", str(config)) as program:
        rows.append(f"| … start (s) | {time.perf_counter() - before:.1f} |")
        rows.append(f"| … memory after it (MB) | {program.rss_kib() / 1024:.0f} |")
    store, never = lf.Store(path), time.time() + 1e6
    for name, read, values in (
        ("list", lf.find_chats, (never, 50, set())),
        ("search for a rare word", lf.find_chats, (never, 50, {WORDS[29_000]})),
        ("search for a common word", lf.find_chats, (never, 50, {WORDS[3]})),
        ("activity of 90 days", lf.read_activity, (0.0,)),
    ):
        p95, stop = await timed(functools.partial(store.look, read, "shop", *values))
        rows.append(f"| … {name}, p95 (the loop stood) (ms) | {p95:.1f} ({stop:.1f}) |")
    store.close()
    return rows


def full_page(number: int) -> dict[str, Any]:
    """The largest page that a client may send, unlike any other."""
    fields = [name for name, kind in lf.ELEMENT_FIELDS.items() if kind is str]
    elements = [
        {"id": at, **{name: f"{number} {at} {name} ".ljust(300, "x") for name in fields}}
        for at in range(45)
    ]
    shown = f"{number} ".ljust(5000, "é")
    return {"url": "https://localhost/", "visibleText": shown, "indexedElements": elements}


def fill_memory(app: lf.AppState, count: int) -> Iterator[int]:
    """Let so many sessions hold all they may: history, page, events, ids."""
    for number in range(count):
        session = session_at(number, 0)
        app.sessions[session.id] = session
        page = lf.take_picture(session, full_page(number), app.config.limits)
        lf.keep_context(app, session, page)
        for at in range(20):
            session.remember("user", f"{number} {at} ".ljust(9990, "ä"))
        ids = (f"{number}-{at}".ljust(64, "c") for at in range(lf.MAX_CLIENT_IDS))
        session.message_id_by_client_id = {one: f"msg-{at:013}" for at, one in enumerate(ids)}
        for at in range(500):
            session.emit(("message_chunk", {"delta": "word ", "streamId": "s", "chunkIndex": at}))
        session.emit(("message_done", {"text": "word " * 500, "streamId": "s"}))
        app.store.save(session)
        yield number


async def memory_rows(folder: Path, count: int) -> list[str]:
    config = lf.parse_config({"server": {"state_dir": str(folder)}, "sites": [SITE]}, {})
    app, before = lf.AppState(config), resident_mb()
    lf.open_state(app, folder / "leflux.db")
    for number in fill_memory(app, count):
        if number % 200 == 0:
            await app.store.checkpoint()
    rows = [f"| {count} sessions at all their limits, memory (MB) | {resident_mb():.0f} |"]
    for session in list(app.sessions.values())[:1000]:
        assert len(session.history) == 20
    rows.append(f"| … after 1000 of them have come back (MB) | {resident_mb():.0f} |")
    app.store.close()
    return [f"| an empty server, memory (MB) | {before:.0f} |", *rows]


def longest_wait(url: str, folder: Path) -> float:
    """In a process of its own: ask for /health until the crawl is over; return the longest wait in
    ms."""
    import test_leflux_server as tests

    longest, wire = 0.0, http.client.HTTPConnection(url.removeprefix("http://"))
    while '"running":true' in tests.crawl_row(folder):
        before = time.perf_counter()
        wire.request("GET", "/health")
        wire.getresponse().read()
        longest = max(longest, time.perf_counter() - before)
        time.sleep(0.005)
    return longest * 1000


async def crawl_rows(folder: Path, pages: int) -> list[str]:
    import conftest  # here, for what tests need would count above
    import test_leflux_server as tests

    website, loop = tests.Website(), asyncio.get_running_loop()
    website.other = tests.trap
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        await loop.run_in_executor(pool, int)  # it has started
        async with conftest.listening(website.answer) as website.url:
            table = tests.crawl_table(website, crawl_pages=pages)
            begun = time.perf_counter()
            async with conftest.program(folder, table, tests.FAST) as started:
                program = Program(started.child, started.server.url, folder)
                before = program.rss_kib()
                longest = await loop.run_in_executor(pool, longest_wait, program.url, folder)
                asked, seconds = len(website.requests), time.perf_counter() - begun
                peak = tests.memory_kb(started.child.pid, "VmHWM") - before
    kept = len(tests.known_pages(folder))
    return [
        f"| a crawl of {asked} requests, {kept} pages kept (s) | {seconds:.1f} |",
        f"| … requests a second | {asked / seconds:.0f} |",
        f"| … memory for it at its most (MB) | {peak / 1024:.0f} |",
        f"| … longest wait for `/health` (ms) | {longest:.0f} |",
    ]


async def measure(kept: int, sessions: int, pages: int) -> None:
    rows = ["| what | figure |", "| --- | ---: |"]
    for part, count in ((kept_rows, kept), (memory_rows, sessions), (crawl_rows, pages)):
        with tempfile.TemporaryDirectory() as folder:
            rows += await part(Path(folder), count)
    print("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kept", type=int, default=100_000)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--pages", type=int, default=500)
    options = parser.parse_args()
    asyncio.run(measure(options.kept, options.sessions, options.pages))


if __name__ == "__main__":
    main()
