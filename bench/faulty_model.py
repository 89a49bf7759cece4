"""A model that misbehaves on demand: "#kind tag" in the visitor's message says how it answers.

Kinds that end well say all of reply_text(tag). Without a "#kind" it completes the task: that is
how it answers after an action.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import web

Say = Callable[..., Awaitable[None]]
ORDER = re.compile(r"#(\w+) (m[\w-]+)")
WHOLE = ("ok", "plain", "slow", "think", "flaky", "picky", "noisy")  # end with all of their text
ACTIONS: dict[str, dict[str, Any]] = {
    "click": {"type": "click_element", "elementId": 2, "description": "Open the details"},
    "delete": {"type": "click_element", "elementId": 3, "description": "Delete the account"},
    "forbidden": {"type": "click_element", "elementId": 99, "description": "Click nothing"},
    "ask": {"type": "ask_user", "question": "Which one?", "field_name": "x", "field_type": "text"},
    "block": {
        "type": "render_ui_block",
        "block_type": "faq_list",
        "data": {"items": [{"q": "Why?", "a": "Because."}]},
    },
    "done": {"type": "task_complete", "summary": "It is done."},
}
STATUSES = {"e500": 500, "e503": 503, "e429": 429}
refused_once: set[str] = set()


def reply_text(tag: str) -> str:
    return f"Re {tag}: " + " ".join(f"word{number}" for number in range(40)) + f" end of {tag}."


def sse(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def refusal(kind: str, tag: str, body: dict[str, Any]) -> web.Response | None:
    """The answer that is no stream at all, for the kinds that have one."""
    if kind in STATUSES:
        error = {"error": {"code": kind, "message": "no"}}
        return web.json_response(error, status=STATUSES[kind], headers={"Retry-After": "0.1"})
    if kind == "html":
        return web.Response(text="<html><h1>Gateway</h1></html>", content_type="text/html")
    if kind == "picky" and "temperature" in body:
        error = {"error": {"message": "unknown parameter: temperature"}}
        return web.json_response(error, status=400)
    if kind == "flaky" and tag not in refused_once:
        refused_once.add(tag)
        return web.json_response({}, status=500)
    return None


async def answer(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    orders = ORDER.findall(body["messages"][-1]["content"])
    kind, tag = orders[-1] if orders else ("done", "m")
    response = refusal(kind, tag, body)
    if response is None and kind != "gone":
        with contextlib.suppress(ConnectionError):
            return await stream(request, kind, tag)
    if kind in ("gone", "cut"):
        cast(asyncio.Transport, request.transport).abort()
    return response or web.Response()


async def stream(request: web.Request, kind: str, tag: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)

    async def say(text: str, pieces: int = 10, pause: float = 0.01) -> None:
        size = len(text) // pieces + 1
        for start in range(0, len(text), size):
            delta = {"content": text[start : start + size]}
            await response.write(sse({"choices": [{"index": 0, "delta": delta}]}))
            await asyncio.sleep(pause)

    await tell(kind, tag, say, response.write)
    if kind == "cut":
        raise ConnectionError
    await response.write(b"data: [DONE]\n\n")
    return response


async def tell(kind: str, tag: str, say: Say, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Stream what a kind of answer consists of."""
    text = reply_text(tag)
    if kind == "letter":
        letter = {"name": "Ada", "email": "ada@example.com", "message": f"letter {tag}"}
        await say(json.dumps({"message": "", "action": {"type": "contact_owner", **letter}}))
    elif kind in ACTIONS:
        await say(json.dumps({"message": f"Re {tag}: now.", "action": ACTIONS[kind]}))
    elif kind in ("ok", "flaky", "picky"):
        await say(json.dumps({"action": None, "message": text}))
    elif kind == "plain":
        await say(text, 40, 0)
    elif kind == "slow":
        await say(text, 40, 0.05)
    elif kind == "think":
        await write(sse({"choices": [{"delta": {"reasoning": "Hm."}}]}))
        await say("<think>What would they like?</think>" + text)
    elif kind == "noisy":
        for junk in (b"data: {\n\n", b": ping\n\n", random.randbytes(300), b"\n\ndata: 7\n\n"):
            await write(junk)
        await say(text)
    elif kind == "cut":
        await say(text[:100])
    elif kind == "error":
        await say(text[:100])
        await write(sse({"error": {"code": 400, "message": "no more"}}))
    elif kind == "flood":
        await say(f"Re {tag}: " + "lava " * 60_000, 3000, 0)
    elif kind == "endless":
        for _ in range(90):
            await write(b"x" * 100_000)
    elif kind == "mute":
        for _ in range(50):
            await write(b": still here\n\n")
            await asyncio.sleep(1)
    elif kind == "stuck":
        await say(text[:100])
        await asyncio.sleep(50)
