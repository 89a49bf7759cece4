"""Visitors who behave badly, and who notice when a promise of the server is broken."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import re
import sys
import time
from collections import Counter
from typing import Any, cast

import aiohttp
from aiohttp import WSMsgType
from faulty_model import ACTIONS, WHOLE, reply_text
from processes import ORIGIN

Json = dict[str, Any]
IDLE_MINUTES = 1.5  # so that abandoned sessions are swept in the run, too
PATIENCE_SECONDS = 100  # for the end of a turn: longer than any time-out of the server
MORE_SECONDS = 0.5  # what follows a locked text follows at once
LATE_SECONDS = 120  # so long before the end nothing begins that takes more than a few seconds
TURN_ENDS = frozenset(
    "message_done message ui_block confirmation_required task_complete action_plan".split()
)
COMMON = (*WHOLE, *ACTIONS, "e500", "e503", "e429", "html", "gone", "cut", "error")
RARE = ("flood", "flood", "endless", *["letter"] * 3)  # one turn in a hundred
SLOW = ("mute", "stuck")  # another one: they wait for the server's time-outs
HABITS = ("drop", "reload", "stall", "nonsense", "stop", "interrupt", "patient", "patient")
WAYS = ("answer",) * 6 + ("reload",) * 3 + ("ignore", "ignore", "half")  # with a plan
PAGE: Json = {
    "url": ORIGIN + "/shop",
    "title": "Shop",
    "indexedElements": [
        {"id": 1, "type": "link", "text": "Home", "href": "/"},
        {"id": 2, "type": "button", "text": "Details"},
        {"id": 3, "type": "button", "text": "Delete account"},
    ],
    "visibleText": "A shop.",
}


class Lost(Exception):
    """A session without a message is gone after a restart, as it may be."""


@dataclasses.dataclass
class Left:
    """A session that a visitor went away from: what must be in it, and when it expires."""

    session_id: str
    sent: list[str]
    heard: list[str]
    active: float
    since: float


class Record:
    """What visitors and the one who kills the server know of the run, and what was wrong."""

    def __init__(self, seconds: float, seed: str) -> None:
        self.seed = seed
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.up = asyncio.Event()  # the server runs and has not been told to stop
        self.promised = asyncio.Event()  # a visitor was just told what must now be kept
        self.life = 0  # how often it has been started
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self.deleted: set[str] = set()  # ids of sessions, or about to be
        self.letters: set[str] = set()  # to the owner, of which the visitor was told that they go
        self.clock_wrong_until = 0.0  # monotonic seconds

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print(f"{time.monotonic() - self.began:.1f} s, life {self.life}: {text}", file=sys.stderr)


class Visitor:
    """One visitor after the other, each with a session, checked before it is left."""

    def __init__(self, record: Record, http: aiohttp.ClientSession, number: int, url: str) -> None:
        self.record, self.http, self.number, self.url = record, http, number, url
        self.choose = random.Random(f"{record.seed} {number}")
        self.count = 0
        self.left: list[Left] = []  # sessions that were not deleted
        self.deleted: list[str] = []

    @property
    def late(self) -> bool:
        return time.monotonic() > self.record.end - LATE_SECONDS

    async def live(self) -> None:
        while time.monotonic() < self.record.end:
            with contextlib.suppress(Lost):
                await self.visit()

    async def visit(self) -> None:
        self.id = ""
        self.sent: list[str] = []  # acknowledged messages
        self.heard: list[str] = []  # texts that ended a turn
        self.said: dict[str, list[str]] = {}  # the deltas of streams heard from their start
        self.seq = self.life = 0  # the last event, and the life of the server that it came from
        self.joined_life = 0
        self.provoked = self.unclear = False
        self.floods = 0
        self.active = time.monotonic()  # when the server last had to hear of the session
        _, made = await self.call("POST", "/api/session/init", {"pageUrl": PAGE["url"]})
        self.id = made["sessionId"]
        await self.connect()
        for _ in range(self.choose.randint(1, 10)):
            if time.monotonic() < self.record.end:
                await self.turn()
                await asyncio.sleep(self.choose.uniform(0, 1))
        await self.ws.close()
        await self.check(self.id, self.sent, self.heard)
        if time.monotonic() < self.record.clock_wrong_until + PATIENCE_SECONDS:
            return  # what was active "in two days" does not count as idle after a restart
        if self.choose.random() < 0.2 or time.monotonic() > self.record.end:
            self.left.append(Left(self.id, self.sent, self.heard, self.active, time.monotonic()))
            return
        self.record.deleted.add(self.id)
        await self.call("DELETE", f"/api/session/{self.id}", may_be_gone=True)
        status, _ = await self.call("GET", f"/api/session/{self.id}", may_be_gone=True)
        if status != 404:
            self.record.problem("a deleted session answers")
        self.deleted.append(self.id)

    async def call(
        self, method: str, path: str, body: Json | None = None, *, may_be_gone: bool = False
    ) -> tuple[int, Json]:
        """A request, repeated while the server is down."""
        while True:
            await self.record.up.wait()
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                async with self.http.request(method, self.url + path, json=body) as response:
                    answer = await response.json()
                if response.status == 200 or (response.status == 404 and may_be_gone):
                    return response.status, answer
                if response.status == 404 and not self.sent:
                    raise Lost
                if response.status != 503:
                    code = f"{response.status} {answer['error']}"
                    self.record.problem(f"{method} {path[:14]}: {code}")
                    raise Lost
            await asyncio.sleep(0.05)

    async def connect(self, last_seq: int | None = None) -> None:
        """Join the session; without last_seq as a page that was loaded anew."""
        query = f"/?sessionId={self.id}" + ("" if last_seq is None else f"&lastSeq={last_seq}")
        while True:
            await self.record.up.wait()
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                self.ws = await self.http.ws_connect(self.url + query, max_msg_size=0)
                first = await self.ws.receive()
                if first.type is WSMsgType.TEXT and "session_not_found" in first.data:
                    if self.sent:
                        self.record.problem("a session with messages is lost")
                    raise Lost
                if first.type is WSMsgType.TEXT:
                    break
            await asyncio.sleep(0.05)
        if last_seq is None or self.joined_life != self.record.life:
            self.said.clear()  # it is all heard again; in a new life it has no end any more
        # In a new life numbers are passed over, and the middle of a turn is no more.
        self.exact = last_seq is not None and self.life == self.record.life
        self.next_seq = 0 if last_seq is None else last_seq + 1
        self.joined_life, self.provoked = self.record.life, False

    async def event(self, seconds: float | None = None) -> Json:
        """The next event of the conversation; if the socket has ended, "joined" on a new one.

        Raises TimeoutError if none comes for so many seconds.
        """
        while True:
            message = None
            with contextlib.suppress(ConnectionError):  # from a pong to a socket that is gone
                message = await self.ws.receive(seconds)
            if message is None or message.type is not WSMsgType.TEXT:
                same_life = self.record.up.is_set() and self.joined_life == self.record.life
                if same_life and not self.provoked:
                    self.record.problem(f"a socket was closed with {self.ws.close_code}")
                await self.connect(None if self.unclear else self.seq)
                return {"event": "joined", "seq": 0}
            frame: Json = json.loads(message.data)
            if frame["event"] == "error":
                self.record.seen[frame["data"]["code"]] += 1
            elif frame["event"] != "session_joined":
                self.check_order(frame)
                return frame

    def check_order(self, frame: Json) -> None:
        """Numbers without a gap, no event twice, the text equal to its deltas, and locked."""
        seq, data = frame["seq"], frame["data"]
        if seq < self.next_seq or (self.exact and seq != self.next_seq):
            self.record.problem(f"event {seq} came where {self.next_seq} was due")
        self.next_seq, self.exact = seq + 1, True
        self.seq, self.life = max(self.seq, seq), self.joined_life
        if frame["event"] == "message_chunk":
            said = self.said.setdefault(data["streamId"], [])
            if data["chunkIndex"] == 0:
                said.clear()  # a reload hears it all again
            if data["chunkIndex"] == len(said):
                said.append(data["delta"])
            elif said:
                self.record.problem("a chunk is missing")
        elif frame["event"] == "message_done":
            said = self.said.pop(data["streamId"], [])
            if said and "".join(said) != data["text"]:
                self.record.problem("the text of a reply is not that of its deltas")
        elif any(self.said.values()):
            self.record.problem(f"the text before {frame['event']} was not locked")

    async def send(self, event: str, **data: Any) -> None:
        frame = {"event": event, "data": {"sessionId": self.id, **data}}
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):
            await self.ws.send_json(frame)

    async def ask(self, kind: str) -> str:
        """Say something until it is acknowledged; return its tag."""
        self.count += 1
        tag = f"m{self.number}-{self.count}"
        said = {"sessionId": self.id, "message": f"#{kind} {tag}", "clientMessageId": tag}
        for _ in range(1 if self.choose.random() < 0.9 else 2):  # the same again changes nothing
            await self.call("POST", "/api/chat", {**said, "pageContext": PAGE})
            self.record.promised.set()
        self.active = time.monotonic()
        self.sent.append(said["message"])
        self.record.seen["turns"] += 1
        self.record.seen[kind] += 1
        return tag

    def kind(self) -> str:
        chance = self.choose.random()
        kind = self.choose.choice(SLOW if chance < 0.01 else RARE if chance < 0.02 else COMMON)
        self.floods += kind == "flood"  # of a second one the history would be cut in the middle
        return "ok" if (self.late and kind in SLOW) or self.floods > 1 else kind

    async def turn(self) -> None:
        """Say something, behave in one's own way meanwhile, and hear the end of it."""
        kind, habit = self.kind(), self.choose.choice(HABITS)
        kind = "slow" if habit in ("stop", "interrupt") else kind
        life, before = self.record.life, self.seq
        tag = await self.ask(kind)
        if self.unclear:  # an event of the last task could be taken for one of this
            await self.reload()
            self.unclear = False
        after = self.choose.randint(0, 8)
        frame: Json = {}
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not frame or frame["event"] not in TURN_ENDS or frame["seq"] <= before:
                    if after == 0:
                        tag = await self.behave(habit) or tag
                    after -= 1
                    frame = await self.event()
                self.unclear = False
                frame = await self.end(frame)
                await self.go_on(frame)
        except TimeoutError:
            self.record.problem(f"a turn has no end ({kind}, {habit}, event {frame.get('event')})")
            raise Lost from None
        text = frame["data"].get("text")
        undisturbed = life == self.record.life and habit != "stop" and self.record.up.is_set()
        if kind in WHOLE and undisturbed and text != reply_text(tag):
            self.record.problem(f"{kind}, {habit}: the answer is {text!r}")

    async def end(self, frame: Json) -> Json:
        """Note how a turn ends; returns what follows its text, or that itself if nothing does."""
        self.note(frame)
        more = frame
        while frame["event"] == "message_done" and more["event"] in ("message_done", "joined"):
            try:
                more = await self.event(MORE_SECONDS)
            except TimeoutError:
                return frame
        if more is not frame:
            self.note(more)
        return more

    def note(self, frame: Json) -> None:
        """Remember what the end of a turn said: it must be in the history."""
        self.record.promised.set()
        data = frame["data"]
        self.heard.append(data.get("text") or data.get("message") or data.get("summary") or "")
        self.record.seen[frame["event"]] += 1

    async def behave(self, habit: str) -> str | None:
        """What a visitor does in the middle of an answer; returns the tag of a new message."""
        self.record.seen[habit] += 1
        if habit == "drop":
            if (transport := cast(Any, self.ws)._conn.transport) is not None:
                transport.abort()  # without goodbye
            await asyncio.sleep(self.choose.uniform(0, 0.5))
            await self.connect(self.seq)
        elif habit == "reload":
            await self.reload()
        elif habit == "stall":
            long = not self.late and self.choose.random() < 0.05
            self.provoked |= long  # the server may cut it off
            await asyncio.sleep(42 if long else self.choose.uniform(0, 3))
        elif habit == "stop":
            await self.send("stop")
        elif habit == "nonsense":
            await self.send_nonsense()
        elif habit == "interrupt":
            tag = await self.ask("ok")
            await self.reload()  # what is replayed belongs to the new turn alone
            return tag
        return None

    async def reload(self) -> None:
        if self.choose.random() < 0.5:  # else the new socket takes over
            await self.ws.close()
        await self.connect()

    async def send_nonsense(self) -> None:
        nonsense: list[str | bytes] = [
            "hello?",
            "[1, 2]",
            '{"event": "dance"}',
            json.dumps({"event": "stop", "data": {"sessionId": "another"}}),
            json.dumps({"event": "update_context", "data": {"sessionId": self.id, "context": 5}}),
            "[" * 50_000,
            b"\x00\xff",
            "x" * 300_000,
        ]
        chosen = self.choose.choice([*nonsense, ""])
        self.provoked |= chosen == "" or isinstance(chosen, bytes) or len(chosen) > 256 * 1024
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):
            for one in [chosen] if chosen else ["again"] * 70:
                await (self.ws.send_bytes(one) if isinstance(one, bytes) else self.ws.send_str(one))

    async def go_on(self, frame: Json) -> None:
        """Answer what asks for an answer: all of it, half of it, or not at all."""
        while frame["event"] in ("action_plan", "confirmation_required"):
            asked, way = frame, self.choose.choice(WAYS)
            if way == "ignore" or (way == "half" and self.late):
                self.unclear = True
                return
            self.record.seen[f"{asked['event']}: {way}"] += 1
            if way == "reload":
                await self.reload()
            await self.reply(asked, way)
            while frame["event"] not in TURN_ENDS or frame["seq"] <= asked["seq"]:
                frame = await self.event()
                if frame["event"] == "joined":
                    await self.reply(asked, way)  # the first one may have been lost
            frame = await self.end(frame)
            letter = re.search(r"letter m[\w-]+", str(asked["data"].get("message")))
            if letter and frame["event"] == "task_complete":
                self.record.letters.add(letter[0])

    async def reply(self, asked: Json, way: str) -> None:
        if asked["event"] == "confirmation_required":
            await self.send("confirmation_response", confirmed=way == "answer")
        elif way == "reload":
            await self.send("update_context", context=PAGE)
        else:
            action = asked["data"]["actions"][0]["id"]
            await self.send("action_complete", actionId=action, result={"success": True})
            if way == "answer":
                await self.send("continue_task", context=PAGE)

    async def check(self, session_id: str, sent: list[str], heard: list[str]) -> None:
        """The history holds what was acknowledged and what was heard."""
        _, session = await self.call("GET", f"/api/session/{session_id}")
        said: dict[str, list[str]] = {"user": [], "assistant": []}
        for message in session["history"]:
            said[message["role"]].append(message["content"])
        if said["user"] != sent:
            self.record.problem(f"acknowledged {sent}, kept {said['user']}")
        for text in heard:
            if text.strip() and not any(text in one for one in said["assistant"]):
                self.record.problem(f"an answer is lost: {text[:60]!r}")
        self.record.seen["sessions checked"] += 1

    async def look_back(self) -> None:
        """After the last restart: what was left is there, what expired or was deleted is not."""
        gone = self.deleted[-50:]
        for left in self.left:
            now = time.monotonic()
            if now - left.active < IDLE_MINUTES * 60 - 10:
                self.sent = left.sent
                await self.check(left.session_id, left.sent, left.heard)
            elif now - left.since > IDLE_MINUTES * 60 + 10:
                gone.append(left.session_id)
        for session_id in gone:
            status, _ = await self.call("GET", f"/api/session/{session_id}", may_be_gone=True)
            if status != 404:
                self.record.problem("a deleted or expired session is back")
