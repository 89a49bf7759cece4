/* leflux widget: one line puts an AI agent on a page,
 *
 *     <script src="https://chat.example.com/embed.js" async></script>
 *
 * and everything else comes from the server that this file was loaded from: how the chat looks
 * (siteConfig), what it says, and what it does on the page. No build step, no dependencies.
 *
 * For the page's author there is window.LeFlux: open(), close(), toggle(), send(text),
 * setVisitorData({...}), clearConversation(), getState(), on(name, fn), off(name, fn), destroy().
 * Events, for on() and as "leflux:..." on document: ready, open, close, message, reply, action,
 * error. The attribute data-debug on the tag logs what goes over the socket.
 *
 * The file reads downwards: words and small tools, colours, Markdown, what the page shows, what
 * can be done on it, the view, the conversation, and last the API and the start. The page's own
 * style cannot reach in (shadow root), nothing here needs inline styles or scripts (strict
 * Content-Security-Policy), and text from the server only ever becomes text nodes.
 */
(() => {
  "use strict";

  const script = document.currentScript || document.querySelector('script[src*="/embed.js"]');
  if (!script || window.LeFlux?.destroy) return; // a second tag does nothing
  const SERVER = new URL(script.src).origin;
  const DEBUG = script.hasAttribute("data-debug");

  const WORDS = {
    title: "Chat",
    open: "Open the chat",
    unread: "Open the chat, new message",
    close: "Close the chat",
    clear: "Start over",
    log: "Conversation",
    input: "Your message",
    placeholder: "Write a message…",
    send: "Send",
    stop: "Stop",
    retry: "Try again",
    dismiss: "Dismiss",
    working: "The assistant is working",
    done: "Done",
    link: "Have a look",
    reconnecting: "Reconnecting…",
    taken: "This chat is open in another tab.",
    takeBack: "Use it here",
    lost: "The answer got lost. Please ask again.",
    tooLong: "That is too long for one message.",
    expired: "The earlier chat has ended; what follows starts afresh.",
    unreachable: "The server cannot be reached just now.",
    failed: "That did not work.",
    wait: (seconds) => `That was a lot at once. Please wait ${seconds} s.`,
  };
  const MAX_CHARS = 5000; // of a message
  const MAX_ELEMENTS = 50;
  const KEEP_MS = 24 * 3600 * 1000; // how long a session id and a dismissed nudge are remembered
  const PHONE = matchMedia("(max-width: 640px), (max-height: 420px)");
  const CALM = matchMedia("(prefers-reduced-motion: reduce)");

  const debug = (...what) => { if (DEBUG) console.debug("leflux:", ...what); };
  const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));
  const squeeze = (text, max) => (text || "").replace(/\s+/g, " ").trim().slice(0, max);
  const over = new AbortController(); // aborted by destroy(): every listener hangs on it
  const listen = (target, names, heard) => {
    for (const name of names.split(" ")) target.addEventListener(name, heard, { signal: over.signal });
  };

  /** Make an element: attributes, "class" and on… handlers by name, then children (nodes, text). */
  function h(name, attributes = {}, ...children) {
    const [tag, ...classes] = name.split(".");
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element[key] = value;
      else if (value === true) element.setAttribute(key, "");
      else if (value !== false && value != null) element.setAttribute(key, value);
    }
    if (classes.length) element.className = classes.join(" ");
    element.append(...children.filter((child) => child != null && child !== ""));
    return element;
  }

  /** A small JSON store that works, for the visit, where the browser forbids storage. */
  function keep(area, name) {
    const key = `leflux ${SERVER} ${name}`;
    let memory = null;
    return {
      get() {
        try { return JSON.parse(window[area].getItem(key)); } catch { return memory; }
      },
      set(value) {
        memory = value;
        try {
          if (value === null) window[area].removeItem(key);
          else window[area].setItem(key, JSON.stringify(value));
        } catch { /* memory has it */ }
      },
    };
  }
  const keptSession = keep("localStorage", "session"); // {id, wsUrl, at}
  const keptNudge = keep("localStorage", "nudge"); // when it was dismissed
  const keptOpen = keep("sessionStorage", "open"); // whether this tab's panel is open
  const keptActing = keep("sessionStorage", "acting"); // {id, results, total}: see carryOut

  // ---------------------------------------------------------------------------------------------
  // Colours: any CSS colour may be the site's own; text on and of it must stay readable (WCAG AA).

  function rgb(colour) {
    const probe = h("span");
    probe.style.color = `color-mix(in srgb, ${colour}, ${colour})`;
    view.root.append(probe);
    const parts = getComputedStyle(probe).color.match(/[\d.e-]+/g).map(Number);
    const scale = getComputedStyle(probe).color.startsWith("rgb") ? 255 : 1;
    probe.remove();
    const alpha = parts[3] ?? 1;
    return parts.slice(0, 3).map((part) => (part / scale) * alpha + 1 - alpha); // upon white
  }
  const luminance = (colour) => colour
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  function contrast(one, other) {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }
  const WHITE = [1, 1, 1], BLACK = [0, 0, 0], PAPER = [0.95, 0.95, 0.96], NIGHT = [0.17, 0.17, 0.19];
  const css = (colour) => `rgb(${colour.map((part) => Math.round(part * 255)).join(" ")})`;

  /** The colour, made darker or lighter until text of it can be read on a background. */
  function readable(colour, background) {
    const goal = luminance(background) > 0.2 ? BLACK : WHITE;
    for (let share = 0; share <= 1; share += 0.05) {
      const mixed = colour.map((part, index) => part + (goal[index] - part) * share);
      if (contrast(mixed, background) >= 4.6) return mixed;
    }
    return goal;
  }

  // ---------------------------------------------------------------------------------------------
  // Markdown: paragraphs, lists, bold, italic, code and links. Text in, nodes out, no HTML ever.
  // Each pattern stops at a bounded length, so that no text is slow.

  const INLINE = new RegExp([
    /`([^`\n]{1,1000})`/, // 1 code
    /\*\*([^\n]{1,1000}?)\*\*/, // 2 bold
    /(?<![\w*])[*_](?![\s*_])([^*_\n]{1,1000}?)(?<!\s)[*_](?!\w)/, // 3 italic
    /\[([^[\]\n]{1,300})\]\(([^()\s]{1,1000}(?:\([^()\s]{0,200}\))?[^()\s]{0,200})\)/, // 4, 5 link
    /(?<!\w)(https?:\/\/[^\s<>"'`]{1,1000}[^\s<>"'`.,;:!?)\]])/, // 6 bare address
  ].map((pattern) => pattern.source).join("|"), "u");

  /** An absolute URL that a visitor may be sent to, or null. */
  function safeUrl(value) {
    try {
      const url = new URL(value, location.href);
      return ["http:", "https:", "mailto:", "tel:"].includes(url.protocol) ? url.href : null;
    } catch { return null; }
  }
  function link(href, ...children) {
    const url = safeUrl(href);
    if (!url) return h("span", {}, ...children);
    const inside = url.startsWith(location.origin + "/");
    return h("a", { href: url, rel: "noopener nofollow", target: inside ? null : "_blank" }, ...children);
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
    let list = null, code = null;
    for (const line of text.split("\n")) {
      const item = /^\s{0,8}(?:[-*•]|(\d{1,3})[.)])\s+(.*)/.exec(line);
      if (/^\s*```/.test(line)) {
        code = code ? null : h("code");
        if (code) blocks.push(h("pre", { tabindex: 0 }, code));
        list = null;
      } else if (code) {
        code.append(`${line}\n`);
      } else if (item) {
        const kind = item[1] ? "ol" : "ul";
        if (list?.localName !== kind) {
          list = h(kind, { start: item[1] > 1 ? item[1] : null, dir: "auto" });
          blocks.push(list);
        }
        list.append(h("li", {}, ...inline(item[2])));
      } else if (line.trim()) {
        const last = blocks.at(-1);
        const words = inline(line.replace(/^#{1,6}\s+/, ""));
        if (last?.localName === "p" && !last.ended) last.append(h("br"), ...words);
        else blocks.push(h("p", { dir: "auto" }, ...words));
        list = null;
      } else if (blocks.length) {
        blocks.at(-1).ended = true;
      }
    }
    return blocks;
  }

  // ---------------------------------------------------------------------------------------------
  // What the page shows: its elements that can be used, numbered, and its text. A number is never
  // used again, on no page of this site, so that a plan made on an older picture, or on the page
  // before, never means another element.

  const ROLES = "button link checkbox radio switch tab menuitem menuitemcheckbox menuitemradio"
    + " option combobox textbox searchbox slider spinbutton treeitem";
  const INTERACTIVE = "a[href], button, input:not([type=hidden]), select, textarea, summary,"
    + '[contenteditable=""], [contenteditable=true], [contenteditable=plaintext-only],'
    + ROLES.split(" ").map((role) => `[role=${role}]`).join();
  const MODAL = "dialog[open], [role=dialog], [role=alertdialog], [aria-modal=true]";
  const GROUP = `${MODAL}, form, fieldset, section, article, nav, aside, header, footer, main, li,
    td, details`;
  // What the server takes for a field of secrets, and so never fills (SENSITIVE there).
  const SECRET = new RegExp(String.raw`\bpass\s?(word|wd|code|phrase|wort)|\b(pass|pwd?|psw)\b
    |kennwort|contraseñ|mot\sde\spasse|\bsenha\b|wachtwoord|\bone\s?time|\bt?otp\b|\b(2|m|t)\s?fa\b
    |two\sfactor|\bpin\b|digit\scode|(verification|security|sms|auth\w*|tfa)\scode
    |digo\sde\s(seguridad|verif)|code\sde\ss[eé]curit|\bcc\b|(credit|debit)\s?card
    |\bcard\s?(number|no\b|num|holder|code)|\|\scard(\s\||$)|^card$|\b(cvv|cvc|csc|cvn)\b
    |expir(y|ation)|\bmm\s?yy|karten\s?nummer|kreditkarte|tarjeta|ro\sde\scarte|\biban\b|\bbic\b
    |\bswift\b|rout(ing|e)\snumber|sort\scode|\bbank|account\s?(number|no\b|num)|\bkonto|\bssn\b
    |social\s?security|national\s?(id|insurance)|passport|\btax\s?(id|number|payer)|\btin\b
    |\b(identity|id)\s?(card|number|no\b)|personalausweis|\bdni\b|\bnino\b|\bcpf\b|aadhaar
    |driver\w*\slicen[cs]e`.replace(/\n\s*/g, ""));

  const keptNumber = keep("localStorage", "number"); // the last one given, by any tab
  const numbers = new WeakMap(); // element -> its number
  const elements = new Map(); // number -> a weak reference to the element

  /** closest(), out of shadow roots too. */
  function around(element, selector) {
    for (let at = element; at; at = at.getRootNode().host) {
      const found = at.closest(selector);
      if (found) return found;
    }
    return null;
  }
  const isVisible = (element) =>
    [...element.getClientRects()].some((box) => box.width > 1 && box.height > 1)
    && (element.checkVisibility?.({ opacityProperty: true, visibilityProperty: true }) ?? true);
  const isUsable = (element) => !around(element, "[inert], [aria-hidden=true]")
    && (isVisible(element) || [...(element.labels || [])].some(isVisible));
  function isInViewport(element) {
    const box = element.getBoundingClientRect();
    return box.bottom > 0 && box.right > 0 && box.top < innerHeight && box.left < innerWidth;
  }
  const isField = (element) => element.matches("input, select, textarea");
  const isDisabled = (element) =>
    element.matches(":disabled") || around(element, "[aria-disabled=true]") !== null;

  function* everything(root) { // open shadow roots of the page included
    for (const element of root.querySelectorAll("*")) {
      yield element;
      if (element.shadowRoot && element !== view.host) yield* everything(element.shadowRoot);
    }
  }
  function byIds(element, attribute) {
    const ids = (element.getAttribute(attribute) || "").split(/\s+/).filter(Boolean);
    return ids.map((id) => element.getRootNode().getElementById?.(id)?.textContent).join(" ");
  }
  function labelOf(element) {
    if (element.localName === "input" && /^(submit|button|reset|image)$/.test(element.type)) {
      return squeeze(element.value || element.alt || element.type, 120);
    }
    const labels = [...(element.labels || [])].map((label) => label.cloneNode(true));
    for (const label of labels) { // around its field it would say the field's text, too
      for (const field of label.querySelectorAll("select, textarea")) field.remove();
    }
    const own = isField(element) ? labels.map((label) => label.textContent).join(" ")
      : element.innerText ?? element.textContent; // SVG has no innerText
    return squeeze(own, 120) || squeeze(byIds(element, "aria-labelledby"), 120)
      || (isField(element) ? "" : squeeze(element.title || element.querySelector("[alt]")?.alt
        || element.querySelector("[aria-label]")?.ariaLabel, 120));
  }
  function headingOf(element) {
    for (let group = element; (group = group.parentElement?.closest(GROUP));) {
      const name = squeeze(group.getAttribute("aria-label") || byIds(group, "aria-labelledby")
        || group.querySelector("h1, h2, h3, h4, h5, h6, legend")?.textContent, 80);
      if (name) return name;
    }
    return undefined;
  }
  function isSecret(element) {
    const words = [element.type, element.autocomplete, element.name, element.id,
      element.placeholder, element.ariaLabel, labelOf(element)].filter(Boolean).join(" | ");
    return SECRET.test(words.normalize("NFKC").replace(/\p{Cf}/gu, "")
      .replace(/(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-zA-Z])(?=[0-9])/g, " ")
      .replace(/[\s_.\-/[\]:]+/g, " ").toLowerCase());
  }

  function describe(element) {
    const tag = element.localName;
    const said = (name) => squeeze(element.getAttribute(name), 300) || undefined;
    const role = said("role");
    const type = { a: "link", button: "button", summary: "summary" }[tag]
      || (isField(element) ? element.type.replace("select-one", "select") : role || "textbox");
    const checkable = /^(checkbox|radio)$/.test(element.type);
    const isWritten = isField(element) && !checkable && element.type !== "file";
    const value = tag === "select" ? element.selectedOptions[0]?.text : element.value;
    const submits = tag === "button" && element.form && element.type === "submit";
    const options = tag === "select" && [...element.options].slice(0, 30);
    return {
      id: numbers.get(element),
      type,
      inputType: submits ? "submit" : undefined,
      role: role === type ? undefined : role,
      text: labelOf(element),
      name: said("name"),
      placeholder: said("placeholder"),
      value: (isWritten && !isSecret(element) && squeeze(value, 100)) || undefined,
      autocomplete: (isField(element) && element.autocomplete) || undefined,
      href: tag === "a" ? (element.href.baseVal ?? element.href).slice(0, 300) : undefined, // SVG
      ariaLabel: said("aria-label"),
      options: options ? options.map((option) => squeeze(option.text, 60)) : undefined,
      checked: checkable ? element.checked : { true: true, false: false }[element.ariaChecked],
      required: element.matches(":required") || element.ariaRequired === "true" || undefined,
      disabled: isDisabled(element) || undefined,
      parent: headingOf(element),
      inModal: Boolean(around(element, MODAL)) || undefined,
      inViewport: isInViewport(element) || undefined,
    };
  }
  function describeForm(form) { // by getAttribute: a field called "name" hides the form's own name
    const fields = [...form.elements].filter((field) => isField(field) && isUsable(field));
    const submits = [...form.elements].filter((field) => field.type === "submit");
    return {
      name: form.getAttribute("aria-label") || form.getAttribute("name")
        || form.getAttribute("id") || undefined,
      fields: fields.map((field) => labelOf(field) || field.name).slice(0, 20),
      submit: submits.map(labelOf).join(", "),
    };
  }

  /** What can be read, the most telling parts first. */
  function visibleText() {
    const main = document.querySelector("main, [role=main]");
    const parts = [...document.querySelectorAll(MODAL)].filter(isVisible).concat(main || [])
      .map((part) => part.innerText);
    const rest = parts.reduce((text, part) => text.replace(part, ""), document.body.innerText);
    return [...parts, rest].join("\n").trim().slice(0, MAX_CHARS);
  }

  /** A picture of the page: what the server calls a page context. */
  function scan() {
    const rank = (element) => (around(element, MODAL) ? 0 : isInViewport(element) ? 1 : 2);
    const found = [...everything(document.body)]
      .filter((element) => element.matches(INTERACTIVE) && isUsable(element))
      .map((element) => [rank(element), element])
      .sort(([one], [other]) => one - other)
      .slice(0, MAX_ELEMENTS)
      .map(([, element]) => element);
    let number = keptNumber.get() || 0;
    for (const element of found) {
      if (numbers.has(element)) continue;
      numbers.set(element, ++number);
      elements.set(number, new WeakRef(element));
    }
    keptNumber.set(number);
    const known = Object.entries(visitorData || {});
    return {
      url: location.href,
      title: squeeze(document.title, 300),
      visibleText: visibleText(),
      indexedElements: found.map(describe),
      forms: [...document.forms].filter(isVisible).slice(0, 10).map(describeForm),
      previouslyFilledFields: known.slice(0, 20).map(([name, value]) => ({ name, value })),
    };
  }

  // ---------------------------------------------------------------------------------------------
  // Acting: each kind of step does one thing as a visitor would, checks that it took, and throws
  // an Error in words for the model if not.

  let leftAt = 0; // when the page began to be left, in the current plan

  function elementOf({ elementId }) {
    const element = elements.get(elementId)?.deref();
    if (!element?.isConnected) throw new Error("the element is no longer on the page");
    if (!isUsable(element)) throw new Error("the element cannot be seen");
    if (isDisabled(element)) throw new Error("the element is disabled");
    return element;
  }
  function fire(element, ...events) {
    for (const event of events) element.dispatchEvent(event);
  }
  const bubbling = { bubbles: true, cancelable: true, composed: true };

  /** Set a property as the browser does, behind the back of frameworks that watch it. */
  function setNatively(element, property, value) {
    let owner = Object.getPrototypeOf(element);
    while (!Object.hasOwn(owner, property)) owner = Object.getPrototypeOf(owner);
    Object.getOwnPropertyDescriptor(owner, property).set.call(element, value);
    fire(element, new InputEvent("input", { ...bubbling, inputType: "insertText", data: value }),
      new Event("change", bubbling));
  }

  const DO = {
    async click(step) {
      const element = elementOf(step);
      const press = { ...bubbling, button: 0, isPrimary: true, pointerType: "mouse", view: window };
      fire(element, new PointerEvent("pointerdown", press), new MouseEvent("mousedown", press));
      element.focus({ preventScroll: true });
      fire(element, new PointerEvent("pointerup", press), new MouseEvent("mouseup", press));
      if (element.click) element.click();
      else fire(element, new MouseEvent("click", press)); // SVG
    },

    async type(step) {
      const element = elementOf(step);
      const text = step.inputData;
      const editable = element.isContentEditable;
      if (!editable && !element.matches("input, textarea")) {
        throw new Error("text cannot be typed there");
      }
      if (/^(checkbox|radio|file|submit|button|reset|image|range|color)$/.test(element.type)) {
        throw new Error(`a ${element.type} takes no text`);
      }
      if (isSecret(element)) throw new Error("only the visitor fills this field");
      if (element.readOnly) throw new Error("the field is read-only");
      if (element.maxLength >= 0 && text.length > element.maxLength) {
        throw new Error("the text is too long");
      }
      element.focus({ preventScroll: true });
      if (editable) {
        getSelection().selectAllChildren(element);
        document.execCommand("insertText", false, text); // the one way that rich editors hear of
      } else {
        setNatively(element, "value", text);
      }
      await pause(60);
      const plain = (written) => written.replace(/[^\p{L}\p{N}]/gu, "").toLowerCase(); // of a mask
      const now = editable ? element.innerText : element.value;
      if (squeeze(now) !== squeeze(text) && (!plain(now) || plain(now) !== plain(text))) {
        throw new Error("the field did not take the text");
      }
      return { text: squeeze(now, 200) };
    },

    async select(step) {
      const element = elementOf(step);
      const wish = squeeze(step.inputData).toLowerCase();
      if (element.type === "radio" || element.type === "checkbox") {
        const on = element.type === "radio" || !/^(false|no|off|unchecked)$/.test(wish);
        if (element.checked !== on) element.click();
        await pause(60);
        if (element.checked !== on) throw new Error("it did not take the choice");
        return {};
      }
      if (element.localName !== "select") throw new Error("this is no list; click it instead");
      const options = [...element.options].filter((option) => !option.disabled);
      const plain = (name) => squeeze(name).toLowerCase();
      const option = options.find((one) => plain(one.text) === wish || plain(one.value) === wish)
        || options.find((one) => wish && plain(one.text).startsWith(wish));
      if (!option) throw new Error("the list has no such option");
      if (element.multiple) {
        option.selected = true;
        fire(element, new Event("input", bubbling), new Event("change", bubbling));
      } else {
        setNatively(element, "value", option.value);
      }
      await pause(60);
      if (!option.selected) throw new Error("the list did not take the choice");
      return { text: squeeze(option.text, 200) };
    },

    async scroll_to(step) {
      const element = elementOf(step);
      element.scrollIntoView({ block: "center", behavior: CALM.matches ? "auto" : "smooth" });
      for (let tries = 0; tries < 20 && !isInViewport(element); tries++) await pause(50);
      if (!isInViewport(element)) throw new Error("it could not be scrolled to");
    },

    async navigate({ url }) {
      const target = new URL(url, location.href);
      if (target.origin !== location.origin) throw new Error("the address is not on this website");
      // A click on a link lets the page's own router take it. Where nothing does, the browser
      // loads the page.
      const before = location.href;
      const { href } = target;
      const own = [...document.links].find((a) => a.href === href && !a.target && isUsable(a));
      const anchor = own || document.body.appendChild(h("a", { href, hidden: true }));
      anchor.click();
      if (!own) anchor.remove();
      const hasBegun = () => leftAt || location.href !== before;
      for (let tries = 0; tries < 20 && !hasBegun(); tries++) await pause(50);
      if (!hasBegun()) location.assign(target);
    },

    async wait({ waitDuration }) {
      await pause(Math.min(Math.max(0, waitDuration || 0), 10_000));
    },
  };

  /** Wait until the page has reacted: no change for a while, or it never rests. */
  function settled(quietMs) {
    return new Promise((resume) => {
      let timer = 0;
      const done = () => { observer.disconnect(); clearTimeout(limit); resume(); };
      const calm = () => { clearTimeout(timer); timer = setTimeout(done, quietMs); };
      const observer = new MutationObserver(calm);
      const limit = setTimeout(done, 7 * quietMs);
      const all = { subtree: true, childList: true, attributes: true, characterData: true };
      observer.observe(document.body, all);
      calm();
    });
  }

  /** Show for a moment which element is meant. */
  async function pointAt(element) {
    if (!isInViewport(element)) element.scrollIntoView({ block: "center", behavior: "instant" });
    const box = element.getBoundingClientRect();
    const ring = view.ring.style;
    Object.assign(ring, { left: `${box.left - 6}px`, top: `${box.top - 6}px` });
    Object.assign(ring, { width: `${box.width + 12}px`, height: `${box.height + 12}px` });
    view.ring.hidden = false;
    await pause(document.hidden ? 0 : 350);
    view.ring.hidden = true;
  }

  const stepsOf = (action) => (action.isSequence ? action.actions
    : [{ ...action, action: action.type === "navigate" ? "navigate" : "click" }]);

  /**
   * Carry a plan out, up to the first step that fails; returns the results, null if cancelled.
   * Each step is noted before it begins: should it load another page, then that one's widget
   * reports it (see introduce).
   */
  async function carryOut(action, isCancelled) {
    const steps = stepsOf(action);
    const results = [];
    const note = (...more) =>
      keptActing.set({ id: action.id, results: [...results, ...more], total: steps.length });
    const leave = () => { leftAt = Date.now(); };
    leftAt = 0;
    window.addEventListener("beforeunload", leave); // only now: it can cost the page its bfcache
    for (const step of steps) {
      const result = { success: true, elementId: step.elementId };
      try {
        note();
        if (step.elementId !== undefined) await pointAt(elementOf(step));
        if (isCancelled()) break;
        note(result);
        Object.assign(result, await DO[step.action](step));
      } catch (error) {
        Object.assign(result, { success: false, error: squeeze(error.message, 300) });
      }
      results.push(result);
      if (!result.success) break;
      await settled(/click|navigate/.test(step.action) ? 300 : 50);
      while (Date.now() - leftAt < 10_000) await pause(100); // longer: it was a download
      if (isCancelled()) break;
    }
    window.removeEventListener("beforeunload", leave);
    return isCancelled() ? null : results;
  }

  // ---------------------------------------------------------------------------------------------
  // The view: one shadow root with a launcher, a nudge, the panel, and the ring around elements.

  const STYLE = `
:host { all: initial !important; }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
.root { font: 16px/1.5 var(--body-font, system-ui, sans-serif); color: var(--ink); text-align: start;
  --paper: #fff; --ink: #1b1b1f; --soft: #5b5b66; --line: #dedee4; --edge: #85858f;
  --bubble: #f2f2f5; --bad: #a3140c; --bad-paper: #fdeceb; --accent-ink: var(--accent-ink-light);
  color-scheme: light; -webkit-text-size-adjust: 100%; }
button { font: inherit; color: inherit; background: none; border: 0; margin: 0; padding: 0; cursor: pointer;
  border-radius: var(--radius, 10px); }
a { color: var(--accent-ink); }
:focus-visible { outline: 3px solid var(--accent-ink); outline-offset: 2px; }
svg { width: 1.25em; height: 1.25em; fill: currentColor; display: block; }
.quiet { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }

.launcher, .nudge, .panel, .ring { position: fixed; z-index: 2147483000; }
.launcher { display: flex; align-items: center; justify-content: center; gap: .5em; background: var(--accent);
  color: var(--on-accent); width: var(--size); height: var(--size); border-radius: 50%;
  box-shadow: 0 4px 14px #0004; transition: transform .15s; }
.launcher:hover { transform: scale(1.05); }
.launcher:focus-visible { outline-color: var(--accent-ink); box-shadow: 0 0 0 2px #fff; }
.launcher svg { width: calc(var(--size) * .46); height: calc(var(--size) * .46); flex: none; }
.launcher.squircle { border-radius: 30%; }
.launcher.pill { width: auto; padding: 0 1.2em 0 1em; border-radius: 99em; font-weight: 600; }
.launcher.pill svg { width: 1.4em; height: 1.4em; }
.launcher.glow { box-shadow: 0 4px 14px #0004, 0 0 26px -2px var(--accent); }
.launcher .badge { position: absolute; top: 0; right: 0; width: .9em; height: .9em; border-radius: 50%;
  background: #d3180c; border: 2px solid #fff; }
[data-corner$=right] :is(.launcher, .nudge, .panel) { right: var(--x); }
[data-corner$=left] :is(.launcher, .nudge, .panel) { left: var(--x); }
[data-corner^=bottom] :is(.launcher, .panel) { bottom: var(--y); }
[data-corner^=top] :is(.launcher, .panel) { top: var(--y); }
[data-layout=bottom-bar] .launcher { inset: auto 50% var(--y) auto; transform: translateX(50%); height: 3.25em;
  width: min(34em, calc(100vw - 2em)); border-radius: 99em; justify-content: flex-start; padding: 0 1.2em;
  background: var(--paper); color: var(--soft); border: 2px solid var(--accent-ink); font-weight: 400; }
[data-layout=bottom-bar] .launcher svg { order: 1; margin-inline-start: auto; width: 1.4em; height: 1.4em;
  color: var(--accent-ink); }

.nudge { display: flex; align-items: flex-start; gap: .5em; max-width: min(18em, calc(100vw - 3em)); font-size: .94em;
  background: var(--paper); border: 1px solid var(--line); border-radius: 14px; box-shadow: 0 6px 22px #0003; }
.nudge > button { padding: .6em .9em; text-align: start; }
.nudge > button + button { padding: .6em .7em .6em 0; color: var(--soft); }
[data-corner^=bottom] .nudge { bottom: calc(var(--y) + var(--size) + 12px); }
[data-corner^=top] .nudge { top: calc(var(--y) + var(--size) + 12px); }
.nudge.card { border-inline-start: 4px solid var(--accent); border-radius: 8px; padding: .4em; }
.nudge.minimal { border: 0; box-shadow: none; background: var(--accent); color: var(--on-accent); }
.nudge.minimal > button + button { color: inherit; }
[data-layout=bottom-bar] .nudge { inset: auto 50% calc(var(--y) + 4.2em) auto; transform: translateX(50%); }

.panel { display: flex; flex-direction: column; width: min(24em, calc(100vw - 2em)); overflow: hidden;
  height: min(38em, calc(100dvh - 2 * var(--y))); background: var(--paper); border: 1px solid var(--line);
  border-radius: 18px; box-shadow: 0 14px 48px #0004; animation: rise .18s ease-out; }
@keyframes rise { from { opacity: 0; transform: translateY(12px); } }
[data-layout=side-panel] .panel { top: 0; bottom: 0; height: auto; border-radius: 0; border-width: 0 1px;
  width: min(26em, 100vw); }
[data-layout=side-panel][data-corner$=right] .panel { right: 0; }
[data-layout=side-panel][data-corner$=left] .panel { left: 0; }
[data-layout=bottom-bar] .panel { inset: auto 0 var(--y) 0; margin: 0 auto; width: min(42em, calc(100vw - 2em));
  height: min(34em, calc(100dvh - 2 * var(--y))); }
header { display: flex; align-items: center; gap: .5em; padding: .6em .6em .6em 1em; background: var(--accent);
  color: var(--on-accent); }
header img { width: 1.9em; height: 1.9em; border-radius: 6px; object-fit: contain; background: #fff; }
h2 { flex: 1; min-width: 0; margin: 0; font-size: 1.06em; line-height: 1.3;
  font-family: var(--heading-font, inherit); font-weight: var(--heading-weight, 600); overflow-wrap: anywhere; }
header button { padding: .5em; }
header button:focus-visible { outline-color: var(--on-accent); outline-offset: -2px; }
.banner { display: flex; align-items: center; gap: .6em; padding: .4em 1em; font-size: .88em; background: var(--bubble);
  border-bottom: 1px solid var(--line); }
.log { flex: 1; overflow-y: auto; overscroll-behavior: contain; padding: 1em; display: flex; flex-direction: column;
  gap: .6em; }
.log:focus-visible { outline-offset: -3px; }
.log > * { flex: none; max-width: 88%; overflow-wrap: anywhere; }
.bot, .user { padding: .55em .85em; border-radius: 16px; }
.bot { background: var(--bubble); align-self: flex-start; border-end-start-radius: 5px; }
.user { background: var(--accent); color: var(--on-accent); align-self: flex-end; border-end-end-radius: 5px;
  white-space: pre-wrap; }
.greeting { border-inline-start: 4px solid var(--accent-ink); border-radius: 5px 16px 16px 5px; }
.greeting :is(strong, em) { color: var(--accent-ink); }
.bot :is(p, ul, ol, pre) { margin: 0 0 .6em; } .bot > :last-child { margin-bottom: 0; }
ul, ol { padding-inline-start: 1.4em; }
code { font: .92em ui-monospace, monospace; } pre { overflow-x: auto; white-space: pre; }
.error { background: var(--bad-paper); color: var(--bad); }
.note { align-self: center; text-align: center; color: var(--soft); font-size: .88em; }
.dots span { display: inline-block; width: .45em; height: .45em; margin: 0 .12em; border-radius: 50%;
  background: var(--soft); animation: dots 1s infinite alternate; }
.dots span:nth-child(2) { animation-delay: .2s; } .dots span:nth-child(3) { animation-delay: .4s; }
@keyframes dots { to { opacity: .25; transform: translateY(-2px); } }
.log > .cards { max-width: 100%; display: grid; gap: .6em; grid-template-columns: repeat(auto-fit, minmax(9.5em, 1fr)); }
.log > .cards.list { grid-template-columns: 1fr; width: 100%; }
.card { display: block; border: 1px solid var(--line); border-radius: 12px; padding: .7em .85em; color: inherit; }
.card h3 { margin: 0; font-size: 1em; font-weight: 600; } .card p { margin: .2em 0 0; }
.card .price { font-weight: 600; color: var(--accent-ink); } .card ul { margin: .3em 0; }
a.card { text-decoration: none; } a.card h3 { color: var(--accent-ink); text-decoration: underline; }
summary { cursor: pointer; font-weight: 600; }
.confirm { border: 2px solid var(--accent-ink); border-radius: 14px; padding: .8em; align-self: stretch; }
.confirm p { margin: 0 0 .7em; }
.choices, .chips { display: flex; flex-wrap: wrap; gap: .5em; }
.plain, .strong { padding: .35em .9em; border: 1px solid var(--accent-ink); color: var(--accent-ink);
  border-radius: var(--radius, 99em); }
.strong { background: var(--accent); color: var(--on-accent); border-color: transparent; }
.plain:disabled, .strong:disabled { opacity: .6; cursor: default; }
.chips { padding: 0 1em .7em; } .chips .plain { font-size: .92em; }
form { display: flex; align-items: flex-end; gap: .5em; padding: .7em; border-top: 1px solid var(--line); }
.field { flex: 1; min-width: 0; }
textarea { display: block; width: 100%; font: inherit; font-size: 16px; line-height: 1.4; color: inherit; resize: none;
  background: var(--paper); border: 1px solid var(--edge); border-radius: 12px; padding: .5em .75em; max-height: 8.5em; }
textarea::placeholder { color: var(--soft); opacity: 1; }
.counter { font-size: .8em; color: var(--soft); text-align: end; } .counter.over { color: var(--bad); }
form button { padding: .6em; background: var(--accent); color: var(--on-accent); border-radius: 12px; }
form .stop { background: none; color: var(--ink); border: 1px solid var(--edge); padding: calc(.6em - 1px); }
form button:disabled { opacity: .5; cursor: default; }
.ring { border: 3px solid var(--accent); border-radius: 10px; box-shadow: 0 0 0 2px #fff, 0 0 0 9999px #0002;
  pointer-events: none; animation: ring .3s; }
@keyframes ring { from { opacity: 0; transform: scale(1.1); } }

@media (prefers-color-scheme: dark) {
  .root { --paper: #1c1c20; --ink: #f2f2f5; --soft: #b3b3bd; --line: #3b3b43; --edge: #82828e; --bubble: #2b2b31;
    --bad: #ffb4ab; --bad-paper: #47201d; --accent-ink: var(--accent-ink-dark); color-scheme: dark; }
}
@media (max-width: 640px), (max-height: 420px) {
  .root .panel { inset: 0 !important; width: 100vw; height: var(--viewport, 100dvh); margin: 0; border: 0; border-radius: 0; }
  .root .panel.acting { inset: 50dvh 0 0 !important; height: 50dvh; border-top: 1px solid var(--line); }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
@media print { .root { display: none; } }
`;
  const ICONS = {
    chat: "M4 3h16a2 2 0 0 1 2 2v11a2 2 0 0 1-2 2H9l-5 4v-4a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2z",
    sparkle: "M11 2l2.2 6.8L20 11l-6.800 2.200L11 20l-2.200-6.800L2 11l6.800-2.200zM19 15l1 3 3 1-3 1-1 3-1-3-3-1 3-1z",
    question: "M12 2a10 10 0 1 1 0 20 10 10 0 0 1 0-20zm-1.200 14v2.400h2.400V16zM12 5.500a3.800 3.800 0 0 0-3.900 "
      + "3.700h2.300c0-1 .7-1.600 1.600-1.600s1.600.6 1.600 1.500c0 1.500-2.700 1.900-2.700 5h2.300c0-2 2.700-2.500 2.700-5A3.700 3.700 0 0 0 12 5.500z",
    lightning: "M13 2L4 14h6l-1 8 9-12h-6z",
    cursor: "M5 2l15 11-6.500 1.200 3.700 6.600-2.600 1.400-3.700-6.600L6 20z",
    close: "M6.400 5L5 6.400l5.600 5.600L5 17.600 6.400 19l5.600-5.600 5.600 5.600 1.400-1.400-5.600-5.600L19 6.400 17.600 5 12 10.600z",
    clear: "M12 5V1L6.500 6.500 12 12V7a5.500 5.500 0 1 1-5.500 5.500h-2A7.500 7.500 0 1 0 12 5z",
    send: "M3 20.500V14l9-2-9-2V3.500L22 12z",
    stop: "M6 6h12v12H6z",
  };
  function icon(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", ICONS[name]);
    svg.append(path);
    return svg;
  }
  const px = (value) => (typeof value === "number" ? `${value}px` : value);

  const view = {};

  /** Build everything, once, hidden but for the launcher. */
  function mount() {
    view.host = h("leflux-widget", { lang: "en" });
    const shadow = view.host.attachShadow({ mode: "open" });
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(STYLE);
    shadow.adoptedStyleSheets = [sheet];

    view.launcher = h("button.launcher", { type: "button", "aria-haspopup": "dialog", onclick: () => open() });
    view.nudge = h("div.nudge", { hidden: true });
    view.logo = h("img", { alt: "", hidden: true });
    view.title = h("h2");
    view.banner = h("div.banner", { role: "status", hidden: true });
    view.log = h("div.log", { role: "log", "aria-live": "off", "aria-label": WORDS.log, tabindex: 0 });
    view.chips = h("div.chips");
    view.input = h("textarea", { rows: 1, dir: "auto", autocomplete: "off", enterkeyhint: "send",
      "aria-label": WORDS.input, placeholder: WORDS.placeholder, oninput: measure, onkeydown: sendOnEnter });
    view.counter = h("div.counter", { role: "status", hidden: true });
    view.stop = h("button.stop", { type: "button", "aria-label": WORDS.stop, title: WORDS.stop, hidden: true, onclick: stop }, icon("stop"));
    view.send = h("button", { "aria-label": WORDS.send, title: WORDS.send }, icon("send"));
    view.form = h("form", { onsubmit: submit }, h("div.field", {}, view.input, view.counter), view.stop, view.send);
    const tool = (name, act) => h("button", { type: "button", "aria-label": WORDS[name], title: WORDS[name], onclick: act }, icon(name));
    view.panel = h("div.panel", { role: "dialog", hidden: true, onkeydown: keyInPanel },
      h("header", {}, view.logo, view.title, tool("clear", () => LeFlux.clearConversation()), tool("close", close)),
      view.banner, view.log, view.chips, view.form);
    view.live = h("div.quiet", { "aria-live": "polite" });
    view.ring = h("div.ring", { hidden: true });
    view.root = h("div.root", {}, view.launcher, view.nudge, view.panel, view.live, view.ring);
    shadow.append(view.root);
    // What is typed here is none of the page's business, its keyboard shortcuts least of all.
    for (const name of ["keydown", "keyup", "keypress"]) {
      view.host.addEventListener(name, (event) => event.stopPropagation());
    }
    document.documentElement.append(view.host); // outside of body, which some frameworks replace
    listen(PHONE, "change", () => view.panel.setAttribute("aria-modal", PHONE.matches));
    if (window.visualViewport) { // the on-screen keyboard covers the rest
      listen(visualViewport, "resize", () => view.root.style.setProperty("--viewport", `${visualViewport.height}px`));
    }
  }

  /** Make it look as the site's owner wants. */
  function dress(config) {
    const { launcher = {}, typography = {}, nudge = {} } = config;
    const set = (name, value) => (value == null ? null : view.root.style.setProperty(name, value));
    const accent = rgb(config.primaryColor || "#a855f7");
    set("--accent", css(accent));
    set("--on-accent", css(contrast(accent, WHITE) >= 4.5 ? WHITE : BLACK));
    set("--accent-ink-light", css(readable(accent, PAPER)));
    set("--accent-ink-dark", css(readable(accent, NIGHT)));
    set("--body-font", typography.bodyFont);
    set("--heading-font", typography.headingFont);
    set("--heading-weight", typography.headingWeight);
    set("--radius", px(typography.buttonRadius));
    set("--size", { sm: "46px", md: "58px", lg: "70px" }[launcher.size] || "58px");
    set("--x", px(launcher.offsetX ?? 20));
    set("--y", px(launcher.offsetY ?? 20));
    view.root.dataset.layout = config.layout || "floating";
    view.root.dataset.corner = launcher.position || config.position || "bottom-right";

    const name = config.siteName || WORDS.title;
    const bar = config.layout === "bottom-bar";
    view.title.textContent = name;
    view.panel.setAttribute("aria-label", name);
    view.panel.setAttribute("aria-modal", PHONE.matches);
    view.logo.hidden = !config.logoUrl;
    if (config.logoUrl) view.logo.src = config.logoUrl;
    view.launcher.className = `launcher ${launcher.shape || "circle"}${launcher.glow === false ? "" : " glow"}`;
    view.launcher.replaceChildren(icon(launcher.icon || "chat"));
    if (bar) view.launcher.append(WORDS.placeholder);
    else if (launcher.shape === "pill") view.launcher.append(name);
    view.isHidden = launcher.hidden === true;
    view.badge = view.launcher.appendChild(h("span.badge", { hidden: true }));
    show(false);

    const chips = (config.quickChips || []).map((chip) => h("button.plain", { type: "button", dir: "auto",
      onclick: () => send(chip.payload || chip.text) }, chip.text));
    view.chips.replaceChildren(...chips);
    if (nudge.enabled && nudge.message && Date.now() - (keptNudge.get() || 0) > KEEP_MS) {
      setTimeout(() => offerNudge(nudge), nudge.delay ?? 5000);
    }
  }

  function offerNudge({ message, style, dismissable }) {
    if (over.signal.aborted || isOpen() || view.isHidden || view.log.querySelector(".user")) return;
    const dismiss = () => { keptNudge.set(Date.now()); view.nudge.hidden = true; view.launcher.focus(); };
    view.nudge.className = `nudge ${style || "bubble"}`;
    view.nudge.replaceChildren(h("button", { type: "button", dir: "auto", onclick: () => open() }, message));
    if (dismissable !== false) {
      view.nudge.append(h("button", { type: "button", "aria-label": WORDS.dismiss, onclick: dismiss }, icon("close")));
    }
    view.nudge.hidden = false;
  }

  const isOpen = () => !view.panel.hidden;
  function show(opened) {
    view.panel.hidden = !opened;
    view.launcher.hidden = opened || view.isHidden;
    view.launcher.setAttribute("aria-expanded", opened);
    markUnread(false);
    if (opened) view.nudge.hidden = true;
    keptOpen.set(opened);
  }
  function markUnread(unread) {
    view.badge.hidden = !unread;
    view.launcher.setAttribute("aria-label", unread ? WORDS.unread : WORDS.open);
  }
  let focusBefore = null;
  function open(focus = true) {
    if (isOpen()) return;
    focusBefore = document.activeElement === document.body ? null : document.activeElement;
    show(true);
    if (!taken) connect();
    if (focus) view.input.focus();
    scrollDown(true);
    emit("open");
  }
  function close() {
    if (!isOpen()) return;
    show(false);
    // Back to where the visitor was: the launcher, or the page's own button that opened it.
    (focusBefore && focusBefore !== view.host && focusBefore.isConnected ? focusBefore : view.launcher).focus();
    emit("close");
  }
  function keyInPanel(event) {
    if (event.key === "Escape" && !event.isComposing) {
      event.preventDefault();
      close();
    } else if (event.key === "Tab" && PHONE.matches) { // a full-screen sheet keeps the focus
      const stops = [...view.panel.querySelectorAll("button, a, textarea, summary, [tabindex]")]
        .filter((one) => !one.disabled && one.getClientRects().length);
      const edge = stops.at(event.shiftKey ? 0 : -1);
      if (view.host.shadowRoot.activeElement === edge) {
        event.preventDefault();
        stops.at(event.shiftKey ? -1 : 0).focus();
      }
    }
  }

  // Messages. Whoever reads at the bottom stays there, whoever scrolled up is left alone.

  function isAtEnd() {
    return view.log.scrollHeight - view.log.scrollTop - view.log.clientHeight < 80;
  }
  function scrollDown(force) {
    if (force) view.log.scrollTop = view.log.scrollHeight;
  }
  function add(kind, ...children) {
    const atEnd = isAtEnd();
    const node = h(`div.${kind}`, { dir: "auto" }, ...children);
    view.log.insertBefore(node, view.dots || null);
    scrollDown(atEnd || kind === "user");
    return node;
  }
  const addBot = (text, kind = "bot") => add(kind, ...markdown(text));
  function setText(node, text) {
    const atEnd = isAtEnd();
    node.replaceChildren(...markdown(text));
    scrollDown(atEnd);
  }
  function announce(text) { // to screen readers, once it is whole
    view.live.replaceChildren(h("div", {}, text));
    if (!isOpen()) markUnread(true);
  }
  function setDots(on) {
    view.dots?.remove();
    view.dots = null;
    if (on) view.dots = add("bot.dots", h("span"), h("span"), h("span"), h("span.quiet", {}, WORDS.working));
  }
  function banner(text, label, act) {
    view.banner.hidden = !text;
    view.banner.replaceChildren(text || "", label ? h("button.plain", { type: "button", onclick: act }, label) : "");
  }
  function greet() {
    if (config.greeting) addBot(config.greeting, "bot.greeting");
  }

  // Cards: few words, or the model's slips for them; whatever is no text is left out.
  function words(item, ...names) {
    const value = names.map((name) => item[name]).find((one) => ["string", "number"].includes(typeof one));
    return value === undefined ? "" : String(value);
  }
  const BLOCKS = ["pricing_cards", "feature_grid", "faq_list", "link_cards"];
  function addBlock(type, data) {
    const items = Object.values(data || {}).find(Array.isArray) || [];
    const cards = items.filter((item) => item && typeof item === "object").map((item) => {
      const title = words(item, "title", "name", "label", "question");
      const text = words(item, "text", "description", "answer", "subtitle");
      const url = words(item, "url", "href", "link");
      const points = [item.points, item.features].find(Array.isArray) || [];
      const body = [text && h("p", { dir: "auto" }, ...inline(text)),
        points.length && h("ul", { dir: "auto" }, ...points.map((point) => h("li", {}, String(point))))];
      if (type === "faq_list") return h("details.card", {}, h("summary", { dir: "auto" }, title), ...body.filter(Boolean));
      const price = words(item, "price");
      const inside = [h("h3", { dir: "auto" }, title), price && h("p.price", {}, price), ...body].filter(Boolean);
      if (type !== "link_cards" || !safeUrl(url)) {
        return h("div.card", {}, ...inside, url && h("p", {}, link(url, WORDS.link)));
      }
      const card = link(url, ...inside);
      card.className = "card";
      return card;
    });
    add(/faq|link/.test(type) ? "cards.list" : "cards", ...cards);
  }

  function askToConfirm({ message, confirm_label, cancel_label }) {
    const answer = (confirmed) => {
      retireCards();
      card.classList.add(confirmed ? "yes" : "no");
      view.input.focus();
      setRunning(true);
      tell("confirmation_response", { confirmed });
    };
    const no = h("button.plain", { type: "button", onclick: () => answer(false) }, cancel_label);
    const yes = h("button.strong", { type: "button", onclick: () => answer(true) }, confirm_label);
    const card = add("confirm", h("p", { dir: "auto" }, message), h("div.choices", {}, yes, no));
    card.setAttribute("role", "group");
    card.setAttribute("aria-label", message);
    if (isOpen()) no.focus();
    scrollDown(true);
  }

  function retireCards() { // what they ask is no longer asked
    for (const button of view.log.querySelectorAll(".confirm button")) button.disabled = true;
  }
  function failed(error, again) {
    const text = error.seconds ? WORDS.wait(error.seconds) : error.code ? error.message : WORDS.failed;
    const node = add("bot.error", h("p", { dir: "auto", role: "alert" }, text));
    if (again && !/^(budget_exceeded|invalid_message)$/.test(error.code)) {
      const retry = () => { node.remove(); again(); };
      node.append(h("button.plain", { type: "button", onclick: retry }, WORDS.retry));
    }
    emit("error", { code: error.code || "internal", message: text });
  }

  // The line to write in.

  const lengthOf = (text) => [...text].length; // as the server counts: code points
  function measure() {
    view.input.style.height = "auto";
    view.input.style.height = `${view.input.scrollHeight + 2}px`;
    const length = view.input.value.length > 4000 ? lengthOf(view.input.value.trim()) : 0;
    view.counter.hidden = length < MAX_CHARS * 0.9;
    view.counter.textContent = view.counter.hidden ? "" : `${length} / ${MAX_CHARS}`;
    view.counter.classList.toggle("over", length > MAX_CHARS);
    view.send.disabled = length > MAX_CHARS;
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
  function expect(kind) { // the keyboard that fits the answer to a question
    const modes = { email: "email", tel: "tel", phone: "tel", url: "url", number: "decimal", integer: "numeric" };
    view.input.inputMode = modes[kind] || "text";
    view.input.autocomplete = { email: "email", tel: "tel", phone: "tel", name: "name" }[kind] || "off";
  }

  // ---------------------------------------------------------------------------------------------
  // The conversation: REST to begin and to send, one socket to hear. Whatever breaks is mended
  // behind the visitor's back: the server keeps the events of a turn, and lastSeq says from where.

  let config = {};
  let visitorData = null;
  let session = null; // {id, wsUrl, at}
  let socket = null, joined = false, taken = false, wanted = false;
  let lastSeq = null; // of the last event seen; null: this page has seen none of the session
  let retries = 0, retryTimer = 0, heardAt = 0;
  let unanswered = []; // frames that no event has answered: a broken connection may have lost them
  let running = false; // an answer or an action is on its way
  let stream = null; // {id, next, text, node}: the answer that is being written
  let tails = []; // [{text, node}]: the last answers as restored, which the server may replay
  let picture = false; // the server has this page's elements: plans are for them
  let early = null; // a plan that came before that
  let acting = null; // the plan that is carried out; another value cancels it
  let lastPlan = ""; // id of the last one begun: however often it comes, it is not done twice
  let typing = false; // the visitor's focus was in the chat when the page got it
  let sending = false;
  let queue = Promise.resolve(); // messages go out one after the other

  /** JSON without halves of characters, which cutting texts leaves and the server refuses. */
  const encode = (data) => JSON.stringify(data, (_, value) => value?.toWellFormed?.() ?? value);

  async function call(method, path, data) {
    let response, answer;
    try { // a string body is text/plain: no preflight; a small one outlives the page
      const body = data && encode(data);
      const options = { method, body, credentials: "omit", keepalive: !(body?.length > 20_000) };
      response = await fetch(SERVER + path, { ...options, signal: AbortSignal.timeout(20_000) });
      answer = await response.json();
    } catch {
      const error = new Error(WORDS.unreachable);
      throw Object.assign(error, { code: "network", status: response?.status });
    }
    if (response.ok) return answer;
    const { error: code, message, details } = answer;
    const seconds = code === "rate_limit_exceeded" && details?.retryAfterSeconds;
    throw Object.assign(new Error(message), { code, status: response.status, seconds });
  }

  /** The session that this or another tab has left in the store, if it may still live. */
  function kept() {
    const found = keptSession.get();
    return found?.id && Date.now() - found.at < KEEP_MS ? found : null;
  }
  /** Begin a new session, or take over what another tab has begun meanwhile. */
  async function begin() {
    session = kept();
    lastSeq = null;
    if (session) return;
    const asked = { siteHost: location.host, pageUrl: location.href };
    const { sessionId, wsUrl, siteConfig } = await call("POST", "/api/session/init", asked);
    session = { id: sessionId, wsUrl, at: Date.now() };
    lastSeq = 0;
    config = siteConfig;
    keptSession.set(session);
  }
  function forget() {
    if (keptSession.get()?.id === session?.id) keptSession.set(null);
    disconnect();
    session = lastSeq = acting = stream = early = null;
    unanswered = [];
    tails = [];
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
    if (!session || socket || over.signal.aborted) return;
    const url = new URL(session.wsUrl);
    url.searchParams.set("sessionId", session.id);
    if (lastSeq !== null) url.searchParams.set("lastSeq", lastSeq);
    let ws;
    try { ws = new WebSocket(url); } catch (error) { // such as ws: on a page of https:
      console.warn(`leflux: ${session.wsUrl} cannot be used here (see server.public_url).`, error);
      setRunning(false);
      return;
    }
    socket = ws;
    const patience = setTimeout(() => ws.close(), 10_000);
    ws.onopen = () => clearTimeout(patience);
    ws.onmessage = ({ data }) => { if (ws === socket) receive(JSON.parse(data)); };
    ws.onclose = ({ code }) => {
      clearTimeout(patience);
      if (ws === socket) onClosed(code);
    };
  }
  function onClosed(code) {
    debug("closed", code);
    socket = null;
    joined = false;
    if (code === 4404) { // the next message begins a new session, below what is shown
      const isLost = running && !sending;
      forget();
      banner("");
      if (!sending) setRunning(false);
      if (isLost) failed({ code: "session_not_found", message: WORDS.lost });
    } else if (code === 4409) {
      taken = true;
      acting = early = null;
      setRunning(false);
      banner(WORDS.taken, WORDS.takeBack, takeBack);
    } else {
      if (running || isOpen()) banner(WORDS.reconnecting);
      const most = Math.min(30_000, 500 * 2 ** retries++);
      retryTimer = setTimeout(connect, most * (0.5 + Math.random() / 2));
    }
  }
  /** Begin anew with a session that may have gone on in another tab, or on another page. */
  function takeBack() {
    disconnect();
    taken = picture = false;
    lastSeq = acting = early = null;
    unanswered = [];
    banner("");
    connect();
  }
  function wakeUp({ type } = {}) { // the tab is visible again, or the network is back
    if (document.visibilityState === "hidden" || taken || !wanted) return;
    retries = 0;
    // A socket from before a sleep or another network may be dead without knowing.
    if (joined && (type === "online" || Date.now() - heardAt > 60_000)) disconnect();
    connect();
  }
  function comeBack({ persisted }) { // out of the back/forward cache: other pages came after this
    if (!persisted || !wanted) return;
    session = kept();
    if (session) takeBack();
    else LeFlux.clearConversation();
  }

  /** Send an event; again, when the connection breaks before it is answered. */
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
    if (event === "error") { // what matters is followed by a close
      if (data.code === "invalid_event") console.warn("leflux:", data.message);
      return undefined;
    }
    if (seq <= lastSeq) return undefined;
    lastSeq = seq;
    acting = early = null; // the server has moved on: nobody waits for these any more
    if (event !== "message_chunk") {
      unanswered = [];
      retireCards();
    }
    return ON[event]?.(data);
  }

  function onJoined({ history }, seq) {
    joined = true;
    retries = 0;
    banner("");
    if (history.length && (lastSeq === null || seq > lastSeq)) { // this page has missed something
      restore(history);
      setRunning(history.at(-1).role === "user");
    }
    lastSeq = seq;
    const ws = socket;
    settled(250).then(() => { // what is replayed comes first
      if (ws !== socket) return;
      const frames = unanswered;
      if (history.length && !picture && !sending) introduce();
      for (const frame of frames) ws.send(frame);
    });
  }
  function showPage() {
    picture = true;
    const data = { sessionId: session.id, context: scan() };
    socket.send(encode({ event: "update_context", data }));
  }

  /**
   * A page that comes into a running conversation shows itself. A plan that came before was made
   * for the page before: if that one carried it out, say so, and go on from here.
   */
  function introduce() {
    if (!early) {
      showPage();
      return;
    }
    picture = true;
    const { id, results, total } = keptActing.get() || {};
    const done = id === early.id ? results : [];
    if (done.length < (total ?? 1)) {
      done.push({ success: false, error: "another page was loaded before this was done" });
    }
    report(early, done, total);
    early = null;
    tell("continue_task", { context: scan() });
  }

  function report(action, results, total = stepsOf(action).length) {
    const { success, error, ...more } = results.at(-1);
    if (action.isSequence) {
      const completedSteps = results.filter((one) => one.success).length;
      const isDone = completedSteps === total;
      const result = { success: isDone, results, completedSteps, totalSteps: total };
      tell("sequence_complete", { actionId: action.id, result });
    } else {
      const { description } = action;
      const result = { success, error, ...more, description, url: location.href };
      tell("action_complete", { actionId: action.id, result });
    }
  }

  async function act(action) {
    if (action.id === lastPlan) return;
    lastPlan = action.id;
    acting = action;
    typing ||= document.activeElement === view.host;
    view.panel.classList.add("acting");
    emit("action", action);
    const results = await carryOut(action, () => acting !== action);
    if (!acting || acting === action) view.panel.classList.remove("acting");
    if (!results) return;
    acting = null;
    keptActing.set(null);
    report(action, results);
    tell("continue_task", { context: scan() });
  }

  function restore(history) {
    const last = history.at(-1);
    const unsent = [...view.log.querySelectorAll(".pending")]
      .filter((node) => last.role !== "user" || node.textContent !== last.content);
    view.log.replaceChildren();
    view.dots = stream = null;
    tails = [];
    greet();
    for (const { role, content } of history) {
      if (role === "user") {
        add("user", content);
        tails = [];
      } else if (!BLOCKS.includes(content)) {
        tails.push({ text: content.trim(), node: addBot(content) });
      }
    }
    view.log.append(...unsent);
    view.chips.hidden = true;
    scrollDown(true);
  }

  function setRunning(on) {
    running = on;
    view.stop.hidden = !on;
    view.log.setAttribute("aria-busy", on);
    setDots(on);
    if (on || !typing) return;
    typing = false;
    if (isOpen() && !PHONE.matches) view.input.focus({ preventScroll: true });
  }

  /** End the answer that was being written; returns whether it already says a text. */
  function endAnswer(text) {
    const said = stream?.text || "";
    const whole = text && !said.includes(text) ? `${said}\n\n${text}`.trim() : said.trim();
    const at = tails.findIndex((tail) => tail.text === whole);
    if (at >= 0) tails.splice(at, 1)[0].node.remove(); // it was restored, then replayed
    if (stream) setText(stream.node, said);
    stream = null;
    if (whole && (at < 0 || picture)) { // else it is from before this page
      announce(whole);
      emit("reply", { text: whole });
    }
    return said.includes(text);
  }

  const ON = {
    message_chunk({ delta, streamId, chunkIndex }) {
      if (stream?.id !== streamId) {
        setRunning(true);
        setDots(false);
        stream = { id: streamId, next: 0, text: "", node: addBot("") };
      }
      if (chunkIndex < stream.next) return;
      stream.next = chunkIndex + 1;
      stream.text += delta;
      if (stream.drawing) return; // many chunks, one drawing
      const mine = stream;
      mine.drawing = requestAnimationFrame(() => {
        mine.drawing = 0;
        if (mine === stream) setText(mine.node, mine.text);
      });
    },
    message_done({ text }) {
      if (stream) stream.text = text;
      else if (text) stream = { text, node: addBot(text) };
      endAnswer("");
      setRunning(false);
    },
    message({ text, isQuestion, isError, field }) {
      if (!endAnswer(text)) addBot(text, isError ? "bot.error" : "bot");
      setRunning(false);
      if (!isQuestion) return;
      expect(field?.type);
      if (isOpen()) view.input.focus();
    },
    ui_block({ block_type, data, message }) {
      if (!endAnswer(message || "")) addBot(message);
      addBlock(block_type, data);
      setRunning(false);
    },
    confirmation_required(data) {
      endAnswer(data.message);
      setRunning(false);
      askToConfirm(data);
    },
    task_complete({ summary }) {
      const hasSaid = stream !== null;
      if (!endAnswer(summary)) hasSaid ? add("note", summary) : addBot(summary);
      setRunning(false);
    },
    action_plan({ actions: [action], message }) {
      if (!endAnswer(message || "")) addBot(message);
      setRunning(true);
      if (picture) act(action);
      else early = action;
    },
  };

  function send(text) {
    const message = String(text ?? "").trim();
    if (!message) return;
    if (lengthOf(message) > MAX_CHARS) {
      failed({ code: "invalid_message", message: WORDS.tooLong });
      return;
    }
    const node = add("user.pending", message);
    view.chips.hidden = true;
    view.nudge.hidden = true;
    retireCards();
    emit("message", { text: message });
    const id = crypto.randomUUID?.() || `${Date.now()}-${Math.random()}`;
    queue = queue.then(() => deliver(message, id, node));
  }

  /** Send a message until the server has it. The same id again is no second message. */
  async function deliver(message, clientMessageId, node, isRetry) {
    const wasTaken = taken, hadPicture = picture;
    acting = early = null; // a new wish settles the old one
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
        }
        const body = { sessionId: session.id, message, clientMessageId, pageContext: scan() };
        sent = await call("POST", "/api/chat", body);
      } catch (error) {
        debug("not sent", error);
        const isLost = error.code === "session_not_found";
        const mayPass = isLost || error.code === "network" || error.code === "shutting_down";
        if (isLost) forget();
        if (tries > 3 || !mayPass) problem = error;
        else if (!isLost) await pause(200 * 2 ** tries);
      }
    }
    sending = false;
    picture = hadPicture || Boolean(sent);
    if (!node.isConnected) return; // cleared meanwhile
    if (problem) {
      taken = wasTaken;
      setRunning(false);
      const again = () => deliver(message, clientMessageId, node, true);
      failed(problem, () => { queue = queue.then(again); });
      return;
    }
    node.classList.remove("pending");
    keptSession.set({ ...session, at: Date.now() });
    if (taken || wasTaken || isRetry) { // much may have happened: hear it all again
      takeBack();
      picture = true;
    }
    connect();
    // The numbers in ids are times: a plan from before this message is no longer wanted.
    const time = (id) => Number(id.split("-")[1]);
    const plan = early;
    early = null;
    if (plan && time(plan.id) > time(sent.messageId)) act(plan);
  }

  function stop() {
    acting = null;
    view.ring.hidden = true;
    setRunning(false);
    queue = queue.then(() => tell("stop", {})); // after a message that is on its way
  }

  // Every now and then: has a router changed the page, is the socket still there?
  let address = location.href, timer = 0;
  async function look() {
    if (running && joined && !acting && Date.now() - heardAt > 60_000) {
      heardAt = Date.now(); // the server is never silent so long
      disconnect();
      connect();
    }
    if (location.href === address) return;
    address = location.href;
    await settled(200);
    if (joined && picture && !acting) showPage();
  }

  // ---------------------------------------------------------------------------------------------
  // For the page's author, and the start.

  const hearers = new Map(); // event -> functions
  function emit(name, detail = {}) {
    document.dispatchEvent(new CustomEvent(`leflux:${name}`, { detail, bubbles: true }));
    for (const heard of hearers.get(name) || []) {
      try { heard(detail); } catch (error) { console.error(error); }
    }
  }

  const ready = {};
  ready.promise = new Promise((resolve) => { ready.resolve = resolve; });
  const later = (act) => (...args) => {
    ready.promise.then(() => { if (!over.signal.aborted) act(...args); });
  };

  const LeFlux = {
    open: later(() => open()),
    close: later(() => close()),
    toggle: later(() => (isOpen() ? close() : open())),
    send: later((text) => { open(); send(text); }),
    setVisitorData(data) {
      visitorData = data && typeof data === "object" ? { ...data } : null;
    },
    clearConversation: later(() => {
      const { id } = session || {};
      forget();
      keptSession.set(null);
      keptActing.set(null);
      taken = false;
      banner("");
      setRunning(false);
      view.log.replaceChildren();
      view.chips.hidden = false;
      greet();
      if (id) call("DELETE", `/api/session/${id}`).catch(() => {}); // else it ends by itself
    }),
    getState: () => ({
      ready: Boolean(view.host),
      open: Boolean(view.host) && isOpen(),
      connected: joined,
      running,
      taken,
    }),
    on(name, heard) {
      hearers.set(name, (hearers.get(name) || new Set()).add(heard));
      return LeFlux;
    },
    off(name, heard) {
      hearers.get(name)?.delete(heard);
      return LeFlux;
    },
    destroy() {
      over.abort();
      acting = null;
      clearInterval(timer);
      disconnect();
      view.host?.remove();
      delete window.LeFlux;
    },
  };

  /** Find or begin the session; returns its history. Waits while the server is not there. */
  async function enter() {
    for (let tries = 0; !over.signal.aborted; tries++) {
      try {
        session = kept();
        if (session) {
          const { history, siteConfig } = await call("GET", `/api/session/${session.id}`);
          config = siteConfig;
          return history;
        }
        await begin();
        return [];
      } catch (error) {
        debug("no session", error);
        if (error.code === "session_not_found") keptSession.set(null);
        else if (error.status === 403) break;
        else await pause(error.seconds * 1000 || Math.min(60_000, 1000 * 2 ** tries));
      }
    }
    return null;
  }

  async function start() {
    const history = await enter();
    if (over.signal.aborted) return;
    if (!history) {
      console.warn(`leflux: ${location.host} is not a site of ${SERVER}, see its allowed_hosts.`);
      delete window.LeFlux;
      return;
    }
    mount();
    const wasOpen = keptOpen.get();
    dress(config);
    if (history.length) restore(history);
    else greet();
    listen(document, "visibilitychange", wakeUp);
    listen(window, "online", wakeUp);
    listen(window, "pageshow", comeBack);
    listen(window, "pagehide", () => { acting = null; }); // the next page reports what was done
    listen(window, "popstate hashchange", look);
    timer = setInterval(look, 500);
    wanted = history.length > 0; // a task may go on
    wakeUp();
    if (wasOpen) open(false);
    ready.resolve();
    emit("ready");
  }

  window.LeFlux = LeFlux;
  if (document.readyState === "loading") listen(document, "DOMContentLoaded", start);
  else start();
})();
