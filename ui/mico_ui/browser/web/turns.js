// The messages: questions with their media, answers as they grow, and what can be done with both.
(function (mico) {
  const { el, button } = mico;
  let log, pinned = true;

  // A turn is the view that Python makes (turns.py), and `element`, where it is shown.
  mico.chat = { id: null, title: "", system: null, turns: [] };

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
    mico.chat = { id: conversation?.id || null, title: conversation?.title || "", system: conversation?.system ?? null, turns: [] };
    if (conversation?.model) mico.chooseModel(conversation.model);
    log.replaceChildren();
    pinned = true;
    for (const view of conversation?.turns || []) addTurn(view);
    for (const one of unkept()) if (one.conversation_id === mico.chat.id) showUnkept(one);
    const last = mico.chat.turns.at(-1);
    for (const turn of [last, last?.other]) if (turn && isGrowing(turn.view) && turn.view.ask) follow(turn);
    if (!mico.chat.turns.length) {
      pinned = false;
      mico.showWelcome(log);
    }
    mico.showTitle(mico.begun);
    const { id, turn, text } = mico.kept("mico-edit", {});
    const edited = id && id === mico.chat.id && mico.chat.turns.find(({ view }) => view.turn === turn);
    if (edited) edit(edited, text);
    scroll();
  };

  // With `step` the way back leads to what was shown before.
  mico.showTitle = function (step = false) {
    mico.root.querySelector("h1").textContent = mico.chat.title || "New chat";
    document.title = mico.chat.title ? `${mico.chat.title} - MiCo-Chat` : "MiCo-Chat";
    const hash = mico.chat.id ? `#${mico.chat.id}` : "";
    // An address that stays is not written again: that would end a step back or forward on its way.
    if (hash !== location.hash) history[step ? "pushState" : "replaceState"](null, "", location.pathname + location.search + hash);
    mico.emit("conversation", mico.chat.id);
  };

  // Whether this chat is shown, and the user is not on the way to another one.
  mico.stays = (id) => mico.chat.id === id && location.hash === `#${id}`;

  function addTurn(view) {
    if (!mico.chat.turns.length) log.replaceChildren();
    const turn = { view, element: el("article", { class: "turn" }) };
    mico.chat.turns.push(turn);
    log.append(turn.element);
    drawQuestion(turn);
    if (view.other) stand(turn, view.other);
    drawAnswer(turn);
    if (turn.other) drawAnswer(turn.other);
    return turn;
  }

  // Two models answer one question side by side: `other` has the second answer of a turn.
  function stand(turn, view) {
    turn.place = el("div", { class: "pair" });
    turn.other = { view, other: turn, place: turn.place, second: true };
    turn.element.append(turn.place);
  }

  // --- questions that the server may not have: they outlive the page ---

  // Each is {ask, conversation_id, after, message, media}; it follows the turn `after`.
  const unkept = () => [].concat(mico.kept("mico-asking", [])).filter((one) => one.ask && one.conversation_id);
  const keepUnkept = (list) => mico.keep("mico-asking", list.length ? list.slice(-50) : null);
  const forget = (ask) => keepUnkept(unkept().filter((one) => one.ask !== ask));
  const isKept = ({ view }) => view.turn !== null && view.state !== "error";
  const isGrowing = (view) => view.state === "waiting" || view.state === "answering";
  mico.lastUnkept = () => unkept().at(-1)?.conversation_id || null;

  // Where the next question belongs; the page itself names a conversation that is to begin.
  const lastKept = (turns) => turns.findLast(isKept)?.view.turn ?? 0;
  mico.place = () => {
    const begun = mico.chat.turns.some(isKept);
    const fresh = !begun; // it may have a prompt that the server does not know
    return { conversation_id: mico.chat.id, create: mico.chat.id !== null && fresh, fresh, system: fresh ? mico.chat.system ?? mico.settings.system : null, after: begun ? lastKept(mico.chat.turns) : null };
  };

  // A conversation that a call tells. Where a change elsewhere has overtaken it, it is looked at once more.
  let news = 0;
  async function told(call) {
    const before = news;
    const found = await call;
    if (news !== before) setTimeout(sync);
    return found;
  }

  // A conversation as the server has it. One that it does not have may have questions here.
  mico.load = async function (id) {
    try {
      return await told(mico.call("open", { id }));
    } catch (error) {
      const begun = unkept().find((one) => one.conversation_id === id);
      if (!begun) throw error;
      return { id, title: "", system: begun.system, turns: [] };
    }
  };

  // Look again at what the server has: it was away, or an answer has ended unseen.
  mico.reopen = async function () {
    const { id } = mico.chat;
    if (growing.size || !id || log.querySelector(".editing")) return;
    try {
      const found = await mico.load(id);
      if (!growing.size && mico.chat.id === id) mico.showConversation(found);
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
    } else if (turns.some(({ view }) => view.parent === one.after && view.message === one.message)) forget(one.ask);
    else addTurn({ ...BLANK, ask: one.ask, state: "unanswered", message: one.message, media: one.media }).follows = one.after;
  }

  mico.forgetIn = (id) => keepUnkept(unkept().filter((one) => one.conversation_id !== id));

  // What is being changed when its turn goes is written on in the message box.
  function keepEdited(turn) {
    const box = turn.element.querySelector(".editing textarea");
    if (box) mico.keep("mico-edit", null);
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
  const BLANK = { ask: "", version: -1, state: "waiting", message: "", media: [], answer: "", html: "", turn: null, parent: 0, versions: [], later: 0, usage: null, problem: null, finish_reason: "" };
  const name = (bytes = 12) => Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const growing = new Set(); // the turns whose answers are under way, and second answers of them
  let stale = false;
  mico.isAnswering = () => growing.size > 0;

  // Ask: at the end, or in the place of `instead`, which the server keeps as a version. `again`: for
  // another answer than the one that exists. `begun` is the view of an answer that goes on.
  mico.ask = function (message, cards, { instead = null, again = false, begun = null } = {}) {
    if (growing.size) return;
    const at = mico.chat.turns.indexOf(instead);
    const before = at < 0 ? mico.chat.turns : mico.chat.turns.slice(0, at);
    const follows = instead?.follows ?? null; // of a question that the server does not have
    const after = follows !== null && (follows === 0 || before.some(({ view }) => view.turn === follows)) ? follows : lastKept(before);
    dropFrom(at);
    if (!mico.chat.id) {
      mico.chat.id = `conv-${name()}`;
      mico.showTitle();
    }
    const asked = { ask: name(), message, media: cards.map(({ id, kind }) => ({ id, kind })), ...mico.place(), after, again, prefix: begun?.answer || "" };
    if (asked.fresh) mico.chat.system = asked.system;
    pinned = true;
    const blank = { ...BLANK, ask: asked.ask, parent: after, message, media: cards, model: mico.chosen, html: begun?.html || "" };
    const second = !begun && mico.second();
    const turn = addTurn({ ...blank, other: second ? { ...blank, ask: name(), model: second } : null });
    turn.follows = after;
    keepUnkept([...unkept(), { ask: asked.ask, conversation_id: mico.chat.id, after, message, media: cards.map(mico.bare), system: asked.system }]);
    follow(turn, asked);
    scroll();
  };

  // Ask, if there is something to ask, and look how the answer grows until it ends or `leave`.
  async function follow(turn, asked = null) {
    growing.add(turn);
    mico.emit("answering", true);
    while (growing.has(turn)) {
      try {
        if (asked) await (turn.sent = mico.call("ask", { asked }));
        if (asked && turn.other && !turn.second) follow(turn.other, { ...asked, ask: turn.other.view.ask, model: turn.other.view.model, beside: asked.ask });
        asked = null;
        const view = await mico.call("follow", { ask: turn.view.ask, version: turn.view.version });
        if (growing.has(turn)) grow(turn, view);
        await new Promise((done) => setTimeout(done, UPDATE_MS));
      } catch (error) {
        const problem = mico.problemOf(error);
        if (growing.has(turn) && !problem.away) grow(turn, { ...turn.view, state: "error", problem });
        mico.check(); // which says what is wrong, or `lost`
        await new Promise((done) => setTimeout(done, 1000));
      }
    }
  }

  // The answer goes on without this page.
  function leave() {
    if (!growing.size) return;
    growing.clear();
    mico.emit("answering", false);
  }

  // When nothing is being answered any more.
  async function stopped() {
    mico.stop();
    while (growing.size) await new Promise((done) => mico.events.addEventListener("answering", done, { once: true }));
  }

  // A question that is still on its way cannot be stopped before it has arrived.
  mico.stop = () => [...growing].forEach(stop);
  async function stop(turn) {
    try {
      await turn.sent;
      await mico.call("stop", { ask: turn.view.ask });
    } catch {
      // `follow` says why
    }
  }

  // One look at a time: an older answer that comes late must not undo a newer one.
  let looking = false, outdated = false;
  async function sync() {
    outdated = true;
    if (looking) return;
    looking = true;
    try {
      while (outdated) {
        outdated = false;
        await look();
      }
    } finally {
      looking = false;
    }
  }

  // What has changed elsewhere is shown, and what is being written or read here stays.
  async function look() {
    const { id, turns } = mico.chat;
    stale = growing.size > 0;
    if (growing.size || !id || !turns.some(isKept) || log.querySelector(".editing")) return;
    const last = lastKept(turns);
    let found;
    try {
      found = await mico.call("open", { id, turn: last });
      // Somebody has said elsewhere which answer is better.
      if (rivalOf(turns.at(-1)) && found.turns.at(-1)?.preferred) found = await mico.call("open", { id });
    } catch (error) {
      const { away, setting } = mico.problemOf(error);
      if (away) setTimeout(sync, 4000);
      if (away || setting || !mico.stays(id)) return;
      mico.banner(error);
      mico.showConversation(null);
      return;
    }
    stale = growing.size > 0; // of a question that was asked meanwhile
    if (stale || !mico.stays(id) || log.querySelector(".editing")) return;
    if (lastKept(mico.chat.turns) !== last) return void (outdated = true); // a question was answered meanwhile
    if (found.system !== mico.chat.system) {
      mico.chat.system = found.system;
      mico.emit("conversation", id);
    }
    const shown = mico.chat.turns.filter(isKept);
    const same = shown.every(({ view }, n) => view.turn === found.turns[n]?.turn && view.state === found.turns[n].state && view.answer === found.turns[n].answer && beside(shown[n].other?.view) === beside(found.turns[n].other));
    if (!same || found.turns.length !== shown.length || isGrowing(found.turns.at(-1))) return mico.showConversation(found);
    const short = ({ versions, later, media }) => String([versions, later, media.map((one) => one.pinned)]);
    for (const [n, turn] of shown.entries()) {
      const { versions, later, media } = found.turns[n];
      if (short(found.turns[n]) === short(turn.view)) continue;
      turn.view = { ...turn.view, versions, later };
      for (const [m, one] of media.entries()) if (turn.view.media[m]) turn.view.media[m].pinned = one.pinned;
      drawQuestion(turn);
    }
  }
  mico.on("changed", () => {
    news++;
    sync();
  });
  const rivalOf = (turn) => turn.other?.view.turn ?? null;
  const beside = (view) => (view?.turn ? [view.turn, view.state, view.answer].join() : "");

  // The next state of the answer that is under way.
  function grow(turn, view) {
    if (view.state === "gone") {
      growing.delete(turn);
      mico.emit("answering", growing.size > 0);
      mico.reopen();
      return;
    }
    const began = view.turn !== null && turn.view.turn === null;
    const old = (card) => turn.view.media.find((one) => one.id === card.id);
    const cards = view.media.map((card) => ({ ...card, cut: [...card.cut], pinned: old(card)?.pinned, pictures: card.pictures.length ? card.pictures : (String(old(card)?.pages) === String(card.pages) && old(card)?.pictures) || [] }));
    // Until there are words, an answer that goes on shows those that it had.
    turn.view = { ...view, html: view.html || turn.view.html, message: turn.view.message, media: cards.length ? cards : turn.view.media };
    drawAnswer(turn);
    scroll();
    if (began) mico.emit("list", null); // a new conversation is in it from now on
    if (["done", "stopped", "error"].includes(view.state)) finish(turn, view);
  }

  // The page's own server broke the stream off.
  mico.lost = function () {
    for (const turn of [...growing]) grow(turn, { ...turn.view, state: "error", problem: new mico.Problem({ message: "The answer broke off.", advice: "Ask again when the server is back; the question is kept.", away: true }).problem });
  };

  function finish(turn, view) {
    growing.delete(turn);
    if (turn.other && !growing.has(turn.other)) settle(turn.second ? turn.other : turn);
    if (!turn.second) drawQuestion(turn);
    if (view.problem?.away) mico.emit("away");
    if (mico.model()?.status !== "loaded") mico.check();
    if (isKept(turn)) forget(view.ask);
    const refused = view.problem && !view.problem.away;
    // One that was refused is not offered again once another has taken its place.
    keepUnkept(unkept().filter((one) => one.conversation_id !== mico.chat.id || !(one.refused && isKept(turn))).map((one) => (one.ask === view.ask ? { ...one, refused } : one)));
    mico.emit("answering", growing.size > 0);
    mico.emit("list", null);
    // The server may store a question that was stopped on its way, and then take it back.
    if (!isKept(turn)) setTimeout(() => mico.emit("list", null), 2000);
    if (stale) sync(); // something was changed elsewhere during the answer
  }

  // Both answers have ended. If the server kept the second alone, the chat goes on with that one.
  function settle(turn) {
    const { other } = turn;
    if (isGrowing(other.view)) other.view = { ...other.view, state: "error", problem: turn.view.problem }; // it was never sent
    if (!isKept(turn) && isKept(other)) {
      for (const part of ["view", "answer", "text", "thoughts", "after", "why", "shown"]) [turn[part], other[part]] = [other[part], turn[part]];
      forget(other.view.ask);
    }
    drawQuestion(turn);
    [turn, other].forEach(drawAnswer);
  }

  async function prefer(turn, over) {
    const { id } = mico.chat;
    try {
      const found = await told(mico.call("prefer", { id, turn: turn.view.turn, over }));
      if (mico.chat.id === id) mico.showConversation(found);
      mico.focusMessage();
      mico.say("Kept: the chat goes on with this answer.");
    } catch (error) {
      mico.banner(error);
      sync();
    }
  }

  function dropFrom(index) {
    if (index < 0) return;
    for (const turn of mico.chat.turns.splice(index)) {
      keepEdited(turn);
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
      ...versions(turn),
      button("edit", "Edit the question", () => edit(turn)),
      button("copy", "Copy the question", (event) => copy(event, view.message)),
      button("trash", "Delete from here", () => remove(turn), { disabled: busy }),
    );
    const question = el("div", { class: "question" }, view.media.length ? el("div", { class: "cards" }, view.media.map((card) => mico.smallCard(card, turn.view))) : null, view.message && said, actions);
    const old = turn.element.querySelector(".question");
    if (old) old.replaceWith(question);
    else turn.element.prepend(question);
  }

  // The way to what was asked or answered in this place before, or later: < 2/3 >.
  function versions(turn) {
    const all = turn.view.versions || [];
    if (all.length < 2) return [];
    const at = all.indexOf(turn.view.turn);
    const way = (label, next) => el("button", { type: "button", class: "version", "aria-label": label, title: label, disabled: next === undefined, onclick: () => choose(next) }, label.startsWith("Former") ? "\u2039" : "\u203a");
    return [el("span", { class: "versions" }, way("Former version", all[at - 1]), el("span", { "aria-label": `Version ${at + 1} of ${all.length}` }, `${at + 1}/${all.length}`), way("Later version", all[at + 1]))];
  }

  async function choose(turn) {
    const { id } = mico.chat;
    try {
      const found = await told(mico.call("choose", { id, turn }));
      if (mico.chat.id === id) mico.showConversation(found);
    } catch (error) {
      mico.banner(error);
      sync();
    }
  }

  function drawAnswer(turn) {
    const { view } = turn;
    if (!turn.answer) {
      turn.text = el("div", { class: "text" });
      turn.thoughts = el("details", { class: "thoughts" }, el("summary", {}, "Thoughts"), el("p"));
      turn.after = el("div", { class: "after" });
      turn.why = el("section", { class: "why", hidden: true, "aria-label": "What the answer rests on" });
      turn.answer = el("div", { class: "answer" }, turn.place && el("h2", {}, view.model), turn.text, turn.after);
      (turn.place || turn.element).append(turn.answer);
    }
    const busy = view.state === "waiting" || view.state === "answering";
    turn.answer.setAttribute("aria-busy", String(busy));
    if (view.html !== turn.shown) {
      turn.text.innerHTML = view.html; // from markup.py, which lets no HTML of an answer through
      for (const link of turn.text.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
      for (const list of turn.text.querySelectorAll("ul, ol, table")) list.dir = "auto";
      for (const pre of turn.text.querySelectorAll("pre")) codeBlock(pre);
      turn.shown = view.html;
    }
    if (!view.thoughts) turn.thoughts.remove();
    else if (!turn.thoughts.isConnected) turn.text.before(turn.thoughts);
    turn.thoughts.lastChild.textContent = view.thoughts || "";
    turn.text.classList.toggle("growing", view.state === "answering");
    const stopping = turn.place && el("button", { type: "button", class: "stop-one", "aria-label": `Stop ${view.model}`, onclick: () => stop(turn) }, "Stop");
    if (view.state === "waiting") {
      const { id, status } = mico.model() || {};
      const does = view.media_total ? "answering" : view.media.length ? "looking and listening" : "thinking";
      const what = view.progress || (status && status !== "loaded" && !view.media_total ? `loading ${id}` : does);
      turn.after.replaceChildren(el("span", { class: "waiting" }, what, el("span", { class: "dots", "aria-hidden": "true" })), ...(turn.place ? [stopping] : []));
      return;
    }
    if (busy) {
      if (!turn.place) turn.after.replaceChildren();
      else if (!turn.after.querySelector(".stop-one:only-child")) turn.after.replaceChildren(stopping);
      return;
    }
    const rival = turn.place ? (isKept(turn.other) && !isGrowing(turn.other.view) && turn.other.view.answer ? rivalOf(turn) : null) : view.rival;
    const chosen = view.preferred && (view.preferred === view.turn ? "You found this answer better than another one." : "You found another answer better.");
    const limit = view.usage ? `the ${view.usage.completion_tokens}-token limit` : "the limit of tokens";
    const notes = { length: `Stopped at ${limit}. Raise it in Settings.`, cancelled: view.answer ? "Stopped." : "Stopped before the first word." };
    const cut = view.answer && (view.state === "unanswered" || view.finish_reason === "cancelled");
    const note = view.state === "unanswered" ? (cut ? "Not finished: the answer broke off here, or is still written elsewhere." : "This question has no answer yet.") : notes[view.finish_reason];
    const { turns_left_out: gone = 0, media_left_out: unshown = 0 } = view.usage || {};
    const left = [gone && `${gone === 1 ? "1 earlier question is" : `${gone} earlier questions are`} not sent; ${gone === 1 ? "its" : "their"} media neither.`, unshown && `${unshown === 1 ? "1 earlier medium is" : `${unshown} earlier media are`} named, but not shown to the model.`, ...(view.usage?.pages_sent || []).map((line) => `${line}.`)];
    const problem = view.problem && el("p", { class: "problem", role: "alert" });
    if (problem) mico.tell(problem, new mico.Problem(view.problem));
    turn.after.replaceChildren(
      ...[
        view.unsure && el("small", { class: "unsure", title: UNSURE }, "(not sure)"),
        note && el("p", { class: "note" }, note),
        left.some(Boolean) && el("p", { class: "note left-out" }, left.filter(Boolean).join(" ")),
        view.sampled && el("p", { class: "note" }, `Another answer, drawn at random (temperature ${view.sampled}).`),
        chosen && el("p", { class: "note" }, chosen),
        rival && isKept(turn) && view.answer && view.preferred !== view.turn && el("button", { type: "button", class: "better", onclick: () => prefer(turn, rival) }, "This answer is better"),
        !turn.place && (cut || view.finish_reason === "length") && el("button", { type: "button", class: "continue", onclick: () => mico.ask(view.message, view.media, { instead: turn, begun: view }) }, "Continue"),
        problem,
        view.state !== "unanswered" && mico.report(view),
        turn.why,
        el("div", { class: "actions" }, view.answer && button("copy", "Copy the answer", (event) => copy(event, view.answer)), view.answer && mico.aloud(view.answer), view.answer && isKept(turn) && mediaUpTo(turn).length > 0 && button("why", "Which medium made this answer?", () => mico.why(turn.why, view.turn, mediaUpTo(turn).filter((card) => !card.heard))), turn.second ? null : view.answer && !view.problem ? button("retry", "Answer again", () => retry(turn)) : el("button", { type: "button", onclick: () => retry(turn) }, "Ask again")),
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

  const count = (n) => (n === 1 ? "the turn after it" : `the ${n} turns after it`);

  const retry = (turn) => again(turn, turn.view.message, turn.view.state === "done");

  // Whatever is being answered meanwhile is stopped. What stood here stays, as a version.
  async function again(turn, message, another = false, media = turn.view.media) {
    const { id } = mico.chat;
    await stopped();
    // The chat may have been drawn anew meanwhile.
    const here = mico.chat.turns.find((one) => one === turn || (mico.chat.id === id && isKept(turn) && one.view.turn === turn.view.turn));
    if (here) mico.ask(message, media, { instead: here, again: another });
    else mico.draft(message, media);
  }

  function edit(turn, written = turn.view.message) {
    const question = turn.element.querySelector(".question");
    const box = el("textarea", { "aria-label": "Edit the question", rows: 3 });
    box.value = written;
    box.addEventListener("input", () => mico.keep("mico-edit", { id: mico.chat.id, turn: turn.view.turn, text: box.value }));
    const cancel = () => {
      mico.keep("mico-edit", null);
      question.querySelector(".editing").remove();
      drawQuestion(turn);
      turn.element.querySelector(".question .icon").focus();
      sync(); // nothing of elsewhere was shown meanwhile
    };
    const ask = async () => {
      if (attachments.busy || (!box.value.trim() && !attachments.items.length)) return;
      mico.keep("mico-edit", null);
      form.remove();
      again(turn, box.value.trim(), false, attachments.take());
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        ask();
      }
    });
    const [list, problem] = [el("ul", { class: "chips", "aria-label": "Media of the question" }), el("p", { class: "problem", role: "alert", hidden: true })];
    const send = el("button", { type: "button", class: "primary", onclick: ask }, "Ask");
    const input = el("input", { type: "file", multiple: true, hidden: true, tabindex: -1, "aria-label": "Files of the question" });
    const row = el("div", { class: "row end" }, mico.reads().length ? el("button", { type: "button", onclick: () => input.click() }, "Add files") : null, el("button", { type: "button", onclick: cancel }, "Cancel"), send);
    const form = el("form", { class: "editing" }, list, problem, box, input, row);
    const attachments = new mico.Attachments(list, problem, () => (send.disabled = attachments?.busy));
    input.addEventListener("change", () => {
      attachments.add(input.files);
      input.value = "";
    });
    form.addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      attachments.add(event.clipboardData.files);
    });
    for (const old of [".said", ".cards"]) question.querySelector(old)?.remove();
    question.querySelector(".actions").replaceWith(form);
    attachments.restore(turn.view.media);
    box.focus();
  }

  async function remove(turn) {
    const { id } = mico.chat;
    const { later, versions } = turn.view;
    const what = versions.length > 1 ? "this version of the turn" : "this turn";
    if (!(await mico.confirm(later ? `Delete ${what} and ${count(later)}?` : `Delete ${what}?`, "Delete"))) return;
    try {
      if (isKept(turn)) {
        await mico.call("delete_turns", { id, first: turn.view.turn, turns: 1 + later });
        const found = await told(mico.call("open", { id }));
        if (mico.chat.id === id) mico.showConversation(found);
      } else dropFrom(mico.chat.turns.indexOf(turn));
      if (!mico.chat.turns.length) mico.showWelcome(log);
      mico.root.querySelector("#mico-message").focus();
    } catch (error) {
      mico.banner(error);
      sync();
    }
  }
})(window.mico);
