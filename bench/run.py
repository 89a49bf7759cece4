"""What leflux costs beside the least that an aiohttp process can do, as a Markdown table.

    python bench/run.py [--rounds 3] [--quick]

Starts a fake model, the floor (floor.py) and the server, without and with its store, in turn on
this machine, and prints medians of the rounds. CPU and memory are those of the program under
test, read from Linux's /proc, so that the visitors' own costs do not count. The ratio in
brackets is to the floor: absolute figures mean little on another or a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Sequence
from importlib.metadata import version
from pathlib import Path

import orjson
from drive import PAGE, Crowd, Figures, Visitor, Wire, longest_wait_ms, open_sessions, post_all
from processes import HERE, SERVER, Program, raise_file_limit, running, write_config

FLOOR, PLAIN, STORED = "floor", "leflux, in memory", "leflux, with store"
TARGETS = (FLOOR, PLAIN, STORED)
FILES_TO_SPARE = 500
Found = dict[str, dict[str, list[float]]]  # target -> figure -> its value in each round


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything; the defaults are the whole benchmark."""

    rounds: int = 3
    paced: tuple[int, int, str] = (100, 3, "n=100,d=0.02")  # visitors, turns each, script
    burst: tuple[int, int, str] = (50, 5, "n=200,d=0")
    chats: tuple[int, int, str] = (50, 10, "n=10,d=0.02")
    inits: int = 3000
    idle: int = 1000  # connected sessions whose memory is measured
    crowds: tuple[int, ...] = (100, 500, 1000, 2500, 5000, 10_000)
    crowd_seconds: float = 15
    crowd_per_minute: float = 0.5  # questions of each visitor
    crowd_script: str = "n=50,d=0.05"
    streaming: int = 1000  # answers at once in the largest crowd
    streaming_script: str = "n=60,d=0.25"
    streaming_seconds: float = 15  # how long such an answer takes
    swept: int = 10_000
    swept_after_seconds: float = 90  # long enough to make them all
    probe_seconds: float = 6  # three sweeps


QUICK = Size(
    rounds=1,
    paced=(10, 1, "n=20,d=0.02"),
    burst=(10, 1, "n=200,d=0"),
    chats=(10, 1, "n=5,d=0.02"),
    inits=200,
    idle=50,
    crowds=(20, 40),
    crowd_seconds=0.4,
    crowd_per_minute=60,
    crowd_script="n=5,d=0.02",
    streaming=5,
    streaming_script="n=5,d=0.02",
    streaming_seconds=0.1,
    swept=100,
    swept_after_seconds=3,
    probe_seconds=0.3,
)
ROWS = (  # key, what it says, its format
    ("paced_cpu_us_per_token", "CPU per token, paced (µs)", ".1f"),
    ("burst_cpu_us_per_token", "CPU per token, burst (µs)", ".1f"),
    ("paced_first_ms_p50", "first chunk, p50 (ms)", ".1f"),
    ("paced_first_ms_p95", "first chunk, p95 (ms)", ".1f"),
    ("chats_chat_ms_p50", "answer of `/api/chat`, p50 (ms)", ".1f"),
    ("inits_per_second", "`session/init` a second", ",.0f"),
    ("idle_kib", "memory per idle connected session (KiB)", ".1f"),
    ("busy_cpu_us_per_token", "CPU per token beside the idle (µs)", ".1f"),
    ("busy_first_ms_p50", "first chunk beside the idle, p50 (ms)", ".1f"),
    ("busy_first_ms_p95", "first chunk beside the idle, p95 (ms)", ".1f"),
    ("busy_rss_mib", "memory of the process then (MiB)", ".0f"),
    ("live_ms", "longest wait while idle sessions are looked through (ms)", ".1f"),
    ("evicted_ms", "longest wait while all are freed at once (ms)", ".1f"),
)


@contextlib.asynccontextmanager
async def target(
    name: str, model: Program, folder: Path, idle_minutes: float = 600
) -> AsyncIterator[Program]:
    """A freshly started program under test."""
    log = folder / "target.log"
    if name == FLOOR:
        command = running(log, HERE / "floor.py", "PORT", model.url + "/v1")
    else:
        fresh = Path(tempfile.mkdtemp(dir=folder))
        path = write_config(fresh, model.url, store=name == STORED, idle_minutes=idle_minutes)
        command = running(log, SERVER, "--config", str(path))
    async with command as program:
        yield program


async def measure_idle(program: Program, size: Size, kind: type[Visitor] = Visitor) -> Figures:
    async with Crowd(program, kind) as crowd:
        await crowd.grow(10)  # what it needs once is there then
        before = program.rss_kib()
        await crowd.grow(10 + size.idle)
        return {"idle_kib": (program.rss_kib() - before) / size.idle}


async def measure_stream(
    name: str, program: Program, size: Size, kind: type[Visitor] = Visitor
) -> Figures:
    visitors, turns, script = getattr(size, name)
    async with Crowd(program, kind) as crowd:
        await crowd.grow(visitors)
        found = await crowd.stream(visitors, turns, script)
        return {f"{name}_{key}": value for key, value in found.items()}


async def measure_inits(program: Program, size: Size) -> Figures:
    started = time.perf_counter()
    await open_sessions(program.url, size.inits)
    return {"inits_per_second": size.inits / (time.perf_counter() - started)}


SCENARIOS = (
    measure_idle,
    functools.partial(measure_stream, "paced"),
    functools.partial(measure_stream, "burst"),
    functools.partial(measure_stream, "chats"),
    measure_inits,
)


async def measure_crowds(program: Program, size: Size) -> Figures:
    """A crowd that grows and asks steadily; at its largest most are idle and some stream."""
    found: Figures = {}
    async with Crowd(program) as crowd:

        async def go(name: str, per_minute: float, script: str, ramp: float) -> None:
            steady = await crowd.go_steadily(size.crowd_seconds, per_minute, script, ramp)
            found[f"{name}_cpu"] = steady["cpu_percent"]
            found[f"{name}_first"] = steady["first_ms_p95"]
            found[f"{name}_rss"] = program.rss_kib() / 1024

        for count in size.crowds:
            await crowd.grow(count)
            ramp = min(3.0, size.crowd_seconds)
            await go(f"crowd_{count}", size.crowd_per_minute, size.crowd_script, ramp)
        per_minute = size.streaming / count * 60 / size.streaming_seconds
        await go("streaming", per_minute, size.streaming_script, size.streaming_seconds)
        await crowd.grow(size.crowds[-1] + size.paced[0])
        for key, value in (await crowd.stream(*size.paced)).items():
            found[f"busy_{key}"] = value
        found["busy_rss_mib"] = program.rss_kib() / 1024
    return found


async def measure_sweep(program: Program, size: Size, *, sessions: bool) -> Figures:
    """How long the loop is blocked by many idle sessions; on the floor, by the machine alone."""
    if not sessions:
        noise = await longest_wait_ms(program.url, size.probe_seconds)
        return {"live_ms": noise, "evicted_ms": noise}
    ids = await open_sessions(program.url, size.swept)
    body = {"message": "n=1,d=0", "pageContext": PAGE}
    bodies = [orjson.dumps({"sessionId": one, **body}) for one in ids]
    await post_all(program.url, "/api/chat", bodies)
    async with Wire(program.url) as wire:
        await asyncio.sleep(size.probe_seconds)  # for the last answers of the model
        live = await longest_wait_ms(program.url, size.probe_seconds)
        active = orjson.loads(await wire.call("GET", "/api/stats"))["activeSessions"]
        if active != size.swept:
            raise RuntimeError(f"only {active} of {size.swept} sessions are still there")
        # Held still until the last of them is idle, it meets them all in one sweep.
        program.child.send_signal(signal.SIGSTOP)
        await asyncio.sleep(size.swept_after_seconds)
        program.child.send_signal(signal.SIGCONT)
        evicted = await longest_wait_ms(program.url, size.probe_seconds)
        answer = await wire.call("GET", "/api/stats")
    if orjson.loads(answer)["activeSessions"]:
        raise RuntimeError("idle sessions were left over")
    return {"live_ms": live, "evicted_ms": evicted}


async def measure(size: Size, folder: Path) -> Found:
    """All rounds. What is compared is measured one right after the other, in changing order."""
    found: Found = defaultdict(lambda: defaultdict(list))

    async def note(name: str, figures: Awaitable[Figures]) -> None:
        for key, value in (await figures).items():
            found[name][key].append(value)

    async with running(folder / "model.log", HERE / "fake_model.py", "PORT") as model:
        for number in range(size.rounds):
            order = TARGETS[number % 3 :] + TARGETS[: number % 3]
            progress(f"round {number + 1} of {size.rounds}")
            async with contextlib.AsyncExitStack() as stack:
                programs = {
                    name: await stack.enter_async_context(target(name, model, folder))
                    for name in order
                }
                for scenario in SCENARIOS:
                    for name, program in programs.items():
                        await note(name, scenario(program, size))
            for name in order:
                if name != PLAIN:
                    progress(f"crowds: {name}")
                    async with target(name, model, folder) as program:
                        await note(name, measure_crowds(program, size))
            progress("sweeps")
            for name in (FLOOR, STORED):
                async with target(name, model, folder, size.swept_after_seconds / 60) as program:
                    await note(name, measure_sweep(program, size, sessions=name == STORED))
    return found


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cell(found: Found, name: str, key: str, form: str) -> str:
    """The median of a figure, and its ratio to the floor's."""
    if key not in found[name]:
        return ""
    value = statistics.median(found[name][key])
    if name == FLOOR or key not in found[FLOOR]:
        return format(value, form)
    return f"{value:{form}} ({value / max(statistics.median(found[FLOOR][key]), 1e-9):.2f})"


def table(found: Found, names: Sequence[str], rows: Sequence[tuple[str, str, str]]) -> list[str]:
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " --: |" * len(names)]
    for key, title, form in rows:
        cells = [cell(found, name, key, form) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def tables(found: Found, size: Size) -> str:
    lines = table(found, TARGETS, ROWS)
    lines += ["", "| visitors | CPU, % of a core | memory (MiB) | first chunk, p95 (ms) |"]
    lines.append("| --: | --: | --: | --: |")
    crowds = [(f"{count:,}", f"crowd_{count}") for count in size.crowds]
    crowds.append((f"{crowds[-1][0]}, {size.streaming:,} of them streaming", "streaming"))
    for title, name in crowds:
        keys = (("cpu", ".1f"), ("rss", ".0f"), ("first", ".1f"))
        cells = [cell(found, STORED, f"{name}_{key}", form) for key, form in keys]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    [own] = re.findall(r'^__version__ = "(.+)"', SERVER.read_text(), re.M)
    return (
        f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores,"
        f" {platform.system()} {platform.release()}, Python {platform.python_version()},"
        f" aiohttp {version('aiohttp')}, leflux {own}, {time.strftime('%Y-%m-%d')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures leflux against the floor.")
    parser.add_argument("--rounds", type=int, help="medians of so many (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    if options.rounds:
        size = dataclasses.replace(size, rounds=options.rounds)
    needed = size.crowds[-1] + 2 * size.streaming + FILES_TO_SPARE
    if raise_file_limit() < needed:
        sys.exit(f"The limit of open files is below {needed}: run `ulimit -Hn {needed}` as root.")
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(size, Path(folder)))
    print(tables(found, size))
    print(f"\nMedians of {size.rounds} round(s) on {machine()}.")


if __name__ == "__main__":
    main()
