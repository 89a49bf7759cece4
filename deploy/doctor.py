#!/usr/bin/env python3
"""Looks at a deployment of leflux and says in plain words what is wrong and how to fix it.

    python deploy/doctor.py [--config FILE] [URL]

FILE is the server's config.toml; URL is where its visitors reach it, and without one the way in
is not checked. A line is printed for each check: "ok", "hint" (it works, but look) or "FAIL".
Exit code 0: nothing fails, 1: something does, 2: a mistake in the file or in the call.

A check returns what is well, or raises a Hint or a Failure. None leaves anything behind, and none
repeats a key, a session id or what a provider wrote.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import shutil
import socket
import ssl
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import leflux_server as lf  # it lies in the folder above

Json = dict[str, Any]

REQUEST_SECONDS = 10  # for one request to the server
KNOCK_SECONDS = 5  # to connect, TLS included, and again for a first answer
MODEL_SECONDS = 45  # for the model's whole answer
MAX_SITES = 5  # that a chat is opened for: init_per_minute counts them
CERTIFICATE_PART = 0.15  # of its time; certbot and Caddy renew when a third is left
FORGED_ADDRESS = "203.0.113.77"  # nobody's (RFC 5737)
QUESTION = (
    'Answer with this JSON and nothing else: {"message": "ok", "answered": true, "action": null}'
)


class Finding(Exception):
    """What a check found that its reader should know, in words that say what to do."""

    mark = ""


class Hint(Finding):
    """It works, but its owner may want to know."""

    mark = "hint"


class Failure(Finding):
    """It does not work."""

    mark = "FAIL"


FAILURES: dict[type[Exception], str] = {
    ssl.SSLError: "it does not speak TLS. Is it http instead of https, or another port?",
    socket.gaierror: "DNS does not know its name. Is it spelled right, and does it have a record?",
    ConnectionRefusedError: (
        "the connection is refused, nothing listens there. Start it, or correct the port"
    ),
    TimeoutError: "it does not answer in time. Is it up, and is no firewall in between?",
}


def failure_words(error: BaseException) -> str:
    """Say why a connection failed."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message.rstrip(".")
        return f"its TLS certificate is not valid: {reason}. Renew it, or use the name it is for"
    for kind, words in FAILURES.items():
        if isinstance(cause, kind):
            return words
    if isinstance(cause, OSError) and cause.errno:
        return f"it failed: {os.strerror(cause.errno)}"
    return f"it failed ({type(cause).__name__})"


@contextlib.contextmanager
def about(whom: str) -> Iterator[None]:
    """Say whom a finding of the block is about; failed connections become findings."""
    try:
        yield
    except Finding as finding:
        raise type(finding)(f"{whom}: {finding}") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Failure(f"{whom}: {failure_words(error)}") from None


async def speaks(http: aiohttp.ClientSession, url: str, **options: Any) -> bool:
    """Whether a server speaks the scheme of a URL. Raises if there is no connection."""
    timeout = aiohttp.ClientTimeout(sock_connect=KNOCK_SECONDS, sock_read=KNOCK_SECONDS)
    try:
        async with http.get(url, timeout=timeout, allow_redirects=False, **options) as response:
            return response.status != 400  # is what many TLS servers say to plain HTTP
    except aiohttp.SocketTimeoutError:
        return True  # it is only slow: the connection is there, and TLS if it is https
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        raise
    except aiohttp.ClientError:
        return False


async def knock(http: aiohttp.ClientSession, url: str) -> None:
    """Raise what keeps a server from speaking the scheme of a URL, within seconds.

    A request would try again, wait longer, and blame a firewall: many servers of plain HTTP take
    a TLS handshake for the start of a request, and wait for the rest of it.
    """
    scheme, _, host = url.split("/")[:3]
    other = "http:" if scheme == "https:" else "https:"
    failure: Exception | None = None
    try:
        if await speaks(http, f"{scheme}//{host}/"):
            return
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        failure = error
    with contextlib.suppress(aiohttp.ClientError):
        # With any certificate. Port 80 says nothing of 443: it mostly leads there.
        is_other_port = scheme == "https:" and not re.search(r":\d+$", host)
        if not is_other_port and await speaks(http, f"{other}//{host}/", ssl=False):
            raise Failure(f"it speaks {other[:-1]}, not {scheme[:-1]}. Use {other}//{host}")
    if failure:
        raise failure


# ---------------------------------------------------------------------------------------------
# What the server has: its settings, its state, the model, the sign-in keys.


async def check_settings(config: lf.Config) -> str:
    if not config.sites:
        raise Hint("there are no [[sites]]: only those made through the admin API can chat")
    for site in config.sites:
        if not site.allowed_hosts:
            raise Hint(f"site {site.id} has no allowed_hosts: nobody can chat there")
    return f"{len(config.sites)} site(s)"


def usable_folder(folder: Path) -> str:
    """Return what there is to say of a state folder that cannot be tried, else ""."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise Failure(
            f"{place} belongs to user {place.stat().st_uid} and is no folder that this user can"
            " write to. Run the doctor as the server's user; if it is that one, chown it"
        )
    if place != folder:
        return f"{folder} does not exist yet, the first start makes it"
    try:
        os.close(lf.lock_folder(folder / "leflux.db"))
    except lf.ConfigError:
        return f"{folder} is in use by a running server"
    for path in (folder / "leflux.db", folder / "leflux.db-wal"):
        foreign = path.exists() and path.stat().st_uid != folder.stat().st_uid
        if foreign or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
            raise Failure(
                f"{path} belongs to another user or is read-only. Fix it with"
                f" chown --reference={folder} {path} && chmod 600 {path}"
            )
    return ""


async def try_copy(folder: Path, config: lf.Config) -> str:
    """Do with a copy of the database what the next start will do, so that nothing changes."""
    with tempfile.TemporaryDirectory(prefix="leflux-") as copy:
        for name in ("leflux.db", "leflux.db-wal"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, Path(copy, name))
        try:
            chats = await asyncio.to_thread(lf.check_database, Path(copy, "leflux.db"), config)
        except lf.ConfigError as error:
            problem = str(error).replace(copy, str(folder))
            raise Failure(f"{problem}. Put a backup in its place, or move it away") from None
    return f"{folder} can be written and holds {chats} chat(s)"


async def check_state(config: lf.Config) -> str:
    if not config.server.state_dir:
        raise Hint('server.state_dir is "": chats and changes are lost when the server stops')
    folder = config.folder / config.server.state_dir
    try:
        return usable_folder(folder) or await try_copy(folder, config)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
        raise Failure(f"{problem}. Run the doctor as the server's user, or as root") from None


ABOUT_KEYS = re.compile(
    r"api[ _-]?key|authenticat|unauthori[sz]ed|auth_error|invalid[ _]token|no_db_connection", re.I
)  # the last is what LiteLLM says of a key that it does not know


async def key_is_blamed(http: aiohttp.ClientSession, config: lf.Config) -> bool:
    """Ask once more in the plainest way; whether an error comes that speaks of the key."""
    llm = config.llm
    body = {"model": llm.model, "messages": [{"role": "user", "content": "ok"}], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    url = f"{llm.base_url}/chat/completions"
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with http.post(
            url, json=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            if response.status >= 400 and response.content_type == "application/json":
                said = await lf.read_some(response.content, 65536)
                return ABOUT_KEYS.search(said.decode(errors="replace")) is not None
    return False


async def refusal_words(http: aiohttp.ClientSession, config: lf.Config, problem: str) -> str:
    """Say what the text of a ModelError means."""
    variable = f"${config.llm.api_key_env}"
    found = re.search(r"(?:HTTP |\()([3-5][0-9][0-9])\b", problem)
    status = int(found[1]) if found else 0
    if status == 402 or "insufficient_quota" in problem:
        return "the account is out of credit. Add some at the provider, or lower llm.max_tokens"
    if status == 429:
        return "too many requests for this key (429). Wait, or raise the limit at the provider"
    blamed = status in (401, 403) or ABOUT_KEYS.search(problem)
    if blamed or (400 <= status < 429 and await key_is_blamed(http, config)):
        if not config.api_key:
            return f"it wants a key ({status}), and none is set. Put it into {variable}"
        return f"the key is refused ({status}). Put one into {variable} that may use this model"
    if 300 <= status < 429:
        return (
            f"it does not take the request ({status}). Either llm.model is not known there, or"
            " llm.base_url is not what stands before /chat/completions; it often ends in /v1"
        )
    return f"the provider has a problem ({status or 'in its stream'}). Try again later"


async def hear_model(http: aiohttp.ClientSession, config: lf.Config) -> str:
    """Ask for one word, in the way the server asks; return how the answer came."""
    messages = [{"role": "user", "content": QUESTION}]
    outcome = lf.Completion()
    model = lf.ChatModel(http, config.llm, config.api_key)
    said, first, started = 0, 0.0, time.monotonic()
    try:
        async with asyncio.timeout(MODEL_SECONDS):
            async for piece in model.stream(messages, outcome):
                said += len(piece.strip())
                first = first or time.monotonic() - started
    except TimeoutError:
        seen = f"{said} characters, the first after {first:.0f} s" if said else "no text yet"
        raise Hint(
            f"it is slow: {seen} within {MODEL_SECONDS} s, and no end. Visitors will wait, too;"
            " for the first text, llm.first_text_seconds at most"
        ) from None
    except lf.ModelError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise Failure(
                "it can be reached, but does not answer in time. If it still loads, wait; if it is"
                " only slow, raise llm.first_text_seconds"
            ) from None
        if error.__cause__:
            raise error.__cause__ from None
        raise Failure(await refusal_words(http, config, str(error))) from None
    if outcome.cut_short:
        raise Failure("its answer breaks off. Is llm.max_tokens too low for it?")
    if not said:
        raise Failure(
            "what it answers is no chat completion, perhaps a web page. llm.base_url must be what"
            " stands before /chat/completions, and often ends in /v1"
        )
    return f"answered in {time.monotonic() - started:.1f} s"


async def check_model(http: aiohttp.ClientSession, config: lf.Config) -> str:
    if config.offline:
        return f"the offline guide answers, as ${config.llm.api_key_env} holds no key"
    where = f"{config.llm.model} at {urllib.parse.urlsplit(config.llm.base_url).netloc}"
    with about(where):
        await knock(http, config.llm.base_url)
        return f"{where} {await hear_model(http, config)}"


async def check_sign_in(http: aiohttp.ClientSession, config: lf.Config) -> str:
    url = config.firebase.keys_url
    if not config.firebase.project_id:
        return "off, and so is the admin API (firebase.project_id is empty)"
    cache = lf.KeyCache(http, url)
    host = urllib.parse.urlsplit(url).netloc
    with about(f"the sign-in keys at {host}"):
        await knock(http, url)
        try:
            await cache.keys_for("")
        except lf.ApiError:
            words = "what it answers is not Google's certificates"
            if isinstance(cache.failure, aiohttp.ClientResponseError):
                words = f"it answers {cache.failure.status}"
            elif isinstance(cache.failure, aiohttp.ClientError | OSError):
                raise cache.failure from None
            raise Failure(f"{words}. Is firebase.keys_url right?") from None
    if not config.firebase.admins and not any(site.owners for site in config.sites):
        raise Hint("works, but nobody may use it: firebase.admins and all owners are empty")
    return f"on, with {len(cache.keys)} key(s) of {host}"


# ---------------------------------------------------------------------------------------------
# The way in: what visitors and the pages of the sites meet at a URL.


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    status: int
    headers: Any  # a multidict
    body: Json  # {} if it is no JSON object


async def fetch(
    http: aiohttp.ClientSession, method: str, url: str, headers: Mapping[str, str] | None = None
) -> Fetched:
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with http.request(
        method, url, headers=headers, timeout=timeout, allow_redirects=False
    ) as response:
        raw = await lf.read_some(response.content, 65536)
        return Fetched(response.status, response.headers, lf.parse_object(raw))


def answer_words(answer: Fetched, origin: str = "") -> str:
    """Say what an answer means that is not the one hoped for."""
    status, code = answer.status, answer.body.get("error")
    if code == "host_not_registered" and not answer.body.get("host"):
        return "the Origin header does not arrive. Let the proxy pass it on"
    if code == "host_not_registered":
        return (
            f"the server does not know {origin} (403 host_not_registered). Put its host into"
            " allowed_hosts of the site, and restart the server"
        )
    if code == "rate_limit_exceeded":
        return "too many new chats from this address (429). Wait a minute and ask again"
    if isinstance(code, str):
        return f"the server answers {status} {code[:40]}. Its log may say why"
    if status in (502, 503, 504):
        return (
            f"the proxy answers {status}, as no leflux runs behind it. Start that (systemctl status"
            " leflux), or correct the port that the proxy passes requests to"
        )
    if 300 <= status < 400:
        there = "/".join(answer.headers.get("Location", "").split("/")[:3])
        return f"it redirects ({status}). Ask about {there[:100]} instead"
    return f"HTTP {status}, and not from leflux. Let the proxy pass all paths on to it"


async def check_health(http: aiohttp.ClientSession, url: str) -> str:
    await knock(http, url)
    answer = await fetch(http, "GET", f"{url}/health")
    if answer.status != 200 or answer.body.get("status") != "ok":
        raise Failure(answer_words(answer))
    return "leflux answers"


async def check_model_in_use(http: aiohttp.ClientSession, url: str, config: lf.Config) -> str:
    theirs = (await fetch(http, "GET", f"{url}/health")).body.get("llm")
    ours = "offline" if config.offline else "remote"
    if theirs != ours:
        raise Failure(
            f"the server's is {theirs}, but {ours} by what the doctor was given. Restart the server"
            " after a change, and give the doctor the same file and key"
        )
    return f"the server's is {theirs}, as the settings say"


async def connect(url: str, **options: Any) -> asyncio.StreamWriter:
    """Return a connection that is closing; what it knows of itself stays."""
    host, port = cast(tuple[str, int], lf.parse_origin(url))
    async with asyncio.timeout(REQUEST_SECONDS):
        _, writer = await asyncio.open_connection(host.strip("[]"), port, **options)
    writer.close()
    return writer


def certificate_words(certificate: Mapping[str, str], now: float) -> str:
    """Say how long a certificate is valid; raise Failure if it should have been renewed."""
    begins, ends = (ssl.cert_time_to_seconds(certificate[f"not{at}"]) for at in ("Before", "After"))
    hours = int((ends - now) / 3600)
    left = f"{hours // 24} day(s)" if hours >= 48 else f"{hours} hour(s)"
    if ends - now < (ends - begins) * CERTIFICATE_PART:
        raise Failure(f"it ends in {left}. Renew it, and see why that did not happen")
    return f"valid for {left} more"


async def check_certificate(url: str) -> str:
    writer = await connect(url, ssl=True)
    return certificate_words(writer.get_extra_info("peercert"), time.time())


def address_words(own: str, seen: str, forgeable: bool, proxies: Sequence[lf.Network]) -> str:
    """Judge whom the server takes us for, and whether a forged X-Forwarded-For is believed."""
    own_ip = lf.parse_ip(own)
    fix = (
        "Let the proxy set X-Forwarded-For to $remote_addr, and put the proxy's address alone into"
        " server.trusted_proxies"
    )
    if lf.is_one_of(own_ip, proxies) and (forgeable or seen != str(own_ip)):
        raise Hint(
            f"this machine ({own}) is one of server.trusted_proxies, so what strangers can forge"
            " does not show from here. Run the doctor on another one"
        )
    if forgeable:
        raise Failure(f"a forged X-Forwarded-For is believed, so no limit holds. {fix}")
    if seen == str(own_ip):
        return f"the server sees {seen}, this machine"
    seen_ip = lf.parse_ip(seen) if seen else None
    if seen_ip is None or lf.is_one_of(seen_ip, proxies) or not seen_ip.is_global:
        raise Failure(
            f"the server sees {seen or 'none'} instead of {own}: the proxy's, so all visitors"
            f" share one limit. {fix}"
        )
    return f"the server sees {seen}; that should be this machine as the internet knows it"


async def check_address(http: aiohttp.ClientSession, url: str, config: lf.Config) -> str:
    own = (await connect(url)).get_extra_info("sockname")[0]
    honest = await fetch(http, "GET", f"{url}/health?client")
    forgery = {"X-Forwarded-For": FORGED_ADDRESS}
    forged = await fetch(http, "GET", f"{url}/health?client", forgery)
    seen, believed = (answer.body.get("client") for answer in (honest, forged))
    if not isinstance(seen, str):
        raise Failure(f"the server does not say whom it sees: {answer_words(honest)}")
    return address_words(own, seen, believed == FORGED_ADDRESS, config.server.trusted_proxies)


async def check_widget(http: aiohttp.ClientSession, url: str) -> str:
    answer = await fetch(http, "GET", f"{url}/embed.js")
    if answer.status != 200 or "javascript" not in answer.headers.get("Content-Type", ""):
        raise Failure(answer_words(answer))
    return "embed.js is served"


def check_cors(answer: Fetched, origin: str) -> None:
    """Raise Failure if a browser would keep an answer from the page."""
    allowed = answer.headers.getall("Access-Control-Allow-Origin", [])
    if len(allowed) > 1:
        raise Failure("CORS headers come twice, which no browser takes. Let the proxy add none")
    if allowed not in (["*"], [origin]):
        raise Failure(f"browsers keep the answers from {origin}. Add it to server.cors_origins")


def check_socket_url(ws_url: str, url: str, config: lf.Config) -> None:
    """Raise Failure if pages are told to open their socket where a browser cannot."""
    told, meant = ws_url.replace("ws", "http", 1), config.server.public_url or url
    if url.startswith("https:") and ws_url.startswith("ws:"):
        problem, header = "which browsers refuse from https", "X-Forwarded-Proto"
    elif lf.parse_origin(told) != lf.parse_origin(meant):
        problem, header = "which is another address", "Host and X-Forwarded-Host"
    else:
        return
    raise Failure(
        f"pages are told {ws_url[:100]}, {problem}. Let the proxy send {header}, or set"
        " server.public_url and restart the server"
    )


async def check_socket(
    http: aiohttp.ClientSession, ws_url: str, session_id: str, origin: str
) -> None:
    """Raise Failure if a socket cannot join the session."""
    try:
        async with (
            asyncio.timeout(REQUEST_SECONDS),
            http.ws_connect(ws_url, headers={"Origin": origin}) as ws,
        ):
            # By frame, as a query would be in the proxy's log.
            await ws.send_json({"event": "join_session", "data": {"sessionId": session_id}})
            joined = lf.parse_object((await ws.receive_str()).encode())
    except aiohttp.WSServerHandshakeError as error:
        words = answer_words(Fetched(error.status, error.headers, {}), origin)
        if error.status in (200, 400, 404, 426):
            words = (
                f"it is not upgraded ({error.status}). Let the proxy speak HTTP/1.1 and pass the"
                " headers Upgrade and Connection on at / (see deploy/leflux.nginx.conf)"
            )
        raise Failure(words) from None
    except TypeError:
        raise Failure("it closes at once. The server's log may say why") from None
    if joined.get("event") != "session_joined":
        raise Failure(
            "it does not know the chat. If several servers stand behind the proxy, each site must"
            " stay on one of them (see deploy/leflux.nginx.conf)"
        )


async def check_site(
    http: aiohttp.ClientSession, url: str, config: lf.Config, site: lf.Site
) -> str:
    """Open a chat and its socket as a page of the site would; the chat is deleted again."""
    host, port = site.allowed_hosts[0]
    origin = f"{'http' if host == 'localhost' else 'https'}://{lf.written_host(host, port)}"
    answer = await fetch(http, "POST", f"{url}/api/session/init", {"Origin": origin})
    session_id, ws_url = answer.body.get("sessionId"), answer.body.get("wsUrl")
    if answer.status != 200 or not isinstance(session_id, str) or not isinstance(ws_url, str):
        raise Failure(answer_words(answer, origin))
    deleted = None
    try:
        check_cors(answer, origin)
        check_socket_url(ws_url, url, config)
        with about(f"the WebSocket at {ws_url}"):
            await check_socket(http, ws_url, session_id, origin)
    finally:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            path = f"{url}/api/session/{session_id}"
            deleted = await fetch(http, "DELETE", path, {"Origin": origin})
    if deleted is None or deleted.status != 200:
        raise Failure("the chat could not be deleted again. Let the proxy pass DELETE on")
    return f"{origin} can chat, over {ws_url}"


# ---------------------------------------------------------------------------------------------
# The report and the command line.


async def report(what: str, check: Awaitable[str]) -> bool:
    """Print what a check found, in one line; return whether nothing fails."""
    mark = "ok"
    try:
        words = await check
    except Finding as finding:
        mark, words = finding.mark, str(finding)
    except Exception as error:
        mark, words = Failure.mark, failure_words(error)
    words = "".join(c if c.isprintable() else "?" for c in words)
    print(f"{mark:4}  {what}: {words}", flush=True)
    return mark != Failure.mark


async def check_way_in(http: aiohttp.ClientSession, url: str, config: lf.Config) -> bool:
    """Make the checks of a URL; return whether nothing fails."""
    if not await report(url, check_health(http, url)):
        return False  # the others would only say the same
    well = not url.startswith("https:") or await report("certificate", check_certificate(url))
    well &= await report("model in use", check_model_in_use(http, url, config))
    well &= await report("address", check_address(http, url, config))
    well &= await report("widget", check_widget(http, url))
    for site in [site for site in config.sites if site.allowed_hosts][:MAX_SITES]:
        well &= await report(f"site {site.id}", check_site(http, url, config, site))
    return well


async def run_doctor(config: lf.Config, url: str) -> int:
    """Make all checks, those of a URL too if there is one; return the exit code."""
    async with lf.new_client() as http:
        well = await report("config", check_settings(config))
        well &= await report("state", check_state(config))
        well &= await report("model", check_model(http, config))
        well &= await report("sign-in", check_sign_in(http, config))
        if url:
            well &= await check_way_in(http, url, config)
        else:
            public = config.server.public_url or "https://chat.example.com"
            print(f"hint  proxy: not checked. Add the URL that visitors use: doctor.py {public}")
    return 0 if well else 1


def url_argument(value: str) -> str:
    try:
        return lf.bare_url(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Says what is wrong with a deployment of leflux.")
    default = os.environ.get("LEFLUX_CONFIG") or lf.HERE / "config.toml"
    parser.add_argument("--config", type=Path, default=default, metavar="FILE")
    where = "where visitors reach it: http(s)://host[:port]"
    parser.add_argument("url", nargs="?", default="", type=url_argument, metavar="URL", help=where)
    options = parser.parse_args(arguments)
    logging.disable()  # what it finds, the doctor says itself
    try:
        config = lf.load_config(Path(options.config), os.environ)
        lf.read_knowledge(config)
    except lf.ConfigError as error:
        print("leflux:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return asyncio.run(run_doctor(config, options.url))


if __name__ == "__main__":
    sys.exit(main())
