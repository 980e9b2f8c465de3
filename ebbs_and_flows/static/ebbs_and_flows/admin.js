"use strict";
// Puts newer content in the place of what may have changed, and copies tracebacks. Without this
// script the pages show the same; they only stay as they were when they were loaded.
(() => {
  const PERIOD = 4000;
  const MAX_FAILURES = 5;
  let failures = 0;

  function isInUse(element) {
    const selection = document.getSelection();
    const isSelected =
      selection !== null && !selection.isCollapsed && selection.containsNode(element, true);
    return isSelected || element.contains(document.activeElement);
  }

  function opened(element) {
    const states = new Map();
    for (const details of element.querySelectorAll("details[id]")) {
      states.set(details.id, details.open);
    }
    return states;
  }

  function replace(element, newer) {
    if (element.innerHTML === newer.innerHTML || isInUse(element)) {
      return;
    }
    const states = opened(element);
    element.replaceChildren(...newer.childNodes);
    for (const details of element.querySelectorAll("details[id]")) {
      details.open = states.get(details.id) ?? details.open;
    }
    showButtons(element);
  }

  async function refresh(root) {
    const response = await fetch(root.dataset.ebbsRefresh, { redirect: "error" });
    if (!response.ok) {
      throw new Error(response.statusText);
    }
    const newer = new DOMParser().parseFromString(await response.text(), "text/html");
    const contents = new Map();
    for (const element of newer.querySelectorAll("[data-ebbs-live]")) {
      contents.set(element.dataset.ebbsLive, element);
    }
    for (const element of document.querySelectorAll("[data-ebbs-live]")) {
      const content = contents.get(element.dataset.ebbsLive);
      if (content) {
        replace(element, content);
      }
    }
    const next = newer.querySelector("[data-ebbs-refresh]");
    if (next) {
      root.dataset.ebbsRefresh = next.dataset.ebbsRefresh;
    } else {
      delete root.dataset.ebbsRefresh;
    }
  }

  async function beat() {
    const root = document.querySelector("[data-ebbs-refresh]");
    if (!root) {
      return;
    }
    if (!document.hidden) {
      try {
        await refresh(root);
        failures = 0;
      } catch {
        // Logged out, or the server restarts: tried again a few times, more and more rarely.
        failures += 1;
      }
    }
    if (failures < MAX_FAILURES) {
      setTimeout(beat, PERIOD * (failures + 1));
    }
  }

  async function copy(button) {
    const text = document.getElementById(button.dataset.ebbsCopy).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // No secure context: the text is selected, to be copied by hand.
      document.getSelection().selectAllChildren(document.getElementById(button.dataset.ebbsCopy));
      return;
    }
    const label = button.textContent;
    button.textContent = button.dataset.ebbsCopied;
    setTimeout(() => {
      button.textContent = label;
    }, 2000);
  }

  function showButtons(element) {
    for (const button of element.querySelectorAll("button[data-ebbs-copy]")) {
      button.hidden = false;
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-ebbs-copy]");
    if (button) {
      copy(button);
    }
  });

  function start() {
    showButtons(document);
    setTimeout(beat, PERIOD);
  }

  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", start);
  } else {
    start();
  }
})();
