/* What the page is made of: elements, forms that show the server's errors at their fields,
 * questions, a chart. Text only ever becomes text nodes.
 */

import { Failure } from "/owner/session.js";

/** Make an element: "tag.class.class"; on… and booleans become properties, null becomes nothing. */
export function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on") || typeof value === "boolean") element[key] = value;
    else if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== false));
  return element;
}

export const button = (label, onclick, look = "plain") =>
  h(`button.${look}`, { type: "button", onclick }, label);
export const time = (iso) => h("time", { datetime: iso },
  new Date(iso).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }));
export const count = (number, one, many = `${one}s`) =>
  `${number.toLocaleString()} ${number === 1 ? one : many}`;

/** A link to a page of the site; only http(s) is one. */
export function pageLink(url, label = url) {
  const isWeb = /^https?:\/\//i.test(url ?? "");
  return isWeb ? h("a", { href: url, rel: "noopener noreferrer", target: "_blank" }, label || url)
    : h("span", {}, label || url || "no page");
}

/** Put nodes into a place; if that loses the focus, the place (which has a tabindex) gets it. */
export function redraw(place, ...nodes) {
  const had = place.contains(document.activeElement);
  place.replaceChildren(...nodes);
  if (had) place.focus({ preventScroll: true });
}

/** Take an entry out of its list; the focus goes on to the next one, or to the whole. */
export function vanish(entry) {
  const next = entry.nextElementSibling ?? entry.previousElementSibling;
  entry.remove();
  (next?.querySelector("button") ?? document.querySelector("main")).focus();
}

/** Show words where a screen reader says them; a failure's too. Others go on to the console. */
export function report(place, problem) {
  if (problem?.name === "AbortError") return; // the page has gone on
  if (problem && !(problem instanceof Failure)) console.error(problem);
  place.textContent = problem ? problem.message : "";
  place.hidden = !problem;
}

/** Run work once at a time for a button. It keeps the focus, which a disabled one would lose. */
async function alone(it, work) {
  if (it.ariaDisabled === "true") return;
  it.ariaDisabled = "true";
  await work().finally(() => { it.ariaDisabled = "false"; });
}

/** A button that works on something; what fails stands beside it, or at the fields of a form. */
export function worker(label, work, look, fields = null) {
  const problem = h("span.error", { role: "alert", hidden: true });
  const it = button(label, () => {
    report(problem, null);
    alone(it, work).catch((failure) => {
      if (fields && failure instanceof Failure) fields.complain(failure);
      else report(problem, failure);
    });
  }, look);
  return h("span.worker", {}, it, problem);
}

/** Ask before what cannot be undone; resolves to true or false. */
export function sure(question, yes) {
  const title = h("h2", { id: "question" }, question);
  const dialog = h("dialog.question", { "aria-labelledby": "question" }, title,
    h("div.row", {}, button(yes, () => dialog.close("yes"), "danger"),
      button("Cancel", () => dialog.close())));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((answer) => {
    dialog.onclose = () => {
      dialog.remove();
      answer(dialog.returnValue === "yes");
    };
  });
}

// ---------------------------------------------------------------------------------------------
// Fields. A field is {path, label, kind, hint, options, rows}; its control reads and writes the
// value as the API has it, undefined where there is none. Kinds: text (and other types of
// <input>), number, area, lines (a list), pairs (an object), select, check, checks (a list of
// options), colour, chips.

let ids = 0;
const clean = (text) => text.trim() || undefined;
const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

function typed(element, toValue, toText = (value) => value ?? "") {
  return {
    element,
    read: () => toValue(element.value),
    write: (value) => { element.value = toText(value); },
  };
}
function area(rows, toValue, toText) {
  return typed(h("textarea", { rows }), toValue, toText);
}
const KINDS = {
  text: ({ autocomplete, type = "text", keepEmpty }) =>
    typed(h("input", { type, autocomplete }), keepEmpty ? (text) => text.trim() : clean),
  password: () => typed(h("input", { type: "password", autocomplete: "current-password" }), String),
  number: () => typed(h("input", { inputmode: "decimal" }), (text) => {
    const number = Number(text); // what is no number is for the server to refuse
    return clean(text) && (Number.isNaN(number) ? text : number);
  }),
  area: ({ rows = 4, keepEmpty }) => area(rows, keepEmpty ? (text) => text.trim() : clean),
  lines: ({ rows = 3 }) => area(rows, lines, (list) => (list ?? []).join("\n")),
  pairs: ({ rows = 4 }) => area(rows, (text) => {
    const pairs = lines(text).map((line) => /^([^:]*):?(.*)$/.exec(line).slice(1));
    return pairs.length ? Object.fromEntries(pairs.map((pair) => pair.map((one) => one.trim())))
      : undefined;
  }, (value) => Object.entries(value ?? {}).map((pair) => pair.join(": ")).join("\n")),
  select: ({ options }) => typed(h("select", {}, options.map((option) => {
    const [value, label = value] = [option].flat();
    return h("option", { value }, label);
  })), clean),
  check() {
    const element = h("input", { type: "checkbox" });
    const write = (value) => { element.checked = Boolean(value); };
    return { element, read: () => element.checked, write };
  },
  checks({ options }) {
    const boxes = options.map(([value]) => h("input", { type: "checkbox", value }));
    const labels = options.map(([, label], i) => h("label.check", {}, boxes[i], label));
    return {
      element: h("fieldset", {}, labels),
      read: () => boxes.filter((box) => box.checked).map((box) => box.value),
      write: (list) => { for (const box of boxes) box.checked = (list ?? []).includes(box.value); },
    };
  },
  colour() {
    const words = h("input", { type: "text", spellcheck: "false" });
    const picker = h("input", { type: "color", "aria-label": "Pick a colour" });
    const brush = document.createElement("canvas").getContext("2d"); // knows all CSS colours
    const follow = () => {
      brush.fillStyle = words.value;
      picker.value = brush.fillStyle.slice(0, 7); // a transparent one is black
    };
    words.addEventListener("input", follow);
    picker.addEventListener("input", () => { words.value = picker.value; });
    return {
      element: h("div.row", {}, words, picker), focus: words, read: () => clean(words.value),
      write(value) { words.value = value ?? ""; follow(); },
    };
  },
  chips({ most = 5 }) {
    const named = (name, i) => h("input", { type: "text", "aria-label": `${name} ${i + 1}`,
      placeholder: name });
    const rows = Array.from({ length: most }, (_, i) => [named("Button", i), named("Sends", i)]);
    return {
      element: h("fieldset", {}, rows.map((row) => h("div.row", {}, row))),
      read: () => rows.map((row) => row.map((input) => clean(input.value)))
        .filter(([text, payload]) => text || payload)
        .map(([text, payload]) => ({ text, payload })),
      write(chips) {
        rows.forEach(([text, payload], i) => {
          text.value = chips?.[i]?.text ?? "";
          payload.value = chips?.[i]?.payload ?? "";
        });
      },
    };
  },
};

/** A field with its label, hint and place for an error. */
function field(spec) {
  const control = KINDS[spec.kind ?? "text"](spec);
  const { element } = control;
  const id = `field-${++ids}`;
  const focus = control.focus ?? (element.localName === "fieldset" ? element.querySelector("input")
    : element);
  const hint = h("p.hint", { id: `${id}-hint`, hidden: !spec.hint }, spec.hint ?? "");
  const error = h("p.error", { id: `${id}-error`, hidden: true });
  if (spec.hint) focus.setAttribute("aria-describedby", hint.id);
  if (spec.readOnly) focus.readOnly = true;
  if (element.localName === "fieldset") element.prepend(h("legend", {}, spec.label));
  else focus.id = id;
  const label = element.localName === "fieldset" ? null : h("label", { for: id }, spec.label);
  const order = spec.kind === "check" ? [element, label] : [label, element];
  return {
    ...spec, ...control, focus,
    whole: h(`div.field${spec.kind === "check" ? ".check" : ""}`, {}, order, error, hint),
    complain(text) {
      error.textContent = text ?? "";
      error.hidden = !text;
      const about = [text && error.id, spec.hint && hint.id].filter(Boolean).join(" ");
      if (text) focus.setAttribute("aria-invalid", "true");
      else focus.removeAttribute("aria-invalid");
      if (about) focus.setAttribute("aria-describedby", about);
      else focus.removeAttribute("aria-describedby");
    },
  };
}

// ---------------------------------------------------------------------------------------------
// Forms. Values are nested as the API has them ("launcher.size" is size of launcher); what is
// saved is a JSON merge patch (RFC 7396) of what was changed, with null for what was emptied.

const isTable = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const at = (values, path) => path.split(".").reduce((inner, name) => inner?.[name], values);

function put(values, path, value) {
  const names = path.split(".");
  const last = names.pop();
  if (value !== undefined) names.reduce((inner, name) => inner[name] ??= {}, values)[last] = value;
}
/** The merge patch that makes one value of the other. */
export function difference(from, to) {
  const patch = {};
  for (const name of new Set([...Object.keys(from), ...Object.keys(to)])) {
    const [old, now] = [from[name], to[name]];
    if (isTable(now) && isTable(old)) {
      const inner = difference(old, now);
      if (Object.keys(inner).length) patch[name] = inner;
    } else if (JSON.stringify(old) !== JSON.stringify(now)) {
      patch[name] = now ?? null;
    }
  }
  return patch;
}

/** A form of fields, or of [title, fields] groups. save(patch, values) does the work and may return
 * values to show; patch has what differs from the values at first, or from those last saved. */
export function form(specs, values, { submit, save, onchange, more = [], done = "Saved." }) {
  const fields = [];
  const add = (spec) => fields[fields.push(field(spec)) - 1].whole;
  const body = specs.map((spec) => (Array.isArray(spec)
    ? h("fieldset.group", {}, h("legend", {}, spec[0]), spec[1].map(add)) : add(spec)));
  const told = h("p.told", { role: "status" });
  const problem = h("p.error", { role: "alert", hidden: true });
  const send = h("button.strong", { type: "submit" }, submit);

  const read = () => {
    const found = {};
    for (const one of fields) put(found, one.path, one.read());
    return found;
  };
  const write = (shown) => { for (const one of fields) one.write(at(shown, one.path)); };
  /** Show errors at their fields, or at the table that one is in; the others above the button. */
  const complain = (failure) => {
    const left = [];
    for (const [path, text] of Object.entries(failure.errors)) {
      const one = fields.find(({ path: own }) => path === own || path.startsWith(`${own}.`));
      if (one) one.complain(failure.message === text ? text : `${one.label} ${text}.`);
      else left.push(path ? `${path} ${text}` : text);
    }
    if (left.length || !Object.keys(failure.errors).length) {
      report(problem, left.length ? new Failure(left.join("; ")) : failure);
    }
    fields.find(({ focus }) => focus.ariaInvalid === "true")?.focus.focus();
  };

  write(values);
  let before = read();
  const element = h("form", {
    noValidate: true, // the server judges
    oninput: () => { told.textContent = ""; onchange?.(read()); },
    onsubmit(event) {
      event.preventDefault();
      for (const one of fields) one.complain(null);
      report(problem, null);
      told.textContent = "";
      alone(send, async () => {
        const now = read();
        const shown = await save(difference(before, now), now);
        if (shown) write(shown);
        before = read();
        told.textContent = done;
      }).catch((failure) => {
        if (failure instanceof Failure) complain(failure);
        else report(problem, failure);
      });
    },
  }, body, problem, h("div.row", {}, send, more, told));
  const isChanged = () => Object.keys(difference(before, read())).length > 0;
  return Object.assign(element, { read, complain, isChanged });
}

// ---------------------------------------------------------------------------------------------
// Tables, and days as a chart.

export function table(caption, heads, rows) {
  return h("div.scroll", { tabindex: 0, role: "region", "aria-label": caption },
    h("table", {}, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));
}

/** Bars a day for each series, [name, key of the day]; the figures are in a table below. */
export function chart(days, series) {
  const NS = "http://www.w3.org/2000/svg";
  const draw = (name, attributes, ...children) => {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const most = Math.max(...days.flatMap((day) => series.map(([, key]) => day[key])));
  const top = Math.max(4, most);
  const step = 10, width = 8 / series.length;
  const bars = days.flatMap((day, x) => series.map(([name, key], y) => draw("rect", {
    class: `bar-${y}`, x: x * step + 1 + y * width, width,
    y: 100 - (day[key] * 100) / top, height: (day[key] * 100) / top,
  }, draw("title", {}, `${day.day}: ${day[key]} ${name.toLowerCase()}`))));
  const sum = (key) => days.reduce((total, day) => total + day[key], 0);
  const words = series.map(([name, key]) => `${sum(key).toLocaleString()} ${name.toLowerCase()}`);
  return h("figure", {},
    h("figcaption", {}, series.map(([name], y) => h("span.key", {}, h(`i.bar-${y}`), name)),
      h("span.top", {}, `highest: ${most.toLocaleString()}`)),
    draw("svg", { role: "img", "aria-label": `${words.join(", ")} in ${days.length} days`,
      viewBox: `0 0 ${days.length * step} 100`, preserveAspectRatio: "none" }, ...bars),
    h("div.ends", {}, h("span", {}, days[0].day), h("span", {}, days.at(-1).day)),
    h("details", {}, h("summary", {}, "The figures"),
      table("Day by day", ["Day", ...series.map(([name]) => name)],
        days.toReversed().map((day) => [day.day, ...series.map(([, key]) => String(day[key]))]))));
}
