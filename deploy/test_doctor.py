"""The doctor, looking at real servers through a proxy that makes the mistakes of real ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import re
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiohttp
import doctor
import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from multidict import CIMultiDict

import leflux_server as lf
from conftest import (
    DAMAGES,
    NOW,
    OTHER,
    PATIENCE_SECONDS,
    SHOP,
    UUID,
    FakeModel,
    Json,
    KeyServer,
    Patch,
    Script,
    Serve,
    Server,
    cases,
    chunk,
    complaint,
    damage,
    files_in,
    forever,
    listening,
    make_config,
    on_disk,
    private_key,
    program,
    running,
    sse,
    status,
)

OUTSIDE = "127.0.0.9"  # where the proxies of these tests come from; the doctor is at 127.0.0.1


@dataclasses.dataclass
class Proxy:
    """A reverse proxy in front of a server, and the mistakes that people make with one."""

    target: str
    forwarded_for: str = "set"  # "append", "pass" what came, or "none"
    sends: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adds: Mapping[str, str] = dataclasses.field(default_factory=dict)  # to responses
    drops: Sequence[str] = ()  # request headers
    upgrades: bool = True
    answers: Mapping[str, tuple[int, Mapping[str, str]]] = dataclasses.field(default_factory=dict)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        for start, (code, more) in self.answers.items():
            if f"{request.method} {request.path}".startswith(start):
                return web.Response(status=code, headers=more, text="<html>A proxy</html>")
        hops = ("upgrade", "connection", "content-length", "transfer-encoding", "host")
        dropped = {*hops, *self.drops, "x-forwarded-for"}
        headers = {k: v for k, v in request.headers.items() if k.lower() not in dropped}
        headers = {k: v for k, v in headers.items() if not k.lower().startswith("sec-websocket")}
        came = request.headers.getall("X-Forwarded-For", [])
        peer = cast(str, request.remote)
        sent = {"set": [peer], "append": [*came, peer], "pass": came, "none": []}
        if chosen := sent[self.forwarded_for]:
            headers["X-Forwarded-For"] = ", ".join(chosen)
        headers = {"Host": request.host, **headers, **self.sends}
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(local_addr=(OUTSIDE, 0))
        ) as http:
            if self.upgrades and "upgrade" in request.headers.get("Connection", "").lower():
                return await self.tunnel(http, request, headers)
            body = await request.read()
            async with http.request(
                request.method, self.target + request.path_qs, headers=headers, data=body
            ) as response:
                copied = CIMultiDict(response.headers)
                copied.popall("Content-Length", None)
                copied.extend(self.adds)
                raw = await response.read()
                return web.Response(status=response.status, headers=copied, body=raw)

    async def tunnel(
        self, http: aiohttp.ClientSession, request: web.Request, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        async with http.ws_connect(self.target + request.path_qs, headers=headers) as inner:
            outer = web.WebSocketResponse()
            await outer.prepare(request)

            async def copy(reader: Any, writer: Any) -> None:
                async for frame in reader:
                    await writer.send_str(frame.data)
                await writer.close()

            await asyncio.gather(copy(outer, inner), copy(inner, outer))
            return outer


@contextlib.asynccontextmanager
async def proxy(
    server: Server, tls: ssl.SSLContext | None = None, **how: Any
) -> AsyncIterator[str]:
    async with listening(Proxy(server.url, **how).handle, tls) as url:
        yield url


@dataclasses.dataclass
class Findings:
    """What the doctor said: its exit code, and the marked words of each line."""

    code: int
    lines: dict[str, str]

    def failed(self) -> set[str]:
        return {what for what, words in self.lines.items() if words.startswith("FAIL")}

    def expect(self, failures: Mapping[str, str], url: str = "url") -> None:
        """These and no others failed, with these words; "url" is the line about that URL."""
        named = {url if what == "url" else what: words for what, words in failures.items()}
        assert (self.failed(), self.code) == ({*named}, 1 if named else 0)
        for what, words in named.items():
            assert words in self.lines[what]


def read_findings(code: int, out: str) -> Findings:
    lines = {}
    for line in out.splitlines():
        found = re.fullmatch(r"(ok  |hint|FAIL)  (https?://\S+|[\w -]+): (.+)", line)
        assert found, line
        assert found[2] not in lines
        lines[found[2]] = f"{found[1].strip()} {found[3]}"
        assert not UUID.search(line)
    return Findings(code, lines)


Ask = Callable[..., Awaitable[Findings]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Ask the doctor about a configuration and a URL, in this process."""

    async def see(config: lf.Config, url: str = "") -> Findings:
        capsys.readouterr()
        code = await doctor.run_doctor(config, url)
        return read_findings(code, capsys.readouterr().out)

    return see


async def run_doctor(*arguments: str, **environ: str) -> tuple[int, str, str]:
    """Run the doctor's file from elsewhere; return its exit code, output and errors."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LEFLUX_")}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, str(doctor.__file__), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd="/",
        env={**inherited, **environ},
    )
    out, err = await asyncio.wait_for(child.communicate(), PATIENCE_SECONDS)
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()


BEHIND_PROXY: Json = {"trusted_proxies": [OUTSIDE]}


async def test_doctor_finds_all_well(
    tmp_path: Path, model: FakeModel, key_server: KeyServer
) -> None:
    """A deployment that works: a line for each check, exit code 0, nothing left behind."""
    more = f"""
        llm.base_url = "{model.url}"
        server.trusted_proxies = ["{OUTSIDE}"]
        firebase = {{ project_id = "p", keys_url = "{key_server.url}", admins = ["olga"] }}
    """
    key = {"LEFLUX_LLM_API_KEY": "sk-SECRET"}
    async with program(tmp_path, more, **key) as running, proxy(running.server) as url:
        before = files_in(tmp_path)
        call = ("--config", str(tmp_path / "config.toml"), f"{url}/")
        code, out, err = await run_doctor(*call, STATE_DIRECTORY=str(tmp_path), **key)
        stats = await running.server.call("GET", "/api/stats")
        assert (stats.body["activeSessions"], files_in(tmp_path)) == (0, before)
    assert (code, err) == (0, ""), out
    assert "SECRET" not in out
    findings = read_findings(code, out)
    host = model.url.split("/")[2]
    expected = {
        "config": "1 site(s)",
        "state": f"{tmp_path} is in use by a running server",
        "model": f"google/gemini-2.5-flash at {host} answered in",
        "sign-in": "on, with 1 key(s)",
        url: "leflux answers",
        "model in use": "the server's is remote",
        "address": "the server sees 127.0.0.1, this machine",
        "widget": "embed.js is served",
        "site shop": f"https://acme.com can chat, over ws{url.removeprefix('http')}",
    }
    assert list(findings.lines) == list(expected)
    for what, words in expected.items():
        assert findings.lines[what].startswith(f"ok {words}")
    assert [request["stream"] for request in model.requests] == [True]
    assert model.headers[0]["Authorization"] == "Bearer sk-SECRET"


async def test_doctor_without_url(tmp_path: Path) -> None:
    """Without a key and a URL: the offline guide is an answer, and the way in is not checked."""
    (tmp_path / "c.toml").write_text('[[sites]]\nid = "a"\nname = "A"\nallowed_hosts = ["a.com"]')
    code, out, err = await run_doctor("--config", str(tmp_path / "c.toml"))
    findings = read_findings(code, out)
    assert (findings.code, err) == (0, "")
    assert "the first start makes it" in findings.lines["state"]
    assert "offline guide answers" in findings.lines["model"]
    assert findings.lines["sign-in"].startswith("ok off")
    assert findings.lines["proxy"].startswith("hint not checked")
    assert "doctor.py https://" in findings.lines["proxy"]
    assert files_in(tmp_path) == {"c.toml"}


async def test_doctor_stops_at_mistakes_in_the_call(tmp_path: Path) -> None:
    """Mistakes in the file or in the URL are one line and exit code 2, as at the start."""
    (tmp_path / "typo").write_text("[server]\nprot = 3002\n")
    (tmp_path / "lost").write_text('[[sites]]\nid = "a"\nname = "A"\nknowledge = ["none.md"]\n')
    (tmp_path / "good").write_text("")
    no_url = "must be a URL such as https://chat.example.com"
    rows = {  # the file and a URL, and what is said
        ("typo",): "server.prot",
        ("lost", "http://localhost:1"): "sites[a].knowledge",
        ("good", "chat.example.com"): no_url,
        ("good", "https://chat.example.com/path"): no_url,
    }
    calls = [run_doctor("--config", str(tmp_path / name), *url) for name, *url in rows]
    for (code, out, err), words in zip(await asyncio.gather(*calls), rows.values(), strict=True):
        assert (code, out) == (2, "")
        assert words in err
        assert words == no_url or err.count("\n") == 1


async def test_doctor_hints_at_sites_without_hosts(ask: Ask) -> None:
    """A site where nobody can chat is worth a hint, and no failure."""
    for sites, words in (([], "no [[sites]]"), ([{"id": "a", "name": "A"}], "site a has no")):
        findings = await ask(make_config(sites=sites))
        assert findings.lines["config"].startswith("hint")
        assert words in findings.lines["config"]
        assert findings.lines["state"].startswith('hint server.state_dir is ""')
        assert findings.code == 0


# The doctor: the state folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


async def test_doctor_tries_a_copy_of_the_state(kept: Path, ask: Ask) -> None:
    """A database that is not in use is read as the next start will read it, and not changed."""
    config = make_config(server=on_disk(kept))
    before = contents(kept)
    findings = await ask(config)
    assert findings.lines["state"] == f"ok {kept} can be written and holds 4 chat(s)"
    assert contents(kept) == before
    async with running(config) as server:  # it is not locked either
        assert len(server.app.sessions) == 4
        findings = await ask(config)
    assert findings.lines["state"] == f"ok {kept} is in use by a running server"
    (kept / "leflux.db").unlink()
    findings = await ask(config)
    assert findings.lines["state"] == f"ok {kept} can be written and holds 0 chat(s)"


@pytest.mark.parametrize("name", DAMAGES)
async def test_doctor_finds_unusable_databases(name: str, kept: Path, ask: Ask) -> None:
    """What would stop the start is said beforehand, and left as it is."""
    damage(kept, name)
    before = contents(kept)
    findings = await ask(make_config(server=on_disk(kept)))
    assert (findings.failed(), findings.code) == ({"state"}, 1)
    words = findings.lines["state"]
    assert str(kept) in words
    assert "leflux-" not in words  # the copy's name
    assert contents(kept) == before
    assert "a f" in name or "Put a backup in its place" in words


async def test_doctor_finds_state_of_another_user(kept: Path, ask: Ask) -> None:
    """Where the server's user may not write, the words say who may and how to fix it."""
    if os.geteuid() == 0:
        os.chown(kept / "leflux.db", 12345, 12345)
        words = f"chown --reference={kept} {kept / 'leflux.db'}"
    else:
        os.chmod(kept, 0o500)  # noqa: PTH101
        words = f"{kept} belongs to user {os.geteuid()} and is no folder that this user can write"
    findings = await ask(make_config(server=on_disk(kept)))
    assert findings.failed() == {"state"}
    assert words in findings.lines["state"]
    os.chmod(kept, 0o700)  # noqa: PTH101


# The doctor: the model and the keys


async def web_page(_: web.Request) -> web.Response:
    return web.Response(text="<html>SECRET data: hello</html>", content_type="text/html")


CREDIT = "the account is out of credit"
NO_CREDIT = {"error": {"code": "insufficient_quota"}}
LONG = {"finish_reason": "length"}


@cases(
    "script, key, words",
    (complaint("SECRET", 401), "sk-SECRET", "the key is refused (401)"),
    (complaint("SECRET", 403), "sk-SECRET", "the key is refused (403)"),
    (complaint("SECRET", 401), "", "it wants a key (401), and none is set"),
    (complaint("SECRET", 402), "sk-SECRET", CREDIT),
    (status(429, NO_CREDIT, Retry_After="0"), "sk-SECRET", CREDIT),
    (status(429, {}, Retry_After="0"), "sk-SECRET", "too many requests for this key (429)"),
    (complaint("no such model SECRET", 404), "", "it does not take the request (404)"),
    (complaint("no such model SECRET", 400), "", "it does not take the request (400)"),
    (status(301, {}, Location="https://SECRET.example/"), "", "does not take the request (301)"),
    (status(503, {}, Retry_After="0"), "", "the provider has a problem (503)"),
    ([sse({"error": {"code": 402, "message": "SECRET"}})], "", CREDIT),
    ([sse({"error": {"code": "x"}})], "", "the provider has a problem (in its stream)"),
    (web_page, "", "no chat completion, perhaps a web page"),
    ([sse("[DONE]")], "", "no chat completion"),
    ([sse(chunk("Hm", **LONG), "[DONE]")], "", "its answer breaks off"),
    ([sse(chunk("", **LONG), "[DONE]")], "", "its answer breaks off"),
)
async def test_doctor_says_what_the_provider_means(
    script: Script, key: str, words: str, model: FakeModel, ask: Ask
) -> None:
    """Each refusal of a provider in words that say what to do, and nothing that it wrote."""
    model.scripts.extend([script] * 3)
    findings = await ask(dataclasses.replace(make_config(model), api_key=key))
    assert (findings.failed(), findings.code) == ({"model"}, 1)
    assert words in findings.lines["model"]
    assert "SECRET" not in str(findings)


async def test_doctor_blames_the_key(model: FakeModel, ask: Ask) -> None:
    """An error that speaks of the key blames neither model nor URL, whatever its status."""
    for code, error, blamed in (
        # LiteLLM, with a key that it does not know; Gemini; vLLM; a provider with a code alone
        (400, {"message": "No connected db.", "type": "no_db_connection"}, True),
        (400, {"message": "Authentication Error, SECRET", "type": "auth_error"}, True),
        (400, [{"error": {"message": "API key not valid. SECRET", "code": 400}}], True),
        (400, "Unauthorized", True),
        (422, {"code": "invalid_api_key"}, True),
        (400, {"message": "no such model SECRET"}, False),
        (404, {"message": "It does not exist or you do not have access"}, False),
    ):
        model.otherwise = status(code, error if isinstance(error, list) else {"error": error})
        for key, words in (("sk-SECRET", "the key is refused"), ("", "it wants a key")):
            findings = await ask(dataclasses.replace(make_config(model), api_key=key))
            words = words if blamed else "it does not take the request"
            assert f"{words} ({code})" in findings.lines["model"]
            assert "SECRET" not in str(findings)


async def test_doctor_takes_a_model_as_it_is(model: FakeModel, ask: Ask) -> None:
    """A model that takes fewer parameters, or answers in plain text, is fine. The answer that the
    question asks for is one that the request's schema allows."""
    model.scripts.extend([complaint("json_schema is unknown"), [sse(chunk("ok"), "[DONE]")]])
    assert (await ask(make_config(model))).lines["model"].startswith("ok google/gemini")
    request, _ = model.requests
    (message,) = request["messages"]
    wanted = json.loads(message["content"].partition(": ")[2])
    schema = request["response_format"]["json_schema"]["schema"]
    assert wanted.keys() == {*schema["required"]}
    assert wanted["action"] is None
    assert {"type": "null"} in schema["properties"]["action"]["anyOf"]


async def test_doctor_waits_for_the_model_only_so_long(
    model: FakeModel, ask: Ask, monkeypatch: Patch
) -> None:
    """A model that says nothing in the server's time fails; one that is only slow is a hint."""
    monkeypatch.setattr(doctor, "MODEL_SECONDS", 0.3)
    model.scripts.extend([[b": waiting", forever], [sse(chunk("Let me see")), forever]])
    for seen in ("no text yet", "10 characters, the first after 0 s"):
        findings = await ask(make_config(model))
        assert findings.lines["model"].startswith("hint google/gemini")
        assert f"it is slow: {seen} within 0.3 s" in findings.lines["model"]
        assert findings.code == 0
    model.scripts.append([b": waiting", forever])
    findings = await ask(make_config(model, llm={"first_text_seconds": 0.1}))
    assert findings.failed() == {"model"}
    assert "can be reached, but does not answer in time" in findings.lines["model"]


# The doctor: connections


def tls_for(folder: Path, name: str, days: float) -> ssl.SSLContext:
    """A server's TLS for a name; cert.pem in the folder is its own authority."""
    names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now, key = datetime.now(UTC), private_key(1)
    builder = x509.CertificateBuilder(names, names, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(100)).not_valid_after(now + timedelta(days))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    signed = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(signed)
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@contextlib.asynccontextmanager
async def slow_reader(answer: bytes) -> AsyncIterator[int]:
    """A server that waits for the end of what it takes for a request; yields its port."""

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(read, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_doctor_says_why_it_cannot_connect(
    tmp_path: Path, ask: Ask, model: FakeModel, monkeypatch: Patch
) -> None:
    """Refused connections, unknown names, bad certificates, http where https is, and the reverse.

    Each is found before the server's own way to ask would wait, and try again.
    """
    monkeypatch.setattr(doctor, "KNOCK_SECONDS", 0.5)
    plain = model.url.removeprefix("http://").removesuffix("/v1")
    async with (
        listening(web_page, tls_for(tmp_path, "localhost", days=90)) as strange,
        slow_reader(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as slow,
        slow_reader(b"SSH-2.0-OpenSSH_9.2p1\r\n") as ssh,
    ):
        for url, words in (
            (f"http://127.0.0.1:{unused_port()}", "the connection is refused"),
            ("http://no-such-host.invalid", "DNS does not know its name"),
            (f"https://{plain}", f"it speaks http, not https. Use http://{plain}"),
            (f"https://127.0.0.1:{slow}", "it speaks http, not https. Use http://127.0.0.1:"),
            (f"https://127.0.0.1:{ssh}", "it does not answer in time"),
            (strange, "its TLS certificate is not valid: self"),
            (strange.replace("https", "http"), f"it speaks https, not http. Use {strange}"),
        ):
            firebase = {"project_id": "p", "keys_url": f"{url}/keys"}
            config = make_config(llm={"base_url": f"{url}/v1"}, firebase=firebase)
            findings = await ask(config, url)
            assert findings.failed() == {"model", "sign-in", url}
            for what in findings.failed():
                assert words in findings.lines[what], findings


async def test_port_80_says_nothing_of_443(monkeypatch: Patch) -> None:
    """Where https fails, its own reason is told, and not that http is spoken next door."""
    url = ""

    async def speaks(_: aiohttp.ClientSession, knocked: str, **__: Any) -> bool:
        if knocked.startswith(url):
            raise aiohttp.ConnectionTimeoutError
        return True

    monkeypatch.setattr(doctor, "speaks", speaks)
    async with lf.new_client() as http:
        for url, error in (
            ("https://chat.example", aiohttp.ConnectionTimeoutError),
            ("https://[::1]", aiohttp.ConnectionTimeoutError),
            ("https://[::1]:8443", doctor.Failure),
            ("http://chat.example", doctor.Failure),
        ):
            with pytest.raises(error):
                await doctor.knock(http, url)


@cases(
    "error, words",
    (OSError(errno.ENETUNREACH, "SECRET"), "it failed: Network is unreachable"),
    (ConnectionResetError(errno.ECONNRESET, "SECRET"), "it failed: Connection reset by peer"),
    (aiohttp.ServerDisconnectedError("SECRET"), "it failed (ServerDisconnectedError)"),
    (aiohttp.ServerTimeoutError("SECRET"), "it does not answer in time"),
    (KeyError("SECRET"), "it failed (KeyError)"),
)
def test_doctor_words_other_failures(error: Exception, words: str) -> None:
    """What else can go wrong has a name, too, and nothing of its own text is shown."""
    assert doctor.failure_words(error).startswith(words)
    assert "SECRET" not in doctor.failure_words(error)


async def test_doctor_reads_the_keys(key_server: KeyServer, ask: Ask) -> None:
    """Google's keys must arrive and be keys; that nobody may use them is a hint."""
    config = make_config(firebase={"project_id": "p", "keys_url": key_server.url})
    for instead, certificates, words in (
        (None, key_server.certificates, "hint works, but nobody may use it"),
        (None, {"key": "SECRET"}, "what it answers is not Google's certificates"),
        (web_page, {}, "what it answers is not Google's certificates"),
        (status(404), {}, "it answers 404. Is firebase.keys_url right?"),
    ):
        key_server.instead, key_server.certificates = cast(Any, instead), certificates
        assert words in (await ask(config)).lines["sign-in"]


# The doctor: the way in


@cases(
    "name, days, proto, failures",
    ("localhost", 90, "https", {}),
    ("localhost", 5, "https", {"certificate": "it ends in 4 day(s). Renew it"}),
    ("localhost", 90, "", {"site shop": "browsers refuse from https. Let the proxy send X-F"}),
    ("localhost", -1, "https", {"url": "not valid: certificate has expired. Renew it"}),
    ("else.example", 90, "https", {"url": "not valid: Hostname mismatch"}),
)
async def test_doctor_looks_at_tls(
    name: str, days: float, proto: str, failures: Json, tmp_path: Path
) -> None:
    """Behind https: the certificate, how long it lasts, and that pages are told wss://."""
    more = f'[server]\ntrusted_proxies = ["{OUTSIDE}"]\n'
    tls = tls_for(tmp_path, name, days)
    sends = {"X-Forwarded-Proto": proto} if proto else {}
    (tmp_path / "state").mkdir()
    async with (
        program(tmp_path, more, STATE_DIRECTORY=str(tmp_path / "state")) as running,
        proxy(running.server, tls, sends=sends) as url,
    ):
        call = ("--config", str(tmp_path / "config.toml"), url)
        code, out, err = await run_doctor(*call, SSL_CERT_FILE=str(tmp_path / "cert.pem"))
        assert (await running.server.call("GET", "/api/stats")).body["activeSessions"] == 0
    assert err == ""
    findings = read_findings(code, out)
    findings.expect(failures, url)
    if not failures:
        assert findings.lines["certificate"] == "ok valid for 89 day(s) more"
        assert "over wss://localhost:" in findings.lines["site shop"]


def test_certificates_that_live_long_or_short() -> None:
    """It should have been renewed when less than a seventh of its time is left."""
    for days, left, words in (
        (90, 20, "valid for 20 day(s) more"),
        (90, 13, "it ends in 13 day(s)"),
        (6, 2, "valid for 2 day(s) more"),
        (0.5, 0.25, "valid for 6 hour(s) more"),
        (0.5, 0.05, "it ends in 1 hour(s)"),
    ):
        times = {"notBefore": (left - days) * 86400, "notAfter": left * 86400}
        written = {
            name: time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(NOW + seconds))
            for name, seconds in times.items()
        }
        if words.startswith("valid"):
            assert doctor.certificate_words(written, NOW) == words
        else:
            with pytest.raises(doctor.Failure, match=re.escape(words)):
                doctor.certificate_words(written, NOW)


GATEWAY: Json = {"": (502, {})}
INNER = {"Host": "inner.example"}
ELSEWHERE: Json = {"": (301, {"Location": "https://www.example.com/health"})}


@cases(
    "how, failures",
    ({}, {}),
    ({"forwarded_for": "append"}, {}),
    ({"forwarded_for": "none"}, {"address": "the server sees 127.0.0.9 instead of 127.0.0.1"}),
    ({"forwarded_for": "pass"}, {"address": "a forged X-Forwarded-For is believed"}),
    ({"answers": GATEWAY}, {"url": "the proxy answers 502, as no leflux runs behind it"}),
    ({"answers": ELSEWHERE}, {"url": "redirects (301). Ask about https://www.example.com "}),
    ({"answers": {"": (404, {})}}, {"url": "HTTP 404, and not from leflux"}),
    ({"answers": {"": (200, {})}}, {"url": "HTTP 200, and not from leflux"}),
    ({"answers": {"POST": (405, {})}}, {"site shop": "HTTP 405, and not from leflux"}),
    ({"answers": {"GET /embed.js": (404, {})}}, {"widget": "HTTP 404, and not from leflux"}),
    ({"answers": {"GET /embed.js": (200, {})}}, {"widget": "HTTP 200, and not from leflux"}),
    ({"answers": {"DELETE": (405, {})}}, {"site shop": "Let the proxy pass DELETE on"}),
    ({"drops": ["origin"]}, {"site shop": "the Origin header does not arrive"}),
    ({"adds": {"Access-Control-Allow-Origin": "*"}}, {"site shop": "CORS headers come twice"}),
    ({"upgrades": False}, {"site shop": "is not upgraded (200). Let the proxy speak HTTP/1.1"}),
    ({"upgrades": False, "demo": False}, {"site shop": "is not upgraded (404)"}),
    ({"answers": {"GET /": (504, {})}}, {"url": "the proxy answers 504"}),
    ({"sends": INNER}, {"site shop": "pages are told ws://inner.example, which is another addr"}),
)
async def test_doctor_looks_through_the_proxy(
    how: Any, failures: Json, serve: Serve, ask: Ask
) -> None:
    """Each mistake of a proxy in words that say how to fix it; the chat is deleted again."""
    how = dict(how)
    server = await serve(server={**BEHIND_PROXY, "demo": how.pop("demo", True)}, sites=[SHOP])
    async with proxy(server, **how) as url:
        findings = await ask(make_config(server=BEHIND_PROXY, sites=[SHOP]), url)
    findings.expect(failures, url)
    assert not server.app.sessions or "DELETE" in str(how)


async def test_doctor_compares_server_and_file(serve: Serve, ask: Ask, model: FakeModel) -> None:
    """A site or a key that is in the file and not in the running server, CORS, a full bucket."""
    table = {**BEHIND_PROXY, "cors_origins": ["https://else.example"]}
    server = await serve(server=table, sites=[SHOP], limits={"init_per_minute": 1})
    unknown = "does not know https://other.example (403 host_not_registered). Put its host into"
    async with proxy(server) as url:
        sites = [OTHER, SHOP, {**OTHER, "id": "third", "allowed_hosts": ["third.com"]}]
        first = await ask(make_config(model, server=BEHIND_PROXY, sites=sites), url)
        again = await ask(make_config(server=BEHIND_PROXY, sites=[SHOP]), url)
    first.expect(
        {
            "model in use": "the server's is offline, but remote",
            "site other": unknown,
            "site shop": "Add it to server.cors_origins",
            "site third": "",
        }
    )
    again.expect({"site shop": "too many new chats from this address (429)"})
    assert not server.app.sessions


async def test_doctor_finds_sites_that_do_not_stay(serve: Serve, ask: Ask) -> None:
    """Two servers behind one address: the socket must come to the one that has the chat."""
    first, second = [await serve(server=BEHIND_PROXY, sites=[SHOP]) for _ in range(2)]
    ways = Proxy(first.url), Proxy(second.url)

    async def by_turns(request: web.Request) -> web.StreamResponse:
        return await ways["Upgrade" in request.headers].handle(request)

    async with listening(by_turns) as url:
        findings = await ask(make_config(server=BEHIND_PROXY, sites=[SHOP]), url)
    assert "each site must stay on one of them" in findings.lines["site shop"]
    assert not first.app.sessions


async def test_doctor_on_the_same_machine(serve: Serve, ask: Ask) -> None:
    """Straight to the server from a trusted address: what strangers can forge does not show. Of
    many sites only the first are tried, as each costs a chat of the minute."""
    sites = [{"id": f"s{n}", "name": "S", "allowed_hosts": [f"s{n}.com:8443"]} for n in range(9)]
    server = await serve(sites=sites)
    findings = await ask(make_config(sites=sites), server.url)
    assert findings.code == 0
    assert findings.lines["address"].startswith("hint this machine (127.0.0.1) is one of")
    chats = {what: words for what, words in findings.lines.items() if what.startswith("site ")}
    assert list(chats) == [f"site s{n}" for n in range(doctor.MAX_SITES)]
    for number, words in enumerate(chats.values()):
        assert words.startswith(f"ok https://s{number}.com:8443 can chat")


@cases(
    "own, seen, forgeable, mark, words",
    ("192.0.2.9", "192.0.2.9", False, "ok", "this machine"),
    ("192.168.1.9", "8.8.4.4", False, "ok", "as the internet knows it"),
    ("192.168.1.9", "2001:4860:1:2::", False, "ok", "as the internet knows it"),
    ("2001:4860:1:2::7", "2001:4860:1:2::7", False, "ok", "2001:4860:1:2::7, this machine"),
    ("192.168.1.9", "172.17.0.1", False, "FAIL", "sees 172.17.0.1 instead of 192.168.1.9"),
    ("192.168.1.9", "127.0.0.1", False, "FAIL", "all visitors share one limit"),
    ("192.168.1.9", "1.1.1.1", False, "FAIL", "all visitors share one limit"),
    ("192.168.1.9", "", False, "FAIL", "the server sees none instead"),
    ("192.168.1.9", "192.168.1.9", True, "FAIL", "a forged X-Forwarded-For is believed"),
    ("127.0.0.1", "127.0.0.1", False, "ok", "this machine"),
    ("127.0.0.1", "127.0.0.1", True, "hint", "Run the doctor on another one"),
    ("::1", "127.0.0.1", False, "hint", "Run the doctor on another one"),
)
def test_doctor_judges_addresses(
    own: str, seen: str, forgeable: bool, mark: str, words: str
) -> None:
    """What the server takes the doctor for, without and with a forged header."""
    proxies = make_config(server={"trusted_proxies": ["127.0.0.1", "::1", "1.1.1.1"]}).server
    try:
        found = "ok", doctor.address_words(own, seen, forgeable, proxies.trusted_proxies)
    except doctor.Finding as finding:
        found = finding.mark, str(finding)
    assert found[0] == mark
    assert words in found[1]
