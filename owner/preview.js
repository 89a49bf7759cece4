/* The real widget without a server, as the form of looks beside it has it: what is after the "#"
 * of the address is {config, open} as JSON. */

const said = decodeURIComponent(location.hash.slice(1));
const { config = {}, open = false } = JSON.parse(said || "{}");
const tag = document.createElement("script");
tag.src = "/embed.js";
tag.setAttribute("data-preview", JSON.stringify(config));

// A chat that opens by itself must not take the focus from the form in which somebody writes.
const { focus } = HTMLElement.prototype;
HTMLElement.prototype.focus = () => {};
document.addEventListener("leflux:ready", () => {
  window.LeFlux[open ? "open" : "close"]();
  setTimeout(() => { HTMLElement.prototype.focus = focus; }, 500);
});
document.body.append(tag);
addEventListener("hashchange", () => location.reload());
