"""What survives, what may be spent, who may change a site: the contract's sections 5, 7 and 8."""
# ruff: noqa: F811 (fixtures are imported and then named by the tests that use them)

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

import leflux_server as lf
from base_tests import (
    ORIGIN,
    OTHER,
    PATIENCE_SECONDS,
    SHOP,
    TURN_ENDS,
    Answer,
    FakeModel,
    Json,
    Patch,
    Script,
    Serve,
    Server,
    Visitor,
    chunk,
    cut_wire,
    forever,
    make_config,
    model,  # noqa: F401
    program,
    quiet_log,  # noqa: F401
    raw_http,
    read_close,
    reply,
    reset,
    run_program,
    serve,  # noqa: F401
    sse,
    status,
    until,
)

# ---------------------------------------------------------------------------------------------
# Helpers: servers that are started again, a disk that is slow, clocks that go wrong.


@contextlib.asynccontextmanager
async def running(config: lf.Config) -> AsyncIterator[Server]:
    """A server for the length of a block."""
    async with lf.serving(config) as (app, url), aiohttp.ClientSession() as http:
        yield Server(url, http, app[lf.HUB])


def on_disk(folder: Path) -> Json:
    return {"state_dir": str(folder)}


def query(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    """What another program reads from the database."""
    with contextlib.closing(sqlite3.connect(folder / "leflux.db")) as db:
        return db.execute(sql).fetchall()


def kept_messages(folder: Path, session_id: str) -> list[tuple[str, str]]:
    rows = query(folder, "SELECT session, body FROM message ORDER BY number")
    bodies = [json.loads(body) for session, body in rows if session == session_id]
    return [(body["role"], body["content"]) for body in bodies]


def traces(folder: Path, *secrets: str) -> list[str]:
    """The files of a folder that hold one of these texts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [p.name for p in files if any(s.encode() in p.read_bytes() for s in secrets)]


def snapshot(folder: Path, copy: Path) -> Path:
    """What kill -9 would leave of a server that has nothing to write."""
    copy.mkdir()
    for path in folder.glob("leflux.db*"):
        shutil.copy(path, copy)
    return copy


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def names(frames: list[Json]) -> list[str]:
    return [frame["event"] for frame in frames]


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def doing(message: str, **action: Any) -> list[bytes]:
    """A script that answers with a message and an action."""
    return [sse(chunk(json.dumps({"message": message, "action": action})), "[DONE]")]


BUTTONS: list[Json] = [
    {"id": 1, "type": "button", "text": "Next"},
    {"id": 2, "type": "button", "text": "Delete account"},
    {"id": 3, "type": "a", "text": "Prices", "href": "/prices"},
]
SHOWN: Json = {"url": f"{ORIGIN}/", "visibleText": "Hi", "indexedElements": BUTTONS}
CLICK: Json = {"type": "click_element", "elementId": 1}


class Disk:
    """The commits of servers, which a test counts and may hold up."""

    def __init__(self) -> None:
        self.commits = 0  # begun
        self.free = threading.Event()
        self.free.set()


@pytest.fixture
def disk(monkeypatch: Patch) -> Iterator[Disk]:
    """Counts commits, holds them up while it is not free, and soon gives up on a lock."""
    slow, commit = Disk(), lf.Store._commit

    def wait_and_commit(store: lf.Store, *arguments: Any) -> Any:
        slow.commits += 1
        slow.free.wait(PATIENCE_SECONDS)
        cast(sqlite3.Connection, store._db).execute("PRAGMA busy_timeout = 20")
        return commit(store, *arguments)

    monkeypatch.setattr(lf.Store, "_commit", wait_and_commit)
    yield slow
    slow.free.set()


class Clock:
    """The time module as the server sees it: a test may move it ahead or stop the calendar."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.stopped_at: float | None = None

    def time(self) -> float:
        return time.time() + self.ahead if self.stopped_at is None else self.stopped_at

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: Patch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(lf, "time", moved)
    return moved


async def written(server: Server) -> None:
    """Nothing is left to write."""
    await until(lambda: server.hub.store._writer is None)


async def expect_waiting(server: Server, waiting: asyncio.Task[Any]) -> None:
    """Others are answered meanwhile, and it is not."""
    for _ in range(5):
        assert (await server.call("GET", "/health")).status == 200
    assert not waiting.done()


# ---------------------------------------------------------------------------------------------
# Store: what is on disk, and when


async def test_state_is_private(serve: Serve, tmp_path: Path) -> None:
    """The database and the files beside it are readable for their owner alone, a new folder too."""
    umask = os.umask(0)
    try:
        for folder in (tmp_path / "new", tmp_path / "old"):
            if folder.name == "old":
                folder.mkdir()
                (folder / "leflux.db").touch(0o666)
            server = await serve(server=on_disk(folder))
            await (await server.visitor()).ask()
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
            files = ("leflux.db", "leflux.db-wal", "leflux.db-shm")
            assert modes == dict.fromkeys(files, 0o600)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    finally:
        os.umask(umask)


async def test_database_format(serve: Serve, tmp_path: Path) -> None:
    """State lives in state_dir/leflux.db, relative to the configuration, in WAL, with a version."""
    async with running(make_config(None, tmp_path, server={"state_dir": "a/b"})) as server:
        await (await server.visitor()).ask()
        folder = tmp_path / "a" / "b"
        assert query(folder, "PRAGMA journal_mode") == [("wal",)]
        assert query(folder, "PRAGMA user_version") == [(lf.SCHEMA_VERSION,)]
        assert lf.SCHEMA_VERSION > 0


async def test_sessions_are_kept_from_their_first_message_on(serve: Serve, tmp_path: Path) -> None:
    """A session that nobody has said anything in is not on disk."""
    server = await serve(server=on_disk(tmp_path))
    silent, other = await server.visitor(), await server.visitor()
    await other.ask()
    assert query(tmp_path, "SELECT id FROM session") == [(other.id,)]
    assert not traces(tmp_path, silent.id)


async def test_chat_answers_after_its_commit(
    serve: Serve, model: FakeModel, disk: Disk, tmp_path: Path
) -> None:
    """A message is on disk before /api/chat answers, before a retry is answered, and before the
    model hears of it."""
    server = await serve(model, server=on_disk(tmp_path))
    visitor = await server.visitor()
    await written(server)
    seen = disk.commits
    disk.free.clear()
    first = asyncio.create_task(visitor.post("Hello", clientMessageId="one"))
    await until(lambda: disk.commits > seen)
    retry = asyncio.create_task(visitor.post("Hello", clientMessageId="one"))
    await expect_waiting(server, first)
    await expect_waiting(server, retry)
    assert kept_messages(tmp_path, visitor.id) == []
    assert model.requests == []
    disk.free.set()
    await asyncio.wait([first, retry], return_when=asyncio.FIRST_COMPLETED)
    assert kept_messages(tmp_path, visitor.id)[0] == ("user", "Hello")
    assert (await first).body == (await retry).body
    assert (await visitor.turn())[-1]["data"]["text"] == "ok"


ENDS = [  # the ends of a turn, and what of them the history keeps
    ("message_done", reply("The reply"), "The reply"),
    ("message", doing("", type="ask_user", question="The reply"), "The reply"),
    ("message", doing("The reply", type="abort_workflow", reason="no"), "The reply\n\nno"),
    ("task_complete", doing("The reply", type="task_complete", summary="It"), "The reply\n\nIt"),
    ("confirmation_required", doing("The reply", type="click_element", elementId=2), "The reply"),
    (
        "ui_block",
        doing(
            "The reply",
            type="render_ui_block",
            block_type="faq_list",
            data={"items": [{"question": "Q", "answer": "A"}]},
        ),
        "The reply",
    ),
]


@pytest.mark.parametrize(("event", "script", "shown"), ENDS)
async def test_reply_is_on_disk_before_its_end_is_sent(
    event: str,
    script: list[bytes],
    shown: str,
    serve: Serve,
    model: FakeModel,
    disk: Disk,
    tmp_path: Path,
) -> None:
    """The event that ends a turn is sent, also to a newer socket, once its text is on disk."""
    server = await serve(model, server=on_disk(tmp_path))
    visitor = await server.visitor()
    model.scripts.append([model.at_gate, *script])
    await visitor.chat(pageContext=SHOWN)
    await until(lambda: model.requests)
    await written(server)
    disk.free.clear()
    model.gate.release()
    session = server.hub.sessions[visitor.id]
    await until(lambda: session.task is None or session.task.phase != "running")
    await visitor.expect_open()
    await visitor.connect()
    await visitor.expect_open()
    assert not {*names(visitor.frames)} & {*TURN_ENDS}
    assert len(kept_messages(tmp_path, visitor.id)) == 1
    disk.free.set()
    assert (await visitor.turn())[-1]["event"] == event
    kept = kept_messages(tmp_path, visitor.id)
    assert kept[1][0] == "assistant"
    assert kept[1][1].startswith(shown)
    assert kept == await visitor.history()


@pytest.mark.parametrize("how", ["delete", "idle"])
async def test_gone_sessions_leave_no_byte(
    how: str, serve: Serve, model: FakeModel, tmp_path: Path
) -> None:
    """What is deleted or idle is in no file of the state any more, not even overwritten."""
    server = await serve(model, server=on_disk(tmp_path))
    leaving, staying = await server.visitor(), await server.visitor()
    for visitor, mark in ((leaving, "SECRET"), (staying, "STAYING")):
        for length in (0, 4900):
            model.scripts.append(reply(f"{mark}-answer" * (1 + length // 10)))
            await visitor.ask(f"{mark}-question {'x' * length}", clientMessageId=f"{mark}{length}")
    assert traces(tmp_path, "SECRET-q")
    assert traces(tmp_path, "SECRET-a")
    assert traces(tmp_path, leaving.id)
    if how == "delete":
        answer = await server.call("DELETE", f"/api/session/{leaving.id}")
        assert answer.body == {"deleted": True}
    else:
        server.age(leaving, 3600)
        await lf.sweep(server.hub, time.monotonic())
        await until(lambda: not traces(tmp_path, leaving.id))
    assert traces(tmp_path, "SECRET", leaving.id) == []
    assert (await leaving.get()).status == 404
    assert len(kept_messages(tmp_path, staying.id)) == 4


async def test_delete_during_a_turn_leaves_no_byte(
    serve: Serve, model: FakeModel, disk: Disk, tmp_path: Path
) -> None:
    """A session that is deleted while its message is being written is not written after all."""
    server = await serve(model, server=on_disk(tmp_path))
    visitor = await server.visitor()
    await written(server)
    seen = disk.commits
    disk.free.clear()
    post = asyncio.create_task(visitor.post("SECRET"))
    await until(lambda: disk.commits > seen)
    path = f"/api/session/{visitor.id}"
    delete = asyncio.create_task(server.call("DELETE", path))
    await expect_waiting(server, delete)
    disk.free.set()
    assert (await delete).body == {"deleted": True}
    assert (await post).status in (200, 404)
    assert traces(tmp_path, "SECRET", visitor.id) == []


async def test_deletion_is_finished_when_a_backup_has_ended(
    serve: Serve, model: FakeModel, tmp_path: Path
) -> None:
    """A reader that holds on to the old log delays the overwriting, and no more than that."""
    server = await serve(model, server=on_disk(tmp_path))
    visitor = await server.visitor()
    await visitor.ask("SECRET")
    reader = sqlite3.connect(tmp_path / "leflux.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM message").fetchall()
    assert (await server.call("DELETE", f"/api/session/{visitor.id}")).status == 200
    assert kept_messages(tmp_path, visitor.id) == []
    reader.close()
    await until(lambda: not traces(tmp_path, "SECRET", visitor.id))


async def test_locked_database(
    serve: Serve,
    model: FakeModel,
    disk: Disk,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While the database is locked serving goes on, one error a minute is logged, and all is
    written once it is free."""
    server = await serve(model, server=on_disk(tmp_path))
    visitor, leaving = await server.visitor(), await server.visitor()
    await visitor.ask("Before")
    await leaving.ask("SECRET")
    with contextlib.closing(sqlite3.connect(tmp_path / "leflux.db", isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        assert (await visitor.ask("One"))["data"]["text"] == "ok"
        assert (await visitor.ask("Two"))["data"]["text"] == "ok"
        assert (await server.call("DELETE", f"/api/session/{leaving.id}")).status == 200
        tries = disk.commits
        await until(lambda: disk.commits > tries + 1)
        assert len(errors_in(caplog)) == 1
        server.hub.store._complained -= 60
        await until(lambda: len(errors_in(caplog)) > 1)
        assert len(errors_in(caplog)) == 2
        assert len(kept_messages(tmp_path, visitor.id)) == 2
        lock.execute("ROLLBACK")
    await until(lambda: len(kept_messages(tmp_path, visitor.id)) == 6)
    assert kept_messages(tmp_path, visitor.id) == await visitor.history()
    await until(lambda: not traces(tmp_path, "SECRET", leaving.id))
    assert all("\n" not in line for line in errors_in(caplog))
    caplog.clear()
    await visitor.ask("After")
    assert kept_messages(tmp_path, visitor.id) == await visitor.history()


async def test_full_disk(
    serve: Serve, model: FakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that fills up degrades to memory; what is said meanwhile is written later on."""
    server = await serve(model, server=on_disk(tmp_path))
    visitor = await server.visitor()
    await visitor.ask("Before")
    database = cast(sqlite3.Connection, server.hub.store._db)
    database.execute("PRAGMA max_page_count = 1")  # that is: as many as there are
    for number in range(8):
        assert (await visitor.ask(f"{number} " + "x" * 4000))["data"]["text"] == "ok"
    assert len(errors_in(caplog)) == 1
    caplog.clear()
    database.execute("PRAGMA max_page_count = 1000000")
    await until(lambda: len(kept_messages(tmp_path, visitor.id)) == 18)
    assert kept_messages(tmp_path, visitor.id) == await visitor.history()


async def test_stop_right_after_the_disk_is_back(
    model: FakeModel, disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a failing disk kept in memory is flushed at the end, if the disk takes it again."""
    async with running(make_config(model, server=on_disk(tmp_path))) as server:
        visitor = await server.visitor()
        with contextlib.closing(
            sqlite3.connect(tmp_path / "leflux.db", isolation_level=None)
        ) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            await visitor.ask("Hello")  # that fails; the next try is a second away
        assert not server.hub.store.durable
        history = await visitor.history()
    assert len(errors_in(caplog)) == 1
    caplog.clear()
    assert kept_messages(tmp_path, visitor.id) == history
    assert len(history) == 2


@pytest.mark.parametrize("first", [1, 2, 3, 600])
async def test_long_conversations(first: int, serve: Serve, disk: Disk, tmp_path: Path) -> None:
    """However much was said during one slow write: after a restart it is what it was in memory."""
    folder = tmp_path / "state"
    server = await serve(server=on_disk(folder))
    visitor = await server.visitor()
    session = server.hub.sessions[visitor.id]

    def remember(count: int) -> None:
        for _ in range(count):
            session.remember("user", f"message {session.message_count}")
        session.store.touch(session)

    for number, (before, meanwhile, after) in enumerate([(first, 700, 0), (1, 1, 1), (0, 501, 2)]):
        await written(server)
        seen = disk.commits
        disk.free.clear()
        remember(before)
        if before:
            await until(lambda seen=seen: disk.commits > seen)  # type: ignore[misc]
        remember(meanwhile)
        disk.free.set()
        await written(server)
        for _ in range(after):
            remember(1)
            await written(server)
        copy = snapshot(folder, tmp_path / str(number))
        async with running(make_config(server=on_disk(copy))) as restarted:
            again = restarted.hub.sessions[visitor.id]
            assert again.history == session.history
            assert again.message_count == session.message_count
            assert len(query(copy, "SELECT number FROM message")) == lf.MAX_HISTORY


async def test_without_a_state_dir_nothing_is_written(
    serve: Serve, tmp_path: Path, monkeypatch: Patch
) -> None:
    """state_dir = "" keeps everything in memory."""
    monkeypatch.chdir(tmp_path)
    async with running(make_config(None, tmp_path)) as server:
        visitor = await server.visitor()
        await visitor.ask()
        assert (await server.call("DELETE", f"/api/session/{visitor.id}")).status == 200
        assert not [t for t in threading.enumerate() if t.name.startswith("leflux-store")]
    assert files_in(tmp_path) == set()


async def test_state_directory_of_systemd(tmp_path: Path) -> None:
    """$STATE_DIRECTORY overrides state_dir; of several the first one counts."""
    more = '[server]\nstate_dir = "unused"\n'
    folder = tmp_path / "first"
    async with program(tmp_path, more, STATE_DIRECTORY=f"{folder}:{tmp_path / 'second'}") as run:
        await (await run.server.visitor()).ask()
        assert len(query(folder, "SELECT * FROM session")) == 1
    assert files_in(tmp_path) == {"config.toml", "first"}


# ---------------------------------------------------------------------------------------------
# Store: what stops the start


@pytest.fixture
async def kept(model: FakeModel, tmp_path: Path) -> Path:
    """A folder with the state of a server that has ended: long conversations in one file."""
    folder = tmp_path / "kept"
    async with running(make_config(model, server=on_disk(folder))) as server:
        for _ in range(4):
            visitor = await server.visitor()
            for number in range(3):
                await visitor.ask(f"{number} " + "Lorem ipsum " * 300)
    assert files_in(folder) == {"leflux.db"}
    return folder


def damage(folder: Path, name: str) -> None:
    path = folder / "leflux.db"
    size = path.stat().st_size
    if name == "not a database":
        path.write_bytes(b"This is no database. " * 1000)
    elif name == "truncated":
        os.truncate(path, size // 2)
    elif name == "pages overwritten":
        with path.open("r+b") as file:
            for page in range(4096, size, 8192):
                file.seek(page)
                file.write(b"\xff" * 4096)
    elif name == "a folder":
        path.unlink()
        path.mkdir()
    elif name == "a file in the folder's place":
        shutil.rmtree(folder)
        folder.touch()
    else:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute(name)


DAMAGES = (
    "not a database",
    "truncated",
    "pages overwritten",
    "a folder",
    "a file in the folder's place",
    "PRAGMA user_version = 99",
    "DROP TABLE usage",
    "ALTER TABLE site RENAME COLUMN patch TO path",
    "UPDATE session SET state = 'junk'",
    "UPDATE message SET body = '[]'",
)


async def test_unusable_databases_stop_the_start(kept: Path, tmp_path: Path) -> None:
    """A damaged, newer or unusable database stops the start with one clear line, and is left
    alone."""
    (tmp_path / "c.toml").write_text('[[sites]]\nid = "shop"\nname = "Shop"\n')

    async def start(folder: Path) -> tuple[int, str, str]:
        config = ("--config", str(tmp_path / "c.toml"))
        return await run_program(*config, LEFLUX_PORT="0", STATE_DIRECTORY=str(folder))

    folders = []
    for number, name in enumerate(DAMAGES):
        folders.append(tmp_path / str(number))
        shutil.copytree(kept, folders[-1])
        damage(folders[-1], name)
    newer = folders[DAMAGES.index("PRAGMA user_version = 99")]
    untouched = (newer / "leflux.db").read_bytes()
    for half in (0, 1):  # not all of them at once
        chosen = range(half, len(folders), 2)
        results = await asyncio.gather(*(start(folders[n]) for n in chosen))
        for number, (code, out, err) in zip(chosen, results, strict=True):
            assert code not in (0, 1), (DAMAGES[number], err)
            assert out == ""
            assert err.count("\n") == 1, (DAMAGES[number], err)
            assert str(folders[number] / "leflux.db") in err
    assert (newer / "leflux.db").read_bytes() == untouched


async def test_locked_database_stops_the_start(kept: Path) -> None:
    """A database that another program holds locked stops the start with one line."""
    with contextlib.closing(sqlite3.connect(kept / "leflux.db", isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        with pytest.raises(lf.ConfigError, match=r"leflux\.db.*locked"):
            async with running(make_config(server=on_disk(kept))):
                pass
    async with running(make_config(server=on_disk(kept))) as server:
        assert len(server.hub.sessions) == 4


@pytest.mark.parametrize("old", [False, True])
async def test_disk_that_takes_nothing_stops_the_start(
    old: bool, kept: Path, tmp_path: Path
) -> None:
    """Where nothing can be written, the start ends with one line and a code that is not 0."""
    folder = kept if old else tmp_path / "new"
    (tmp_path / "c.toml").write_text('[[sites]]\nid = "shop"\nname = "Shop"\n')
    command = 'ulimit -f 0; exec "$0" "$@"'
    child = await asyncio.create_subprocess_exec(
        *("sh", "-c", command, sys.executable, lf.__file__, "--config", str(tmp_path / "c.toml")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LEFLUX_PORT": "0", "STATE_DIRECTORY": str(folder)},
    )
    out, err = await asyncio.wait_for(child.communicate(), PATIENCE_SECONDS)
    assert child.returncode not in (0, 1, None)
    assert out == b""
    assert err.count(b"\n") == 1, err
    assert str(folder / "leflux.db").encode() in err


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
async def test_read_only_database_stops_the_start(kept: Path) -> None:
    """A database that may only be read stops the start with one line."""
    for path, mode in ((kept / "leflux.db", 0o400), (kept, 0o500)):
        path.chmod(mode)
        with pytest.raises(lf.ConfigError, match=r"leflux\.db"):
            async with running(make_config(server=on_disk(kept))):
                pass
        path.chmod(0o700)


async def test_damage_anywhere(kept: Path, tmp_path: Path) -> None:
    """Wherever bytes of the file are wrong: it starts and serves, or stops with one line."""
    whole = (kept / "leflux.db").read_bytes()
    dice = random.Random(8)
    folder = tmp_path / "damaged"
    folder.mkdir()
    config, started = make_config(server=on_disk(folder)), 0
    refused: list[str] = []
    for number in range(60):
        length = dice.choice([1, 16, 400])
        # Every other time in the file's header and its schema, where it matters most.
        place = dice.randrange(4096 if number % 2 else len(whole) - length)
        piece = dice.choice([bytes(length), b"\xff" * length, dice.randbytes(length)])
        (folder / "leflux.db").write_bytes(whole[:place] + piece + whole[place + length :])
        try:
            async with running(config) as server:
                started += 1
                assert (await server.call("GET", "/health")).status == 200
        except lf.ConfigError as error:
            refused.append(str(error))
        for path in folder.iterdir():
            path.unlink()
    assert started
    assert refused
    assert not [line for line in refused if "\n" in line or str(folder / "leflux.db") not in line]


# ---------------------------------------------------------------------------------------------
# Restart

SPICY = 'Grüße 👋🏽 \x00 \x7f "q" \\ \u2028 </script> {"a": [null, 1e400]} ' + "\n\t" * 3


async def test_session_goes_on_after_a_restart(model: FakeModel, tmp_path: Path) -> None:
    """A session goes on where it was: same id, history, page and next seq, and what was asked
    before is answered as before."""
    config = make_config(model, server=on_disk(tmp_path))
    async with running(config) as server:
        visitor = await server.visitor()
        model.scripts.append(reply(SPICY))
        await visitor.ask(f"Q {SPICY}")
        first_id = await visitor.chat("Again", clientMessageId="one")
        last_seq = (await visitor.turn())[-1]["seq"]
        before = await visitor.get()
        created = server.hub.sessions[visitor.id].created_at
    asked = len(model.requests)
    async with running(config) as visitor.server:
        after = await visitor.get()
        assert after.raw == before.raw
        assert after.body["history"][1] == {"role": "assistant", "content": SPICY}
        session = visitor.server.hub.sessions[visitor.id]
        assert session.created_at == created
        joined = await visitor.connect(last_seq)
        assert joined["restored"] is True
        assert joined["history"] == before.body["history"]
        assert await visitor.chat("Again", clientMessageId="one") == first_id
        assert len(model.requests) == asked
        assert (await visitor.ask("New", clientMessageId="two"))["event"] == "message_done"
        assert visitor.frames[-2]["seq"] == last_seq + 1
        assert "Q Grüße" in model.prompt()
        stats = (await visitor.server.call("GET", "/api/stats")).body
        assert stats["activeSessions"] == 1


async def test_idle_sessions_do_not_come_back(tmp_path: Path) -> None:
    """After a restart a session older than the idle limit is not found, and off the disk."""
    config = make_config(server=on_disk(tmp_path))
    async with running(config) as server:
        old, young = await server.visitor(), await server.visitor()
        await old.ask("SECRET")
        await young.ask("Hello")
    age = """UPDATE session SET state =
        json_set(state, '$.active', json_extract(state, '$.active') - ?) WHERE id = ?"""
    with contextlib.closing(sqlite3.connect(tmp_path / "leflux.db", isolation_level=None)) as db:
        db.execute(age, (30 * 60, old.id))
        db.execute(age, (30 * 60 - 60, young.id))
    async with running(config) as server:
        old.server = young.server = server
        assert (await old.get()).error == (404, "session_not_found")
        assert (await young.get()).status == 200
        await until(lambda: not traces(tmp_path, "SECRET", old.id))
        server.age(young, 61)  # the idle time goes on, it does not begin again
        assert (await young.get()).error == (404, "session_not_found")


async def test_sessions_of_sites_that_are_gone(tmp_path: Path) -> None:
    """Sessions of a site that is no longer configured do not come back."""
    async with running(make_config(server=on_disk(tmp_path))) as server:
        visitor = await server.visitor()
        await visitor.ask("SECRET")
    async with running(make_config(server=on_disk(tmp_path), sites=[OTHER])) as server:
        assert server.hub.sessions == {}
        await until(lambda: not traces(tmp_path, "SECRET", visitor.id))


@pytest.mark.parametrize(("event", "script", "shown"), [end for end in ENDS if end[0][0] != "c"])
async def test_missed_end_of_a_turn(
    event: str, script: list[bytes], shown: str, model: FakeModel, tmp_path: Path
) -> None:
    """A client that missed the last event of a finished turn in a crash gets it with lastSeq, and
    one that has seen it does not get it again."""
    server_of = [make_config(model, server=on_disk(tmp_path / n)) for n in ("one", "two")]
    async with running(server_of[0]) as server:
        visitor = await server.visitor()
        model.scripts.append(script)
        await visitor.chat(pageContext=SHOWN)
        end = (await visitor.turn())[-1]
        assert end["event"] == event
        snapshot(tmp_path / "one", tmp_path / "two")
    async with running(server_of[1]) as visitor.server:
        for last_seq in (None, 0, end["seq"] - 1):
            await visitor.connect(last_seq)
            assert await visitor.next() == end
            await visitor.expect_open()
        await visitor.connect(end["seq"])
        await visitor.ws.send_str("barrier")
        assert (await visitor.next())["event"] == "error"
        await visitor.ask()
        assert visitor.frames[-2]["seq"] == end["seq"] + 1


async def test_kill_cuts_off_turns_and_tasks(tmp_path: Path, model: FakeModel) -> None:
    """Turns and tasks that kill -9 cuts off, wherever they are, end with a message that says so;
    its seq is above all that was seen, and the conversation goes on."""
    more = f'[llm]\nbase_url = "{model.url}"\n[limits]\ninit_per_minute = 100\n'
    begun = sse(chunk('{"message": "Half'))
    cut: dict[str, Visitor] = {}
    async with program(tmp_path, more) as run:
        for name in ("silent", "streaming", "acting", "acted", "confirming", "going on"):
            visitor = cut[name] = await run.server.visitor()
            if name in ("silent", "streaming"):
                model.scripts.append([begun, forever] if name == "streaming" else [forever])
            else:
                element = 2 if name == "confirming" else 1
                model.scripts.append(doing("Going", type="click_element", elementId=element))
            await visitor.chat("Do it", pageContext=SHOWN)
            if name == "silent":
                continue
            last = await visitor.next()
            while last["event"] not in ("action_plan", "confirmation_required"):
                if name == "streaming":
                    break
                last = await visitor.next()
            if name in ("acted", "going on"):
                plan = last["data"]["actions"][0]
                result = {"success": True}
                await visitor.send("action_complete", actionId=plan["id"], result=result)
            if name == "going on":
                model.scripts.append([begun, begun, forever])
                await visitor.send("continue_task", context=SHOWN)
                last = await visitor.next()
            if name != "going on":
                await visitor.expect_open()
        run.child.kill()
        await run.end()
    for _ in range(2):  # and once more, before anybody has come back
        async with program(tmp_path, more) as run:
            assert (await run.server.call("GET", "/health")).status == 200
            run.child.kill()
            await run.end()
    async with program(tmp_path, more) as run:
        for name, visitor in cut.items():
            visitor.server = run.server
            seen = max((frame["seq"] for frame in visitor.frames), default=0)
            await visitor.connect(seen)
            end = await visitor.next()
            assert end["event"] == "message", name
            assert end["data"] == {"text": lf.RESTARTED}
            assert seen < end["seq"] < 2**53
            assert (await visitor.history())[0] == ("user", "Do it")
            assert (await visitor.history())[-1] == ("assistant", lf.RESTARTED)
            await visitor.send("continue_task", context=SHOWN)
            await visitor.send("confirmation_response", confirmed=True)
            await visitor.expect_open()
            assert visitor.frames[-2] == end  # the old task is over
            await visitor.ask("Go on")
            assert visitor.frames[-2]["seq"] == end["seq"] + 1


class Echo(deque[Any]):
    """The scripts of a model that says what it was asked, in pieces."""

    def __len__(self) -> int:
        return 1

    def popleft(self) -> Any:
        async def answer(request: web.Request) -> web.StreamResponse:
            asked = (await request.json())["messages"][-1]["content"]
            said = json.dumps({"message": "re: " + asked.split("\n\n")[-1]})
            response = web.StreamResponse()
            await response.prepare(request)
            for start in range(0, len(said), 8):
                await response.write(sse(chunk(said[start : start + 8])))
            await response.write(sse("[DONE]"))
            return response

        return answer


@dataclasses.dataclass
class Talker:
    """A visitor who talks as fast as possible, and keeps book."""

    name: str
    visitor: Visitor | None = None
    tried: int = 0
    acknowledged: list[str] = dataclasses.field(default_factory=list)
    heard: list[str] = dataclasses.field(default_factory=list)
    last_seq: int = 0

    async def talk(self, server: Server) -> None:
        """Talk until the server dies."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            if self.visitor is None:
                visitor = await server.visitor(connect=False)
            else:
                visitor = self.visitor
                visitor.server = server
            path = f"/?sessionId={visitor.id}&lastSeq={self.last_seq}"
            visitor.ws = await server.socket(path)
            while True:
                self.tried += 1
                text = f"{self.name} says {self.tried}"
                assert (await visitor.post(text)).status == 200
                self.visitor = visitor
                self.acknowledged.append(text)
                if not await self.hear(visitor.ws, f"re: {text}"):
                    return
                self.heard.append(f"re: {text}")

    async def hear(self, ws: aiohttp.ClientWebSocketResponse, expected: str) -> bool:
        """Hear frames up to a reply; False if the line is cut."""
        while (message := await ws.receive(PATIENCE_SECONDS)).type is WSMsgType.TEXT:
            frame = json.loads(message.data)
            if frame["event"] != "session_joined":
                assert frame["seq"] > self.last_seq
                self.last_seq = frame["seq"]
            if frame["event"] == "message_done" and frame["data"]["text"] == expected:
                return True
        return False

    async def check(self, server: Server) -> None:
        """Nothing that was acknowledged or heard is lost, out of order or there twice."""
        if self.visitor is None:
            return
        self.visitor.server = server
        history = await self.visitor.history()
        for role, expected in (("user", self.acknowledged), ("assistant", self.heard)):
            kept = [text for one, text in history if one == role]
            assert len(set(kept) - {lf.RESTARTED}) == len([t for t in kept if t != lf.RESTARTED])
            assert [text for text in kept if text in expected] == expected


async def test_kill_under_load(tmp_path: Path, model: FakeModel) -> None:
    """However often kill -9 strikes while visitors chat: no acknowledged message and no reply
    whose message_done was seen is lost, and the database is whole."""
    limits = "init_per_minute = 1000\nchat_per_minute = 100000"
    more = f'[llm]\nbase_url = "{model.url}"\n[limits]\n{limits}\n'
    model.scripts = Echo()
    dice, kills = random.Random(4), 8
    talkers = [Talker(f"talker {number}") for number in range(6)]
    for kill in range(kills):
        async with program(tmp_path, more) as run:
            for talker in talkers:
                await talker.check(run.server)
            talks = [asyncio.create_task(talker.talk(run.server)) for talker in talkers]
            enough = sum(len(t.acknowledged) for t in talkers) + dice.randrange(10, 120)
            await until(
                lambda enough=enough, talks=talks: (  # type: ignore[misc]
                    sum(len(t.acknowledged) for t in talkers) >= enough
                    or any(talk.done() for talk in talks)
                )
            )
            run.child.kill()
            await run.end()
            await asyncio.gather(*talks)
        copy = snapshot(tmp_path, tmp_path / f"killed-{kill}")
        assert query(copy, "PRAGMA integrity_check") == [("ok",)]
        assert query(copy, "PRAGMA foreign_key_check") == []
    async with program(tmp_path, more) as run:
        for talker in talkers:
            await talker.check(run.server)
            assert talker.acknowledged
            assert talker.heard
        run.child.send_signal(signal.SIGTERM)
        code, log = await run.end()
    assert code == 0
    assert " ERROR " not in log


async def test_shutdown_flushes_everything(tmp_path: Path, model: FakeModel) -> None:
    """SIGTERM: the end of every turn is heard and on disk, the cut-off ones too, exit code 0."""
    settings = "[server]\nshutdown_seconds = 0.2\n[limits]\nsite_tokens_per_day = 1000000\n"
    more = f'[llm]\nbase_url = "{model.url}"\n{settings}'
    async with program(tmp_path, more) as run:
        done, streaming, confirming = [await run.server.visitor() for _ in range(3)]
        model.scripts.append(doing("Shall I?", type="click_element", elementId=2))
        await confirming.ask("Delete it", pageContext=SHOWN)
        model.scripts.append([sse(chunk("Half")), forever])
        await streaming.chat("Long")
        await streaming.next()
        await done.chat("Short")
        run.child.send_signal(signal.SIGTERM)
        ends = [(await visitor.turn())[-1] for visitor in (done, streaming, confirming)]
        for visitor in (done, streaming, confirming):
            assert (await read_close(visitor.ws))[1] == 1001
        assert (await run.end())[0] == 0
    assert files_in(tmp_path) == {"config.toml", "leflux.db"}
    assert kept_messages(tmp_path, done.id) == [("user", "Short"), ("assistant", "ok")]
    assert kept_messages(tmp_path, streaming.id) == [
        ("user", "Long"),
        ("assistant", f"Half{lf.CUT_SHORT}"),
    ]
    assert kept_messages(tmp_path, confirming.id)[-1] == ("assistant", lf.INTERRUPTED)
    assert [end["event"] for end in ends] == ["message_done", "message_done", "message"]
    async with program(tmp_path, more) as run:
        for visitor, end in zip((done, streaming, confirming), ends, strict=True):
            visitor.server = run.server
            await visitor.connect(end["seq"] - 1)
            assert await visitor.next() == end
            assert await visitor.history() == kept_messages(tmp_path, visitor.id)


# ---------------------------------------------------------------------------------------------
# Budgets

REFUSAL = "Enough for today, see you tomorrow."
FRUGAL: Json = {**SHOP, "refusal": REFUSAL}
BUDGET_SPENT = (429, "budget_exceeded")
NOON = datetime(2026, 2, 28, 12, tzinfo=UTC).timestamp()


def frugal_hub(**limits: int) -> tuple[lf.Hub, lf.Site]:
    """A hub with a model that is never asked, and its site."""
    config = make_config(limits=limits, sites=[FRUGAL, OTHER])
    hub = lf.Hub(config=config, knowledge={}, started=0, store=lf.Store(None))
    hub.model = cast(Any, object())
    return hub, config.sites[0]


def used_tokens(server: Server, site_id: str = "shop") -> tuple[int, int]:
    """The tokens a site has spent, and those set aside."""
    now = cast(Any, lf).time.time()  # as the server sees it
    usage = lf.usage_today(server.hub, site_id, now)
    return usage.tokens, usage.reserved


def using(tokens: int, text: str = "ok") -> list[bytes]:
    """A script that reports its usage."""
    usage = {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens}
    end = {"choices": [], "usage": usage}
    return [sse(chunk(json.dumps({"message": text})), end, "[DONE]")]


@pytest.mark.parametrize(
    ("first", "second", "same_day"),
    [
        ("2026-02-28T00:00:00+00:00", "2026-02-28T23:59:59.999+00:00", True),
        ("2026-02-28T23:59:59.999+00:00", "2026-03-01T00:00:00+00:00", False),
        ("2026-02-28T23:00:00-05:00", "2026-03-01T10:00:00+00:00", True),
        ("2026-02-28T10:00:00+00:00", "2026-03-28T10:00:00+00:00", False),
    ],
)
def test_budgets_are_for_a_utc_day(first: str, second: str, same_day: bool) -> None:
    """Messages and tokens are counted in UTC days; a new day begins with nothing used."""
    hub, site = frugal_hub(site_messages_per_day=2, site_tokens_per_day=100)
    now, later = (datetime.fromisoformat(day).timestamp() for day in (first, second))
    lf.settle_tokens(hub, site, lf.admit(hub, site, 2, 100, now), 100, 90)
    usage = lf.usage_today(hub, site.id, later)
    assert (usage.messages, usage.tokens) == ((2, 90) if same_day else (0, 0))
    if same_day:
        with pytest.raises(lf.ApiError):
            lf.admit(hub, site, 1, 1, later)
    else:
        lf.admit(hub, site, 2, 100, later)


@pytest.mark.parametrize(
    ("limits", "used", "wanted", "fits"),
    [  # limits, used and wanted: (messages, tokens)
        ((0, 0), (10**9, 10**9), (1, 10**9), True),
        ((3, 0), (2, 10**9), (1, 10**9), True),
        ((3, 0), (3, 0), (1, 0), False),
        ((3, 0), (3, 0), (0, 10), True),  # the next call for a message that is counted
        ((0, 100), (10**9, 60), (1, 40), True),
        ((0, 100), (0, 60), (1, 41), False),
        ((0, 100), (0, 160), (0, 1), False),
        ((3, 100), (2, 60), (1, 41), False),
        ((3, 100), (3, 10), (1, 10), False),
    ],
)
def test_budget_that_is_left(
    limits: tuple[int, int], used: tuple[int, int], wanted: tuple[int, int], fits: bool
) -> None:
    """What fits into both budgets is admitted, 0 is no limit; what is refused counts as nothing."""
    hub, site = frugal_hub(site_messages_per_day=limits[0], site_tokens_per_day=limits[1])
    usage = lf.usage_today(hub, site.id, NOON)
    usage.messages, usage.tokens = used
    if fits:
        assert lf.admit(hub, site, *wanted, NOON) is usage
        assert (usage.messages, usage.reserved) == (used[0] + wanted[0], wanted[1])
        assert lf.admit(hub, hub.config.sites[1], *wanted, NOON) is not usage
    else:
        with pytest.raises(lf.ApiError) as caught:
            lf.admit(hub, site, *wanted, NOON)
        assert (caught.value.status, caught.value.code) == BUDGET_SPENT
        assert caught.value.message == REFUSAL
        assert (usage.messages, usage.tokens, usage.reserved) == (*used, 0)


def test_call_over_midnight() -> None:
    """A call that ends on the next day is charged to the day on which it began."""
    hub, site = frugal_hub(site_tokens_per_day=100)
    usage = lf.admit(hub, site, 1, 100, NOON)
    tomorrow = lf.admit(hub, site, 1, 100, NOON + 86400)
    lf.settle_tokens(hub, site, usage, 100, 70)
    assert (usage.tokens, usage.reserved) == (70, 0)
    assert (tomorrow.tokens, tomorrow.reserved) == (0, 100)


async def test_messages_per_day(serve: Serve, model: FakeModel, clock: Clock) -> None:
    """After site_messages_per_day: 429 budget_exceeded with the site's refusal, until the next UTC
    day; for this site alone, and the refused message leaves no trace."""
    clock.stopped_at = NOON
    limits = {"site_messages_per_day": 2}
    server = await serve(model, limits=limits, sites=[FRUGAL, OTHER])
    visitor, second = await server.visitor(), await server.visitor()
    await visitor.ask("One", clientMessageId="one")
    await second.ask("Two")
    answer = await visitor.post("Three", clientMessageId="three")
    assert answer.error == BUDGET_SPENT
    assert answer.body["message"] == REFUSAL
    assert (await second.post("Four")).error == BUDGET_SPENT
    assert await visitor.history() == [("user", "One"), ("assistant", "ok")]
    assert len(model.requests) == 2
    assert (await visitor.post("One", clientMessageId="one")).status == 200  # it is counted already
    await (await server.visitor("https://other.example")).ask()
    clock.stopped_at = NOON + 12 * 3600 - 1
    assert (await visitor.post("Five")).error == BUDGET_SPENT
    clock.stopped_at += 1
    assert (await visitor.ask("Three", clientMessageId="three"))["data"]["text"] == "ok"


async def test_refused_requests_cost_nothing(serve: Serve, model: FakeModel) -> None:
    """Only a message that is taken counts: none that is invalid, too fast or from a stranger."""
    limits = {"site_messages_per_day": 2, "chat_per_minute": 1}
    server = await serve(model, limits=limits)
    visitor = await server.visitor()
    assert (await visitor.post("")).status == 400
    assert (await visitor.post("x", pageContext=5)).status == 400
    visitor.origin = "https://other.example"
    assert (await visitor.post()).status == 404
    visitor.origin = ORIGIN
    await visitor.ask()
    assert (await visitor.post()).error == (429, "rate_limit_exceeded")
    assert lf.usage_today(server.hub, "shop", time.time()).messages == 1


@pytest.mark.parametrize("limit", [0, 1_000_000])
async def test_tokens_are_settled_with_reported_usage(
    limit: int, serve: Serve, model: FakeModel
) -> None:
    """Tokens are set aside before a call, if there is a limit, and settled with its usage after."""
    server = await serve(model, limits={"site_tokens_per_day": limit})
    visitor = await server.visitor()
    model.scripts.append([model.at_gate, *using(123)])
    await visitor.chat("Hello " * 100)
    await until(lambda: model.requests)
    spent, reserved = used_tokens(server)
    assert spent == 0
    if limit:
        prompt = sum(len(m["content"]) for m in model.requests[0]["messages"])
        assert reserved >= prompt // 4 + model.requests[0]["max_tokens"]
    model.gate.release()
    await visitor.turn()
    assert used_tokens(server) == (123, 0)
    model.scripts.append(using(1000))
    await visitor.ask()
    assert used_tokens(server) == (1123, 0)


async def test_tokens_are_estimated_where_none_are_reported(serve: Serve, model: FakeModel) -> None:
    """Without usage 4 characters count as a token, of what was asked and what was said."""
    server = await serve(model)
    visitor = await server.visitor()
    expected = 0
    scripts: list[Script] = [reply("x" * 4000), [sse(chunk("x" * 400)), cut_wire]]
    for script in scripts:
        model.scripts.append(script)
        await visitor.ask("y" * 4000)
        expected += sum(len(m["content"]) for m in model.requests[-1]["messages"]) // 4
    expected += 4400 // 4
    spent, reserved = used_tokens(server)
    assert expected <= spent <= expected + 20  # and the JSON around the text
    assert reserved == 0


async def test_calls_that_fail_cost_nothing(serve: Serve, model: FakeModel) -> None:
    """A call that a provider has refused is settled with nothing."""
    server = await serve(model, limits={"site_tokens_per_day": 10_000})
    visitor = await server.visitor()
    model.scripts.append(status(401, {"error": {"message": "no"}}))
    model.scripts.extend([status(500, {}, Retry_After="0")] * 3)
    for _ in range(2):
        assert (await visitor.ask())["data"]["isError"] is True
    assert used_tokens(server) == (0, 0)


@pytest.mark.parametrize("said", ["", "x" * 400])
async def test_call_that_is_stopped(said: str, serve: Serve, model: FakeModel) -> None:
    """A call that is stopped halfway pays for its prompt and what was said, and holds nothing."""
    server = await serve(model, limits={"site_tokens_per_day": 100_000})
    visitor = await server.visitor()
    model.scripts.append([sse(chunk(said)), forever])
    await visitor.chat()
    await until(lambda: model.requests)
    if said:
        await visitor.next()
    await visitor.send("stop")
    await visitor.turn()
    await until(lambda: not used_tokens(server)[1])
    prompt = sum(len(m["content"]) for m in model.requests[0]["messages"]) // 4
    assert used_tokens(server) == (prompt + len(said) // 4, 0)


@pytest.mark.parametrize("how", ["message", "delete", "stop"])
async def test_call_that_never_began(
    how: str, serve: Serve, model: FakeModel, disk: Disk, tmp_path: Path
) -> None:
    """What was set aside for a call that is cancelled before it begins is given back."""
    server = await serve(model, server=on_disk(tmp_path), limits={"site_tokens_per_day": 100_000})
    visitor = await server.visitor()
    await written(server)
    seen = disk.commits
    disk.free.clear()
    posts = [asyncio.create_task(visitor.post("One"))]
    await until(lambda: disk.commits > seen)
    assert used_tokens(server)[1] > 0
    if how == "message":
        posts.append(asyncio.create_task(visitor.post("Two")))
        await until(lambda: server.hub.messages_processed == 2)
    elif how == "delete":
        path = f"/api/session/{visitor.id}"
        posts.append(asyncio.create_task(server.call("DELETE", path)))
        await until(lambda: not server.hub.sessions)
    else:
        await visitor.send("stop")
        await until(lambda: server.hub.sessions[visitor.id].task is None)
    model.scripts.append(using(77))
    disk.free.set()
    await asyncio.gather(*posts)
    if how == "message":
        while (await visitor.turn())[-1]["data"]["text"] != "ok":
            pass
    assert used_tokens(server) == (77 if how == "message" else 0, 0)
    assert len(model.requests) == (how == "message")


@pytest.mark.parametrize("limits", [{"site_messages_per_day": 7}, {"site_tokens_per_day": 20_000}])
async def test_parallel_requests_stay_within_the_budget(
    limits: Json, serve: Serve, model: FakeModel
) -> None:
    """However many requests come at once: no more is admitted than the budget holds."""
    server = await serve(model, limits={**limits, "init_per_minute": 1000})
    visitors = [await server.visitor(connect=False) for _ in range(40)]
    model.scripts.extend([[model.at_gate, *using(1500)]] * 40)
    answers = await asyncio.gather(*(visitor.post() for visitor in visitors))
    taken = [answer for answer in answers if answer.status == 200]
    assert all(a.status == 200 or a.error == BUDGET_SPENT for a in answers)
    if "site_messages_per_day" in limits:
        assert len(taken) == 7
    else:
        assert 1 <= len(taken) < 20_000 / 1024
        assert sum(used_tokens(server)) <= 20_000
    for _ in visitors:
        model.gate.release()
    await until(lambda: not any(s.task for s in server.hub.sessions.values()))
    assert used_tokens(server) == (1500 * len(taken), 0)
    assert len(model.requests) == len(taken)


async def test_budget_runs_out_in_the_middle_of_a_task(serve: Serve, model: FakeModel) -> None:
    """A task whose next call does not fit the budget any more ends with the refusal."""
    server = await serve(model, limits={"site_tokens_per_day": 20_000}, sites=[FRUGAL])
    visitor = await server.visitor()
    script = doing("Going", **CLICK)
    usage = {"choices": [], "usage": {"total_tokens": 19_500}}
    model.scripts.append([script[0].replace(b"data: [DONE]", sse(usage).strip())])
    await visitor.chat(pageContext=SHOWN)
    while (frame := await visitor.next())["event"] != "action_plan":
        pass
    plan = frame["data"]["actions"][0]
    await visitor.send("action_complete", actionId=plan["id"], result={"success": True})
    await visitor.send("continue_task", context=SHOWN)
    end = (await visitor.turn())[-1]
    assert (end["event"], end["data"]) == ("message", {"text": REFUSAL})
    assert len(model.requests) == 1
    assert (await visitor.history())[-1] == ("assistant", REFUSAL)
    assert used_tokens(server) == (19_500, 0)
    assert (await visitor.post()).error == BUDGET_SPENT
    assert server.hub.sessions[visitor.id].task is None


async def test_offline_guide_costs_no_tokens(serve: Serve) -> None:
    """The offline guide answers whatever the token budget; its messages count."""
    limits = {"site_tokens_per_day": 1, "site_messages_per_day": 2}
    server = await serve(limits=limits)
    visitor = await server.visitor()
    for _ in range(2):
        assert (await visitor.ask())["event"] == "message_done"
    assert (await visitor.post()).error == BUDGET_SPENT
    assert used_tokens(server) == (0, 0)


async def test_usage_is_kept_across_restarts(
    model: FakeModel, clock: Clock, tmp_path: Path
) -> None:
    """Usage is kept across restarts; a crash counts what was set aside as spent."""
    clock.stopped_at = NOON
    limits = {"site_messages_per_day": 3, "site_tokens_per_day": 50_000}
    config = make_config(model, server=on_disk(tmp_path / "state"), limits=limits)
    async with running(config) as server:
        visitor = await server.visitor()
        model.scripts.append(using(5000))
        await visitor.ask()
    async with running(config) as server:
        assert used_tokens(server) == (5000, 0)
        visitor = await server.visitor()
        model.scripts.append([model.at_gate, *using(1)])
        await visitor.chat()
        await until(lambda: model.requests[1:])
        await written(server)
        reserved = used_tokens(server)[1]
        crashed = snapshot(tmp_path / "state", tmp_path / "crashed")
        model.gate.release()
        await visitor.turn()
    copy = make_config(model, server=on_disk(crashed), limits=limits)
    for config_now, spent in ((config, 5001), (copy, 5000 + reserved)):
        async with running(config_now) as server:
            assert used_tokens(server) == (spent, 0)
            visitor = await server.visitor()
            await visitor.ask()
            assert (await visitor.post()).error == BUDGET_SPENT
    clock.stopped_at += 86400
    async with running(config) as server:
        await written(server)
        assert query(tmp_path / "state", "SELECT * FROM usage") == []
        await (await server.visitor()).ask()
        assert lf.usage_today(server.hub, "shop", clock.time()).messages == 1


@pytest.mark.parametrize("refusal", ["", 5, "x" * 501])
def test_refusal_must_say_something(refusal: Any) -> None:
    """A refusal is shown to visitors, so it is not empty."""
    with pytest.raises(lf.ConfigError, match="refusal"):
        make_config(sites=[{**SHOP, "refusal": refusal}])


# ---------------------------------------------------------------------------------------------
# Tokens

PROJECT = "leflux-test"
ISSUER = f"https://securetoken.google.com/{PROJECT}"
NOW = int(time.time())
MISSING = object()
CLAIMS: Json = {
    "aud": PROJECT,
    "iss": ISSUER,
    "sub": "olga",
    "user_id": "olga",
    "exp": NOW + 3600,
    "iat": NOW - 60,
    "auth_time": NOW - 600,
    "firebase": {"sign_in_provider": "google.com"},
}
HEADER: Json = {"alg": "RS256", "kid": "key-1", "typ": "JWT"}


@functools.cache
def private_key(number: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@functools.cache
def certificate(number: int) -> str:
    """A self-signed X.509 certificate as Google publishes them; number 0 is not RSA."""
    key = private_key(number) if number else ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "securetoken.test")])
    today = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(today - timedelta(1)).not_valid_after(today + timedelta(1))
    signed = builder.sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def public_keys() -> dict[str, rsa.RSAPublicKey]:
    return {f"key-{number}": private_key(number).public_key() for number in (1, 2)}


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign_rsa(signed: bytes, number: int = 1, digest: hashes.HashAlgorithm | None = None) -> bytes:
    return private_key(number).sign(signed, padding.PKCS1v15(), digest or hashes.SHA256())


def sign_pss(signed: bytes) -> bytes:
    digest = hashes.SHA256()
    return private_key(1).sign(signed, padding.PSS(padding.MGF1(digest), 32), digest)


def sign_hmac(signed: bytes) -> bytes:
    return hmac.digest(certificate(1).encode(), signed, hashlib.sha256)


def sign_not(_: bytes) -> bytes:
    return b""


Signer = Callable[[bytes], bytes]


def join_token(header: bytes, payload: bytes, sign: Signer = sign_rsa) -> str:
    signed = f"{base64url(header)}.{base64url(payload)}"
    return f"{signed}.{base64url(sign(signed.encode()))}"


def changed(original: Json, changes: Mapping[str, Any]) -> bytes:
    fields = {**original, **changes}
    return json.dumps({k: v for k, v in fields.items() if v is not MISSING}).encode()


def make_token(
    claims: Mapping[str, Any] | None = None,
    header: Mapping[str, Any] | None = None,
    sign: Signer = sign_rsa,
) -> str:
    """A Firebase ID token with changed claims and header fields, rightly signed all the same."""
    return join_token(changed(HEADER, header or {}), changed(CLAIMS, claims or {}), sign)


GOOD_CLAIMS: list[Json] = [
    {},
    {"sub": "x"},
    {"sub": "ü" * 128},
    {"exp": NOW + 1},
    {"exp": NOW},
    {"exp": NOW - 9},  # 10 s leeway
    {"iat": NOW, "auth_time": NOW},
    {"iat": NOW + 10, "auth_time": NOW + 10},
    {"auth_time": NOW - 10**8},
    {"email": "a@b.example", "email_verified": True},
    {"email": 5, "email_verified": True},
    {"nbf": "later", "admin": True},
]
EXPIRED_CLAIMS: list[Json] = [
    {"exp": NOW - 10},
    {"exp": NOW - 3600},
    {"exp": 0},
    {"exp": -(10**40)},
]
BAD_CLAIMS: list[Json] = [
    *({"aud": aud} for aud in ([PROJECT], [PROJECT, "other"], "other", "", None, MISSING, 5, True)),
    *({"aud": aud} for aud in ({PROJECT: 1}, PROJECT.upper(), f"{PROJECT} ", f"{PROJECT},other")),
    *({"iss": iss} for iss in ("https://securetoken.google.com/other", f"{ISSUER}/", "", None)),
    *({"iss": iss} for iss in (MISSING, [ISSUER], ISSUER.replace("https", "http"), PROJECT)),
    {"iss": f"https://session.firebase.google.com/{PROJECT}"},  # a session cookie
    {"iss": "https://accounts.google.com"},  # a Google ID token
    {  # a custom token, as a server makes it for its own users
        "iss": "firebase-adminsdk@leflux-test.iam.gserviceaccount.com",
        "sub": "firebase-adminsdk@leflux-test.iam.gserviceaccount.com",
        "aud": "https://identitytoolkit.googleapis.com/google.identity.identitytoolkit.v1"
        ".IdentityToolkit",
        "uid": "olga",
        "auth_time": MISSING,
    },
    *({"sub": sub} for sub in ("", "x" * 129, MISSING, None, 5, True, ["olga"], {"olga": 1})),
    *(
        {name: moment}
        for name in ("exp", "iat", "auth_time")
        for moment in (MISSING, None, float(NOW), NOW + 0.5, str(NOW + 60), True, [NOW], {})
    ),
    *({name: v} for name in ("exp", "iat", "auth_time") for v in (float("nan"), float("inf"))),
    *({name: v} for name in ("iat", "auth_time") for v in (NOW + 11, NOW + 3600, 10**40)),
    {"exp": NOW - 10, "aud": "other"},  # not even that it has expired is told
    {"exp": NOW - 10, "iat": "x"},
]
OWN_KEY = {"kty": "RSA", "alg": "RS256", "use": "sig", "n": "AQAB", "e": "AQAB"}
BAD_HEADERS: list[tuple[Json, Signer]] = [
    *(
        ({"alg": alg}, sign)
        for alg in ("none", "None", "nOnE", "")
        for sign in (sign_not, sign_rsa)
    ),
    ({"alg": "HS256"}, sign_hmac),
    ({"alg": "RS512"}, functools.partial(sign_rsa, digest=hashes.SHA512())),
    ({"alg": "RS384"}, functools.partial(sign_rsa, digest=hashes.SHA384())),
    ({"alg": "PS256"}, sign_pss),
    *(({"alg": alg}, sign_rsa) for alg in ("rs256", "ES256", MISSING, None, 5, ["RS256"])),
    *(({"kid": kid}, sign_rsa) for kid in ("key-9", "", "KEY-1", MISSING, None, 1, ["key-1"], {})),
    *(({"crit": crit}, sign_rsa) for crit in (["exp"], [], None, ["b64"], "exp")),
    *(({"jku": url}, sign_rsa) for url in ("https://evil.example/keys", None)),
    *(({"x5u": url}, sign_rsa) for url in ("https://evil.example/cert", "")),
    ({"x5c": [certificate(1)]}, sign_rsa),
    ({"jwk": OWN_KEY}, sign_rsa),
    ({"jwk": OWN_KEY}, functools.partial(sign_rsa, number=2)),
    ({"b64": False}, sign_not),
    ({}, functools.partial(sign_rsa, number=2)),
    ({"kid": "key-2"}, sign_rsa),
    ({}, sign_not),
    ({}, lambda signed: sign_rsa(signed)[:-1]),
    ({}, lambda signed: sign_rsa(signed) + b"\0"),
    ({}, lambda signed: bytes(256)),
    ({}, lambda signed: sign_rsa(signed + b" ")),
]


def junk_tokens() -> list[str]:
    """Texts that are no token at all."""
    token = make_token()
    header, payload, signature = token.split(".")
    good, claims = changed(HEADER, {}), changed(CLAIMS, {})
    deep = b'{"sub":' * 500 + b"1" + b"}" * 500
    return [
        *("", " ", "a", ".", "..", "...", "a.b", "a.b.c", "null", "e30.e30.e30", "=.=.=", "\x7f"),
        *("é.é.é", "\ud83d\ude00", "\u0130", "A" * 8192, "." * 8192, f"{token}." * 8, token * 2),
        *(token[: len(token) * part // 9] for part in range(1, 9)),
        *(token[:-1], f"{token}=", f"{token} ", f" {token}", f"{token}.", f"Bearer {token}"),
        *(f"{header}.{payload}", f"{header}.{payload}.", f".{payload}.{signature}", token[::-1]),
        *(f"{header}..{signature}", f"{header}.{payload}.{signature[::-1]}"),
        f"{header}.{base64url(changed(CLAIMS, {'sub': 'root'}))}.{signature}",
        *(
            join_token(junk, claims)
            for junk in (b"", b"[]", b"5", b"null", b'"RS256"', b"\xff", deep)
        ),
        *(join_token(good, junk) for junk in (b"", b"[]", b"5", b"null", b"{", b"\xff\xfe", deep)),
        join_token(good, claims.replace(str(NOW + 3600).encode(), b"9" * 5000)),
        join_token(good.replace(b'"key-1"', b"9" * 5000), claims),
    ]


def verdict(token: str, now: float = NOW) -> str:
    """What verify_token says: the uid, or why not."""
    try:
        return lf.verify_token(token, public_keys(), PROJECT, now).uid
    except lf.TokenError as problem:
        return f"no: {problem}"


@pytest.mark.parametrize("claims", GOOD_CLAIMS)
def test_good_tokens(claims: Json) -> None:
    """A token of this project that Google has signed says who is calling."""
    assert verdict(make_token(claims)) == claims.get("sub", "olga")
    assert verdict(make_token(claims, {"kid": "key-2"}, functools.partial(sign_rsa, number=2)))


@pytest.mark.parametrize("claims", BAD_CLAIMS, ids=str)
def test_bad_claims(claims: Json) -> None:
    """A token that is rightly signed is refused for any claim that is missing or not as it must
    be."""
    assert verdict(make_token(claims)) == "no: invalid"


@pytest.mark.parametrize("claims", EXPIRED_CLAIMS)
def test_expired_tokens(claims: Json) -> None:
    """A token whose time is over, leeway included, has expired."""
    assert verdict(make_token(claims)) == "no: expired"


@pytest.mark.parametrize(("header", "sign"), BAD_HEADERS)
def test_bad_headers_and_signatures(header: Json, sign: Signer) -> None:
    """Only RS256 by a key that Google publishes counts, and nothing that the token brings along.
    Without it not even "expired" is told."""
    assert verdict(make_token({}, header, sign)) == "no: invalid"
    assert verdict(make_token({"exp": 0}, header, sign)) == "no: invalid"


@pytest.mark.parametrize("number", range(len(junk_tokens())))
def test_junk_tokens(number: int) -> None:
    """What is no token is refused like any other."""
    assert verdict(junk_tokens()[number]) == "no: invalid"


def test_token_in_time() -> None:
    """A token holds from 10 s before it was issued to 10 s after it has expired."""
    token = make_token()
    issued, expires = CLAIMS["iat"], CLAIMS["exp"]
    for now, expected in (
        (issued - 10.1, "no: invalid"),
        (issued - 10, "olga"),
        (expires + 9.9, "olga"),
        (expires + 10, "no: expired"),
    ):
        assert verdict(token, now) == expected


@pytest.mark.parametrize(
    ("claims", "email"),
    [
        ({"email": "Olga@Example.COM", "email_verified": True}, "olga@example.com"),
        *(
            ({"email": "olga@example.com", "email_verified": verified}, "")
            for verified in (False, MISSING, None, 1, "true", [True])
        ),
        *(({"email": email, "email_verified": True}, "") for email in (MISSING, None, 5, "", [])),
    ],
)
def test_email_of_a_token(claims: Json, email: str) -> None:
    """An e-mail address counts only when email_verified is true, and without case."""
    caller = lf.verify_token(make_token(claims), public_keys(), PROJECT, NOW)
    assert caller == lf.Caller("olga", email)
    assert caller.is_one_of(["olga"])
    assert not caller.is_one_of(["OLGA", "", "x"])
    assert caller.is_one_of(["OLGA@example.com"]) == bool(email)


# ---------------------------------------------------------------------------------------------
# Tokens: the keys


class KeyServer:
    """Publishes certificates as Google does."""

    def __init__(self) -> None:
        self.url = ""
        self.certificates: Any = {"key-1": certificate(1)}
        self.cache_control = "public, max-age=3600, must-revalidate, no-transform"
        self.fetches = 0
        self.instead: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.fetches += 1
        if self.instead is not None:
            return await self.instead(request)
        headers = {"Cache-Control": self.cache_control} if self.cache_control else {}
        return web.json_response(self.certificates, headers=headers)


@pytest.fixture
async def key_server() -> AsyncIterator[KeyServer]:
    published = KeyServer()
    app = web.Application()
    app.router.add_get("/keys", published.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    published.url = f"http://127.0.0.1:{runner.addresses[0][1]}/keys"
    yield published
    await runner.cleanup()


@pytest.fixture
async def cache(key_server: KeyServer) -> AsyncIterator[lf.KeyCache]:
    async with aiohttp.ClientSession() as http:
        yield lf.KeyCache(http, key_server.url)


UNAVAILABLE = (503, "auth_keys_unavailable")


async def keys_in(cache: lf.KeyCache, key_id: str = "key-1") -> set[str]:
    """The ids of the keys that the cache offers; none if it is unavailable."""
    try:
        return set(await cache.keys_for(key_id))
    except lf.ApiError as error:
        return set() if (error.status, error.code) == UNAVAILABLE else {error.code}


@pytest.mark.parametrize(
    ("cache_control", "seconds"),
    [
        ("public, max-age=3600, must-revalidate, no-transform", 3600),
        ("max-age=60", 60),
        ("Max-Age=90, public", 90),
        ("s-maxage=5, max-age=70", 70),
    ],
)
async def test_keys_are_cached_for_max_age(
    cache_control: str, seconds: int, cache: lf.KeyCache, key_server: KeyServer, clock: Clock
) -> None:
    """Keys are fetched when they are first needed, and again when max-age is over."""
    key_server.cache_control = cache_control
    assert key_server.fetches == 0
    for ahead, fetches in ((0, 1), (seconds - 10, 1), (seconds, 2), (2 * seconds - 10, 2)):
        clock.ahead = ahead
        for _ in range(3):
            assert await keys_in(cache) == {"key-1"}
        assert key_server.fetches == fetches, ahead


async def test_rotated_keys_are_picked_up_at_once(
    cache: lf.KeyCache, key_server: KeyServer
) -> None:
    """A token with a key that is newer than the cache is checked with it, at once."""
    assert await keys_in(cache) == {"key-1"}
    key_server.certificates = {"key-1": certificate(1), "key-2": certificate(2)}
    assert await keys_in(cache) == {"key-1"}
    assert await keys_in(cache, "key-2") == {"key-1", "key-2"}
    key_server.certificates = {"key-2": certificate(2)}
    assert await keys_in(cache, "key-1") == {"key-1", "key-2"}
    assert key_server.fetches == 2


async def test_unknown_keys_are_looked_for_once_a_minute(
    cache: lf.KeyCache, key_server: KeyServer, clock: Clock
) -> None:
    """However many tokens name unknown keys: the keys are refetched at most once a minute."""
    await keys_in(cache)
    for ahead, fetches in ((0, 2), (50, 2), (60, 3), (110, 3), (121, 4)):
        clock.ahead = ahead
        await asyncio.gather(*(keys_in(cache, f"unknown-{n}") for n in range(20)))
        assert key_server.fetches == fetches, ahead
    key_server.instead = cast(Any, status(500, {}))
    for ahead, fetches in ((182, 5), (230, 5), (243, 6)):
        clock.ahead = ahead
        await asyncio.gather(*(keys_in(cache, f"unknown-{n}") for n in range(20)))
        assert await keys_in(cache) == {"key-1"}
        assert key_server.fetches == fetches, ahead


async def test_old_keys_serve_through_an_outage(
    cache: lf.KeyCache, key_server: KeyServer, clock: Clock
) -> None:
    """When a refetch fails the old keys serve on, until an hour after they have expired."""
    assert await keys_in(cache) == {"key-1"}
    key_server.instead = cast(Any, status(500, {}))
    for ahead, there in ((3600, True), (3610, True), (7190, True), (7200, False), (9000, False)):
        clock.ahead, fetches = ahead, key_server.fetches
        for _ in range(5):
            assert bool(await keys_in(cache)) is there
        assert key_server.fetches == fetches + 1  # it is asked again, but not by every caller
    key_server.instead = None
    clock.ahead = 9010
    assert await keys_in(cache) == {"key-1"}


@pytest.mark.parametrize(
    "published",
    [
        {},
        [],
        None,
        {"key-1": "junk"},
        {"key-1": 5},
        {"key-1": ""},
        {"key-1": certificate(0)},
        {"key-1": certificate(1).replace("M", "N")},
        {"error": {"code": 500}},
        status(500, {"key-1": certificate(1)}),
        status(404, {"key-1": certificate(1)}),
        reset,
    ],
)
async def test_no_keys_at_all(
    published: Any, cache: lf.KeyCache, key_server: KeyServer, clock: Clock
) -> None:
    """Without any key: 503 auth_keys_unavailable, and it is well as soon as there are keys."""
    if callable(published):
        key_server.instead = published
    good, key_server.certificates = key_server.certificates, published
    for _ in range(3):
        assert await keys_in(cache) == set()
    assert key_server.fetches == (2 if published is reset else 1)  # a GET is tried again
    key_server.certificates, key_server.instead = good, None
    clock.ahead = 10
    assert await keys_in(cache) == {"key-1"}


# ---------------------------------------------------------------------------------------------
# Admin: who may

MANAGED: Json = {
    **SHOP,
    "owners": ["olga", "Owner@Example.com"],
    "instructions": "Be kind.",
    "refusal": REFUSAL,
    "config": {"greeting": "Welcome!", "launcher": {"shape": "pill", "size": "lg"}},
}
FOREIGN: Json = {**OTHER, "owners": ["otto"]}
MANAGED_CONFIG: Json = {
    "layout": "floating",
    "primaryColor": "#a855f7",
    "greeting": "Welcome!",
    "position": "bottom-right",
    "launcher": {"hidden": False, "shape": "pill", "size": "lg", "icon": "chat", "glow": True},
    "nudge": {"enabled": False},
    "quickChips": [],
}
MANAGED_SITE: Json = {
    "id": "shop",
    "name": "Acme Shop",
    "allowedHosts": ["acme.com", "localhost"],
    "owners": ["olga", "Owner@Example.com"],
    "instructions": "Be kind.",
    "refusal": REFUSAL,
    "restrictions": [],
    "config": MANAGED_CONFIG,
    "usage": {"messagesToday": 0, "tokensToday": 0},
}
PEOPLE: dict[str, Json] = {
    "owner": {"sub": "olga"},
    "owner by mail": {"sub": "o1", "email": "OWNER@example.COM", "email_verified": True},
    "other owner": {"sub": "otto"},
    "admin": {"sub": "root"},
    "admin by mail": {"sub": "r1", "email": "boss@EXAMPLE.com", "email_verified": True},
    "stranger": {"sub": "eve"},
    "unverified owner": {"sub": "e1", "email": "owner@example.com", "email_verified": False},
    "unverified admin": {"sub": "e2", "email": "boss@example.com"},
    "half verified admin": {"sub": "e3", "email": "boss@example.com", "email_verified": "true"},
    "look-alike": {
        "sub": "OLGA",
        "email": "owner@example.com.evil.example",
        "email_verified": True,
    },
    "nameless": {"sub": "e4", "email": "", "email_verified": True},
}
STRANGERS = [name for name in PEOPLE if "owner" not in name.split() and "admin" not in name.split()]
STRANGERS += ["other owner", "unverified owner", "unverified admin", "half verified admin"]


@functools.cache
def bearer(who: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {make_token(PEOPLE[who])}"}


def office(key_server: KeyServer | None, **tables: Any) -> Json:
    """The tables of a server with an admin API; without a key server it has none."""
    firebase: Json = {"admins": ["root", "Boss@Example.com"]}
    if key_server is not None:
        firebase |= {"project_id": PROJECT, "keys_url": key_server.url}
    return {"sites": [MANAGED, FOREIGN], "firebase": firebase, **tables}


async def manage(
    server: Server, method: str, path: str = "", body: Any = None, who: str = "owner"
) -> Answer:
    """A request to /api/admin/sites<path>."""
    path = f"/api/admin/sites{path}"
    return await server.call(method, path, body, origin=None, headers=bearer(who))


async def details(server: Server, site_id: str = "shop") -> Json:
    answer = await manage(server, "GET", f"/{site_id}", who="admin")
    assert answer.status == 200, answer.raw
    return cast(Json, answer.body)


ADMIN_ROWS: list[tuple[str, str, Any]] = [
    ("GET", "", None),
    ("POST", "", {"name": "New", "host": "new.example"}),
    ("GET", "/shop", None),
    ("PATCH", "/shop", {"name": "New"}),
    ("PATCH", "/shop/config", {"greeting": "New"}),
    ("DELETE", "/shop", None),
    ("GET", "/shop/sessions", None),
    ("GET", "/shop/sessions/x", None),
]


async def test_no_project_no_admin(serve: Serve) -> None:
    """Without a project_id the admin API answers 503 admin_disabled, whoever asks."""
    server = await serve(**office(None))
    for method, path, body in ADMIN_ROWS:
        for headers in (bearer("admin"), {}):
            answer = await server.call(method, f"/api/admin/sites{path}", body, headers=headers)
            assert answer.error == (503, "admin_disabled")


async def test_no_keys_no_admin(serve: Serve, key_server: KeyServer, clock: Clock) -> None:
    """Without keys the admin API answers 503 auth_keys_unavailable, but 401 to what is no token."""
    key_server.instead = cast(Any, status(500, {}))
    server = await serve(**office(key_server))
    for method, path, body in ADMIN_ROWS:
        assert (await manage(server, method, path, body)).error == UNAVAILABLE
        answer = await server.call(method, f"/api/admin/sites{path}", body)
        assert answer.error == (401, "unauthorized")
    key_server.instead = None
    clock.ahead = 10
    assert (await manage(server, "GET")).status == 200


async def test_one_fetch_for_many_first_requests(serve: Serve, key_server: KeyServer) -> None:
    """A hundred first requests at once fetch the keys once."""
    gate = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        await gate.wait()
        return web.json_response(key_server.certificates)

    key_server.instead = slow
    server = await serve(**office(key_server))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        crowd = Server(server.url, http)
        people = [*PEOPLE, *PEOPLE] * 5
        calls = [asyncio.create_task(manage(crowd, "GET", who=who)) for who in people]
        await until(lambda: key_server.fetches)
        await expect_waiting(crowd, calls[0])
        gate.set()
        answers = await asyncio.gather(*calls)
    assert len(answers) >= 100
    assert {answer.status for answer in answers} == {200}
    assert key_server.fetches == 1


def expect_unauthorized(answer: Answer, text: str = "The sign-in token is invalid.") -> None:
    assert answer.error == (401, "unauthorized"), answer.raw
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert answer.body["message"] == text
    assert answer.body["details"] == {}


async def test_bad_tokens_over_http(serve: Serve, key_server: KeyServer, clock: Clock) -> None:
    """Whatever is wrong with a token: 401 unauthorized, and no hint beyond expired or invalid."""
    clock.stopped_at = NOW
    server = await serve(**office(key_server))
    tokens = [make_token(claims) for claims in BAD_CLAIMS]
    key_server.certificates = {"key-1": certificate(1), "key-2": certificate(2)}
    tokens += [make_token({}, header, sign) for header, sign in BAD_HEADERS]
    assert len(tokens) > 100
    for token in tokens:
        headers = {"Authorization": f"Bearer {token}"}
        answer = await server.call("GET", "/api/admin/sites", headers=headers)
        expect_unauthorized(answer)
    for claims in EXPIRED_CLAIMS:
        headers = {"Authorization": f"Bearer {make_token(claims)}"}
        answer = await server.call("GET", "/api/admin/sites", headers=headers)
        expect_unauthorized(answer, "The sign-in token is expired.")
    assert key_server.fetches <= 2
    assert (await manage(server, "GET")).status == 200


async def test_junk_over_http(serve: Serve, key_server: KeyServer) -> None:
    """Junk in the place of a token, 8 KB and any bytes included, is 401 and never 500."""
    server = await serve(**office(key_server))
    token = make_token().encode()
    # HTTP itself refuses a control character, and takes spaces off the end.
    junk = [one for one in junk_tokens() if one not in ("\x7f", f"{make_token()} ")]
    lines = [b"Bearer " + one.encode("utf-8", "surrogatepass") for one in junk]
    lines += [b"Bearer " + one for one in (b"\xff.\x80.\xe9", b"\xc3\x28" * 9, token + b"\xff")]
    lines += [b"Bearer " + b"\xff" * 8192, b"", b"Bearer", b"Bearer\t" + token, token]
    lines += [b"Basic " + token, b"Token " + token, b"Bearer: " + token, b"Bearer=" + token]
    lines += [b"Bearer " + token + b"," + token, b"Bearer " + token + b", Bearer " + token]
    heads = [b"Authorization: " + line + b"\r\n" for line in lines]
    good = b"Authorization: Bearer " + token + b"\r\n"
    heads += [b"", good + good, good + b"authorization: Bearer x\r\n", good + heads[-1]]
    for head in heads:
        request = b"GET /api/admin/sites HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%b\r\n" % head
        code, answer, body = await raw_http(server.url, request)
        assert (code, body["error"]) == (401, "unauthorized"), head[:80]
        assert 'WWW-Authenticate: Bearer error="invalid_token"' in answer
        assert body["message"] == "The sign-in token is invalid."


async def test_scheme_in_any_case(serve: Serve, key_server: KeyServer) -> None:
    """The name of the scheme is not case-sensitive (RFC 9110, 11.1)."""
    server = await serve(**office(key_server))
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} {make_token()}"}
        assert (await server.call("GET", "/api/admin/sites", headers=headers)).status == 200


async def test_tokens_are_not_logged(
    serve: Serve, key_server: KeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither tokens nor who sent them are in the log."""
    server = await serve(**office(key_server))
    for who in ("owner by mail", "unverified owner"):
        await manage(server, "GET", "/shop", who=who)
    for token in (make_token({"exp": 0}), make_token({}, {"kid": "unknown"}), "junk.junk.junk"):
        await server.call("GET", "/api/admin/sites", headers={"Authorization": f"Bearer {token}"})
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "eyJ" not in logged
    assert "junk" not in logged
    assert "xample" not in logged


@pytest.mark.parametrize("who", STRANGERS)
async def test_strangers(who: str, serve: Serve, key_server: KeyServer) -> None:
    """Who is neither this site's owner nor an admin gets 403 forbidden, and cannot tell a site of
    others from none at all."""
    server = await serve(**office(key_server))
    visitor = await server.visitor()
    own = [{"id": "other", "name": "Other", "allowedHosts": ["other.example"]}]
    expected = {"sites": own if who == "other owner" else []}
    assert (await manage(server, "GET", who=who)).body == expected
    new = {"name": "New", "host": "new.example"}
    assert (await manage(server, "POST", "", new, who)).error == (403, "forbidden")
    assert (await manage(server, "POST", "", {}, who)).error == (403, "forbidden")
    before = await details(server)
    for method, path, body in [*ADMIN_ROWS[2:], ("PATCH", "/shop", {"name": 5})]:
        answers = [
            await manage(
                server, method, path.replace("shop", name).replace("x", visitor.id), body, who
            )
            for name in ("shop", "none", "a%20b", "SHOP")
        ]
        for answer in answers:
            assert answer.error == (403, "forbidden")
            assert answer.raw == answers[0].raw
            without_date = [{**a.headers, "Date": ""} for a in (answer, answers[0])]
            assert without_date[0] == without_date[1]
    assert await details(server) == before


@pytest.mark.parametrize("who", ["owner", "owner by mail", "admin", "admin by mail"])
async def test_owners_and_admins(who: str, serve: Serve, key_server: KeyServer) -> None:
    """Owners see and change their own sites, admins all of them and what does not exist."""
    server = await serve(**office(key_server))
    shop = {"id": "shop", "name": "Acme Shop", "allowedHosts": ["acme.com", "localhost"]}
    other = {"id": "other", "name": "Other", "allowedHosts": ["other.example"]}
    is_admin = who.startswith("admin")
    listed = await manage(server, "GET", who=who)
    assert listed.body == {"sites": [shop, other] if is_admin else [shop]}
    assert (await manage(server, "GET", "/shop", who=who)).body == MANAGED_SITE
    assert (await manage(server, "GET", "/other", who=who)).status == (200 if is_admin else 403)
    answer = await manage(server, "GET", "/none", who=who)
    assert answer.error == ((404, "not_found") if is_admin else (403, "forbidden"))
    answer = await manage(server, "PATCH", "/shop", {"instructions": who}, who)
    assert answer.body == {**MANAGED_SITE, "instructions": who}
    new = {"name": "New", "host": "new.example"}
    assert (await manage(server, "POST", "", new, who)).status == (201 if is_admin else 403)


async def test_owners_are_named_by_admins(serve: Serve, key_server: KeyServer) -> None:
    """Only admins may change owners; whoever is taken off the list is out at once."""
    server = await serve(**office(key_server))
    for body in ({"owners": ["olga", "eve"]}, {"owners": None}, {"name": "X", "owners": []}):
        answer = await manage(server, "PATCH", "/shop", body)
        assert answer.error == (403, "forbidden")
    assert await details(server) == MANAGED_SITE
    change = {"owners": ["eve", "New@Example.com"]}
    answer = await manage(server, "PATCH", "/shop", change, "admin")
    assert answer.body["owners"] == ["eve", "New@Example.com"]
    assert (await manage(server, "GET", "/shop", who="stranger")).status == 200
    assert (await manage(server, "GET", "/shop")).error == (403, "forbidden")
    assert (await manage(server, "GET")).body == {"sites": []}
    answer = await manage(server, "PATCH", "/shop", {"owners": None}, "admin")
    assert answer.body == MANAGED_SITE
    assert (await manage(server, "GET", "/shop")).status == 200


@pytest.mark.parametrize(("method", "path", "body"), ADMIN_ROWS)
async def test_admin_preflight(
    method: str, path: str, body: Any, serve: Serve, key_server: KeyServer
) -> None:
    """A browser may call the admin API from anywhere: its preflight needs no token and allows
    Authorization; the answers, 401 too, can be read."""
    server = await serve(**office(key_server))
    path = f"/api/admin/sites{path}"
    dashboard = "https://dashboard.example"
    headers = {
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = await server.call("OPTIONS", path, origin=dashboard, headers=headers)
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] in ("*", dashboard)
    assert method in answer.headers["Access-Control-Allow-Methods"]
    allowed = answer.headers["Access-Control-Allow-Headers"].lower()
    assert "authorization" in allowed
    assert "content-type" in allowed
    for more in (bearer("admin"), {}):
        answer = await server.call(method, path, body, origin=dashboard, headers=more)
        assert answer.headers["Access-Control-Allow-Origin"] in ("*", dashboard)
        assert (answer.status == 401) == (more == {})


async def test_admin_methods(serve: Serve, key_server: KeyServer) -> None:
    """Other methods and paths are refused in the one shape of all errors."""
    server = await serve(**office(key_server))
    for method, path, error in (
        ("PUT", "/shop", (405, "method_not_allowed")),
        ("DELETE", "", (405, "method_not_allowed")),
        ("POST", "/shop/config", (405, "method_not_allowed")),
        ("GET", "/shop/nothing", (404, "not_found")),
    ):
        assert (await manage(server, method, path)).error == error
    for body in (b"[]", b"5", b"{", b"", b'{"name": NaN}'):
        for method, path in (("POST", ""), ("PATCH", "/shop"), ("PATCH", "/shop/config")):
            answer = await server.call(
                method, f"/api/admin/sites{path}", data=body, headers=bearer("admin")
            )
            assert answer.error == (400, "invalid_message")


# ---------------------------------------------------------------------------------------------
# Admin: changes


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # RFC 7396, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch(target: Any, patch: Any, result: Any) -> None:
    """Merge patches are those of RFC 7396, and change nothing in place."""
    before = json.dumps([target, patch])
    assert lf.merge_patch(target, patch) == result
    assert json.dumps([target, patch]) == before


CHANGES: list[tuple[str, Json, Json]] = [  # below /shop, the patch, what is different then
    ("", {}, {}),
    ("", {"name": "New"}, {"name": "New"}),
    ("", {"name": "x" * 80, "instructions": ""}, {"name": "x" * 80, "instructions": ""}),
    ("", {"instructions": "Be short."}, {"instructions": "Be short."}),
    ("", {"refusal": "No."}, {"refusal": "No."}),
    ("", {"restrictions": ["submit", "type"]}, {"restrictions": ["submit", "type"]}),
    (
        "",
        {"allowedHosts": ["New.Example.", "[2001:DB8::0:1]:80", "bücher.example"]},
        {"allowedHosts": ["new.example", "[2001:db8::1]:80", "xn--bcher-kva.example"]},
    ),
    ("", {"allowedHosts": []}, {"allowedHosts": []}),
    ("", {"name": None, "instructions": None, "allowedHosts": None}, {}),
    ("/config", {}, {}),
    ("/config", {"greeting": "New"}, {"config": {**MANAGED_CONFIG, "greeting": "New"}}),
    (
        "/config",
        {"greeting": ""},
        {"config": {**MANAGED_CONFIG, "greeting": "Hi! How can I help?"}},
    ),
    (
        "/config",
        {"launcher": {"size": "sm", "offsetX": 12.5}, "quickChips": [{"text": "Hi"}]},
        {
            "config": {
                **MANAGED_CONFIG,
                "launcher": {**MANAGED_CONFIG["launcher"], "size": "sm", "offsetX": 12.5},
                "quickChips": [{"text": "Hi"}],
            }
        },
    ),
    ("/config", {"launcher": {}, "nudge": None, "greeting": None}, {}),
]


@pytest.mark.parametrize(("path", "patch", "different"), CHANGES)
async def test_patch(
    path: str, patch: Json, different: Json, serve: Serve, key_server: KeyServer
) -> None:
    """A merge patch changes what it names and nothing else; the answer is the whole site."""
    server = await serve(**office(key_server))
    answer = await manage(server, "PATCH", f"/shop{path}", patch)
    assert answer.status == 200, answer.raw
    assert answer.body == {**MANAGED_SITE, **different}
    assert (await manage(server, "GET", "/shop")).body == answer.body
    assert (await details(server, "other"))["config"]["greeting"] == "Hi! How can I help?"
    everything = dict.fromkeys(patch)
    answer = await manage(server, "PATCH", f"/shop{path}", everything)
    assert answer.body == MANAGED_SITE


async def test_null_takes_back_to_the_file(serve: Serve, key_server: KeyServer) -> None:
    """Patches add up; null takes a field back to the file's value, deep in the config too."""
    server = await serve(**office(key_server))
    for patch, launcher in (
        ({"launcher": {"shape": "circle", "size": "sm"}}, ("circle", "sm", True)),
        ({"launcher": {"glow": False}}, ("circle", "sm", False)),
        ({"launcher": {"shape": None}}, ("pill", "sm", False)),
        ({"launcher": {"size": "md", "glow": None}}, ("pill", "md", True)),
        ({"launcher": None}, ("pill", "lg", True)),
        ({"launcher": {"size": "sm"}, "greeting": "New"}, ("pill", "sm", True)),
        ({"launcher": {"size": None, "shape": None, "icon": None}}, ("pill", "lg", True)),
    ):
        answer = await manage(server, "PATCH", "/shop/config", patch)
        assert answer.status == 200, answer.raw
        found = answer.body["config"]["launcher"]
        assert (found["shape"], found["size"], found["glow"]) == launcher, patch
    assert answer.body["config"] == {**MANAGED_CONFIG, "greeting": "New"}
    await manage(server, "PATCH", "/shop", {"name": "New", "refusal": "New"})
    answer = await manage(server, "PATCH", "/shop", {"name": None, "restrictions": None})
    assert (answer.body["name"], answer.body["refusal"]) == ("Acme Shop", "New")


BAD_CHANGES: list[tuple[str, Json, set[str]]] = [  # the patch, the fields that are wrong in it
    ("", {"name": ""}, {"name"}),
    ("", {"name": 5, "instructions": "good"}, {"name"}),
    ("", {"name": "x" * 81, "instructions": 5, "refusal": "good"}, {"name", "instructions"}),
    ("", {"refusal": ""}, {"refusal"}),
    ("", {"refusal": "x" * 501}, {"refusal"}),
    ("", {"restrictions": ["fly"]}, {"restrictions"}),
    ("", {"restrictions": "type"}, {"restrictions"}),
    ("", {"owners": "olga"}, {"owners"}),
    ("", {"owners": [""]}, {"owners"}),
    ("", {"nonsense": 1}, {"nonsense"}),
    ("", {"nonsense": None}, {"nonsense"}),
    ("", {"id": "other"}, {"id"}),
    ("", {"knowledge": ["/etc/passwd"]}, {"knowledge"}),
    ("", {"config": {"greeting": "x"}}, {"config"}),
    ("", {"allowed_hosts": ["x.example"]}, {"allowed_hosts"}),
    ("", {"usage": {"messagesToday": 0}}, {"usage"}),
    *(
        ("", {"allowedHosts": ["good.example", host]}, {"allowedHosts"})
        for host in ("com", "co.uk", "github.io", "*.acme.com", "https://x.example", "x.example/a")
    ),
    *(
        ("", {"allowedHosts": hosts}, {"allowedHosts"})
        for hosts in ([""], [5], "x.example", [None], ["x.example:0"], ["user@x.example"], 5)
    ),
    ("/config", {"greeting": 5}, {"greeting"}),
    ("/config", {"greeting": "x" * 241, "layout": "floating"}, {"greeting"}),
    ("/config", {"layout": "round", "primaryColor": "url(x)"}, {"layout", "primaryColor"}),
    ("/config", {"launcher": {"size": "xl", "glow": 1}}, {"launcher.size", "launcher.glow"}),
    ("/config", {"launcher": {"nonsense": 1}}, {"launcher.nonsense"}),
    ("/config", {"launcher": "pill"}, {"launcher"}),
    ("/config", {"logoUrl": "javascript:alert(1)"}, {"logoUrl"}),
    ("/config", {"typography": {"bodyFont": "x;}"}}, {"typography.bodyFont"}),
    ("/config", {"quickChips": [{"text": "x" * 31}]}, {"quickChips"}),
    ("/config", {"quickChips": [{"text": "x"}] * 6}, {"quickChips"}),
    ("/config", {"quickChips": [None]}, {"quickChips"}),
    ("/config", {"nonsense": None}, {"nonsense"}),
    ("/config", {"name": "New"}, {"name"}),
]


@pytest.mark.parametrize(("path", "patch", "wrong"), BAD_CHANGES)
async def test_bad_patch(
    path: str, patch: Json, wrong: set[str], serve: Serve, key_server: KeyServer, tmp_path: Path
) -> None:
    """A patch is validated whole: any bad field is 400 invalid_config with what is wrong with each
    of them, and nothing is saved."""
    server = await serve(**office(key_server, server=on_disk(tmp_path)))
    answer = await manage(server, "PATCH", f"/shop{path}", patch, "admin")
    assert answer.error == (400, "invalid_config")
    errors = answer.body["details"]["errors"]
    assert errors.keys() == wrong
    assert all(isinstance(text, str) and text for text in errors.values())
    assert await details(server) == MANAGED_SITE
    assert query(tmp_path, "SELECT * FROM site") == []


async def test_changes_hold_at_once(serve: Serve, model: FakeModel, key_server: KeyServer) -> None:
    """Changes hold at once, for running sessions too: the widget's config, what the model is told,
    and what it may do."""
    server = await serve(model, **office(key_server))
    visitor = await server.visitor()
    navigate = doing("", type="navigate", url="/prices")
    model.scripts.append(navigate)
    await visitor.chat(pageContext=SHOWN)
    assert (await visitor.next())["event"] == "action_plan"
    assert "Be kind." in model.prompt()
    change = {"instructions": "Be terse.", "name": "Renamed", "restrictions": ["navigate"]}
    assert (await manage(server, "PATCH", "/shop", change)).status == 200
    await manage(server, "PATCH", "/shop/config", {"greeting": "New"})
    assert (await visitor.get()).body["siteConfig"]["greeting"] == "New"
    assert (await server.init()).body["siteConfig"]["greeting"] == "New"
    model.scripts.extend([navigate] * 3)
    assert (await visitor.ask())["data"]["text"] == lf.NOT_POSSIBLE
    assert "Be terse." in model.prompt()
    assert "Renamed" in model.prompt()
    assert "Be kind." not in model.prompt()
    await manage(server, "PATCH", "/shop", {"restrictions": None})
    model.scripts.append(navigate)
    await visitor.chat()
    assert (await visitor.next())["event"] == "action_plan"


async def test_refusal_and_counts_hold_at_once(
    serve: Serve, model: FakeModel, key_server: KeyServer
) -> None:
    """Owners see what is used, and visitors the refusal that the owner has just written."""
    server = await serve(model, **office(key_server, limits={"site_messages_per_day": 2}))
    visitor = await server.visitor()
    for number in range(2):
        model.scripts.append(using(100 + number))
        await visitor.ask()
    answer = await manage(server, "GET", "/shop")
    assert answer.body["usage"] == {"messagesToday": 2, "tokensToday": 201}
    assert (await details(server, "other"))["usage"] == {"messagesToday": 0, "tokensToday": 0}
    assert (await visitor.post()).body["message"] == REFUSAL
    await manage(server, "PATCH", "/shop", {"refusal": "Come back later."})
    assert (await visitor.post()).body["message"] == "Come back later."
    assert (await visitor.post()).error == BUDGET_SPENT


async def test_allowed_hosts_hold_at_once(serve: Serve, key_server: KeyServer) -> None:
    """An origin is accepted, or no longer accepted, as soon as allowedHosts says so."""
    server = await serve(**office(key_server))
    visitor = await server.visitor()
    new = "https://new.example"
    assert (await server.init(origin=new)).error == (403, "host_not_registered")
    hosts = ["new.example", "acme.com:8443"]
    assert (await manage(server, "PATCH", "/shop", {"allowedHosts": hosts})).status == 200
    assert (await server.init(origin=new)).status == 200
    assert (await server.init(origin=f"{ORIGIN}:8443")).status == 200
    assert (await server.init()).error == (403, "host_not_registered")
    assert (await visitor.get()).error == (403, "host_not_registered")
    assert (await visitor.post()).error == (403, "host_not_registered")
    with pytest.raises(aiohttp.WSServerHandshakeError):
        await server.socket(f"/?sessionId={visitor.id}")
    visitor.origin = new  # the session is still its site's
    assert (await visitor.get()).status == 200
    await manage(server, "PATCH", "/shop", {"allowedHosts": None})
    assert (await server.init()).status == 200
    assert (await server.init(origin=new)).error == (403, "host_not_registered")


async def test_hosts_of_others(serve: Serve, key_server: KeyServer) -> None:
    """A host that another site has is refused with 409 host_taken, until it is free."""
    server = await serve(**office(key_server))
    taken = (409, "host_taken")
    for hosts in (["other.example"], ["x.example", "OTHER.example."]):
        answer = await manage(server, "PATCH", "/shop", {"allowedHosts": hosts, "name": "New"})
        assert answer.error == taken
    for host in ("other.example", "www.acme.com", "acme.com", "localhost"):
        answer = await manage(server, "POST", "", {"name": "New", "host": host}, "admin")
        assert answer.error == taken
    assert await details(server) == MANAGED_SITE
    assert (await server.init(origin="https://x.example")).status == 403
    moved = {"allowedHosts": ["acme.com"]}
    assert (await manage(server, "PATCH", "/shop", moved)).status == 200
    answer = await manage(server, "PATCH", "/other", {"allowedHosts": ["localhost"]}, "other owner")
    assert answer.status == 200
    # Back to the file's value is no way around it.
    assert (await manage(server, "PATCH", "/shop", {"allowedHosts": None})).error == taken
    assert (await manage(server, "PATCH", "/shop", {"name": "New"})).status == 200
    subdomain = {"allowedHosts": ["acme.com", "shop.other.example"]}
    assert (await manage(server, "PATCH", "/shop", subdomain)).status == 200


async def test_changes_are_kept(key_server: KeyServer, tmp_path: Path) -> None:
    """Changes are on disk when they are answered, and hold after a restart, kill -9 or not."""
    config = make_config(**office(key_server, server=on_disk(tmp_path / "one")))
    changes: Json = {"name": "New", "owners": ["eve"], "allowedHosts": ["new.example"]}
    async with running(config) as server:
        await manage(server, "PATCH", "/shop", changes, "admin")
        await manage(server, "PATCH", "/shop/config", {"launcher": {"size": "sm"}}, "admin")
        snapshot(tmp_path / "one", tmp_path / "two")
        await manage(server, "PATCH", "/shop", {"name": None}, "admin")
        snapshot(tmp_path / "one", tmp_path / "three")
    for folder, name in (("one", "Acme Shop"), ("two", "New"), ("three", "Acme Shop")):
        config = make_config(**office(key_server, server=on_disk(tmp_path / folder)))
        async with running(config) as server:
            launcher = {**MANAGED_CONFIG["launcher"], "size": "sm"}
            new_config = {**MANAGED_CONFIG, "launcher": launcher}
            expected = {**MANAGED_SITE, **changes, "name": name, "config": new_config}
            assert await details(server) == expected
            assert (await server.init(origin="https://new.example")).status == 200
            assert (await server.init()).status == 403
            assert (await manage(server, "GET", "/shop", who="stranger")).status == 200


async def test_edits_of_the_file(key_server: KeyServer, tmp_path: Path) -> None:
    """An edit of config.toml reaches every field that no patch covers, and only those."""
    tables = office(key_server, server=on_disk(tmp_path))
    async with running(make_config(**tables)) as server:
        await manage(server, "PATCH", "/shop", {"instructions": "Patched"})
        patch = {"greeting": "Patched", "launcher": {"size": "sm"}}
        await manage(server, "PATCH", "/shop/config", patch)
    edited = {
        **MANAGED,
        "name": "Edited",
        "instructions": "Edited",
        "allowed_hosts": ["edited.example"],
        "config": {
            "greeting": "Edited",
            "primaryColor": "red",
            "launcher": {"shape": "squircle", "size": "md"},
        },
    }
    tables["sites"] = [edited, FOREIGN]
    async with running(make_config(**tables)) as server:
        site = await details(server)
        assert (site["name"], site["instructions"]) == ("Edited", "Patched")
        assert site["allowedHosts"] == ["edited.example"]
        assert (site["config"]["greeting"], site["config"]["primaryColor"]) == ("Patched", "red")
        launcher = site["config"]["launcher"]
        assert (launcher["shape"], launcher["size"]) == ("squircle", "sm")
        answer = await manage(server, "PATCH", "/shop/config", {"greeting": None, "launcher": None})
        assert answer.body["config"]["greeting"] == "Edited"
        assert answer.body["config"]["launcher"]["size"] == "md"
    tables["sites"] = [FOREIGN]  # a site that is taken out of the file is gone
    async with running(make_config(**tables)) as server:
        answer = await manage(server, "GET", "/shop", who="admin")
        assert answer.error == (404, "not_found")


# ---------------------------------------------------------------------------------------------
# Admin: sites made through the API


@pytest.mark.parametrize(
    ("host", "allowed_hosts"),
    [
        ("new.example", ["new.example", "www.new.example"]),
        ("www.new.example", ["www.new.example", "new.example"]),
        ("WWW.New.Example.", ["www.new.example", "new.example"]),
        ("shop.new.co.uk", ["shop.new.co.uk", "www.shop.new.co.uk"]),
        ("new.example:8443", ["new.example:8443", "www.new.example:8443"]),
        ("bücher.example", ["xn--bcher-kva.example", "www.xn--bcher-kva.example"]),
        ("10.0.0.1", ["10.0.0.1"]),
        ("[2001:DB8::1]:80", ["[2001:db8::1]:80"]),
        ("me.github.io", ["me.github.io", "www.me.github.io"]),
    ],
)
async def test_made_sites_get_both_forms(
    host: str, allowed_hosts: list[str], serve: Serve, key_server: KeyServer
) -> None:
    """A site made for acme.com or www.acme.com gets both forms, and serves at once."""
    server = await serve(**office(key_server))
    answer = await manage(server, "POST", "", {"name": "New", "host": host}, "admin")
    assert answer.status == 201
    site_id = answer.body["id"]
    assert sorted(answer.body.pop("allowedHosts")) == sorted(allowed_hosts)
    assert answer.body == {
        "id": site_id,
        "name": "New",
        "owners": [],
        "instructions": "",
        "refusal": lf.Site().refusal,
        "restrictions": [],
        "config": lf.SITE_CONFIG_DEFAULTS,
        "usage": {"messagesToday": 0, "tokensToday": 0},
    }
    for entry in allowed_hosts:
        assert (await server.init(origin=f"https://{entry}")).status == 200
    listed = (await manage(server, "GET", who="admin")).body["sites"]
    assert [site["id"] for site in listed] == ["shop", "other", site_id]


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, {"name", "host"}),
        ({"name": "New"}, {"host"}),
        ({"host": "new.example"}, {"name"}),
        ({"name": "", "host": "new.example"}, {"name"}),
        ({"name": "x" * 81, "host": 5}, {"name", "host"}),
        ({"name": None, "host": None}, {"name", "host"}),
        ({"name": "New", "host": "new.example", "id": "x"}, {"id"}),
        ({"name": "New", "host": "new.example", "owners": []}, {"owners"}),
        *(
            ({"name": "New", "host": host}, {"host"})
            for host in (
                "com",
                "co.uk",
                "www.co.uk",
                "www.github.io",
                "https://x.example",
                "",
                "a b",
            )
        ),
        *(
            ({"name": "New", "host": host}, {"host"})
            for host in (
                "*.x.example",
                "x.example/a",
                "\uff58.example",
                "1.2.3",
                "x..example",
                ["x.example"],
            )
        ),
    ],
)
async def test_sites_that_cannot_be_made(
    body: Json, wrong: set[str], serve: Serve, key_server: KeyServer
) -> None:
    """A site without a name, or for a host that is none or shared by many, is not made."""
    server = await serve(**office(key_server))
    answer = await manage(server, "POST", "", body, "admin")
    assert answer.error == (400, "invalid_config")
    assert answer.body["details"]["errors"].keys() == wrong
    assert len(server.hub.sites) == 2


async def test_made_sites_are_kept_and_changed(key_server: KeyServer, tmp_path: Path) -> None:
    """A made site is changed like any other, has an id of its own, and survives a restart."""
    config = make_config(**office(key_server, server=on_disk(tmp_path)))
    async with running(config) as server:
        ids = set()
        for host in ("new.example", "new-example.com", "new.example:81"):
            answer = await manage(server, "POST", "", {"name": "New", "host": host}, "admin")
            assert answer.status == 201, answer.raw
            ids.add(answer.body["id"])
        assert len(ids | {"shop", "other"}) == 5
        site_id = next(
            s.id for s in server.hub.sites.values() if ("new.example", None) in s.allowed_hosts
        )
        change = {"owners": ["eve"], "name": "Eve's"}
        assert (await manage(server, "PATCH", f"/{site_id}", change, "admin")).status == 200
        path = f"/{site_id}/config"
        answer = await manage(server, "PATCH", path, {"layout": "side-panel"}, "stranger")
        before = answer.body
        assert (before["name"], before["config"]["layout"]) == ("Eve's", "side-panel")
        visitor = await server.visitor("https://www.new.example")
        await visitor.ask()
    async with running(config) as visitor.server:
        assert {*visitor.server.hub.sites} == {"shop", "other", *ids}
        assert (await visitor.get()).body["messageCount"] == 2
        after = (await manage(visitor.server, "GET", f"/{site_id}", who="stranger")).body
        usage = {"messagesToday": 1, "tokensToday": 0}
        assert after == {**before, "usage": usage}
        null = {"name": None, "owners": None}
        answer = await manage(visitor.server, "PATCH", f"/{site_id}", null, "admin")
        assert (answer.body["name"], answer.body["owners"]) == ("New", [])


async def test_deleted_sites(key_server: KeyServer, model: FakeModel, tmp_path: Path) -> None:
    """DELETE removes a made site, its sessions and its changes, at once and for good."""
    config = make_config(model, **office(key_server, server=on_disk(tmp_path)))
    new = {"name": "New", "host": "new.example"}
    async with running(config) as server:
        site_id = (await manage(server, "POST", "", new, "admin")).body["id"]
        change = {"owners": ["olga"], "instructions": "Changed"}
        await manage(server, "PATCH", f"/{site_id}", change, "admin")
        await manage(server, "PATCH", f"/{site_id}/config", {"greeting": "Changed"})
        visitor, staying = await server.visitor("https://new.example"), await server.visitor()
        await visitor.ask("SECRET")
        await staying.ask("STAYING")
        model.scripts.append([sse(chunk("SECRET")), forever])
        await visitor.chat("SECRET again")
        await visitor.next()
        closing = asyncio.create_task(read_close(visitor.ws))
        answer = await manage(server, "DELETE", f"/{site_id}")
        assert (answer.status, answer.body) == (200, {"deleted": True})
        assert traces(tmp_path, "SECRET", visitor.id) == []
        assert await closing == (["session_not_found"], 4404)
        await until(lambda: model.hung_up)
        assert (await visitor.get()).error == (403, "host_not_registered")
        assert (await manage(server, "GET", f"/{site_id}", who="admin")).status == 404
        assert (await manage(server, "GET", f"/{site_id}")).error == (403, "forbidden")
        assert query(tmp_path, "SELECT id FROM site") == []
        assert [*server.hub.sessions] == [staying.id]
    async with running(config) as server:
        assert {*server.hub.sites} == {"shop", "other"}
        answer = await manage(server, "POST", "", new, "admin")
        assert (answer.body["id"], answer.body["instructions"]) == (site_id, "")
        assert answer.body["config"] == lf.SITE_CONFIG_DEFAULTS
        visitor.server = server
        assert (await visitor.get()).error == (404, "session_not_found")


async def test_sites_of_the_file_are_not_deleted(serve: Serve, key_server: KeyServer) -> None:
    """DELETE of a site that config.toml defines is 409, and changes nothing."""
    server = await serve(**office(key_server))
    visitor = await server.visitor()
    await manage(server, "PATCH", "/shop", {"name": "New"})
    for who in ("owner", "admin"):
        assert (await manage(server, "DELETE", "/shop", who=who)).status == 409
    assert await details(server) == {**MANAGED_SITE, "name": "New"}
    assert (await visitor.get()).status == 200


# ---------------------------------------------------------------------------------------------
# Admin: sessions


async def test_sessions_of_a_site(
    serve: Serve, model: FakeModel, key_server: KeyServer, clock: Clock
) -> None:
    """Owners see the live sessions of their site, newest first."""
    server = await serve(model, **office(key_server))
    origin = clock.stopped_at = float(NOW)
    visitors = []
    for number in range(4):
        clock.stopped_at = origin + number
        body = {"pageUrl": f"{ORIGIN}/{number}"}
        answer = await server.call("POST", "/api/session/init", body)
        visitors.append(Visitor(server, answer.body["sessionId"]))
    foreign = await server.visitor("https://other.example")
    await visitors[1].connect()
    await visitors[1].ask()
    server.age(visitors[0], 3600)
    server.age(visitors[2], 60)
    listed = (await manage(server, "GET", "/shop/sessions")).body
    assert listed.keys() == {"sessions"}
    ids = [session["sessionId"] for session in listed["sessions"]]
    assert ids == [visitor.id for visitor in visitors[:0:-1]]
    for session, number in zip(listed["sessions"], (3, 2, 1), strict=True):
        created = datetime.fromtimestamp(origin + number, UTC)
        assert datetime.fromisoformat(session.pop("createdAt")) == created
        active = datetime.fromisoformat(session.pop("lastActivity")).timestamp()
        assert abs(active - (origin + 3 - 60 * (number == 2))) < PATIENCE_SECONDS
        count = 2 if number == 1 else 0
        expected = {"messageCount": count, "pageUrl": f"{ORIGIN}/{number}"}
        assert session == {"sessionId": visitors[number].id, **expected}
    listed = (await manage(server, "GET", "/other/sessions", who="other owner")).body
    assert [session["sessionId"] for session in listed["sessions"]] == [foreign.id]


async def test_limit_of_the_list(serve: Serve, key_server: KeyServer) -> None:
    """?limit= says how many sessions are listed, at most 200."""
    server = await serve(**office(key_server, limits={"init_per_minute": 10_000}))
    ids = [(await server.init()).body["sessionId"] for _ in range(210)]
    for query_string, count in (("?limit=1", 1), ("?limit=200", 200), ("?limit=17", 17)):
        answer = await manage(server, "GET", f"/shop/sessions{query_string}")
        found = [session["sessionId"] for session in answer.body["sessions"]]
        assert found == ids[: -count - 1 : -1]
    assert 1 <= len((await manage(server, "GET", "/shop/sessions")).body["sessions"]) <= 200
    for limit in ("0", "201", "-1", "x", "1.5", "", "9" * 30, "%D9%A1"):
        answer = await manage(server, "GET", f"/shop/sessions?limit={limit}")
        assert answer.error == (400, "invalid_message")


async def test_session_of_a_site(serve: Serve, model: FakeModel, key_server: KeyServer) -> None:
    """Owners read a session's history; one of another site does not exist for them."""
    server = await serve(model, **office(key_server))
    visitor, foreign = await server.visitor(), await server.visitor("https://other.example")
    model.scripts.append(reply("The reply"))
    await visitor.ask("The question")
    before = server.hub.sessions[visitor.id].last_active
    answer = await manage(server, "GET", f"/shop/sessions/{visitor.id}")
    listed = (await manage(server, "GET", "/shop/sessions")).body["sessions"][0]
    assert answer.body.keys() == {*listed, "history"}
    assert {**answer.body, "lastActivity": ""} == {
        **listed,
        "lastActivity": "",
        "history": [
            {"role": "user", "content": "The question"},
            {"role": "assistant", "content": "The reply"},
        ],
    }
    assert server.hub.sessions[visitor.id].last_active == before  # a look is no activity
    for session_id in (foreign.id, "none", f"{visitor.id}0"):
        answer = await manage(server, "GET", f"/shop/sessions/{session_id}")
        assert answer.error == (404, "session_not_found")
    server.age(visitor, 3600)
    answer = await manage(server, "GET", f"/shop/sessions/{visitor.id}")
    assert answer.error == (404, "session_not_found")
