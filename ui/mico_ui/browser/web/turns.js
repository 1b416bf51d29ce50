// The messages: questions with their media, answers as they grow, and what can be done with both.
(function (mico) {
  const { el, button } = mico;
  let log, pinned = true;

  // A turn is the view that Python makes (turns.py), and `element`, where it is shown.
  mico.chat = { id: null, title: "", turns: [] };

  mico.startTurns = function () {
    log = mico.root.querySelector(".log");
    log.addEventListener("scroll", () => {
      pinned = mico.chat.turns.length > 0 && log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    });
    // Pictures that come late make the page longer.
    new ResizeObserver(follow).observe(log);
    log.addEventListener("load", follow, true);
  };

  function follow() {
    if (pinned) log.scrollTop = log.scrollHeight;
  }

  mico.showConversation = function (conversation) {
    mico.chat = { id: conversation?.id || null, title: conversation?.title || "", turns: [] };
    log.replaceChildren();
    pinned = true;
    for (const view of conversation?.turns || []) addTurn(view);
    if (!mico.chat.turns.length) {
      pinned = false;
      mico.showWelcome(log);
    }
    mico.showTitle();
    follow();
  };

  mico.showTitle = function () {
    mico.root.querySelector("h1").textContent = mico.chat.title || "New chat";
    document.title = mico.chat.title ? `${mico.chat.title} - MiCo-Chat` : "MiCo-Chat";
    const hash = mico.chat.id ? `#${mico.chat.id}` : "";
    history.replaceState(null, "", location.pathname + location.search + hash);
    mico.emit("conversation", mico.chat.id);
  };

  function addTurn(view) {
    if (!mico.chat.turns.length) log.replaceChildren();
    const turn = { view, element: el("article", { class: "turn" }) };
    mico.chat.turns.push(turn);
    log.append(turn.element);
    drawQuestion(turn);
    drawAnswer(turn);
    return turn;
  }

  // --- asking ---

  let running = null;
  mico.isAnswering = () => running !== null;

  // Ask; `replaces` is the turn that is asked again, with all after it. `begun` is the view of an
  // answer that goes on.
  mico.ask = function (message, cards, replaces = null, begun = null) {
    if (running) return;
    if (replaces !== null) dropFrom(mico.chat.turns.findIndex((turn) => turn.view.turn === replaces));
    const view = { ask: Math.random().toString(36).slice(2), state: "waiting", message, media: cards, answer: "", html: "", turn: null, usage: null, problem: null, finish_reason: "" };
    view.html = begun?.html || "";
    pinned = true;
    running = addTurn(view);
    const asked = { ask: view.ask, message, media: cards.map(({ id, kind }) => ({ id, kind })), conversation_id: mico.chat.id, replaces, prefix: begun?.answer || "" };
    // Until it is answered, a reload finds it here.
    mico.keep("mico-asking", { message, media: cards.map(mico.bare), conversation_id: mico.chat.id });
    mico.trigger.ask({ asked, profile: mico.profile() });
    mico.emit("answering", true);
    follow();
  };

  mico.stop = function () {
    if (running) mico.call("stop", { ask: running.view.ask }).catch(() => undefined);
  };

  // The next state of the answer that is under way.
  mico.grow = function (view) {
    if (!running || !view || view.ask !== running.view.ask) return;
    const cards = view.media.map((card) => ({ ...card, cut: [...card.cut], pictures: card.pictures.length ? card.pictures : running.view.media.find((old) => old.id === card.id)?.pictures || [] }));
    // Until there are words, an answer that goes on shows those that it had.
    running.view = { ...view, html: view.html || running.view.html, message: running.view.message, media: cards.length ? cards : running.view.media };
    drawAnswer(running);
    follow();
    if (["done", "stopped", "error"].includes(view.state)) finish(view);
  };

  // The page's own server broke the stream off.
  mico.lost = function () {
    if (running) mico.grow({ ...running.view, state: "error", problem: new mico.Problem({ message: "The answer broke off.", advice: "Ask again when the server is back; the question is kept.", away: true }).problem });
  };

  async function finish(view) {
    const turn = running;
    running = null;
    drawQuestion(turn);
    if (view.problem?.away) mico.emit("away");
    if (view.state !== "error") mico.keep("mico-asking", null);
    const isNew = view.conversation_id && view.conversation_id !== mico.chat.id;
    if (view.conversation_id) mico.chat.id = view.conversation_id;
    mico.emit("answering", false);
    if (isNew) mico.showTitle();
    mico.emit("list", null);
  }

  function dropFrom(index) {
    if (index < 0) return;
    for (const turn of mico.chat.turns.splice(index)) turn.element.remove();
  }

  // --- drawing ---

  function drawQuestion(turn) {
    const { view } = turn;
    const said = el("div", { class: "said" }, view.message);
    const busy = running === turn;
    const actions = el(
      "div",
      { class: "actions" },
      button("edit", "Edit the question", () => edit(turn), { disabled: busy }),
      button("copy", "Copy the question", (event) => copy(event, view.message)),
      button("trash", "Delete from here", () => remove(turn), { disabled: busy }),
    );
    const question = el("div", { class: "question" }, view.media.length ? el("div", { class: "cards" }, view.media.map(mico.smallCard)) : null, view.message && said, actions);
    const old = turn.element.querySelector(".question");
    if (old) old.replaceWith(question);
    else turn.element.prepend(question);
  }

  function drawAnswer(turn) {
    const { view } = turn;
    if (!turn.answer) {
      turn.text = el("div", { class: "text" });
      turn.after = el("div", { class: "after" });
      turn.answer = el("div", { class: "answer" }, turn.text, turn.after);
      turn.element.append(turn.answer);
    }
    const busy = view.state === "waiting" || view.state === "answering";
    turn.answer.setAttribute("aria-busy", String(busy));
    if (view.html !== turn.shown) {
      turn.text.innerHTML = view.html; // from markup.py, which lets no HTML of an answer through
      for (const link of turn.text.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
      for (const pre of turn.text.querySelectorAll("pre")) codeBlock(pre);
      turn.shown = view.html;
    }
    turn.text.classList.toggle("growing", view.state === "answering");
    if (view.state === "waiting") {
      const what = view.media_total ? "answering" : view.media.length ? "looking and listening" : "thinking";
      turn.after.replaceChildren(el("span", { class: "waiting" }, what, el("span", { class: "dots", "aria-hidden": "true" })));
      return;
    }
    if (busy) {
      turn.after.replaceChildren();
      return;
    }
    const limit = view.usage ? `the ${view.usage.completion_tokens}-token limit` : "the limit of tokens";
    const notes = { length: `Stopped at ${limit}. Raise it in Settings.`, cancelled: view.answer ? "Stopped." : "Stopped before the first word. The question is not kept." };
    const note = notes[view.finish_reason];
    const problem = view.problem && el("p", { class: "problem", role: "alert" });
    if (problem) mico.tell(problem, new mico.Problem(view.problem));
    turn.after.replaceChildren(
      ...[
        note && el("p", { class: "note" }, note),
        view.finish_reason === "length" && el("button", { type: "button", class: "continue", onclick: () => mico.ask(view.message, view.media, view.turn, view) }, "Continue"),
        problem,
        mico.report(view),
        el("div", { class: "actions" }, view.answer && button("copy", "Copy the answer", (event) => copy(event, view.answer)), button("retry", view.problem ? "Ask again" : "Answer again", () => retry(turn))),
      ].filter(Boolean),
    );
  }

  // With a button that copies it, and reachable by the keyboard, for it may scroll.
  function codeBlock(pre) {
    const block = el("div", { class: "code" });
    pre.replaceWith(block);
    pre.tabIndex = 0;
    block.append(pre, button("copy", "Copy the code", (event) => copy(event, pre.textContent)));
  }

  // --- actions ---

  async function copy(event, text) {
    const place = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const box = el("textarea", {}, text); // clipboards are for https and this machine's own address
      mico.root.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
    }
    place.classList.add("did");
    setTimeout(() => place.classList.remove("did"), 900);
    mico.say("Copied.");
  }

  const later = (turn) => mico.chat.turns.length - 1 - mico.chat.turns.indexOf(turn);
  const count = (n) => (n === 1 ? "the turn after it" : `the ${n} turns after it`);

  async function retry(turn) {
    if (running) return;
    const n = later(turn);
    if (n && !(await mico.confirm(`Answer this again? This deletes ${count(n)}.`, "Answer again"))) return;
    again(turn, turn.view.message);
  }

  function again(turn, message) {
    const { view } = turn;
    if (view.turn === null) dropFrom(mico.chat.turns.indexOf(turn)); // not kept: nothing to replace
    mico.ask(message, view.media, view.turn);
  }

  function edit(turn) {
    const question = turn.element.querySelector(".question");
    const box = el("textarea", { "aria-label": "Edit the question", rows: 3 });
    box.value = turn.view.message;
    const cancel = () => {
      drawQuestion(turn);
      turn.element.querySelector(".question .icon").focus();
    };
    const ask = async () => {
      const n = later(turn);
      if (running || (!box.value.trim() && !turn.view.media.length)) return;
      if (n && !(await mico.confirm(`Ask the changed question? This deletes ${count(n)}.`, "Ask"))) return;
      again(turn, box.value.trim());
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        ask();
      }
    });
    const row = el("div", { class: "row end" }, el("button", { type: "button", onclick: cancel }, "Cancel"), el("button", { type: "button", class: "primary", onclick: ask }, "Ask"));
    question.querySelector(".said")?.remove();
    question.querySelector(".actions").replaceWith(el("div", { class: "editing" }, box, row));
    box.focus();
  }

  async function remove(turn) {
    const n = later(turn);
    if (!(await mico.confirm(n ? `Delete this turn and ${count(n)}?` : "Delete this turn?", "Delete"))) return;
    try {
      if (turn.view.turn !== null) await mico.call("delete_turns", { id: mico.chat.id, first: turn.view.turn });
      dropFrom(mico.chat.turns.indexOf(turn));
      mico.keep("mico-asking", null);
      if (!mico.chat.turns.length) mico.showWelcome(log);
      mico.root.querySelector("#mico-message").focus();
    } catch (error) {
      mico.banner(error);
    }
  }
})(window.mico);
