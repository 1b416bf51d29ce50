// The page as a whole: its parts, settings, two pages in tabs, and the server's state.
(function (mico) {
  const { el } = mico;
  // While the server is away it is looked for again and again. While it is there it is looked at
  // rarely: whatever is asked of it tells sooner that it has gone.
  const AWAY_MS = 4000;
  const ANSWERING_MS = 15000; // an answer that never goes on asks for nothing
  const CALM_MS = 120000;

  mico.start = function (root, server, known) {
    Object.assign(mico, { root, server, ...known });
    root.classList.add("mico");
    root.append(el("div", { class: "quiet", role: "status", "aria-live": "polite" }));
    dress();
    mico.startModels();
    mico.startTurns();
    mico.startPrompt();
    mico.startComposer();
    mico.startLibrary();
    mico.startCompare();
    mico.startTalk();
    startTabs();
    startSettings();
    startKeys();
    window.addEventListener("hashchange", () => {
      const id = location.hash.slice(1);
      if (id && id !== mico.chat.id) mico.openConversation(id);
      else if (!id && mico.chat.id) mico.showConversation(null);
    });
    check();
    mico.on("away", () => away === false && !checking && check());
    mico.on("answering", checkLater);
    document.addEventListener("visibilitychange", () => document.hidden || Date.now() - checked < AWAY_MS || check());
    mico.emit("list", null);
    first();
  };

  // What is shown when the page opens: the conversation of its address, or the one of what was
  // asked and is not answered yet, or an empty chat.
  async function first() {
    const id = location.hash.slice(1) || mico.lastUnkept();
    mico.showConversation(null);
    try {
      const found = id && (await mico.load(id));
      if (found && !mico.chat.turns.length) mico.showConversation(found); // else something has been asked meanwhile
    } catch (error) {
      const { away, setting } = mico.problemOf(error);
      if (id && !away && !setting) mico.banner(error);
      else if (id) waiting = id;
    }
    mico.begun = true;
  }
  let waiting = null; // a conversation that could not be opened while the server was away, or asked for a key

  mico.say = (text) => (mico.root.querySelector(".quiet").textContent = text);

  // --- the server's state ---

  mico.banner = function (error) {
    mico.tell(mico.root.querySelector(".banner"), error);
    const problem = error && mico.problemOf(error);
    if (problem && !problem.away && !problem.setting) setTimeout(() => mico.banner(null), 8000);
  };

  let away = null, checking = false, checked = 0, next = null;
  function checkLater() {
    clearTimeout(next);
    next = setTimeout(check, away ? AWAY_MS : mico.isAnswering() ? ANSWERING_MS : CALM_MS);
  }

  mico.check = check;
  async function check() {
    if (document.hidden) return; // the next one is when the page is looked at
    checked = Date.now();
    checking = true;
    try {
      const state = await mico.call("health");
      mico.showModels(state.models);
      if (away !== false) {
        if (away) {
          if (mico.chat.id) mico.reopen();
          else if (!mico.chat.turns.length) mico.showConversation(null);
          mico.banner(null);
          mico.say("The server is back.");
        }
        away = false;
        mico.emit("server", mico.model());
        mico.emit("list", null);
        if (waiting) mico.openConversation(waiting);
        waiting = null;
      }
    } catch (error) {
      const problem = mico.problemOf(error);
      const words = problem.away ? { ...problem, advice: `${problem.advice} This page tries again every few seconds.` } : problem;
      mico.banner(new mico.Problem({ ...words, away: true }));
      if (problem.message.includes("own server")) mico.lost();
      away = true;
    }
    checking = false;
    checkLater();
  }

  // --- shortcuts ---

  function startKeys() {
    const help = mico.root.querySelector("dialog.help");
    mico.root.querySelector("[data-do=help]").addEventListener("click", () => help.showModal());
    const press = (name) => mico.root.querySelector(`[data-do=${name}]`).click();
    const withControl = { k: () => mico.searchConversations(), O: () => press("new-chat") };
    const alone = { "?": () => help.showModal(), "/": () => mico.root.querySelector("#mico-message").focus() };
    document.addEventListener("keydown", (event) => {
      if (mico.root.querySelector("dialog[open]")) return;
      const inText = event.target.closest?.("input, textarea, select");
      const found = event.ctrlKey || event.metaKey ? withControl[event.key] : !inText && !event.altKey && alone[event.key];
      if (!found) return;
      event.preventDefault();
      found();
    });
  }

  // --- tabs ---

  function startTabs() {
    const tabs = Array.from(mico.root.querySelectorAll("[role=tab]"));
    mico.showPage = function (page) {
      mico.page = page;
      for (const tab of tabs) {
        const on = tab.id === `mico-tab-${page}`;
        tab.setAttribute("aria-selected", String(on));
        tab.tabIndex = on ? 0 : -1;
        mico.root.querySelector(`#${tab.getAttribute("aria-controls")}`).hidden = !on;
      }
      mico.root.querySelector("h1").hidden = page !== "chat";
    };
    for (const [n, tab] of tabs.entries()) {
      tab.addEventListener("click", () => mico.showPage(tab.id.slice("mico-tab-".length)));
      tab.addEventListener("keydown", (event) => {
        if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
        const next = tabs[(n + 1) % tabs.length];
        next.focus();
        next.click();
      });
    }
    mico.showPage("chat");
  }

  // --- settings ---

  function dress() {
    const dark = { light: false, dark: true }[mico.settings.theme] ?? matchMedia("(prefers-color-scheme: dark)").matches;
    mico.root.dataset.theme = dark ? "dark" : "light";
    document.body.classList.toggle("dark", dark);
  }

  const ownWords = (value) => (value === undefined || value === null || value === "" ? "the model's own" : `the model's own: ${value}`);

  function startSettings() {
    const dialog = mico.root.querySelector("dialog.settings");
    const form = dialog.querySelector("form");
    const open = mico.root.querySelector("[data-do=settings]");
    open.append(mico.icon("gear"), "Settings");
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);
    const show = () => (form.elements["temperature-shown"].value = form.elements.temperature.value);
    const numbers = ["max_tokens", "top_p", "repetition_penalty", "seed"]; // left empty: the model's own
    // What is out of its bounds is not kept.
    const number = ({ value, validity }, old) => (!validity.valid ? old : value === "" ? null : Number(value));
    // Opens at one of its fields, if that is named.
    mico.openSettings = (field) => {
      for (const name of ["temperature", "system", "key", "recordings", "theme", ...numbers]) form.elements[name].value = mico.settings[name] ?? "";
      for (const name of ["max_tokens", "top_p", "repetition_penalty", "system"]) form.elements[name].placeholder = ownWords(mico.model()?.defaults?.[name]);
      show();
      dialog.showModal();
      if (field) form.elements[field].focus();
    };
    open.addEventListener("click", () => mico.openSettings());
    form.elements.temperature.addEventListener("input", show);
    form.elements.theme.addEventListener("change", () => {
      mico.settings.theme = form.elements.theme.value;
      dress();
    });
    dialog.addEventListener("close", () => {
      const value = (name) => form.elements[name].value;
      mico.settings = {
        ...mico.settings,
        temperature: Number(value("temperature")),
        ...Object.fromEntries(numbers.map((name) => [name, number(form.elements[name], mico.settings[name])])),
        system: value("system"),
        key: value("key").trim(),
        recordings: value("recordings"),
        theme: value("theme"),
      };
      mico.keep("mico-settings", mico.settings);
      if (!away) away = null; // another key has other conversations
      check();
      mico.emit("conversation", mico.chat.id);
    });
  }
})(window.mico);
