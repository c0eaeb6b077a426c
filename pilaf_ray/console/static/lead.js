// The lead's buttons: one request each, and the page as the server then sees it.
"use strict";
(() => {
  const token = document.querySelector('meta[name="form-token"]').content;
  async function post(path, fields) {
    const answer = await fetch(path, { method: "POST", body: fields, headers: { "X-Form-Token": token } });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.getElementById("lead") || page.getElementById("main");
    document.getElementById("lead").replaceWith(document.adoptNode(fresh));
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-act]");
    if (!button) return;
    const fields = new FormData();
    fields.set("name", button.dataset.name);
    fields.set("action", button.dataset.act);
    post("/lead/act", fields);
  });
  document.addEventListener("submit", (event) => {
    if (event.target.id !== "invite") return;
    event.preventDefault();
    post("/lead/invite", new FormData(event.target));
  });
})();
