// The reader's choice of light or dark, before the first paint; the system's choice without one.
"use strict";
(() => {
  const root = document.documentElement;
  const chosen = localStorage.getItem("pilaf-theme");
  if (chosen) root.dataset.theme = chosen;
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const dark = getComputedStyle(root).colorScheme === "dark" ||
        (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
      root.dataset.theme = dark ? "light" : "dark";
      localStorage.setItem("pilaf-theme", root.dataset.theme);
      dispatchEvent(new Event("pilaf:theme"));
    });
  });
})();
