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
import socket
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.async_api import Locator, Page, Request, Route, WebSocket, expect

import leflux_server as lf
from conftest import (
    FakeModel,
    Json,
    Pages,
    Script,
    Serve,
    Server,
    Visit,
    act,
    chunk,
    cut_wire,
    forever,
    program,
    sse,
    until,
)

SHIPPED = tomllib.loads((lf.HERE / "config.toml").read_text())
DEMO: Json = SHIPPED["sites"][0]


# ---------------------------------------------------------------------------------------------
# Helpers: pages on a server of their own, a model that names elements, a visitor who chats.


def says(message: str, **action: Any) -> list[bytes]:
    """A script of the model that says something and, with a type, does something."""
    reply = {"message": message, "action": action or None}
    return [sse(chunk(json.dumps(reply)), "[DONE]")]


def does(*steps: Json, message: str = "On it.") -> Script:
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


def click(name: str) -> Json:
    return {"action": "click", "on": name}


class Guest:
    """A visitor with an open chat, and everything that their browser sends and hears."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[Json] = []
        self.heard: list[Json] = []
        self.joins: list[str] = []  # addresses of its sockets
        self.posts: list[Json] = []
        page.on("websocket", self._on_socket)
        page.on("request", self._on_request)

    def _on_socket(self, ws: WebSocket) -> None:
        self.joins.append(ws.url)
        ws.on("framesent", lambda frame: self.said.append(json.loads(frame)))
        ws.on("framereceived", lambda frame: self.heard.append(json.loads(frame)))

    def _on_request(self, request: Request) -> None:
        if request.url.endswith("/api/chat") and request.method == "POST":
            self.posts.append(json.loads(request.post_data or ""))

    async def open(self) -> Guest:
        await self.page.click("leflux-widget .launcher")
        return self

    async def ask(self, text: str) -> None:
        await self.page.fill("leflux-widget textarea", text)
        await self.page.press("leflux-widget textarea", "Enter")

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
        shown = [f["data"]["context"] for f in self.said if "context" in f["data"]]
        context: Json = shown[-1] if shown else self.posts[-1]["pageContext"]
        return context


Meet = Callable[..., Any]


@pytest.fixture
def meet(visit: Visit) -> Meet:
    async def start(url: str, **options: Any) -> Guest:
        return await Guest(await visit(url, **options)).open()

    return start


async def chat_server(
    serve: Serve, pages: Pages | None = None, model: FakeModel | None = None, **tables: Any
) -> Server:
    """A server whose site is localhost; the pages load the widget from it."""
    config = {"greeting": "Hello!"}
    site = {"id": "site", "name": "Site", "allowed_hosts": ["localhost"], "config": config}
    server = await serve(model, **{"sites": [site], **tables})
    if pages:
        pages.server = server.url
    return server


async def shop(serve: Serve, model: FakeModel | None = None, **config: Any) -> str:
    """Start a server with the demo shop, its siteConfig changed; returns the shop's address."""
    site = {**DEMO, "config": {**DEMO["config"], **config}}
    server = await serve(model, sites=[site])
    return server.url.replace("127.0.0.1", "localhost")


# ---------------------------------------------------------------------------------------------
# Mount


async def test_second_tag_does_nothing(visit: Visit, serve: Serve, pages: Pages) -> None:
    """Two tags on a page are one widget, and one session."""
    server = await chat_server(serve, pages)
    tag = f'<script src="{server.url}/embed.js"></script>'
    page = await visit(pages.add("/", tag))
    await page.wait_for_function("window.LeFlux?.getState().ready")
    await page.add_script_tag(url=f"{server.url}/embed.js")
    assert await page.locator("leflux-widget").count() == 1
    assert len(server.app.sessions) == 1


async def test_unknown_host_is_left_alone(visit: Visit, serve: Serve, pages: Pages) -> None:
    """On a page that is not registered the widget leaves no trace but one line in the console."""
    await chat_server(serve, pages)
    url = pages.add("/", "<p>Just a page</p>").replace("localhost", "127.0.0.1")
    page = await visit("about:blank")
    lines: list[str] = []
    page.on("console", lambda line: lines.append(line.text))
    await page.goto(url)
    await until(lambda: any("allowed_hosts" in line for line in lines))
    lines = [line for line in lines if "Failed to load resource" not in line]
    assert len(lines) == 1
    assert "127.0.0.1" in lines[0]
    assert await page.evaluate("window.LeFlux") is None
    assert await page.evaluate("document.documentElement.children.length") == 2
    assert "leflux-widget" not in await page.content()


async def test_copied_script_says_where_it_belongs(visit: Visit, pages: Pages) -> None:
    """embed.js from the website's own address finds no server there, and says so once."""
    page = await visit("about:blank")
    lines, tries = list[str](), list[str]()
    page.on("console", lambda line: lines.append(line.text))
    page.on("request", lambda request: tries.append(request.url))
    path = lf.HERE / "widget" / "embed.js"
    await page.route("**/copied.js", lambda route: route.fulfill(path=path))
    url = pages.add("/", '<script src="/copied.js"></script>')
    await page.goto(url)
    await until(lambda: sum(one.endswith("/init") for one in tries) == 3)
    said = [line for line in lines if line.startswith("leflux: ")]
    assert len(said) == 1
    assert url.removesuffix("/") in said[0]


# ---------------------------------------------------------------------------------------------
# Chat

MARKDOWN = """\
Some **bold**, *italic* and `code <b>`.
A second line with [a link](/prices) and https://example.com/x_y_z.

1. one
2. two

- **dash**
- snake_case_word

```
<i>fenced</i>
```
مرحبا"""


async def test_streamed_answer(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """An answer grows in its bubble while the model speaks, and can be stopped."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", "<main>Hello</main>"))
    first, second = MARKDOWN[:40], MARKDOWN[40:]
    escaped = [json.dumps(part)[1:-1] for part in (first, second)]
    model.scripts.append(
        [
            model.at_gate,
            sse(chunk('{"message": "' + escaped[0])),
            model.at_gate,
            sse(chunk(escaped[1] + '"}'), "[DONE]"),
        ]
    )
    await guest.ask("Show me **everything**")
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
    html = await bubble.evaluate("node => node.innerHTML.replace(/\\n(?=<)/g, '')")
    link = f'<a href="{pages.url}/prices" rel="noopener nofollow">a link</a>'
    assert "<strong>bold</strong>, <em>italic</em> and <code>code &lt;b&gt;</code>." in html
    assert link in html
    assert ' target="_blank">https://example.com/x_y_z</a>.' in html
    assert '<ol dir="auto"><li>one</li><li>two</li></ol>' in html
    assert "<li><strong>dash</strong></li><li>snake_case_word</li></ul>" in html
    assert "&lt;i&gt;fenced&lt;/i&gt;</code></pre>" in html
    assert html.endswith('<p dir="auto">مرحبا</p>')

    model.scripts.append([sse(chunk('{"message": "This goes on')), forever])
    await guest.ask("Tell me more")
    await guest.see(".bot", "This goes on").wait_for()
    await guest.see(".stop").click()
    await until(lambda: guest.heard[-1]["event"] == "message_done")
    await expect(guest.see(".stop")).to_be_hidden()
    assert (await guest.log())[-1] == "bot: This goes on"
    assert guest.sent("stop")
    await until(lambda: model.hung_up)

    model.scripts.append([sse(chunk('{"message": "Long')), forever])
    await guest.ask("Once more")
    await guest.see(".bot", "Long").wait_for()
    await guest.ask("Never mind")  # settles the answer before
    await guest.hears("ok")
    assert (await guest.log())[-4:] == [
        "user: Once more",
        "bot: Long",
        "user: Never mind",
        "bot: ok",
    ]


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


async def test_hostile_reply(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """Whatever a model says is text: nothing runs, nothing is slow, and no link is a script."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", "<main>Hello</main>"))

    def count(event: str, wanted: int) -> bool:
        return [frame["event"] for frame in guest.heard].count(event) == wanted

    tags = "a br code em li ol p pre span strong ul".split()
    for number, text in enumerate(HOSTILE):
        texts = "title name q a body description icon price period cta_label cta_url url".split()
        block = {**dict.fromkeys(texts, text[:300]), "features": [text[:300], 7, None]}
        data = {"items": [block, "not an object", None, {**block, "cta_action": text}]}
        block_type = list(lf.BLOCKS)[number % 4]
        model.scripts.append(says(text, type="render_ui_block", block_type=block_type, data=data))
        await guest.ask(f"Attack {number}")
        await until(functools.partial(count, "ui_block", number + 1))
        model.scripts.append(says(text, type="ask_user", question=text, field_type=text))
        await guest.ask(f"Attack {number} again")
        await until(functools.partial(count, "message", number + 1))
    await expect(guest.see(".stop")).to_be_hidden()
    found: list[str] = await guest.page.evaluate(
        """() => [...document.querySelector("leflux-widget").shadowRoot
            .querySelectorAll(".log > .bot, .log > .bot *")].flatMap((node) => [node.localName,
            ...[...node.attributes].map((a) => `${a.name}=${a.value}`)])"""
    )
    assert {name for name in found if "=" not in name} <= {"div", *tags}
    names = {name.partition("=")[0] for name in found if "=" in name}
    assert names <= {"class", "dir", "href", "rel", "target", "start", "tabindex"}
    assert not [name for name in found if re.match(r"href=(?!https?://)", name)]
    for link in await guest.see(".log a").all():
        await link.dispatch_event("click", {"ctrlKey": True})
    assert await guest.page.evaluate("window.hit") is None


async def test_questions_and_blocks(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A question brings the right keyboard; all four blocks are shown as cards."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", "<main>Hello</main>"))
    area = guest.see("textarea")
    for kind, mode in {"email": "email", "tel": "tel", "number": "decimal", "x": "text"}.items():
        question = {"question": f"Your {kind}?", "field_name": kind, "field_type": kind}
        model.scripts.append(says("", type="ask_user", **question))
        await guest.ask("Go on")
        await guest.hears(f"Your {kind}?")
        assert await area.evaluate("node => node.inputMode") == mode
        await expect(area).to_be_focused()
    await guest.ask("Ada")
    assert await area.evaluate("node => node.inputMode") == "text"
    await guest.hears("ok")

    items = {
        "pricing_cards": [
            {
                "name": "Pro",
                "price": "€18",
                "period": "a month",
                "highlighted": True,
                "features": ["Two bags", "Post"],
                "cta_label": "Choose Pro",
                "cta_action": "I want Pro",
            },
            {"name": "Free", "cta_label": "Begin", "cta_url": "https://other.example/"},
        ],
        "feature_grid": [{"title": "Fast", "body": "It is **fast**.", "icon": "🚀"}],
        "faq_list": [{"q": "When?", "a": "Now."}],
        "link_cards": [{"title": "Prices", "url": "/prices", "description": "All of them"}],
    }
    shown = {
        "pricing_cards": "Pro\n€18 a month\nTwo bags\nPost\nChoose Pro\nFree\nBegin",
        "feature_grid": "🚀\nFast\nIt is fast.",
        "faq_list": "When?",
        "link_cards": "Prices\nAll of them",
    }
    for block_type, data in items.items():
        model.scripts.append(
            says("Look:", type="render_ui_block", block_type=block_type, data={"items": data})
        )
        await guest.ask("Show me")
        await guest.see(".cards", shown[block_type].split("\n")[0]).wait_for()
        card = guest.see(".cards").last
        assert re.sub(r"\n+", "\n", await card.inner_text()) == shown[block_type]
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


async def test_confirmation(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """A delicate click waits for the visitor's yes; no, or another message, means no."""
    await chat_server(serve, pages, model)
    button = "<main><button onclick='this.after(`gone `)'>Delete it</button></main>"
    guest = await meet(pages.add("/", button))
    yes = guest.see(".choices button:first-child:enabled")
    no = guest.see(".choices button:last-child:enabled")
    model.scripts.append(does(click("Delete it")))
    await guest.ask("Delete it")
    await guest.see(".confirm", "Shall I click “Delete it”?").wait_for()
    await expect(no).to_be_focused()
    await no.click()
    await guest.hears(lf.ENGLISH("not_confirmed"))
    await expect(yes).to_have_count(0)
    assert await guest.page.inner_text("main") == "Delete it"

    # Both are still of the current turn, which a reload hears again: once each, and no button.
    before = await guest.log()
    await guest.page.reload()
    await guest.see(".confirm").wait_for()
    await guest.see(".bot", lf.ENGLISH("not_confirmed")).wait_for()
    await expect(guest.see(".confirm button:enabled")).to_have_count(0)
    bubbles = [line for line in before if not line.startswith("confirm")]
    assert [line for line in await guest.log() if not line.startswith("confirm")] == bubbles
    await expect(guest.see(".confirm")).to_have_count(1)

    model.scripts.append(does(click("Delete it")))
    await guest.ask("Delete it, really")
    await yes.click()
    model.scripts.append(says("", type="task_complete", summary="It is deleted."))
    await guest.hears("It is deleted.")
    assert await guest.page.inner_text("main") == "Delete itgone"
    assert guest.results()[-1]["success"] is True

    model.scripts.append(does(click("Delete it")))
    await guest.ask("And again")
    await expect(guest.see(".confirm button:enabled")).to_have_count(2)
    await guest.ask("No, tell me a joke")
    await expect(guest.see(".confirm button:enabled")).to_have_count(0)
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


async def test_what_follows_a_text(
    visit: Visit, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """The event after a turn's text has a bubble of its own, none for the same words.

    A reload shows the same, and is no news.
    """
    await chat_server(serve, pages, model)
    url = pages.add("/", "<main><button>Red</button></main>")

    async def see(action: Json, more: list[str]) -> None:
        guest = Guest(await visit("about:blank"))
        await guest.page.add_init_script(
            "window.replies = []; addEventListener('leflux:reply', "
            "({ detail }) => replies.push(`bot: ${detail.text.replaceAll('*', '')}`))"
        )
        await guest.page.goto(url)
        await guest.open()
        wanted = ["bot: Hello!", "user: Go", WHICH_SHOWN, *more]

        async def is_seen() -> None:
            await expect(guest.see(".log > :not(.chips)")).to_have_count(len(wanted))
            await expect(guest.see(".stop")).to_be_hidden()
            assert [" ".join(line.split()) for line in await guest.log()] == wanted

        await guest.ask("Go")
        await is_seen()
        replies = [re.sub("^confirm: (.*[?]).*", r"bot: \1", line) for line in wanted[2:]]
        replies = [line for line in replies if line.startswith("bot: ")]
        assert await guest.page.evaluate("replies") == replies
        await guest.page.reload()
        await until(lambda: guest.sent("update_context"))  # what is replayed comes before
        await is_seen()
        assert await guest.page.evaluate("replies") == []

    for action, more in ENDS.values():
        model.scripts.append(act(WHICH, action or None))
        await see(action, more)


async def test_text_before_a_plan(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """Between a turn's text and its plan the agent is still at work, and takes no focus."""
    await chat_server(serve, pages, model)
    body = "<main><input aria-label='City'><button onclick='this.after(`+`)'>Add</button></main>"
    guest = await meet(pages.add("/", body))
    await guest.see(".stop").evaluate(
        """(stop) => { window.seen = [];
            new MutationObserver(() => seen.push(!stop.hidden)).observe(stop, { attributes: true });
            document.querySelector("input").addEventListener("blur", () => seen.push("blur")); }"""
    )
    model.scripts += [
        does(fill("City", "Bremen"), message="First the city."),
        [model.at_gate, *says("That is it.")],
    ]
    await guest.ask("Fill it in")
    await until(guest.results)
    assert await guest.log() == [
        "bot: Hello!",
        "user: Fill it in",
        "bot: First the city.",
        "bot: The assistant is working",
    ]
    model.gate.release()
    await guest.hears("That is it.")
    await expect(guest.see("textarea")).to_be_focused()
    assert await guest.page.evaluate("seen") == [True, "blur", False]

    # Stopped in its text, a turn has no plan.
    plan = json.dumps({"message": "I add one.", "action": PRESS | {"elementId": 2}})
    cut = plan.index(" one")
    model.scripts.append([sse(chunk(plan[:cut])), model.at_gate, sse(chunk(plan[cut:]), "[DONE]")])
    await guest.ask("Add one")
    await guest.see(".bot", "I add").wait_for()
    await guest.see(".stop").click()
    await until(lambda: guest.heard[-1]["event"] == "message_done")
    model.gate.release()
    model.scripts.append(says("Here."))
    await guest.ask("Hello?")
    await guest.hears("Here.")
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


async def test_cut_wire_before_the_end(
    visit: Visit, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """When the socket breaks between a turn's text and what follows, that comes once, too."""
    await chat_server(serve, pages, model)
    url = pages.add("/", "<main><button onclick='this.after(`+`)'>Add</button></main>")
    page = await visit("about:blank")
    await page.add_init_script(BREAKING)
    await page.goto(url)
    guest = await Guest(page).open()
    model.scripts += [does(click("Add"), message="I add one."), says("Now?", **ENDS["end"][0])]
    await guest.ask("Add one")
    await guest.hears("All done.")
    model.scripts.append(says(WHICH, **ENDS["question in the same words"][0]))
    await guest.ask("And now?")
    await guest.hears("Shall it be")
    await until(lambda: len(guest.joins) == 4)
    model.scripts.append(says("", type="ask_user", question=WHICH))  # asked once more
    await guest.ask("No")
    await expect(guest.see(".bot", "Shall it be")).to_have_count(2)
    assert await guest.log() == [
        "bot: Hello!",
        "user: Add one",
        "bot: I add one.",
        "bot: Now?",
        "bot: All done.",
        "user: And now?",
        WHICH_SHOWN,
        "user: No",
        WHICH_SHOWN,
    ]
    assert await page.inner_text("main") == "Add+"
    assert len(guest.joins) == 4
    assert all(re.search("lastSeq=[1-9]", address) for address in guest.joins[1:])


async def test_errors_and_retry(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """What fails is said in words; a retry is the same message, which the server starts once."""
    server = await chat_server(serve, pages, model, limits={"chat_per_minute": 2})
    guest = await meet(pages.add("/", "<main>Hello</main>"))
    failures = ["before", "after", "before", "before"]

    async def fail(route: Route) -> None:
        kind = failures.pop(0) if failures else ""
        if kind == "after":
            await route.fetch()  # the server hears it, the visitor does not hear the server
        await (route.abort() if kind else route.continue_())

    await guest.page.route("**/api/chat", fail)
    await guest.ask("Hello?")
    await guest.see(".error", "cannot be reached").wait_for()
    await expect(guest.see(".stop")).to_be_hidden()
    await guest.see(".error button", "Try again").click()
    await guest.hears("ok")
    await expect(guest.see(".error")).to_have_count(0)
    await expect(guest.see(".pending")).to_have_count(0)
    assert len({post["clientMessageId"] for post in guest.posts}) == 1
    assert len(guest.posts) == 5
    assert len(model.requests) == 1
    assert (await guest.log())[-2:] == ["user: Hello?", "bot: ok"]

    await guest.ask("Another")
    await guest.hears("ok")
    await guest.ask("One too many")
    await guest.see(".error", re.compile(r"Please try again in \d+ s\.")).wait_for()
    await guest.see(".error button", "Try again").wait_for()
    server.app.buckets.clear()
    await guest.see(".error button").click()
    await until(lambda: len(model.requests) == 3)
    await guest.hears("ok")

    model.scripts.append([cut_wire])
    model.scripts.append([cut_wire])
    model.scripts.append([cut_wire])
    server.app.buckets.clear()
    await guest.ask("And now?")
    await guest.see(".bot.error", lf.ENGLISH("no_answer")).wait_for()
    await expect(guest.see(".stop")).to_be_hidden()


async def test_budget_has_no_retry(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """When the day's budget is spent the site's own words say so; trying again would not help."""
    await chat_server(serve, pages, model, limits={"site_messages_per_day": 1})
    guest = await meet(pages.add("/", "<main>Hello</main>"))
    await guest.ask("One")
    await guest.hears("ok")
    await guest.ask("Two")
    await guest.see(".error", "for today").wait_for()
    assert await guest.see(".error button").count() == 0


async def test_long_messages(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """A counter appears near 5,000 characters, counted as people and the server count."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", "<main>Hello</main>"))
    counter, area, send = guest.see(".counter"), guest.see("textarea"), guest.see("form button")
    await area.fill("a" * 4499)
    await expect(counter).to_be_hidden()
    await area.fill("🙂" * 4999 + "ab")
    await expect(counter).to_have_text("5001 / 5000")
    await expect(send.last).to_be_disabled()
    await area.press("Enter")
    await area.press("Backspace")
    await expect(counter).to_have_text("5000 / 5000")
    await area.press("Enter")
    await guest.hears("ok")
    assert model.requests[-1]["messages"][-1]["content"].endswith("🙂a")
    await expect(counter).to_be_hidden()
    await guest.page.evaluate("LeFlux.send('b'.repeat(5001))")
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

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()


def streams(model: FakeModel, *pieces: str) -> None:
    """The next answer comes in pieces, and waits at the gate between them."""
    steps: list[Any] = [sse(chunk('{"message": "'))]
    for piece in pieces:
        steps += [sse(chunk(piece)), model.at_gate]
    model.scripts.append([*steps, sse(chunk('"}'), "[DONE]")])


async def test_session_is_kept(visit: Visit, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """The chat goes on after a reload, for 24 hours; an older one, or a lost one, begins anew."""
    server = await chat_server(serve, pages, model)
    guest = await Guest(await visit(pages.add("/", "<main>Hello</main>"))).open()
    await guest.ask("Remember me")
    await guest.hears("ok")
    [kept] = server.app.sessions
    stored = "Object.keys(localStorage).find((key) => key.endsWith(' session'))"
    assert await guest.page.evaluate(f"JSON.parse(localStorage[{stored}]).id") == kept

    replies = "window.replies = 0; document.addEventListener('leflux:reply', () => replies++)"
    await guest.page.add_init_script(replies)
    gets: list[str] = []
    guest.page.on("request", lambda request: gets.append(f"{request.method} {request.url}"))
    await guest.page.reload()
    await guest.see(".bot", "ok").wait_for()  # the panel is open as before
    await until(lambda: guest.sent("update_context"))  # the page has shown itself
    assert await guest.log() == ["bot: Hello!", "user: Remember me", "bot: ok"]
    assert f"GET {server.url}/api/session/{kept}" in gets
    assert not [line for line in gets if "session/init" in line]
    assert await guest.page.evaluate("replies") == 0  # it is no news

    lf.drop_session(server.app, server.app.sessions[kept])  # idle for too long, say
    model.scripts.append(says("Yes, I am."))
    await guest.ask("Are you still there?")
    await guest.hears("Yes, I am.")
    await expect(guest.see(".dots")).to_have_count(0)
    assert (await guest.log())[-5:] == [
        "user: Remember me",
        "bot: ok",
        "note: The earlier chat has ended; what follows starts afresh.",
        "user: Are you still there?",
        "bot: Yes, I am.",
    ]
    assert len(server.app.sessions) == 1

    await guest.page.evaluate(
        f"""() => {{
            const key = {stored}, kept = JSON.parse(localStorage[key]);
            kept.at -= 24 * 3600 * 1000;
            localStorage[key] = JSON.stringify(kept);
        }}"""
    )
    await guest.page.reload()
    await guest.page.wait_for_function("LeFlux?.getState().ready")
    assert await guest.log() == ["bot: Hello!"]
    assert len(server.app.sessions) == 2


async def test_reload_over_plain_http(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """By IP and plain http a browser's GET does not say whose it is: the chat begins anew."""
    server = await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", "<main>Hello</main>"))
    await guest.ask("Hello")
    await guest.hears("ok")

    async def refuse(route: Route) -> None:
        refusal = {"error": "host_not_registered", "message": "Who?", "details": {}}
        is_get = route.request.method == "GET"
        await (route.fulfill(status=403, json=refusal) if is_get else route.continue_())

    await guest.page.route("**/api/session/*", refuse)
    await guest.page.reload()
    await guest.ask("Hello again")
    await guest.hears("ok")
    assert await guest.log() == ["bot: Hello!", "user: Hello again", "bot: ok"]
    assert len(server.app.sessions) == 2


async def test_reload_in_the_middle(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A reload in the middle of a stream shows what was said and what is still to come."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", "<main>Hello</main>"))
    streams(model, "One, ", "two, ", "three.")
    await guest.ask("Count")
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
    assert await guest.log() == ["bot: Hello!", "user: Count", "bot: One, two, three."]
    assert len(model.requests) == 1


async def test_cut_wire(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """A broken socket comes back with lastSeq: nothing is lost, nothing comes twice."""
    server = await chat_server(serve, pages, model)
    async with Wire(server.url) as wire:
        pages.server = wire.url
        body = "<main><button onclick='this.after(`+`)'>Add</button></main>"
        guest = await meet(pages.add("/", body))
        streams(model, "One, ", "two, ", "three.")
        await guest.ask("Count")
        await guest.see(".bot", "One,").wait_for()
        wire.is_up = False
        wire.cut()
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
        model.scripts.append(does(click("Add"), click("Add"), click("Add")))
        model.scripts.append(says("", type="task_complete", summary="All added."))
        await guest.ask("Add three")
        await guest.see(".ring").wait_for()
        wire.is_up = False
        wire.cut()
        await until_text(guest.page, "main", "Add+++")
        wire.is_up = True
        await guest.page.evaluate("dispatchEvent(new Event('online'))")  # it comes back at once
        await guest.hears("All added.")
        assert await guest.page.inner_text("main") == "Add+++"

        # The report itself is lost on the way: it is said again.
        model.scripts.append(does(click("Add")))
        model.scripts.append(says("", type="task_complete", summary="One more."))
        await guest.ask("Add one")
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
        assert await guest.page.inner_text("main") == "Add++++"


async def until_text(page: Page, selector: str, text: str) -> None:
    await expect(page.locator(selector)).to_have_text(text, use_inner_text=True)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "forgetful"])
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
        guest = await Guest(await visit(pages.add("/", "<main>Hello</main>"))).open()
        streams(model, "One, ", "two.")
        await guest.ask("Count")
        await guest.see(".bot", "One,").wait_for()
        if how == "SIGTERM":
            run.child.terminate()
        else:
            run.child.kill()
        await run.end()
        await guest.see(".banner", "Reconnecting…").wait_for()
    async with program(tmp_path, more, **environ):
        endings = {
            "SIGTERM": "(The answer was cut short.)",
            "SIGKILL": lf.ENGLISH("restarted"),
            "forgetful": "The answer got lost.",
        }
        await guest.hears(endings[how])
        await expect(guest.see(".banner")).to_be_hidden()
        assert sum(endings[how] in line for line in await guest.log()) == 1
        await guest.ask("Go on")
        await guest.hears("ok")
        assert (await guest.log())[-2:] == ["user: Go on", "bot: ok"]


async def in_two_tabs(visit: Visit, url: str) -> tuple[Guest, Guest]:
    """A visitor's chat of one message, and the newer tab, which has taken it."""
    one = await Guest(await visit(url)).open()
    await one.ask("First")
    await one.hears("ok")
    two = Guest(await one.page.context.new_page())
    await two.page.goto(url)
    await one.see(".banner", "open in another tab").wait_for()
    return one, two


async def test_two_tabs(visit: Visit, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """The chat is in one tab at a time; the other says so, and can take it back."""
    await chat_server(serve, pages, model)
    url = pages.add("/", "<main><button onclick='this.after(`+`)'>Add</button></main>")
    one, two = await in_two_tabs(visit, url)
    await two.open()
    await two.see(".bot", "ok").wait_for()
    model.scripts.append(says("Second answer"))
    await two.ask("Second")
    await two.hears("Second answer")

    await one.see(".banner button", "Use it here").click()
    await two.see(".banner", "open in another tab").wait_for()
    await one.hears("Second answer")
    said = ["user: First", "bot: ok", "user: Second", "bot: Second answer"]
    assert await one.log() == ["bot: Hello!", *said]

    # A plan is with tab one when tab two takes over by writing: it is not carried out there.
    model.scripts.append(does({"action": "wait", "waitDuration": 3000}, click("Add")))
    await one.ask("Add")
    await until(lambda: one.heard[-1]["event"] == "action_plan")
    model.scripts.append(says("Third answer"))
    await two.ask("Third")
    await two.hears("Third answer")
    assert await two.page.inner_text("main") == "Add"
    assert (await two.log())[-2:] == ["user: Third", "bot: Third answer"]
    await one.see(".banner", "open in another tab").wait_for()
    assert not one.results()


HIDDEN = """Object.defineProperty(document, "visibilityState",
    { configurable: true, get: () => window.isShown ? "visible" : "hidden" });"""


async def test_tab_in_the_background(
    visit: Visit, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A tab that is opened in the background takes the chat over when it becomes visible."""
    await chat_server(serve, pages, model)
    url = pages.add("/", "<main>Hello</main>")
    one, two = await in_two_tabs(visit, url)
    await two.open()
    await one.see(".banner button", "Use it here").click()
    await two.see(".banner", "open in another tab").wait_for()

    await two.page.add_init_script(HIDDEN)
    count = len(two.joins)
    await two.page.reload()
    await two.page.wait_for_function("LeFlux?.getState().ready")
    await two.see(".bot", "ok").wait_for()  # its panel is open, as before
    await one.ask("Second")
    await one.hears("ok")
    assert len(two.joins) == count
    await expect(one.see(".banner")).to_be_hidden()
    await two.page.evaluate("isShown = true, document.dispatchEvent(new Event('visibilitychange'))")
    await one.see(".banner", "open in another tab").wait_for()
    await two.see(".user", "Second").wait_for()


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


async def test_what_is_seen(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """The picture of a page has what a visitor can use and read, and no secrets."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", PAGE))
    await guest.page.evaluate("LeFlux.setVisitorData({plan: 'Pro', seats: 3})")
    await guest.ask("What is here?")
    await guest.hears("ok")
    context = guest.context
    assert context["url"] == f"{pages.url}/"
    assert context["title"] == "Page /"
    text = context["visibleText"]
    assert "Some text to read." in text
    assert text.count("Everything") == 1
    assert "Open from nine to five" in text
    assert "Unread" not in text
    assert "Hello!" not in text  # its own

    elements: dict[str, Json] = {}
    for element in context["indexedElements"]:
        elements.setdefault(element["text"] or element.get("ariaLabel", ""), element)
    assert not elements.keys() & set("Gone Unseen Clear Tiny Inert Hidden Folded".split())
    expected: dict[str, Json] = {
        "Prices": {"type": "link", "href": f"{pages.url}/prices", "parent": "Main"},
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
        "Close": {"ariaLabel": "Close"},
        "Search": {"type": "button"},
        "Logo": {"href": f"{pages.url}/img"},
        "In the shadow": {"type": "button"},
    }
    for name, wanted in expected.items():
        assert wanted.items() <= elements[name].items(), name
    named = {e["name"]: e for e in context["indexedElements"] if "name" in e}
    assert {"placeholder": "Your name", "required": True, "value": "Ada"}.items() <= named[
        "name"
    ].items()
    assert named["id"]["text"] == "Details"
    assert named["elements2"]["value"] == "Long text"
    numbers = [element["id"] for element in context["indexedElements"]]
    assert len(set(numbers)) == len(numbers)
    fields = context["forms"][0].pop("fields")
    [form] = context["forms"]
    assert form == {"name": "Sign up", "heading": "Everything", "submit": "Join now, Join later"}
    assert "Kennwort" in fields

    sent = json.dumps(guest.posts)
    assert "s3cret" not in sent
    assert "s3cret" not in model.prompt()
    assert "'plan'" in model.prompt() or '"plan"' in model.prompt()
    secret = [f for f in context["indexedElements"] if lf.is_sensitive(f)]
    assert len(secret) == 5
    assert not [field for field in secret if "value" in field]


async def test_secret_fields(visit: Visit, serve: Serve, pages: Pages) -> None:
    """Every field that the server takes for a secret one is one for the widget, too."""
    names = """password userPassword pwd PIN otp totp 2fa verification-code cc-csc cardNumber
        card_holder cvv expiry MM/YY Kartennummer IBAN bic sortCode bankAccount accountNumber
        ssn socialSecurity nationalId passport-no taxId dni one-time-code pass\u00adword
        contraseña security.code""".split()
    plain = "name email pinboard company subject spinner city comment cardigan".split()
    for name in names:
        assert lf.is_sensitive({"name": name}), name
    for name in plain:
        assert not lf.is_sensitive({"name": name}), name
    server = await chat_server(serve, pages)
    body = "".join(f'<p><input name="{name}" value="v-{name}"></p>' for name in [*names, *plain])
    guest = await Guest(await visit(pages.add("/", body))).open()
    await guest.ask("Hello")
    await until(lambda: guest.posts)
    values = [element.get("value") for element in guest.context["indexedElements"]]
    assert [value for value in values if value] == [f"v-{name}" for name in plain]
    assert len(values) == len(names) + len(plain)
    assert server.app.sessions


async def test_the_nearest_fifty(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """Of many elements the dialog's come first, then those in view; each keeps its number."""
    await chat_server(serve, pages, model)
    many = "".join(f"<p><a href='/{n}'>Link {n}</a></p>" for n in range(200))
    dialog = "<dialog open style='position: fixed'><button>Agree</button></dialog>"
    url = pages.add("/", many + dialog)
    guest = await meet(url)
    await guest.page.evaluate("scrollTo(0, document.links[100].offsetTop)")
    await guest.ask("What is here?")
    await guest.hears("ok")
    first = guest.context["indexedElements"]
    assert len(first) == 50
    assert first[0]["text"] == "Agree"
    assert first[0]["inModal"] is True
    assert first[1]["text"] in ("Link 99", "Link 100")
    assert first[1]["inViewport"] is True
    assert first[-1]["text"] < "Link 99"
    assert "inViewport" not in first[-1]
    assert guest.context["visibleText"].startswith("Agree")
    await guest.ask("And now?")
    await guest.hears("ok")
    assert guest.context["indexedElements"] == first
    assert [element["id"] for element in first] == list(range(1, 51))


async def test_single_page_navigation(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """When a router changes the page, the server gets the new picture."""
    server = await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", "<main><h1>Home</h1></main>"))
    await guest.ask("Hello")
    await guest.hears("ok")
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


def fill(name: str, text: str, action: str = "type") -> Json:
    return {"action": action, "on": name, "inputData": text}


async def test_filling_a_form(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """Each kind of field takes what is typed or chosen, frameworks hear of it, the rest fails."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", FORM))
    model.scripts.append(
        does(
            fill("Plain", "Ada “L” 🙂"),
            fill("Controlled", "kept"),
            fill("Phone", "5551234567"),
            fill("Story", "Once\nupon a time"),
            fill("Born", "1815-12-10"),
            fill("Rich", "new text"),
            fill("Colour", "blue", "select"),
            fill("Sizes", "M", "select"),
            fill("Later", "no", "select"),
            fill("Terms", "yes", "select"),
            click("Press"),
            click("Shape"),
            {"action": "wait", "waitDuration": 1},
            {"action": "scroll_to", "on": "Far away"},
        )
    )
    model.scripts.append(says("", type="task_complete", summary="Filled."))
    await guest.ask("Fill it in")
    await guest.see(".ring").wait_for()
    await guest.hears("Filled.")
    [result] = guest.results()
    assert [step for step in result["results"] if not step["success"]] == []
    assert result["success"] is True
    assert result["completedSteps"] == result["totalSteps"] == 14
    assert [step.get("text") for step in result["results"]][:8] == [
        "Ada “L” 🙂",
        "kept",
        "(555) 123-4567",
        "Once upon a time",
        "1815-12-10",
        "new text",
        "Blue",
        "M",
    ]
    assert await guest.page.inner_text("#rich") == "new text"
    assert await guest.page.evaluate("[state, field('Controlled').value]") == ["kept", "kept"]
    assert await guest.page.input_value("textarea") == "Once\nupon a time"
    assert await guest.page.is_checked("[type=radio]")
    assert await guest.page.is_checked("[type=checkbox]")
    assert await guest.page.inner_text("#done") == "clicked drawn"
    heard = await guest.page.evaluate("heard")
    assert {"Plain", "Controlled", "Phone", "Story", "Colour", "Sizes"} <= set(heard)
    assert "press Shape" in heard
    assert await guest.page.evaluate("scrollY") > 1000
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


async def test_failed_steps(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """A sequence stops at its first failed step, and the model is told which and why."""
    await chat_server(serve, pages, model)
    url = pages.add("/", FORM)

    async def answer(request: web.Request) -> web.StreamResponse:
        prompt = (await request.json())["messages"][-1]["content"]
        if told := re.search(r"failed at step 2: .*", prompt):
            reply = says("", type="abort_workflow", reason=told[0])
            return web.Response(body=reply[0], content_type="text/event-stream")
        step, spoil, _ = FAILURES[int(re.findall(r"Try (\d+)", prompt)[-1])]
        first = click("Press") if spoil else {"action": "wait", "waitDuration": 0}
        script = does(first, step, fill("Plain", "never"))
        assert callable(script)
        return await script(request)

    async def fail(numbers: range) -> None:
        guest = await meet(url)
        for number in numbers:
            step, spoil, reason = FAILURES[number]
            press = f"() => {{ field('{step['on']}').{spoil} }}" if spoil else "null"
            await guest.page.evaluate(f"document.querySelector('form button').onclick = {press}, 0")
            await guest.ask(f"Try {number}")
            await until(lambda: len(guest.results()) == numbers.index(number) + 1)  # noqa: B023
            result = guest.results()[-1]
            assert result["success"] is False
            assert (result["completedSteps"], result["totalSteps"]) == (1, 3)
            assert len(result["results"]) == 2
            assert reason in result["results"][1]["error"]
            await guest.hears(f"failed at step 2: {result['results'][1]['error']}")
        assert await guest.page.input_value("[aria-label=Plain]") == ""

    model.scripts.extend([answer] * (2 * len(FAILURES)))
    await asyncio.gather(*(fail(range(n, len(FAILURES), 3)) for n in range(3)))


async def test_settled_while_acting(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A new message, or stop, ends what is being done: no further step runs, none is reported."""
    await chat_server(serve, pages, model)
    guest = await meet(
        pages.add("/", "<main><button onclick='this.after(`+`)'>Add</button></main>")
    )
    wait = {"action": "wait", "waitDuration": 400}
    model.scripts.append(does(click("Add"), wait, click("Add"), click("Add")))
    await guest.ask("Add three")
    await until_text(guest.page, "main", "Add+")
    await guest.ask("Wait, no!")
    await guest.hears("ok")
    model.scripts.append(does(click("Add"), wait, click("Add"), click("Add")))
    await guest.ask("Do it then")
    await until_text(guest.page, "main", "Add++")
    await guest.see(".stop").click()
    await guest.hears(lf.ENGLISH("stopped"))
    model.scripts.append(does(click("Add")))
    model.scripts.append(says("", type="task_complete", summary="Added."))
    await guest.ask("Add one")
    await guest.hears("Added.")
    assert await guest.page.inner_text("main") == "Add+++"
    assert len(guest.results()) == 1


ROUTER = """
<nav><a href="/one">One</a></nav><main>Home</main>
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


async def test_navigation(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """Routers take what they know, the browser loads the rest; the task goes on after that."""
    await chat_server(serve, pages, model)
    pages.add("/two", "<main>Two</main>")
    pages.add("/swallowed", "<main>Loaded</main>")
    guest = await meet(pages.add("/", ROUTER))
    for url, text, loads in [
        ("/one", "At /one", 0),  # by its link
        ("/other", "At /other", 0),  # by a delegated handler
        ("/two", "Two", 1),
    ]:
        before = len(pages.visits)
        model.scripts.append(does({"action": "navigate", "url": url}))
        model.scripts.append(says("", type="task_complete", summary=f"Now at {url}."))
        await guest.ask(f"Go to {url}")
        await guest.hears(f"Now at {url}.")
        assert text in model.prompt()
        assert f"→ {pages.url}{url}" in model.prompt()
        assert guest.results()[-1]["success"] is True
        assert await guest.page.inner_text("main") == text
        assert len([v for v in pages.visits[before:] if "favicon" not in v]) == loads
    await guest.page.goto(f"{pages.url}/")
    model.scripts.append(does({"action": "navigate", "url": "/swallowed"}))
    model.scripts.append(says("", type="task_complete", summary="Still there."))
    await guest.ask("Go")
    await guest.hears("Still there.")
    assert await guest.page.inner_text("main") == "Loaded"

    # The server allows a site's other hosts and ports; the widget stays on its own origin.
    model.scripts.append(does({"action": "navigate", "url": "http://localhost:1/"}))
    model.scripts.append(says("", type="abort_workflow", reason="Not there."))
    await guest.ask("Leave")
    await guest.hears("Not there.")
    assert guest.results()[-1]["success"] is False
    assert "not on this website" in guest.results()[-1]["error"]


async def test_task_over_pages(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """A click that loads another page is reported from there, once, and the task goes on."""
    server = await chat_server(serve, pages, model)
    count = "<script>sessionStorage.n = Number(sessionStorage.n || 0) + 1</script>"
    pages.add("/next", f"<main><h1>Next</h1><a href='/last'>Further</a></main>{count}")
    pages.add("/last", f"<main><h1>Last</h1><button>End</button></main>{count}")
    guest = await meet(pages.add("/", "<main><a href='/next'>Next page</a></main>"))
    model.scripts.append(does(click("Next page"), message="To the next."))
    model.scripts.append(does(click("Further"), fill("Further", "never"), message="And further."))
    model.scripts.append(says("", type="task_complete", summary="There."))
    await guest.ask("Go to the end")
    await guest.hears("There.")
    assert len(model.requests) == 3
    assert "<h1>" not in model.prompt(1)
    assert "URL: " + pages.url + "/next" in model.prompt(1)
    assert "done. URL" in model.prompt(1)
    assert "URL: " + pages.url + "/last" in model.prompt(2)
    assert "failed at step 2: another page was loaded" in model.prompt(2)
    assert await guest.page.evaluate("sessionStorage.n") == "2"
    single, sequence = guest.results()
    assert single["success"] is True
    assert sequence["success"] is False
    assert (sequence["completedSteps"], sequence["totalSteps"]) == (1, 2)
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
    await guest.ask("Where am I?")
    await guest.hears("ok")
    assert (await guest.log())[-3:] == ["bot: There.", "user: Where am I?", "bot: ok"]


async def test_sheet_makes_room(visit: Visit, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """On a phone the sheet is half as high while the agent acts, on the next page too."""
    await chat_server(serve, pages, model)
    pages.add("/next", "<main><h1>Next</h1></main>")
    page = await visit(pages.add("/", "<main><a href='/next'>Next</a></main>"), 390, 844)
    guest = await Guest(page).open()
    height = "node => node.offsetHeight"
    assert await guest.see(".panel").evaluate(height) == 844
    model.scripts.append(does(click("Next"), message="To the next."))
    there = says("", type="task_complete", summary="There.")
    model.scripts.append([model.at_gate, *there])
    await guest.ask("Go on")
    await page.wait_for_url("**/next")
    await until(guest.results)
    assert await guest.see(".panel").evaluate(height) == 422
    model.gate.release()
    await guest.hears("There.")
    assert await guest.see(".panel").evaluate(height) == 844


async def test_leaving_in_the_middle(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A visitor who leaves during a plan finds it reported as cut off, and never done twice."""
    server = await chat_server(serve, pages, model)
    body = "<main><button onclick='sessionStorage.n = 1 + (+sessionStorage.n || 0)'>Add</button>"
    pages.add("/other", body)
    guest = await meet(pages.add("/", body))
    model.scripts.append(does(click("Add"), {"action": "wait", "waitDuration": 9000}, click("Add")))
    model.scripts.append(says("", type="abort_workflow", reason="It was cut off."))
    await guest.ask("Add two")
    await guest.page.wait_for_function("sessionStorage.n == 1")
    await guest.page.goto(f"{pages.url}/other")
    await guest.hears("It was cut off.")
    await guest.page.go_back(wait_until="commit")
    await guest.see(".bot", "It was cut off.").wait_for()
    assert guest.results()[-1]["totalSteps"] == 3
    assert guest.results()[-1]["success"] is False
    assert await guest.page.evaluate("sessionStorage.n") == "1"

    # A message that is on its way when the page is left arrives all the same.
    await guest.page.evaluate("LeFlux.send('On my way'), location.href = '/other'")
    await guest.page.wait_for_url("**/other")
    await guest.hears("ok")
    assert (await guest.log())[-2:] == ["user: On my way", "bot: ok"]

    # A plan that was made for the page before is never carried out on another page.
    plan = does(click("Add"))
    started = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        started.set()
        await model.at_gate(request)
        assert callable(plan)
        return await plan(request)

    model.scripts += [slow, says("Where were we?")]
    await guest.ask("Add one")
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


MAIN = "<main><h1>Hi</h1>%s</main>"


async def test_navigate_presses_nothing(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """To go to an address is not to click a link that does something else with it."""
    await chat_server(serve, pages, model)
    pages.add("/users/5", "<p>Ada</p>")
    press = 'onclick="localStorage.gone = 1; event.preventDefault()"'
    links = f"<a href='/users/5' data-turbo-method='delete' {press}>Remote</a>"
    guest = await meet(pages.add("/", MAIN % links))
    model.scripts.append(does({"action": "navigate", "url": f"{pages.url}/users/5"}))
    await guest.ask("Show me Ada")
    await guest.page.wait_for_url("**/users/5")
    assert await guest.page.evaluate("localStorage.gone") is None


async def test_modal_dialog(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """A modal dialog of the page makes all else inert, but not the chat that is asked for a yes."""
    await chat_server(serve, pages, model)
    form = "<form method=dialog onsubmit='window.sent = 1'><button>Send message</button></form>"
    body = f"<button onclick='d.showModal()'>Write to us</button><dialog id=d>{form}</dialog>"
    guest = await meet(pages.add("/", MAIN % body))
    model.scripts += [does(click("Write to us")), does(click("Send message"))]
    await guest.ask("Send it")
    await guest.see(".confirm button", "Send message").click()
    await guest.page.wait_for_function("window.sent")
    await guest.hears("ok")
    await guest.ask("Thank you")  # the dialog is closed
    await until(lambda: len(guest.posts) == 2)
    assert "Hi" in guest.context["visibleText"]


@pytest.mark.parametrize("way", ["delayed click", "click", "navigate"])
async def test_late_leaving(
    way: str, meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A page that is left slowly, or without "beforeunload", is not reported as unchanged."""
    await chat_server(serve, pages, model)
    deaf = """<script>const add = window.addEventListener;
        window.addEventListener = function(name, ...more) {
          if (name !== "beforeunload") add.call(this, name, ...more); };</script>"""
    fade = "event.preventDefault(); setTimeout(() => location.href = this.href, 900)"
    link = {"delayed click": f'<a href="/next" onclick="{fade}">Onwards</a>', "navigate": ""}
    body = MAIN % link.get(way, '<a href="/next">Onwards</a>')
    pages.add("/next", "<main>The next page</main>")
    guest = await meet(pages.add("/", body if way == "delayed click" else deaf + body))

    async def slow(route: Route) -> None:
        await asyncio.sleep(1.5)
        await route.continue_()

    await guest.page.route("**/next", slow)
    go = {"action": "navigate", "url": f"{pages.url}/next"}
    model.scripts += [does(go if way == "navigate" else click("Onwards")), says("There we are.")]
    await guest.ask("Go on")
    await guest.hears("There we are.")
    assert len(model.requests) == 2
    assert "The next page" in model.prompt()


async def test_forms_that_hide_their_own_names(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """Fields called like what a form is asked for cost their own form at most."""
    await chat_server(serve, pages, model)
    names = (
        "elements parentElement getAttribute closest matches querySelectorAll shadowRoot".split()
    )
    forms = "".join(f"<form><input name='{name}' aria-label='{name}'></form>" for name in names)
    body = forms + "<img name='forms' src='data:,'><button>Fine</button>"
    guest = await meet(pages.add("/", MAIN % body))
    await guest.ask("Hello")
    await guest.hears("ok")
    assert "Fine" in [element["text"] for element in guest.context["indexedElements"]]


async def test_button_named_by_its_picture(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """An icon's title is the name of its button, so that a click on it asks first."""
    await chat_server(serve, pages, model)
    icon = "<svg width=20 height=20 role=img><title>Delete account</title></svg>"
    guest = await meet(pages.add("/", MAIN % f"<button onclick='gone = 1'>{icon}</button>"))
    model.scripts.append(does(click("Delete account")))
    await guest.ask("Clean up")
    await guest.see(".confirm").wait_for()
    assert not await guest.page.evaluate("window.gone")


async def test_blocks_are_read_out(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A block without a message is announced; what is no text in it is left out."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", MAIN % ""))
    data = {"items": ["no card", {"title": "Fast", "body": "Cheap", "icon": None}]}
    model.scripts.append(says("", type="render_ui_block", block_type="feature_grid", data=data))
    await guest.ask("Why you?")
    await guest.see(".cards", "Cheap").wait_for()
    await expect(guest.see(".quiet[aria-live]")).to_contain_text("Fast")
    await expect(guest.see(".card")).to_have_count(1)


async def test_socket_address_from_before(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A chat that began while public_url was wrong finds the socket once that is fixed."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", MAIN % ""))
    await guest.ask("Hi")
    await guest.hears("ok")
    await guest.page.evaluate(
        """() => { const key = Object.keys(localStorage).find((name) => name.endsWith("session"));
            const kept = JSON.parse(localStorage[key]);
            localStorage[key] = JSON.stringify({ ...kept, wsUrl: "ws://localhost:1" }); }"""
    )
    await guest.page.reload()
    model.scripts.append(says("Still here."))
    await guest.ask("And now?")
    await guest.hears("Still here.")


async def test_focus_stays_on_the_page(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """Who types into the page while a question or a card arrives goes on typing there."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", MAIN % "<input id=note><button>Send order</button>"))
    question = says("", type="ask_user", question="Which one?", field_name="x", field_type="text")
    for script, seen in ((question, ".bot >> text=Which one?"), (None, ".confirm")):
        model.scripts.append([model.at_gate, *question] if script else does(click("Send order")))
        await guest.ask("Hello")
        await guest.page.focus("#note")
        model.gate.release()
        await guest.see(seen).wait_for()
        await guest.page.keyboard.type("abc")
    assert await guest.page.input_value("#note") == "abcabc"


async def test_card_in_a_tab_that_lost_the_chat(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """What is asked there can no longer be answered there, until the chat is taken back."""
    await chat_server(serve, pages, model)
    url = pages.add("/", MAIN % "<button>Send order</button>")
    guest = await meet(url)
    model.scripts.append(does(click("Send order")))
    await guest.ask("Order")
    await expect(guest.see(".confirm button").first).to_be_enabled()
    other = await guest.page.context.new_page()
    await other.goto(url)
    await guest.see(".banner", "another tab").wait_for()
    await expect(guest.see(".confirm button").first).to_be_disabled()


async def test_clearing_while_a_session_begins(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """What was cleared before it went out does not go out."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", MAIN % ""))
    await guest.page.evaluate("LeFlux.clearConversation()")
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slow(route: Route) -> None:
        begun.set()
        await gate.wait()
        await route.continue_()

    await guest.page.route("**/api/session/init", slow)
    await guest.ask("A secret")
    await begun.wait()
    await guest.page.evaluate("LeFlux.clearConversation()")
    gate.set()
    await guest.ask("Hello")
    await guest.hears("ok")
    assert [post["message"] for post in guest.posts] == ["Hello"]


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
    </button>"></iframe>
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
    "Card one": {"type": "button"},
    "Card two": {"type": "button"},
    "Stop": {"type": "button"},
    "In a card": {"type": "button"},
    "Data action": {"type": "button"},
    "No address": {"type": "link"},
    "Elsewhere": {"newTab": True},
    "Area": {"type": "link"},
    "Price": {"type": "button"},
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


async def test_what_is_indexed(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """Of 300 links and all else, what can be used is seen with its state, the important first."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", BUSY))
    await guest.ask("What is here?")
    await guest.hears("ok")
    texts = [element["text"] for element in guest.context["indexedElements"]]
    assert len(texts) == 50
    assert {"Link 0", "Search", "Mail", "Join", "Fruit"} <= set(texts)
    assert not {"Link 299", "Accept cookies", "Share"} & set(texts)
    await guest.page.evaluate("document.querySelector('nav').remove()")
    await guest.ask("And now?")
    await guest.hears("ok")
    context = guest.context
    elements = {element["text"]: element for element in context["indexedElements"]}
    for name, wanted in SEEN.items():
        if wanted is None:
            assert name not in elements
        else:
            found = {**elements[name]}
            found["href"] = found.get("href", "").removeprefix(pages.url)
            assert wanted.items() <= found.items(), name
    rows = [one["row"] for one in context["indexedElements"] if one["text"] == "Edit"]
    assert rows == ["Ada", "Bob"]
    assert "value" not in elements["Fruit"]
    inside = [one for one in context["indexedElements"] if one["text"] == "Inside a link"]
    assert [one["href"] for one in inside] == [f"{pages.url}/around"]
    assert "Framed text" in guest.context["visibleText"]
    assert list(elements)[-2:] == ["Accept cookies", "Share"]
    new = {one["text"] for one in guest.context["indexedElements"] if one.get("isNew")}
    assert {"Share", "Accept cookies"} <= new
    assert not new & {"Card one", "Fruit"}


def press(key: str, name: str) -> Json:
    return {"action": "press", "on": name, "key": key}


STEPS: list[tuple[Json, str, str]] = [  # a step, what it does (a line of JavaScript), or its error
    (click("Card one"), "said.includes('card;')", ""),
    (click("Card two"), "said.includes('listened;')", ""),
    (click("No address"), "said.includes('a;')", ""),
    (click("Price"), "said.includes('sorted;')", ""),
    (click('row="Bob"'), "said.includes('bob;')", ""),
    (click('"14"'), "said.includes('14;')", ""),
    (click("In a frame"), "said.includes('framed;')", ""),
    (click("Elsewhere"), "location.pathname === '/'", "opens a new tab"),
    (click("Pops up"), "location.pathname === '/'", "opens a new tab"),
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


async def test_each_kind_of_step(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """Each step does what a visitor would have done, or says why not and leaves all as it was."""
    await chat_server(serve, pages, model, limits={"chat_per_minute": 60})
    guest = await meet(pages.add("/", BUSY.replace(LINKS, "")))
    await guest.page.evaluate("field = (name) => document.querySelector(`[aria-label=${name}]`)")
    for number, (step, effect, error) in enumerate(STEPS):
        wait = {"action": "wait", "waitDuration": 0}
        model.scripts += [does(step, wait), says("", type="task_complete", summary=f"At {number}.")]
        await guest.ask("Go on")
        await guest.hears(f"At {number}.")
        [result] = [one for one in guest.results()[number]["results"] if "elementId" in one]
        assert error in result.get("error", ""), step
        assert result["success"] is not bool(error), (step, result)
        said = "said = document.querySelector('#log').textContent, "
        assert await guest.page.evaluate(said + effect), step
    links = guest.see(".bot a")
    assert await links.all_inner_texts() == ["Elsewhere", "Pops up"]


LATE = {  # what a click brings later, with the time in ms
    "router": "setTimeout(() => { history.pushState({}, '', '/late'); main.append('late') }, 900)",
    "data": "main.ariaBusy = 'true', setTimeout(() => {"
    " main.append('late'); main.ariaBusy = 'false' }, 2500)",
    "leaving": "setTimeout(() => { location.href = '/late' }, 1300)",
}


@pytest.mark.parametrize("what", LATE)
async def test_picture_of_a_page_at_rest(
    what: str, meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """After a step the picture is taken when what it has set off is there."""
    await chat_server(serve, pages, model)
    pages.add("/late", "<main>late</main>")
    body = f'<main id="main"><button onclick="{LATE[what]}">Go</button></main>'
    guest = await meet(pages.add("/", body))
    model.scripts += [does(click("Go")), says("There.")]
    await guest.ask("Go")
    await guest.hears("There.")
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


@pytest.mark.parametrize("kind", TRAPS)
async def test_modals_of_the_page(kind: str, visit: Visit, serve: Serve, pages: Pages) -> None:
    """A modal of the page that keeps focus and wheel to itself leaves the chat usable."""
    await chat_server(serve, pages)
    tag, role = ("dialog", "") if kind == "native" else ("div", "role=dialog")
    box = f"<{tag} {role} id=box><input id=field></{tag}><script>{TRAPS[kind]}</script>"
    box += "<script>var left = 0; field.addEventListener('focusout', () => left++)</script>"
    page = await visit(pages.add("/", box))
    await page.locator("leflux-widget .launcher").wait_for()
    await page.focus("#field")
    await page.wait_for_timeout(600 if kind == "native" else 0)
    guest = await Guest(page).open()
    await page.keyboard.type("Hello")
    assert await guest.see("textarea").input_value() == "Hello"
    await guest.see("textarea").click()
    await page.keyboard.type("!")
    assert await guest.see("textarea").input_value() == "Hello!"
    assert await page.evaluate("left") == 1  # the field knows that it is left
    await guest.see(".log").evaluate("(log) => { log.firstChild.style.height = '2000px' }")
    await guest.see(".log").hover()
    await page.mouse.wheel(0, 100)
    await expect(guest.see(".log")).not_to_have_js_property("scrollTop", 0)
    await page.keyboard.press("Escape")
    await page.wait_for_function("!LeFlux.isOpen()")
    assert await page.locator("#box").count() == 1
    assert await page.input_value("#field") == ""


async def test_confirmation_while_typing(
    meet: Meet, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """A question does not take the focus from who types; after a reload its answer can be seen."""
    await chat_server(serve, pages, model)
    guest = await meet(pages.add("/", MAIN % "<button>Send order</button>"))
    model.scripts.append(does(click("Send order")))
    await guest.ask("Order")
    await guest.see("textarea").fill("and")
    await guest.see(".confirm").wait_for()
    await guest.page.keyboard.type(" more")
    assert await guest.see("textarea").input_value() == "and more"
    await guest.see(".choices button:last-child:enabled").click()
    await guest.hears(lf.ENGLISH("not_confirmed"))
    await guest.see("textarea").fill("")
    await guest.page.reload()
    await guest.see(".confirm.no").wait_for()
    await guest.ask("Thanks")
    await guest.hears("ok")
    await guest.page.reload()
    await guest.see(".bot", "Shall I click").wait_for()
    await expect(guest.see(".note")).to_have_text(["No"])


async def test_focus_after_a_page(
    visit: Visit, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """On a page that the agent has loaded the focus is where it was: in the chat."""
    await chat_server(serve, pages, model)
    pages.add("/next", MAIN % "<button>There</button>")
    guest = await Guest(await visit(pages.add("/", MAIN % "<a href='/next'>Next</a>"))).open()
    model.scripts += [does(click("Next")), [model.at_gate, *says("There we are.")]]
    await guest.ask("Go on")
    await guest.page.wait_for_url("**/next")
    await expect(guest.see("textarea")).to_be_focused()
    model.gate.release()
    await guest.hears("There we are.")
    assert guest.context["indexedElements"][0]["id"] > 1  # numbers go on


# ---------------------------------------------------------------------------------------------
# Languages

WORDS = {path.stem: json.loads(path.read_text()) for path in lf.HERE.glob("widget/words/*.json")}
ENGLISH: dict[str, str] = WORDS["en"]["widget"]


def test_words_are_whole() -> None:
    """What is inside embed.js is the English file; every language says all of it."""
    source = (lf.HERE / "widget" / "embed.js").read_text()
    block = source[source.index("const WORDS = {") : source.index("const limits")]
    assert dict(re.findall(r'(\w+): "([^"]+)"', block)) == ENGLISH
    for tag, words in WORDS.items():
        assert words["widget"].keys() == ENGLISH.keys(), tag
        same = {key for key, word in words["widget"].items() if word == ENGLISH[key]}
        assert same <= {"title"} or tag == "en", tag
    assert WORDS.keys() == set("en de fr es it pt nl pl tr ar hi ja zh".split())


# Every text of the widget: what is written, and what is read out.
TEXTS = """(root) => [...root.querySelectorAll("*")].flatMap((node) => [
    ...[...node.childNodes].filter((one) => one.nodeType === 3).map((one) => one.data),
    node.ariaLabel, node.title, node.placeholder]).filter((text) => text?.trim())"""


async def test_languages(visit: Visit, serve: Serve, pages: Pages) -> None:
    """In each language nothing English is left, of widget or server; English asks for nothing."""
    config = {"greeting": "👋", "words": {"title": "Ωmega"}}
    site = {"id": "site", "name": "Site", "allowed_hosts": ["localhost"], "config": config}
    await chat_server(serve, pages, sites=[site])
    page = await visit("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    english = {word for key, word in ENGLISH.items() if key != "title"}
    english |= set(WORDS["en"]["server"].values())
    for tag, words in WORDS.items():
        body = f"<script>document.documentElement.lang = '{tag}-XX'</script>"
        await page.goto(pages.add("/", f"{body}<main><button>XYZ delete</button></main>"))
        guest = await Guest(page).open()
        await guest.ask("XYZ delete")
        await guest.see(".confirm").wait_for()
        await page.route("**/api/chat", lambda route: route.abort())
        await guest.ask("xyz")
        await guest.see(".error button").wait_for()
        await page.unroute("**/api/chat")
        texts = await guest.see(".root").evaluate(TEXTS)
        assert words["widget"]["retry"] in texts
        assert words["widget"]["unreachable"] in texts
        assert "Ωmega" in texts
        assert words["server"]["no"] in texts
        if tag != "en":
            assert not (english - set(words["server"].values())) & set(texts), tag
            assert not [t for t in texts if any(w in t for w in english if len(w) > 12)], tag
        assert await page.evaluate("LeFlux.getLanguage()") == f"{tag}-XX"
        for seen in (".panel", "textarea"):
            direction = await guest.see(seen).evaluate("(one) => getComputedStyle(one).direction")
            assert direction == ("rtl" if tag == "ar" else "ltr")
        await guest.see(f"[aria-label='{words['widget']['clear']}']").click()
        await page.evaluate("localStorage.clear(), sessionStorage.clear()")
    tags = [url.rpartition("/")[2] for url in asked if "/words/" in url]
    assert tags == [f"{tag}.json" for tag in WORDS if tag != "en"]

    # A page that changes its language changes the chat's.
    await page.evaluate(
        "addEventListener('leflux:language-detected', ({ detail }) => { window.heard = detail; });"
        "document.documentElement.lang = 'pl'"
    )
    await expect(guest.see("textarea")).to_have_attribute("aria-label", "Twoja wiadomość")
    assert await page.evaluate("heard") == {"lang": "pl", "prev": f"{tag}-XX"}


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
    visit: Visit, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """Each method, getter and event of LeFlux's published API once, with its details."""
    server = await chat_server(serve, pages, model)
    pages.add("/next", "<main>Next</main>")
    body = f"{SNIPPETS}<main><button>Press</button><a href='#next'>Further</a></main>"
    guest = Guest(await visit(pages.add("/", body)))
    page = guest.page

    async def tell(script: str, *events: str) -> list[Json]:
        """Run a snippet, wait for these events, return their details."""
        await page.evaluate(f"heard = []; {script}; 0")
        names = list(dict.fromkeys(events))
        await page.wait_for_function(
            "(names) => names.every((name) => heard.some(([one]) => one === name))", arg=names
        )
        heard = await page.evaluate("heard")
        return [next(detail for name, detail in heard if name == one) for one in names]

    [state, language] = await tell(
        "LeFlux.on('ready', ({ detail }) => heard.push(['ready', detail]), 0),"
        " heard.push(['language-detected', { lang: LeFlux.getLanguage(), prev: null }])",
        "ready",
        "language-detected",
    )
    idle = {
        "ready": True,
        "open": False,
        "expanded": False,
        "conversation": "idle",
        "language": "en",
        "sessionId": await page.evaluate("LeFlux.getSessionId()"),
        "layout": "floating",
        "host": pages.url.removeprefix("http://"),
    }
    assert state == await page.evaluate("LeFlux.getState()") == idle
    assert language == {"lang": "en", "prev": None}
    assert await page.evaluate("[LeFlux.isReady(), LeFlux.isOpen(), LeFlux.isExpanded()]") == [
        True,
        False,
        False,
    ]
    await page.evaluate("LeFlux.showLauncher(false)")
    await expect(guest.see(".launcher")).to_be_hidden()
    await page.evaluate("LeFlux.showLauncher(true)")
    await expect(guest.see(".launcher")).to_be_visible()
    assert await tell("LeFlux.open()", "open") == [{"source": "api"}]
    assert await tell("LeFlux.toggle()", "close") == [{"source": "api"}]
    await page.evaluate("heard = []")
    await guest.open()
    await guest.see("[aria-label='Close the chat']").click()
    assert await page.evaluate("heard") == [
        ["open", {"source": "click"}],
        ["close", {"source": "click"}],
    ]
    await tell("LeFlux.dock()", "expand", "open")
    assert (await page.evaluate("LeFlux.getState()"))["layout"] == "side-panel"
    assert await page.evaluate("LeFlux.isExpanded()") is True
    await tell("LeFlux.undock()", "collapse")
    assert await page.evaluate("LeFlux.isExpanded()") is False

    streams(model, "Good ", "day")
    message, started = await tell("LeFlux.send(' Hello ')", "message", "typing-start")
    assert message | {"ts": 0} == {"text": "Hello", "ts": 0, "sessionId": idle["sessionId"]}
    assert started == {}
    assert (await page.evaluate("LeFlux.getState()"))["conversation"] == "typing"
    model.gate.release()
    model.gate.release()
    await guest.hears("Good day")
    await page.wait_for_function("LeFlux.getState().conversation === 'idle'")
    heard = await page.evaluate("heard")
    assert [name for name, _ in heard if name != "state-change"] == [
        "message",
        "typing-start",
        "typing-end",
        "on",
        "reply",
    ]
    states = [(one["prev"], one["state"]) for name, one in heard if name == "state-change"]
    chain = ["idle", "processing", "typing", "processing", "idle"]
    assert states == list(itertools.pairwise(chain))
    reply = next(detail for name, detail in heard if name == "reply")
    assert reply | {"ts": 0} == {"text": "Good day", "ts": 0, "isQuestion": False, "isError": False}
    assert abs(reply["ts"] - time.time() * 1000) < 60_000

    model.scripts.append(says("", type="ask_user", question="Which?", field_type="text"))
    [reply] = await tell("off(), LeFlux.ask('What is there?')", "reply")
    assert (reply["text"], reply["isQuestion"]) == ("Which?", True)
    assert "on" not in [name for name, _ in await page.evaluate("heard")]
    await page.wait_for_function("LeFlux.getState().conversation === 'awaiting-input'")
    assert guest.posts[-1]["intent"] == "ask"
    assert "intent" not in guest.posts[0]

    model.scripts += [does(click("Press")), does({"action": "navigate", "url": "/#next"})]
    model.scripts.append(says("", type="task_complete", summary="Pressed."))
    action, navigating, done = await tell(
        "LeFlux.send('Press it')", "action", "navigating", "task_complete"
    )
    assert action == {"type": "click_element", "target": "Press", "description": "click Press"}
    assert navigating == {"url": f"{pages.url}/#next", "method": "link"}
    assert done == {"summary": "Pressed."}
    await page.evaluate("LeFlux.setVisitorData({ plan: 'Pro' }), LeFlux.reindex()")
    await until(lambda: guest.context.get("visitorData") == {"plan": "Pro"})
    [error] = await tell("LeFlux.send('x'.repeat(5001))", "error")
    assert error == {"code": "invalid_message", "message": "That is too long for one message."}
    [old] = server.app.sessions
    await page.evaluate("LeFlux.clearConversation()")
    await until(lambda: old not in server.app.sessions)
    assert await guest.log() == ["bot: Hello!"]
    await tell("LeFlux.close()", "close")

    assert await tell("LeFlux.destroy()", "destroy") == [{}]
    assert await page.locator("leflux-widget").count() == 0
    names = "open close toggle send ask setVisitorData dock undock clearConversation showLauncher"
    await page.evaluate(
        "(names) => { heard = []; for (const name of names.split(' ')) LeFlux[name]('x'); }",
        f"{names} reindex destroy off on",
    )
    dead = idle | {"ready": False, "sessionId": None}
    assert await page.evaluate("LeFlux.getState()") == dead
    assert await page.evaluate("heard") == []
    await page.add_script_tag(url=f"{server.url}/embed.js")  # and once more
    await guest.open()
    await guest.ask("Again")
    await guest.hears("ok")


async def test_api_before_it_is_ready(
    visit: Visit, serve: Serve, model: FakeModel, pages: Pages
) -> None:
    """What a page calls before the chat is there is done once it is."""
    await chat_server(serve, pages, model)
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


STORED = "Object.keys(localStorage).concat(Object.keys(sessionStorage), document.cookie || [])"


async def test_nothing_is_stored_before(visit: Visit, serve: Serve, pages: Pages) -> None:
    """The browser stores nothing before the visitor opens the chat; with data-consent, not even
    the server is asked before LeFlux.allow()."""
    server = await chat_server(serve, pages)
    page = await visit(pages.add("/", "<input name=email>", script="data-consent"))
    assert await page.evaluate("Object.keys(LeFlux)") == ["allow"]
    assert await page.locator("leflux-widget").count() == len(server.app.sessions) == 0
    await page.evaluate("LeFlux.allow()")
    await page.locator("leflux-widget .launcher").wait_for()
    await page.fill("input", "ada@example.com")
    await page.keyboard.press("Tab")
    await page.evaluate("LeFlux.setVisitorData({ plan: 'Pro' }), LeFlux.open(), LeFlux.close()")
    await page.wait_for_timeout(600)
    assert await page.evaluate(STORED) == []
    await Guest(page).open()
    stored = await page.evaluate(STORED)
    assert {"leflux:userData", f"leflux {server.url} session"} <= set(stored)


async def test_visitor_memory(visit: Visit, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """What a visitor has typed into forms is offered to later ones for 30 days, secrets never."""
    await chat_server(serve, pages, model)
    form = """<input name=email><input autocomplete=given-name><input name=iban>
        <input aria-label='Telefon'><input name=q><input name=username>"""
    guest = await Guest(await visit(pages.add("/", MAIN % form))).open()
    page = guest.page
    for name, value in enumerate(("ada@example.com", "Ada", "DE00", "0421 1", "shoes", "ada1")):
        await page.locator("main input").nth(name).fill(value)
    await guest.ask("Hello")
    await guest.hears("ok")

    async def offered() -> dict[str, str]:
        await page.goto(f"{pages.url}/?{len(guest.posts)}")  # a reload would fill them in again
        await guest.ask("Hello")
        await guest.hears("ok")
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


async def test_attributes(visit: Visit, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """data-preview asks no server; data-no-spa-detect leaves routers alone; custom properties of
    the page restyle the panel."""
    server = await chat_server(serve, pages, model)
    config = json.dumps({"greeting": "Look!", "layout": "side-panel"}).replace('"', "&quot;")
    style = "<style>:root { --leflux-primary: #123456; --leflux-bg: rgb(250, 240, 230) }</style>"
    page = await visit(pages.add("/", style, script=f'data-preview="{config}"'))
    guest = await Guest(page).open()
    await guest.ask("Hello")
    await guest.see(".bot", "This is a preview.").wait_for()
    assert (await guest.log())[:2] == ["bot: Look!", "user: Hello"]
    colour = "(node) => getComputedStyle(node).backgroundColor"
    assert await guest.see(".bar").evaluate(colour) == "rgb(18, 52, 86)"
    assert await guest.see(".panel").evaluate(colour) == "rgb(250, 240, 230)"
    assert not server.app.sessions
    guest = await Guest(await visit(pages.add("/", "", script="data-no-spa-detect"))).open()
    await guest.ask("Hello")
    await guest.hears("ok")
    await guest.page.evaluate("history.pushState({}, '', '/about')")
    await guest.page.wait_for_timeout(1200)
    assert not guest.sent("update_context")


async def test_strict_policy(meet: Meet, serve: Serve, model: FakeModel, pages: Pages) -> None:
    """It works under a policy that allows the server's scripts and connections, and no more."""
    server = await chat_server(serve, pages, model)
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
    guest = await meet(pages.add("/", body, Content_Security_Policy=policy))
    await guest.page.evaluate(
        """() => { window.violations = []; document.addEventListener("securitypolicyviolation",
            ({ violatedDirective, sourceFile }) => violations.push(violatedDirective)); }"""
    )
    model.scripts.append(
        does(fill("Name", "Ada"), fill("Note", "new"), message="With **Markdown** and `code`.")
    )
    items = [{"title": "T", "description": "x", "url": "/next"}]
    block = {"block_type": "link_cards", "data": {"items": items}}
    model.scripts.append(says("Here:", type="render_ui_block", **block))
    await guest.ask("Fill it in")
    await guest.see("a.card", "T").wait_for()
    assert [step["success"] for step in guest.results()[0]["results"]] == [True, True]
    await expect(guest.see(".bot strong")).to_have_text("Markdown")
    style = "node => getComputedStyle(node).position"
    assert await guest.see(".panel").evaluate(style) == "fixed"
    assert await guest.page.evaluate("violations") == []
    model.scripts.append(does({"action": "navigate", "url": "/next"}))
    model.scripts.append(says("", type="task_complete", summary="There."))
    await guest.ask("Next")
    await guest.hears("There.")


# ---------------------------------------------------------------------------------------------
# A whole visit on the demo shop


async def test_visit_with_the_guide(meet: Meet, serve: Serve) -> None:
    """Without a model: a price, the way to the contact page, a letter, an account's end.

    And others who write from whichever page they are on.
    """
    url = await shop(serve)

    async def write(start: str) -> None:
        guest = await meet(f"{url}/{start}")
        await guest.ask("Send a message that I love your coffee, my name is Ada, ada@example.com")
        await guest.see(".choices button:first-child:enabled").click()
        await guest.page.locator("#sent", has_text="Thank you!").wait_for()
        await guest.hears("Done.")
        steps = [step for result in guest.results() for step in result.get("results", [])]
        assert [step["text"] for step in steps] == ["Ada", "ada@example.com", "I love your coffee"]

    async def visit_all() -> None:
        guest = await meet(url)
        await guest.ask("What does Pro cost?")
        await guest.hears("€18 a month")
        await guest.ask("Take me to contact")
        await guest.page.wait_for_url("**/contact")
        await guest.hears("Done.")
        await guest.ask("Send a message, I'm Ada, ada@example.com")
        await guest.hears("What shall I put into “Message”?")
        assert await guest.page.input_value("#name") == "Ada"
        assert await guest.page.input_value("#email") == "ada@example.com"
        await guest.ask("I love your coffee")
        await guest.see(".choices button:first-child:enabled").click()
        await guest.page.locator("#sent", has_text="Thank you!").wait_for()
        await guest.hears("Done.")
        await guest.ask("Delete my account")
        await guest.see(".confirm button:enabled", "No").click()
        await guest.hears(lf.ENGLISH("not_confirmed"))
        await guest.ask("Delete my account")
        await guest.see(".choices button:first-child:enabled").click()
        await guest.page.locator("#account", has_text="is deleted").wait_for()
        await guest.hears("Done.")

    async with asyncio.TaskGroup() as group:
        for start in ("", "prices", "contact"):
            group.create_task(write(start))
        group.create_task(visit_all())


async def test_visit_with_a_model(meet: Meet, serve: Serve, model: FakeModel) -> None:
    """With a model: over three pages, a form, a question and a confirmation in one task."""
    guest = await meet(await shop(serve, model))
    model.scripts += [
        does({"action": "navigate", "url": "/prices"}, message="I look at the prices."),
        does(click("Choose Pro"), message="I choose Pro."),
        does(click("Contact"), message="Now to the form."),
        does(fill("Name", "Ada"), fill("E-mail", "ada@example.com"), message="I fill it in."),
        says("", type="ask_user", question="What shall I write?", field_type="text"),
        does(fill("Message", "Hello there")),
        does(click("Send message")),
        says("", type="task_complete", summary="It is on its way."),
    ]
    await guest.ask("Choose Pro and write to them")
    await guest.hears("What shall I write?")
    assert "Choose Pro: a good choice" in model.prompt(2)
    await guest.ask("Hello there")
    await guest.see(".choices button:first-child:enabled").click()
    await guest.hears("It is on its way.")
    await guest.page.locator("#sent", has_text="Thank you!").wait_for()
    assert all(result["success"] for result in guest.results())
    assert not model.scripts
