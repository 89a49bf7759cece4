"""Fixtures of the browser tests: Debian's Chromium, driven by playwright.

The server, its fake model and its log are those of test_leflux_server.py: the real thing on a
real socket. Chromium starts once; each test gets contexts (cookies, storage) of its own.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright

from test_leflux_server import Serve, model, needs, quiet_log, serve

__all__ = ["model", "quiet_log", "serve"]

# Headless and quiet: nothing is looked up or updated over the network.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --remote-debugging-port=0"
).split()
# What Chromium itself complains of when a test cuts a wire, or leaves a page with a socket.
NO_FAULT = re.compile("net::ERR|Failed to load resource|Back-Forward Cache")
Visit = Callable[..., Awaitable[Page]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", action="store_true", help="draw the README's pictures anew")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Chromium; yields the address that playwright connects to."""
    program = needs("chromium", "chromium-browser")
    folder = tmp_path_factory.mktemp("chromium")
    with subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        stderr=subprocess.PIPE,
        text=True,
    ) as browser:
        assert browser.stderr is not None
        for line in browser.stderr:
            if found := re.search(r"DevTools listening on (ws://\S+)", line):
                break
        else:
            pytest.fail("chromium did not start")
        yield found[1]
        browser.kill()


@pytest.fixture
async def visit(chromium: str, serve: Serve) -> AsyncIterator[Visit]:
    """Open pages as visitors: visit(url, width=..., dark=True, ...). Errors of a page fail.

    It names `serve` so that browsers leave before servers do.
    """
    problems: list[str] = []
    async with async_playwright() as playwright, contextlib.AsyncExitStack() as stack:
        browser = await playwright.chromium.connect_over_cdp(chromium)

        async def start(
            url: str, width: int = 1280, height: int = 800, dark: bool = False, **options: Any
        ) -> Page:
            context = await browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                **options,
            )
            stack.push_async_callback(context.close)
            page = await context.new_page()
            page.set_default_timeout(10_000)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on(
                "console",
                lambda line: (
                    problems.append(line.text)
                    if line.type == "error" and not NO_FAULT.search(line.text)
                    else None
                ),
            )
            await page.goto(url)
            return page

        yield start
    assert not problems
