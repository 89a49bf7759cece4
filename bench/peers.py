"""leflux beside what else a chat on a website can be built with, as a Markdown table.

    python bench/peers.py [--rounds 3] [--quick] [--svg FILE]

In one run: the floor (floor.py), leflux with its store, and relays of the same fake model on
Express with Socket.IO (peer_express.js) and on Chainlit (peer_chainlit.py). Packages come from npm
and PyPI into $XDG_CACHE_HOME/leflux/peers and stay there. What cannot be had is left out, with a
word why. --quick tries small sizes, and installs nothing. --svg draws docs/benchmark.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import html
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import orjson
import run
from drive import Visitor
from processes import HERE, SERVER, Program, raise_file_limit, running

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leflux" / "peers"
PICTURED = ("paced_cpu_us_per_token", "burst_cpu_us_per_token", "idle_kib")
PEER_ROWS = (
    *(row for row in run.ROWS if row[0] in (*PICTURED, "paced_first_ms_p50")),
    ("start_s", "start (s)", ".2f"),
    ("rss_mib", "memory after the start (MiB)", ".0f"),
    ("installed_mb", "packages on the disk (MB)", ".0f"),
)


class SocketIoVisitor(Visitor):
    """Of the relay on Express: leflux's requests, and Socket.IO's frames on the socket."""

    async def _open(self, path: str, auth: str = "") -> None:
        await super()._open(f"{path}&EIO=4&transport=websocket".replace("/?", "/socket.io/?"))
        await self.ws.receive()  # open
        await self.ws.send_str("40" + auth)
        await self.ws.receive()  # connected

    async def _hear(self, text: str) -> None:
        if text == "2":  # ping
            await self.ws.send_str("3")
        else:
            await super()._hear(text)


class ChainlitVisitor(SocketIoVisitor):
    """Says all on the socket, and nothing of the page: Chainlit does not ask for it."""

    async def connect(self) -> None:
        self._id = str(uuid.uuid4())
        await self._open("/ws/?", f'{{"sessionId": "{self._id}", "clientType": "webapp"}}')
        await self.ws.send_str('42["connection_successful"]')
        while '"clear_call_fn"' not in (await self.ws.receive()).data:
            pass
        self._reader = asyncio.create_task(self._read())

    async def _hear(self, text: str) -> None:
        if '"stream_start"' in text:  # it holds the first token
            await super()._hear('"message_chunk"')
        elif '"update_message"' in text:  # the whole answer
            await super()._hear(f'"message_done" {text}')
        elif text == "2":
            await super()._hear(text)

    async def _send(self, message: str) -> None:
        said = {"id": str(uuid.uuid4()), "type": "user_message", "output": message, "createdAt": ""}
        event = orjson.dumps(["client_message", {"message": said, "fileReferences": []}])
        await self.ws.send_str("42" + event.decode())


@dataclasses.dataclass(frozen=True)
class Peer:
    packages: tuple[str, ...]
    script: str = ""  # its packages are npm's if it is JavaScript; without one it is run.py's
    kind: type[Visitor] = Visitor
    title: str = ""

    @property
    def folder(self) -> Path:
        return CACHE / re.sub(r"\W+", "-", self.title)

    def install(self) -> None:
        pip = (sys.executable, "-m", "pip", "--python", "bin/python", "install", *self.packages)
        commands = [(sys.executable, "-m", "venv", "--without-pip", "."), pip]
        if self.script.endswith(".js"):
            commands = [("npm", "install", "--prefix", ".", "--no-audit", *self.packages)]
        self.folder.mkdir(parents=True)
        try:
            for command in commands:
                subprocess.run(command, cwd=self.folder, check=True, capture_output=True)
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def installed_mb(self) -> float:
        files = (path.lstat() for path in self.folder.rglob("*") if not path.is_dir())
        return sum(one.st_size for one in files) / 1e6

    def started(
        self, model: Program, work: Path
    ) -> contextlib.AbstractAsyncContextManager[Program]:
        if not self.script:
            return run.target(self.title, model, work)
        os.environ |= {"NODE_PATH": str(self.folder / "node_modules"), "NODE_ENV": "production"}
        os.environ["CHAINLIT_APP_ROOT"] = str(work)
        python = "node" if self.script.endswith(".js") else str(self.folder / "bin" / "python")
        arguments = (HERE / self.script, "PORT", model.url + "/v1")
        return running(work / "target.log", *arguments, interpreter=python)


EXPRESS, CHAINLIT = ("express@5.3.0", "socket.io@4.8.4"), ("chainlit==2.12.0",)
PEERS = (
    Peer(("aiohttp", "orjson"), title=run.FLOOR),
    Peer(("-r", str(SERVER.parent / "requirements.txt")), title=run.STORED),
    Peer(EXPRESS, "peer_express.js", SocketIoVisitor, "Express 5.3.0, Socket.IO 4.8.4"),
    Peer(CHAINLIT, "peer_chainlit.py", ChainlitVisitor, "Chainlit 2.12.0"),
)


def available(*, fetch: bool) -> Iterator[Peer]:
    """Yield the peers that can be measured; say why one is left out."""
    for peer in PEERS:
        problem = "not installed"
        if fetch and not peer.folder.exists():
            run.progress(f"installing {peer.title}")
            try:
                peer.install()
            except (OSError, subprocess.CalledProcessError) as error:
                problem = str(error)
        if peer.folder.exists() or not peer.script:
            yield peer
        else:
            print(f"Left out: {peer.title} ({problem}).\n")


async def measure(size: run.Size, work: Path, peers: list[Peer]) -> run.Found:
    """All rounds, in changing order; what is compared is measured one right after the other."""
    found: run.Found = defaultdict(lambda: defaultdict(list))
    for peer in peers:
        if peer.folder.exists():
            found[peer.title]["installed_mb"].append(peer.installed_mb())
    async with running(work / "model.log", HERE / "fake_model.py", "PORT") as model:
        for number in range(size.rounds):
            run.progress(f"round {number + 1} of {size.rounds}")
            async with contextlib.AsyncExitStack() as stack:
                started = []
                for peer in peers[number:] + peers[:number]:
                    begun = time.perf_counter()
                    program = await stack.enter_async_context(peer.started(model, work))
                    found[peer.title]["start_s"].append(time.perf_counter() - begun)
                    found[peer.title]["rss_mib"].append(program.rss_kib() / 1024)
                    started.append((peer, program))
                for scenario in run.SCENARIOS[:3]:  # idle, paced, burst
                    for peer, program in started:
                        try:
                            figures = await scenario(program, size, peer.kind)
                        except (RuntimeError, TimeoutError) as error:  # it is overloaded
                            if not peer.script:
                                raise
                            run.progress(f"{peer.title} failed: {error}")
                            continue
                        for key, value in figures.items():
                            found[peer.title][key].append(value)
    return found


PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {height}" role="img">
<title>{title}</title>
<style>
text {{ font: 14px system-ui, sans-serif; fill: #1f2328 }}
.head {{ font-weight: 600 }}
rect {{ fill: #818b98 }}
.own {{ fill: #8250df }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #f0f6fc }} .own {{ fill: #ab7df8 }} }}
</style>
{shapes}
</svg>
"""


def picture(found: run.Found, note: str) -> str:
    """Bars of the most telling rows, as an SVG for light and dark pages."""
    shapes, y = [], 0
    heads = {key: head for key, head, _ in PEER_ROWS if key in PICTURED}
    for key, head in heads.items():
        y += 30
        shapes.append(f'<text class="head" y="{y}">{html.escape(head)}</text>')
        measured = {name: figures[key] for name, figures in found.items() if key in figures}
        values = {name: statistics.median(figures) for name, figures in measured.items()}
        for name, value in values.items():
            y += 24
            own = ' class="own"' if name == run.STORED else ""
            width = max(value, 0) / max(*values.values(), 1e-9) * 360
            shapes.append(f'<text y="{y}">{html.escape(name)}</text>')
            shapes.append(f'<rect{own} x="250" y="{y - 13}" width="{width:.1f}" height="16"/>')
            shapes.append(f'<text x="{width + 258:.1f}" y="{y}">{value:,.1f}</text>')
        y += 10
    shapes.append(f'<text y="{y + 20}" style="font-size: 11px">{html.escape(note)}</text>')
    title = "Shorter is better: " + ", ".join(heads.values())
    return PICTURE.format(height=y + 32, title=html.escape(title), shapes="\n".join(shapes))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures leflux beside its peers.")
    parser.add_argument("--rounds", type=int, help="medians of so many (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes, and nothing installed")
    parser.add_argument("--svg", type=Path, help="draw a picture, too")
    options = parser.parse_args()
    size = run.QUICK if options.quick else run.Size()
    size = dataclasses.replace(size, rounds=options.rounds or size.rounds)
    peers = list(available(fetch=not options.quick))
    raise_file_limit()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(size, Path(folder), peers))
    print(*run.table(found, list(found), PEER_ROWS), sep="\n")
    print(f"\nMedians of {size.rounds} round(s) on {run.machine()}.")
    if options.svg:
        options.svg.write_text(picture(found, run.machine()))


if __name__ == "__main__":
    main()
