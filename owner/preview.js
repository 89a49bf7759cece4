/* The real widget, without a server, as the form of looks.js has it: the siteConfig is in the
 * address, after the "#", as {config, open}. */

const { config = {}, open = false } = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
const tag = document.createElement("script");
tag.src = "/embed.js";
tag.setAttribute("data-preview", JSON.stringify(config));
document.addEventListener("leflux:ready", () => { if (open) window.LeFlux.open(); });
document.body.append(tag);
addEventListener("hashchange", () => location.reload());
