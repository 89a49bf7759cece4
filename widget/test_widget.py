"""The widget in a real browser, on the demo shop and on pages of its own, against a real server.

What it does is tested here, how it looks in test_look.py.

    python -m pytest widget
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import re
import signal
import socket
import time
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright import async_api as api
from playwright.async_api import Locator, Page, Route, WebSocket, expect

import leflux_server as lf

from conftest import (  # isort: skip
    FakeModel, Json, Pages, Request, Script, Serve, Server, Visit, act, chunk, cut_wire,
    forever, marked, program, sse, until, with_config,
)  # fmt: skip

SHIPPED = tomllib.loads((lf.HERE / "config.toml").read_text())
DEMO: Json = SHIPPED["sites"][0]


# ---------------------------------------------------------------------------------------------
# Helpers: pages on a server of their own, a model that names elements, a visitor who chats.


Answerer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def says(message: str, **action: Any) -> list[bytes]:
    """A script of the model that says something and, with a type, does something."""
    reply = {"message": message, "action": action or None}
    return [sse(chunk(json.dumps(reply)), "[DONE]")]


def does(*steps: Json, message: str = "On it.") -> Answerer:
    """A script that carries out steps; "on" names an element by words of its line."""

    async def answer(request: web.Request) -> web.StreamResponse:
        messages = (await request.json())["messages"]
        prompt = "\n".join(message["content"] for message in messages)
        plan = [dict(step) for step in steps]
        for step in plan:
            if "on" in step:
                lines = re.findall(r"^\[(\d+)\] (.*)$", prompt, re.M)
                name = step.pop("on")
                found = [int(number) for number, line in lines if name in line]
                assert found, (name, prompt)
                step["elementId"] = found[0]
        action: Json = {"type": "execute_generic_sequence", "steps": plan}
        if len(plan) == 1 and plan[0]["action"] in ("click", "navigate"):
            kind = {"click": "click_element", "navigate": "navigate"}[plan[0]["action"]]
            action = {**plan[0], "type": kind}
        return web.Response(body=says(message, **action)[0], content_type="text/event-stream")

    return answer


def ends(summary: str) -> list[bytes]:
    return says("", type="task_complete", summary=summary)


def gives_up(reason: str) -> list[bytes]:
    return says("", type="abort_workflow", reason=reason)


def asks(question: str, **field: str) -> list[bytes]:
    return says("", type="ask_user", question=question, **{"field_type": "text", **field})


def click(name: str) -> Json:
    return {"action": "click", "on": name}


def fill(name: str, text: str, action: str = "type") -> Json:
    return {"action": action, "on": name, "inputData": text}


def wait(milliseconds: int) -> Json:
    return {"action": "wait", "waitDuration": milliseconds}


def go(url: str) -> Json:
    return {"action": "navigate", "url": url}


ADD = "<main><button onclick='this.after(`+`)'>Add</button></main>"
MAIN = "<main><h1>Hi</h1>%s</main>"


class Guest:
    """A visitor with an open chat, and everything that their browser sends and hears."""

    def __init__(self, page: Page, model: FakeModel | None = None) -> None:
        self.page, self.model = page, model
        self.said: list[Json] = []
        self.heard: list[Json] = []
        self.joins: list[str] = []  # addresses of its sockets
        self.posts: list[Json] = []
        self.contexts: list[Json] = []  # pictures of the page, as they went out
        page.on("websocket", self._on_socket)
        page.on("request", self._on_request)

    def _on_socket(self, ws: WebSocket) -> None:
        self.joins.append(ws.url)
        ws.on("framesent", lambda frame: self._on_frame(json.loads(frame)))
        ws.on("framereceived", lambda frame: self.heard.append(json.loads(frame)))

    def _on_frame(self, frame: Json) -> None:
        self.said.append(frame)
        if "context" in frame["data"]:
            self.contexts.append(frame["data"]["context"])

    def _on_request(self, request: api.Request) -> None:
        if request.url.endswith("/api/chat") and request.method == "POST":
            self.posts.append(json.loads(request.post_data or ""))
            self.contexts.append(self.posts[-1]["pageContext"])

    async def open(self) -> Guest:
        await self.page.click("leflux-widget .launcher")
        return self

    async def ask(self, text: str, *scripts: Script, hears: str = "") -> None:
        """Say something, to which the model has these scripts, and wait for an answer perhaps."""
        if scripts:
            assert self.model
            self.model.scripts.extend(scripts)
        await self.page.fill("leflux-widget textarea", text)
        await self.page.press("leflux-widget textarea", "Enter")
        if hears:
            await self.hears(hears)

    def see(self, selector: str, text: str | re.Pattern[str] | None = None) -> Locator:
        return self.page.locator(f"leflux-widget {selector}", has_text=text)

    async def hears(self, text: str) -> None:
        """Wait for a bubble of the agent, and for the end of its turn."""
        await self.see(".log .bot", text).last.wait_for()
        await expect(self.see(".stop")).to_be_hidden()

    async def log(self) -> list[str]:
        """The bubbles of the conversation, as "user: text"."""
        lines: list[str] = await self.page.evaluate(
            """() => [...document.querySelector("leflux-widget").shadowRoot
                .querySelectorAll(".log > :not(.chips)")].map((node) =>
                    `${node.className.split(" ")[0]}: ${node.innerText.trim()}`)"""
        )
        return lines

    def sent(self, event: str) -> list[Json]:
        return [frame["data"] for frame in self.said if frame["event"] == event]

    def results(self) -> list[Json]:
        """What was reported on actions and sequences."""
        return [
            frame["data"]["result"]
            for frame in self.said
            if frame["event"] in ("action_complete", "sequence_complete")
        ]

    @property
    def context(self) -> Json:
        """The picture of the page that went out last."""
        return self.contexts[-1]


Meet = Callable[..., Any]


async def chat_server(
    serve: Serve, pages: Pages, model: FakeModel | None = None, **tables: Any
) -> Server:
    """A server whose site is localhost, with a siteConfig; the pages load the widget from it."""
    config = {"greeting": "Hello!", **tables.pop("config", {})}
    site = {"id": "site", "name": "Site", "allowed_hosts": ["localhost"], "config": config}
    server = await serve(model, sites=[site], **tables)
    pages.server = server.url
    return server


@pytest.fixture
async def server(request: Request, serve: Serve, model: FakeModel, pages: Pages) -> Server:
    """A server with a fake model, whose site the pages are."""
    return await chat_server(serve, pages, model, **marked(request, "config"))


@pytest.fixture
def meet(visit: Visit, server: Server, model: FakeModel, pages: Pages) -> Meet:
    """A guest with an open chat at an address, or on a page with this body.

    meet("<main>Hello</main>", script="data-consent", before="a script", width=390)
    """

    async def start(
        page: str = "<main>Hello</main>",
        script: str = "async",
        before: str = "",
        policy: str = "",
        **options: Any,
    ) -> Guest:
        if not page.startswith("http"):
            headers = {"Content_Security_Policy": policy} if policy else {}
            page = pages.add("/", page, script, **headers)
        tab = await visit("about:blank", **options)
        await tab.add_init_script(before)
        guest = Guest(tab, model)
        await tab.goto(page)
        return await guest.open()

    return start


async def shop(serve: Serve, model: FakeModel | None = None, **config: Any) -> str:
    """Start a server with the demo shop, its siteConfig changed; returns the shop's address."""
    site = {**DEMO, "config": {**DEMO["config"], **config}}
    server = await serve(model, sites=[site])
    return server.url.replace("127.0.0.1", "localhost")


# ---------------------------------------------------------------------------------------------
# Mount


async def test_tags(visit: Visit, pages: Pages, server: Server) -> None:
    """What a page calls before the chat is there is done once it is; a second tag does nothing."""
    early = """<script>
        new MutationObserver((_, observer) => {
          if (!window.LeFlux) return;
          observer.disconnect();
          LeFlux.on("leflux:reply", ({ detail }) => { window.heard = detail.text; });
          LeFlux.send("Sent early");
        }).observe(document, { childList: true, subtree: true });
    </script>"""
    guest = Guest(await visit(pages.add("/", f"{early}<button>Press</button>", script="")))
    await guest.hears("ok")
    assert await guest.page.evaluate("heard") == "ok"
    await guest.page.add_script_tag(url=f"{server.url}/embed.js")
    assert await guest.page.locator("leflux-widget").count() == 1
    assert len(server.app.sessions) == 1


async def test_unknown_hosts_are_left_alone(visit: Visit, pages: Pages, server: Server) -> None:
    """On a page that is not registered the widget leaves no trace but one line in the console;
    so does embed.js from the website's own address, where it finds no server."""
    page = await visit("about:blank")
    lines, tries = list[str](), list[str]()
    page.on("console", lambda line: lines.append(line.text))
    page.on("request", lambda request: tries.append(request.url))
    await page.goto(pages.add("/", "<p>Just a page</p>").replace("localhost", "127.0.0.1"))
    await until(lambda: any("allowed_hosts" in line for line in lines))
    [line] = [line for line in lines if "Failed to load resource" not in line]
    assert "127.0.0.1" in line
    assert await page.evaluate("window.LeFlux") is None
    assert await page.evaluate("document.documentElement.children.length") == 2
    assert "leflux-widget" not in await page.content()

    path = lf.HERE / "widget" / "embed.js"
    await page.route("**/copied.js", lambda route: route.fulfill(path=path))
    await page.goto(pages.add("/", '<script src="/copied.js"></script>'))
    await until(lambda: sum(one == f"{pages.url}/api/session/init" for one in tries) == 3)
    said = [line for line in lines if line.startswith("leflux: ") and pages.url in line]
    assert len(said) == 1


# ---------------------------------------------------------------------------------------------
# Chat

TEXT = "Some **bold** and [a link](/prices).\n\nسعر"  # its marks: see test_look.py


async def test_streamed_answer(meet: Meet, model: FakeModel, pages: Pages) -> None:
    """An answer grows in its bubble while the model speaks, and can be stopped."""
    guest = await meet()
    start, end = (json.dumps(part)[1:-1] for part in (TEXT[:20], TEXT[20:]))
    pieces = [sse(chunk('{"message": "' + start)), sse(chunk(end + '"}'), "[DONE]")]
    await guest.ask("Show me **everything**", [model.at_gate, pieces[0], model.at_gate, pieces[1]])
    assert await guest.see(".user").inner_text() == "Show me **everything**"
    await guest.see(".dots").wait_for()
    await guest.see(".stop").wait_for()
    model.gate.release()
    bubble = guest.see(".log > .bot").last
    await expect(bubble.locator("strong")).to_have_text("bold")
    await expect(guest.see(".dots")).to_have_count(0)
    await expect(guest.see(".stop")).to_be_visible()
    model.gate.release()
    await expect(guest.see(".stop")).to_be_hidden()
    link = f'<a href="{pages.url}/prices" rel="noopener nofollow">a link</a>'
    assert await bubble.inner_html() == (
        f'<p dir="auto">Some <strong>bold</strong> and {link}.</p><p dir="auto">سعر</p>'
    )

    await guest.ask("Tell me more", [sse(chunk('{"message": "This goes on')), forever])
    await guest.see(".bot", "This goes on").wait_for()
    await guest.see(".stop").click()
    await until(lambda: guest.heard[-1]["event"] == "message_done")
    await expect(guest.see(".stop")).to_be_hidden()
    assert (await guest.log())[-1] == "bot: This goes on"
    assert guest.sent("stop")
    await until(lambda: model.hung_up)

    await guest.ask("Once more", [sse(chunk('{"message": "Long')), forever])
    await guest.see(".bot", "Long").wait_for()
    await guest.ask("Never mind", hears="ok")  # settles the answer before
    wanted = ["user: Once more", "bot: Long", "user: Never mind", "bot: ok"]
    assert (await guest.log())[-4:] == wanted


HOSTILE = [
    "<img src=x onerror='window.hit = 1'><script>window.hit = 2</script>",
    "[click](javascript:window.hit=3) [click]( javascript:window.hit=4) [x](JaVaScRiPt&colon;hit)",
    "[a](data:text/html,<script>hit</script>) [b](vbscript:x) [c](java\tscript:window.hit=5)",
    '[d](https://x.example/"onclick="window.hit=6) **<b onclick=hit>** `<svg onload=hit>`',
    # With numbers, as a reply that repeats itself is cut.
    "".join(f"{mark}{number}" for mark in ("[", "**", "`", "_a") for number in range(1501)),
    "".join(f"- {number} " for number in range(1500)),
    "https://" + "".join(f"a{number}." for number in range(1500)),
    "\u202e <style>*{display:none}</style> &lt;script&gt;",
]


async def test_hostile_reply(meet: Meet) -> None:
    """Whatever a model says is text: nothing runs, nothing is slow, and no link is a script."""
    guest = await meet()

    def count(event: str, wanted: int) -> bool:
        return [frame["event"] for frame in guest.heard].count(event) == wanted

    texts = "title name q a body description icon price period cta_label cta_url url".split()
    for number, text in enumerate(HOSTILE):
        card = {**dict.fromkeys(texts, text[:300]), "features": [text[:300], 7, None]}
        data = {"items": [card, "not an object", None, {**card, "cta_action": text}]}
        block = {"block_type": list(lf.BLOCKS)[number % 4], "data": data}
        await guest.ask("Attack", says(text, type="render_ui_block", **block))
        await until(functools.partial(count, "ui_block", number + 1))
        await guest.ask("And again", says(text, type="ask_user", question=text, field_type=text))
        await until(functools.partial(count, "message", number + 1))
    await expect(guest.see(".stop")).to_be_hidden()
    found: list[str] = await guest.page.evaluate(
        """() => [...document.querySelector("leflux-widget").shadowRoot
            .querySelectorAll(".log > .bot, .log > .bot *")].flatMap((node) => [node.localName,
            ...[...node.attributes].map((a) => `${a.name}=${a.value}`)])"""
    )
    tags = set("div a br code em li ol p pre span strong ul".split())
    assert {name for name in found if "=" not in name} <= tags
    names = {name.partition("=")[0] for name in found if "=" in name}
    assert names <= {"class", "dir", "href", "rel", "target", "start", "tabindex"}
    assert not [name for name in found if re.match(r"href=(?!https?://)", name)]
    for link in await guest.see(".log a").all():
        await link.dispatch_event("click", {"ctrlKey": True})
    assert await guest.page.evaluate("window.hit") is None


PLANS: list[Json] = [
    {"name": "Pro", "price": "€18", "period": "a month", "highlighted": True}
    | {"features": ["Two bags", "Post"], "cta_label": "Choose Pro", "cta_action": "I want Pro"},
    {"name": "Free", "cta_label": "Begin", "cta_url": "https://other.example/"},
]
CARDS: dict[str, tuple[list[Json], str]] = {  # of each type of block, and what is seen of them
    "pricing_cards": (PLANS, "Pro\n€18 a month\nTwo bags\nPost\nChoose Pro\nFree\nBegin"),
    "feature_grid": (
        [{"title": "Fast", "body": "It is **fast**.", "icon": "🚀"}],
        "🚀\nFast\nIt is fast.",
    ),
    "faq_list": ([{"q": "When?", "a": "Now."}], "When?"),
    "link_cards": (
        [{"title": "Prices", "url": "/prices", "description": "All of them"}],
        "Prices\nAll of them",
    ),
}


async def test_questions_and_blocks(meet: Meet, pages: Pages) -> None:
    """A question brings the right keyboard; all four blocks are shown as cards, and read out."""
    guest = await meet()
    area = guest.see("textarea")
    for kind, mode in {"email": "email", "tel": "tel", "number": "decimal", "x": "text"}.items():
        question = asks(f"Your {kind}?", field_name=kind, field_type=kind)
        await guest.ask("Go on", question, hears=f"Your {kind}?")
        assert await area.evaluate("node => node.inputMode") == mode
        await expect(area).to_be_focused()
    await guest.ask("Ada")
    assert await area.evaluate("node => node.inputMode") == "text"
    await guest.hears("ok")

    for block_type, (items, shown) in CARDS.items():
        block = {"block_type": block_type, "data": {"items": items}}
        await guest.ask("Show me", says("Look:", type="render_ui_block", **block))
        await guest.see(".cards", shown.split("\n")[0]).wait_for()
        assert re.sub(r"\n+", "\n", await guest.see(".cards").last.inner_text()) == shown
        await expect(guest.see(".stop")).to_be_hidden()
    await guest.see("summary").click()
    await guest.see(".card", "Now.").wait_for()
    assert await guest.see("a.card").get_attribute("href") == f"{pages.url}/prices"
    tab = guest.see(".card a", "Begin")
    assert await tab.get_attribute("href") == "https://other.example/"
    assert await tab.get_attribute("target") == "_blank"
    await expect(guest.see(".card.highlighted h3")).to_have_text("Pro")
    await guest.see(".card button", "Choose Pro").click()
    await guest.see(".user", "I want Pro").wait_for()
    await guest.hears("ok")

    # Without a message it is announced; what is no text in it is left out.
    data = {"items": ["no card", {"title": "New", "body": "Cheap", "icon": None}]}
    block = {"block_type": "feature_grid", "data": data}
    await guest.ask("Why you?", says("", type="render_ui_block", **block))
    await guest.see(".cards", "Cheap").wait_for()
    await expect(guest.see(".quiet[aria-live]")).to_contain_text("New")
    await expect(guest.see(".cards").last.locator(".card")).to_have_count(1)


async def test_confirmation(meet: Meet, model: FakeModel) -> None:
    """A delicate click waits for the visitor's yes; no, or another message, means no.

    The keyboard's focus goes to the careful answer, and back to the input once it is given.
    """
    guest = await meet("<main><button onclick='this.after(`gone `)'>Delete it</button></main>")
    shown, enabled = guest.see(".confirm button:visible"), guest.see(".confirm button:enabled")
    await guest.ask("Delete it", does(click("Delete it")))
    await guest.see(".confirm", "Shall I click “Delete it”?").wait_for()
    await expect(guest.page.get_by_role("group", name="Shall I click")).to_be_visible()
    await expect(guest.page.get_by_role("button", name="No")).to_be_focused()
    await guest.page.keyboard.press("Shift+Tab")
    await expect(guest.see(".confirm .accent")).to_be_focused()
    for key in ("Tab", "Enter"):
        await guest.page.keyboard.press(key)
    await guest.hears(lf.ENGLISH("not_confirmed"))
    await expect(guest.see("textarea")).to_be_focused()
    await expect(shown).to_have_text(["No"])
    await expect(enabled).to_have_count(0)
    assert await guest.page.inner_text("main") == "Delete it"

    # Both are still of the current turn, which a reload hears again: once each, and no button.
    before = await guest.log()
    await guest.page.reload()
    await guest.see(".confirm").wait_for()
    await guest.see(".bot", lf.ENGLISH("not_confirmed")).wait_for()
    await expect(enabled).to_have_count(0)
    bubbles = [line for line in before if not line.startswith("confirm")]
    assert [line for line in await guest.log() if not line.startswith("confirm")] == bubbles
    await expect(guest.see(".confirm")).to_have_count(1)

    await guest.ask("Delete it, really", does(click("Delete it")))
    await enabled.first.click()
    model.scripts.append(ends("It is deleted."))
    await guest.hears("It is deleted.")
    assert await guest.page.inner_text("main") == "Delete itgone"
    assert guest.results()[-1]["success"] is True

    await guest.ask("And again", does(click("Delete it")))
    await expect(enabled).to_have_count(2)
    await guest.ask("No, tell me a joke")
    await expect(enabled).to_have_count(0)
    await guest.hears("ok")
    assert await guest.page.inner_text("main") == "Delete itgone"


WHICH = "Shall it be the **red** one?"
WHICH_SHOWN = "bot: Shall it be the red one?"
YES = {"confirm_label": "Red", "cancel_label": "Neither"}
PRESS = {"type": "click_element", "elementId": 1}
FAQ = {"block_type": "faq_list", "data": {"items": [{"q": "Why?", "a": "So."}]}}
ENDS: dict[str, tuple[Json, list[str]]] = {  # what ends a turn of text, and what is seen beside it
    "the text alone": ({}, []),
    "question": ({"type": "ask_user", "question": "Say yes."}, ["bot: Say yes."]),
    "question in the same words": ({"type": "ask_user", "question": WHICH}, []),
    "end": ({"type": "task_complete", "summary": "All done."}, ["bot: All done."]),
    "end in the same words": ({"type": "task_complete", "summary": WHICH}, []),
    "block": ({"type": "render_ui_block", **FAQ}, ["cards: Why?"]),
    "confirmation": (
        {"type": "confirmation_required", "message": "Yes?", "pending_action": PRESS, **YES},
        ["confirm: Yes? Red Neither"],
    ),
    "confirmation in the same words": (
        {"type": "confirmation_required", "message": WHICH, "pending_action": PRESS, **YES},
        ["confirm: Red Neither"],
    ),
}


REPLIES = """window.replies = []; addEventListener('leflux:reply',
    ({ detail }) => replies.push(`bot: ${detail.text.replaceAll('*', '')}`))"""


async def test_what_follows_a_text(meet: Meet) -> None:
    """The event after a turn's text has a bubble of its own, none for the same words.

    A reload shows the same, and is no news.
    """
    for action, more in ENDS.values():
        guest = await meet("<main><button>Red</button></main>", before=REPLIES)
        wanted = ["bot: Hello!", "user: Go", WHICH_SHOWN, *more]
        replies = [re.sub("^confirm: (.*[?]).*", r"bot: \1", line) for line in wanted[2:]]
        replies = [line for line in replies if line.startswith("bot: ")]
        await guest.ask("Go", act(WHICH, action or None))
        for heard in (replies, []):
            await expect(guest.see(".log > :not(.chips)")).to_have_count(len(wanted))
            await expect(guest.see(".stop")).to_be_hidden()
            assert [" ".join(line.split()) for line in await guest.log()] == wanted
            assert await guest.page.evaluate("replies") == heard
            if heard:
                await guest.page.reload()
                await until(functools.partial(guest.sent, "update_context"))  # replays come before


async def test_text_before_a_plan(meet: Meet, model: FakeModel) -> None:
    """Between a turn's text and its plan the agent is still at work, and takes no focus."""
    guest = await meet(ADD.replace("<main>", "<main><input aria-label='City'>"))
    await guest.see(".stop").evaluate(
        """(stop) => { window.seen = [];
            new MutationObserver(() => seen.push(!stop.hidden)).observe(stop, { attributes: true });
            document.querySelector("input").addEventListener("blur", () => seen.push("blur")); }"""
    )
    bremen = does(fill("City", "Bremen"), message="First the city.")
    await guest.ask("Fill it in", bremen, [model.at_gate, *says("That is it.")])
    await until(guest.results)
    wanted = ["user: Fill it in", "bot: First the city.", "bot: The assistant is working"]
    assert await guest.log() == ["bot: Hello!", *wanted]
    model.gate.release()
    await guest.hears("That is it.")
    await expect(guest.see("textarea")).to_be_focused()
    assert await guest.page.evaluate("seen") == [True, "blur", False]

    # Stopped in its text, a turn has no plan.
    plan = json.dumps({"message": "I add one.", "action": PRESS | {"elementId": 2}})
    start, end = plan.split(" one", 1)
    pieces = [sse(chunk(start)), model.at_gate, sse(chunk(f" one{end}"), "[DONE]")]
    await guest.ask("Add one", pieces)
    await guest.see(".bot", "I add").wait_for()
    await guest.see(".stop").click()
    await until(lambda: guest.heard[-1]["event"] == "message_done")
    model.gate.release()
    await guest.ask("Hello?", says("Here."), hears="Here.")
    assert (await guest.log())[-4:] == ["user: Add one", "bot: I add", "user: Hello?", "bot: Here."]
    assert (await guest.page.inner_text("main")).strip() == "Add"


# The socket breaks after each message_done: what follows comes with the next one.
BREAKING = """
    const { set } = Object.getOwnPropertyDescriptor(WebSocket.prototype, "onmessage");
    Object.defineProperty(WebSocket.prototype, "onmessage", { set(hear) {
      set.call(this, (event) => {
        hear(event);
        if (event.data.includes('"message_done"')) this.close();
      });
    } });
"""


async def test_cut_wire_before_the_end(meet: Meet) -> None:
    """When the socket breaks between a turn's text and what follows, that comes once, too."""
    guest = await meet(ADD, before=BREAKING)
    plan, end = does(click("Add"), message="I add one."), says("Now?", **ENDS["end"][0])
    await guest.ask("Add one", plan, end, hears="All done.")
    question = says(WHICH, **ENDS["question in the same words"][0])
    await guest.ask("And now?", question, hears="Shall it be")
    await until(lambda: len(guest.joins) == 4)
    await guest.ask("No", asks(WHICH))  # asked once more
    await expect(guest.see(".bot", "Shall it be")).to_have_count(2)
    said = ["Hello!", "I add one.", "Now?", "All done."]
    added = [f"bot: {text}" for text in said]
    added.insert(1, "user: Add one")
    assert await guest.log() == [*added, "user: And now?", WHICH_SHOWN, "user: No", WHICH_SHOWN]
    assert await guest.page.inner_text("main") == "Add+"
    assert len(guest.joins) == 4
    assert all(re.search("lastSeq=[1-9]", address) for address in guest.joins[1:])


@with_config(limits={"chat_per_minute": 2, "site_messages_per_day": 4})
async def test_errors_and_retry(meet: Meet, model: FakeModel, server: Server) -> None:
    """What fails is said in words; a retry is the same message, which the server starts once."""
    guest = await meet()
    alert, retry = guest.page.get_by_role("alert"), guest.page.get_by_role("button", name="Try ag")
    failures = ["before", "after", "before", "before"]

    async def fail(route: Route) -> None:
        kind = failures.pop(0) if failures else ""
        if kind == "after":
            await route.fetch()  # the server hears it, the visitor does not hear the server
        await (route.abort() if kind else route.continue_())

    await guest.page.route("**/api/chat", fail)
    await guest.ask("Hello?")
    await expect(alert).to_have_text("The server cannot be reached just now.")
    await expect(guest.see(".stop")).to_be_hidden()
    await retry.click()
    await guest.hears("ok")
    await expect(alert).to_have_count(0)
    await expect(guest.see(":is(.error, .pending)")).to_have_count(0)
    await expect(guest.see("textarea")).to_be_focused()
    assert len({post["clientMessageId"] for post in guest.posts}) == 1
    assert len(guest.posts) == 5
    assert len(model.requests) == 1
    assert await guest.log() == ["bot: Hello!", "user: Hello?", "bot: ok"]

    await guest.ask("Another", hears="ok")
    await guest.ask("One too many")
    await guest.see(".error", re.compile(r"Please try again in \d+ s\.")).wait_for()
    server.app.buckets.clear()
    await retry.click()
    await until(lambda: len(model.requests) == 3)
    await guest.hears("ok")

    server.app.buckets.clear()
    await guest.ask("And now?", [cut_wire], [cut_wire], [cut_wire])
    await guest.see(".bot.error", lf.ENGLISH("no_answer")).wait_for()
    await expect(guest.see(".stop")).to_be_hidden()

    # When the day's budget is spent the site's own words say so; trying again would not help.
    await guest.ask("And tomorrow?")
    await guest.see(".error", "for today").wait_for()
    await expect(retry).to_have_count(0)


@with_config(limits={"message_chars": 500})
async def test_long_messages(meet: Meet, model: FakeModel) -> None:
    """A counter appears near the server's limit of characters, counted as people and the server
    count; above them, sending waits."""
    guest = await meet()
    counter, area = guest.see(".counter"), guest.see("textarea")
    send = guest.page.get_by_role("button", name="Send", exact=True)
    for length, shown in ((400, ""), (449, ""), (499, "499 / 500"), (501, "501 / 500")):
        await area.fill("🙂" * (length - 1) + "a")
        assert await counter.inner_text() == shown
        await expect(counter).to_be_visible(visible=shown != "")
        await expect(send).to_be_enabled(enabled=length <= 500)
        assert await area.get_attribute("aria-invalid") == str(length > 500).lower()
    await area.press("Enter")
    await expect(guest.see(".user")).to_have_count(0)
    await area.press("Backspace")
    await expect(counter).to_have_text("500 / 500")
    await area.press("Enter")
    await guest.hears("ok")
    assert model.requests[-1]["messages"][-1]["content"].endswith("🙂" * 500)
    await expect(counter).to_be_hidden()
    await guest.page.evaluate("LeFlux.send('b'.repeat(501))")
    await guest.see(".error", "too long").wait_for()
    await guest.page.evaluate(r"LeFlux.send('half \ud83d a character')")
    await guest.hears("ok")
    assert len(model.requests) == 2


# ---------------------------------------------------------------------------------------------
# Session: what survives a reload, a restart, a cut wire, another tab


class Wire:
    """A TCP proxy before a server, that can be cut."""

    def __init__(self, target: str) -> None:
        self.port = int(target.rpartition(":")[2])
        self.is_up = True
        self.writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Wire:
        self.listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        self.cut()
        await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_up:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.transport.abort()

    def cut(self, *, is_up: bool = True) -> None:
        self.is_up = is_up
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()


def streams(model: FakeModel, *pieces: str) -> Script:
    """An answer that comes in pieces, and waits at the gate between them."""
    steps = [step for piece in pieces for step in (sse(chunk(piece)), model.at_gate)]
    return [sse(chunk('{"message": "')), *steps, sse(chunk('"}'), "[DONE]")]


STORED_SESSION = "Object.keys(localStorage).find((key) => key.endsWith(' session'))"


async def change_session(guest: Guest, change: str) -> None:
    """Change what the browser has stored of the session, and reload."""
    await guest.page.evaluate(
        f"""() => {{ const key = {STORED_SESSION}, kept = JSON.parse(localStorage[key]);
            {change}; localStorage[key] = JSON.stringify(kept); }}"""
    )
    await guest.page.reload()


async def test_session_is_kept(meet: Meet, model: FakeModel, server: Server) -> None:
    """The chat goes on after a reload, for 24 hours; an older one, or a lost one, begins anew."""
    guest = await meet()
    # A reload in the middle of a stream shows what was said and what is still to come.
    await guest.ask("Count", streams(model, "One, ", "two, ", "three."))
    await guest.see(".bot", "One,").wait_for()
    await guest.page.reload()
    await guest.see(".bot", "One,").wait_for()
    await guest.see(".stop").wait_for()
    model.gate.release()
    await guest.see(".bot", "One, two,").wait_for()
    await guest.page.reload()
    model.gate.release()
    model.gate.release()
    await guest.hears("One, two, three.")
    said = ["bot: Hello!", "user: Count", "bot: One, two, three."]
    assert await guest.log() == said
    assert len(model.requests) == 1

    [kept] = server.app.sessions
    assert await guest.page.evaluate(f"JSON.parse(localStorage[{STORED_SESSION}]).id") == kept
    await guest.page.add_init_script(REPLIES)
    calls: list[str] = []
    guest.page.on("request", lambda request: calls.append(f"{request.method} {request.url}"))
    guest.said.clear()
    await guest.page.reload()
    await guest.see(".bot", "three.").wait_for()  # the panel is open as before
    await until(lambda: guest.sent("update_context"))  # the page has shown itself
    assert await guest.log() == said
    assert f"GET {server.url}/api/session/{kept}" in calls
    assert not [line for line in calls if "session/init" in line]
    assert await guest.page.evaluate("replies") == []  # it is no news

    lf.drop_session(server.app, server.app.sessions[kept])  # idle for too long, say
    await guest.ask("Are you still there?", says("Yes, I am."), hears="Yes, I am.")
    await expect(guest.see(".dots")).to_have_count(0)
    note = "note: The earlier chat has ended; what follows starts afresh."
    assert (await guest.log())[-5:] == [
        *said[1:],
        note,
        "user: Are you still there?",
        "bot: Yes, I am.",
    ]
    assert len(server.app.sessions) == 1

    await change_session(guest, "kept.at -= 24 * 3600 * 1000")
    await guest.page.wait_for_function("LeFlux?.getState().ready")
    assert await guest.log() == ["bot: Hello!"]
    assert len(server.app.sessions) == 2

    # A chat that began while public_url was wrong finds the socket once that is fixed.
    await guest.ask("Hi", hears="ok")
    await change_session(guest, "kept.wsUrl = 'ws://localhost:1'")
    await guest.ask("And now?", says("Still here."), hears="Still here.")
    assert len(server.app.sessions) == 2

    # By IP and plain http a browser's GET does not say whose it is: the chat begins anew.
    async def refuse(route: Route) -> None:
        refusal = {"error": "host_not_registered", "message": "Who?", "details": {}}
        is_get = route.request.method == "GET"
        await (route.fulfill(status=403, json=refusal) if is_get else route.continue_())

    await guest.page.route("**/api/session/*", refuse)
    await guest.page.reload()
    await guest.ask("Hello again", hears="ok")
    assert await guest.log() == ["bot: Hello!", "user: Hello again", "bot: ok"]
    assert len(server.app.sessions) == 3


async def test_cut_wire(meet: Meet, model: FakeModel, pages: Pages, server: Server) -> None:
    """A broken socket comes back with lastSeq: nothing is lost, nothing comes twice."""
    async with Wire(server.url) as wire:
        pages.server = wire.url
        guest = await meet(ADD)
        added = guest.page.locator("main")
        await guest.ask("Count", streams(model, "One, ", "two, ", "three."))
        await guest.see(".bot", "One,").wait_for()
        wire.cut(is_up=False)
        await guest.see(".banner", "Reconnecting…").wait_for()
        model.gate.release()
        wire.is_up = True
        await guest.see(".bot", "One, two,").wait_for()
        wire.cut()
        model.gate.release()
        model.gate.release()
        await guest.hears("One, two, three.")
        await expect(guest.see(".banner")).to_be_hidden()
        numbers = [frame["seq"] for frame in guest.heard if frame["event"] == "message_chunk"]
        assert numbers == sorted(set(numbers))
        assert re.search("lastSeq=[1-9]", guest.joins[-1])
        assert await guest.log() == ["bot: Hello!", "user: Count", "bot: One, two, three."]

        # Cut while it acts: the report comes when the socket is back, and the task goes on.
        await guest.ask("Add three", does(*[click("Add")] * 3), ends("All added."))
        await guest.see(".ring").wait_for()
        wire.cut(is_up=False)
        await expect(added).to_have_text("Add+++", use_inner_text=True)
        wire.is_up = True
        await guest.page.evaluate("dispatchEvent(new Event('online'))")  # it comes back at once
        await guest.hears("All added.")
        assert await added.inner_text() == "Add+++"

        # The report itself is lost on the way: it is said again.
        await guest.ask("Add one", does(click("Add")), ends("One more."))
        await guest.see(".ring").wait_for()
        await guest.page.evaluate(
            """() => { const { prototype } = WebSocket, { send } = prototype;
                let left = 2; // the report, and the wish to go on
                prototype.send = function () {
                    if (!--left) prototype.send = send;
                    this.close();
                }; }"""
        )
        await guest.hears("One more.")
        assert await added.inner_text() == "Add++++"


RESTARTS = {
    "SIGTERM": "(The answer was cut short.)",
    "SIGKILL": lf.ENGLISH("restarted"),
    "forgetful": "The answer got lost.",
}


@pytest.mark.parametrize("how", RESTARTS)
async def test_restart_in_the_middle(
    visit: Visit, model: FakeModel, pages: Pages, tmp_path: Path, how: str
) -> None:
    """A restart in the middle of an answer: the chat says so by itself, and goes on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    state = 'state_dir = ""\n' if how == "forgetful" else ""
    more = (
        f'[server]\nshutdown_seconds = 0.1\n{state}[llm]\nbase_url = "{model.url}"\n'
        '[[sites]]\nid = "here"\nname = "Here"\nallowed_hosts = ["localhost"]\n'
    )
    environ = {"LEFLUX_PORT": port} | ({"STATE_DIRECTORY": ""} if state else {})
    async with program(tmp_path, more, **environ) as run:
        pages.server = run.server.url
        guest = await Guest(await visit(pages.add("/", "<main>Hello</main>")), model).open()
        await guest.ask("Count", streams(model, "One, ", "two."))
        await guest.see(".bot", "One,").wait_for()
        run.child.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        await run.end()
        await guest.see(".banner", "Reconnecting…").wait_for()
    async with program(tmp_path, more, **environ):
        await guest.hears(RESTARTS[how])
        await expect(guest.see(".banner")).to_be_hidden()
        assert sum(RESTARTS[how] in line for line in await guest.log()) == 1
        await guest.ask("Go on", hears="ok")
        assert (await guest.log())[-2:] == ["user: Go on", "bot: ok"]


HIDDEN = """Object.defineProperty(document, "visibilityState",
    { configurable: true, get: () => window.isShown ? "visible" : "hidden" });"""


async def test_two_tabs(meet: Meet, model: FakeModel, pages: Pages) -> None:
    """The chat is in one tab at a time; the other says so, and can take it back."""
    one = await meet(ADD.replace("</main>", "<button>Send order</button></main>"))
    await one.ask("First", hears="ok")
    two = Guest(await one.page.context.new_page(), model)
    await two.page.goto(pages.url)
    elsewhere, here = "open in another tab", "Use it here"
    await one.see(".banner", elsewhere).wait_for()
    await two.open()
    await two.see(".bot", "ok").wait_for()
    await two.ask("Second", says("Second answer"), hears="Second answer")

    await one.see(".banner button", here).click()
    await two.see(".banner", elsewhere).wait_for()
    await one.hears("Second answer")
    said = ["user: First", "bot: ok", "user: Second", "bot: Second answer"]
    assert await one.log() == ["bot: Hello!", *said]

    # A plan is with tab one when tab two takes over by writing: it is not carried out there.
    await one.ask("Add", does(wait(3000), click("Add")))
    await until(lambda: one.heard[-1]["event"] == "action_plan")
    await two.ask("Third", says("Third answer"), hears="Third answer")
    assert "+" not in await two.page.inner_text("main")
    assert (await two.log())[-2:] == ["user: Third", "bot: Third answer"]
    await one.see(".banner", elsewhere).wait_for()
    assert not one.results()

    # What is asked there can no longer be answered there, until the chat is taken back.
    await two.ask("Order", does(click("Send order")))
    await expect(two.see(".confirm button").first).to_be_enabled()
    await one.see(".banner button", here).click()
    await two.see(".banner", elsewhere).wait_for()
    await expect(two.see(".confirm button").first).to_be_disabled()

    # A tab that is opened in the background takes the chat over when it becomes visible.
    await two.page.add_init_script(HIDDEN)
    count = len(two.joins)
    await two.page.reload()
    await two.page.wait_for_function("LeFlux?.getState().ready")
    await two.see(".bot", "Third answer").wait_for()  # its panel is open, as before
    await one.ask("Fourth", hears="ok")
    assert len(two.joins) == count
    await expect(one.see(".banner")).to_be_hidden()
    await two.page.evaluate("isShown = true, document.dispatchEvent(new Event('visibilitychange'))")
    await one.see(".banner", elsewhere).wait_for()
    await two.see(".user", "Fourth").wait_for()


# ---------------------------------------------------------------------------------------------
# Seeing the page

PAGE = """
<style>.gone { display: none } .unseen { visibility: hidden } .clear { opacity: 0 }
  .tiny { width: 1px; height: 1px; overflow: hidden; display: block }</style>
<header><nav aria-label="Main"><a href="/prices">Prices</a></nav></header>
<main>
  <h1>Everything</h1><p>Some text to read.</p>
  <p class="gone">Unread text</p>
  <section><h2>Choices</h2>
    <select aria-label="Colour"><option value="r">Red</option>
      <option value="b" selected>Blue</option></select>
    <label><input type="checkbox" name="news" checked> Newsletter</label>
    <label class="card"><input type="radio" name="size" class="clear"> Large</label>
    <div role="switch" aria-checked="true" tabindex="0">Dark mode</div>
    <span role="tab" id="tab">Details</span>
    <details><summary>More</summary><a href="/in-details">Folded</a></details>
    <div contenteditable="true" aria-label="Note">My note</div>
  </section>
  <form aria-label="Sign up">
    <input name="name" placeholder="Your name" required value="Ada">
    <input name="id" aria-labelledby="tab" readonly>
    <label for="mail">E-mail</label><input id="mail" type="email" autocomplete="email" disabled>
    <textarea name="elements2">Long text</textarea>
    <input type="password" value="s3cret-1"><input name="cardNumber" value="s3cret-2">
    <input autocomplete="one-time-code" value="s3cret-3"><input aria-label="IBAN" value="s3cret-4">
    <label>Kennwort <input value="s3cret-5"></label><input type="hidden" value="s3cret-6">
    <input type="file"><button>Join now</button><input type="submit" value="Join later">
  </form>
  <a href="/gone" class="gone">Gone</a><a href="/unseen" class="unseen">Unseen</a>
  <a href="/clear" class="clear">Clear</a><a href="/tiny" class="tiny">Tiny</a>
  <div inert><button>Inert</button></div><div aria-hidden="true"><button>Hidden</button></div>
  <fieldset disabled><button>Not now</button></fieldset>
  <svg width="40" height="20"><a href="/svg"><text y="15">Drawn</text></a></svg>
  <svg width="40" height="20"><a xlink:href="/\t/x.example/"><text y="15">Old</text></a></svg>
  <button aria-label="Close"><svg width="20" height="20"></svg></button>
  <button title="Search"><i></i>&nbsp;</button><a href="/img"><img alt="Logo" width=9 height=9></a>
  <shadow-box></shadow-box>
</main>
<footer>Open from nine to five</footer>
<script>
  document.querySelector("form").react = document.querySelector("input");
  document.querySelector("input[name=name]").circle = { around: window };
  const box = document.querySelector("shadow-box").attachShadow({ mode: "open" });
  box.innerHTML = "<button>In the shadow</button>";
</script>
"""


FOUND: dict[str, Json] = {  # what is indexed of that page, by its text or name, and how
    "Prices": {"type": "link", "href": "/prices", "parent": "Main"},
    "Colour": {"type": "select", "options": ["Red", "Blue"], "value": "Blue"},
    "Newsletter": {"type": "checkbox", "checked": True, "parent": "Choices"},
    "Large": {"type": "radio", "checked": False},
    "Dark mode": {"type": "switch", "checked": True},
    "Details": {"type": "text", "readonly": True},
    "More": {"type": "summary"},
    "Note": {"type": "textbox", "value": "My note"},
    "E-mail": {"type": "email", "disabled": True, "autocomplete": "email"},
    "Join now": {"type": "button", "inputType": "submit", "parent": "Sign up"},
    "Join later": {"type": "submit"},
    "Not now": {"disabled": True},
    "Drawn": {"type": "link", "href": "/svg"},
    "Old": {"type": "link", "href": "http://x.example/"},
    "Close": {"ariaLabel": "Close"},
    "Search": {"type": "button"},
    "Logo": {"href": "/img"},
    "In the shadow": {"type": "button"},
    "name": {"placeholder": "Your name", "required": True, "value": "Ada"},
    "id": {"text": "Details"},
    "elements2": {"value": "Long text"},
}


async def test_what_is_seen(meet: Meet, model: FakeModel, pages: Pages) -> None:
    """The picture of a page has what a visitor can use and read, and no secrets."""
    guest = await meet(PAGE)
    await guest.page.evaluate("LeFlux.setVisitorData({plan: 'Pro', seats: 3})")
    await guest.ask("What is here?", hears="ok")
    context = guest.context
    assert (context["url"], context["title"]) == (f"{pages.url}/", "Page /")
    text = context["visibleText"]
    counts = {"Some text to read.": 1, "Everything": 1, "Open from nine to five": 1}
    counts |= {"Unread": 0, "Hello!": 0}  # and not its own
    assert {part: text.count(part) for part in counts} == counts

    elements: dict[str, Json] = {}
    for element in context["indexedElements"]:
        element["href"] = element.get("href", "").removeprefix(pages.url)
        elements.setdefault(element["text"] or element.get("ariaLabel", ""), element)
    elements |= {one["name"]: one for one in context["indexedElements"] if "name" in one}
    assert not elements.keys() & set("Gone Unseen Clear Tiny Inert Hidden Folded".split())
    for name, wanted in FOUND.items():
        assert wanted.items() <= elements[name].items(), name
    numbers = [element["id"] for element in context["indexedElements"]]
    assert len(set(numbers)) == len(numbers)
    fields = context["forms"][0].pop("fields")
    [form] = context["forms"]
    assert form == {"name": "Sign up", "heading": "Everything", "submit": "Join now, Join later"}
    assert "Kennwort" in fields

    assert "s3cret" not in json.dumps(guest.posts) + model.prompt()
    assert "'plan'" in model.prompt() or '"plan"' in model.prompt()
    secret = [f for f in context["indexedElements"] if lf.is_sensitive(f)]
    assert len(secret) == 5
    assert not [field for field in secret if "value" in field]


SECRET = """password userPassword pwd PIN otp totp 2fa verification-code cc-csc cardNumber
    card_holder cvv expiry MM/YY Kartennummer IBAN bic sortCode bankAccount accountNumber
    ssn socialSecurity nationalId passport-no taxId dni one-time-code pass\u00adword
    contraseña security.code""".split()
PLAIN = "name email pinboard company subject spinner city comment cardigan".split()
HIDING = "elements parentElement getAttribute closest matches querySelectorAll shadowRoot".split()


async def test_names_of_fields(meet: Meet) -> None:
    """Every field that the server takes for a secret one is one for the widget, too; fields called
    like what a form is asked for cost their own form at most."""
    assert {name: lf.is_sensitive({"name": name}) for name in [*SECRET, *PLAIN]} == {
        **dict.fromkeys(SECRET, True),
        **dict.fromkeys(PLAIN, False),
    }
    body = "".join(f'<p><input name="{name}" value="v-{name}"></p>' for name in [*SECRET, *PLAIN])
    guest = await meet(body)
    await guest.ask("Hello", hears="ok")
    values = [element.get("value") for element in guest.context["indexedElements"]]
    assert [value for value in values if value] == [f"v-{name}" for name in PLAIN]
    assert len(values) == len(SECRET) + len(PLAIN)

    forms = "".join(f"<form><input name='{name}' aria-label='{name}'></form>" for name in HIDING)
    guest = await meet(MAIN % f"{forms}<img name='forms' src='data:,'><button>Fine</button>")
    await guest.ask("Hello", hears="ok")
    assert "Fine" in [element["text"] for element in guest.context["indexedElements"]]


@with_config(limits={"indexed_elements": 40, "visible_text_chars": 500})
async def test_the_nearest_elements(meet: Meet) -> None:
    """Of many elements, up to the server's limits, the dialog's come first, then those in view;
    each keeps its number. Of the text it is what the visitor looks at."""
    many = "".join(f"<p><a href='/{n}'>Link {n}</a></p>" for n in range(200))
    narrow = f"<main style='width: 300px'>{many}</main>"  # much of what is in view is empty
    guest = await meet(
        f"{narrow}<dialog open style='position: fixed'><button>Agree</button></dialog>"
    )
    await guest.page.evaluate("scrollTo(0, document.links[100].offsetTop)")
    await guest.ask("What is here?", hears="ok")
    found = guest.context["indexedElements"]
    agree, first, *_, last = found
    assert (agree["text"], agree["inModal"]) == ("Agree", True)
    assert first["text"] in ("Link 99", "Link 100")
    assert first["inViewport"] is True
    assert last["text"] < "Link 99"
    assert "inViewport" not in last
    lines = guest.context["visibleText"].split()
    assert "100" in lines
    assert not {"10", "190"} & set(lines)
    await guest.ask("And now?", hears="ok")
    assert guest.context["indexedElements"] == found
    assert [element["id"] for element in found] == list(range(1, 41))


async def test_single_page_navigation(meet: Meet, pages: Pages, server: Server) -> None:
    """When a router changes the page, the server gets the new picture."""
    guest = await meet("<main><h1>Home</h1></main>")
    await guest.ask("Hello", hears="ok")
    await guest.page.evaluate(
        """() => { history.pushState({}, "", "/about");
            setTimeout(() => { document.querySelector("main").innerHTML =
                "<h1>About</h1><button>Call us</button>"; }, 50); }"""
    )
    await until(lambda: guest.sent("update_context"))
    [session] = server.app.sessions.values()
    await until(lambda: session.context["url"] == f"{pages.url}/about")
    assert session.context["visibleText"] == "About\nCall us"
    await guest.page.go_back(wait_until="commit")
    await until(lambda: session.context["url"] == f"{pages.url}/")
    await until(lambda: len(guest.sent("update_context")) == 2)


# ---------------------------------------------------------------------------------------------
# Acting

FORM = """
<main><form onsubmit="event.preventDefault(); done.textContent = 'submitted'">
  <input aria-label="Plain"><input aria-label="Controlled"><input aria-label="Phone">
  <input aria-label="Stubborn"><input aria-label="Short" maxlength="3">
  <textarea aria-label="Story"></textarea><input aria-label="Born" type="date">
  <input aria-label="Meeting" type="datetime-local">
  <div contenteditable="true" aria-label="Rich" id="rich"><b>old</b></div>
  <select aria-label="Colour"><option value="">?</option><option value="b">Blue</option></select>
  <select aria-label="Sizes" multiple><option>S</option><option>M</option></select>
  <label><input type="radio" name="when">Later</label><label><input type="checkbox">Terms</label>
  <button type="button" onclick="done.textContent += 'clicked '">Press</button>
  <svg width=40 height=20><rect role="button" aria-label="Shape" width=40 height=20
    onclick="done.textContent += 'drawn '"></rect></svg>
  <p id="done"></p>
</form><div style="height: 3000px"></div><button>Far away</button></main>
<script>
  // As React does: it watches the property of the element, and sets it back to its own state.
  const field = (name) => document.querySelector(`[aria-label=${name}]`);
  const controlled = field("Controlled"), native = Object.getOwnPropertyDescriptor(
    HTMLInputElement.prototype, "value");
  let tracked = "", state = "";
  Object.defineProperty(controlled, "value", { configurable: true,
    get() { return native.get.call(this); },
    set(value) { tracked = value; native.set.call(this, value); } });
  controlled.addEventListener("input", () => {
    if (native.get.call(controlled) !== tracked) state = tracked = native.get.call(controlled);
    requestAnimationFrame(() => { controlled.value = state; });
  });
  field("Phone").addEventListener("input", ({ target }) => {
    target.value = target.value.replace(/(...)(...)(.*)/, "($1) $2-$3");
  });
  field("Stubborn").addEventListener("input", ({ target }) => { target.value = "no"; });
  window.heard = [];
  document.addEventListener("change", ({ target }) => heard.push(target.ariaLabel));
  document.addEventListener("pointerdown", ({ target }) => heard.push("press " + target.ariaLabel));
</script>
"""


async def test_filling_a_form(meet: Meet) -> None:
    """Each kind of field takes what is typed or chosen, frameworks hear of it, the rest fails."""
    guest = await meet(FORM)
    steps = [
        fill("Plain", "Ada “L” 🙂"),
        fill("Controlled", "kept"),
        fill("Phone", "5551234567"),
        fill("Story", "Once\nupon a time"),
        fill("Born", "1815-12-10"),
        fill("Meeting", "2026-05-05 10:00"),
        fill("Rich", "new text"),
        fill("Colour", "blue", "select"),
        fill("Sizes", "M", "select"),
        fill("Later", "no", "select"),
        fill("Terms", "yes", "select"),
        click("Press"),
        click("Shape"),
        wait(1),
        {"action": "scroll_to", "on": "Far away"},
    ]
    await guest.ask("Fill it in", does(*steps), ends("Filled."))
    await guest.see(".ring").wait_for()
    await guest.hears("Filled.")
    [result] = guest.results()
    results = result.pop("results")
    assert [step for step in results if not step["success"]] == []
    assert {"success": True, "completedSteps": 15, "totalSteps": 15}.items() <= result.items()
    texts = ["Ada “L” 🙂", "kept", "(555) 123-4567", "Once upon a time", "1815-12-10"]
    texts += ["2026-05-05T10:00", "new text", "Blue", "M"]
    assert [step.get("text") for step in results][:9] == texts
    assert await guest.page.evaluate(
        """[state, field('Controlled').value, field('Rich').innerText, field('Story').value,
            document.querySelectorAll(':is([type=radio], [type=checkbox]):checked').length,
            document.querySelector('#done').innerText, scrollY > 1000]"""
    ) == ["kept", "kept", "new text", "Once\nupon a time", 2, "clicked drawn", True]
    wanted = {"Plain", "Controlled", "Phone", "Story", "Colour", "Sizes", "press Shape"}
    assert wanted <= set(await guest.page.evaluate("heard"))
    await expect(guest.see(".ring")).to_be_hidden()
    await expect(guest.see("textarea")).to_be_focused()  # back to the visitor


FAILURES: list[tuple[Json, str, str]] = [  # a step, what spoils it, what is said of it
    (fill("Stubborn", "yes"), "", "did not take the text"),
    (fill("Short", "too long"), "", "the text is too long"),
    (fill("Born", "yesterday"), "", "did not take the text"),
    (fill("Press", "text"), "", "cannot be typed"),
    (fill("Colour", "green", "select"), "", "no such option"),
    (fill("Plain", "text", "select"), "", "no list"),
    (fill("Controlled", "text"), "name = 'cvv'", "only the visitor"),
    (fill("Short", "a"), "readOnly = true", "read-only"),
    (fill("Born", "1815-12-10"), "disabled = true", "is disabled"),
    (fill("Story", "text"), "hidden = true", "cannot be seen"),
    (fill("Phone", "5551234567"), "remove()", "no longer on the page"),
]


async def test_failed_steps(meet: Meet, model: FakeModel) -> None:
    """A sequence stops at its first failed step, and the model is told which and why."""

    async def answer(request: web.Request) -> web.StreamResponse:
        prompt = (await request.json())["messages"][-1]["content"]
        if told := re.search(r"failed at step 2: .*", prompt):
            return web.Response(body=gives_up(told[0])[0], content_type="text/event-stream")
        step, spoil, _ = FAILURES[int(re.findall(r"Try (\d+)", prompt)[-1])]
        return await does(click("Press") if spoil else wait(0), step, fill("Plain", "never"))(
            request
        )

    async def fail(numbers: range) -> None:
        guest = await meet(FORM)
        for count, number in enumerate(numbers, start=1):
            step, spoil, reason = FAILURES[number]
            press = f"() => {{ field('{step['on']}').{spoil} }}" if spoil else "null"
            await guest.page.evaluate(f"document.querySelector('form button').onclick = {press}, 0")
            await guest.ask(f"Try {number}")
            await until(lambda: len(guest.results()) == count)  # noqa: B023
            result = guest.results()[-1]
            [_, failed] = result.pop("results")
            wanted = {"success": False, "completedSteps": 1, "totalSteps": 3}
            assert wanted.items() <= result.items()
            assert reason in failed["error"]
            await guest.hears(f"failed at step 2: {failed['error']}")
        assert await guest.page.input_value("[aria-label=Plain]") == ""

    model.scripts.extend([answer] * (2 * len(FAILURES)))
    await asyncio.gather(*(fail(range(n, len(FAILURES), 3)) for n in range(3)))


async def test_settled_while_acting(meet: Meet) -> None:
    """A new message, or stop, ends what is being done: no further step runs, none is reported."""
    guest = await meet(ADD)
    added = guest.page.locator("main")
    three = does(click("Add"), wait(400), click("Add"), click("Add"))
    await guest.ask("Add three", three)
    await expect(added).to_have_text("Add+", use_inner_text=True)
    await guest.ask("Wait, no!", hears="ok")
    await guest.ask("Do it then", three)
    await expect(added).to_have_text("Add++", use_inner_text=True)
    await guest.see(".stop").click()
    await guest.hears(lf.ENGLISH("stopped"))
    await guest.ask("Add one", does(click("Add")), ends("Added."), hears="Added.")
    assert await added.inner_text() == "Add+++"
    assert len(guest.results()) == 1


ROUTER = """
<nav><a href="/one">One</a></nav><main>Home</main>
<a href="/users/5" data-turbo-method="delete"
  onclick="localStorage.gone = 1; event.preventDefault()">Remote</a>
<script>
  document.addEventListener("click", (event) => { // as single-page frameworks do
    const link = event.target.closest("a");
    if (!link || !link.href.startsWith(location.origin + "/o")) return;
    event.preventDefault();
    history.pushState({}, "", link.href);
    setTimeout(() => {
      document.querySelector("main").textContent = "At " + location.pathname;
    }, 99);
  });
  document.addEventListener("click", (event) => { // and one that swallows what it does not know
    if (event.target.href?.endsWith("/swallowed")) event.preventDefault();
  });
</script>
"""


async def test_navigation(meet: Meet, model: FakeModel, pages: Pages) -> None:
    """Routers take what they know, the browser loads the rest; the task goes on after that."""
    pages.add("/two", "<main>Two</main>")
    pages.add("/swallowed", "<main>Loaded</main>")
    pages.add("/users/5", "<main>Ada</main>")
    guest = await meet(ROUTER)
    for url, text, loads in [
        ("/one", "At /one", 0),  # by its link
        ("/other", "At /other", 0),  # by a delegated handler
        ("/two", "Two", 1),
    ]:
        before = len(pages.visits)
        await guest.ask("Go", does(go(url)), ends(f"Now at {url}."), hears=f"Now at {url}.")
        assert text in model.prompt()
        assert f"→ {pages.url}{url}" in model.prompt()
        assert guest.results()[-1]["success"] is True
        assert await guest.page.inner_text("main") == text
        assert len([v for v in pages.visits[before:] if "favicon" not in v]) == loads
    # To go to an address is not to click a link that does something else with it.
    for url, text in (("/swallowed", "Loaded"), ("/users/5", "Ada")):
        await guest.page.goto(f"{pages.url}/")
        await guest.ask("Go", does(go(url)), ends(f"Now at {text}."), hears=f"Now at {text}.")
        assert await guest.page.inner_text("main") == text
    assert await guest.page.evaluate("localStorage.gone") is None

    # The server allows a site's other hosts and ports; the widget stays on its own origin.
    away = does(go("http://localhost:1/"))
    await guest.ask("Leave", away, gives_up("Not there."), hears="Not there.")
    assert guest.results()[-1]["success"] is False
    assert "not on this website" in guest.results()[-1]["error"]


async def test_task_over_pages(meet: Meet, model: FakeModel, pages: Pages, server: Server) -> None:
    """A click that loads another page is reported from there, once, and the task goes on."""
    count = "<script>sessionStorage.n = Number(sessionStorage.n || 0) + 1</script>"
    pages.add("/next", f"<main><h1>Next</h1><a href='/last'>Further</a></main>{count}")
    pages.add("/last", f"<main><h1>Last</h1><button>End</button></main>{count}")
    guest = await meet("<main><a href='/next'>Next page</a></main>")
    await guest.ask(
        "Go to the end",
        does(click("Next page"), message="To the next."),
        does(click("Further"), fill("Further", "never"), message="And further."),
        ends("There."),
        hears="There.",
    )
    assert len(model.requests) == 3
    assert "<h1>" not in model.prompt(1)
    for number, words in (
        (1, f"URL: {pages.url}/next"),
        (1, "done. URL"),
        (2, f"URL: {pages.url}/last"),
        (2, "failed at step 2: another page was loaded"),
    ):
        assert words in model.prompt(number)
    assert await guest.page.evaluate("sessionStorage.n") == "2"
    single, sequence = guest.results()
    assert single["success"] is True
    wanted = {"success": False, "completedSteps": 1, "totalSteps": 2}
    assert wanted.items() <= sequence.items()
    said = [line for line in await guest.log() if line.startswith("bot: ")]
    assert said == ["bot: Hello!", "bot: To the next.", "bot: And further.", "bot: There."]
    [session] = server.app.sessions.values()
    assert len(session.history) == 4

    # The visitor goes back: an old page out of the cache, with the whole conversation, and
    # numbers of elements that are its own.
    await guest.page.go_back(wait_until="commit")
    await guest.page.go_back(wait_until="commit")
    await until(lambda: session.context["url"] == f"{pages.url}/")
    await guest.see(".bot", "There.").wait_for()
    await guest.ask("Where am I?", hears="ok")
    assert (await guest.log())[-3:] == ["bot: There.", "user: Where am I?", "bot: ok"]


@pytest.mark.parametrize("width", [390, 1280])
async def test_next_page(meet: Meet, model: FakeModel, pages: Pages, width: int) -> None:
    """On a page that the agent has loaded the focus is where it was, in the chat; on a phone the
    sheet is half as high while the agent acts."""
    pages.add("/next", MAIN % "<button>There</button>")
    guest = await meet("<main><a href='/next'>Next</a></main>", width=width, height=844)
    height = "node => node.offsetHeight"
    before = await guest.see(".panel").evaluate(height)
    to_the_next = does(click("Next"), message="To the next.")
    await guest.ask("Go on", to_the_next, [model.at_gate, *ends("There.")])
    await guest.page.wait_for_url("**/next")
    await until(guest.results)
    if width == 390:
        assert (before, await guest.see(".panel").evaluate(height)) == (844, 422)
    else:
        await expect(guest.see("textarea")).to_be_focused()
    model.gate.release()
    await guest.hears("There.")
    assert await guest.see(".panel").evaluate(height) == before
    assert guest.context["indexedElements"][0]["id"] > 1  # numbers go on


async def test_leaving_in_the_middle(
    meet: Meet, model: FakeModel, pages: Pages, server: Server
) -> None:
    """A visitor who leaves during a plan finds it reported as cut off, and never done twice."""
    body = "<main><button onclick='sessionStorage.n = 1 + (+sessionStorage.n || 0)'>Add</button>"
    pages.add("/other", body)
    guest = await meet(body)
    two = does(click("Add"), wait(9000), click("Add"))
    await guest.ask("Add two", two, gives_up("It was cut off."))
    await guest.page.wait_for_function("sessionStorage.n == 1")
    await guest.page.goto(f"{pages.url}/other")
    await guest.hears("It was cut off.")
    await guest.page.go_back(wait_until="commit")
    await guest.see(".bot", "It was cut off.").wait_for()
    assert {"success": False, "totalSteps": 3}.items() <= guest.results()[-1].items()
    assert await guest.page.evaluate("sessionStorage.n") == "1"

    # A message that is on its way when the page is left arrives all the same.
    await guest.page.evaluate("LeFlux.send('On my way'), location.href = '/other'")
    await guest.page.wait_for_url("**/other")
    await guest.hears("ok")
    assert (await guest.log())[-2:] == ["user: On my way", "bot: ok"]

    # A plan that was made for the page before is never carried out on another page.
    started = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        started.set()
        await model.at_gate(request)
        return await does(click("Add"))(request)

    await guest.ask("Add one", slow, says("Where were we?"))
    await started.wait()
    [session] = server.app.sessions.values()
    await guest.page.goto(f"{pages.url}/")
    await until(lambda: session.context["url"] == f"{pages.url}/")
    model.gate.release()
    await guest.hears("Where were we?")
    assert "rejected" in model.prompt()
    assert await guest.page.evaluate("sessionStorage.n") == "1"


# ---------------------------------------------------------------------------------------------
# Pages that make it hard


async def test_modal_dialog(meet: Meet) -> None:
    """A modal dialog of the page makes all else inert, but not the chat that is asked for a yes."""
    form = "<form method=dialog onsubmit='window.sent = 1'><button>Send message</button></form>"
    body = f"<button onclick='d.showModal()'>Write to us</button><dialog id=d>{form}</dialog>"
    guest = await meet(MAIN % body)
    await guest.ask("Send it", does(click("Write to us")), does(click("Send message")))
    await guest.see(".confirm button", "Send message").click()
    await guest.page.wait_for_function("window.sent")
    await guest.hears("ok")
    await guest.ask("Thank you")  # the dialog is closed
    await until(lambda: len(guest.posts) == 2)
    assert "Hi" in guest.context["visibleText"]


async def test_focus_stays_with_who_types(meet: Meet, model: FakeModel) -> None:
    """A question that arrives takes no focus from who types on the page, or in the chat; after a
    reload its answer can be seen.

    An icon's title is the name of its button, so that a click on it asks first.
    """
    icon = "<svg width=20 height=20 role=img><title>Delete account</title></svg>"
    guest = await meet(MAIN % f"<input id=note><button onclick='gone = 1'>{icon}</button>")
    delete = does(click("Delete account"))
    for script, seen in (
        ([model.at_gate, *asks("Which?")], ".bot >> text=Which?"),
        (delete, ".confirm"),
    ):
        await guest.ask("Hello", script)
        await guest.page.focus("#note")
        model.gate.release()
        await guest.see(seen).wait_for()
        await guest.page.keyboard.type("abc")
    assert await guest.page.input_value("#note") == "abcabc"

    await guest.ask("Delete it", delete)
    await guest.see("textarea").fill("and")
    await expect(guest.see(".confirm")).to_have_count(2)
    await guest.page.keyboard.type(" more")
    assert await guest.see("textarea").input_value() == "and more"
    await guest.see(".choices button:last-child:enabled").click()
    await guest.hears(lf.ENGLISH("not_confirmed"))
    assert not await guest.page.evaluate("window.gone")
    await guest.see("textarea").fill("")
    await guest.page.reload()
    await guest.see(".confirm.no").wait_for()
    await guest.ask("Thanks", hears="ok")
    await guest.page.reload()
    await guest.see(".bot", "Shall I click").last.wait_for()
    await expect(guest.see(".note")).to_have_text(["No"])


LINKS = "".join(f"<li><a href='/{n}'>Link {n}</a></li>" for n in range(300))
BUSY = f"""
<style>.card {{ cursor: pointer }} .clear {{ opacity: 0 }} .sub {{ display: none }}
  nav, main {{ display: block }}</style>
<div class="cookie-banner"><button>Accept cookies</button></div>
<nav><ul>{LINKS}</ul></nav>
<main>
  <div onclick="log('card')" class="card">Card one</div>
  <div class="card" id="listened">Card two</div><span tabindex="0" onkeydown="">Stop</span>
  <div class="card"><button onclick="log('inner')">In a card</button></div>
  <span data-action="save">Data action</span><a onclick="log('a')">No address</a>
  <a href="/around"><b class="card">Inside a link</b></a>
  <a href="/tab" target="_blank">Elsewhere</a>
  <button onclick="window.open('/popup')">Pops up</button>
  <map name="m"><area href="/area" alt="Area" shape="rect" coords="0,0,9,9"></map>
  <img usemap="#m" width="20" height="20" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">
  <table><tr><th aria-sort="none" onclick="log('sorted')">Price</th></tr>
    <tr><td>Ada</td><td><button onclick="log('ada')">Edit</button></td></tr>
    <tr><td>Bob</td><td><button onclick="log('bob')">Edit</button></td></tr></table>
  <div role="grid"><div role="row"><span role="gridcell" onclick="log('14')">14</span></div></div>
  <button aria-expanded="false" aria-controls="sub"
    onmouseover="document.querySelector('.sub').style.display = 'block'">Menu</button>
  <button class="sub">Submenu</button>
  <div role="combobox" aria-label="Fruit" aria-controls="fruits" tabindex="0"
    id="combo">\u200b</div>
  <ul role="listbox" id="fruits" hidden><li role="option">Apple</li><li role="option">Pear</li></ul>
  <button role="combobox" aria-label="Tree" aria-controls="trees" id="tree">None</button>
  <ul role="listbox" id="trees" tabindex="-1" hidden><li role="option">Elm</li></ul>
  <input role="combobox" aria-label="Herb" aria-controls="herbs" id="herb">
  <ul role="listbox" id="herbs" hidden><li role="option" tabindex="-1">Dill</li></ul>
  <input type="range" aria-label="Volume" min="0" max="10" step="2" value="4">
  <input type="date" aria-label="Day" min="2026-01-01" value="2026-05-05">
  <input type="color" aria-label="Paint"><input aria-label="City" list="cities">
  <datalist id="cities"><option value="Bremen"><option value="Berlin"></datalist>
  <select multiple aria-label="Sizes"><option selected>S</option>
    <option selected>M</option></select>
  <input type="checkbox" class="clear" aria-label="Newsletter"><input aria-label="Fixed" readonly>
  <div role="tab" aria-selected="true">Tab</div><div role="slider" aria-label="Speed"
    aria-valuenow="3" aria-valuemin="1" aria-valuemax="9" tabindex="0">|</div>
  <iframe title="Inner" srcdoc="<p>Framed text</p><button onclick='parent.log(`framed`)'>In a frame
    </button><button onclick='window.open(`/popup`)'>Pops up inside</button>"></iframe>
  <button ondblclick="log('twice')">Twice</button>
  <form action="/search" onsubmit="log('searched ' + q.value); return false">
    <h2>Find it</h2><input id="q" aria-label="Search" onkeyup="log('key')"></form>
  <button onfocus="log('next')">Next</button>
  <form action="/join" onsubmit="log('joined'); return false">
    <fieldset aria-hidden="true"><legend>Mail *</legend></fieldset><h3>Club</h3><label>Mail
    <b aria-hidden="true"> *</b><input type="email" required></label>
    <button formaction="/fast">Join</button></form>
  <p id="log"></p>
</main>
<div class="share"><a href="/share">Share</a></div>
<script>
  var log = (text) => {{ document.querySelector("#log").append(text + ";"); }};
  listened.addEventListener("click", () => log("listened"));
  combo.addEventListener("click", () => {{ fruits.hidden = false; }});
  fruits.addEventListener("click", ({{ target }}) => {{
    combo.textContent = target.textContent; fruits.hidden = true; }});
  // As Radix: drawn while the button is down, whose release is swallowed; Escape works inside.
  tree.onpointerdown = () => queueMicrotask(() => {{
    trees.hidden = false; trees.focus();
    document.addEventListener("pointerup", (event) => event.preventDefault(),
      {{ capture: true, once: true }}); }});
  trees.onpointerup = ({{ target, defaultPrevented }}) => {{
    if (!defaultPrevented) {{ tree.textContent = target.textContent; trees.hidden = true; }} }};
  trees.onkeydown = ({{ key }}) => {{ trees.hidden ||= key === "Escape"; }};
  // As MUI: the list goes when the field loses the focus, which a press on the list leaves there.
  herb.onclick = () => {{ herbs.hidden = false; }};
  herb.onblur = () => {{ herbs.hidden = true; herbs.textContent = ""; }};
  herbs.onmousedown = (event) => event.preventDefault();
  herbs.onclick = ({{ target }}) => {{ herb.value = target.textContent; herbs.hidden = true; }};
</script>
"""
SEEN: dict[str, Json | None] = {  # what is indexed of that page, and how
    **{f"Card {number}": {"type": "button"} for number in ("one", "two")},
    **{name: {"type": "button"} for name in ("Stop", "In a card", "Data action", "Price")},
    "No address": {"type": "link"},
    "Elsewhere": {"newTab": True},
    "Area": {"type": "link"},
    "14": {"type": "gridcell"},
    "Menu": {"expanded": False},
    "Submenu": None,
    "Fruit": {"type": "combobox"},
    "Volume": {"type": "range", "value": "4", "min": "0", "max": "10", "step": "2"},
    "Day": {"type": "date", "value": "2026-05-05", "min": "2026-01-01"},
    "City": {"options": ["Bremen", "Berlin"]},
    "Sizes": {"value": "S, M"},
    "Newsletter": {"type": "checkbox", "checked": False},
    "Fixed": {"readonly": True},
    "Tab": {"type": "tab", "selected": True},
    "Speed": {"type": "slider", "value": "3", "min": "1", "max": "9"},
    "In a frame": {"type": "button", "iframe": "Inner"},
    "Search": {"type": "text", "parent": "Find it"},
    "Mail": {"type": "email", "required": True, "parent": "Club"},
    "Join": {"inputType": "submit", "href": "/fast", "heading": "Club"},
}


async def test_what_is_indexed(meet: Meet, pages: Pages) -> None:
    """Of 300 links and all else, what can be used is seen, the important first.

    Each element's state is in test_engines.py.
    """
    guest = await meet(BUSY)
    await guest.ask("What is here?", hears="ok")
    texts = [element["text"] for element in guest.context["indexedElements"]]
    assert len(texts) == 50
    assert {"Link 0", "Search", "Mail", "Join", "Fruit"} <= set(texts)
    assert not {"Link 299", "Accept cookies", "Share"} & set(texts)
    await guest.page.evaluate("document.querySelector('nav').remove()")
    await guest.ask("And now?", hears="ok")
    found = guest.context["indexedElements"]
    assert [one["row"] for one in found if one["text"] == "Edit"] == ["Ada", "Bob"]
    links = [one["href"] for one in found if one["text"] == "Inside a link"]
    assert links == [f"{pages.url}/around"]
    elements = {one["text"]: one for one in found}
    assert "value" not in elements["Fruit"]
    assert "Framed text" in guest.context["visibleText"]
    assert list(elements)[-2:] == ["Accept cookies", "Share"]
    new = {one["text"] for one in found if one.get("isNew")}
    assert {"Share", "Accept cookies"} <= new
    assert not new & {"Card one", "Fruit"}


def press(key: str, name: str) -> Json:
    return {"action": "press", "on": name, "key": key}


CLICKS = {"Card one": "card", "Card two": "listened", "No address": "a", "Price": "sorted"}
CLICKS |= {'row="Bob"': "bob", '"14"': "14", "In a frame": "framed"}
STEPS: list[tuple[Json, str, str]] = [  # a step, what it does (a line of JavaScript), or its error
    *((click(name), f"said.includes('{said};')", "") for name, said in CLICKS.items()),
    (click("Elsewhere"), "location.pathname === '/'", "opens a new tab"),
    (click('"Pops up"'), "location.pathname === '/'", "opens a new tab"),
    (click("Pops up inside"), "location.pathname === '/'", "opens a new tab"),
    (click("Join"), "!said.includes('joined')", "the form was not sent: Mail: "),
    ({"action": "double_click", "on": "Twice"}, "said.includes('twice;')", ""),
    ({"action": "hover", "on": "Menu"}, "document.querySelector('.sub').offsetWidth > 0", ""),
    (fill("Fruit", "pear", "select"), "combo.textContent === 'Pear'", ""),
    (fill("Fruit", "plum", "select"), "combo.textContent === 'Pear'", "no such option"),
    (fill("Tree", "elm", "select"), "tree.textContent === 'Elm' && trees.hidden", ""),
    (fill("Tree", "yew", "select"), "tree.textContent === 'Elm' && trees.hidden", "no such option"),
    (fill("Herb", "dill", "select"), "herb.value === 'Dill'", ""),
    (fill("City", "ber", "select"), "field('City').value === 'Berlin'", ""),
    (fill("Volume", "8"), "field('Volume').value === '8'", ""),
    (fill("Volume", "7"), "field('Volume').value === '8'", "from 0 to 10 in steps of 2"),
    (press("ArrowUp", "Volume"), "field('Volume').value === '10'", ""),
    (fill("Day", "2026-12-24"), "field('Day').value === '2026-12-24'", ""),
    (fill("Day", "24.12."), "field('Day').value === '2026-12-24'", "a date is YYYY-MM-DD"),
    (fill("Paint", "#00FF00"), "field('Paint').value === '#00ff00'", ""),
    (fill("Search", "shoes"), "said.includes('key;')", ""),
    (press("Backspace", "Search"), "q.value === 'shoe'", ""),
    (press("Enter", "Search"), "said.includes('searched shoe;')", ""),
    (press("Tab", "Search"), "said.includes('next;')", ""),
]


DEAF = """<script>const add = window.addEventListener;
    window.addEventListener = function(name, ...more) {
      if (name !== "beforeunload") add.call(this, name, ...more); };</script>"""
FADE = "event.preventDefault(); setTimeout(() => location.href = this.href, 900)"
LATE = {  # what a page does late, with the time in ms
    "router": "<button onclick=\"setTimeout(() => { history.pushState({}, '', '/late');"
    " main.append('late') }, 900)\">Go</button>",
    "data": "<button onclick=\"main.ariaBusy = 'true', setTimeout(() => {"
    " main.append('late'); main.ariaBusy = 'false' }, 2500)\">Go</button>",
    "leaving": "<button onclick=\"setTimeout(() => location.href = '/late', 1300)\">Go</button>",
    "in this tab": "<button onclick=\"window.open('/late', '_self')\">Go</button>",
    "slow after a while": f'<a href="/late" onclick="{FADE}">Go</a>',
    "slow without beforeunload": f'{DEAF}<a href="/late">Go</a>',
    "slow to navigate": DEAF,
}


@pytest.mark.parametrize("what", LATE)
async def test_picture_of_a_page_at_rest(
    what: str, meet: Meet, model: FakeModel, pages: Pages
) -> None:
    """After a step the picture is taken when what it has set off is there; a page that is left
    slowly, or without "beforeunload", is not reported as unchanged."""
    pages.add("/late", "<main>late</main>")
    guest = await meet(f'<main id="main"><h1>Hi</h1>{LATE[what]}</main>')

    async def slow(route: Route) -> None:
        await asyncio.sleep(1.5)
        await route.continue_()

    if "slow" in what:
        await guest.page.route("**/late", slow)
    step = go(f"{pages.url}/late") if "navigate" in what else click("Go")
    await guest.ask("Go", does(step), says("There."), hears="There.")
    assert len(model.requests) == 2
    assert "late" in model.prompt().split("Visible text:")[-1]


TRAPS = {  # as in focus-trap, Bootstrap, MUI and Radix: the focus, the mouse or both are watched
    "bootstrap": "document.addEventListener('focusin', ({ target }) => {"
    " if (target !== document && !box.contains(target)) field.focus() })",
    "mui": "document.addEventListener('focusin', () => {"
    " if (!box.contains(document.activeElement)) field.focus() });"
    "document.addEventListener('focusin', ({ target }) => {"
    " if (!box.contains(target)) field.focus() }, true)",
    "radix": "document.addEventListener('focusout', ({ relatedTarget }) => {"
    " if (relatedTarget && !box.contains(relatedTarget)) field.focus() });"
    "document.addEventListener('pointerdown', ({ target }) => {"
    " if (!box.contains(target)) box.remove() });"
    "document.addEventListener('wheel', (event) => event.preventDefault(), { passive: false });"
    "document.addEventListener('keydown', ({ key }) => {"
    " if (key === 'Escape') box.remove() }, true)",
    "native": "box.showModal()",
}


# ---------------------------------------------------------------------------------------------
# For the page's author


SNIPPETS = """<script>
    window.heard = [];
    const events = "ready open close expand collapse message reply typing-start typing-end"
      + " state-change action navigating language-detected task_complete error destroy";
    for (const name of events.split(" ")) // they bubble to window
      addEventListener("leflux:" + name, ({ detail }) => heard.push([name, detail]));
    addEventListener("leflux:ready", () => {
      window.off = LeFlux.on("reply", ({ detail }) => heard.push(["on", detail.text]));
    });
</script>"""


async def test_published_snippets(
    visit: Visit, model: FakeModel, pages: Pages, server: Server
) -> None:
    """Each method, getter and event of LeFlux's published API once, with its details."""
    pages.add("/next", "<main>Next</main>")
    body = f"{SNIPPETS}<main><button>Press</button><a href='#next'>Further</a></main>"
    guest = Guest(await visit(pages.add("/", body)), model)
    page = guest.page
    get = page.evaluate

    async def tell(script: str, *events: str) -> list[Json]:
        """Run a snippet, wait for these events, return their details."""
        await get(f"heard = []; {script}; 0")
        await page.wait_for_function(
            "(names) => names.every((name) => heard.some(([one]) => one === name))", arg=events
        )
        heard = await get("heard")
        return [next(detail for name, detail in heard if name == one) for one in events]

    [state, language] = await tell(
        "LeFlux.on('ready', ({ detail }) => heard.push(['ready', detail]), 0),"
        " heard.push(['language-detected', { lang: LeFlux.getLanguage(), prev: null }])",
        "ready",
        "language-detected",
    )
    idle = {
        **{"ready": True, "open": False, "expanded": False, "conversation": "idle"},
        **{"language": "en", "layout": "floating", "host": pages.url.removeprefix("http://")},
        "sessionId": await get("LeFlux.getSessionId()"),
    }
    assert state == await get("LeFlux.getState()") == idle
    assert language == {"lang": "en", "prev": None}
    are = "[LeFlux.isReady(), LeFlux.isOpen(), LeFlux.isExpanded()]"
    assert await get(are) == [True, False, False]
    for shown in (False, True):
        await get("(shown) => LeFlux.showLauncher(shown)", shown)
        await expect(guest.see(".launcher")).to_be_visible(visible=shown)
    assert await tell("LeFlux.open()", "open") == [{"source": "api"}]
    assert await tell("LeFlux.toggle()", "close") == [{"source": "api"}]
    await get("heard = []")
    await guest.open()
    await guest.see("[aria-label='Close the chat']").click()
    assert await get("heard") == [[name, {"source": "click"}] for name in ("open", "close")]
    await tell("LeFlux.dock()", "expand", "open")
    assert await get("[LeFlux.getState().layout, LeFlux.isExpanded()]") == ["side-panel", True]
    await tell("LeFlux.undock()", "collapse")
    assert await get("LeFlux.isExpanded()") is False

    model.scripts.append(streams(model, "Good ", "day"))
    message, started = await tell("LeFlux.send(' Hello ')", "message", "typing-start")
    assert message | {"ts": 0} == {"text": "Hello", "ts": 0, "sessionId": idle["sessionId"]}
    assert started == {}
    assert await get("LeFlux.getState().conversation") == "typing"
    model.gate.release()
    model.gate.release()
    await guest.hears("Good day")
    await page.wait_for_function("LeFlux.getState().conversation === 'idle'")
    heard = await get("heard")
    names = [name for name, _ in heard if name != "state-change"]
    assert names == ["message", "typing-start", "typing-end", "on", "reply"]
    states = [(one["prev"], one["state"]) for name, one in heard if name == "state-change"]
    chain = ["idle", "processing", "typing", "processing", "idle"]
    assert states == list(itertools.pairwise(chain))
    reply = next(detail for name, detail in heard if name == "reply")
    assert abs(reply.pop("ts") - time.time() * 1000) < 60_000
    assert reply == {"text": "Good day", "isQuestion": False, "isError": False}

    model.scripts.append(asks("Which?"))
    [reply] = await tell("off(), LeFlux.ask('What is there?')", "reply")
    assert (reply["text"], reply["isQuestion"]) == ("Which?", True)
    assert "on" not in [name for name, _ in await get("heard")]
    await page.wait_for_function("LeFlux.getState().conversation === 'awaiting-input'")
    assert [post.get("intent") for post in guest.posts] == [None, "ask"]

    model.scripts += [does(click("Press")), does(go("/#next")), ends("Pressed.")]
    assert await tell("LeFlux.send('Press it')", "action", "navigating", "task_complete") == [
        {"type": "click_element", "target": "Press", "description": "click Press"},
        {"url": f"{pages.url}/#next", "method": "link"},
        {"summary": "Pressed."},
    ]
    await get("LeFlux.setVisitorData({ plan: 'Pro' }), LeFlux.reindex()")
    await until(lambda: guest.context.get("visitorData") == {"plan": "Pro"})
    [error] = await tell("LeFlux.send('x'.repeat(5001))", "error")
    assert error == {"code": "invalid_message", "message": "That is too long for one message."}

    # What was cleared before it went out does not go out.
    [old] = server.app.sessions
    await get("LeFlux.clearConversation()")
    await until(lambda: old not in server.app.sessions)
    assert await guest.log() == ["bot: Hello!"]
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slow(route: Route) -> None:
        begun.set()
        await gate.wait()
        await route.continue_()

    await page.route("**/api/session/init", slow)
    await get("LeFlux.send('A secret')")
    await begun.wait()
    await get("LeFlux.clearConversation()")
    gate.set()
    await guest.ask("Hello again", hears="ok")
    assert [post["message"] for post in guest.posts[3:]] == ["Hello again"]
    await page.reload()
    await page.wait_for_function("heard.some(([name]) => name === 'ready')")
    assert ["open", {"source": "restore"}] in await get("heard")
    await tell("LeFlux.close()", "close")

    assert await tell("LeFlux.destroy()", "destroy") == [{}]
    assert await page.locator("leflux-widget").count() == 0
    methods = "open close toggle send ask setVisitorData dock undock clearConversation showLauncher"
    await get(
        "(names) => { heard = []; for (const name of names.split(' ')) LeFlux[name]('x'); }",
        f"{methods} reindex destroy off on",
    )
    assert await get("LeFlux.getState()") == idle | {"ready": False, "sessionId": None}
    assert await get("heard") == []
    await page.add_script_tag(url=f"{server.url}/embed.js")  # and once more
    await guest.open()
    await guest.ask("Again", hears="ok")


STORED = "Object.keys(localStorage).concat(Object.keys(sessionStorage), document.cookie || [])"


@with_config(config={"nudge": {"enabled": True, "message": "Help?", "delay": 0}})
async def test_nothing_is_stored_before(visit: Visit, pages: Pages, server: Server) -> None:
    """The browser stores nothing before the visitor opens the chat; with data-consent, not even
    the server is asked before LeFlux.allow()."""
    page = await visit(pages.add("/", "<input name=email>", script="data-consent"))
    assert await page.evaluate("Object.keys(LeFlux)") == ["allow"]
    assert await page.locator("leflux-widget").count() == len(server.app.sessions) == 0
    await page.evaluate("LeFlux.allow()")
    await page.locator("leflux-widget .nudge").wait_for()
    await page.fill("input", "ada@example.com")
    await page.keyboard.press("Tab")
    await page.evaluate("LeFlux.setVisitorData({ plan: 'Pro' }), LeFlux.open(), LeFlux.close()")
    await page.wait_for_timeout(600)
    assert await page.evaluate(STORED) == []
    await Guest(page).open()
    stored = await page.evaluate(STORED)
    assert {"leflux:userData", f"leflux {server.url} session"} <= set(stored)


async def test_visitor_memory(meet: Meet, pages: Pages) -> None:
    """What a visitor has typed into forms is offered to later ones for 30 days, secrets never."""
    form = """<input name=email><input autocomplete=given-name><input name=iban>
        <input aria-label='Telefon'><input name=q><input name=username>"""
    guest = await meet(MAIN % form)
    page = guest.page
    for name, value in enumerate(("ada@example.com", "Ada", "DE00", "0421 1", "shoes", "ada1")):
        await page.locator("main input").nth(name).fill(value)
    await guest.ask("Hello", hears="ok")

    async def offered() -> dict[str, str]:
        await page.goto(f"{pages.url}/?{len(guest.posts)}")  # a reload would fill them in again
        await guest.ask("Hello", hears="ok")
        names = {
            one["id"]: one["text"] or one.get("name") for one in guest.context["indexedElements"]
        }
        fields = guest.context["previouslyFilledFields"]
        assert all(one.keys() == {"elementId", "value", "timestamp"} for one in fields)
        return {names[one["elementId"]]: one["value"] for one in fields}

    pages.add("/", MAIN % form.replace("autocomplete=given-name", "name=first_name"))
    known = {"email": "ada@example.com", "first_name": "Ada", "Telefon": "0421 1"}
    assert await offered() == known
    pages.add("/", MAIN % form, script="data-no-user-memory")
    assert await offered() == {}
    pages.add("/", MAIN % form)
    await page.evaluate(
        """() => { const kept = JSON.parse(localStorage["leflux:userData"]);
            for (const one of Object.values(kept.fields)) one.timestamp -= 31 * 24 * 3600 * 1000;
            kept.fields.tel.timestamp = Date.now();
            localStorage["leflux:userData"] = JSON.stringify(kept); }"""
    )
    assert await offered() == {"Telefon": "0421 1"}
    await page.evaluate("LeFlux.setVisitorData(null)")
    assert await page.evaluate("localStorage['leflux:userData']") is None
    assert await offered() == {}


CUSTOM = [  # a property that the page may set, where it is seen, and as what
    *(("primary", ".bar", "backgroundColor"), ("bg", ".panel", "backgroundColor")),
    *(("messages-bg", ".log", "backgroundColor"), ("input-bg", "form", "backgroundColor")),
    *(("input-border", "form", "borderTopColor"), ("border", ".panel", "borderLeftColor")),
    *(("text-primary", ".panel", "color"), ("text-secondary", ".counter", "color")),
]


async def test_attributes(meet: Meet, server: Server) -> None:
    """data-preview asks no server; data-no-spa-detect leaves routers alone; custom properties of
    the page restyle the panel."""
    config = json.dumps({"greeting": "Look!", "layout": "side-panel"}).replace('"', "&quot;")
    looks = [f"--leflux-{name}: rgb({n}, 0, 0) !important" for n, (name, *_) in enumerate(CUSTOM)]
    style = f"<style>#ai-chat-widget-container {{ {';'.join(looks)} }}</style>"  # as at LeFlux
    guest = await meet(style, f'data-preview="{config}"')
    await guest.ask("Hello")
    await guest.see(".bot", "This is a preview.").wait_for()
    assert (await guest.log())[:2] == ["bot: Look!", "user: Hello"]
    for number, (_, selector, what) in enumerate(CUSTOM):
        shown = await guest.see(selector).evaluate(f"(node) => getComputedStyle(node).{what}")
        assert shown == f"rgb({number}, 0, 0)", selector
    assert not server.app.sessions
    guest = await meet("", "data-no-spa-detect")
    await guest.ask("Hello", hears="ok")
    await guest.page.evaluate("history.pushState({}, '', '/about')")
    await guest.page.wait_for_timeout(1200)
    assert not guest.sent("update_context")


async def test_strict_policy(meet: Meet, pages: Pages, server: Server) -> None:
    """It works under a policy that allows the server's scripts and connections, and no more."""
    policy = (
        f"default-src 'none'; script-src {server.url};"
        f" connect-src {server.url} {server.url.replace('http', 'ws')};"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    body = (
        '<main><a href="/next">Next</a> <input aria-label="Name">'
        '<p contenteditable="true" aria-label="Note">x</p></main>'
    )
    pages.add("/next", "<main>Next page</main>", Content_Security_Policy=policy)
    guest = await meet(body, policy=policy)
    await guest.page.evaluate(
        """() => { window.violations = []; document.addEventListener("securitypolicyviolation",
            ({ violatedDirective, sourceFile }) => violations.push(violatedDirective)); }"""
    )
    message = "With **Markdown** and `code`."
    plan = does(fill("Name", "Ada"), fill("Note", "new"), message=message)
    cards = [{"title": "T", "description": "x", "url": "/next"}]
    block = {"block_type": "link_cards", "data": {"items": cards}}
    await guest.ask("Fill it in", plan, says("Here:", type="render_ui_block", **block))
    await guest.see("a.card", "T").wait_for()
    assert [step["success"] for step in guest.results()[0]["results"]] == [True, True]
    await expect(guest.see(".bot strong")).to_have_text("Markdown")
    style = "node => getComputedStyle(node).position"
    assert await guest.see(".panel").evaluate(style) == "fixed"
    assert await guest.page.evaluate("violations") == []
    await guest.ask("Next", does(go("/next")), ends("There."), hears="There.")


# ---------------------------------------------------------------------------------------------
# A whole visit on the demo shop


async def test_visit_with_the_guide(meet: Meet, serve: Serve) -> None:
    """Without a model: a letter that lacks something, an account's end; and others who write from
    whichever page they are on. A price, and the way to the contact page: see test_engines.py."""
    url = await shop(serve)

    async def agrees(guest: Guest, selector: str, text: str) -> None:
        await guest.see(".choices button:first-child:enabled").click()
        await guest.page.locator(selector, has_text=text).wait_for()
        await guest.hears("Done.")

    async def write(start: str) -> None:
        guest = await meet(f"{url}/{start}")
        await guest.ask("Send a message that I love your coffee, my name is Ada, ada@example.com")
        await agrees(guest, "#sent", "Thank you!")
        steps = [step for result in guest.results() for step in result.get("results", [])]
        assert [step["text"] for step in steps] == ["Ada", "ada@example.com", "I love your coffee"]

    async def visit_all() -> None:
        guest = await meet(f"{url}/contact")
        letter = "Send a message, I'm Ada, ada@example.com"
        await guest.ask(letter, hears="What shall I put into “Message”?")
        values = [await guest.page.input_value(field) for field in ("#name", "#email")]
        assert values == ["Ada", "ada@example.com"]
        await guest.ask("I love your coffee")
        await agrees(guest, "#sent", "Thank you!")
        await guest.ask("Delete my account")
        await guest.see(".confirm button:enabled", "No").click()
        await guest.hears(lf.ENGLISH("not_confirmed"))
        await guest.ask("Delete my account")
        await agrees(guest, "#account", "is deleted")

    async with asyncio.TaskGroup() as group:
        for start in ("", "prices", "contact"):
            group.create_task(write(start))
        group.create_task(visit_all())


async def test_visit_with_a_model(meet: Meet, serve: Serve, model: FakeModel) -> None:
    """With a model: over three pages, a form, a question and a confirmation in one task."""
    guest = await meet(await shop(serve, model))
    await guest.ask(
        "Choose Pro and write to them",
        does(go("/prices"), message="I look at the prices."),
        does(click("Choose Pro"), message="I choose Pro."),
        does(click("Contact"), message="Now to the form."),
        does(fill("Name", "Ada"), fill("E-mail", "ada@example.com"), message="I fill it in."),
        asks("What shall I write?"),
        does(fill("Message", "Hello there")),
        does(click("Send message")),
        ends("It is on its way."),
        hears="What shall I write?",
    )
    assert "Choose Pro: a good choice" in model.prompt(2)
    await guest.ask("Hello there")
    await guest.see(".choices button:first-child:enabled").click()
    await guest.hears("It is on its way.")
    await guest.page.locator("#sent", has_text="Thank you!").wait_for()
    assert all(result["success"] for result in guest.results())
    assert not model.scripts
