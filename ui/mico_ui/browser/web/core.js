// What all parts of the page use: elements, icons, what the browser keeps, calls to Python.
"use strict";
window.mico = { parts: [] };

(function (mico) {
  // An element; attributes named on... are listeners, and false or null ones are left out.
  // Texts become text nodes: nothing of a user's or the model's is ever read as HTML here.
  mico.el = function (tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === false || value === null || value === undefined) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  };

  const PATHS = {
    plus: "M12 5v14M5 12h14",
    clip: "M21 11.5 12.5 20a5.5 5.5 0 0 1-8-8L13 3.500a3.700 3.700 0 0 1 5.300 5.300l-8.400 8.400a1.800 1.800 0 0 1-2.600-2.600l7.700-7.700",
    mic: "M12 3a3 3 0 0 0-3 3v6a3 3 0 0 0 6 0V6a3 3 0 0 0-3-3zM5 11a7 7 0 0 0 14 0M12 18v3",
    talk: "M4 10v4M8 7v10M12 4v16M16 7v10M20 10v4",
    camera: "M4 8h3l2-3h6l2 3h3v11H4zM12 17a3.500 3.500 0 1 0 0-7 3.500 3.500 0 0 0 0 7z",
    send: "M12 19V5M6 11l6-6 6 6",
    stop: "M7 7h10v10H7z",
    menu: "M4 7h16M4 12h16M4 17h16",
    close: "M6 6l12 12M18 6L6 18",
    gear: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
    more: "M6 12h.01M12 12h.01M18 12h.01",
    copy: "M9 9h11v11H9zM15 9V4H4v11h5",
    retry: "M20 11a8 8 0 1 0-2.300 6.300M20 5v6h-6",
    edit: "M4 20l1-4L16 5l3 3L8 19z",
    trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
    depth: "M3 8l9-5 9 5-9 5zM3 12l9 5 9-5M3 16l9 5 9-5",
    pin: "M9 3h6l-1 7 4 3v2H6v-2l4-3zM12 15v6",
    prompt: "M4 5h16v11H9l-5 4zM8 9h8M8 12h5",
    down: "M7 10l5 5 5-5",
    play: "M8 5l11 7-11 7z",
    speaker: "M4 9v6h4l5 4V5L8 9zM16.500 9a4 4 0 0 1 0 6M19 6.500a8 8 0 0 1 0 11",
    info: "M12 8h.01M12 11v5M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z",
    why: "M9 9a3 3 0 1 1 4.200 2.700c-.800.400-1.200 1-1.200 1.900v.900M12 17.500h.01M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z",
  };
  mico.icon = function (name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("aria-hidden", "true");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", PATHS[name]);
    svg.append(path);
    return svg;
  };
  mico.button = (icon, label, onclick, more = {}) =>
    mico.el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...more }, mico.icon(icon));

  // --- what the browser keeps ---

  // What is being written belongs to its tab, all else to the browser.
  const storage = (name) => (/-(draft|edit)$/.test(name) ? sessionStorage : localStorage);
  const read = (name, otherwise) => {
    try {
      return JSON.parse(storage(name).getItem(name)) ?? otherwise;
    } catch {
      return otherwise;
    }
  };
  mico.keep = function (name, value) {
    try {
      if (value === null) storage(name).removeItem(name);
      else storage(name).setItem(name, JSON.stringify(value));
    } catch (error) {
      console.warn(`${name} is not kept: ${error.message}`); // full, or switched off
    }
  };
  mico.kept = read;

  function newUser() {
    const bytes = crypto.getRandomValues(new Uint8Array(18));
    return "b-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  }
  const user = read("mico-user", null) || newUser();
  mico.keep("mico-user", user);
  // null: the model's own.
  const DEFAULTS = { key: "", temperature: 0, max_tokens: null, top_p: null, repetition_penalty: null, seed: null, system: "", recordings: "true", theme: "system", model: "", second: "" };
  mico.settings = { ...DEFAULTS, ...read("mico-settings", {}) };
  mico.chosen = ""; // the model that is asked; empty where the server has one
  mico.profile = () => ({ ...mico.settings, model: mico.chosen, user });

  // --- calls to Python ---

  // A problem is {message, advice, away, setting}: the server's own reason, what the user can do, and
  // the setting that mends it.
  mico.Problem = class extends Error {
    constructor(problem) {
      super(problem.message);
      this.problem = problem;
    }
  };
  const LOST = {
    message: "This page's own server does not answer.",
    advice: "Check that mico-chat ui still runs. Everything that you sent is kept.",
    away: true,
  };
  // The functions of Gradio's component, by their names.
  const session = newUser();
  mico.serverOf = (component) =>
    new Proxy({}, {
      get: (_, name) => async (data) => {
        const body = JSON.stringify({ data, component_id: component, fn_name: name, session_hash: session });
        const sent = { method: "POST", headers: { "content-type": "application/json" }, body };
        return fetch("gradio_api/component_server/", sent).then((answer) => answer.json()).catch(() => null);
      },
    });
  mico.lostServer = () => new mico.Problem(LOST);
  mico.call = async function (name, data = {}) {
    const answer = await mico.server[name]({ ...data, profile: mico.profile() });
    if (answer?.problem) throw mico.failed(answer.problem);
    if (answer?.value === undefined) throw mico.failed(LOST);
    return answer.value;
  };
  // Whoever watches the server's state looks again when it could not be reached.
  mico.failed = function (problem) {
    if (problem.away) mico.emit("away");
    return new mico.Problem(problem);
  };
  mico.problemOf = (error) =>
    error instanceof mico.Problem ? error.problem : { message: String(error.message || error), advice: "", away: false };
  mico.tell = function (place, error) {
    place.hidden = !error;
    const problem = error ? mico.problemOf(error) : null;
    const told = JSON.stringify(problem);
    if (place.dataset.told === told) return; // whoever is about to press its button keeps it
    place.dataset.told = told;
    place.replaceChildren(...(problem ? [mico.el("strong", {}, problem.message), " ", problem.advice] : []));
    if (problem?.setting) place.append(" ", mico.el("button", { type: "button", onclick: () => mico.openSettings(problem.setting) }, "Open Settings"));
  };

  // --- small things ---

  // Shows in `place` how many minutes and seconds have passed, until the function it gives is called.
  mico.timer = function (place) {
    const began = performance.now();
    const show = () => {
      const seconds = Math.floor((performance.now() - began) / 1000);
      place.textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    };
    show();
    place.hidden = false;
    const ticks = setInterval(show, 250);
    return () => {
      clearInterval(ticks);
      place.hidden = true;
    };
  };
  mico.later = function (work, ms) {
    let timer = null;
    return () => {
      clearTimeout(timer);
      timer = setTimeout(work, ms);
    };
  };
  mico.confirm = function (text, action) {
    const dialog = mico.root.querySelector("dialog.confirm");
    dialog.querySelector("p").textContent = text;
    dialog.querySelector("[value=yes]").textContent = action;
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise((resolve) =>
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }),
    );
  };
  mico.save = function (file) {
    const url = URL.createObjectURL(new Blob([file.text], { type: file.type }));
    mico.el("a", { href: url, download: file.name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  };
  // A <details> as a menu: Escape and a click elsewhere close it.
  mico.menu = function (menu) {
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation();
      menu.open = false;
      menu.querySelector("summary").focus();
    });
    document.addEventListener("click", (event) => menu.contains(event.target) || (menu.open = false));
  };
  // The kinds that a device records and that the chosen model reads.
  mico.recorded = (recorder) => mico.reads().find((kind) => mico.kinds[kind].recorder === recorder);
  // A card as it is kept in the browser: without its pictures, which are made anew.
  mico.bare = ({ id, kind, name, tokens, kinds, facts }) => ({ id, kind, name, tokens, kinds, facts, pictures: [], cut: [] });
  mico.events = new EventTarget();
  mico.on = (name, listener) => mico.events.addEventListener(name, (event) => listener(event.detail));
  mico.emit = (name, detail) => mico.events.dispatchEvent(new CustomEvent(name, { detail }));
})(window.mico);
