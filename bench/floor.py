"""The floor: the least an aiohttp process must do to relay a model's stream to a WebSocket.

    python floor.py PORT MODEL_URL

No sites, no limits, no history, no prompt, no checks, nothing kept. What leflux costs is stated
as a ratio to this, measured on the same machine in the same run.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator

import aiohttp
import orjson
from aiohttp import web

HTTP = web.AppKey("http", aiohttp.ClientSession)
SITE_CONFIG = {
    "layout": "floating",
    "primaryColor": "#a855f7",
    "greeting": "Hi! How can I help?",
    "position": "bottom-right",
}
sockets: dict[str, web.WebSocketResponse] = {}
relays: set[asyncio.Task[None]] = set()


async def init(request: web.Request) -> web.Response:
    await request.read()
    answer = {"sessionId": str(uuid.uuid4()), "wsUrl": "ws://127.0.0.1", "siteConfig": SITE_CONFIG}
    return web.Response(body=orjson.dumps(answer), content_type="application/json")


async def connect(request: web.Request) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    sockets[request.query["sessionId"]] = ws
    await ws.send_str('{"event":"session_joined","data":{}}')
    async for _ in ws:
        pass
    return ws


async def relay(app: web.Application, session_id: str, message: str) -> None:
    ws = sockets[session_id]
    said: list[str] = []
    messages = [{"role": "user", "content": message}]
    body = {"model": "m", "stream": True, "messages": messages}
    async with app[HTTP].post(sys.argv[2] + "/chat/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                delta = orjson.loads(line[6:])["choices"][0]["delta"].get("content")
                if delta:
                    data = {"delta": delta, "streamId": session_id, "chunkIndex": len(said)}
                    said.append(delta)
                    frame = orjson.dumps({"event": "message_chunk", "data": data})
                    await ws.send_str(frame.decode())
    done = {"text": "".join(said), "streamId": session_id}
    await ws.send_str(orjson.dumps({"event": "message_done", "data": done}).decode())


async def chat(request: web.Request) -> web.Response:
    body = orjson.loads(await request.read())
    task = asyncio.create_task(relay(request.app, body["sessionId"], body["message"]))
    relays.add(task)
    task.add_done_callback(relays.discard)
    answer = b'{"messageId":"msg-1","status":"processing"}'
    return web.Response(body=answer, content_type="application/json")


async def health(_: web.Request) -> web.Response:
    return web.Response(body=b'{"status":"ok"}', content_type="application/json")


async def http_client(app: web.Application) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        app[HTTP] = http
        yield


if __name__ == "__main__":
    app = web.Application()
    app.cleanup_ctx.append(http_client)
    routes = [web.post("/api/session/init", init), web.post("/api/chat", chat)]
    app.add_routes([*routes, web.get("/", connect), web.get("/health", health)])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
