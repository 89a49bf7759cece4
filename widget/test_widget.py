"""The widget in a real browser, on the demo shop and on pages of its own, against a real server.

python -m pytest widget
"""

from __future__ import annotations

import tomllib
from typing import Any

from conftest import Visit

import leflux_server as lf
from test_leflux_server import FakeModel, Serve

SHIPPED = tomllib.loads((lf.HERE / "config.toml").read_text())
DEMO: dict[str, Any] = SHIPPED["sites"][0]


async def shop(serve: Serve, model: FakeModel | None = None, **config: Any) -> str:
    """Start a server with the demo shop, its siteConfig changed; returns the shop's address."""
    site = {**DEMO, "config": {**DEMO["config"], **config}}
    server = await serve(model, sites=[site])
    return server.url.replace("127.0.0.1", "localhost")


async def test_first_visit(visit: Visit, serve: Serve) -> None:
    """A newcomer opens the demo, opens the chat and asks what Pro costs."""
    page = await visit(await shop(serve))
    await page.click("leflux-widget .launcher")
    await page.fill("leflux-widget textarea", "what does Pro cost?")
    await page.press("leflux-widget textarea", "Enter")
    await page.locator("leflux-widget .bot", has_text="€18 a month").wait_for()
