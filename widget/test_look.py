"""How the widget looks, and that everybody can use it: measured in a real browser.

python -m pytest widget/test_look.py
python -m pytest widget/test_look.py --screenshots    # the README's, into docs/
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import FrameLocator, Locator, Page, expect
from test_widget import chat_server, shop

import leflux_server as lf
from conftest import FakeModel, Json, Pages, Serve, Visit, act, axe, cases, chunk, reply, sse

LAYOUTS = ("floating", "bottom-bar", "side-panel")
DESKTOP, PHONE = (1280, 800), (390, 844)


def part(page: Page | FrameLocator, selector: str) -> Locator:
    """A part of the widget; the locator looks into its shadow root."""
    return page.locator(f"leflux-widget {selector}")


async def opened(page: Page) -> Page:
    await part(page, ".launcher").click()
    await part(page, ".panel").wait_for()
    return page


async def ask(page: Page, text: str) -> None:
    """Write a message and wait for the whole answer."""
    await part(page, "textarea").fill(text)
    await part(page, "textarea").press("Enter")
    await expect(part(page, ".user").last).to_have_class("user")  # no longer pending
    await expect(part(page, ".stop")).to_be_hidden()


async def box(locator: Locator) -> tuple[float, float, float, float]:
    """Where something is: left, top, right, bottom."""
    bounds = await locator.bounding_box()
    assert bounds, locator
    left, top = bounds["x"], bounds["y"]
    return left, top, left + bounds["width"], top + bounds["height"]


async def style(locator: Locator, *names: str) -> list[str]:
    found: list[str] = await locator.evaluate(
        "(node, names) => names.map((name) => getComputedStyle(node)[name])", names
    )
    return found


async def settled(page: Page) -> None:
    """Wait for the end of what moves; what goes round for ever is left alone."""
    await part(page, ".root").evaluate(
        """(root) => Promise.all(root.getAnimations({subtree: true})
            .filter((one) => one.effect.getTiming().iterations !== Infinity)
            .map((one) => one.finished))"""
    )


# ---------------------------------------------------------------------------------------------
# A conversation that shows everything

TEXT = """Our **Pro** plan costs *€18 a month*, see [our prices](/prices):

- two bags of 250 g
- `PRO10` for 10% off

1. Choose a plan
2. Pay

```
curl https://example.com/a/rather/long/path/for/a/narrow/panel?with=a&query=too
```"""
BLOCKS: dict[str, list[dict[str, Any]]] = {
    "pricing_cards": [
        {"name": "Free", "price": "€0", "features": ["Single bags from €9"]},
        {"name": "Pro", "price": "€18", "period": "a month", "cta_url": "/prices"},
    ],
    "feature_grid": [{"title": "Fresh", "body": "Roasted twice a week"}, {"title": "Fair"}],
    "faq_list": [{"q": "Do you ship abroad?", "a": "Within the EU."}],
    "link_cards": [{"title": "Prices", "description": "All plans", "url": "/prices"}],
}


def block(kind: str) -> list[bytes]:
    action = {"type": "render_ui_block", "block_type": kind, "data": {"items": BLOCKS[kind]}}
    return act(f"Here you are: {kind}.", action)


async def fail_to_ask(page: Page) -> None:
    """Write a message that does not reach the server."""
    await page.route("**/api/chat", lambda route: route.abort())
    await part(page, "textarea").fill("Is anybody there?")
    await part(page, "textarea").press("Enter")
    await part(page, ".error button").wait_for()
    await page.unroute("**/api/chat")


async def everything(page: Page, model: FakeModel) -> None:
    """A conversation with text, all blocks, an error, and a question that waits for a yes."""
    pending = {"type": "navigate", "url": "/prices"}
    question = {"type": "confirmation_required", "message": "Go?", "pending_action": pending}
    model.scripts.extend([reply(TEXT), *map(block, BLOCKS), act("", question)])
    for kind in ("text", *BLOCKS):
        await ask(page, f"Show me: {kind}")
    await part(page, "summary").click()
    await fail_to_ask(page)
    await ask(page, "To the prices")
    await part(page, ".confirm").wait_for()


# ---------------------------------------------------------------------------------------------
# Colours

# Every text and icon of the widget that shows, with its colour and what is behind it.
COLOURS = r"""(root) => {
    const found = [];
    for (const node of root.querySelectorAll("*")) {
        const text = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
        const shows = text || node.placeholder || node.localName === "path";
        if (!shows || !node.checkVisibility() || node.closest(".quiet, :disabled")) continue;
        let ground = node;
        while (/^rgba.* 0\)$/.test(getComputedStyle(ground).backgroundColor)) {
            ground = ground.parentElement;
        }
        const colour = getComputedStyle(node, node.placeholder ? "::placeholder" : null).color;
        const words = node.textContent || node.placeholder || node.closest("button").ariaLabel;
        found.push([words.slice(0, 20), colour, getComputedStyle(ground).backgroundColor]);
    }
    return found;
}"""


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of "rgb(1, 2, 3)"; transparent colours are not expected."""
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", colour), colour
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


async def hard_to_read(page: Page) -> list[Any]:
    found = await part(page, ".root").evaluate(COLOURS)
    assert found
    return [(words, one, two) for words, one, two in found if contrast(one, two) < 4.5]


PRIMARY = {  # primaryColor: what it is on the screen
    "#8a4b2a": (138, 75, 42),
    "white": (255, 255, 255),
    "#fffde7": (255, 253, 231),
    "#000": (0, 0, 0),
    "#0a0a23": (10, 10, 35),
    "#777": (119, 119, 119),
    "hsl(60 100% 50%)": (255, 255, 0),
    "rgb(0 80 255 / 40%)": (153, 185, 255),
    "#ff000080": (255, 127, 127),
    "oklch(0.7 0.32 145)": (0, 202, 0),  # more than a screen can show
    "rgb(none 128 none)": (0, 128, 0),
    # Harmless, but no colour: the default.
    "blurple": (168, 85, 247),
    "rgb(1 2)": (168, 85, 247),
    "inherit": (168, 85, 247),
}


async def test_every_colour_can_be_read(visit: Visit, serve: Serve) -> None:
    """Whatever primaryColor is, all text and icons have a contrast of 4.5, light and dark."""
    page = await visit("about:blank")
    greeting = "I am **Ada**. Look at [our prices](/prices)."
    for colour, wanted in PRIMARY.items():
        await page.emulate_media(color_scheme="light")
        await page.goto(await shop(serve, primaryColor=colour, greeting=greeting))
        await opened(page)
        [shown] = await style(part(page, ".bar"), "backgroundColor")
        assert [int(part) for part in re.findall(r"\d+", shown)] == pytest.approx(wanted, abs=1)
        await ask(page, "delete my account")
        await part(page, ".confirm").wait_for()
        await settled(page)
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await hard_to_read(page) == [], colour
        # The greeting's accent: its strong words are in the site's colour.
        [accent] = await style(part(page, ".greeting strong"), "color")
        [link] = await style(part(page, ".greeting a"), "color")
        assert accent == link


# ---------------------------------------------------------------------------------------------
# siteConfig

GAP = 20  # of launcher and panel to the viewport's edges
PLACES = [  # layout, position, how far the open panel is from the edges (None: it does not matter)
    ("floating", "bottom-right", (None, None, GAP, GAP)),
    ("floating", "bottom-left", (GAP, None, None, GAP)),
    ("floating", "top-right", (None, GAP, GAP, None)),
    ("floating", "top-left", (GAP, GAP, None, None)),
    ("bottom-bar", "bottom-right", (None, None, None, GAP)),
    ("side-panel", "bottom-right", (None, 0, 0, 0)),
    ("side-panel", "bottom-left", (0, 0, None, 0)),
]


async def edges_of(locator: Locator) -> list[float]:
    """How far something is from the window's edges (left, top, right, bottom), scroll bar apart."""
    edges: list[float] = await locator.evaluate(
        """(node) => {
            const { left, top, right, bottom } = node.getBoundingClientRect();
            const { clientWidth, clientHeight } = document.documentElement;
            return [left, top, clientWidth - right, clientHeight - bottom];
        }"""
    )
    return edges


async def assert_on_screen(page: Page, selector: str) -> None:
    await settled(page)
    for one in await part(page, selector).all():
        assert min(await edges_of(one)) >= 0, one


async def test_layouts_and_positions(visit: Visit, serve: Serve) -> None:
    """Each layout is where it belongs; on a phone, each is a full-screen sheet."""
    page = await visit("about:blank")
    for layout, position, wanted in PLACES:
        await page.set_viewport_size({"width": 1280, "height": 800})
        await page.goto(await shop(serve, layout=layout, position=position))
        left, top, right, bottom = await edges_of(part(page, ".launcher"))
        if layout == "bottom-bar":
            assert (left, bottom) == (right, GAP)
        else:
            sides = (left if "left" in position else right, top if "top" in position else bottom)
            assert sides == (GAP, GAP)
        await opened(page)
        await settled(page)
        edges = await edges_of(part(page, ".panel"))
        pairs = zip(edges, wanted, strict=True)
        assert [None if want is None else edge for edge, want in pairs] == [*wanted]
        assert layout != "bottom-bar" or edges[0] == edges[2]
        for width, height in (PHONE, (900, 400)):
            await page.set_viewport_size({"width": width, "height": height})
            await expect(part(page, ".panel")).to_have_js_property("offsetHeight", height)
            assert await edges_of(part(page, ".panel")) == [0, 0, 0, 0]


LAUNCHERS: list[tuple[dict[str, Any], tuple[str | None, str], str]] = [  # its size and radius
    ({}, ("58px", "58px"), "50%"),
    ({"size": "sm", "icon": "sparkle"}, ("46px", "46px"), "50%"),
    ({"size": "lg", "icon": "question", "shape": "squircle"}, ("70px", "70px"), "30%"),
    ({"size": "lg", "icon": "lightning", "shape": "pill"}, (None, "70px"), "1584px"),
    ({"icon": "cursor", "glow": False, "position": "top-left"}, ("58px", "58px"), "50%"),
    ({"offsetX": 500, "offsetY": 300}, ("58px", "58px"), "50%"),
]


async def test_launcher(visit: Visit, serve: Serve) -> None:
    """Shape, size, icon, glow and offsets of the button; it is never out of sight, unless a site
    with a button of its own hides it."""
    page = await visit("about:blank")
    button, panel = part(page, ".launcher"), part(page, ".panel")
    icons = set()
    for launcher, (width, height), radius in LAUNCHERS:
        await page.goto(await shop(serve, launcher=launcher))
        await button.wait_for()
        sizes = await style(button, "width", "height", "borderTopLeftRadius", "boxShadow")
        assert width is None or sizes[0] == width
        assert sizes[1:3] == [height, radius]
        assert ("24px -2px" in sizes[3]) == launcher.get("glow", True)
        assert (await button.inner_text() == "Fernweh Coffee") == ("pill" in launcher.values())
        icons.add(await button.locator("path").get_attribute("d"))
    assert len(icons) == 5
    assert (await edges_of(button))[2:] == [500, 300]
    for size in ((320, 256), PHONE, (700, 600)):
        await page.set_viewport_size({"width": size[0], "height": size[1]})
        await assert_on_screen(page, ".launcher")
    await opened(page)
    await assert_on_screen(page, ".panel")

    await page.goto(await shop(serve, launcher={"hidden": True}))
    await page.evaluate("LeFlux.open()")
    await panel.wait_for()
    await expect(button).to_be_hidden()
    await page.keyboard.press("Escape")
    await expect(panel).to_be_hidden()
    assert await button.is_hidden()


async def test_names_fonts_and_logo(visit: Visit, serve: Serve) -> None:
    """Site name, logo, fonts, weight and radius are the site's own."""
    name = "The Coffee & Tea House <at> the Harbour of a Faraway Place, with a Long Name"
    typography: Json = {"headingFont": "Georgia, serif", "bodyFont": "'Courier New'"}
    typography |= {"headingWeight": 300, "buttonRadius": "3px"}
    url = await shop(serve, siteName=name, logoUrl="/logo.svg", typography=typography)
    page = await visit("about:blank")
    picture = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    logo = {"body": picture, "content_type": "image/svg+xml"}
    await page.route("**/logo.svg", lambda route: route.fulfill(**logo))
    await page.goto(url)
    await opened(page)
    assert await part(page, "img").is_visible()
    title = part(page, "h2")
    assert await title.inner_text() == name
    assert await page.get_by_role("dialog", name=name, exact=True).count() == 1
    assert await style(title, "fontFamily", "fontWeight") == ["Georgia, serif", "300"]
    [family] = await style(part(page, "textarea"), "fontFamily")
    assert "Courier New" in family
    for button in (".chips .plain >> nth=0", "form .accent", ".bar button >> nth=0"):
        assert await style(part(page, button), "borderTopLeftRadius") == ["3px"]
    # A picture that does not load leaves no broken frame.
    await page.unroute("**/logo.svg")
    await page.route("**/logo.svg", lambda route: route.abort())
    await page.reload()
    await expect(part(page, "img")).to_be_hidden()


async def test_quick_chips(visit: Visit, serve: Serve, model: FakeModel) -> None:
    """A chip shows its text and sends its payload; after the first message they are gone."""
    chips = [{"text": "Hours", "payload": "When are you open?"}, {"text": "Say hello"}]
    page = await opened(await visit(await shop(serve, model, quickChips=chips)))
    assert await part(page, ".chips button").all_inner_texts() == ["Hours", "Say hello"]
    await page.get_by_role("button", name="Hours").click()
    await expect(part(page, ".user")).to_have_text("When are you open?")
    await expect(part(page, ".chips")).to_be_hidden()
    await expect(part(page, "textarea")).to_be_focused()
    await part(page, ".bot").get_by_text("ok", exact=True).wait_for()
    await page.get_by_role("button", name="Start over").click()
    await page.get_by_role("button", name="Say hello").click()
    await expect(part(page, ".user")).to_have_text("Say hello")


async def test_nudge(visit: Visit, serve: Serve) -> None:
    """The nudge comes after its delay, and for 24 hours no more once it is dismissed."""
    nudge = {"enabled": True, "message": "Need help?", "delay": 60_000}
    page = await visit("about:blank")
    await page.clock.install()
    await page.goto(await shop(serve, nudge=nudge))
    await part(page, ".launcher").wait_for()
    await page.clock.fast_forward(59_000)
    assert await part(page, ".nudge").is_hidden()
    await page.clock.fast_forward(2_000)
    await expect(part(page, ".nudge")).to_have_text("Need help?")
    await page.get_by_role("button", name="Dismiss").click()
    await expect(part(page, ".nudge")).to_be_hidden()
    await expect(part(page, ".launcher")).to_be_focused()
    for hours, comes in ((1, False), (22, False), (2, True)):
        await page.clock.fast_forward(hours * 3600 * 1000)
        await page.reload()
        await part(page, ".launcher").wait_for()
        await page.clock.fast_forward(61_000)
        await expect(part(page, ".nudge")).to_be_visible(visible=comes)
    await part(page, ".nudge").get_by_text("Need help?").click()
    await expect(part(page, ".panel")).to_be_visible()
    await expect(part(page, ".nudge")).to_be_hidden()


async def test_nudge_styles(visit: Visit, serve: Serve) -> None:
    """Each style can be read, fits on a narrow phone, and is free of axe's complaints."""
    page = await visit("about:blank", 320, 568)
    for look, layout in (("bubble", "floating"), ("card", "bottom-bar"), ("minimal", "side-panel")):
        nudge = {"enabled": True, "message": "M" * 140, "delay": 0, "style": look}
        nudge["dismissable"] = look != "card"
        await page.goto(await shop(serve, nudge=nudge, layout=layout))
        await part(page, ".nudge").wait_for()
        await assert_on_screen(page, ".nudge")
        assert (await box(part(page, ".nudge")))[3] < (await box(part(page, ".launcher")))[1]
        assert await part(page, ".nudge button").count() == (1 if look == "card" else 2)
        assert await hard_to_read(page) == []
        assert await axe(page) == []


# ---------------------------------------------------------------------------------------------
# Markdown and right-to-left text

MARKDOWN = {
    "**b** *i* _i_ `**c**`": "<p><strong>b</strong> <em>i</em> <em>i</em> <code>**c**</code></p>",
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "# Plans\nall": "<p><strong>Plans</strong>\nall</p>",
    "- a\n- b\n\n3. c\n4. d": "<ul><li>a</li><li>b</li></ul>"
    '<ol start="3"><li>c</li><li>d</li></ol>',
    "1. a\n\n- **b**\n- c_d_e": "<ol><li>a</li></ol>"
    "<ul><li><strong>b</strong></li><li>c_d_e</li></ul>",
    "```js\na < b\n**c**\n```\nx": "<pre><code>a &lt; b\n**c**\n</code></pre><p>x</p>",
    "[a](/b) https://c.example/d.": '<p><a href="/b">a</a> '
    '<a href="https://c.example/d" target="_blank">https://c.example/d</a>.</p>',
    "[x](javascript:alert(1)) [y](data:text/html,z)": "<p><span>x</span> <span>y</span></p>",
    "**[a](/b)**": '<p><strong><a href="/b">a</a></strong></p>',
    "2 * 3 * 4, a_b_c, **open, <b>&amp;</b>": "<p>2 * 3 * 4, a_b_c, **open, "
    "&lt;b&gt;&amp;amp;&lt;/b&gt;</p>",
}


async def test_markdown(visit: Visit, serve: Serve, model: FakeModel) -> None:
    """Bold, italic, code, lists, paragraphs and links; all else is text."""
    url = await shop(serve, model)
    page = await opened(await visit(url))
    for number, (text, wanted) in enumerate(MARKDOWN.items(), start=1):
        model.scripts.append(reply(text))
        await ask(page, "Go on")
        shown = await part(page, ".bot").nth(number).inner_html()
        shown = re.sub(r' (dir|rel|tabindex)="[^"]*"', "", shown).replace(url, "")
        assert shown == wanted


async def test_right_to_left(visit: Visit, serve: Serve, model: FakeModel) -> None:
    """Hebrew and Arabic run from the right, on the sides where all messages are."""
    model.scripts.append(reply("התוכנית עולה 18 יורו\n\n- אחת\n- שתיים\n\nand in English"))
    page = await opened(await visit(await shop(serve, model)))
    await ask(page, "كم سعر Pro؟")
    user, bot = part(page, ".user"), part(page, ".bot").last
    for selector, direction in (("p >> nth=0", "rtl"), ("ul", "rtl"), ("p >> nth=-1", "ltr")):
        assert await style(bot.locator(selector), "direction", "textAlign") == [direction, "start"]
    assert await style(user, "unicodeBidi", "textAlign") == ["plaintext", "start"]
    panel = await box(part(page, ".panel"))
    assert (await box(bot))[0] - panel[0] < 30
    assert panel[2] - (await box(user))[2] < 30
    await part(page, "textarea").fill("שלום")
    assert await style(part(page, "textarea"), "direction") == ["rtl"]


# ---------------------------------------------------------------------------------------------
# For everybody


async def test_everything_is_accessible(visit: Visit, serve: Serve, model: FakeModel) -> None:
    """axe-core has no complaint about the open panel in any layout; in small windows all fits."""
    page = await opened(await visit(await shop(serve, model, siteName="A house with a long name")))
    await everything(page, model)
    for is_dark, size in itertools.product((False, True), (DESKTOP, PHONE)):
        await page.emulate_media(color_scheme="dark" if is_dark else "light")
        await page.set_viewport_size({"width": size[0], "height": size[1]})
        for layout in LAYOUTS if size == DESKTOP else LAYOUTS[:1]:  # there, all are one sheet
            await part(page, ".root").evaluate(
                "(root, to) => { root.dataset.layout = to; }", layout
            )
            await settled(page)
            assert await axe(page) == []
            assert await hard_to_read(page) == []
    await part(page, "textarea").fill("word " * 950)
    for width, height in ((320, 568), (640, 400), (320, 256)):  # narrow, and 200 % and 400 % zoom
        await page.set_viewport_size({"width": width, "height": height})
        await assert_all_fits(page)


async def assert_clean(page: Page) -> None:
    """axe-core has no complaint, in light and dark."""
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        assert await axe(page) == []


async def assert_all_fits(page: Page) -> None:
    """Nothing is cut off or scrolls sideways, and some of the conversation can still be seen."""
    for selector in (".panel", ".log", ".bar", "form", "textarea"):
        wider = "(node) => node.scrollWidth - node.clientWidth"
        assert await part(page, selector).evaluate(wider) <= 0, selector
    controls = ":is(.bar, form) :is(button:enabled, textarea, .counter):visible"
    await assert_on_screen(page, controls)
    left, top, right, bottom = await box(part(page, ".log"))
    assert bottom - top >= 60
    for node in await part(page, ":is(.log > *, .card, .confirm button):visible").all():
        node_left, _, node_right, _ = await box(node)
        assert left <= node_left <= node_right <= right


async def test_demo_is_clean(visit: Visit, serve: Serve) -> None:
    """axe-core has no complaint about the demo shop with its closed chat."""
    url = await shop(serve)
    page = await visit("about:blank")
    for path in ("/", "/prices", "/contact"):
        await page.goto(url + path)
        await part(page, ".launcher").wait_for()
        await assert_clean(page)


async def test_keyboard_and_focus(visit: Visit, serve: Serve) -> None:
    """Opened, used and closed with the keyboard; the focus comes back, the page hears no key."""
    page = await visit(await shop(serve))
    await part(page, ".launcher").wait_for()
    await page.evaluate(
        """window.heard = [];
        for (const name of ["keydown", "keyup", "keypress"]) {
            document.addEventListener(name, (event) => heard.push(event.key));
        }"""
    )
    dialog = page.get_by_role("dialog", name="Fernweh Coffee")
    launcher = page.get_by_role("button", name="Open the chat")
    await launcher.focus()
    await page.keyboard.press("Enter")
    await expect(dialog).to_be_visible()
    await expect(page.get_by_role("textbox", name="Your message")).to_be_focused()
    assert await style(part(page, "textarea"), "outlineStyle") == ["none"]  # the form has the ring
    await page.keyboard.type("j/? k")
    for key in ("Control+a", "Escape"):
        await page.keyboard.press(key)
    await expect(dialog).to_be_hidden()
    await expect(launcher).to_be_focused()
    assert await launcher.get_attribute("aria-expanded") == "false"
    assert await page.evaluate("heard") == []
    # A button of the page that opens the chat gets the focus back, too.
    nav = page.get_by_role("link", name="Prices")
    await nav.focus()
    await page.evaluate("LeFlux.open()")
    await expect(dialog).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(nav).to_be_focused()
    # And who is elsewhere on the page stays there when the page closes the chat.
    await page.evaluate("LeFlux.open()")
    await expect(dialog).to_be_visible()
    other = page.get_by_role("link", name="Contact")
    await other.focus()
    await page.evaluate("LeFlux.close()")
    await expect(dialog).to_be_hidden()
    await expect(other).to_be_focused()


FOCUSED = """(() => {
    const inside = document.querySelector("leflux-widget").shadowRoot.activeElement;
    return inside && (inside.ariaLabel || inside.textContent);
})()"""


async def test_sheet_keeps_the_focus(visit: Visit, serve: Serve) -> None:
    """On a phone the panel is modal: Tab goes round within it, both ways. On a touch screen the
    focus goes into the panel, not to the input, which would bring up a keyboard."""
    page = await visit(await shop(serve), *PHONE, has_touch=True, is_mobile=True)
    await part(page, ".launcher").tap()
    await expect(part(page, ".panel")).to_be_focused()
    assert await part(page, ".panel").get_attribute("aria-modal") == "true"
    assert await style(part(page, "textarea"), "fontSize") == ["16px"]  # no phone zooms in
    for key in ("Tab", "Shift+Tab"):
        seen = []
        for _ in range(12):
            await page.keyboard.press(key)
            seen.append(await page.evaluate(FOCUSED))
        assert None not in seen
        assert {"Start over", "Close the chat", "Conversation", "Your message", "Send"} < set(seen)
    await page.set_viewport_size({"width": 1280, "height": 800})
    await expect(part(page, ".panel")).to_have_attribute("aria-modal", "false")


async def test_answers_are_read_out_once(visit: Visit, serve: Serve, model: FakeModel) -> None:
    """The live region gets a whole answer, once, without its marks; not each of its pieces.

    With prefers-reduced-motion no animation runs before it; without, the dots do.
    """
    pieces = ['{"message": "The **Pro** plan', r" costs\n\n- €18", " a [month](/prices).", '"}']
    page = await opened(await visit(await shop(serve, model), reduced_motion="reduce"))
    await part(page, "[aria-live=polite]").evaluate(
        """(region) => {
            window.said = [];
            new MutationObserver(() => said.push(region.textContent))
                .observe(region, { childList: true, characterData: true, subtree: true });
        }"""
    )
    model.scripts.append([step for piece in pieces for step in (model.at_gate, sse(chunk(piece)))])
    await part(page, "textarea").fill("Pro?")
    await part(page, "textarea").press("Enter")
    await part(page, ".dots").wait_for()
    running = "(root) => root.getAnimations({ subtree: true }).length"
    assert await part(page, ".root").evaluate(running) == 0
    await page.emulate_media(reduced_motion="no-preference")
    assert await part(page, ".root").evaluate(running) >= 3
    for shown in ("The Pro plan", "The Pro plan costs", "€18 a month."):
        model.gate.release()
        await expect(part(page, ".bot").last).to_contain_text(shown)
        assert await page.evaluate("said") == []
    model.gate.release()
    await expect(part(page, ".stop")).to_be_hidden()
    assert await page.evaluate("said") == ["The Pro plan costs\n€18 a month."]
    assert await part(page, "[role=log]").get_attribute("aria-live") == "off"


async def test_forced_colours(visit: Visit, serve: Serve, model: FakeModel) -> None:
    """In forced colours (Windows' high contrast) what had a background has a border."""
    page = await visit(await shop(serve, model), forced_colors="active")
    assert await style(part(page, ".launcher"), "borderTopStyle") == ["solid"]
    await opened(page)
    await page.mouse.move(0, 0)  # the button under it would have yet another colour
    await ask(page, "Hello")
    for selector in (".panel", ".user", ".bot >> nth=0", "form .accent"):
        edge, ground = await style(part(page, selector), "borderTopColor", "backgroundColor")
        assert contrast(edge, ground) >= 3
    assert await hard_to_read(page) == []


# ---------------------------------------------------------------------------------------------
# Languages

WORDS = {path.stem: json.loads(path.read_text()) for path in lf.HERE.glob("widget/words/*.json")}
ENGLISH: dict[str, str] = WORDS["en"]["widget"]


def test_words_are_whole() -> None:
    """What is inside embed.js is the English file; every language says all of it. It is small."""
    source = (lf.HERE / "widget" / "embed.js").read_text()
    assert source.count("\n") < 1900
    assert len(gzip.compress(source.encode(), 9)) < 30 * 1024
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


@pytest.mark.parametrize("tag", WORDS)
async def test_languages(tag: str, visit: Visit, serve: Serve, pages: Pages) -> None:
    """In each language nothing English is left, of widget or server, all fits at 320 pixels, and
    axe-core has no complaint; English asks for nothing."""
    config = {"greeting": "👋", "words": {"title": "Ωmega"}}
    await chat_server(serve, pages, config=config)
    page = await visit("about:blank", 320, 568)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    english = {word for key, word in ENGLISH.items() if key != "title"}
    english |= set(WORDS["en"]["server"].values())
    own, said = WORDS[tag]["widget"], WORDS[tag]["server"]
    body = f"<script>document.documentElement.lang = '{tag}-XX'</script><main><h1>XYZ</h1>"
    await page.goto(pages.add("/", f"{body}<button>XYZ delete</button></main>"))
    await ask(await opened(page), "XYZ delete")
    await part(page, ".confirm").wait_for()
    await fail_to_ask(page)
    texts = await part(page, ".root").evaluate(TEXTS)
    assert {own["retry"], own["unreachable"], "Ωmega", said["no"]} <= set(texts)
    if tag != "en":
        assert not (english - set(said.values())) & set(texts)
        assert not [text for text in texts if any(w in text for w in english if len(w) > 12)]
    assert await page.evaluate("LeFlux.getLanguage()") == f"{tag}-XX"
    for seen in (".panel", "textarea"):
        direction = "rtl" if tag == "ar" else "ltr"
        assert await style(part(page, seen), "direction") == [direction]
    await part(page, "textarea").fill("word " * 950)
    await assert_all_fits(page)
    await assert_clean(page)
    assert await part(page, f"[aria-label='{own['clear']}']").is_visible()
    files = [url.rpartition("/")[2] for url in asked if "/words/" in url]
    assert files == ([] if tag == "en" else [f"{tag}.json"])


@cases(
    "config, heard, words",
    ({}, ["pl", "en"], "Twoja wiadomość"),
    ({"language": "de"}, ["de", None], "Ihre Nachricht"),
)
async def test_other_languages(
    config: Json, heard: list[str | None], words: str, visit: Visit, serve: Serve
) -> None:
    """A page that changes its language changes the chat's, unless the site has fixed it."""
    page = await visit("about:blank")
    await page.add_init_script(
        "addEventListener('leflux:language-detected', ({ detail }) => heard = detail)"
    )
    await page.goto(await shop(serve, **config))
    await opened(page)
    await page.evaluate("document.documentElement.lang = 'pl'")
    await expect(part(page, "textarea")).to_have_attribute("aria-label", words)
    assert await page.evaluate("[heard.lang, heard.prev]") == heard


# ---------------------------------------------------------------------------------------------
# The README's pictures

SCENES: list[tuple[str, str, tuple[int, int], bool]] = [  # name, layout, window, dark
    ("floating", "floating", (1000, 640), False),
    ("side-panel", "side-panel", (1000, 640), True),
    ("bottom-bar", "bottom-bar", (1000, 640), False),
    ("phone", "floating", (390, 640), True),
]


async def test_screenshots(
    visit: Visit, serve: Serve, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """A question is answered, a form filled in, and the visitor is asked before it is sent."""
    draw = pytestconfig.getoption("--screenshots")
    for name, layout, size, dark in SCENES if draw else SCENES[:1]:
        url = await shop(serve, layout=layout) + "/contact"
        page = await opened(await visit(url, *size, dark=dark, is_mobile=name == "phone"))
        await page.mouse.move(0, 0)
        await ask(page, "What does Pro cost?")
        await ask(page, "Send a message that I love your coffee, I'm Ada, ada@example.com")
        await part(page, ".confirm").wait_for()
        assert await page.locator("#email").input_value() == "ada@example.com"
        await expect(part(page, ".ring")).to_be_hidden()
        await settled(page)
        file = (lf.HERE / "docs" if draw else tmp_path) / f"{name}.png"
        await page.screenshot(path=file)
        assert file.stat().st_size < 100_000
