// Labelling by keyboard. An answer is shown as saved only when the server has said so; until then it is sent again.
"use strict";
(() => {
  const area = document.getElementById("labelling");
  const task = document.getElementById("task");
  const token = document.querySelector('meta[name="form-token"]').content;
  let busy = false;
  let shown = performance.now();
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const say = (text, kind = "") => {
    const notice = document.getElementById("notice");
    notice.textContent = text;
    notice.dataset.kind = kind;
  };

  async function send(path, form) {
    for (let attempt = 0; ; attempt++) {
      let answer = null;
      try {
        answer = await fetch(path, { method: "POST", body: form, headers: { "X-Form-Token": token }, signal: AbortSignal.timeout(15000) });
      } catch { /* no connection */ }
      if (answer && answer.status < 500 && answer.status !== 429) return answer;
      say("Not saved yet: the console does not answer. It is sent again by itself; keep this page open.", "bad");
      await pause(Math.min(8000, 500 * 2 ** attempt));
    }
  }

  function replace(html) {
    task.innerHTML = html;
    htmx.process(task);
    shown = performance.now();
  }

  async function act(path, form) {
    if (busy) return;
    busy = true;
    task.setAttribute("aria-busy", "true");
    for (const button of task.querySelectorAll("button")) button.disabled = true;
    try {
      const answer = await send(path, form);
      const text = await answer.text();
      if (answer.ok) return replace(text);
      if (answer.status === 401 || answer.status === 403) {
        say("Your answer was not saved: your token is not valid any more.", "bad");
        return;
      }
      replace(await (await fetch("/label/task")).text());
      say("That answer was not saved: the pair is no longer yours. Here is another one.", "bad");
    } finally {
      busy = false;
      task.removeAttribute("aria-busy");
      for (const button of task.querySelectorAll("button")) button.disabled = false;
    }
  }

  function answer(choice) {
    const form = document.getElementById("answer");
    if (!form) return;
    const fields = new FormData(form);
    const reason = document.getElementById("reason");
    if (choice === "skip" && !reason.value.trim()) {
      say("Say in a few words why you skip it, then press Enter.");
      reason.focus();
      reason.dataset.skip = "yes";
      return;
    }
    fields.set("choice", choice);
    fields.set("seconds", ((performance.now() - shown) / 1000).toFixed(1));
    act("/label/answer", fields);
  }

  area.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.choice) answer(button.dataset.choice);
    else if ("skip" in button.dataset) answer("skip");
    else if ("undo" in button.dataset) act("/label/undo", new FormData());
  });
  area.addEventListener("submit", (event) => event.preventDefault());

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const field = event.target.closest("input, select, textarea");
    if (field) {
      if (event.key === "Escape") { delete field.dataset.skip; field.blur(); }
      if (event.key === "Enter" && field.id === "reason") {
        event.preventDefault();
        if (field.dataset.skip) answer("skip");
        else field.blur();
      }
      return;
    }
    const button = [...task.querySelectorAll("button[data-choice]")].find((b) => b.querySelector("kbd").textContent === event.key);
    if (button) answer(button.dataset.choice);
    else if (event.key === "s") { event.preventDefault(); answer("skip"); }
    else if (event.key === "u") act("/label/undo", new FormData());
    else if (event.key === "r") { const reason = document.getElementById("reason"); if (reason) { event.preventDefault(); reason.focus(); } }
    else if (event.key === "g" || event.key === "?") {
      const part = document.querySelector(event.key === "g" ? "#guidelines details" : "#keys");
      part.open = !part.open;
    }
  });

  setInterval(async () => {
    const form = document.getElementById("answer");
    if (!form || busy || document.hidden || Number(form.dataset.number) >= 2 ** 40) return;
    const fields = new FormData();
    fields.set("number", form.dataset.number);
    try { await fetch("/label/renew", { method: "POST", body: fields, headers: { "X-Form-Token": token } }); } catch { /* the answer itself will say */ }
  }, Number(area.dataset.renew) * 1000);
})();
