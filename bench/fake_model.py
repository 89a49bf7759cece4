"""A model for benchmarks: an OpenAI-compatible endpoint that streams what the message asks for.

    python fake_model.py PORT

The last "n=200,d=0.02" in a request means 200 deltas, 20 ms apart; d=0 means as fast as it can.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import sys
from typing import Any

from aiohttp import web

SCRIPT = re.compile(rb"n=(\d+),d=([\d.]+)")


def event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps({**common, "choices": [choice]}).encode() + b"\n\n"


@functools.cache
def token(number: int) -> bytes:
    return event({"content": f"tok{number:04d} "})


async def complete(request: web.Request) -> web.StreamResponse:
    count, delay = SCRIPT.findall(await request.read())[-1]
    pause = float(delay)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(int(count)):
        await response.write(token(number))
        if pause:
            await asyncio.sleep(pause)
    await response.write(event({}, "stop") + b"data: [DONE]\n\n")
    await response.write_eof()
    return response


if __name__ == "__main__":
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", complete)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
