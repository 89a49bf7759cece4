/* leflux widget: one line puts an AI agent on a page,
 *
 *     <script src="https://chat.example.com/embed.js" async></script>
 *
 * and all else comes from that server. For the page's author there are window.LeFlux and its events,
 * custom properties (--leflux-primary, …), and attributes of the tag: data-consent (nothing before
 * LeFlux.allow()), data-preview (no server; a siteConfig), data-no-user-memory,
 * data-no-spa-detect, data-debug. Nothing needs inline styles or scripts; texts are text nodes.
 */
(() => {
  "use strict";
  const script = document.currentScript || document.querySelector('script[src*="/embed.js"]');
  const before = window.LeFlux;
  if (!script || (before && !before.isDestroyed)) return;
  const SERVER = new URL(script.src).origin;
  const has = (name) => script.hasAttribute(`data-${name}`);
  const DEBUG = has("debug"), PREVIEW = has("preview");
  const WORDS = { // English; other languages come from the server: see speak
    title: "Chat", log: "Conversation", input: "Your message", placeholder: "Write a message…",
    open: "Open the chat", unread: "Open the chat, new message", close: "Close the chat",
    clear: "Start over", send: "Send", stop: "Stop", retry: "Try again", dismiss: "Dismiss",
    link: "Have a look", working: "The assistant is working",
    reconnecting: "Reconnecting…",
    taken: "This chat is open in another tab.", takeBack: "Use it here",
    lost: "The answer got lost. Please ask again.",
    tooLong: "That is too long for one message.",
    expired: "The earlier chat has ended; what follows starts afresh.",
    unreachable: "The server cannot be reached just now.",
    failed: "That did not work.",
    newTab: "This opens a new tab:",
    preview: "This is a preview. Nothing is sent.",
  };
  const limits = { elements: 50, text: 5000, message: 5000 };
  const KEEP_MS = 24 * 3600 * 1000;
  const PHONE = matchMedia("(max-width: 640px), (max-height: 420px)");
  const TOUCH = matchMedia("(pointer: coarse)");
  const debug = (...what) => { if (DEBUG) console.debug("leflux:", ...what); };
  const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));
  /** What can be said of something, or else null. */
  const attempt = (say) => (one) => { try { return say(one); } catch { return null; } };
  async function until(isTrue, tries) {
    while (!isTrue() && tries-- > 0) await pause(50);
    return isTrue();
  }
  const squeeze = (text, max) => (/[^\s\p{C}]/u.test(text || "") // names such as U+200B are none
    ? text.replace(/\s+/g, " ").trim().slice(0, max) : "");
  const over = new AbortController(); // aborted by destroy(): every listener hangs on it
  const isDead = () => over.signal.aborted;
  const listen = (target, name, heard, capture = false) =>
    target.addEventListener(name, heard, { signal: over.signal, capture });
  /** Make an element, "name.class": attributes, on… handlers, then children. */
  function h(name, attributes = {}, ...children) {
    const [tag, ...classes] = name.split(".");
    const space = tag === "svg" || tag === "path" ? "2000/svg" : "1999/xhtml";
    const element = document.createElementNS(`http://www.w3.org/${space}`, tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on") || key === "hidden") element[key] = value;
      else if (value !== null) element.setAttribute(key, value);
    }
    if (classes.length) element.className = classes.join(" ");
    element.append(...children.filter(Boolean));
    return element;
  }

  // Small JSON stores: in memory until the visitor opens the chat or writes.
  let mayStore = false;
  const stores = [];
  function keep(area, name, key = `leflux ${SERVER} ${name}`) {
    let memory;
    const store = {
      get: attempt(() => memory ?? JSON.parse(window[area].getItem(key))),
      set(value) {
        memory = value;
        if (mayStore || value === null) store.save();
      },
      save() {
        try {
          if (memory === null) window[area].removeItem(key);
          else if (memory !== undefined) window[area].setItem(key, JSON.stringify(memory));
          memory = undefined;
        } catch { /* forbidden: it stays in memory */ }
      },
    };
    stores.push(store);
    return store;
  }
  function storeFromNow() {
    mayStore = true;
    for (const store of stores) store.save();
  }
  const keptSession = keep("localStorage", "session"); // {id, wsUrl, at}
  const keptUser = keep("localStorage", "", "leflux:userData");
  const keptNudge = keep("sessionStorage", "nudge"), keptOpen = keep("sessionStorage", "open");
  const keptActing = keep("sessionStorage", "acting"); // {id, results, typing}: see carryOut
  const keptNumber = keep("sessionStorage", "number");
  const keptAnswers = keep("sessionStorage", "answers"); // [{text, label}] to confirmations

  // ---------------------------------------------------------------------------------------------
  // Colours, as parts from 0 to 1: any may be the site's; text on and of it stays readable.

  const WHITE = [1, 1, 1], BLACK = [0, 0, 0];
  const css = (colour) => `rgb(${colour.map((part) => part * 255).join(" ")})`;
  const mix = (one, other, share) => one.map((part, i) => part + (other[i] - part) * share);
  const inSrgb = (colour) => `color-mix(in srgb, ${colour}, ${colour})`;
  function rgb(colour) {
    const probe = view.root.appendChild(h("span"));
    probe.style.color = inSrgb(colour);
    const { color } = getComputedStyle(probe);
    probe.remove();
    const scale = color.startsWith("rgb") ? 255 : 1;
    const parts = color.match(/none|[\d.e-]+/g).map((part) => Number(part) || 0);
    const inside = parts.slice(0, 3).map((part) => Math.min(1, Math.max(0, part / scale)));
    return mix(WHITE, inside, parts[3] ?? 1);
  }
  function contrast(one, other) {
    const [low, high] = [one, other].map((colour) => colour
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
      .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0.05))
      .sort((a, b) => a - b);
    return high / low;
  }
  function readable(colour, goal, ...grounds) {
    let share = 0, mixed = colour;
    while (share < 1 && grounds.some((ground) => contrast(mixed, ground) < 4.6)) {
      mixed = mix(colour, goal, share += 0.05);
    }
    return mixed;
  }

  // ---------------------------------------------------------------------------------------------
  // Markdown: paragraphs, lists, bold, italic, code and links. Text in, nodes out, no HTML ever.
  // Patterns are bounded, so that no text is slow.

  const INLINE = new RegExp([
    /`([^`\n]{1,1000})`/, // 1 code
    /\*\*([^\n]{1,1000}?)\*\*/, // 2 bold
    /(?<![\w*])[*_](?![\s*_])([^*_\n]{1,1000}?)(?<!\s)[*_](?!\w)/, // 3 italic
    /\[([^[\]\n]{1,300})\]\(([^()\s]{1,1000}(?:\([^()\s]{0,200}\))?[^()\s]{0,200})\)/, // 4, 5 link
    /(?<!\w)(https?:\/\/[^\s<>"'`]{1,1000}[^\s<>"'`.,;:!?)\]])/, // 6 bare address
  ].map((pattern) => pattern.source).join("|"), "u");
  const safeUrl = attempt((value) => {
    const { protocol, href } = new URL(value, location.href);
    return /^(https?|mailto|tel):/.test(protocol) ? href : null;
  });
  function link(href, ...children) {
    const url = safeUrl(href);
    if (!url) return h("span", {}, ...children);
    const target = url.startsWith(location.origin + "/") ? null : "_blank";
    return h("a", { href: url, rel: "noopener nofollow", target }, ...children);
  }
  function inline(text) {
    const nodes = [];
    for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
      const [, code, bold, italic, label, address, bare] = found;
      nodes.push(text.slice(0, found.index));
      if (code) nodes.push(h("code", {}, code));
      else if (bold) nodes.push(h("strong", {}, ...inline(bold)));
      else if (italic) nodes.push(h("em", {}, ...inline(italic)));
      else if (label) nodes.push(link(address, label));
      else nodes.push(link(bare, bare));
    }
    return [...nodes, text];
  }
  function markdown(text) {
    const blocks = [];
    let block = null;
    const begin = (kind, attributes, ...children) => {
      block = h(kind, attributes, ...children);
      blocks.push(block);
    };
    for (const line of text.split("\n")) {
      const item = /^\s{0,8}(?:[-*•]|(\d{1,3})[.)])\s+(.*)/.exec(line);
      if (/^\s*```/.test(line)) {
        if (block?.localName === "pre") block = null;
        else begin("pre", { tabindex: 0 }, h("code"));
      } else if (block?.localName === "pre") {
        block.firstChild.append(`${line}\n`);
      } else if (item) {
        const [, start, words] = item;
        const kind = start ? "ol" : "ul";
        if (block?.localName !== kind) begin(kind, { start: start > 1 ? start : null, dir: "auto" });
        block.append(h("li", {}, ...inline(words)));
      } else if (line.trim()) {
        const heading = /^#{1,6}\s+(.*)/.exec(line);
        if (block?.localName === "p") block.append("\n");
        else begin("p", { dir: "auto" });
        block.append(...(heading ? [h("strong", {}, ...inline(heading[1]))] : inline(line)));
      } else if (block?.localName === "p") {
        block = null;
      }
    }
    return blocks;
  }

  // ---------------------------------------------------------------------------------------------
  // What the page shows: its elements that can be used, numbered, and its text. A number is never
  // given twice in a tab, so that a plan made on an older picture never means another element.

  const ROLES = "button link checkbox radio switch tab menuitem menuitemcheckbox menuitemradio"
    + " option combobox listbox textbox searchbox slider spinbutton treeitem";
  const EDITABLE = '[contenteditable=""], [contenteditable=true], [contenteditable=plaintext-only]';
  const INTERACTIVE = "a, area[href], button, input:not([type=hidden]), select, textarea, summary,"
    + ` ${EDITABLE}, [onclick], [data-action], th[aria-sort],`
    + ROLES.split(" ").map((role) => `[role=${role}]`).join();
  const VALUED = `${EDITABLE}, [role=combobox], [role=listbox], [role=textbox], [role=searchbox],
    [role=slider], [role=spinbutton]`;
  const MODAL = "dialog[open], [role=dialog], [role=alertdialog], [aria-modal=true]";
  const GROUP = `${MODAL}, form, fieldset, section, article, nav, aside, header, footer, main, li,
    td, details`;
  const ASIDE = ["id", "class", "aria-label"].flatMap((name) =>
    ["cookie", "consent", "gdpr", "share", "social"].map((word) => `[${name}*=${word} i]`)).join();
  // What the server takes for a secret, and never fills (SENSITIVE there).
  const SECRET = new RegExp(String.raw`\bpass\s?(w|code|phrase)
    |\b(pass|pwd?|psw|pin|cc|bic|ssn|tin|dni|nino|cpf|iban|swift|cv[vcn]|csc|t?otp|[2mt]\s?fa)\b
    |kennwort|contraseñ|mot\sde\spasse|\bsenha\b|wachtwoord|has(ł|l)o\b|şifre|parola|密码|暗証|パスワード
    |पासवर्ड|كلمة\s(المرور|السر)|\bone\s?time|two\sfactor
    |(digit|verification|security|sms|auth\w*|tfa)\scode|digo\sde\s(seguridad|verif)
    |code\sde\ss[eé]curit|(credit|debit)\s?card|\bcard\s?(n(um|o\b)|holder|code)|\|\scard(\s\||$)
    |^card$|expir(y|ation)|\bmm\s?yy|karten\s?nummer|kreditkarte|tarjeta|ro\sde\scarte|sort\scode
    |rout(ing|e)\snumber|\bbank|account\s?n(um|o\b)|\bkonto|social\s?security|passport|ausweis
    |national\s?(id|insurance)|\btax\s?(id|n|payer)|\b(identity|id)\s?(card|n(um|o\b))|aadhaar
    |driver\w*\slicen[cs]e`.replace(/\n\s*/g, ""));
  const numbers = new WeakMap(); // element -> its number
  const elements = new Map(); // number -> a weak reference to the element
  let lastNumber = 0, pictured = null;

  // Fields of a form hide its properties of the same name: <input name="parentElement">.
  const parentOf = Object.getOwnPropertyDescriptor(Node.prototype, "parentElement").get;
  const said = (element, name) => Element.prototype.getAttribute.call(element, name);
  const frameOf = ({ ownerDocument: its }) =>
    (its === document ? null : its.defaultView?.frameElement);
  const insideOf = attempt((frame) => frame.localName === "iframe" && frame.contentDocument?.body);
  function around(element, selector) { // closest(), out of shadow roots and frames too
    let found = null;
    for (let at = element; at && !found; at = at.getRootNode().host || frameOf(at)) {
      found = at.closest(selector);
    }
    return found;
  }
  function boxOf(element) {
    let { left, top, width, height } = element.getBoundingClientRect();
    for (let at = element; (at = frameOf(at));) {
      const frame = at.getBoundingClientRect();
      left += frame.left + at.clientLeft;
      top += frame.top + at.clientTop;
    }
    return { left, top, width, height };
  }
  const isVisible = (element, opacityProperty = true) =>
    [...element.getClientRects()].some((box) => box.width > 1 && box.height > 1)
    && (element.checkVisibility?.({ opacityProperty, visibilityProperty: true }) ?? true);
  const isCheckable = (element) => /^(checkbox|radio)$/.test(element.type);
  const isUsable = (element) => !around(element, "[inert], [aria-hidden=true]")
    && (isVisible(element, !isCheckable(element)) // what is drawn lies under a clear one
      || element.localName === "area" || [...(element.labels || [])].some((one) => isVisible(one)));
  function distanceOf(element) {
    const { left, top, width, height } = boxOf(element);
    return Math.max(0, 1 - top - height, top + 1 - innerHeight, 1 - left - width,
      left + 1 - innerWidth);
  }
  const isField = (element) => element.matches("input, select, textarea");
  const isDisabled = (element) =>
    element.matches(":disabled") || around(element, "[aria-disabled=true]") !== null;
  const isSubmit = ({ type, form }) => Boolean(form) && /^(submit|image)$/.test(type);
  function* everything(root) { // open shadow roots of the page and frames of its origin included
    for (const element of root.querySelectorAll("*")) {
      if (element === view.host) continue;
      yield element;
      if (element.shadowRoot) yield* everything(element.shadowRoot);
      const inside = element.localName === "iframe" && isVisible(element) && insideOf(element);
      if (inside) yield* everything(inside);
    }
  }
  function isInteractive(element) {
    if (element.matches("html, body, label, option")) return false;
    if (element.localName === "iframe") return !insideOf(element) && element.offsetWidth > 50;
    if (element.matches(INTERACTIVE)) return true;
    const cursorOf = (one) => one.ownerDocument.defaultView.getComputedStyle(one).cursor;
    const isPointed = () => cursorOf(element) === "pointer" && cursorOf(parentOf.call(element))
      !== "pointer" && !around(element, `${INTERACTIVE}, label`);
    return (element.matches('[role=gridcell], [tabindex]:not([tabindex^="-"])') || isPointed())
      && !element.querySelector(INTERACTIVE);
  }
  function byIds(element, attribute) {
    const ids = (element.getAttribute(attribute) || "").split(/\s+/).filter(Boolean);
    return ids.map((id) => element.getRootNode().getElementById?.(id)?.textContent).join(" ");
  }
  const textOf = (element) => squeeze(element.innerText ?? element.textContent, 120);
  function labelOf(element) {
    if (element.localName === "input" && /^(submit|button|reset|image)$/.test(element.type)) {
      return squeeze(element.value || element.alt || element.type, 120);
    }
    const labels = [...(element.labels || [])].map((label) => label.cloneNode(true));
    for (const label of labels) {
      for (const one of label.querySelectorAll("select, textarea, [aria-hidden=true]")) one.remove();
    }
    const inside = (selector) => element.querySelector(selector);
    const names = [byIds(element, "aria-labelledby"), element.ariaLabel,
      labels.map((label) => label.textContent).join(" "),
      ...(isField(element) || element.matches(VALUED) ? [] : [textOf(element), inside("[alt]")?.alt,
        inside("[aria-label]")?.ariaLabel, inside("svg title")?.textContent]),
      element.title || element.alt];
    return squeeze(names.find((name) => squeeze(name)), 120);
  }
  const headingIn = (group) => squeeze(group.querySelector(
    ":is(h1, h2, h3, h4, h5, h6, legend):not([aria-hidden=true] *)")?.textContent, 80) || undefined;
  function headingOf(element) {
    for (let group = element; (group = parentOf.call(group)?.closest(GROUP));) {
      const name = squeeze(group.getAttribute("aria-label") || byIds(group, "aria-labelledby")
        || headingIn(group), 80);
      if (name) return name;
    }
    return undefined;
  }
  function rowOf(element) {
    const cells = [...(around(element, "tr, [role=row], li")?.children || [])];
    return squeeze(cells.filter((cell) => !cell.matches(INTERACTIVE)
      && !cell.querySelector(INTERACTIVE)).map(textOf).join(" "), 60);
  }
  function isSecret(element) {
    const words = [element.type, element.autocomplete, element.name, element.id,
      element.placeholder, element.ariaLabel, byIds(element, "aria-describedby"),
      labelOf(element)].filter(Boolean).join(" | ");
    return SECRET.test(words.normalize("NFKC").replace(/\p{Cf}/gu, "")
      .replace(/(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-zA-Z])(?=[0-9])/g, " ")
      .replace(/[\s_.\-/[\]:]+/g, " ").toLowerCase());
  }
  const isTab = (target) => Boolean(target) && !/^_(self|parent|top)$/i.test(target);
  const linkAround = (element) => around(element, "a[*|href], area[href]");
  /** Where a click leads: the address of the link around, or of the form it sends. */
  function targetOf(element) {
    const link = linkAround(element);
    const raw = link ? link.href.baseVal ?? link.href
      : element.localName === "iframe" ? element.src
      : isSubmit(element) && (said(element, "formaction") || said(element.form, "action"));
    return raw ? URL.parse?.(raw, document.baseURI)?.href ?? raw.trim() : undefined;
  }
  const listOf = (element) => (element.matches("[role=listbox]") ? element
    : element.getRootNode().getElementById?.(said(element, "aria-controls")
      || said(element, "aria-owns")));
  function optionsOf(element) {
    if (element.options || element.list) return [...(element.options || element.list.options)];
    if (isField(element) && !element.matches(VALUED)) return [];
    return [...(listOf(element)?.querySelectorAll("[role=option]") || [])];
  }
  function valueOf(element) {
    if (isField(element) && element.localName !== "select") return element.value;
    const chosen = optionsOf(element).filter((one) => one.selected || one.ariaSelected === "true");
    return element.ariaValueText || element.ariaValueNow
      || (element.matches("select, [role=listbox]") ? chosen.map(textOf).join(", ")
        : textOf(element));
  }
  const TYPES = { a: "link", area: "link", button: "button", summary: "summary", iframe: "iframe" };
  function describe(element) {
    const tag = element.localName;
    const own = (name) => squeeze(said(element, name), 300) || undefined;
    const isOn = (name) => ({ true: true, false: false })[said(element, name)];
    const role = own("role"), checkable = isCheckable(element);
    const type = TYPES[tag] || (isField(element) ? element.type.replace("select-one", "select")
      : role || (element.matches(EDITABLE) ? "textbox" : "button"));
    const isWritten = (isField(element) || element.matches(VALUED)) && !checkable
      && element.type !== "file";
    const text = labelOf(element), inner = textOf(element), options = optionsOf(element);
    return {
      id: numbers.get(element), type, text, name: own("name"), title: own("title"),
      label: isWritten || inner === text ? undefined : inner || undefined,
      inputType: isSubmit(element) && type !== "submit" ? "submit" : undefined,
      role: role === type ? undefined : role, ariaLabel: own("aria-label"),
      placeholder: own("placeholder"),
      value: (isWritten && !isSecret(element) && squeeze(valueOf(element), 100)) || undefined,
      autocomplete: (isField(element) && element.autocomplete) || undefined,
      href: targetOf(element)?.slice(0, 300),
      newTab: isTab(linkAround(element)?.target) || undefined,
      options: options.length ? options.slice(0, 30).map((one) =>
        squeeze(one.text || one.value || one.textContent, 40)) : undefined,
      checked: checkable ? element.checked : isOn("aria-checked") ?? isOn("aria-pressed"),
      expanded: tag === "summary" ? parentOf.call(element).open : isOn("aria-expanded"),
      selected: isOn("aria-selected"),
      readonly: element.readOnly || isOn("aria-readonly") || undefined,
      min: own("min") ?? own("aria-valuemin"), max: own("max") ?? own("aria-valuemax"),
      step: own("step"),
      required: element.matches(":required") || isOn("aria-required") || undefined,
      disabled: isDisabled(element) || undefined,
      parent: headingOf(element),
      heading: isSubmit(element) ? headingIn(element.form) : undefined,
      iframe: squeeze(frameOf(element)?.title || frameOf(element)?.name, 80) || undefined,
      inModal: Boolean(around(element, MODAL)) || undefined,
      inViewport: distanceOf(element) === 0 || undefined,
      isNew: (pictured && !pictured.has(numbers.get(element))) || undefined,
    };
  }
  function describeForm(form) {
    const inside = [...form.querySelectorAll("input, select, textarea, button")];
    const fields = inside.filter((field) => isField(field) && isUsable(field));
    const names = ["aria-label", "name", "id"].map((name) => form.getAttribute(name));
    return {
      name: names.find(Boolean),
      heading: headingIn(form) || headingOf(form),
      fields: fields.map((field) => labelOf(field) || field.name).slice(0, 20),
      submit: inside.filter(isSubmit).map(labelOf).join(", "),
    };
  }
  const allVisible = (selector) => [...document.querySelectorAll(selector)].filter(attempt(isVisible));
  /** What can be read: dialogs and main content first; of too much, what the visitor looks at. */
  function visibleText() {
    const main = document.querySelector("main, [role=main]");
    const parts = allVisible(MODAL).concat(main || []).map((part) => part.innerText);
    const rest = parts.reduce((text, part) => text.replace(part, ""), document.body.innerText);
    const frames = allVisible("iframe").map((frame) => insideOf(frame)?.innerText);
    const text = [...parts, rest, ...frames].filter(Boolean).join("\n").trim();
    const seen = scrollY > 99 && [...Array(24)]
      .map((_, n) => document.elementFromPoint(innerWidth / 5 * (n % 4 + 1), innerHeight / 4 + n * 20))
      .map((one) => one?.textContent.length < limits.text && one.innerText?.trim().slice(0, 40))
      .find((some) => some && text.split(some).length === 2);
    const at = seen ? text.indexOf(seen) - 200 : 0;
    return text.slice(Math.max(0, Math.min(at, text.length - limits.text))).slice(0, limits.text);
  }

  /**
   * What a picture has room for: of dialogs, in view, main content, the rest, last cookie banners;
   * fields before buttons before links, to which they leave half of the room.
   */
  function ranked() {
    const rank = (element) => {
      const kind = isField(element) || isSubmit(element) ? 0 : element.matches("a") ? 2 : 1;
      const banner = around(element, ASIDE);
      const place = banner && !banner.matches("html, body, main, dialog[open]")
        && !banner.querySelector("main, h1") ? 4 : around(element, MODAL) ? 0
        : !distanceOf(element) ? 1 : around(element, "main, [role=main], form") ? 2 : 3;
      return { kind, place: 3 * place + kind };
    };
    const found = [...everything(document.body)]
      .filter(attempt((element) => isInteractive(element) && isUsable(element)))
      .map((element) => ({ element, far: distanceOf(element), ...rank(element) }))
      .sort((one, other) => one.place - other.place || one.far - other.far);
    const rest = found.splice(Math.ceil(limits.elements / 2));
    const isFull = found.length + rest.length > limits.elements;
    if (isFull) rest.sort((one, other) => one.kind - other.kind);
    return [...found, ...rest].slice(0, limits.elements).map(({ element }) => element);
  }
  function scan() {
    const found = ranked();
    for (const [number, reference] of elements) if (!reference.deref()) elements.delete(number);
    lastNumber = Math.max(lastNumber, keptNumber.get());
    for (const element of found.filter((one) => !numbers.has(one))) {
      numbers.set(element, ++lastNumber);
      elements.set(lastNumber, new WeakRef(element));
    }
    keptNumber.set(lastNumber);
    const known = found.map((element) => [element, attempt(describe)(element)])
      .filter(([, one]) => one);
    const names = known.map(([, { type, text }]) => `${type} ${text}`);
    for (const [at, [element, one]] of known.entries()) {
      const isOnly = names.indexOf(names[at]) === names.lastIndexOf(names[at]);
      if (!isOnly) one.row = attempt(rowOf)(element) || undefined;
    }
    pictured = new Set(known.map(([, { id }]) => id));
    return {
      url: location.href, title: squeeze(document.title, 300), language, visitorData,
      visibleText: visibleText(),
      indexedElements: known.map(([, one]) => one),
      forms: allVisible("form").slice(0, 10).map(attempt(describeForm)).filter(Boolean),
      previouslyFilledFields: known.map(attempt(([element, { id }]) => {
        const { fields } = memory(), kind = kindOf(element);
        return kind && fields[kind] && { elementId: id, ...fields[kind] };
      })).filter(Boolean),
    };
  }

  // What visitors type of themselves, for later forms: by the first kind that fits.
  const KINDS = Object.entries({
    email: /e-?mail|correo/, tel: /\btel|phone|mobile|handy/,
    "given-name": /(given|first|fore|vor)[ -]?name|pr[ée]nom/,
    "family-name": /(family|last|sur|nach)[ -]?name|apellido|cognome/,
    "postal-code": /postal|post ?code|\bzip\b|plz/,
    "address-level2": /level2|\b(city|town|stadt|ort|ville|ciudad)\b/,
    "street-address": /address|street|stra(ß|ss)e|adresse|dirección|indirizzo/,
    name: /\b(name|nombre|nome?)\b/,
  });
  function kindOf(element) {
    if (!element.matches?.("input, textarea") || isCheckable(element) || isSecret(element)) return null;
    const words = [element.autocomplete, element.type, element.name, element.id, labelOf(element)]
      .map((word) => String(word || "").toLowerCase().replace(/_/g, " "));
    if (words.some((word) => /user|file|search/.test(word))) return null;
    return KINDS.find(([, pattern]) => words.some((word) => pattern.test(word)))?.[0];
  }
  function memory() { // {fields: {kind: {value, timestamp}}, visitorData, at}, of the last 30 days
    const { fields = {}, visitorData: data, at } = (!has("no-user-memory") && keptUser.get()) || {};
    const isFresh = (time) => Date.now() - time < 30 * 24 * 3600 * 1000;
    const fresh = Object.entries(fields).filter(([, { timestamp }]) => isFresh(timestamp));
    return { fields: Object.fromEntries(fresh), ...(isFresh(at) && { visitorData: data, at }) };
  }
  function remember({ target, isTrusted }) {
    const kind = isTrusted && !has("no-user-memory") && attempt(kindOf)(target), known = memory();
    if (!kind || !target.value.trim()) return;
    known.fields[kind] = { value: squeeze(target.value, 200), timestamp: Date.now() };
    keptUser.set(known);
  }

  // ---------------------------------------------------------------------------------------------
  // Acting: each kind of step does one thing as a visitor would, checks that it took, and throws
  // an Error in words for the model if not, with everything as it was before.

  let leftAt = 0;

  function need(condition, otherwise) {
    if (!condition) throw new Error(otherwise);
  }
  function elementOf({ elementId }) {
    const element = elements.get(elementId)?.deref();
    need(element?.isConnected, "the element is no longer on the page");
    need(isUsable(element), "the element cannot be seen");
    need(!isDisabled(element), "the element is disabled");
    return element;
  }
  const fire = (element, ...events) => events.map((event) => element.dispatchEvent(event)).at(-1);
  const bubbling = { bubbles: true, cancelable: true, composed: true };
  const mouse = { ...bubbling, button: 0, isPrimary: true, pointerType: "mouse", view: window };
  const KEYS = { Enter: 13, Escape: 27, Tab: 9, Backspace: 8,
    ArrowLeft: 37, ArrowUp: 38, ArrowRight: 39, ArrowDown: 40 };
  const strike = (element, name, key) => fire(element, new KeyboardEvent(name,
    { ...bubbling, key, code: key, keyCode: KEYS[key], which: KEYS[key] }));
  async function press(element) {
    if (fire(element, new PointerEvent("pointerdown", mouse), new MouseEvent("mousedown", mouse)))
      element.focus({ preventScroll: true });
    await pause(20); // frameworks draw what opens on the way down
    fire(element, new PointerEvent("pointerup", mouse), new MouseEvent("mouseup", mouse));
    if (element.click) element.click();
    else fire(element, new MouseEvent("click", mouse));
  }
  /** A new tab is the visitor's to open (browsers block it else): the chat shows the link. */
  function noTab(url, name) {
    if (!url) return;
    add("bot", h("p", { dir: "auto" }, `${WORDS.newTab} `, link(url, name || url)));
    throw new Error("it opens a new tab, which only the visitor can: the chat shows them the link");
  }
  async function guarded(element, act) {
    const { form, ownerDocument: page } = element, its = page.defaultView, native = its.open;
    const problems = [];
    const note = ({ target }) => { if (form && target.form === form) problems.push(target); };
    let tab;
    its.open = (url, name) =>
      (isTab(name || "_blank") ? (tab = url, null) : native.call(its, url, name));
    page.addEventListener("invalid", note, true);
    try { await act(); } finally {
      its.open = native;
      page.removeEventListener("invalid", note, true);
    }
    need(!problems.length, "the form was not sent: " + problems.slice(0, 5)
      .map((one) => `${labelOf(one) || one.name}: ${one.validationMessage}`).join("; "));
    noTab(tab, labelOf(element));
  }
  /** Set a value as the browser does, behind the back of frameworks that watch the property. */
  function setValue(element, text, inputType = "insertText") {
    const kind = element.localName === "input" ? HTMLInputElement : HTMLTextAreaElement;
    Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(element, text);
    fire(element, new InputEvent("input", { ...bubbling, inputType, data: text }),
      new Event("change", bubbling));
  }
  const HINTS = { date: "a date is YYYY-MM-DD", time: "a time is HH:MM", month: "a month is YYYY-MM",
    week: "a week is YYYY-Www", "datetime-local": "date and time are YYYY-MM-DDTHH:MM",
    number: "a number is like 12.5", color: "a colour is #rrggbb" };
  function asTaken(element, text) {
    const probe = element.cloneNode(), { type, min, max, step } = element;
    probe.value = text;
    const isSame = type === "range" ? Number(probe.value) === Number(text)
      : type === "color" ? probe.value === text.toLowerCase() : probe.value !== "" || !text;
    need(isSame, `the field did not take the text: ${HINTS[type]
      || `numbers from ${min || 0} to ${max || 100} in steps of ${step || 1}`}`);
    return probe.value;
  }
  const folded = (text) => squeeze(text).toLowerCase();
  const matching = (options, wish, nameOf) => options.find((one) => folded(nameOf(one)) === wish)
    || options.find((one) => wish && folded(nameOf(one)).startsWith(wish));
  async function chooseOption(element, option) {
    const before = [...element.options].map((one) => one.selected);
    option.selected = true;
    fire(element, new Event("input", bubbling), new Event("change", bubbling));
    await pause(60);
    if (option.selected) return;
    [...element.options].forEach((one, at) => { one.selected = before[at]; });
    throw new Error("the list did not take the choice");
  }
  async function choose(element, wish) {
    const before = element.value, isInput = element.localName === "input";
    const options = () => {
      const list = listOf(element);
      return [...everything(list && isVisible(list) ? list : document.body)].filter(attempt((one) =>
        one.matches("[role=option]") && isUsable(one) && !isDisabled(one)));
    };
    const find = () => options().find((one) => folded(labelOf(one)) === wish), wasOpen = find();
    if (!wasOpen) await press(element);
    await until(() => options().length, 10);
    if (!find() && isInput) {
      setValue(element, wish);
      await until(find, 20);
    }
    const option = find(), text = option && labelOf(option), isList = options().length;
    if (option) await press(option);
    else if (isInput && element.value !== before) setValue(element, before);
    const popup = element.ownerDocument.activeElement?.closest("[role=listbox], [role=menu]");
    const stays = option ? !await until(() => !isUsable(option), 10) : popup || isInput || isList;
    if (stays && !wasOpen && element.ariaExpanded !== "false") {
      strike(popup || element, "keydown", "Escape");
    }
    need(option, isList ? "the list has no such option" : "this is no list; click it instead");
    need(!stays || option.ariaSelected !== "false", "the list did not take the choice");
    return { text };
  }
  const DO = {
    async click(step) {
      const element = elementOf(step), link = linkAround(element);
      if (isTab(link?.target)) noTab(link.href, labelOf(element));
      need(!isSubmit(element) || !isTab(said(element, "formtarget") || said(element.form, "target")),
        "it opens a new tab, which only the visitor can");
      if (link && isElsewhere(link)) navigating(link.href, "link");
      await guarded(element, () => press(element));
    },
    async double_click(step) {
      await DO.click(step);
      await DO.click(step);
      fire(elementOf(step), new MouseEvent("dblclick", { ...mouse, detail: 2 }));
    },
    hover(step) {
      const element = elementOf(step), { left, top, width, height } = boxOf(element);
      const at = { ...mouse, clientX: left + width / 2, clientY: top + height / 2 };
      element.focus({ preventScroll: true }); // menus of style sheets open by :focus-within, too
      for (const name of ["over", "enter", "move"]) {
        const how = { ...at, bubbles: name !== "enter" };
        fire(element, new PointerEvent(`pointer${name}`, how), new MouseEvent(`mouse${name}`, how));
      }
    },
    async press(step) {
      const element = elementOf(step), { key } = step, { form, localName, type } = element;
      need(KEYS[key], "there is no such key here");
      element.focus({ preventScroll: true });
      const isFree = strike(element, "keydown", key) // what the browser would do is done here
        && (key !== "Enter" || strike(element, "keypress", key));
      const up = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[key];
      if (isFree && key === "Enter" && (!isField(element) || (localName === "input" && form))) {
        const button = isField(element)
          ? [...form.querySelectorAll("button, input")].find(isSubmit) : element;
        await guarded(element, () => (button ? button.click?.() : form.requestSubmit()));
      } else if (isFree && key === "Escape") {
        around(element, "dialog:modal")?.close();
      } else if (isFree && key === "Tab") {
        const stops = [...everything(document.body)].filter((one) => one.tabIndex >= 0
          && isUsable(one) && !isDisabled(one));
        stops[stops.indexOf(element) + 1]?.focus();
      } else if (isFree && key === "Backspace" && /^(input|textarea)$/.test(localName)) {
        need(!element.readOnly, "the field is read-only");
        setValue(element, element.value.slice(0, -1), "deleteContentBackward");
      } else if (isFree && up && /^(range|number)$/.test(type)) {
        const probe = element.cloneNode();
        probe.stepUp(up);
        setValue(element, probe.value);
      }
      strike(element, "keyup", key);
    },
    async type(step) {
      const element = elementOf(step), { type, isContentEditable: editable } = element;
      let text = step.inputData;
      need(editable || element.matches("input, textarea"), "text cannot be typed there");
      need(!/^(checkbox|radio|file|submit|button|reset|image)$/.test(type), `a ${type} takes no text`);
      need(!isSecret(element), "only the visitor fills this field");
      need(!element.readOnly, "the field is read-only");
      need(!(element.maxLength >= 0 && text.length > element.maxLength), "the text is too long");
      if (HINTS[type] || type === "range") text = asTaken(element, text);
      const read = () => (editable ? element.innerText : element.value);
      const write = (written) => {
        if (!editable) return setValue(element, written);
        element.ownerDocument.getSelection().selectAllChildren(element);
        return element.ownerDocument.execCommand(written ? "insertText" : "delete", false, written);
      };
      const before = read(), last = text.at(-1) || "Delete";
      element.focus({ preventScroll: true });
      strike(element, "keydown", last);
      write(text);
      strike(element, "keyup", last);
      await pause(60);
      const plain = (written) => written.replace(/[^\p{L}\p{N}]/gu, "").toLowerCase();
      const now = read();
      const isTaken = squeeze(now) === squeeze(text) || (plain(now) && plain(now) === plain(text))
        || (type === "number" && Number(now) === Number(text));
      if (!isTaken) write(before);
      need(isTaken, "the field did not take the text");
      return { text: squeeze(now, 200) };
    },
    async select(step) {
      const element = elementOf(step), wish = folded(step.inputData);
      if (isCheckable(element)) {
        const on = element.type === "radio" || !/^(false|no|off|unchecked)$/.test(wish);
        if (element.checked !== on) element.click();
        await pause(60);
        need(element.checked === on, "it did not take the choice");
        return {};
      }
      if (element.list) {
        const known = matching(optionsOf(element), wish, (one) => one.value);
        return DO.type({ ...step, inputData: known?.value ?? step.inputData });
      }
      if (element.localName !== "select") {
        need(element.matches("[role=combobox], [role=listbox], [aria-haspopup], [aria-expanded]"),
          "this is no list; click it instead");
        return choose(element, wish);
      }
      const options = [...element.options].filter((option) => !option.disabled);
      const option = options.find((one) => [one.text, one.value].map(folded).includes(wish))
        || matching(options, wish, (one) => one.text);
      need(option, "the list has no such option");
      await chooseOption(element, option);
      return { text: squeeze(option.text, 200) };
    },
    scroll_to(step) {
      const element = elementOf(step);
      element.scrollIntoView({ block: "center", behavior: "instant" });
      need(distanceOf(element) === 0, "it could not be scrolled to");
    },
    async navigate({ url }) {
      const { href, origin } = new URL(url, location.href), before = location.href;
      need(origin === location.origin, "the address is not on this website");
      // A click lets the page's own router take it, if that is all that the link does.
      const own = [...document.links].find((a) => a.href === href && !a.target && isUsable(a)
        && !a.matches("[role=button], [onclick]") && !/method|confirm/.test(Object.keys(a.dataset)));
      const anchor = own || document.body.appendChild(h("a", { href, hidden: true }));
      navigating(href, own ? "link" : "assign");
      anchor.click();
      if (!own) anchor.remove();
      if (await until(() => leftAt || location.href !== before, 20)) return;
      if (href.split("#")[0] !== before.split("#")[0]) leftAt = Date.now();
      location.assign(href);
    },
    wait: ({ waitDuration }) => pause(waitDuration),
  };
  function navigating(url, method) {
    emit("navigating", { url, method });
    become("navigating");
  }
  function leaves({ type, target, defaultPrevented }) {
    const link = type === "click" ? target.closest?.("a[href]:not([download])") : target;
    if (defaultPrevented || !link || isTab(link.target)) return false;
    return type === "submit" ? link.method !== "dialog" : isElsewhere(link);
  }
  const isElsewhere = ({ href }) => /^https?:/.test(href)
    && href.split("#")[0] !== location.href.split("#")[0];
  const busyParts = () => allVisible("[aria-busy=true], [role=progressbar], progress");
  /**
   * Watch the page from now on; returns what waits until it rests. The first change outside of the
   * element has `firstMs`; then nothing changes for `quietMs`, twice that after a router's change of
   * address. Parts that say they are busy, and a page that is left, have 10 s.
   */
  function watch(element = null) {
    const from = location.href, busyBefore = new Set(busyParts());
    let changedAt = 0;
    const observer = new MutationObserver((records) => {
      if (records.some(({ target }) => !element?.contains(target))) changedAt = Date.now();
    });
    const all = { subtree: true, childList: true, attributes: true, characterData: true };
    observer.observe(document, all);
    return async (firstMs, quietMs = 300) => {
      const asked = Date.now();
      for (let isAtRest = false; !isAtRest;) {
        await pause(50);
        const now = Date.now(), calmMs = location.href === from ? quietMs : 2 * quietMs;
        isAtRest = now - leftAt > 10_000 && (changedAt
          ? now - changedAt >= calmMs || now - asked > 2500 + quietMs : now - asked >= firstMs)
          && (now - asked > 10_000 || !busyParts().some((one) => !busyBefore.has(one)));
      }
      observer.disconnect();
    };
  }
  async function pointAt(element) {
    if (distanceOf(element)) element.scrollIntoView({ block: "center", behavior: "instant" });
    const { left, top, width, height } = boxOf(element);
    const place = { left: left - 6, top: top - 6, width: width + 12, height: height + 12 };
    for (const [name, value] of Object.entries(place)) view.ring.style[name] = `${value}px`;
    view.ring.hidden = false;
    await pause(document.hidden ? 0 : 350);
    view.ring.hidden = true;
  }
  const stepsOf = (action) => (action.isSequence ? action.actions
    : [{ ...action, action: action.type === "navigate" ? "navigate" : "click" }]);

  /**
   * Carry a plan out, up to the first step that fails; returns the results, null if cancelled.
   * Each is noted before it begins: a page that it loads reports it (see introduce).
   */
  async function carryOut(action, isCancelled) {
    const steps = stepsOf(action), results = [];
    const note = (...more) =>
      keptActing.set({ id: action.id, typing, results: [...results, ...more] });
    const leave = (event) => {
      if (event.type === "beforeunload" || leaves(event)) leftAt = Date.now();
    };
    const signs = ["beforeunload", "click", "submit"];
    leftAt = 0;
    // Only now: it may cost the page its bfcache.
    for (const sign of signs) window.addEventListener(sign, leave);
    for (const [at, step] of steps.entries()) {
      const result = { success: true, elementId: step.elementId };
      let firstMs = /type|select|scroll|wait/.test(step.action) && at < steps.length - 1 ? 50 : 1500;
      let rest;
      try {
        note();
        const element = step.elementId === undefined ? null : elementOf(step);
        if (element) await pointAt(element);
        if (isCancelled()) break;
        note(result);
        const before = location.href, link = step.action === "click" && linkAround(element);
        rest = watch(element);
        Object.assign(result, await DO[step.action](step));
        if (link && isElsewhere(link)) await until(() => leftAt || location.href !== before, 40);
      } catch (error) {
        Object.assign(result, { success: false, error: squeeze(error.message, 300) });
        firstMs = 50;
      }
      results.push(result);
      await rest?.(firstMs);
      if (!result.success || isCancelled()) break;
    }
    for (const sign of signs) window.removeEventListener(sign, leave);
    if (conversation === "navigating") become("processing");
    return isCancelled() ? null : results;
  }

  // ---------------------------------------------------------------------------------------------
  // The view, in a shadow root. Transparent borders can be seen in forced colours.

  const STYLE = `
:host { all: initial !important; }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
.root { font: medium/1.5 var(--body-font, system-ui), sans-serif; color: var(--ink); color-scheme: light dark;
  --paper: var(--leflux-bg, #fff); --ink: var(--leflux-text-primary, #1b1b1f); --soft: var(--leflux-text-secondary, #5b5b66);
  --line: var(--leflux-border, #dedee4); --edge: var(--leflux-input-border, #85858f); --bubble: #f2f2f5; --bad: #a3140c;
  --bad-paper: #fdeceb; --accent-ink: var(--light-ink); --tint: var(--light-tint); --rim: var(--light-rim); }
button { font: inherit; color: inherit; background: none; border: 1px solid transparent; margin: 0; padding: 0;
  cursor: pointer; border-radius: var(--radius, .8em); }
button:disabled { opacity: .5; cursor: default; }
a { color: var(--accent-ink); }
:focus-visible, .confirm button:focus { outline: 2px solid var(--accent-ink); outline-offset: 2px; }
svg { width: 1.25em; height: 1.25em; flex: none; display: block; fill: none; stroke: currentColor; stroke-width: 2;
  stroke-linecap: round; stroke-linejoin: round; }
.quiet { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.accent, .user { background: var(--accent); color: var(--on-accent); border-color: var(--rim); }
button.accent:enabled:hover { background-image: linear-gradient(var(--shade) 0 0); }
.plain { padding: .35em .9em; border-radius: var(--radius, 2em); }
.plain:not(.accent) { color: var(--accent-ink); border-color: currentColor; }
.plain:not(.accent):enabled:hover, a.card:hover { background: var(--tint); }

.launcher, .nudge, .panel, .ring { position: fixed; z-index: 2147483000; --x: var(--offset-x); --y: var(--offset-y); }
[data-corner$=right] :is(.launcher, .nudge, .panel) { right: var(--x); }
[data-corner$=left] :is(.launcher, .nudge, .panel) { left: var(--x); }
[data-corner^=bottom] :is(.launcher, .nudge, .panel) { bottom: var(--y); }
[data-corner^=top] :is(.launcher, .nudge, .panel) { top: var(--y); }
[data-layout=bottom-bar] :is(.launcher, .nudge, .panel) { inset: auto 0 var(--y); margin: 0 auto; }
.launcher { display: flex; align-items: center; justify-content: center; width: var(--size);
  height: var(--size); border-radius: 50%; box-shadow: var(--glow, 0 0), 0 1px 4px #0003, 0 6px 20px #0003; }
.launcher:focus-visible { outline: 3px solid var(--accent-ink); box-shadow: 0 0 0 7px var(--paper); }
.launcher svg { width: calc(var(--size) * .46); height: calc(var(--size) * .46); }
.pill, .line { width: auto; max-width: calc(99vw - var(--x)); padding: 0 1em; gap: .6em; border-radius: 99em; }
.launcher:is(.pill, .line) svg { width: 1.5em; height: 1.5em; }
.launcher.squircle { border-radius: 30%; }
.launcher.line { width: min(36em, 100vw - 2em); justify-content: space-between; flex-direction: row-reverse;
  border: 2px solid var(--accent-ink); background: var(--paper); color: var(--soft); }
.launcher span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.badge { position: absolute; top: 0; right: 0; border: 8px solid #d3180c; border-radius: 8px; outline: 2px solid #fff; }

.nudge { --y: calc(var(--offset-y) + var(--size) + 12px); display: flex; align-items: flex-start; width: max-content;
  max-width: min(19em, 100vw - var(--x) - 1em); font-size: .94em; overflow-wrap: anywhere; background: var(--paper);
  border: 1px solid var(--line); border-radius: 1.1em; box-shadow: 0 4px 18px #0003; animation: rise .2s ease-out; }
.nudge button { padding: .7em 1em; text-align: start; min-width: 0; border-radius: inherit; }
.nudge.card { border-top: 4px solid var(--accent-ink); border-radius: .5em; padding: .3em; }
.nudge.minimal { background: var(--accent); color: var(--on-accent); border-color: var(--rim); }

.panel { --w: min(24em, 100vw - 2em); --h: min(40em, 100dvh - 2em); --x: min(var(--offset-x), 100vw - var(--w) - 1em);
  --y: min(var(--offset-y), 100dvh - var(--h) - 1em); display: flex; flex-direction: column; width: var(--w);
  height: var(--h); overflow: hidden; background: var(--paper); border: 1px solid var(--line); border-radius: 1.1em;
  box-shadow: 0 2px 8px #0002, 0 16px 48px #0004; animation: rise .2s ease-out; }
@keyframes rise { from { opacity: 0; translate: 0 12px; } }
[data-layout=bottom-bar] .panel { --w: min(44em, 100vw - 2em); --h: min(30em, 100dvh - 2em); }
[data-layout=side-panel] .panel { --x: 0px; --y: 0px; --w: 26em; --h: 100dvh; border-width: 0 1px; border-radius: 0; }
.bar { display: flex; align-items: center; gap: .25em; padding: .5em .6em; border-bottom: 1px solid var(--rim); }
.bar img { width: 2em; height: 2em; border-radius: .4em; object-fit: contain; background: #fff; }
h2 { flex: 1; min-width: 0; margin: 0; font-size: 1.06em; line-height: 1.3; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; }
h2, h3 { font-family: var(--heading-font, inherit); font-weight: var(--heading-weight, 600); }
:is(.bar, form) button { padding: .6em; } .bar button:hover { background: var(--shade); }
:is(.bar, .minimal) :focus-visible { outline-color: currentColor; outline-offset: -3px; }
.banner { display: flex; align-items: center; justify-content: space-between; gap: .8em; padding: .5em 1em;
  font-size: .9em; background: var(--tint); border-bottom: 1px solid var(--line); }
.log { flex: 1; background: var(--leflux-messages-bg, none); display: flex; flex-direction: column; gap: .6em; padding: 1em; overflow-y: auto;
  overscroll-behavior: contain; scrollbar-width: thin; }
:is(.log, pre):focus-visible { outline-offset: -2px; }
.log > * { flex: none; max-width: 88%; overflow-wrap: anywhere; }
.bot, .user { padding: .55em .9em; border: 1px solid transparent; border-radius: 1.1em; }
.bot { background: var(--bubble); align-self: flex-start; border-end-start-radius: .3em; }
.user { align-self: flex-end; border-end-end-radius: .3em; border-color: var(--rim); white-space: pre-wrap; }
.user, .note { unicode-bidi: plaintext; }
.greeting { background: var(--tint); } .greeting :is(strong, em) { color: var(--accent-ink); }
.bot > *, .confirm p { margin: 0 0 .6em; } .bot > :last-child { margin-bottom: 0; }
p { white-space: pre-line; } ul, ol { padding-inline-start: 1.4em; }
code { font: .9em/1.5 ui-monospace, monospace; padding: .1em .3em; border-radius: .3em; background: var(--paper); }
pre { overflow-x: auto; padding: .5em .7em; border-radius: .5em; background: var(--paper); } pre code { padding: 0; }
.error { background: var(--bad-paper); color: var(--bad); } .error .plain { color: inherit; }
.note { align-self: center; text-align: center; color: var(--soft); font-size: .9em; }
.dots { padding-block: .8em; line-height: 1; }
.dots i { display: inline-block; margin: 0 .12em; border: .22em solid var(--soft); border-radius: 50%;
  animation: dots .9s infinite alternate; }
.dots i:nth-child(2) { animation-delay: .2s; } .dots i:nth-child(3) { animation-delay: .4s; }
@keyframes dots { to { opacity: .25; translate: 0 -2px; } }
.log > .cards, .log > .chips { max-width: 100%; }
.cards, .choices, .chips { display: flex; flex-wrap: wrap; gap: .5em; align-self: stretch; }
.cards .card { flex: 1 0 9em; max-width: 100%; border: 1px solid var(--line); border-radius: .9em; padding: .7em .9em; }
.list .card { flex-basis: 100%; }
.card > :is(h3, p, ul) { margin: 0 0 .25em; } h3, summary { font-size: 1em; font-weight: 600; }
.card.highlighted { border: 2px solid var(--accent-ink); } .card .icon { float: inline-start; margin-inline-end: .4em; }
.card .price { font-size: 1.15em; font-weight: 600; color: var(--accent-ink); }
a.card { color: inherit; text-decoration: none; } a.card h3 { color: var(--accent-ink); text-decoration: underline; }
summary { cursor: pointer; }
.confirm { align-self: stretch; border: 2px solid var(--accent-ink); border-radius: 1.1em; padding: .8em .9em; }
.yes .plain:not(.accent), .no .accent { display: none; }
form { display: flex; align-items: flex-end; gap: .25em; margin: 0 .75em .75em; padding: .25em;
  border: 1px solid var(--edge); border-radius: 1.1em; background: var(--leflux-input-bg, none); }
form:focus-within { outline: 2px solid var(--accent-ink); outline-offset: -1px; }
.field { flex: 1; min-width: 0; }
textarea { display: block; width: 100%; max-height: min(9em, 25dvh); font: inherit; font-size: max(16px, 1em);
  color: inherit; resize: none; background: none; border: 0; padding: .45em .6em; }
textarea:focus-visible { outline: 0; } textarea::placeholder { color: var(--soft); opacity: 1; }
.counter { padding: 0 .7em; font-size: .8em; color: var(--soft); } .over { color: var(--bad); font-weight: 600; }
.stop { background: var(--bubble); } .stop svg { fill: currentColor; }
.ring { border: 3px solid var(--accent); border-radius: 10px; box-shadow: 0 0 0 2px #fff, 0 0 0 9999px #0002;
  pointer-events: none; }

@media (prefers-color-scheme: dark) {
  .root { --paper: var(--leflux-bg, #1c1c20); --ink: var(--leflux-text-primary, #f2f2f5);
    --soft: var(--leflux-text-secondary, #b3b3bd); --line: var(--leflux-border, #3b3b43);
    --edge: var(--leflux-input-border, #82828e); --bubble: #2b2b31; --bad: #ffb4ab; --bad-paper: #47201d; --accent-ink: var(--dark-ink); --tint: var(--dark-tint);
    --rim: var(--dark-rim); }
}
@media (max-width: 640px), (max-height: 420px) {
  .root .panel { inset: var(--top, 0) 0 auto; width: auto; height: var(--height, 100dvh); border-radius: 0; border: 0; }
  .root .acting { inset: auto 0 0; height: 50dvh; border-top: 1px solid var(--line); }
  form { margin-bottom: max(.75em, env(safe-area-inset-bottom)); }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; } }
@media print { .root { display: none; } }
`;
  const ICONS = { // strokes in a square of 24
    chat: "M4 5h16v12h-9l-5 4v-4H4z",
    sparkle: "M11 4q1 8 8 9-7 1-8 9-1-8-8-9 7-1 8-9zM19 2v5M16.5 4.5h5",
    question: "M8 8.5a4 4 0 1 1 5.8 3.5Q12 13 12 15M12 19v.1",
    lightning: "M13 3L5 14h6l-1 7 8-11h-6z", cursor: "M5 4l6 16 2.5-6.5L20 11z",
    close: "M6 6l12 12M18 6L6 18", clear: "M4 5v5h5M4.5 10A8 8 0 1 1 4 13",
    send: "M12 19V5M6 11l6-6 6 6", stop: "M7 7h10v10H7z",
  };
  const icon = (name) =>
    h("svg", { viewBox: "0 0 24 24", "aria-hidden": true }, h("path", { d: ICONS[name] }));
  const button = (name, onclick, ...children) => h(name, { type: "button", onclick }, ...children);
  function iconButton(name, word, onclick, picture = word) {
    const type = onclick ? "button" : "submit";
    return worded(h(name, { type, onclick }, icon(picture)), word, "aria-label", "title");
  }
  function worded(element, word, ...attributes) {
    view.worded.push(() => attributes.forEach((name) => element.setAttribute(name, WORDS[word])));
    view.worded.at(-1)();
    return element;
  }
  const view = { dots: null, docked: false, worded: [] };
  function mount() {
    view.host = h("leflux-widget", { id: "ai-chat-widget-container" }); // its id at LeFlux
    const shadow = view.host.attachShadow({ mode: "open" });
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(STYLE);
    shadow.adoptedStyleSheets = [sheet];

    view.launcher = h("button.launcher", { onclick: () => open("click"), "aria-haspopup": "dialog" });
    view.nudge = h("div.nudge", { role: "status", hidden: true });
    view.logo = h("img", { alt: "", onerror: () => { view.logo.hidden = true; } });
    view.title = h("h2", { dir: "auto" });
    view.banner = h("div.banner", { role: "status", hidden: true });
    view.log = worded(h("div.log", { role: "log", "aria-live": "off", tabindex: 0 }),
      "log", "aria-label");
    view.chips = h("div.chips");
    view.input = worded(h("textarea", { rows: 1, autocomplete: "off",
      enterkeyhint: "send", "aria-describedby": "counter", oninput: measure, onkeydown: sendOnEnter,
    }), "input", "aria-label");
    worded(view.input, "placeholder", "placeholder");
    view.counter = h("div.counter", { id: "counter" });
    view.stop = iconButton("button.stop", "stop", stop);
    view.stop.hidden = true;
    view.send = iconButton("button.accent", "send");
    view.form = h("form", { onsubmit: submit },
      h("div.field", {}, view.input, view.counter), view.stop, view.send);
    const dialog = { role: "dialog", tabindex: -1, hidden: true, onkeydown: keyInPanel };
    view.panel = h("div.panel", dialog,
      h("div.bar.accent", {}, view.logo, view.title,
        iconButton("button", "clear", () => LeFlux.clearConversation()),
        iconButton("button", "close", () => close("click"))),
      view.banner, view.log, view.form);
    view.live = h("div.quiet", { "aria-live": "polite", lang: "" });
    view.ring = h("div.ring", { hidden: true });
    view.root = h("div.root", {}, view.launcher, view.nudge, view.panel, view.live, view.ring);
    shadow.append(view.root);
    // What happens in here is none of the page's business: its shortcuts, and the traps of its
    // dialogs, which would take the focus away, close, or stop the wheel. Its fields hear that the
    // focus leaves them, but not where to.
    const quiet = (event) => event.stopPropagation();
    for (const name of ("keydown keyup keypress pointerdown mousedown touchstart touchmove wheel"
      + " click").split(" ")) view.host.addEventListener(name, quiet, { passive: true });
    const shield = (event) => {
      const { type, target, relatedTarget, key, isComposing } = event, isOwn = target === view.host;
      if (key ? !isOwn || key !== "Escape" || isComposing || !isOpen()
        : !isOwn && relatedTarget !== view.host) return;
      event.stopImmediatePropagation();
      if (key) event.preventDefault(), close("click");
      else if (!isOwn) fire(event.composedPath()[0], new FocusEvent(type, bubbling));
    };
    for (const name of ["focusin", "focusout", "keydown"]) listen(window, name, shield, true);
    document.documentElement.append(view.host);
    listen(PHONE, "change", () => view.panel.setAttribute("aria-modal", PHONE.matches));
    listen(visualViewport, "resize", fitToKeyboard);
    listen(visualViewport, "scroll", fitToKeyboard);
  }
  function fitToKeyboard() {
    if (visualViewport.scale > 1.01) return;
    view.root.style.setProperty("--height", `${visualViewport.height}px`);
    view.root.style.setProperty("--top", `${visualViewport.offsetTop}px`);
  }
  const custom = (name) => getComputedStyle(view.host).getPropertyValue(`--leflux-${name}`).trim();
  function dress({ launcher = {}, typography = {}, nudge = {}, ...config }) {
    const { bodyFont, headingFont, headingWeight, buttonRadius } = typography;
    // The browser knows colours.
    const accent = rgb([custom("primary"), config.primaryColor, "#a855f7"]
      .find((colour) => colour && CSS.supports("color", inSrgb(colour))));
    const isDark = contrast(accent, WHITE) >= 4.5;
    const looks = {
      accent: css(accent), "on-accent": css(isDark ? WHITE : BLACK),
      shade: isDark ? "#0003" : "#fff4",
      glow: launcher.glow === false ? null : "0 0 24px -2px var(--accent)",
      size: { sm: "46px", lg: "70px" }[launcher.size] || "58px",
      "offset-x": `min(${launcher.offsetX ?? 20}px, 100vw - 12em)`,
      "offset-y": `min(${launcher.offsetY ?? 20}px, 100dvh - 12em)`,
      "body-font": bodyFont, "heading-font": headingFont, "heading-weight": headingWeight,
      radius: Number.isFinite(buttonRadius) ? `${buttonRadius}px` : buttonRadius,
    };
    for (const [mode, goal, ground, bubble] of [
      ["light", BLACK, "#fff", "#f2f2f5"], ["dark", WHITE, "#1c1c20", "#2b2b31"],
    ]) {
      const paper = rgb(custom("bg") || ground), tint = mix(paper, accent, 0.12);
      looks[`${mode}-tint`] = css(tint);
      looks[`${mode}-ink`] = css(readable(accent, goal, rgb(bubble), tint));
      const isLost = contrast(accent, paper) < 1.5;
      looks[`${mode}-rim`] = isLost ? "var(--edge)" : "transparent";
    }
    for (const [name, value] of Object.entries(looks)) {
      if (value != null) view.root.style.setProperty(`--${name}`, value);
    }
    view.root.dataset.layout = config.layout || "floating";
    view.root.dataset.corner = launcher.position || config.position || "bottom-right";

    view.panel.setAttribute("aria-modal", PHONE.matches);
    view.logo.hidden = !config.logoUrl;
    if (config.logoUrl) view.logo.src = config.logoUrl;
    const isBar = config.layout === "bottom-bar", isPill = launcher.shape === "pill";
    view.badge = h("i.badge", { hidden: true });
    view.launcher.classList.add(launcher.shape || "circle", isBar ? "line" : "accent");
    const words = h("span", { dir: "auto" });
    view.launcher.append(icon(launcher.icon || "chat"), words, view.badge);
    view.isHidden = launcher.hidden === true;
    view.worded.push(() => {
      const name = config.siteName || WORDS.title;
      view.title.textContent = name;
      view.panel.setAttribute("aria-label", name);
      words.textContent = isBar ? WORDS.placeholder : isPill ? name : "";
      markUnread(!view.badge.hidden);
    });
    reword();
    show(false);

    view.chips.append(...(config.quickChips || []).map(({ text, payload }) =>
      button("button.plain", () => { send(payload || text); focusInput(); }, text)));
    if (nudge.enabled && nudge.message && Date.now() - keptNudge.get() > KEEP_MS) {
      setTimeout(() => offerNudge(nudge), nudge.delay ?? 5000);
    }
  }
  /** A modal dialog makes all else inert: the chat moves into it, and out again. */
  function stayOnTop() {
    const home = [...document.querySelectorAll("dialog:modal")].at(-1) || document.documentElement;
    if (view.host.parentNode === home) return;
    const { scrollTop } = view.log;
    home.append(view.host);
    view.log.scrollTop = scrollTop;
  }
  function offerNudge({ message, style, dismissable }) {
    if (isDead() || isOpen() || view.isHidden || view.log.querySelector(".user")) return;
    const dismiss = () => { settleNudge(); keptNudge.save(); view.launcher.focus(); };
    view.nudge.className = `nudge ${style || "bubble"}`;
    view.nudge.replaceChildren(button("button", () => open("click"), h("span", { dir: "auto" }, message)));
    if (dismissable !== false) view.nudge.append(iconButton("button", "dismiss", dismiss, "close"));
    view.nudge.hidden = false;
  }
  function settleNudge() {
    if (view.nudge.hidden) return;
    view.nudge.hidden = true;
    keptNudge.set(Date.now());
  }
  const isOpen = () => !view.panel.hidden;
  function show(opened) {
    view.panel.hidden = !opened;
    view.launcher.hidden = opened || view.isHidden;
    view.launcher.setAttribute("aria-expanded", opened);
    markUnread(false);
    if (opened) settleNudge();
    (opened ? view.panel : view.root).append(view.live);
    keptOpen.set(opened);
  }
  function markUnread(unread) {
    view.badge.hidden = !unread;
    view.launcher.setAttribute("aria-label", unread ? WORDS.unread : WORDS.open);
  }
  /** The focus goes where one writes; but where that brings up a keyboard, into the panel. */
  const focusInput = () => (TOUCH.matches ? view.panel : view.input).focus();
  let focusBefore = null;
  function open(source, focus = true) {
    if (isOpen()) return;
    if (source === "click") storeFromNow();
    focusBefore = document.activeElement;
    show(true);
    wanted = true;
    wakeUp();
    if (focus) focusInput();
    else if (PHONE.matches) view.panel.focus();
    scrollDown();
    emit("open", { source });
  }
  function close(source) {
    if (!isOpen()) return;
    const hadFocus = document.activeElement === view.host;
    show(false);
    // Back to the page's button, or the launcher.
    const back = isIdle(focusBefore) || !focusBefore.isConnected ? view.launcher : focusBefore;
    if (hadFocus) back.focus();
    emit("close", { source });
  }
  function dock(on) {
    if (on === view.docked) return;
    view.docked = on;
    view.root.dataset.layout = on ? "side-panel" : config.layout || "floating";
    emit(on ? "expand" : "collapse");
    if (on) open("api");
  }
  function keyInPanel(event) {
    if (event.key !== "Tab" || !PHONE.matches) return;
    const stops = [...view.panel.querySelectorAll("button, a, textarea, summary, [tabindex='0']")]
      .filter((one) => !one.disabled && one.getClientRects().length);
    const focused = view.host.shadowRoot.activeElement;
    if ([stops.at(event.shiftKey ? 0 : -1), view.panel].includes(focused)) {
      event.preventDefault();
      stops.at(event.shiftKey ? -1 : 0).focus();
    }
  }

  // Messages. Who reads at the bottom stays there.

  const isAtEnd = () => view.log.scrollHeight - view.log.scrollTop - view.log.clientHeight < 80;
  const scrollDown = () => { view.log.scrollTop = view.log.scrollHeight; };
  function following(change) {
    const follow = isAtEnd();
    change();
    if (follow) scrollDown();
  }
  function add(kind, ...children) {
    const node = h(`div.${kind}`, {}, ...children);
    following(() => view.log.insertBefore(node, view.dots));
    if (kind.startsWith("user")) scrollDown();
    return node;
  }
  const addBot = (text, kind = "bot") => add(kind, ...markdown(text));
  const setText = (node, text) => following(() => node.replaceChildren(...markdown(text)));
  function announce(text) {
    const lines = markdown(text)
      .flatMap((block) => (block.matches("ul, ol") ? [...block.children] : block));
    view.live.append(h("div", {}, lines.map((line) => line.textContent).join("\n")));
    if (view.live.children.length > 2) view.live.firstChild.remove();
    if (!isOpen()) markUnread(true);
  }
  function setDots(on) {
    view.dots?.remove();
    view.dots = null;
    if (on) view.dots = add("bot.dots", h("i"), h("i"), h("i"), h("span.quiet", {}, WORDS.working));
  }
  function banner(text, label, act) {
    following(() => {
      view.banner.hidden = !text;
      view.banner.replaceChildren(text, label ? button("button.plain", act, label) : "");
    });
  }
  function greet() {
    if (config.greeting) addBot(config.greeting, "bot.greeting");
    view.log.append(view.chips);
  }
  const isText = (value) => /^(string|number)$/.test(typeof value);
  function words(item, ...names) {
    return String(names.map((name) => item[name]).find(isText) ?? "");
  }
  const BLOCKS = { pricing_cards: "cards", feature_grid: "cards", faq_list: "cards.list",
    link_cards: "cards.list" };
  function addBlock(type, data) {
    const items = Object.values(data || {}).find(Array.isArray) || [];
    const cards = items.filter((item) => item && typeof item === "object").map((item) => {
      const title = words(item, "title", "name", "q");
      const text = words(item, "body", "description", "a");
      const url = words(item, "url", "cta_url");
      const message = words(item, "cta_action"), label = words(item, "cta_label");
      const price = [words(item, "price"), words(item, "period")].filter(Boolean).join(" ");
      const points = [item.features || []].flat().filter(isText);
      const sign = words(item, "icon");
      const isLink = type === "link_cards" && safeUrl(url);
      const [whole, heading] = type === "faq_list" ? ["details", "summary"] : ["div", "h3"];
      const body = [
        sign && (ICONS[sign] || !/\w/.test(sign))
          && h("span.icon", { "aria-hidden": true }, ICONS[sign] ? icon(sign) : sign),
        h(heading, { dir: "auto" }, title),
        price && h("p.price", { dir: "auto" }, price),
        text && h("p", { dir: "auto" }, ...inline(text)),
        points.length && h("ul", { dir: "auto" }, ...points.map((one) => h("li", {}, `${one}`))),
        url && !isLink && safeUrl(url) && h("p", { dir: "auto" }, link(url, label || WORDS.link)),
        message && !url && button("button.plain", () => send(message), label || title),
      ];
      const card = isLink ? link(url, ...body) : h(whole, {}, ...body);
      card.className = item.highlighted === true ? "card highlighted" : "card";
      return card;
    });
    return BLOCKS[type] && add(BLOCKS[type], ...cards);
  }
  function askToConfirm({ message, confirm_label, cancel_label }, question) {
    const seq = lastSeq;
    const show = ({ confirmed }) => card.classList.add(confirmed ? "yes" : "no");
    const answer = (confirmed) => {
      retireCards();
      const given = { seq, confirmed, text: message, label: confirmed ? confirm_label : cancel_label };
      show(given);
      keptAnswers.set([...keptAnswers.get() || [], given].slice(-20));
      focusInput();
      setRunning(true);
      tell("confirmation_response", { confirmed });
    };
    const yes = button("button.plain.accent", () => answer(true), confirm_label);
    const no = button("button.plain", () => answer(false), cancel_label);
    const asked = question && h("p", { dir: "auto" }, question);
    const card = add("confirm", asked, h("div.choices", {}, yes, no));
    card.setAttribute("role", "group");
    card.setAttribute("aria-label", message);
    stayOnTop();
    const given = (keptAnswers.get() || []).find((one) => one.seq === seq && one.text === message);
    if (given) show(given);
    else if (isOpen() && isIdle() && !view.input.value) no.focus({ focusVisible: true });
    become("awaiting-input");
    scrollDown();
  }
  const isIdle = (focused = document.activeElement) =>
    [view.host, document.body, null].includes(focused);
  function retireCards() {
    for (const button of view.log.querySelectorAll(".confirm button")) button.disabled = true;
  }
  function failed({ code = "internal", message }, again) {
    const text = code === "internal" ? WORDS.failed : message;
    const retry = () => { node.remove(); focusInput(); again(); };
    const canRetry = again && !/^(budget_exceeded|invalid_message|payload_too_large)$/.test(code);
    const node = add("bot.error", h("p", { dir: "auto", role: "alert" }, text),
      canRetry && button("button.plain", retry, WORDS.retry));
    if (!isOpen()) markUnread(true);
    emit("error", { code, message: text });
  }
  const lengthOf = (text) => [...text].length; // as the server counts: code points
  function measure() {
    view.input.dir = view.input.value && "auto";
    view.input.style.height = "auto";
    view.input.style.height = `${view.input.scrollHeight}px`;
    const length = lengthOf(view.input.value.trim());
    const isOver = length > limits.message;
    view.counter.textContent = length < limits.message * 0.9 ? "" : `${length} / ${limits.message}`;
    view.counter.classList.toggle("over", isOver);
    view.input.setAttribute("aria-invalid", isOver);
    view.send.disabled = isOver;
  }
  function sendOnEnter(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!view.send.disabled) view.form.requestSubmit();
    }
  }
  function submit(event) {
    event.preventDefault();
    const text = view.input.value.trim();
    if (!text) return;
    view.input.value = "";
    measure();
    expect("text");
    send(text);
  }
  function expect(kind) {
    const what = { phone: "tel", number: "decimal", integer: "numeric" }[kind] || kind;
    view.input.inputMode = /^(email|tel|url|decimal|numeric)$/.test(what) ? what : "text";
    view.input.autocomplete = /^(email|tel|url|name)$/.test(what) ? what : "off";
  }

  // ---------------------------------------------------------------------------------------------
  // The conversation: REST to begin and to send, one socket to hear. Whatever breaks is repaired:
  // the server keeps the events of a turn, and lastSeq says from where.

  let config = {}, visitorData;
  let session = null; // {id, wsUrl, at}
  let socket = null, joined = false, worked = false, taken = false, wanted = false;
  let lastSeq = null; // of the last event seen; null: this page has seen none of the session
  let retries = 0, retryTimer = 0, heardAt = 0;
  let unanswered = []; // frames that no event has answered yet, and that may be lost
  let running = false, ending = 0; // an answer or action is on its way; the timer to its end
  let stream = null; // {id, next, text, node}: the answer that is being written
  let locked = null; // {text, news}: said just before; the next event may repeat it
  let tails = []; // [{text, node}]: restored answers that the server may replay
  let picture = false; // the server has this page's elements: plans are for them
  let early = null; // a plan that came before that
  let acting = null; // the plan that is carried out; another value cancels it
  let lastPlan = ""; // id of the last one begun: it is not done twice
  let typing = false; // the visitor's focus was in the chat when the page got it
  let sending = false, queue = Promise.resolve();

  /** JSON without halves of characters. */
  const encode = (data) => JSON.stringify(data, (_, value) => value?.toWellFormed?.() ?? value);
  async function call(method, path, data) {
    const body = data && encode(data); // text/plain: no preflight; a small one outlives the page
    const options = { method, body, credentials: "omit", keepalive: !(body?.length > 20_000) };
    let response, answer;
    try {
      response = await fetch(SERVER + path, { ...options, signal: AbortSignal.timeout(20_000) });
      answer = await response.json();
    } catch {
      throw Object.assign(new Error(WORDS.unreachable), { code: "network" });
    }
    if (response.ok) return answer;
    throw Object.assign(new Error(answer.message), { code: answer.error });
  }
  function keptOne() {
    const found = keptSession.get();
    return found?.id && Date.now() - found.at < KEEP_MS ? found : null;
  }
  async function begin() {
    session = keptOne();
    lastSeq = null;
    if (session) return;
    const asked = { siteHost: location.host, pageUrl: location.href, language };
    const { sessionId, wsUrl, siteConfig } = await call("POST", "/api/session/init", asked);
    session = { id: sessionId, wsUrl, at: Date.now() };
    lastSeq = 0;
    config = siteConfig;
    keptSession.set(session);
  }
  function disconnect() {
    clearTimeout(retryTimer);
    joined = false;
    const ws = socket;
    socket = null;
    ws?.close();
  }
  function connect() {
    clearTimeout(retryTimer);
    wanted = true;
    if (!session || socket || isDead()) return;
    // One that never worked may be an old one.
    const other = retries % 2 && !worked;
    const url = new URL(other ? SERVER.replace("http", "ws") : session.wsUrl);
    url.searchParams.set("sessionId", session.id);
    if (lastSeq !== null) url.searchParams.set("lastSeq", lastSeq);
    try { socket = new WebSocket(url); } catch (error) {
      console.warn(`leflux: ${url.origin} cannot be used here (see server.public_url).`, error);
      onClosed(0);
      return;
    }
    const ws = socket;
    heardAt = Date.now();
    ws.onmessage = ({ data }) => { if (ws === socket) receive(JSON.parse(data)); };
    ws.onclose = ({ code }) => { if (ws === socket) onClosed(code); };
  }
  function onClosed(code) {
    socket = null;
    joined = false;
    if (code === 4404) { // the next message begins a new session, below what is shown
      const isLost = running && !sending && !ending;
      forget();
      if (!sending) setRunning(false);
      if (isLost) failed({ code: "session_not_found", message: WORDS.lost });
    } else if (code === 4409) {
      taken = true;
      acting = early = null;
      setRunning(false);
      retireCards();
      banner(WORDS.taken, WORDS.takeBack, takeBack);
    } else {
      if (code === 1009) unanswered = [];
      if (running || isOpen()) banner(WORDS.reconnecting);
      const most = Math.min(30_000, 500 * 2 ** retries++);
      retryTimer = setTimeout(connect, most * (0.5 + Math.random() / 2));
    }
  }
  function takeBack() {
    disconnect();
    taken = picture = false;
    lastSeq = acting = early = locked = null;
    unanswered = [];
    banner("");
    connect();
  }
  function forget() {
    if (keptSession.get()?.id === session?.id) keptSession.set(null);
    session = stream = null;
    tails = [];
    takeBack();
  }
  function wakeUp({ type } = {}) {
    if (document.visibilityState === "hidden" || taken || !wanted) return;
    retries = 0;
    if (joined && (type === "online" || Date.now() - heardAt > 60_000)) disconnect();
    connect();
  }
  function comeBack({ persisted }) { // out of the back/forward cache: other pages came after this
    if (!persisted || !wanted) return;
    session = keptOne();
    if (session) takeBack();
    else LeFlux.clearConversation();
  }
  function tell(event, data) {
    if (!session) return;
    debug("->", event, data);
    const frame = encode({ event, data: { sessionId: session.id, ...data } });
    unanswered = [...unanswered, frame].slice(-10);
    if (joined) socket.send(frame);
    else connect();
  }
  function receive({ event, data, seq }) {
    debug("<-", event, seq, data);
    heardAt = Date.now();
    if (event === "session_joined") return onJoined(data, seq);
    if (event === "error" || seq <= lastSeq) return undefined;
    lastSeq = seq;
    acting = early = null; // the server has moved on: nobody waits for these any more
    ending = clearTimeout(ending);
    if (event !== "message_chunk") {
      unanswered = [];
      retireCards();
      // A turn's text is locked just before the event that ends it.
      if (event === "message_done") ending = setTimeout(setRunning, 250, false);
      else setRunning(event === "action_plan");
    }
    const before = locked;
    locked = null;
    return ON[event]?.(data, before);
  }
  function onJoined({ history }, seq) {
    joined = worked = true;
    taken = false;
    retries = 0;
    banner("");
    if (history.length && (lastSeq === null || seq > lastSeq)) {
      restore(history);
      setRunning(history.at(-1).role === "user");
    }
    lastSeq = seq;
    const ws = socket;
    watch()(250, 250).then(() => {
      if (ws !== socket) return;
      const frames = unanswered;
      if (history.length && !picture && !sending) introduce();
      for (const frame of frames) ws.send(frame);
    });
  }
  function showPage() {
    const data = { sessionId: session.id, context: scan() };
    socket.send(encode({ event: "update_context", data }));
  }

  // A page that comes into a running conversation shows itself. A plan that came earlier was for the
  // page before: if that one carried it out, say so.
  function introduce() {
    picture = true;
    if (!early) return showPage();
    const { id, results } = keptActing.get() || {};
    const done = id === early.id ? results : [];
    if (done.length < stepsOf(early).length) {
      done.push({ success: false, error: "another page was loaded before this was done" });
    }
    return report(early, done);
  }
  function report(action, results) {
    acting = early = null;
    keptActing.set(null);
    const { id: actionId, description, isSequence } = action, totalSteps = stepsOf(action).length;
    const completedSteps = results.filter((one) => one.success).length;
    const success = completedSteps === totalSteps;
    if (isSequence) {
      const result = { success, results, completedSteps, totalSteps };
      tell("sequence_complete", { actionId, result });
    } else {
      const result = { ...results.at(-1), description, url: location.href };
      tell("action_complete", { actionId, result });
    }
    tell("continue_task", { context: scan() });
  }
  async function act(action) {
    if (action.id === lastPlan) return;
    lastPlan = action.id;
    acting = action;
    typing ||= document.activeElement === view.host;
    const { type, description = "" } = action, [{ elementId, url }] = stepsOf(action);
    const target = elements.get(elementId)?.deref();
    emit("action", { type, target: url ?? (target ? attempt(labelOf)(target) : null), description });
    const results = await carryOut(action, () => acting !== action);
    if (results) report(action, results);
  }
  function restore(history) {
    const last = history.at(-1);
    const unsent = [...view.log.querySelectorAll(".pending")]
      .filter((node) => last.role !== "user" || node.textContent !== last.content);
    view.log.replaceChildren();
    view.dots = stream = locked = null;
    tails = [];
    greet();
    const answers = [...keptAnswers.get() || []];
    for (const { role, content } of history) {
      if (role === "user") {
        add("user", content);
        tails = [];
      } else if (!BLOCKS[content]) {
        const text = content.trim(), at = answers.findIndex((one) => text.endsWith(one.text));
        tails.push({ text, node: addBot(content) });
        if (at >= 0) tails.at(-1).note = add("note", answers.splice(at, 1)[0].label);
      }
    }
    view.log.append(...unsent);
    view.chips.hidden = true;
    scrollDown();
  }
  function backToInput() {
    if (typing && isOpen() && !PHONE.matches) view.input.focus({ preventScroll: true });
  }
  function setRunning(on) {
    ending = clearTimeout(ending);
    running = on;
    view.stop.hidden = !on;
    view.log.setAttribute("aria-busy", on);
    setDots(on);
    if (!on) become("idle");
    else if (conversation !== "navigating") become("processing");
    if (on) return;
    view.panel.classList.remove("acting");
    backToInput();
    typing = false;
  }
  /** Whether a text is news; the bubble of a replayed one goes. */
  function isNews(text) {
    const start = text.trim();
    const at = tails.findLastIndex(({ text: whole }) =>
      whole.startsWith(start) && /^\s*(\n|$)/.test(whole.slice(start.length)));
    const [{ node, note } = {}] = at < 0 ? [] : tails.splice(at, 1);
    for (const one of [node, note]) one?.remove();
    return at < 0 || picture; // else it is from before this page
  }
  function tellOf(text, news, { isQuestion = false, isError = false } = {}) {
    if (!news) return;
    announce(text);
    emit("reply", { text, ts: Date.now(), isQuestion, isError });
  }
  function adds(text, before, traits) {
    const more = Boolean(text) && !before?.text.includes(text);
    if (more) tellOf(text, before ? before.news : isNews(text), traits);
    return more;
  }
  function say(text, before, kind = "bot", traits = {}) {
    if (adds(text, before, traits)) addBot(text, kind);
  }
  const ON = {
    message_chunk({ delta, streamId, chunkIndex }) {
      if (stream?.id !== streamId) {
        setRunning(true);
        setDots(false);
        become("typing");
        stream = { id: streamId, next: 0, text: "", node: addBot("") };
      }
      if (chunkIndex < stream.next) return;
      const mine = stream;
      mine.next = chunkIndex + 1;
      mine.text += delta;
      mine.drawing ||= requestAnimationFrame(() => {
        mine.drawing = 0;
        setText(mine.node, mine.text);
      });
    },
    message_done({ text, streamId }) {
      const { node, isSettled } = stream?.id === streamId ? stream : { node: addBot("") };
      stream = null;
      if (conversation === "typing") become("processing");
      setText(node, text);
      if (!text.trim()) return node.remove();
      const news = isNews(text);
      tellOf(text.trim(), news);
      if (!isSettled) locked = { text, news };
    },
    message({ text, isQuestion, isError, field }, before) {
      say(text, before, isError ? "bot.error" : "bot", { isQuestion, isError });
      if (!isQuestion) return;
      become("awaiting-input");
      expect(field?.type);
      if (isOpen() && isIdle()) view.input.focus();
    },
    ui_block({ block_type, data, message }) {
      const block = addBlock(block_type, data);
      if (block && !message) announce(block.innerText);
    },
    confirmation_required(data, before) {
      askToConfirm(data, adds(data.message, before) && data.message);
    },
    task_complete({ summary }, before) {
      say(summary, before);
      emit("task_complete", { summary });
    },
    action_plan({ actions: [action] }) {
      view.panel.classList.add("acting");
      if (picture) act(action);
      else early = action;
    },
  };
  function enqueue(act) {
    queue = queue.then(act).catch((error) => console.error("leflux:", error));
  }
  function send(text, intent) {
    const message = String(text ?? "").trim();
    if (!message) return;
    storeFromNow();
    if (lengthOf(message) > limits.message) {
      return failed({ code: "invalid_message", message: WORDS.tooLong });
    }
    const node = add(PREVIEW ? "user" : "user.pending", message);
    view.chips.hidden = view.nudge.hidden = true;
    retireCards();
    emit("message", { text: message, ts: Date.now(), sessionId: session?.id ?? null });
    const clientMessageId = crypto.randomUUID?.() || `${Date.now()}-${Math.random()}`;
    if (PREVIEW) addBot(WORDS.preview);
    else enqueue(() => deliver({ message, clientMessageId, intent }, node));
  }
  async function deliver(what, node, isRetry) {
    const wasTaken = taken, hadPicture = picture;
    acting = early = locked = null;
    if (stream) stream.isSettled = true; // what comes after its text belongs to the new one
    unanswered = [];
    picture = taken = false; // plans that come now wait until it is known what they are for
    sending = true;
    setRunning(true);
    let sent, problem;
    for (let tries = 1; node.isConnected && !sent && !problem; tries++) {
      try {
        if (!session) {
          if (view.log.querySelector(".user:not(.pending)")) add("note", WORDS.expired);
          view.log.insertBefore(node, view.dots);
          await begin();
          if (!node.isConnected) break;
        }
        const body = { sessionId: session.id, ...what, pageContext: scan() };
        sent = await call("POST", "/api/chat", body);
      } catch (error) {
        const isLost = error.code === "session_not_found";
        const mayPass = isLost || error.code === "network" || error.code === "shutting_down";
        if (isLost) forget();
        if (tries > 3 || !mayPass) problem = error;
        else if (!isLost) await pause(200 * 2 ** tries);
      }
    }
    sending = false;
    picture = hadPicture || Boolean(sent);
    if (!node.isConnected) return;
    if (problem) {
      taken = wasTaken;
      setRunning(false);
      return failed(problem, () => enqueue(() => deliver(what, node, true)));
    }
    node.classList.remove("pending");
    keptSession.set({ ...session, at: Date.now() });
    if (taken || wasTaken || isRetry) {
      takeBack();
      picture = true;
    }
    connect();
    // The numbers in ids are times: a plan from before is not wanted.
    const time = (id) => Number(id.split("-")[1]), plan = early;
    early = null;
    if (plan && time(plan.id) > time(sent.messageId)) act(plan);
  }
  function stop() {
    acting = null;
    view.ring.hidden = true;
    setRunning(false);
    enqueue(() => tell("stop", {}));
  }

  // Is the page another, the socket still there?
  let address = location.href, timer = 0;
  async function look() {
    stayOnTop();
    speak();
    const mustSpeak = !joined || (running && !acting);
    if (socket && mustSpeak && Date.now() - heardAt > (joined ? 60_000 : 10_000)) {
      disconnect();
      connect();
    }
    if (location.href === address || has("no-spa-detect")) return;
    const here = address = location.href;
    await watch()(200, 200);
    if (here === address && joined && picture && !acting) showPage();
  }

  // ---------------------------------------------------------------------------------------------
  // What the page's author hears, and the language.

  function emit(name, detail = {}) {
    document.dispatchEvent(new CustomEvent(`leflux:${name}`, { detail, bubbles: true }));
  }
  let conversation = "idle";
  function become(state) {
    const prev = conversation;
    if (state === prev) return;
    conversation = state;
    if (prev === "typing") emit("typing-end");
    if (state === "typing") emit("typing-start");
    emit("state-change", { state, prev, ts: Date.now() });
  }
  const ENGLISH = { ...WORDS };
  let language = "", spoken = "en"; // the page's, and that of WORDS
  function languageNow() {
    const { language: fixed } = config;
    return (fixed && fixed !== "auto" ? fixed : document.documentElement.lang.trim()
      || navigator.language || "en").slice(0, 35);
  }
  async function speak() {
    const prev = language, lang = languageNow();
    if (lang === prev) return;
    language = lang;
    let found = {}, tag = lang.toLowerCase().split(/[-_]/)[0];
    if (tag !== "en" && !PREVIEW) {
      try { found = await call("GET", `/words/${tag}.json`); } catch { tag = "en"; }
    }
    if (lang !== language) return;
    const isWord = ([key, word]) => key in ENGLISH && typeof word === "string" && word;
    const own = Object.entries({ ...found, ...config.words }).filter(isWord);
    Object.assign(WORDS, ENGLISH, Object.fromEntries(own));
    spoken = Object.keys(found).length ? tag : "en";
    if (view.host) reword();
    emit("language-detected", { lang, prev: prev || null });
  }
  function reword() {
    view.host.lang = spoken;
    view.root.dir = /^(ar|dv|fa|he|ku|ps|sd|ug|ur|yi)$/.test(spoken) ? "rtl" : "ltr";
    for (const write of view.worded) write();
  }

  // ---------------------------------------------------------------------------------------------
  // For the page's author, and the start.

  let beReady;
  const ready = new Promise((resolve) => { beReady = resolve; });
  const later = (act) => (...args) => { ready.then(() => { if (!isDead()) act(...args); }); };
  const isReady = () => Boolean(view.host) && !isDead();
  const full = (name) => `leflux:${String(name).replace(/^leflux:/, "")}`;
  const LeFlux = {
    isDestroyed: false,
    allow() {},
    open: later(() => open("api")),
    close: later(() => close("api")),
    toggle: later(() => (isOpen() ? close("api") : open("api"))),
    send: later((text) => { open("api"); send(text); }),
    ask: later((text) => { open("api"); send(text, "ask"); }),
    setVisitorData(data) {
      if (isDead()) return;
      visitorData = data ? JSON.parse(JSON.stringify({ ...data })) : undefined; // plain, or throws
      if (!has("no-user-memory")) {
        keptUser.set(data ? { ...memory(), visitorData, at: Date.now() } : null);
      }
    },
    dock: later(() => dock(true)),
    undock: later(() => dock(false)),
    showLauncher: later((on) => {
      view.isHidden = on === false;
      view.launcher.hidden = isOpen() || view.isHidden;
    }),
    reindex: later(() => { if (joined && picture && !acting) showPage(); }),
    clearConversation: later(() => {
      const { id } = session || {};
      forget();
      for (const store of [keptSession, keptActing, keptAnswers]) store.set(null);
      setRunning(false);
      view.log.replaceChildren();
      view.chips.hidden = false;
      greet();
      if (id) call("DELETE", `/api/session/${id}`).catch(() => {});
    }),
    isReady,
    isOpen: () => isReady() && isOpen(),
    isExpanded: () => isReady() && view.docked,
    getLanguage: () => language || languageNow(),
    getSessionId: () => (isDead() ? null : session?.id ?? null),
    getState: () => ({
      ready: isReady(), open: LeFlux.isOpen(), expanded: LeFlux.isExpanded(), conversation,
      language: LeFlux.getLanguage(), sessionId: LeFlux.getSessionId(),
      layout: view.root?.dataset.layout || config.layout || "floating", host: location.host,
    }),
    on(name, heard) {
      if (isDead()) return () => {};
      if (full(name) === "leflux:ready" && view.host) {
        later(heard)(new CustomEvent("leflux:ready", { detail: LeFlux.getState() }));
      }
      listen(document, full(name), heard);
      return () => LeFlux.off(name, heard);
    },
    off(name, heard) { document.removeEventListener(full(name), heard); },
    destroy() {
      if (isDead()) return;
      acting = null;
      clearInterval(timer);
      disconnect();
      view.host?.remove();
      become("idle");
      emit("destroy");
      over.abort();
      LeFlux.isDestroyed = true;
    },
  };
  async function enter() { // returns the history of a session, found or begun
    for (let tries = 0; !isDead(); tries++) {
      try {
        session = keptOne();
        if (!session) return await begin().then(() => []);
        const { history, siteConfig } = await call("GET", `/api/session/${session.id}`);
        config = siteConfig;
        return history;
      } catch (error) {
        // By http and IP a GET does not say whose it is: the chat begins anew.
        const isLost = /session_not_found|host_not_registered/.test(error.code);
        if (isLost && session) { keptSession.set(null); continue; }
        if (error.code === "host_not_registered") break;
        if (!tries) console.warn(`leflux: no answer from ${SERVER}; load embed.js from leflux's own address.`);
        await pause(Math.min(60_000, 1000 * 2 ** tries));
      }
    }
    return null;
  }
  async function start() {
    mayStore = Boolean(keptOne());
    visitorData ??= memory().visitorData;
    language = languageNow();
    const own = attempt(JSON.parse)(script.dataset.preview);
    if (PREVIEW) config = { greeting: "Hi! How can I help?", ...own };
    const history = PREVIEW ? [] : await enter();
    if (isDead()) return;
    if (!history) {
      console.warn(`leflux: ${location.host} is not a site of ${SERVER}, see its allowed_hosts.`);
      delete window.LeFlux;
      return;
    }
    Object.assign(limits, config.limits);
    language = "";
    await speak();
    if (isDead()) return;
    mount();
    const wasOpen = keptOpen.get(), { typing: wasTyping } = keptActing.get() || {};
    dress(config);
    if (history.length) restore(history);
    else greet();
    listen(document, "visibilitychange", wakeUp);
    listen(window, "online", wakeUp);
    listen(window, "pageshow", comeBack);
    listen(window, "pagehide", () => { acting = null; }); // the next page reports what was done
    listen(document, "change", remember, true);
    timer = setInterval(look, 500);
    wanted = history.length > 0;
    wakeUp();
    if (keptActing.get()) view.panel.classList.add("acting");
    if (wasOpen) open("restore", false);
    typing = Boolean(wasTyping);
    backToInput();
    beReady();
    emit("ready", LeFlux.getState());
  }
  function begun() {
    window.LeFlux = LeFlux;
    if (document.readyState !== "loading") start();
    else listen(document, "DOMContentLoaded", start);
  }
  if (has("consent")) window.LeFlux = { allow: begun };
  else begun();
})();
