"""The widget in three engines: Chromium, Firefox and WebKit, from Debian's packages.

    python -m pytest widget/test_engines.py -k firefox

Playwright drives Chromium alone, so these speak WebDriver: over HTTP to chromedriver and
WebKitWebDriver (with MiniBrowser, under Xvfb), over Marionette's socket to Firefox itself. The
tables of pages and steps are those of test_widget.py, which tests in depth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from test_owner import OLGA, PASSWORD, TABS, Google, open_office

from test_widget import (  # isort: skip
    BUSY, LINKS, SEEN, SNIPPETS, STEPS, TRAPS, chat_server, does, ends, go, shop, wait,
)  # fmt: skip

from conftest import PATIENCE_SECONDS, FakeModel, Json, KeyServer, Pages, Serve, listening, needs

MINI_BROWSER = next(Path("/usr/lib").glob("*/webkit2gtk-4.1/MiniBrowser"), None)
ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
FIREFOX_PREFS: Json = {
    "app.update.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,#remote-settings-dummy/v1",
}


# ---------------------------------------------------------------------------------------------
# WebDriver: one client, two wires


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def running(port: int, *command: str, **environ: str) -> Iterator[None]:
    """A program that listens on a port, with a home of its own."""
    with subprocess.Popen(
        command,
        env=os.environ | environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # with the browser that it starts
    ) as child:
        deadline = time.monotonic() + 4 * PATIENCE_SECONDS
        while child.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        else:
            child.kill()
            pytest.fail(f"{command[0]} did not start")
        yield
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


@pytest.fixture(scope="session", params=["chromium", "firefox", "webkit"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, str]]:
    """The name of an engine, the port of its driver, and the URL of a session with a window."""
    home, port = tmp_path_factory.mktemp(request.param), free_port()
    wanted: Json = {}
    with contextlib.ExitStack() as stack:
        if request.param == "chromium":
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"]
            binary = needs("chromium", "chromium-browser")
            wanted = {"goog:chromeOptions": {"args": flags, "binary": binary}}
            stack.enter_context(running(port, needs("chromedriver"), f"--port={port}"))
        elif request.param == "firefox":
            prefs = FIREFOX_PREFS | {"marionette.port": port}
            lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});" for k, v in prefs.items()]
            (home / "user.js").write_text("\n".join(lines))
            command = [needs("firefox-esr", "firefox"), "--marionette", "--no-remote", "--headless"]
            command += ["--profile", str(home), "--width=1280", "--height=900"]
            stack.enter_context(running(port, *command, HOME=str(home)))
        else:
            driver, display = needs("WebKitWebDriver"), free_port()
            if MINI_BROWSER is None:
                needs("MiniBrowser")
            screen = f":{display - 6000}"  # its port, the other way round
            quiet = "-screen 0 1600x1200x24 -listen tcp -nolisten unix -ac".split()
            stack.enter_context(running(display, needs("Xvfb"), screen, *quiet))
            homes = dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"), str(home))
            environ = {**homes, "DISPLAY": f"127.0.0.1{screen}", "NO_AT_BRIDGE": "1"}
            stack.enter_context(
                running(port, driver, f"--port={port}", "--host=127.0.0.1", **environ)
            )
            args = ["--automation", "--geometry=1280x900"]
            wanted = {"webkitgtk:browserOptions": {"binary": str(MINI_BROWSER), "args": args}}
        base = f"http://127.0.0.1:{port}/session"
        if wanted:
            data = json.dumps({"capabilities": {"alwaysMatch": wanted}}).encode()
            with urllib.request.urlopen(base, data, timeout=4 * PATIENCE_SECONDS) as made:
                base += "/" + json.load(made)["value"]["sessionId"]
        yield request.param, port, base


PATHS = {  # method and path below /session/{id}
    "WebDriver:Navigate": ("POST", "/url"),
    "WebDriver:ExecuteScript": ("POST", "/execute/sync"),
    "WebDriver:PerformActions": ("POST", "/actions"),
    "WebDriver:SetWindowRect": ("POST", "/window/rect"),
    "WebDriver:GetWindowRect": ("GET", "/window/rect"),
    "WebDriver:DeleteSession": ("DELETE", ""),
}


class Driver:
    """A browser window. Commands have the names of Marionette, and the paths of WebDriver."""

    def __init__(self, name: str, port: int, base: str, http: aiohttp.ClientSession) -> None:
        self.name, self.port, self.base, self.http = name, port, base, http
        self.reader: asyncio.StreamReader | None = None  # of Marionette
        self.number = 0

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        await self._receive()
        await self.command("WebDriver:NewSession", {})

    async def _request(self, method: str, url: str, body: Json | None) -> Any:
        async with self.http.request(method, url, json=body) as response:
            value = (await response.json())["value"]
            assert response.status == 200, value
            return value

    async def _receive(self) -> Any:
        assert self.reader
        length = int((await self.reader.readuntil(b":"))[:-1])
        return json.loads(await self.reader.readexactly(length))

    async def command(self, name: str, data: Json) -> Any:
        if self.reader is None:
            method, path = PATHS[name]
            return await self._request(method, self.base + path, data if method == "POST" else None)
        self.number += 1
        frame = json.dumps([0, self.number, name, data]).encode()
        self.writer.write(str(len(frame)).encode() + b":" + frame)
        while (answer := await self._receive())[1] != self.number:
            pass
        assert answer[2] is None, answer[2]
        return answer[3]["value"] if set(answer[3]) == {"value"} else answer[3]

    async def go(self, url: str) -> None:
        await self.command("WebDriver:Navigate", {"url": url})

    async def js(self, script: str, *args: Any) -> Any:
        """Run a function's body; `root` is the widget's, `all` finds what is visible in it."""
        help = (
            "const root = document.querySelector('leflux-widget')?.shadowRoot,"
            " all = (selector, text) => [...root?.querySelectorAll(selector) || []].filter((one) =>"
            " one.getClientRects().length && (!text || one.innerText.includes(text)));"
        )
        data: Json = {"script": help + script, "args": list(args)}
        if self.reader:
            data["sandbox"] = None
        return await self.command("WebDriver:ExecuteScript", data)

    async def wait(self, script: str, *args: Any) -> Any:
        """Run a function's body until it says something true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with contextlib.suppress(AssertionError):  # the page is being left, say
                if found := await self.js(script, *args):
                    return found
            assert time.monotonic() < deadline, (script, args, await self.log())
            await asyncio.sleep(0.1)

    async def resize(self, width: int, height: int) -> None:
        inside = await self.js("return [innerWidth, innerHeight]")
        rect = await self.command("WebDriver:GetWindowRect", {})
        size = {"width": rect["width"] + width - inside[0]}
        size["height"] = rect["height"] + height - inside[1]
        await self.command("WebDriver:SetWindowRect", size)
        await asyncio.sleep(0.5)

    async def act(self, kind: str, steps: list[Json], **more: Any) -> None:
        actions = [{"type": kind, "id": kind, "actions": steps, **more}]
        await self.command("WebDriver:PerformActions", {"actions": actions})

    async def middle(self, selector: str, text: str = "") -> Json:
        """Where the middle of a visible part of the widget is."""
        x, y = await self.wait(
            "const [one] = all(arguments[0], arguments[1]).slice(-1); if (!one) return null;"
            "one.scrollIntoView({ block: 'nearest' }); const box = one.getBoundingClientRect();"
            "return [Math.round(box.left + box.width / 2), Math.round(box.top + box.height / 2)];",
            selector,
            text,
        )
        return {"duration": 0, "x": x, "y": y, "origin": "viewport"}

    async def click(self, selector: str, text: str = "") -> None:
        move = {"type": "pointerMove", **await self.middle(selector, text)}
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        await self.act("pointer", [move, *press], parameters={"pointerType": "mouse"})

    async def scroll(self, selector: str) -> None:
        turn = {"type": "scroll", "deltaX": 0, "deltaY": 100}
        await self.act("wheel", [{**await self.middle(selector), **turn}])

    async def keys(self, text: str) -> None:
        kinds = ("keyDown", "keyUp")
        strokes = [{"type": kind, "value": letter} for letter in text for kind in kinds]
        await self.act("key", strokes)

    async def open(self) -> Driver:
        await self.click(".launcher")
        await self.wait("return LeFlux.isOpen() && root.activeElement?.localName === 'textarea'")
        return self

    async def ask(self, text: str) -> None:
        await self.click("textarea")
        await self.keys(text + ENTER)

    async def hears(self, text: str) -> None:
        await self.wait(
            "return all('.log .bot', arguments[0]).length && all('.stop').length === 0", text
        )

    async def log(self) -> Any:
        with contextlib.suppress(AssertionError):
            return await self.js("return all('.log > *').map((one) => one.innerText)")


@pytest.fixture
async def browser(engine: tuple[str, int, str], serve: Serve) -> AsyncIterator[Driver]:
    name, port, base = engine
    async with aiohttp.ClientSession() as http:
        driver = Driver(name, port, base, http)
        if name == "firefox":
            await driver.connect()
        await driver.resize(1280, 800)
        yield driver
        await driver.go("about:blank")
        if name == "firefox":
            await driver.command("WebDriver:DeleteSession", {})
            driver.writer.close()


# ---------------------------------------------------------------------------------------------
# What a visitor does


async def test_visit(browser: Driver, serve: Serve) -> None:
    """A price, the way to another page, a form that is filled in and sent after a yes."""
    await browser.go(await shop(serve))
    await browser.open()
    await browser.ask("What does Pro cost?")
    await browser.hears("€18 a month")
    await browser.ask("Take me to contact")
    await browser.wait("return location.pathname === '/contact'")
    await browser.hears("Done.")
    await browser.ask("Send a message that I love your coffee, I'm Ada, ada@example.com")
    await browser.wait("return all('.confirm').length")
    focus = "const one = root.activeElement; return getComputedStyle(one).outlineStyle"
    assert await browser.js(f"{focus} + one.innerText") == "solidNo"  # it can be seen where it is
    values = "return ['name', 'email'].map((id) => document.getElementById(id).value)"
    assert await browser.js(values) == ["Ada", "ada@example.com"]
    await browser.click(".choices button:first-child:enabled")
    await browser.wait("return document.querySelector('#sent').innerText.includes('Thank you!')")
    await browser.click("[aria-label='Close the chat']")
    await browser.wait("return !LeFlux.isOpen()")


async def trapped(browser: Driver, serve: Serve, pages: Pages) -> AsyncIterator[str]:
    """Open the chat over each kind of modal that keeps focus and wheel to itself."""
    await chat_server(serve, pages)
    for kind, trap in TRAPS.items():
        tag = "dialog" if kind == "native" else "div"
        box = f"<{tag} role=dialog id=box><input id=field></{tag}><script>{trap}</script>"
        box += "<script>var left = 0; field.addEventListener('focusout', () => left++)</script>"
        await browser.go(pages.add(f"/{kind}", box))
        await browser.wait("return window.LeFlux?.isReady()")
        await browser.js("field.focus()")
        await asyncio.sleep(0.6)  # the chat follows into a native dialog
        await browser.open()
        yield kind


async def test_keyboard_and_traps(browser: Driver, serve: Serve, pages: Pages) -> None:
    """A modal of the page leaves the chat its keys."""
    async for kind in trapped(browser, serve, pages):
        await browser.keys("Hello")
        await browser.click("textarea")
        await browser.keys("!")
        values = await browser.js("return [all('textarea')[0].value, field.value, window.left]")
        assert values == ["Hello!", "", 1], kind  # the field knows that it is left
        await browser.keys(ESCAPE)
        await browser.wait("return !LeFlux.isOpen()")
        assert await browser.js("return Boolean(document.querySelector('#box'))")


async def test_wheel_and_traps(browser: Driver, serve: Serve, pages: Pages) -> None:
    """A modal of the page leaves the chat its wheel."""
    if browser.name == "webkit":
        pytest.skip("WebKit's driver turns no wheel")
    async for _ in trapped(browser, serve, pages):
        await browser.js("root.querySelector('.log').firstChild.style.height = '2000px'")
        await browser.scroll(".log")
        await browser.wait("return root.querySelector('.log').scrollTop > 0")
        await browser.js("LeFlux.close()")
        await browser.wait("return !LeFlux.isOpen()")


@pytest.mark.parametrize("size", [(1280, 800), (390, 700)], ids=["desktop", "phone"])
async def test_layouts(browser: Driver, serve: Serve, pages: Pages, size: tuple[int, int]) -> None:
    """In each layout the panel is inside the window, and nothing in it is wider than it."""
    for layout in ("floating", "bottom-bar", "side-panel"):
        config = {"layout": layout, "greeting": "word " * 40, "siteName": "A house of long names"}
        await chat_server(serve, pages, config=config)
        await browser.go(pages.add("/", "<main>Hello</main>"))
        await browser.resize(*size)
        await browser.open()
        await browser.wait("return all('.panel')[0].getAnimations().length === 0")  # it has risen
        left, top, right, bottom = await browser.js(
            "const box = all('.panel')[0].getBoundingClientRect();"
            "return [box.left, box.top, innerWidth - box.right, innerHeight - box.bottom]"
        )
        assert min(left, top, right, bottom) >= -1, (layout, left, top, right, bottom)
        wider = "return all('.panel, .log, .bar, form, .bot').map((one) =>"
        assert max(await browser.js(wider + " one.scrollWidth - one.clientWidth)")) <= 0
        if size[0] < 500:
            assert max(left, top, right, bottom) <= 1


# ---------------------------------------------------------------------------------------------
# What the agent sees and does, and what the page's author is told


async def test_sight_and_steps(
    browser: Driver, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """In every engine the same elements are seen, with the same states; each step does what a
    visitor would have done, or says why not."""
    server = await chat_server(serve, pages, model, limits={"chat_per_minute": 60})
    await browser.go(pages.add("/", BUSY.replace(LINKS, "")))
    await browser.open()
    await browser.ask("Hello")
    await browser.hears("ok")
    [session] = server.app.sessions.values()
    elements = {one.get("text", ""): one for one in session.context["indexedElements"]}
    for name, wanted in SEEN.items():
        if wanted is None:
            assert name not in elements
        else:
            found = {**elements[name], "href": str(elements[name].get("href")).split(pages.url)[-1]}
            assert wanted.items() <= found.items(), name

    await browser.js("window.field = (name) => document.querySelector(`[aria-label=${name}]`)")
    for number, (step, effect, error) in enumerate(STEPS):
        model.scripts += [does(step, wait(0)), ends(f"At {number}.")]
        await browser.js("LeFlux.send('Go on')")
        await browser.hears(f"At {number}.")
        said = "const said = document.querySelector('#log').textContent; return "
        assert await browser.js(said + effect), step
        outcome = model.requests[-1]["messages"][-1]["content"]
        assert error in outcome, (step, outcome)
        assert (": failed: " in outcome) is bool(error), (step, outcome)
    links = "return all('.bot a').map((one) => one.innerText)"
    assert await browser.js(links) == ["Elsewhere", "Pops up", "Pops up inside"]


async def test_published_snippets(
    browser: Driver, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """Methods and events of window.LeFlux in every engine."""
    await chat_server(serve, pages, model)
    await browser.go(pages.add("/", f"{SNIPPETS}<main><a href='#next'>Further</a></main>"))
    await browser.wait("return window.LeFlux?.isReady()")
    model.scripts += [does(go("/#next")), ends("There.")]
    await browser.js("LeFlux.dock(), LeFlux.send('Go'), 0")
    await browser.hears("There.")
    await browser.js("LeFlux.undock(), LeFlux.close(), LeFlux.setVisitorData(null), 0")
    await browser.wait("return !LeFlux.isOpen()")
    state = await browser.js("return LeFlux.getState()")
    assert state["conversation"] == "idle"
    assert state["sessionId"] == await browser.js("return LeFlux.getSessionId()")
    await browser.js("LeFlux.destroy(), LeFlux.open(), 0")
    names = {name for name, _ in await browser.js("return window.heard")}
    wanted = "ready open close expand collapse message reply typing-start typing-end state-change"
    wanted += " action navigating language-detected task_complete destroy on"
    assert names == set(wanted.split())
    assert await browser.js("return document.querySelector('leflux-widget')") is None


# ---------------------------------------------------------------------------------------------
# What an owner does


async def test_owner_page(
    browser: Driver, serve: Serve, key_server: KeyServer, model: FakeModel
) -> None:
    """Sign-in, a colour in the preview while one types, and every tab, by keyboard."""
    google = Google()
    async with listening(google.answer) as google.url:
        server = await open_office(serve, key_server, google, model)
        await (await server.visitor("http://localhost")).ask()
        await browser.go(f"{server.url}/owner#/shop/looks")
        await browser.wait("return document.activeElement.autocomplete === 'username'")
        await browser.keys(OLGA + TAB + PASSWORD + ENTER)
        await browser.wait("return document.querySelector('iframe')")
    bar = """const frame = document.querySelector('iframe')?.contentDocument;
        const bar = frame?.querySelector('leflux-widget')?.shadowRoot.querySelector('.bar');
        return bar && getComputedStyle(bar).backgroundColor === arguments[0];"""
    await browser.wait(bar, "rgb(138, 75, 42)")
    field = "const field = document.querySelector('input[type=color]').previousSibling;"
    await browser.js(f"{field} field.focus(); field.select();")
    await browser.keys("#006400")
    await browser.wait(bar, "rgb(0, 100, 0)")
    assert await browser.js(f"{field} return document.activeElement === field && field.value")
    await browser.keys(ENTER)
    await browser.wait("return document.querySelector('.told').innerText.includes('Saved.')")
    assert server.app.sites["shop"].config["primaryColor"] == "#006400"
    for tab in TABS:
        await browser.js("location.hash = `#/shop/${arguments[0]}`", tab)
        title = "return document.querySelector('h2').innerText.toLowerCase() === arguments[0]"
        await browser.wait(title, tab)
        alert = "document.querySelector('main > [role=alert]:not([hidden])')"
        wide = "document.documentElement.scrollWidth > innerWidth"
        assert await browser.js(f"return [{alert}, {wide}]") == [None, False]
        if tab == "conversations":
            await browser.js("document.querySelector('.line').focus()")
            await browser.keys(ENTER)
            await browser.wait("return document.querySelector('dialog li')")
            await browser.keys(ESCAPE)
            await browser.wait("return document.activeElement.matches('.line')")
