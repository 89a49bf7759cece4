"""floor.py's twin on Chainlit: python peer_chainlit.py PORT MODEL_URL, where Chainlit is."""

import functools
import importlib
import json
import os
import sys
from typing import Any

import aiohttp

chainlit: Any = importlib.import_module("chainlit")


@functools.cache
def http() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def relay(message: Any) -> None:
    reply = chainlit.Message(content="")
    messages = [{"role": "user", "content": message.content}]
    body = {"model": "m", "stream": True, "messages": messages}
    async with http().post(sys.argv[2] + "/chat/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                delta = json.loads(line[6:])["choices"][0]["delta"].get("content")
                await reply.stream_token(delta or "")
    await reply.update()


chainlit.on_message(relay)  # Chainlit loads this file a second time, as the app

if __name__ == "__main__":
    os.environ.update(CHAINLIT_HOST="127.0.0.1", CHAINLIT_PORT=sys.argv[1])
    cli: Any = importlib.import_module("chainlit.cli")
    cli.config.run.headless = True
    cli.run_chainlit(__file__)
