// The demo shop: nothing is sold, sent or deleted. The agent comes from /embed.js alone.
"use strict";

for (const button of document.querySelectorAll(".cards button"))
  button.addEventListener("click", () => {
    const chosen = document.getElementById("chosen");
    chosen.textContent = `${button.textContent}: a good choice. (This is a demo.)`;
  });

document.getElementById("letter")?.addEventListener("submit", (event) => {
  event.preventDefault();
  event.target.reset();
  document.getElementById("sent").textContent = "Thank you! (This is a demo: nothing was sent.)";
});

const account = document.getElementById("account");
account.querySelector("button").addEventListener("click", () => {
  account.textContent = "Your account is deleted. (This is a demo: there was none.)";
});
