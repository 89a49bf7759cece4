/* The owner's page: what visitors ask, how the chat looks, what it knows, who may change it.
 *
 * Everything comes from /api/admin (docs/api.md). session.js signs in and asks, parts.js has
 * elements, forms and the chart, and here are the views: each is a function of an open site that
 * returns nodes. The address says which one is shown: #/site/tab.
 */

import { api, begin, Failure, forgotten, me, prove, renew, settings, signIn, signOut }
  from "/owner/session.js";
import { button, chart, count, form, h, pageLink, redraw, report, sure, table, time, vanish,
  worker } from "/owner/parts.js";

const main = document.querySelector("#main");
const who = document.querySelector("#who");
const out = document.querySelector("#out");
const sites = new Map(); // id -> {id, name, allowedHosts}, as they were listed
let isIn = false;
let isAdmin = false;
let visit = new AbortController(); // what the view that is shown is waiting for; ends with it

const pause = (ms, signal) => new Promise((go) => {
  const timer = setTimeout(go, ms);
  signal.addEventListener("abort", () => clearTimeout(timer));
});
/** A paragraph that says what there is not. */
const none = (words) => h("p.quiet", {}, words);
const section = (title, ...children) => h("section", {}, h("h3", {}, title), ...children);

// ---------------------------------------------------------------------------------------------
// Overview

async function overview(site) {
  const place = h("div");
  const range = h("select", {}, [7, 30, 90].map((days) =>
    h("option", { value: days, selected: days === 30 }, `${days} days`)));
  const draw = async () => {
    const found = await site.ask("GET", `/activity?days=${range.value}`);
    place.replaceChildren(...activity(site, found, Number(range.value)));
  };
  range.onchange = () => draw().catch((failure) => report(problem, failure));
  const problem = h("p.error", { role: "alert", hidden: true });
  await draw();
  const [{ messagesToday, tokensToday }, budget = {}] = [site.details.usage, site.details.budget];
  return [
    site.details.paused && h("p.notice", {},
      "Paused: visitors read the refusal. You can change that under Settings."),
    section("Today", h("dl.figures", {},
      spent("Messages", messagesToday, budget.messagesPerDay),
      spent("Tokens", tokensToday, budget.tokensPerDay))),
    section("The last days", h("label.inline", {}, "Show ", range), problem, place),
    section("On your website", h("p", {}, "Put this line on every page:"), embedLine()),
  ];
}

function spent(name, used, most) {
  const share = most ? Math.round((used * 100) / most) : 0;
  return h("div", {}, h("dt", {}, name), h("dd", {}, used.toLocaleString(),
    most ? h("small", {}, ` of ${most.toLocaleString()}, ${share} %`) : null,
    most ? h("progress", { max: most, value: used, "aria-label": `${name} of the day's budget` })
      : h("small", {}, " today, no limit")));
}

function activity(site, found, span) {
  const known = new Map(found.days.map((day) => [day.day, day]));
  const nothing = { chats: 0, messages: 0, tokens: 0, tasksDone: 0, tasksFailed: 0, unanswered: 0 };
  const days = Array.from({ length: span }, (_, back) => {
    const day = new Date(Date.now() - (span - 1 - back) * 86_400_000).toISOString().slice(0, 10);
    return { day, ...nothing, ...known.get(day) };
  });
  const sum = (key) => days.reduce((total, day) => total + day[key], 0);
  const figure = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  return [
    chart(days, [["Chats", "chats"], ["Messages", "messages"]]),
    h("dl.figures", {},
      figure("Chats", sum("chats").toLocaleString()),
      figure("Messages", sum("messages").toLocaleString()),
      figure("Tasks done", `${sum("tasksDone")} of ${sum("tasksDone") + sum("tasksFailed")}`),
      figure("Not answered", h("a", { href: site.link("knowledge") }, String(sum("unanswered")))),
      figure("Tokens", sum("tokens").toLocaleString())),
    h("div.columns", {},
      h("div", {}, h("h4", {}, "Asked most"), found.questions.length
        ? h("ol", {}, found.questions.slice(0, 10).map(({ text, count: times }) =>
          h("li", {}, text, h("small", {}, ` ${count(times, "time")}`))))
        : none("Nothing yet.")),
      h("div", {}, h("h4", {}, "Where they ask"), found.pages.length
        ? h("ol", {}, found.pages.slice(0, 10).map(({ url, chats }) =>
          h("li", {}, pageLink(url), h("small", {}, ` ${count(chats, "chat")}`))))
        : none("Nothing yet."))),
  ];
}

function embedLine() {
  const server = settings.publicUrl || location.origin;
  const line = h("input", { type: "text", readonly: "", "aria-label": "The line for your pages" });
  line.value = `<script src="${server}/embed.js" async></script>`;
  const told = h("span", { role: "status" });
  const copy = button("Copy", async () => {
    line.select();
    const copied = await navigator.clipboard?.writeText(line.value).then(() => true, () => false);
    told.textContent = copied ? "Copied." : "Selected: copy it now.";
  });
  return h("div.row.embed", {}, line, copy, told);
}

// ---------------------------------------------------------------------------------------------
// Looks: every field of siteConfig beside the real widget

const CORNERS = ["bottom-right", "bottom-left", "top-right", "top-left"];
const LOOKS = [
  ["The chat", [
    { path: "siteName", label: "Name" },
    { path: "greeting", label: "Greeting", kind: "area", rows: 2,
      hint: "**Words** take the colour." },
    { path: "primaryColor", label: "Colour", kind: "colour", hint: "Any CSS colour." },
    { path: "layout", label: "Layout", kind: "select",
      options: ["floating", "bottom-bar", "side-panel"] },
    { path: "position", label: "Position", kind: "select", options: CORNERS },
    { path: "logoUrl", label: "Logo", hint: "An http(s) address, or one of your site: /logo.png" },
    { path: "quickChips", label: "Questions to begin with", kind: "chips" },
  ]],
  ["The button that opens it", [
    { path: "launcher.shape", label: "Shape", kind: "select",
      options: ["circle", "squircle", "pill"] },
    { path: "launcher.size", label: "Size", kind: "select",
      options: [["sm", "small"], ["md", "medium"], ["lg", "large"]] },
    { path: "launcher.icon", label: "Icon", kind: "select",
      options: ["chat", "sparkle", "question", "lightning", "cursor"] },
    { path: "launcher.position", label: "Its position", kind: "select",
      options: [["", "as the chat's"], ...CORNERS] },
    { path: "launcher.offsetX", label: "Distance from the side", kind: "number",
      hint: "Pixels, 0 to 500." },
    { path: "launcher.offsetY", label: "Distance from top or bottom", kind: "number",
      hint: "Pixels, 0 to 500." },
    { path: "launcher.glow", label: "It glows", kind: "check" },
    { path: "launcher.hidden", label: "Hide it: the page has a button of its own", kind: "check" },
  ]],
  ["A word beside the button", [
    { path: "nudge.enabled", label: "Show it", kind: "check" },
    { path: "nudge.message", label: "What it says" },
    { path: "nudge.style", label: "Its style", kind: "select",
      options: [["", "as usual"], "bubble", "card", "minimal"] },
    { path: "nudge.delay", label: "After milliseconds", kind: "number" },
    { path: "nudge.dismissable", label: "It can be dismissed", kind: "check" },
  ]],
  ["Letters and languages", [
    { path: "typography.headingFont", label: "Font of headings" },
    { path: "typography.bodyFont", label: "Font of texts" },
    { path: "typography.headingWeight", label: "Weight of headings", kind: "number" },
    { path: "typography.buttonRadius", label: "Roundness of buttons", kind: "number",
      hint: "Pixels, or such as 50%." },
    { path: "language", label: "Language", hint: "A tag such as de, or auto: the page's." },
    { path: "words", label: "Words of your own", kind: "pairs",
      hint: "One a line, key: text. Such as placeholder: Ask us anything" },
  ]],
];

const SCREENS = { computer: [1080, 760], phone: [390, 720] }; // pixels of the page in the preview

async function looks(site) {
  const frame = h("iframe", { title: "Preview of the chat" });
  const box = h("div.screen", {}, frame);
  const opened = h("input", { type: "checkbox", checked: true });
  const screen = h("select", { "aria-label": "Screen" },
    Object.keys(SCREENS).map((name) => h("option", {}, name)));
  if (innerWidth < 480) screen.value = "phone";
  /** The frame is as large as the screen, and drawn smaller if there is less room. */
  const fit = () => {
    const [width, height] = SCREENS[screen.value];
    const scale = Math.min(1, box.clientWidth / width);
    Object.assign(frame.style,
      { width: `${width}px`, height: `${height}px`, transform: `scale(${scale})` });
    box.style.height = `${height * scale}px`;
  };
  const room = new ResizeObserver(fit);
  room.observe(box);
  site.signal.addEventListener("abort", () => room.disconnect());
  const show = (config) => {
    const said = JSON.stringify({ config, open: opened.checked });
    const url = `/owner/preview.html#${encodeURIComponent(said)}`;
    if (frame.contentWindow) frame.contentWindow.location.replace(url);
    else frame.src = url;
  };
  let timer = 0;
  const soon = (config) => {
    clearTimeout(timer);
    timer = setTimeout(show, 300, config);
  };
  const fields = form(LOOKS, site.details.config, {
    submit: "Save", onchange: soon, done: "Saved. Your website shows it from now on.",
    more: h("small", {}, "Empty a field to use what config.toml says."),
    async save(patch) {
      site.details = await site.ask("PATCH", "/config", patch);
      show(site.details.config);
      return site.details.config;
    },
  });
  opened.onchange = () => show(fields.read());
  screen.onchange = fit;
  show(site.details.config);
  return [h("div.beside", {}, fields, h("div.stage", {},
    h("div.row", {}, screen, h("label.check", {}, opened, "The chat is open")), box))];
}

// ---------------------------------------------------------------------------------------------
// Knowledge: questions without an answer, snippets, and the pages that were read

const SNIPPET = [
  { path: "question", label: "Question", hint: "It may be left out." },
  { path: "text", label: "Answer", kind: "area" },
];
const keyOf = ({ question = "", text }) => JSON.stringify([question, text]);

async function knowledge(site) {
  const [{ unanswered }, crawl, pages] = await Promise.all([site.ask("GET", "/activity?days=90"),
    site.ask("GET", "/crawl"), site.ask("GET", "/pages?limit=50")]);
  const [snippets, open] = [h("div", { tabindex: -1 }), h("div", { tabindex: -1 })];
  /** Change the list as it is now, which may be another than when it was shown. */
  const change = async (make) => {
    const { snippets: list = [] } = await site.ask("GET");
    site.details = await site.ask("PATCH", "", { snippets: make(list) })
      .catch((failure) => { throw atText(failure); });
    drawSnippets();
    drawOpen();
  };
  let drawn = new Map(); // snippets that did not change stay as they are, with what was written
  const drawSnippets = () => {
    drawn = new Map((site.details.snippets ?? []).map((one) =>
      [keyOf(one), drawn.get(keyOf(one)) ?? snippetDetails(one, change)]));
    redraw(snippets, ...drawn.values());
  };
  let forms = new Map();
  const drawOpen = () => {
    const answered = new Set((site.details.snippets ?? []).map(({ question }) => question));
    forms = new Map(unanswered.filter(({ text }) => !answered.has(text)).map((one) =>
      [one.text, forms.get(one.text) ?? unansweredForm(one, change)]));
    redraw(open, ...(forms.size ? forms.values()
      : [none("Every question of the last 90 days has found an answer.")]));
  };
  drawSnippets();
  drawOpen();
  const fresh = form(SNIPPET, {}, {
    submit: "Add", done: "Added.",
    async save(_, snippet) {
      await change((list) => [...list, snippet]);
      return {};
    },
  });
  return [
    section("Questions without an answer", open),
    section("Snippets", h("p", {}, "Short texts of yours. They come before everything else."),
      snippets, h("details", {}, h("summary", {}, "Add a snippet"), fresh)),
    section("Pages of your website", ...crawlPart(site, crawl, pages)),
  ];
}

/** An error of the list of snippets is one of the text that was just written. */
function atText(failure) {
  const said = failure.errors?.snippets?.replace(/^item \d+ /, "");
  return said ? new Failure(failure.message, { text: said }, failure.status) : failure;
}

function snippetDetails(snippet, change) {
  const key = keyOf(snippet);
  const fields = form(SNIPPET, snippet, {
    submit: "Save",
    save: (_, values) => change((list) => list.map((one) => (keyOf(one) === key ? values : one))),
    more: worker("Delete", () => change((list) => list.filter((one) => keyOf(one) !== key))),
  });
  return h("details.snippet", {}, h("summary", {}, snippet.question || snippet.text.slice(0, 80)),
    fields);
}

function unansweredForm({ text, askedAt }, change) {
  const label = `Answer to “${text.slice(0, 300)}”`;
  const answer = form([{ path: "text", label, kind: "area", rows: 2 }], {}, {
    submit: "Answer it", done: "",
    save: (_, { text: words = "" }) => change((list) => [...list, { question: text, text: words }]),
  });
  return h("article.asked", {}, h("p", {}, h("small", {}, "Asked ", time(askedAt))), answer);
}

function crawlPart(site, state, pages) {
  const { details } = site;
  const told = h("p", { role: "status" });
  const bar = h("progress", { "aria-label": "Pages read" });
  const errors = h("div");
  const list = h("div");
  const problem = h("p.error", { role: "alert", hidden: true });
  const where = form([
    { path: "crawl", label: "Address", keepEmpty: true,
      hint: "Such as https://acme.com/; empty: none." },
    { path: "crawlPages", label: "Pages at most", kind: "number" },
    { path: "crawlHours", label: "Hours between two readings", kind: "number",
      hint: "0: only when you say so." },
  ], details, { submit: "Save", save: site.save });
  const begin = () => site.ask("POST", "/crawl").then(follow);
  const start = worker("Read it now", begin, "plain", where);
  const stop = worker("Stop", () => site.ask("DELETE", "/crawl").then(follow));
  const draw = (now) => {
    const got = now.fetched + now.failed;
    const facts = `${count(now.fetched, "page")} read, ${now.unchanged} of them unchanged,`
      + ` ${now.failed} failed`;
    told.textContent = now.running ? `Reading: ${got} of ${now.discovered}`
      : now.finishedAt ? `Last read ${new Date(now.finishedAt).toLocaleString()}: ${facts}.`
        : "Not read yet.";
    Object.assign(bar, { hidden: !now.running, max: now.discovered || 1, value: got });
    [start.hidden, stop.hidden] = [now.running, !now.running];
    errors.replaceChildren(...(now.errors?.length ? [table("What could not be read",
      ["Page", "Reason"], now.errors.map(({ url, reason }) => [pageLink(url), reason]))] : []));
  };
  /** Show how it goes until it ends, and then what was found. */
  const follow = async () => {
    for (;;) {
      const now = await site.ask("GET", "/crawl");
      draw(now);
      if (!now.running) break;
      await pause(700, site.signal);
    }
    drawPages(await site.ask("GET", "/pages?limit=50"));
  };
  let shown = [];
  const drawPages = (found, before = []) => {
    shown = [...before, ...found.pages];
    const rest = found.total - shown.length;
    list.replaceChildren(...(shown.length ? [
      table(count(found.total, "page"), ["Page", "Characters", "Read", "State"], shown.map((page) =>
        [pageLink(page.url, page.title), page.chars.toLocaleString(), time(page.fetchedAt),
          String(page.status)])),
      rest > 0 ? worker(`${rest.toLocaleString()} more`, async () =>
        drawPages(await site.ask("GET", `/pages?limit=200&offset=${shown.length}`), shown)) : "",
    ] : []));
  };
  draw(state);
  drawPages(pages);
  if (state.running) follow().catch((failure) => report(problem, failure));
  return [where, told, bar, h("div.row", {}, start, stop), problem, errors, list];
}

// ---------------------------------------------------------------------------------------------
// Conversations

const ROLES = { user: "Visitor", assistant: "Agent", action: "Action" };

async function conversations(site) {
  const list = h("ul.rows");
  const more = h("div");
  const problem = h("p.error", { role: "alert", id: "search-problem", hidden: true });
  const word = h("input", { type: "search", "aria-label": "Search in what was said",
    "aria-describedby": problem.id });
  const told = h("p.quiet", { role: "status" });
  const limit = 50;
  let [last, wanted] = ["", ""];
  const load = async (before) => {
    const wish = new URLSearchParams({ limit });
    if (before) wish.set("before", before);
    if (wanted) wish.set("q", wanted);
    const { sessions } = await site.ask("GET", `/sessions?${wish}`);
    if (!before) list.replaceChildren();
    list.append(...sessions.map((chat) => chatRow(site, chat)));
    last = sessions.at(-1)?.createdAt;
    more.replaceChildren(...(sessions.length === limit
      ? [worker("Older ones", () => load(last))] : []));
    told.textContent = list.children.length ? "" : "No conversations here.";
  };
  const search = h("form.row", {
    role: "search",
    onsubmit(event) {
      event.preventDefault();
      report(problem, null);
      wanted = word.value.trim();
      load().catch((failure) => report(problem, failure));
    },
  }, word, h("button.plain", { type: "submit" }, "Search"));
  await load();
  return [search, problem, told, list, more];
}

function chatRow(site, chat) {
  const open = h("button.line", {
    type: "button",
    onclick: () => read(site, chat, () => vanish(row))
      .catch((failure) => report(problem, failure)),
  }, time(chat.createdAt), h("span", {}, count(chat.messageCount, "message")),
  h("span.page", {}, chat.pageUrl), chat.live ? h("b.badge", {}, "now") : null);
  const problem = h("span.error", { role: "alert", hidden: true });
  const row = h("li", {}, open, problem);
  return row;
}

async function read(site, { sessionId }, gone) {
  const path = `/sessions/${encodeURIComponent(sessionId)}`;
  const chat = await site.ask("GET", path);
  const dialog = h("dialog.chat", { "aria-labelledby": "chat-title" },
    h("h2", { id: "chat-title" }, "Chat of ", time(chat.createdAt)),
    chat.pageUrl ? h("p", {}, "On ", pageLink(chat.pageUrl)) : null,
    h("p", {}, h("small", {}, `Its id: ${sessionId}`)),
    h("ol", { tabindex: 0, "aria-label": "What was said" }, chat.history.map(({ role, content }) =>
      h(`li.${role}`, {}, h("b", {}, ROLES[role] ?? role), h("span", {}, content)))),
    h("div.row", {}, button("Close", () => dialog.close()), worker("Erase", async () => {
      if (!await sure("Erase this chat for good?", "Erase it")) return;
      await site.ask("DELETE", path);
      dialog.close();
      gone();
    }, "danger")));
  dialog.onclose = () => dialog.remove();
  document.body.append(dialog);
  dialog.showModal();
}

// ---------------------------------------------------------------------------------------------
// Messages to the owner

async function messages(site) {
  const { messages: found } = await site.ask("GET", "/messages");
  const list = h("ul.cards");
  const empty = none("Nobody has left a message.");
  const draw = () => { empty.hidden = list.children.length > 0; };
  list.append(...found.map((one) => {
    const address = `mailto:${encodeURIComponent(one.email).replace("%40", "@")}`;
    const card = h("li", {},
      h("p", {}, h("b", {}, one.name || "No name"), " ",
        one.email ? h("a", { href: address }, one.email) : null),
      h("p.said", {}, one.message),
      h("p", {}, h("small", {}, time(one.createdAt), one.pageUrl ? " on " : "",
        one.pageUrl ? pageLink(one.pageUrl) : "",
        site.details.notifyUrl ? (one.delivered ? ", delivered" : ", not delivered yet") : "")),
      worker("Delete", async () => {
        if (!await sure("Delete this message?", "Delete it")) return;
        await site.ask("DELETE", `/messages/${encodeURIComponent(one.id)}`);
        vanish(card);
        draw();
      }));
    return card;
  }));
  draw();
  return [empty, list];
}

// ---------------------------------------------------------------------------------------------
// Settings

const SETTINGS = [
  { path: "name", label: "Name", hint: "As the agent calls your website." },
  { path: "allowedHosts", label: "Hosts", kind: "lines",
    hint: "One a line. acme.com covers its subdomains." },
  { path: "owners", label: "Owners", kind: "lines",
    hint: "E-mail addresses (confirmed ones) or user ids, one a line. Admins change them." },
  { path: "instructions", label: "Instructions for the agent", kind: "area", rows: 8,
    keepEmpty: true },
  { path: "restrictions", label: "It may not", kind: "checks", options: [
    ["navigate", "leave the page"], ["type", "fill in fields"], ["submit", "send forms"]] },
  { path: "refusal", label: "Refusal", kind: "area", rows: 2,
    hint: "What visitors read when the day's budget is spent, or the chat is paused." },
  { path: "paused", label: "Paused: visitors get the refusal", kind: "check" },
  { path: "notifyUrl", label: "Address for messages", keepEmpty: true,
    hint: "A web address that gets a POST for each, such as one of Slack. Empty: none." },
];

async function configuration(site) {
  const specs = SETTINGS.map((spec) =>
    (spec.path === "owners" && !isAdmin ? { ...spec, readOnly: true } : spec));
  const told = h("span", { role: "status" });
  const fields = form(specs, site.details, { submit: "Save", save: site.save });
  const test = worker("Test the address", async () => {
    told.textContent = "";
    const { delivered, reason } = await site.ask("POST", "/messages/test");
    told.textContent = delivered ? "It has arrived." : `It did not arrive: ${reason}`;
  }, "plain", fields);
  return [
    fields,
    section("Messages of visitors",
      h("p", {}, "A test goes to the saved address, as a message would."),
      h("div.row", {}, test, told)),
    isAdmin && section("Delete the site", h("p", {}, "With its chats and everything set here."),
      worker("Delete this site", async () => {
        if (!await sure(`Delete ${site.details.name} for good?`, "Delete it")) return;
        await site.ask("DELETE");
        sites.delete(site.id);
        location.hash = "#/";
      }, "danger")),
  ];
}

// ---------------------------------------------------------------------------------------------
// The frame: sign-in, the list of sites, and an open one with its tabs

const TABS = {
  overview: ["Overview", overview],
  looks: ["Looks", looks],
  knowledge: ["Knowledge", knowledge],
  conversations: ["Conversations", conversations],
  messages: ["Messages", messages],
  settings: ["Settings", configuration],
};

function showSignIn(why = "") {
  const fields = form([
    { path: "email", label: "E-mail address", type: "email", autocomplete: "username" },
    { path: "password", label: "Password", kind: "password" },
  ], {}, {
    submit: "Sign in", done: "",
    async save(_, { email = "", password }) {
      await signIn(email, password);
      await enter();
    },
    more: worker("I forgot my password", async () => {
      const { email = "" } = fields.read();
      if (!email) throw new Failure("Enter your e-mail address first.");
      await forgotten(email);
      told.textContent = `An e-mail to ${email} says how to set a new one.`;
    }),
  });
  const told = h("p", { role: "status" }, why);
  main.replaceChildren(h("div.narrow", {}, h("h1", {}, "Sign in"), told, fields));
  fields.querySelector("input").focus();
}

async function findSites(signal) {
  const host = new URLSearchParams(location.search).get("host") ?? undefined;
  const found = [await api("GET", "", { signal })];
  if (host) found.push(await api("GET", "", { host, signal })); // in another process, perhaps
  for (const site of found.flatMap((list) => list.sites)) sites.set(site.id, site);
  // Only admins may make sites: an empty wish lacks something to them, and is forbidden to others.
  isAdmin = await api("POST", "", { body: {}, signal }).catch(({ status }) => status === 400);
}

async function showSites() {
  const make = isAdmin && h("section", {}, h("h2", {}, "A new site"), form([
    { path: "name", label: "Name" },
    { path: "host", label: "Host", hint: "Such as acme.com; www.acme.com comes with it." },
  ], {}, {
    submit: "Make it", done: "",
    async save(_, { name = "", host = "" }) {
      const made = await api("POST", "", { host, body: { name, host } });
      sites.set(made.id, made);
      location.hash = `#/${made.id}/settings`;
    },
  }));
  const list = [...sites.values()].map(({ id, name, allowedHosts }) => h("li", {},
    h("a", { href: `#/${id}/overview` }, name),
    h("small", {}, ` ${allowedHosts.join(", ")}`)));
  return [h("h1", {}, "Your sites"), list.length ? h("ul.cards", {}, list) : noSite(), make];
}

function noSite() {
  const { email, email_verified: isProven, user_id: id } = me();
  const told = h("span", { role: "status" });
  const send = worker("Send me an e-mail", async () => {
    await prove();
    told.textContent = "Sent. Open the link in it, and then: ";
  });
  const again = worker("I have opened it", async () => {
    await renew();
    await enter();
  });
  return h("div", {},
    h("p", {}, "This account owns no site here. Its user id is ", h("b", {}, id),
      email ? [", its address ", h("b", {}, email)] : null, "."),
    isProven || !email ? null
      : h("p", {}, "The address is not confirmed yet: ", send, " ", told, again));
}

/** A site and how to ask for it: ask(method, path under it, body). */
async function openSite(id, signal) {
  const host = sites.get(id)?.allowedHosts[0]?.replace(/:\d+$/, "");
  const name = encodeURIComponent(id);
  const site = {
    id, signal,
    ask: (method, path = "", body = undefined) =>
      api(method, `/${name}${path}`, { host, body, signal }),
    link: (tab) => `#/${name}/${tab}`,
    async save(patch) {
      site.details = await site.ask("PATCH", "", patch);
      sites.set(id, site.details);
      return site.details;
    },
  };
  site.details = await site.ask("GET");
  return site;
}

function tabLinks(site, tab) {
  const links = Object.entries(TABS).map(([key, [name]]) => h("li", {},
    h("a", { href: site.link(key), "aria-current": key === tab ? "page" : null }, name)));
  return h("nav", { "aria-label": "Of this site" }, h("ul", {}, links));
}

/** What went wrong in the place of what was asked for. */
function failed(failure) {
  const problem = h("p.error", { role: "alert" });
  report(problem, failure);
  const back = h("a", { href: "#/" }, "Your sites");
  return [problem, h("div.row", {}, button("Try again", route), back)];
}

async function showSite(id, tab, signal) {
  const [name, view] = TABS[tab] ?? TABS.overview;
  const site = await openSite(id, signal);
  const body = await view(site).catch(failed);
  document.title = `${name} – ${site.details.name} – leflux`;
  return [h("h1", {}, site.details.name), tabLinks(site, tab), h("h2", {}, name), ...body];
}

/** Show what the address names. The focus stays on the link that was followed. */
async function route() {
  visit.abort();
  visit = new AbortController();
  const { signal } = visit;
  if (!isIn) return;
  const [, id, tab = "overview"] = location.hash.split("/");
  const followed = document.activeElement?.getAttribute("href");
  main.setAttribute("aria-busy", "true");
  document.title = "leflux";
  const nodes = await (id ? showSite(id, tab, signal) : showSites())
    .catch((failure) => [h("h1", {}, "leflux"), ...failed(failure)]);
  if (signal.aborted) return;
  main.removeAttribute("aria-busy");
  main.replaceChildren(...nodes.filter(Boolean));
  const again = followed && main.querySelector(`a[href="${CSS.escape(followed)}"]`);
  (again || main).focus({ preventScroll: true });
  if (!again) scrollTo(0, 0);
}

async function enter() {
  await findSites();
  isIn = true;
  who.textContent = me().email ?? "";
  out.hidden = false;
  const [only] = sites.keys();
  const goesOn = sites.size === 1 && !isAdmin && location.hash.length < 3;
  if (goesOn) location.hash = `#/${only}/overview`;
  else await route();
}

const isUnsaved = () => [...main.querySelectorAll("form")].some((one) => one.isChanged?.());

/** A link away from what is not saved yet asks first. */
async function leave(event) {
  const link = event.target.closest("a[href^='#']");
  if (!link || !isIn || !isUnsaved()) return;
  event.preventDefault();
  if (await sure("Leave without saving?", "Leave")) location.hash = link.getAttribute("href");
}

async function start() {
  document.addEventListener("click", leave);
  addEventListener("beforeunload", (event) => { if (isIn && isUnsaved()) event.preventDefault(); });
  out.onclick = () => signOut("You are signed out.");
  addEventListener("hashchange", route);
  const left = (why) => {
    visit.abort();
    isIn = false;
    sites.clear();
    who.textContent = "";
    out.hidden = true;
    for (const dialog of document.querySelectorAll("dialog")) dialog.close();
    showSignIn(why);
  };
  if (await begin(left)) await enter().catch((failure) => showSignIn(failure.message));
  else showSignIn();
}

start();
