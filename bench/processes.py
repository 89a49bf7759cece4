"""Starts the programs under test on free ports, and reads what Linux says of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = HERE.parent / "leflux_server.py"
ORIGIN = "http://localhost"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
START_SECONDS = 30


@dataclasses.dataclass
class Program:
    child: asyncio.subprocess.Process
    url: str
    log: Path

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.child.pid}/{name}").read_text()

    def cpu_seconds(self) -> float:
        """User and system time of all its threads, in steps of 10 ms."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND

    def busy_ms(self) -> float:
        """How long its main thread has been on a CPU."""
        return int(self._proc("schedstat").split()[0]) / 1e6

    def rss_kib(self) -> float:
        return int(self._proc("statm").split()[1]) * PAGE_BYTES / 1024

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.child.pid}/fd").iterdir()))

    async def end(self, signal_number: int) -> int:
        """Send a signal and return the exit code."""
        if self.child.returncode is None:
            self.child.send_signal(signal_number)
        return await asyncio.wait_for(self.child.wait(), START_SECONDS)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def raise_file_limit() -> int:
    """Let this process and its children have as many open files as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


async def start(
    log: Path, port: int, script: Path, *arguments: str, interpreter: str = sys.executable
) -> Program:
    """Start a program and return once it listens; what it writes goes to the log."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LEFLUX_", "STATE_"))}
    with log.open("ab") as output:
        child = await asyncio.create_subprocess_exec(
            *(interpreter, str(script), *arguments),
            stdout=output,
            stderr=output,
            env={**kept, "LEFLUX_PORT": str(port)},
        )
    try:
        async with asyncio.timeout(START_SECONDS):
            while child.returncode is None:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return Program(child, f"http://127.0.0.1:{port}", log)
                await asyncio.sleep(0.02)
        raise SystemExit(f"{script.name} did not start:\n{last_words(log)}")
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        raise


@contextlib.asynccontextmanager
async def running(
    log: Path, script: Path, *arguments: str, interpreter: str = sys.executable
) -> AsyncIterator[Program]:
    """A program for the time of a block; "PORT" among the arguments becomes its port."""
    port = free_port()
    filled = [str(port) if one == "PORT" else one for one in arguments]
    program = await start(log, port, script, *filled, interpreter=interpreter)
    try:
        yield program
    finally:
        await program.end(signal.SIGKILL)


def write_config(folder: Path, model_url: str, *, store: bool, idle_minutes: float = 600) -> Path:
    """Write a config.toml whose limits do not get in the way; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(f"""
[server]
state_dir = "{"state" if store else ""}"
shutdown_seconds = 3
[llm]
base_url = "{model_url}/v1"
[limits]
init_per_minute = 1e9
chat_per_minute = 1e9
max_sessions = 1_000_000
connections_per_address = 1_000_000
model_calls_per_minute = 1e9
site_messages_per_day = 0
site_tokens_per_day = 0
idle_minutes = {idle_minutes}
[[sites]]
id = "bench"
name = "Bench"
allowed_hosts = ["localhost"]
""")
    return path
