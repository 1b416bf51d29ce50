// The conversations at the side: opened, searched, renamed, exported, deleted.
(function (mico) {
  const { el } = mico;
  let side, list, note, search, more;
  let last = null, archive = false;

  mico.startLibrary = function () {
    side = mico.root.querySelector(".side");
    [list, note, search, more] = [".conversations", ".side-note", ".search", ".more"].map((one) => side.querySelector(one));
    const act = (name, work) => mico.root.querySelectorAll(`[data-do=${name}]`).forEach((one) => one.addEventListener("click", work));
    side.querySelector("[data-do=new-chat]").append(mico.icon("plus"), "New chat");
    mico.root.querySelector(".bar [data-do=new-chat]").append(mico.icon("plus"));
    mico.root.querySelector("[data-do=open-side]").append(mico.icon("menu"));
    side.querySelector("[data-do=close-side]").append(mico.icon("close"));
    act("new-chat", () => {
      mico.showConversation(null);
      mico.showPage("chat");
      open(false);
      mico.root.querySelector("#mico-message").focus();
    });
    act("open-side", () => open(true));
    act("close-side", () => open(false));
    act("more", () => refresh(true));
    search.addEventListener("input", mico.later(() => refresh(), 250));
    list.addEventListener("scroll", closeMenus);
    side.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      const menu = side.querySelector("details.menu[open]");
      if (menu) menu.firstChild.focus();
      else if (side.classList.contains("open")) open(false);
      closeMenus();
    });
    document.addEventListener("click", (event) => !event.target.closest("details.menu") && closeMenus());
    mico.on("list", () => refresh());
    mico.on("conversation", mark);
    watch();
    const [menu, input] = [side.querySelector(".all-chats"), side.querySelector(".imported")];
    menu.firstElementChild.append(mico.icon("more"));
    mico.menu(menu);
    act("archive", () => {
      [menu.open, archive, search.value] = [false, !archive, ""];
      side.querySelector(".in-archive").hidden = !archive;
      menu.querySelector("[data-do=archive]").textContent = archive ? "Back to the chats" : "Archive";
      refresh();
    });
    act("export-all", () => {
      menu.open = false;
      exportAll();
    });
    act("export-preferences", async () => {
      menu.open = false;
      try {
        mico.save(await mico.call("preferences"));
      } catch (error) {
        mico.banner(error);
      }
    });
    act("import", () => {
      menu.open = false;
      input.click();
    });
    input.addEventListener("change", () => {
      bring(input.files[0]);
      input.value = "";
    });
  };

  // All chats in one file, which `bring` reads.
  async function exportAll() {
    const texts = [];
    try {
      for (let before = null, more = true; more; ) {
        const page = await mico.call("conversations", { query: "", before, archived: null });
        for (const one of page.data) texts.push((await mico.call("export", { id: one.id, form: "json" })).text);
        before = page.data.at(-1)?.id;
        more = page.has_more;
        note.textContent = `${texts.length} chats exported`;
      }
      mico.save({ name: "chats.json", type: "application/json", text: `[${texts.join(",\n")}]` });
    } catch (error) {
      mico.banner(error);
    }
  }

  async function bring(file) {
    try {
      const path = await mico.upload(file);
      const ids = await mico.call("bring", { file: { path, name: file.name } });
      mico.say(ids.length === 1 ? "1 chat imported." : `${ids.length} chats imported.`);
      await show(ids[0]);
    } catch (error) {
      mico.banner(error);
    }
    refresh();
  }

  // Chats change in other tabs, browsers and programs too. A tab that nobody sees does not ask.
  async function watch() {
    let known = "";
    for (;;) {
      if (document.hidden) await new Promise((seen) => document.addEventListener("visibilitychange", seen, { once: true }));
      try {
        const state = await mico.call("changes", { known });
        if (known && state !== known) {
          mico.emit("list", null);
          mico.emit("changed", null);
        }
        known = state;
      } catch {
        await new Promise((done) => setTimeout(done, 4000)); // `check` says why
      }
    }
  }

  mico.searchConversations = function () {
    if (getComputedStyle(side).visibility === "hidden") open(true);
    search.select();
    search.focus();
  };

  function open(on) {
    side.classList.toggle("open", on);
    mico.root.querySelector("[data-do=open-side]").setAttribute("aria-expanded", String(on));
    if (on) side.querySelector("[data-do=close-side]").focus();
    else if (side.contains(document.activeElement)) mico.root.querySelector("[data-do=open-side]").focus();
  }

  function closeMenus() {
    side.querySelectorAll("details.menu[open]").forEach((menu) => (menu.open = false));
  }

  async function refresh(older = false) {
    try {
      const page = await mico.call("conversations", { query: search.value, before: older ? last : null, archived: archive });
      if (list.querySelector("li input")) return; // a title is being written
      // A conversation stays as it is while its menu is open or has the focus.
      const focused = document.activeElement;
      const used = [...list.querySelectorAll("li")].find((one) => one.querySelector("details[open]") || one.contains(focused));
      if (!older) list.replaceChildren();
      for (const one of page.data) group(one).append(one.id === used?.dataset.id ? used : item(one));
      if (used?.contains(focused)) focused.focus();
      last = page.data.at(-1)?.id || last;
      more.hidden = !page.has_more;
      const shown = list.childElementCount;
      note.textContent = shown ? "" : search.value ? "No conversation has this text." : archive ? "Archived chats appear here." : "Your conversations appear here.";
      const current = page.data.find((one) => one.id === mico.chat.id);
      if (current && current.title !== mico.chat.title && mico.stays(current.id)) {
        mico.chat.title = current.title;
        mico.showTitle();
      }
      mark();
    } catch (error) {
      if (!mico.problemOf(error).away) note.textContent = mico.problemOf(error).message;
    }
  }

  // The list of the pinned conversations, or of those of the same time: the last one, or a new one.
  function group({ pinned, updated_at: seconds }) {
    const name = pinned ? "Pinned" : when(new Date(1000 * seconds));
    let found = list.lastElementChild;
    if (found?.getAttribute("aria-label") !== name) {
      found = el("ul", { "aria-label": name });
      list.append(el("p", { class: "when", "aria-hidden": "true" }, name), found);
    }
    return found;
  }

  function when(date) {
    const midnight = new Date().setHours(0, 0, 0, 0);
    const days = Math.round((midnight - new Date(date).setHours(0, 0, 0, 0)) / 86400000);
    if (days <= 0) return "Today";
    if (days === 1) return "Yesterday";
    if (days < 7) return "Last 7 days";
    if (days < 30) return "Last 30 days";
    return date.toLocaleDateString("en", { month: "long", year: "numeric" });
  }

  function mark() {
    for (const one of list.querySelectorAll("li")) {
      const button = one.querySelector(".open");
      if (one.dataset.id === mico.chat.id) button?.setAttribute("aria-current", "true");
      else button?.removeAttribute("aria-current");
    }
  }

  function item(one) {
    const button = el("button", { type: "button", class: "open", title: one.title, onclick: () => show(one.id) }, one.title, one.archived && !archive && el("small", {}, " (archived)"));
    const choice = (label, work) => el("button", { type: "button", onclick: () => { closeMenus(); work(); } }, label);
    const element = el("li", { "data-id": one.id }, button);
    const menu = el(
      "details",
      { class: "menu" },
      el("summary", { "aria-label": `More about ${one.title}`, title: "More" }, mico.icon("more")),
      el(
        "div",
        { class: "menu-list" },
        choice("Rename", () => rename(element, one)),
        choice("Share as a page", () => save(one, "html")),
        choice(one.pinned ? "Unpin" : "Pin", () => change(one, { pinned: !one.pinned })),
        choice(one.archived ? "Bring back" : "Archive", () => change(one, { archived: !one.archived })),
        choice("Export as Markdown", () => save(one, "markdown")),
        choice("Export as JSON", () => save(one, "json")),
        choice("Delete", () => remove(one)),
      ),
    );
    // The list scrolls and would cut the menu off, so it is placed in the window.
    menu.addEventListener("toggle", () => {
      if (!menu.open) return;
      side.querySelectorAll("details.menu[open]").forEach((other) => (other.open = other === menu));
      const [box, choices] = [menu.firstChild.getBoundingClientRect(), menu.lastChild];
      choices.style.left = `${Math.max(8, Math.min(box.left, innerWidth - choices.offsetWidth - 8))}px`;
      choices.style.top = `${Math.min(box.bottom + 2, innerHeight - choices.offsetHeight - 8)}px`;
      choices.firstChild.focus();
    });
    element.append(menu);
    return element;
  }

  async function show(id) {
    try {
      mico.showConversation(await mico.load(id));
      mico.showPage("chat");
      open(false);
      mico.root.querySelector("#mico-message").focus({ preventScroll: true });
    } catch (error) {
      mico.banner(error);
      mico.showTitle(); // the address is again that of the chat that is shown
      refresh();
    }
  }
  mico.openConversation = show;

  function rename(element, one) {
    const input = el("input", { "aria-label": "New title", value: one.title, maxlength: 200 });
    let done = false;
    const end = async (keep) => {
      if (done) return;
      done = true;
      input.remove();
      const title = input.value.trim();
      try {
        if (keep && title && title !== one.title) await mico.call("change", { id: one.id, changes: { title } });
      } catch (error) {
        mico.banner(error);
      }
      await again(one);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") end(false);
    });
    input.addEventListener("blur", () => end(true));
    element.replaceChildren(input);
    input.select();
    input.focus();
  }

  async function change(one, changes) {
    try {
      await mico.call("change", { id: one.id, changes });
      find(one)?.remove(); // its menu is out of date
      mico.say("archived" in changes ? (changes.archived ? "Archived." : "Brought back.") : changes.pinned ? "Pinned." : "Unpinned.");
    } catch (error) {
      mico.banner(error);
    }
    await again(one);
  }

  const find = (one) => list.querySelector(`[data-id="${CSS.escape(one.id)}"]`);

  // Show the list anew, with the focus on one of its conversations, if it is still there.
  async function again(one) {
    await refresh();
    (find(one)?.querySelector(".open") || side.querySelector("[data-do=new-chat]")).focus();
  }

  async function save(one, form) {
    try {
      mico.save(await mico.call("export", { id: one.id, form }));
    } catch (error) {
      mico.banner(error);
    }
  }

  async function remove(one) {
    if (!(await mico.confirm(`Delete "${one.title}" with its media? This cannot be undone.`, "Delete"))) return;
    try {
      await mico.call("delete", { id: one.id });
      mico.forgetIn(one.id);
      if (one.id === mico.chat.id) mico.showConversation(null);
      await refresh();
      side.querySelector("[data-do=new-chat]").focus();
      mico.say("Deleted.");
    } catch (error) {
      mico.banner(error);
    }
  }
})(window.mico);
