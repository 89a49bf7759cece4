"""The owner's page in a real browser, against a real server and a stand-in for Google's sign-in.

python -m pytest owner
python -m pytest owner -k picture --screenshots    # the README's, into docs/
"""

from __future__ import annotations

import json
import operator
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import reduce
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from aiohttp import web
from playwright.async_api import Page, expect
from playwright.async_api import Request as PageRequest
from test_look import ask, part

import leflux_server as lf

from conftest import (  # isort: skip
    NOW, OTHER, PROJECT, Clock, FakeModel, Hook, Json, KeyServer, Request, Serve, Server, Visit,
    Visitor, act, axe, chunk, listening, make_token, marked, sse, until, with_config,
    with_constants,
)  # fmt: skip

KEY, PASSWORD = "web-key", "correct horse"
OLGA, BOSS, EVE = "olga@example.com", "boss@example.com", "eve@example.com"
ACCOUNTS = {OLGA: True, BOSS: True, EVE: False}  # and whether the address is proven
SITE: Json = {
    "id": "shop",
    "name": "Acme Shop",
    "allowed_hosts": ["localhost"],
    "owners": [OLGA, EVE],
    "config": {"greeting": "Welcome!", "primaryColor": "#8a4b2a"},
}


# ---------------------------------------------------------------------------------------------
# Helpers: Google's endpoints, a server with the owner's page, an owner who has signed in


class Google:
    """Firebase's sign-in as its REST API is documented; it refuses what is not just so."""

    def __init__(self) -> None:
        self.url = ""
        self.calls: list[Json] = []
        self.lifetime = 3600  # of tokens, in seconds, as their owner is told
        self.claims: deque[Json] = deque()  # what is different in the next tokens
        self.refusal = ""  # an error for all that is asked

    async def answer(self, request: web.Request) -> web.Response:
        cors = {"Access-Control-Allow-Origin": request.headers["Origin"]}
        if request.method == "OPTIONS":
            assert request.headers["Access-Control-Request-Method"] == "POST"
            cors["Access-Control-Allow-Headers"] = "content-type"
            return web.Response(headers=cors)
        assert request.method == "POST"
        assert request.query.keys() == {"key"}
        assert "Authorization" not in request.headers
        kind, text = request.content_type, await request.text()
        if request.path == "/token":
            assert kind == "application/x-www-form-urlencoded"
            body: Json = {name: value for name, [value] in parse_qs(text).items()}
        else:
            assert kind == "application/json"
            body = json.loads(text)
        self.calls.append({"call": request.path, **body})
        code, answer = 200, self.reply(request.path, body)
        if request.query["key"] != KEY:
            answer = "API key not valid. Please pass a valid API key."
        if self.refusal:
            answer = self.refusal
        if isinstance(answer, str):
            code, answer = 400, {"error": {"code": 400, "message": answer, "errors": []}}
        return web.json_response(answer, status=code, headers=cors)

    def token(self, email: str) -> str:
        user = email.partition("@")[0]
        about = {"sub": user, "user_id": user, "email": email, "email_verified": ACCOUNTS[email]}
        return make_token({**about, **(self.claims.popleft() if self.claims else {})})

    def reply(self, path: str, body: Json) -> Json | str:
        """What Google answers, or the error that it names."""
        if path == "/token":
            kind, _, email = body["refresh_token"].partition(" of ")
            assert kind == "refresh token"
            assert body == {"grant_type": "refresh_token", "refresh_token": f"{kind} of {email}"}
            about = {"token_type": "Bearer", "user_id": email, "project_id": PROJECT}
            kept = {"refresh_token": body["refresh_token"], "expires_in": str(self.lifetime)}
            return {"id_token": self.token(email), **kept, **about}
        if path == "/v1/accounts:sendOobCode":
            if body["requestType"] == "PASSWORD_RESET":
                assert body.keys() == {"requestType", "email"}
                return {"email": body["email"]} if body["email"] in ACCOUNTS else "EMAIL_NOT_FOUND"
            assert body == {"requestType": "VERIFY_EMAIL", "idToken": body["idToken"]}
            return {"email": EVE}
        assert path == "/v1/accounts:signInWithPassword"
        email, password = body["email"], body["password"]
        assert body == {"email": email, "password": password, "returnSecureToken": True}
        if "@" not in email:
            return "INVALID_EMAIL"
        if not password:
            return "MISSING_PASSWORD"
        if email not in ACCOUNTS or password != PASSWORD:
            return "INVALID_LOGIN_CREDENTIALS"
        about = {"kind": "identitytoolkit#VerifyPasswordResponse", "registered": True}
        about |= {"localId": email.partition("@")[0], "email": email}
        kept = {"refreshToken": f"refresh token of {email}", "expiresIn": str(self.lifetime)}
        return {"idToken": self.token(email), **kept, **about}


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    stand_in = Google()
    async with listening(stand_in.answer) as stand_in.url:
        yield stand_in


BUSY: Json = {"init_per_minute": 10_000}
Open = Callable[..., Awaitable[Page]]


async def open_office(
    serve: Serve,
    key_server: KeyServer,
    google: Google,
    model: FakeModel | None = None,
    site: Json = SITE,
    **tables: Any,
) -> Server:
    """Start a server with the owner's page."""
    firebase = {
        "project_id": PROJECT,
        "keys_url": key_server.url,
        "admins": [BOSS],
        "api_key": KEY,
        "sign_in_url": f"{google.url}/v1",
        "token_url": f"{google.url}/token",
    }
    return await serve(model, sites=[site, OTHER], firebase=firebase, **tables)


@pytest.fixture
async def office(
    request: Request, serve: Serve, key_server: KeyServer, google: Google, model: FakeModel
) -> Server:
    return await open_office(serve, key_server, google, model, **marked(request, "config"))


async def sign_in(page: Page, email: str = OLGA, password: str = PASSWORD) -> None:
    await page.get_by_label("E-mail address").fill(email)
    await page.get_by_label("Password").fill(password)
    await press(page, "Sign in")


async def press(page: Page, *names: str) -> None:
    """Press buttons, one after the other."""
    for name in names:
        await page.get_by_role("button", name=name).click()


async def save(page: Page) -> None:
    await press(page, "Save")
    await expect(page.get_by_text("Saved.")).to_be_visible()


async def search(page: Page, words: str) -> None:
    await page.get_by_role("searchbox").fill(words)
    await page.keyboard.press("Enter")


async def follow(page: Page, name: str) -> None:
    """Follow a link to a view with that heading."""
    await page.get_by_role("link", name=name).click()
    await page.get_by_role("heading", name=name).first.wait_for()


@pytest.fixture
def enter(visit: Visit, office: Server) -> Open:
    """Open the page, signed in: enter("looks", email=BOSS, width=390, ...)."""

    async def start(tab: str = "overview", email: str = OLGA, **options: Any) -> Page:
        page = await visit(f"{office.url}/owner#/shop/{tab}", **options)
        await sign_in(page, email)
        await page.get_by_role("heading", level=2).wait_for()
        return page

    return start


# ---------------------------------------------------------------------------------------------
# A day

DAY_SECONDS = 86_400
QUESTION, ANSWER = "Do you have decaf?", "Yes: our Colombia is free of caffeine."
BUTTON: Json = {"id": 1, "type": "button", "text": "Prices"}
SHOWN: Json = {
    "url": "http://localhost/coffee",
    "title": "Acme",
    "visibleText": "Our opening hours: the roastery opens at nine and closes at five.",
    "indexedElements": [],
}


@with_constants(SWEEP_SECONDS=0.05)
async def test_a_whole_day(
    visit: Visit,
    serve: Serve,
    key_server: KeyServer,
    google: Google,
    hook: Hook,
    clock: Clock,
    tmp_path: Path,
) -> None:
    """An owner sees what was asked yesterday, answers it, changes the looks, gets a message and
    erases a chat; the offline guide answers the visitors, and nothing is started anew."""
    clock.ahead = -DAY_SECONDS
    site = {**SITE, "notify_url": hook.url}
    state = {"state_dir": str(tmp_path)}
    server = await open_office(serve, key_server, google, site=site, server=state)
    shop = f'<!doctype html><title>Acme</title><h1>Acme</h1><script src="{server.url}/embed.js">'

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=f"{shop}</script>", content_type="text/html")

    yesterday = (datetime.now(UTC) - timedelta(days=1)).date().isoformat()
    for question in (QUESTION, "When does the roastery open?"):
        visitor = await server.visitor("http://localhost")
        await visitor.ask(question, pageContext=SHOWN)
    clock.ahead = 0
    await until(lambda: not server.app.sessions)

    # What was asked yesterday.
    page = await visit(f"{server.url}/owner")
    rows, said = page.locator(".line"), page.get_by_role("dialog").locator("li")
    await sign_in(page)
    await page.get_by_text("The figures").click()
    await expect(page.get_by_role("row", name=yesterday)).to_have_text(f"{yesterday}22")
    await expect(page.get_by_role("list").filter(has_text=QUESTION)).to_be_visible()
    await follow(page, "Conversations")
    await expect(rows).to_have_count(2)
    await rows.first.click()
    await expect(said.nth(0)).to_contain_text("When does the roastery open?")
    await expect(said.nth(1)).to_contain_text("opens at nine")
    await press(page, "Close")

    # A question without an answer gets one, and the next visitor hears it.
    await follow(page, "Knowledge")
    field = page.get_by_label(re.compile("^Answer to"))
    await expect(field).to_have_accessible_name(f"Answer to “{QUESTION}”")
    await field.fill(ANSWER)
    await press(page, "Answer it")
    await expect(page.get_by_text("has found an answer")).to_be_visible()
    async with listening(answer) as url:
        guest = await visit(url)
        await part(guest, ".launcher").click()
        await ask(guest, QUESTION)
        await expect(part(guest, ".bot").last).to_contain_text(ANSWER)

        # A colour, in the preview and on the site.
        await follow(page, "Looks")
        await page.get_by_label("Colour", exact=True).fill("#006400")
        green = ("background-color", "rgb(0, 100, 0)")
        await expect(part(page.frame_locator("iframe"), ".bar")).to_have_css(*green)
        await save(page)
        await guest.reload()
        await expect(part(guest, ".bar")).to_have_css(*green)

        # A message.
        await ask(guest, "Tell them that I love it, my name is Ada, ada@example.com")
        await part(guest, ".confirm button").first.click()
        await until(lambda: hook.got)
        await guest.close()
    assert "I love it" in hook.got[0]["message"]
    await follow(page, "Messages")
    await expect(page.locator(".cards > li")).to_contain_text("I love it")

    # A chat is erased.
    await follow(page, "Conversations")
    await expect(rows).to_have_count(3)
    await search(page, "open")
    await expect(rows).to_have_count(1)
    await rows.click()
    await press(page, "Erase", "Erase it")
    await expect(rows).to_have_count(0)
    await page.get_by_role("searchbox").fill("")
    await press(page, "Search")
    await expect(rows).to_have_count(2)


# ---------------------------------------------------------------------------------------------
# Sign-in

WRONG = [  # e-mail address, password, what Google says instead, the field, what it is told
    (EVE, "wrong", "", "Password", "do not match"),
    (OLGA, "", "", "Password", "Enter your password"),
    ("olga", PASSWORD, "", "E-mail address", "no e-mail address"),
    (OLGA, PASSWORD, "USER_DISABLED", "E-mail address", "disabled"),
    (OLGA, PASSWORD, "TOO_MANY_ATTEMPTS_TRY_LATER : Access has been", None, "Too many attempts"),
    (OLGA, PASSWORD, "CONFIGURATION_NOT_FOUND", None, "CONFIGURATION_NOT_FOUND"),
]


async def test_trouble_at_the_sign_in(visit: Visit, office: Server, google: Google) -> None:
    """What Google refuses is said in words, at the field that it is about; who forgot the password
    gets an e-mail; whose address is not proven owns nothing, and reads how to prove it."""
    page = await visit(f"{office.url}/owner")
    alert = page.get_by_role("alert")
    for email, password, google.refusal, name, words in WRONG:
        await sign_in(page, email, password)
        if name is None:
            await expect(alert).to_contain_text(words)
            continue
        field = page.get_by_label(name)
        await expect(field).to_have_attribute("aria-invalid", "true")
        await expect(field).to_be_focused()
        await expect(field).to_have_accessible_description(re.compile(words))
        await expect(page.locator("[aria-invalid]")).to_have_count(1)
    assert await page.evaluate("sessionStorage.length + localStorage.length") == 0
    google.refusal = ""
    google.calls.clear()

    await page.reload()
    await press(page, "I forgot my password")
    await expect(alert).to_contain_text("Enter your e-mail address")
    await page.get_by_label("E-mail address").fill(OLGA)
    await press(page, "I forgot my password")
    await expect(page.get_by_text(f"An e-mail to {OLGA}")).to_be_visible()
    wanted = {"requestType": "PASSWORD_RESET", "email": OLGA}
    assert google.calls == [{"call": "/v1/accounts:sendOobCode", **wanted}]

    await sign_in(page, EVE)
    await expect(page.get_by_text("This account owns no site here")).to_contain_text(EVE)
    await press(page, "Send me an e-mail")
    await expect(page.get_by_text("Sent.")).to_be_visible()
    google.claims.append({"email_verified": True})
    await press(page, "I have opened it")
    await expect(page.get_by_role("heading", name="Acme Shop")).to_be_visible()
    assert [call["call"] for call in google.calls[2:]] == ["/v1/accounts:sendOobCode", "/token"]


async def test_sign_in(visit: Visit, office: Server, google: Google) -> None:
    """Signed in for this tab: it survives a reload, and nothing is left after signing out.

    Requests for a site say which host it has, so that a proxy finds the process it lives in.
    """
    page = await visit("about:blank")
    said: list[tuple[str, str | None]] = []
    path = "/api/admin/sites"

    def listen(request: PageRequest) -> None:
        if path in request.url:
            host = request.headers.get("x-leflux-host")
            said.append((request.url.partition(path)[2], host))

    page.on("request", listen)
    await page.goto(f"{office.url}/owner?host=shop.example#/shop/settings")
    await sign_in(page)
    heading = page.get_by_role("heading", name="Acme Shop")
    await expect(heading).to_be_visible()
    call = {"call": "/v1/accounts:signInWithPassword", "email": OLGA, "password": PASSWORD}
    assert google.calls == [{**call, "returnSecureToken": True}]
    assert {("", None), ("", "shop.example"), ("/shop", "localhost")} == set(said)
    await page.reload()
    await expect(heading).to_be_visible()
    assert await page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    await press(page, "Sign out")
    await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert await page.evaluate("sessionStorage.length") == 0
    assert OLGA not in await page.content()
    assert len(google.calls) == 1


AGED = """() => { // an hour later
    const kept = JSON.parse(sessionStorage["leflux owner"]);
    sessionStorage["leflux owner"] = JSON.stringify({ ...kept, expiresAt: 0 });
}"""


async def test_tokens_are_renewed(enter: Open, google: Google) -> None:
    """A token is renewed shortly before its end, or when the server refuses it; once at a time.

    A refresh token that is refused leads to the sign-in, and that back to where one was.
    """
    google.lifetime = 50  # less than the minute that is left for its renewal
    page = await enter("settings")
    assert [call["call"] for call in google.calls][1:] == ["/token"] * (len(google.calls) - 1)
    google.lifetime = 3600
    for refused, tab in enumerate(("Settings", "Looks")):
        google.calls.clear()
        google.claims.extend([{"exp": NOW - 60}] * refused)  # the clocks differ
        await page.evaluate(AGED)
        await page.reload()
        await follow(page, tab)
        assert [call["call"] for call in google.calls] == ["/token"] * (1 + refused)
    await page.evaluate(AGED)
    google.refusal = "TOKEN_EXPIRED"
    await page.reload()
    await expect(page.get_by_text("Your sign-in has ended")).to_be_visible()
    google.refusal = ""
    await sign_in(page)
    await expect(page.get_by_role("heading", name="Looks")).to_be_visible()


async def test_when_nothing_answers(visit: Visit, office: Server, google: Google) -> None:
    """Without Google or the server the page says so, and a second try works."""
    page = await visit(f"{office.url}/owner#/shop/settings")
    for url, words in (
        (f"{google.url}/**", "The sign-in service cannot be reached"),
        ("**/api/admin/sites", "The server cannot be reached"),
        ("**/api/admin/sites/shop", "The server cannot be reached"),
    ):
        await page.route(url, lambda route: route.abort())
        await sign_in(page)
        await expect(page.get_by_role("alert")).to_contain_text(words)
        await page.unroute(url)
    await press(page, "Try again")
    await page.get_by_role("heading", name="Settings").wait_for()


# ---------------------------------------------------------------------------------------------
# Forms


REFUSED = [  # tab, field, what is written, what it is told
    ("looks", "Greeting", "x" * 241, "Greeting must be a string of 0 to 240 characters."),
    ("looks", "Colour", "red;", "Colour must be a CSS colour such as #a855f7."),
    ("looks", "Logo", "/my logo.png", "an http(s) URL"),
    ("looks", "Button 1", "x" * 31, "item 1 must be"),
    ("looks", "Distance from the side", "501", "a number from 0 to 500"),
    ("looks", "Distance from top or bottom", "far", "a number from 0 to 500"),
    ("looks", "Font of texts", "a;b", "a CSS value"),
    ("settings", "Name", "x" * 81, "1 to 80 characters"),
    ("settings", "Hosts", "localhost\nhttps://acme.com/", 'write "acme.com"'),
    ("settings", "Hosts", "other.example", "belongs to another site"),
    ("settings", "Instructions for the agent", "x" * 20_001, "Instructions"),
    ("settings", "Refusal", "x" * 501, "1 to 500 characters"),
]


async def test_errors_stand_at_their_fields(enter: Open, office: Server) -> None:
    """What the API refuses is said at the field, which gets the focus; nothing is saved."""
    page = await enter("settings")
    told, invalid = page.locator("form .told").first, page.locator("[aria-invalid]")
    for tab, name, text, words in REFUSED:
        await page.goto(f"{office.url}/owner#/shop/{tab}")
        await page.get_by_role("heading", level=2, name=tab).wait_for()
        field = page.get_by_label(name, exact=True)
        before = await field.input_value()
        await field.fill(text)
        await page.get_by_role("button", name="Save").first.click()
        await expect(field).to_have_accessible_description(re.compile(re.escape(words)))
        await expect(field).to_be_focused()
        await expect(invalid).to_have_count(1)
        await expect(told).to_be_empty()
        await field.fill(before)
        await page.get_by_role("button", name="Save").first.click()
        await expect(told).to_contain_text("Saved.")
        await expect(invalid).to_have_count(0)
    assert office.app.site_patches["shop"] == {"config": {}}


# The fields of siteConfig: what they are called, what is put in, and the value of it, if another.
FIELDS: dict[str, tuple[Any, ...]] = {
    "siteName": ("Name", "Acme"),
    "greeting": ("Greeting", "Good **morning**"),
    "primaryColor": ("Colour", "#006400"),
    "layout": ("Layout", "side-panel"),
    "position": ("Position", "top-left"),
    "logoUrl": ("Logo", "/logo.png"),
    "quickChips": ("Button 2", "Hours", ({"text": "Hours"},)),
    "launcher.shape": ("Shape", "squircle"),
    "launcher.size": ("Size", "large", "lg"),
    "launcher.icon": ("Icon", "cursor"),
    "launcher.position": ("Its position", "top-right"),
    "launcher.offsetX": ("Distance from the side", "12", 12),
    "launcher.offsetY": ("Distance from top or bottom", "1.5", 1.5),
    "launcher.glow": ("It glows", False),
    "launcher.hidden": ("Hide it: the page has a button of its own", True),
    "nudge.enabled": ("Show it", True),
    "nudge.message": ("What it says", "Need help?"),
    "nudge.style": ("Its style", "card"),
    "nudge.delay": ("After milliseconds", "0", 0),
    "nudge.dismissable": ("It can be dismissed", True),
    "typography.headingFont": ("Font of headings", "Georgia, serif"),
    "typography.bodyFont": ("Font of texts", "Arial"),
    "typography.headingWeight": ("Weight of headings", "bold"),
    "typography.buttonRadius": ("Roundness of buttons", "8", 8),
    "language": ("Language", "de"),
    "words": (
        "Words of your own",
        "send: Go: now\nstop: Halt",
        {"send": "Go: now", "stop": "Halt"},
    ),
}


def flat(table: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in table.items():
        yield from flat(value, f"{path}{name}.") if isinstance(value, dict) else [path + name]


async def put_in(page: Page, name: str, value: str | bool) -> None:
    field = page.get_by_label(name, exact=True)
    if isinstance(value, bool):
        await field.set_checked(value)
    elif await field.evaluate("(one) => one.localName") == "select":
        await field.select_option(value)
    else:
        await field.fill(value)


async def test_every_field_of_looks(enter: Open, office: Server) -> None:
    """The form has all that there is to set; what is emptied is as in config.toml again."""
    assert FIELDS.keys() == {*flat(lf.SITE_CONFIG_RULES)}
    page = await enter("looks")
    before = office.app.sites["shop"].config
    for name, value, *_ in FIELDS.values():
        await put_in(page, name, value)
    await save(page)
    config = office.app.sites["shop"].config
    assert {path: reduce(operator.getitem, path.split("."), config) for path in FIELDS} == {
        path: about[-1] for path, about in FIELDS.items()
    }
    await page.reload()
    await expect(page.get_by_label("Words of your own")).to_have_value("send: Go: now\nstop: Halt")
    await put_in(page, "Words of your own", "stop: Halt")
    await save(page)
    assert office.app.sites["shop"].config["words"] == {"stop": "Halt"}
    for name, value, *_ in FIELDS.values():
        field = page.get_by_label(name, exact=True)
        if isinstance(value, str) and await field.evaluate("(one) => one.localName") != "select":
            await field.fill("")
    await save(page)
    config = office.app.sites["shop"].config
    assert (config["greeting"], config["primaryColor"]) == ("Welcome!", "#8a4b2a")
    assert config.keys() == before.keys()


async def test_preview(enter: Open, office: Server) -> None:
    """The real widget follows the form while one types, and leaves the focus there; a link away
    from what is not saved asks first."""
    page = await enter("looks")
    bar, bot, panel, launcher = (
        part(page.frame_locator("iframe"), one) for one in (".bar", ".bot", ".panel", ".launcher")
    )
    await expect(bar).to_have_css("background-color", "rgb(138, 75, 42)")
    await expect(bot).to_have_text("Welcome!")
    colour, greeting = page.get_by_label("Colour", exact=True), page.get_by_label("Greeting")
    for written, picked in (("#0a6", "#00aa66"), ("no colour", "#00aa66"), ("navy", "#000080")):
        await colour.fill(written)
        await expect(page.get_by_label("Pick a colour")).to_have_value(picked)
    await colour.fill("")
    await colour.press_sequentially("#006400", delay=120)  # it is drawn anew meanwhile
    await expect(bar).to_have_css("background-color", "rgb(0, 100, 0)")
    await page.wait_for_timeout(600)
    await expect(colour).to_be_focused()
    await expect(colour).to_have_value("#006400")
    await page.get_by_label("Layout").select_option("side-panel")
    await greeting.fill("Good morning")
    await expect(bot).to_have_text("Good morning")
    await page.get_by_label("Screen").select_option("phone")
    assert await panel.evaluate("(one) => one.getBoundingClientRect().width") == 390
    await page.get_by_label("The chat is open").uncheck()
    await expect(panel).to_be_hidden()
    await expect(launcher).to_be_visible()
    assert office.app.site_patches == {}
    assert not office.app.sessions

    away = page.get_by_role("link", name="Settings")
    await away.click()
    await press(page, "Cancel")
    await expect(greeting).to_have_value("Good morning")
    await away.click()
    await press(page, "Leave")
    await page.get_by_role("heading", name="Settings").wait_for()
    await follow(page, "Looks")
    await expect(greeting).to_have_value("Welcome!")


async def test_settings(enter: Open, office: Server, hook: Hook) -> None:
    """Settings hold at once and stay; a button tells whether the notify URL works.

    An owner makes and deletes no sites, and reads who the owners are.
    """
    page = await enter("settings")
    await expect(page.get_by_label("Owners")).to_have_attribute("readonly", "")
    await expect(page.get_by_role("button", name="Delete this site")).to_have_count(0)
    await page.get_by_role("link", name="leflux").click()
    await page.get_by_role("link", name="Acme Shop").wait_for()
    await expect(page.get_by_role("button", name="Make it")).to_have_count(0)
    for name in ("Acme Shop", "Settings"):
        await follow(page, name)
    await press(page, "Test the address")
    address = page.get_by_label("Address for messages")
    await expect(address).to_have_accessible_description(re.compile("is not set"))
    office.app.public_http = office.app.http  # which may reach this machine
    written = {"Name": "Acme", "Hosts": "localhost\nlocalhost:8000", "Refusal": "Closed."}
    for name, text in {**written, "Address for messages": hook.url}.items():
        await page.get_by_label(name, exact=True).fill(text)
    for name in ("send forms", "Paused: visitors get the refusal"):
        await page.get_by_label(name).check()
    await save(page)
    site = office.app.sites["shop"]
    assert (site.name, site.refusal, site.restrictions) == ("Acme", "Closed.", ("submit",))
    assert (site.paused, site.notify_url) == (True, hook.url)
    assert site.allowed_hosts == (("localhost", None), ("localhost", 8000))
    hook.statuses.append(500)
    for words in ("It did not arrive: HTTP 500", "It has arrived."):
        await press(page, "Test the address")
        await expect(page.get_by_text(words)).to_be_visible()
    assert [one["event"] for one in hook.got] == ["test", "test"]
    await page.reload()
    for name, text in written.items():
        await expect(page.get_by_label(name, exact=True)).to_have_value(text)
    await expect(page.get_by_label("send forms")).to_be_checked()
    for name in ("Name", "Address for messages"):  # back to what config.toml says
        await page.get_by_label(name, exact=True).fill("")
    await press(page, "Save")
    await expect(page.get_by_label("Name")).to_have_value("Acme Shop")
    assert office.app.sites["shop"].notify_url == ""
    await page.get_by_role("link", name="leflux").click()  # the list knows it, too
    await page.get_by_role("link", name="Acme Shop").wait_for()
    await page.goto(f"{office.url}/owner#/other/settings")
    await expect(page.get_by_role("alert")).to_be_visible()


@with_config(limits=BUSY)
async def test_conversations(enter: Open, office: Server, model: FakeModel) -> None:
    """Chats are listed newest first, searched, and read with what was done in them."""
    for number in range(51):
        await (await office.visitor("http://localhost", connect=False)).chat(f"Question {number}")
    await until(lambda: len(model.requests) == 51)
    model.scripts.append(act("On it.", {"type": "click_element", "elementId": 1}))
    visitor = await office.visitor("http://localhost")
    await visitor.ask("Question 51", pageContext={**SHOWN, "indexedElements": [BUTTON]})
    plan = visitor.frames[-1]["data"]["actions"][0]["id"]
    await visitor.send("action_complete", actionId=plan, result={"success": True})
    await visitor.send("continue_task", context={**SHOWN, "title": "Prices"})
    await visitor.turn()
    page = await enter("conversations")
    rows, dialog = page.locator(".line"), page.get_by_role("dialog")
    said = dialog.locator("li")
    await expect(rows).to_have_count(50)
    await expect(rows.first).to_contain_text("now")
    await press(page, "Older ones")
    await expect(rows).to_have_count(52)
    await expect(page.get_by_role("button", name="Older ones")).to_have_count(0)
    await search(page, "question 51")
    await expect(rows).to_have_count(1)
    await rows.click()
    await expect(said.first).to_have_text("VisitorQuestion 51")
    await expect(dialog).to_contain_text(visitor.id)  # for --export, --erase
    await expect(said.filter(has_text="Action")).to_contain_text("Prices")
    await page.keyboard.press("Escape")
    await search(page, "nothing of this kind")
    await expect(page.get_by_text("No conversations here.")).to_be_visible()


LINKS = "".join(f'<a href="/{number}">Page {number}</a>' for number in range(1, 8))


async def small_website(request: web.Request) -> web.Response:
    """Seven pages, one of which is not there."""
    if not re.fullmatch("/[1-6]?", request.path):
        raise web.HTTPNotFound
    html = f"<title>Page {request.path}</title><h1>Coffee</h1><p>A text of this page.</p>{LINKS}"
    return web.Response(text=html, content_type="text/html")


@with_constants(CRAWL_SECONDS=0.4)
@with_config(site={**SITE, "crawl_hours": 0})
async def test_reading_a_website(enter: Open, office: Server) -> None:
    """A website is read while one looks on."""
    office.app.public_http = office.app.http  # which may reach this machine
    page = await enter("knowledge")
    async with listening(small_website) as url:
        await press(page, "Read it now")
        address = page.get_by_label("Address")
        await expect(address).to_have_accessible_description(re.compile("is not set"))
        await address.fill(f"{url}/")
        await page.get_by_role("button", name="Save").last.click()
        await expect(page.get_by_text("Saved.")).to_be_visible()
        await press(page, "Read it now")
        told = page.get_by_role("status").filter(has_text="Reading")
        await expect(told).to_have_text(re.compile("Reading: [1-8] of 8"))
        assert await page.get_by_role("progressbar").get_attribute("max") == "8"
        words = "7 pages read, 0 of them unchanged, 1 failed"
        await expect(page.get_by_text(words)).to_be_visible()
    await expect(page.get_by_role("row", name="Page /3")).to_contain_text("ok")
    await expect(page.get_by_role("table", name="What could not be read")).to_contain_text("/7")


async def test_snippets(enter: Open, office: Server) -> None:
    """Snippets are added, changed and deleted, one at a time."""
    page = await enter("knowledge")
    answer, snippet = page.get_by_label("Answer").first, page.locator("summary", has_text="Where")
    await page.get_by_text("Add a snippet").click()
    await page.get_by_label("Question").fill("Where are you?")
    for text in ("", "x" * 2001):
        await answer.fill(text)
        await press(page, "Add")
        words = re.compile("^Answer must be .* 1 to 2,000 characters")
        await expect(answer).to_have_accessible_description(words)
        await expect(answer).to_be_focused()
    await answer.fill("In Berlin.")
    await press(page, "Add")
    await snippet.click()
    await expect(answer).to_have_value("In Berlin.")
    await answer.fill("In Bern.")
    await page.get_by_role("button", name="Save").first.click()
    await until(lambda: "In Bern." in json.dumps(office.app.site_patches["shop"]))
    await snippet.click()
    await press(page, "Delete")
    await expect(snippet).to_have_count(0)
    assert office.app.site_patches["shop"]["snippets"] == []


async def test_messages(enter: Open, office: Server, model: FakeModel) -> None:
    """Messages are shown as text, whatever is in them, and deleted once the owner is sure."""
    said = {"name": "<b>Ada</b>", "email": "ada@example.com"}
    said["message"] = "<img src=x onerror=alert(1)>"
    model.scripts.append(act("", {"type": "contact_owner", **said}))
    visitor = await office.visitor("http://localhost")
    await visitor.ask("Tell them", pageContext={**SHOWN, "url": "javascript:alert(1)"})
    await visitor.send("confirmation_response", confirmed=True)
    await visitor.turn()
    page = await enter("messages")
    card = page.locator(".cards > li")
    await expect(card).to_contain_text(said["message"])
    await expect(card.get_by_role("link")).to_have_attribute("href", "mailto:ada@example.com")
    await press(page, "Delete", "Cancel")
    assert len(office.app.letters) == 1
    await press(page, "Delete", "Delete it")
    await expect(page.get_by_text("Nobody has left a message.")).to_be_visible()
    assert office.app.letters == {}


# ---------------------------------------------------------------------------------------------
# Everybody can use it

TABS = ("overview", "looks", "knowledge", "conversations", "messages", "settings")


async def test_axe(visit: Visit, office: Server) -> None:
    """axe-core finds nothing on any view, in light and dark."""
    page = await visit(f"{office.url}/owner")

    async def check() -> None:
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await axe(page) == [], (page.url, scheme)

    await sign_in(page, password="wrong")
    await page.locator("[aria-invalid]").wait_for()
    await check()
    await (await office.visitor("http://localhost")).ask()
    await sign_in(page, BOSS)
    await page.get_by_role("heading", name="Your sites").wait_for()
    await check()
    for tab in TABS:
        await page.goto(f"{office.url}/owner#/shop/{tab}")
        await page.get_by_role("heading", level=2, name=tab).wait_for()
        await page.evaluate(
            "for (const one of document.querySelectorAll('details')) one.open = true"
        )
        await check()
        if tab == "conversations":
            await page.locator(".line").first.click()
            await page.get_by_role("button", name="Erase").click()
            await check()
            await page.keyboard.press("Escape")
            await page.keyboard.press("Escape")
            await expect(page.get_by_role("dialog")).to_have_count(0)
            await expect(page.locator(".line").first).to_be_focused()


PHONES: tuple[Json, ...] = ({"width": 320, "height": 640}, {"width": 844, "height": 390})


@pytest.mark.parametrize("size", PHONES)
async def test_on_a_phone(enter: Open, office: Server, size: Json) -> None:
    """Nothing is wider than the screen, and no field so small that a phone zooms in."""
    page = await enter("settings", is_mobile=True, **size)
    fields = page.locator("input:not([readonly]), textarea, select")
    small = "(fields) => fields.filter((one) => parseFloat(getComputedStyle(one).fontSize) < 16)"
    for tab in TABS:
        await page.goto(f"{office.url}/owner#/shop/{tab}")
        await page.get_by_role("heading", level=2, name=tab).wait_for()
        assert await page.evaluate("document.documentElement.scrollWidth") == size["width"], tab
        assert await fields.evaluate_all(small) == []


async def tab_to(page: Page, selector: str) -> None:
    """Press Tab until the focus is there, and can be seen to be."""
    for _ in range(80):
        await page.keyboard.press("Tab")
        if await page.evaluate("(it) => document.activeElement.matches(it)", selector):
            break
    focused = page.locator(":focus")
    await expect(focused).to_have_css("outline-style", "solid")
    assert await page.evaluate("(it) => document.activeElement.matches(it)", selector)


async def test_by_keyboard(enter: Open, office: Server) -> None:
    """Everything can be reached and done with the keyboard, and the focus is never lost.

    The sign-in and the conversations: see test_engines.py.
    """
    page = await enter("settings")
    keyboard = page.keyboard
    await tab_to(page, "nav a[href$=looks]")
    await keyboard.press("Enter")
    await page.get_by_role("heading", name="Looks").wait_for()
    await expect(page.locator("nav a[aria-current=page]")).to_be_focused()
    await tab_to(page, "textarea")
    await keyboard.press("Control+a")
    await keyboard.type("Good morning!")
    await tab_to(page, "button[type=submit]")
    await keyboard.press("Enter")
    await expect(page.get_by_text("Saved.")).to_be_visible()
    await expect(page.get_by_role("button", name="Save")).to_be_focused()
    assert office.app.sites["shop"].config["greeting"] == "Good morning!"


# ---------------------------------------------------------------------------------------------
# Admins


async def test_new_sites(enter: Open, office: Server) -> None:
    """An admin makes a site, hands it over to its owner, and deletes it."""
    page = await enter("settings", email=BOSS)
    await page.get_by_role("link", name="leflux").click()
    host = page.get_by_label("Host")
    for name, words in (("https://acme.com", "acme.com"), ("other.example", "another site")):
        await host.fill(name)
        await page.get_by_label("Name").fill("Acme")
        await press(page, "Make it")
        await expect(host).to_have_accessible_description(re.compile(words))
    await host.fill("acme.com")
    await press(page, "Make it")
    await page.get_by_role("heading", level=2, name="Settings").wait_for()
    await page.get_by_label("Owners").fill(OLGA)
    await save(page)
    assert office.app.sites["acme-com"].owners == (OLGA,)
    await press(page, "Delete this site", "Cancel", "Delete this site", "Delete it")
    await expect(page.get_by_role("heading", name="Your sites")).to_be_visible()
    assert await page.locator(".cards a").all_inner_texts() == ["Acme Shop", "Other"]
    assert office.app.sites.keys() == {"shop", "other"}
    # A site of config.toml cannot be deleted here.
    await follow(page, "Acme Shop")
    await follow(page, "Settings")
    await press(page, "Delete this site", "Delete it")
    await expect(page.get_by_role("alert")).to_contain_text("config.toml")


# ---------------------------------------------------------------------------------------------
# The README's picture

ASKED = ("What does Pro cost?", "Do you ship abroad?", "Where is my order?", QUESTION)


@with_constants(SWEEP_SECONDS=0.05)
async def test_picture(
    visit: Visit,
    serve: Serve,
    key_server: KeyServer,
    google: Google,
    model: FakeModel,
    clock: Clock,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """A month of a shop, as its owner sees it."""
    draw = pytestconfig.getoption("--screenshots")
    limits = {**BUSY, "site_messages_per_day": 1000, "site_tokens_per_day": 3_000_000}
    state = {"state_dir": str(tmp_path)}
    server = await open_office(serve, key_server, google, model, limits=limits, server=state)
    for back in range(29 if draw else 2, -1, -1):
        clock.ahead = -DAY_SECONDS * back
        for number in range(4 + 7 * back * (31 - back) % 9):
            at = {"pageUrl": f"http://localhost/{('coffee', 'prices', 'contact')[number % 3]}"}
            begun = await server.call("POST", "/api/session/init", at, origin="http://localhost")
            visitor = Visitor(server, begun.body["sessionId"], "http://localhost")
            await visitor.connect()
            for question in ASKED[(number * number + back) % 4 :][: 1 + number % 3]:
                said = {"message": "Let me see.", "answered": question != QUESTION}
                model.scripts.append([sse(chunk(json.dumps(said)), "[DONE]")])
                await visitor.ask(question, pageContext=SHOWN)
    page = await visit(f"{server.url}/owner", 1000, 1010)
    await sign_in(page)
    await page.get_by_role("heading", name="Overview").wait_for()
    await expect(page.locator("rect")).to_have_count(60)
    await expect(page.get_by_role("img")).to_have_accessible_name(re.compile("^[1-9]"))
    file = (lf.HERE / "docs" if draw else tmp_path) / "owner.png"
    await page.screenshot(path=file, clip={"x": 0, "y": 0, "width": 985, "height": 1010})
    assert file.stat().st_size < 100_000
