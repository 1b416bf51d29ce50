// The page as a whole: its parts, settings, two pages in tabs, and the server's state.
(function (mico) {
  const { el } = mico;
  const CHECK_MS = 4000;

  mico.start = function (root, trigger, props, server, upload, watch) {
    Object.assign(mico, { root, trigger, server, upload });
    root.classList.add("mico");
    root.append(el("div", { class: "quiet", role: "status", "aria-live": "polite" }));
    dress();
    mico.startTurns();
    mico.startComposer();
    mico.startLibrary();
    mico.startCompare();
    startTabs();
    startSettings();
    watch("value", () => mico.grow(props.value));
    window.addEventListener("hashchange", () => {
      const id = location.hash.slice(1);
      if (id && id !== mico.chat.id) mico.openConversation(id);
    });
    check();
    setInterval(check, CHECK_MS);
    document.addEventListener("visibilitychange", () => document.hidden || check());
    mico.emit("list", null);
    first();
  };

  // What is shown when the page opens: the conversation of its address, or what was asked and is
  // not answered yet, or an empty chat.
  async function first() {
    const asking = mico.kept("mico-asking", null);
    const id = location.hash.slice(1) || null;
    mico.showConversation(null);
    try {
      if (id) mico.showConversation(await mico.call("open", { id }));
      if (asking) await resume(asking);
    } catch (error) {
      const { away, setting } = mico.problemOf(error);
      if (id && !away && !setting) mico.banner(error);
      else if (id) waiting = id;
    }
  }
  let waiting = null; // a conversation that could not be opened while the server was away, or asked for a key

  async function resume(asking) {
    mico.keep("mico-asking", null);
    const page = asking.conversation_id ? null : await mico.call("conversations", { query: "", before: null });
    const id = asking.conversation_id || page.data[0]?.id;
    const found = id ? await mico.call("open", { id }) : null;
    const answered = found?.turns.at(-1)?.message === asking.message;
    if (answered) mico.showConversation(found);
    else if (!mico.root.querySelector("#mico-message").value) mico.draft(asking.message, asking.media);
  }

  mico.say = (text) => (mico.root.querySelector(".quiet").textContent = text);

  // --- the server's state ---

  mico.banner = function (error) {
    mico.tell(mico.root.querySelector(".banner"), error);
    const problem = error && mico.problemOf(error);
    if (problem && !problem.away && !problem.setting) setTimeout(() => mico.banner(null), 8000);
  };

  let away = null;
  async function check() {
    if (document.hidden) return;
    try {
      const state = await mico.call("health");
      const was = mico.served?.id;
      mico.served = state;
      mico.root.querySelector(".model").textContent = `${state.id} · ${state.context_length} tokens`;
      if (away !== false) {
        if (away) {
          if (!mico.chat.turns.length) mico.showConversation(null);
          mico.banner(null);
          mico.say("The server is back.");
        }
        away = false;
        mico.emit("server", state);
        mico.emit("list", null);
        if (waiting) mico.openConversation(waiting);
        waiting = null;
      }
      if (was !== state.id) fillModels(state);
    } catch (error) {
      const problem = mico.problemOf(error);
      const words = problem.away ? { ...problem, advice: `${problem.advice} Trying again every few seconds.` } : problem;
      mico.banner(new mico.Problem({ ...words, away: true }));
      if (problem.message.includes("own server")) mico.lost();
      away = true;
    }
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

  function fillModels(state) {
    const select = mico.root.querySelector("select[name=model]");
    select.replaceChildren(...state.models.map((id) => el("option", { value: id }, id)));
    select.value = state.models.includes(mico.settings.model) ? mico.settings.model : state.id;
  }

  function dress() {
    const dark = { light: false, dark: true }[mico.settings.theme] ?? matchMedia("(prefers-color-scheme: dark)").matches;
    mico.root.dataset.theme = dark ? "dark" : "light";
    document.body.classList.toggle("dark", dark);
  }

  function startSettings() {
    const dialog = mico.root.querySelector("dialog.settings");
    const form = dialog.querySelector("form");
    const open = mico.root.querySelector("[data-do=settings]");
    open.append(mico.icon("gear"), "Settings");
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);
    const show = () => (form.elements["temperature-shown"].value = form.elements.temperature.value);
    // Opens at one of its fields, if that is named.
    mico.openSettings = (field) => {
      for (const name of ["temperature", "max_tokens", "system", "key", "theme"]) form.elements[name].value = mico.settings[name];
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
        model: value("model"),
        temperature: Number(value("temperature")),
        max_tokens: Math.max(1, Math.round(Number(value("max_tokens")) || 256)),
        system: value("system"),
        key: value("key").trim(),
        theme: value("theme"),
      };
      mico.keep("mico-settings", mico.settings);
      if (!away) away = null; // another key has other conversations
      check();
      mico.emit("conversation", mico.chat.id);
    });
  }
})(window.mico);
