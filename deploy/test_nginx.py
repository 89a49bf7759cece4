"""Real nginx with the project's own site file, in front of real servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import doctor
import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port
from cryptography.hazmat.primitives import serialization
from multidict import CIMultiDict

import leflux_server as lf

from conftest import (  # isort: skip
    UUID, FakeModel, Json, KeyServer, Patch, Serve, Server, Visitor, bearer, certificate, chunk,
    listening, make_config, needs, office, private_key, program, read_close, run_tool, sse,
    until,
)  # fmt: skip

NGINX_SITE = lf.HERE / "deploy" / "leflux.nginx.conf"


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def nginx_conf(folder: Path, changes: Mapping[str, str]) -> str:
    """A small nginx.conf around the project's site file, in which each of changes is made."""
    site = NGINX_SITE.read_text()
    for original, value in changes.items():
        assert original in site, original
        site = site.replace(original, value)
    temporary = "client_body proxy fastcgi uwsgi scgi".split()
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in temporary)
    user = "user root;" if os.geteuid() == 0 else ""  # who alone may enter the folder
    return f"""
        {user} daemon off; worker_processes 2; pid {folder}/nginx.pid; events {{ }}
        http {{ access_log {folder}/access.log; {paths} {site} }}
    """


@dataclasses.dataclass
class Nginx:
    """nginx as it runs in front of servers."""

    folder: Path
    port: int
    http_port: int

    def visitors(self, address: str = "127.0.0.1") -> Server:
        """The server as clients at an address see it, through nginx and TLS."""
        seen = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate(1))).digest()
        url = f"https://127.0.0.1:{self.port}"
        return Server(url, ssl=aiohttp.Fingerprint(seen), local_addr=(address, 0))

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))


@contextlib.asynccontextmanager
async def nginx(folder: Path, *servers: Server, **changes: str) -> AsyncIterator[Nginx]:
    """Run nginx with the project's site file before servers, on free ports."""
    proxy = Nginx(folder, unused_port(), unused_port())
    (folder / "fullchain.pem").write_text(certificate(1))
    unencrypted = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key = private_key(1).private_bytes(serialization.Encoding.PEM, *unencrypted)
    (folder / "privkey.pem").write_bytes(key)
    conf = nginx_conf(
        folder,
        {
            "listen 80;": f"listen 127.0.0.1:{proxy.http_port};",
            "listen 443 ssl;": f"listen 127.0.0.1:{proxy.port} ssl;",
            "listen [::]:80;": "",
            "listen [::]:443 ssl;": "",
            "/etc/letsencrypt/live/chat.example.com/": f"{folder}/",
            "/var/log/nginx/error.log": f"{folder}/error.log",
            "/var/www/html": f"{folder}/www",
            **{
                f"{'# ' if number else ''}server 127.0.0.1:{3002 + number} ": f"server {host} "
                for number, host in enumerate(s.url.removeprefix("http://") for s in servers)
            },
            **changes,
        },
    )
    (folder / "nginx.conf").write_text(conf)
    command = (needs("nginx"), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf")
    code, said = await run_tool(*command, "-t")
    assert code == 0, said
    assert said.count("\n") == 2, said  # the syntax is ok, the test is successful
    child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        await until(lambda: listens(proxy.port) or child.returncode is not None)
        yield proxy
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()


@pytest.mark.parametrize("instances", [1, 3])
async def test_visit_through_nginx(
    instances: int, serve: Serve, model: FakeModel, tmp_path: Path
) -> None:
    """A visitor gets a session, a socket over TLS, and each chunk when the model says it."""
    servers = [await serve(model) for _ in range(instances)]
    async with nginx(tmp_path, *servers) as proxy, proxy.visitors() as site:
        answer = await site.init()
        assert answer.body["wsUrl"] == site.url.replace("https", "wss")
        assert answer.headers["Access-Control-Allow-Origin"]
        visitor = Visitor(site, answer.body["sessionId"])
        for path in ("/", "/ws"):
            visitor.ws = await site.socket(f"{path}?sessionId={visitor.id}")
            assert (await visitor.next())["event"] == "session_joined"
        words = ["One", " two", " three"]
        model.scripts.append([step for word in words for step in (sse(chunk(word)), model.at_gate)])
        await visitor.chat()
        for word in words:
            assert (await visitor.next())["data"]["delta"] == word
            model.gate.release()
        assert (await visitor.turn())[-1]["data"]["text"] == "One two three"
        assert await visitor.history() == [("user", "Hello"), ("assistant", "One two three")]
        assert sum(len(server.app.sessions) for server in servers) == 1
    assert visitor.id not in proxy.logs()


async def test_requests_through_nginx(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What nginx answers by itself, what it compresses, and how much it takes."""
    challenge = tmp_path / "www" / ".well-known" / "acme-challenge"
    challenge.mkdir(parents=True)
    (challenge / "token").write_text("proof")
    async with nginx(tmp_path, await serve()) as proxy, proxy.visitors() as site:
        # http leads to https, but for the files with which certbot proves that the domain is ours.
        url = f"http://127.0.0.1:{proxy.http_port}"
        async with site.http.get(f"{url}/.well-known/acme-challenge/token") as response:
            assert await response.text() == "proof"
        async with site.http.get(f"{url}/path?query", allow_redirects=False) as response:
            moved = (response.status, response.headers["Location"])
            assert moved == (301, "https://127.0.0.1/path?query")

        # The doctor takes the 400 of nginx to http:// at its TLS port for what it is.
        address = f"127.0.0.1:{proxy.port}"
        assert await doctor.run_doctor(make_config(), f"http://{address}") == 1
        said = f"FAIL  http://{address}: it speaks https, not http. Use https://{address}\n"
        assert said in capsys.readouterr().out

        # /embed.js is compressed, and a browser that has it is told so; nothing else is.
        zipped = {"Accept-Encoding": "gzip"}
        answer = await site.call("GET", "/embed.js", headers=zipped)
        cached = {"Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
        assert {"Content-Encoding": "gzip", **cached}.items() <= dict(answer.headers).items()
        assert answer.raw == (lf.HERE / "widget" / "embed.js").read_bytes()
        known = {**zipped, "If-None-Match": answer.headers["ETag"]}
        assert (await site.call("GET", "/embed.js", headers=known)).status == 304
        answer = await site.call("GET", "/api/stats", headers=zipped)
        assert "Content-Encoding" not in answer.headers

        # The server's own 413 reaches its client; what is far too large ends at nginx.
        answer = await site.call("POST", "/api/chat", data=b" " * (lf.MAX_BODY_BYTES + 1))
        assert answer.error == (413, "payload_too_large")
        assert answer.headers["Access-Control-Allow-Origin"]
        async with site.http.post(f"{site.url}/api/chat", data=b" " * 600 * 1024) as response:
            assert response.status == 413
        assert (await site.init()).status == 200


@pytest.fixture
async def mirror() -> AsyncIterator[Server]:
    """A server that answers with the headers it was sent."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response([*request.headers.items()])

    async with listening(answer) as url:
        yield Server(url.replace("localhost", "127.0.0.1"))


async def test_headers_through_nginx(mirror: Server, tmp_path: Path) -> None:
    """What the server is told of a client is nginx's own word, whatever the client says; only
    where the socket is, and only to a WebSocket, may a client upgrade."""
    host = "chat.example.com:8443"
    truth = {"For": "127.0.0.2", "Proto": "https", "Host": host}
    forged = {"For": "203.0.113.9", "Proto": "http", "Host": "evil.example"}
    forged = {f"X-Forwarded-{name}": value for name, value in forged.items()}
    paths = ["/", "/?sessionId=x", "/ws", "/ws/", "/api/chat", "/embed.js", "/x/ws"]
    async with nginx(tmp_path, mirror) as proxy, proxy.visitors("127.0.0.2") as site:
        for protocol, path in itertools.product(("", "WebSocket", "h2c"), paths):
            upgrade = {"Connection": "upgrade", "Upgrade": protocol} if protocol else {}
            headers = {**forged, "Host": host, **upgrade}
            async with site.http.get(site.url + path, headers=headers) as response:
                told = CIMultiDict(await response.json())
            for name, value in truth.items():
                assert told.getall(f"X-Forwarded-{name}") == [value]
            assert told.getall("Host") == [host]
            asked = told.get("Connection") == "upgrade" and told.get("Upgrade") == "WebSocket"
            assert asked == (protocol == "WebSocket" and path in paths[:3])
            assert asked or "Connection" not in told


async def test_addresses_through_nginx(serve: Serve, tmp_path: Path) -> None:
    """Limits are each client's own, and a made-up X-Forwarded-For does not get around them."""
    server = await serve(limits={"init_per_minute": 3})
    async with nginx(tmp_path, server) as proxy, proxy.visitors("127.0.0.2") as one:
        for number in range(3):
            assert (await one.init(headers={"X-Forwarded-For": f"9.9.9.{number}"})).status == 200
        answer = await one.init(headers={"X-Forwarded-For": "9.9.9.9"})
        assert answer.error == (429, "rate_limit_exceeded")
        assert answer.headers["Retry-After"]
        async with proxy.visitors("127.0.0.3") as other:
            assert (await other.init()).status == 200
    assert [*server.app.buckets] == ["init 127.0.0.2", "init 127.0.0.3"]


async def test_quiet_sockets_through_nginx(
    serve: Serve, tmp_path: Path, monkeypatch: Patch
) -> None:
    """nginx cuts off a silent server, and takes its pings for a sign of life."""
    patience = re.search(r"proxy_read_timeout (\d+)s", NGINX_SITE.read_text())
    assert patience
    assert int(patience[1]) > 2 * lf.PING_SECONDS
    changes = {patience[0]: "proxy_read_timeout 1s"}
    async with nginx(tmp_path, await serve(), **changes) as proxy, proxy.visitors() as site:
        monkeypatch.setattr(lf, "PING_SECONDS", 0.3)
        alive = await site.visitor()
        reading = asyncio.create_task(alive.next())  # answers the pings
        monkeypatch.setattr(lf, "PING_SECONDS", 60)
        silent = await site.visitor()
        assert (await read_close(silent.ws))[1] == 1006
        assert not reading.done()
        await alive.send("no such event")
        assert (await reading)["data"]["code"] == "invalid_event"


@pytest.mark.skipif(not os.environ.get("CI"), reason="takes 65 s; CI has them")
async def test_long_quiet_sockets_through_nginx(
    serve: Serve, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A socket may be silent for longer than the 60 s that nginx allows if nobody says more."""
    monkeypatch.setattr(lf, "PING_SECONDS", 600)
    async with nginx(tmp_path, await serve()) as proxy, proxy.visitors() as site:
        visitor = await site.visitor()
        with pytest.raises(TimeoutError):
            await visitor.ws.receive(65)
        await visitor.expect_open()


# So many that no instance is without one: where a domain goes hangs on the instances' ports.
DOMAINS = [f"site{number}.example" for number in range(40)]
MANY: Json = {"id": "many", "name": "Many", "allowed_hosts": DOMAINS}


async def test_each_site_stays_on_one_instance(
    serve: Serve, key_server: KeyServer, tmp_path: Path
) -> None:
    """All pages of a domain, with and without Origin, come to the same of several servers.

    An owner's request goes there, too, by X-Leflux-Host, with which visitors cannot choose.
    """
    tables = office(key_server, sites=[{**MANY, "owners": ["olga"]}])
    servers = [await serve(**tables, limits={"init_per_minute": 1000}) for _ in range(3)]
    async with (
        nginx(tmp_path, *servers) as proxy,
        proxy.visitors("127.0.0.2") as one,
        proxy.visitors("127.0.0.3") as other,
    ):
        homes = []
        for number, domain in enumerate(DOMAINS):
            chosen = {"X-Leflux-Host": DOMAINS[number - 1]}  # it counts for nothing here
            pages = [f"https://{domain}", f"http://www.{domain}", f"https://a.b.{domain}:8443"]
            asked = [
                (site, {"origin": page, "headers": more})
                for page in pages
                for site, more in ((one, {}), (other, {}), (one, chosen))
            ]
            answers = [await site.init(**more) for site, more in asked]
            ids = {answer.body["sessionId"] for answer in answers}
            (home,) = [server for server in servers if ids & server.app.sessions.keys()]
            assert ids <= home.app.sessions.keys()
            homes.append(home)
            # A page on the host of the server itself sends no Origin when it asks.
            same_origin = {"Host": domain, "Sec-Fetch-Site": "same-origin"}
            owner = {**bearer("owner"), "X-Leflux-Host": domain}
            session_id = answers[-1].body["sessionId"]
            for path, origin, headers in (
                ("session", None, same_origin),
                ("session", f"https://{domain}", {}),
                ("admin/sites/many/sessions", other.url, owner),
            ):
                path = f"/api/{path}/{session_id}"
                answer = await other.call("GET", path, origin=origin, headers=headers)
                assert answer.status == 200, (domain, path)
        assert all(server in homes for server in servers)


async def test_killed_instance(tmp_path: Path) -> None:
    """Its sites wait for it and go on where they were; the other sites notice nothing."""
    more = f"[[sites]]\nid = 'many'\nname = 'Many'\nallowed_hosts = {DOMAINS}\n"
    more = f"[limits]\ninit_per_minute = 1000\n{more}"
    folders = [tmp_path / str(number) for number in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        for folder in folders:
            folder.mkdir()
        started = [stack.enter_async_context(program(folder, more)) for folder in folders]
        runs = await asyncio.gather(*started)
        proxy = await stack.enter_async_context(nginx(tmp_path, *(run.server for run in runs)))
        site = await stack.enter_async_context(proxy.visitors())
        visitors = [await site.visitor(f"https://{domain}") for domain in DOMAINS]
        await asyncio.gather(*(visitor.ask() for visitor in visitors))
        killed = runs[0]
        direct = [Visitor(killed.server, v.id, v.origin) for v in visitors]
        known = [(await visitor.get()).status == 200 for visitor in direct]
        waiting = [*itertools.compress(visitors, known)]
        untouched = [visitor for visitor in visitors if visitor not in waiting]
        assert waiting
        assert untouched
        killed.child.kill()
        await killed.child.wait()
        for visitor in waiting:
            assert (await read_close(visitor.ws))[1] == 1006
            url = f"{site.url}/api/session/{visitor.id}"
            async with site.http.get(url, headers={"Origin": visitor.origin}) as response:
                assert response.status == 502
        await asyncio.gather(*(visitor.ask("Still here?") for visitor in untouched))
        port = killed.server.url.rpartition(":")[2]
        await stack.enter_async_context(program(folders[0], more, LEFLUX_PORT=port))
        for visitor in waiting:
            assert (await visitor.connect(visitor.frames[-1]["seq"]))["restored"]
        await asyncio.gather(*(visitor.ask("Still here?") for visitor in waiting))
        for visitor in visitors:
            assert len(await visitor.history()) == 4
    assert not UUID.search(proxy.logs())
