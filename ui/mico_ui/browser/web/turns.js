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
    new ResizeObserver(scroll).observe(log);
    log.addEventListener("load", scroll, true);
  };

  function scroll() {
    if (pinned) log.scrollTop = log.scrollHeight;
  }

  mico.showConversation = function (conversation) {
    leave();
    if (conversation?.id !== mico.chat.id) keepUnfindable();
    mico.chat.turns.forEach(keepEdited);
    mico.chat = { id: conversation?.id || null, title: conversation?.title || "", turns: [] };
    if (conversation?.model) mico.chooseModel(conversation.model);
    log.replaceChildren();
    pinned = true;
    for (const view of conversation?.turns || []) addTurn(view);
    for (const one of unkept()) if (one.conversation_id === mico.chat.id) showUnkept(one);
    const last = mico.chat.turns.at(-1);
    if (last && isGrowing(last.view)) follow(last);
    if (!mico.chat.turns.length) {
      pinned = false;
      mico.showWelcome(log);
    }
    mico.showTitle();
    scroll();
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

  // --- questions that the server may not have: they outlive the page ---

  // Each is {ask, conversation_id, number, replaces, message, media}; `number` is the turn it would be.
  const unkept = () => [].concat(mico.kept("mico-asking", [])).filter((one) => one.ask && one.conversation_id);
  const keepUnkept = (list) => mico.keep("mico-asking", list.length ? list.slice(-50) : null);
  const forget = (ask) => keepUnkept(unkept().filter((one) => one.ask !== ask));
  const isKept = ({ view }) => view.turn !== null && view.state !== "error";
  const isGrowing = (view) => view.state === "waiting" || view.state === "answering";
  mico.lastUnkept = () => unkept().at(-1)?.conversation_id || null;

  // Where the next question belongs; the page itself names a conversation that is to begin.
  mico.place = () => ({ conversation_id: mico.chat.id, create: mico.chat.id !== null && !mico.chat.turns.some(isKept) });

  // A conversation as the server has it. One that it does not have may have questions here.
  mico.load = async function (id) {
    try {
      return await mico.call("open", { id });
    } catch (error) {
      if (!unkept().some((one) => one.conversation_id === id)) throw error;
      return { id, title: "", turns: [] };
    }
  };

  // Look again at what the server has: it was away, or an answer has ended unseen.
  mico.reopen = async function () {
    const { id } = mico.chat;
    if (running || !id || log.querySelector(".editing")) return;
    try {
      const found = await mico.load(id);
      if (!running && mico.chat.id === id) mico.showConversation(found);
    } catch (error) {
      mico.banner(error);
    }
  };

  function showUnkept(one) {
    const turns = mico.chat.turns;
    const asked = turns.find(({ view }) => view.ask === one.ask);
    if (asked) {
      if (!asked.view.media.length) asked.view.media = one.media; // what it was shown is not known yet
      drawQuestion(asked);
    } else if (turns.some(({ view }) => view.turn >= one.number && view.message === one.message)) forget(one.ask);
    else addTurn({ ...BLANK, ask: one.ask, state: "unanswered", message: one.message, media: one.media }).replaces = one.replaces;
  }

  mico.forgetIn = (id) => keepUnkept(unkept().filter((one) => one.conversation_id !== id));

  // What is being changed when its turn goes is written on in the message box.
  function keepEdited(turn) {
    const box = turn.element.querySelector(".editing textarea");
    if (box && box.value.trim() !== turn.view.message) mico.draft(box.value, []);
  }

  // A chat that the server has nothing of is in no list: its questions go to the message box.
  function keepUnfindable() {
    if (mico.chat.turns.some((turn) => turn.view.turn !== null || isGrowing(turn.view))) return;
    for (const { view } of mico.chat.turns) {
      mico.draft(view.message, view.media);
      forget(view.ask);
    }
  }

  // --- asking ---

  const UPDATE_MS = 60;
  const UNSURE = "The model gave the words of this answer a low probability. Such answers are wrong more often than others.";
  const BLANK = { ask: "", version: -1, state: "waiting", message: "", media: [], answer: "", html: "", turn: null, usage: null, problem: null, finish_reason: "" };
  const name = (bytes = 12) => Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  let running = null;
  mico.isAnswering = () => running !== null;

  // Ask; `replaces` is the turn that is asked again, with all after it; `again` is what
  // it said before, `begun` the view of an answer that goes on.
  mico.ask = function (message, cards, replaces = null, again = null, begun = null) {
    if (running) return;
    if (replaces !== null) dropFrom(mico.chat.turns.findIndex((turn) => turn.view.turn === replaces));
    if (!mico.chat.id) {
      mico.chat.id = `conv-${name()}`;
      mico.showTitle();
    }
    const number = replaces ?? 1 + Math.max(0, ...mico.chat.turns.map((turn) => turn.view.turn));
    const asked = { ask: name(), message, media: cards.map(({ id, kind }) => ({ id, kind })), ...mico.place(), replaces, again, prefix: begun?.answer || "" };
    pinned = true;
    const turn = addTurn({ ...BLANK, ask: asked.ask, message, media: cards, html: begun?.html || "" });
    turn.replaces = replaces;
    keepUnkept([...unkept(), { ask: asked.ask, conversation_id: mico.chat.id, number, replaces, message, media: cards.map(mico.bare) }]);
    follow(turn, asked);
    scroll();
  };

  // Ask, if there is something to ask, and look how the answer grows until it ends or `leave`.
  async function follow(turn, asked = null) {
    running = turn;
    mico.emit("answering", true);
    while (running === turn) {
      try {
        if (asked) await (turn.sent = mico.call("ask", { asked }));
        asked = null;
        const view = await mico.call("follow", { ask: turn.view.ask, version: turn.view.version });
        if (running === turn) grow(view);
        await new Promise((done) => setTimeout(done, UPDATE_MS));
      } catch (error) {
        const problem = mico.problemOf(error);
        if (running === turn && !problem.away) grow({ ...turn.view, state: "error", problem });
        mico.check(); // which says what is wrong, or `lost`
        await new Promise((done) => setTimeout(done, 1000));
      }
    }
  }

  // The answer goes on without this page.
  function leave() {
    if (!running) return;
    running = null;
    mico.emit("answering", false);
  }

  // When nothing is being answered any more.
  function stopped() {
    if (!running) return Promise.resolve();
    mico.stop();
    return new Promise((done) => mico.events.addEventListener("answering", done, { once: true }));
  }

  // A question that is still on its way cannot be stopped before it has arrived.
  mico.stop = async function () {
    const turn = running;
    try {
      await turn?.sent;
      if (turn) await mico.call("stop", { ask: turn.view.ask });
    } catch {
      // `follow` says why
    }
  };

  // The next state of the answer that is under way.
  function grow(view) {
    if (view.state === "gone") {
      running = null;
      mico.emit("answering", false);
      mico.reopen();
      return;
    }
    const began = view.turn !== null && running.view.turn === null;
    const cards = view.media.map((card) => ({ ...card, cut: [...card.cut], pictures: card.pictures.length ? card.pictures : running.view.media.find((old) => old.id === card.id)?.pictures || [] }));
    // Until there are words, an answer that goes on shows those that it had.
    running.view = { ...view, html: view.html || running.view.html, message: running.view.message, media: cards.length ? cards : running.view.media };
    drawAnswer(running);
    scroll();
    if (began) mico.emit("list", null); // a new conversation is in it from now on
    if (["done", "stopped", "error"].includes(view.state)) finish(view);
  }

  // The page's own server broke the stream off.
  mico.lost = function () {
    if (running) grow({ ...running.view, state: "error", problem: new mico.Problem({ message: "The answer broke off.", advice: "Ask again when the server is back; the question is kept.", away: true }).problem });
  };

  function finish(view) {
    const turn = running;
    running = null;
    drawQuestion(turn);
    if (view.problem?.away) mico.emit("away");
    if (mico.model()?.status !== "loaded") mico.check();
    if (isKept(turn)) forget(view.ask);
    const refused = view.problem && !view.problem.away;
    // One that was refused is not offered again once another has taken its place.
    keepUnkept(unkept().filter((one) => one.conversation_id !== mico.chat.id || !(one.refused && isKept(turn))).map((one) => (one.ask === view.ask ? { ...one, refused } : one)));
    mico.emit("answering", false);
    mico.emit("list", null);
    // The server may store a question that was stopped on its way, and then take it back.
    if (!isKept(turn)) setTimeout(() => mico.emit("list", null), 2000);
  }

  function dropFrom(index, asked = null) {
    if (index < 0) return;
    for (const turn of mico.chat.turns.splice(index)) {
      if (turn !== asked) keepEdited(turn);
      forget(turn.view.ask);
      turn.element.remove();
    }
  }

  // --- drawing ---

  function drawQuestion(turn) {
    const { view } = turn;
    if (turn.element.querySelector(".editing")) return; // what is written there is the user's
    const said = el("div", { class: "said" }, view.message);
    const busy = isGrowing(view);
    const actions = el(
      "div",
      { class: "actions" },
      button("edit", "Edit the question", () => edit(turn)),
      button("copy", "Copy the question", (event) => copy(event, view.message)),
      button("trash", "Delete from here", () => remove(turn), { disabled: busy }),
    );
    const question = el("div", { class: "question" }, view.media.length ? el("div", { class: "cards" }, view.media.map((card) => mico.smallCard(card, turn.view))) : null, view.message && said, actions);
    const old = turn.element.querySelector(".question");
    if (old) old.replaceWith(question);
    else turn.element.prepend(question);
  }

  function drawAnswer(turn) {
    const { view } = turn;
    if (!turn.answer) {
      turn.text = el("div", { class: "text" });
      turn.thoughts = el("details", { class: "thoughts" }, el("summary", {}, "Thoughts"), el("p"));
      turn.after = el("div", { class: "after" });
      turn.why = el("section", { class: "why", hidden: true, "aria-label": "What the answer rests on" });
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
    if (!view.thoughts) turn.thoughts.remove();
    else if (!turn.thoughts.isConnected) turn.text.before(turn.thoughts);
    turn.thoughts.lastChild.textContent = view.thoughts || "";
    turn.text.classList.toggle("growing", view.state === "answering");
    if (view.state === "waiting") {
      const { id, status } = mico.model() || {};
      const does = view.media_total ? "answering" : view.media.length ? "looking and listening" : "thinking";
      const what = view.progress || (status && status !== "loaded" && !view.media_total ? `loading ${id}` : does);
      turn.after.replaceChildren(el("span", { class: "waiting" }, what, el("span", { class: "dots", "aria-hidden": "true" })));
      return;
    }
    if (busy) {
      turn.after.replaceChildren();
      return;
    }
    const limit = view.usage ? `the ${view.usage.completion_tokens}-token limit` : "the limit of tokens";
    const notes = { length: `Stopped at ${limit}. Raise it in Settings.`, cancelled: view.answer ? "Stopped." : "Stopped before the first word." };
    const note = view.state === "unanswered" ? "This question has no answer yet." : notes[view.finish_reason];
    const problem = view.problem && el("p", { class: "problem", role: "alert" });
    if (problem) mico.tell(problem, new mico.Problem(view.problem));
    turn.after.replaceChildren(
      ...[
        view.unsure && el("small", { class: "unsure", title: UNSURE }, "(not sure)"),
        note && el("p", { class: "note" }, note),
        view.finish_reason === "length" && el("button", { type: "button", class: "continue", onclick: () => mico.ask(view.message, view.media, view.turn, view.message, view) }, "Continue"),
        problem,
        view.state !== "unanswered" && mico.report(view),
        turn.why,
        el("div", { class: "actions" }, view.answer && button("copy", "Copy the answer", (event) => copy(event, view.answer)), view.answer && isKept(turn) && mediaUpTo(turn).length > 0 && button("why", "Which medium made this answer?", () => mico.why(turn.why, view.turn, mediaUpTo(turn))), view.answer && !view.problem ? button("retry", "Answer again", () => retry(turn)) : el("button", { type: "button", onclick: () => retry(turn) }, "Ask again")),
      ].filter(Boolean),
    );
  }

  // All media of the conversation up to a turn.
  const mediaUpTo = (turn) => mico.chat.turns.slice(0, mico.chat.turns.indexOf(turn) + 1).flatMap(({ view }) => view.media);

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
    const n = later(turn);
    if (n && !(await mico.confirm(`Answer this again? This deletes ${count(n)}.`, "Answer again"))) return;
    again(turn, turn.view.message);
  }

  // Whatever is being answered meanwhile is stopped.
  async function again(turn, message) {
    await stopped();
    if (!mico.chat.turns.includes(turn)) return; // it has gone with another one
    const { view } = turn;
    dropFrom(mico.chat.turns.indexOf(turn), turn);
    mico.ask(message, view.media, view.turn ?? turn.replaces ?? null, view.message);
  }

  function edit(turn) {
    const question = turn.element.querySelector(".question");
    const box = el("textarea", { "aria-label": "Edit the question", rows: 3 });
    box.value = turn.view.message;
    const cancel = () => {
      question.querySelector(".editing").remove();
      drawQuestion(turn);
      turn.element.querySelector(".question .icon").focus();
    };
    const ask = async () => {
      const n = later(turn);
      if (!box.value.trim() && !turn.view.media.length) return;
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
      if (!mico.chat.turns.length) mico.showWelcome(log);
      mico.root.querySelector("#mico-message").focus();
    } catch (error) {
      mico.banner(error);
    }
  }
})(window.mico);
