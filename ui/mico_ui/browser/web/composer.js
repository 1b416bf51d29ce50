// The message box: text and media, what they cost, send and stop; and what shows in an empty chat.
(function (mico) {
  const { el } = mico;
  let form, box, attachments;

  mico.startComposer = function () {
    form = mico.root.querySelector(".composer");
    box = form.querySelector("textarea");
    const [input, problem] = [form.querySelector("input[type=file]"), form.querySelector(".chips-problem")];
    attachments = new mico.Attachments(form.querySelector(".chips"), problem, changed);
    mico.attachments = attachments;
    for (const [name, icon] of Object.entries({ pick: "clip", microphone: "mic", camera: "camera", stop: "stop" })) form.querySelector(`[data-do=${name}]`).append(mico.icon(icon));
    form.querySelector("[type=submit]").append(mico.icon("send"));

    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    box.addEventListener("input", changed);
    // Files are pasted wherever the focus is.
    document.addEventListener("paste", (event) => {
      if (event.defaultPrevented || !event.clipboardData.files.length || mico.root.querySelector("dialog[open]")) return;
      event.preventDefault();
      (mico.page === "compare" ? mico.compareAttachments : attachments).add(event.clipboardData.files);
    });
    offering(input);
    mico.recordSound(form.querySelector("[data-do=microphone]"), form.querySelector(".timer"), attachments);
    form.querySelector("[data-do=camera]").addEventListener("click", () => mico.openCamera(attachments));
    form.querySelector("[data-do=stop]").addEventListener("click", mico.stop);
    document.addEventListener("keydown", (event) => {
      // What is open closes first.
      const inside = event.target.closest?.(".editing, .side") || mico.root.querySelector("dialog[open]");
      if (event.key === "Escape" && mico.isAnswering() && !inside) mico.stop();
    });
    dropping();
    mico.on("answering", (on) => {
      form.querySelector("[data-do=stop]").hidden = !on;
      form.querySelector("[type=submit]").hidden = on;
      changed();
      // Not away from where the user has gone meanwhile.
      if (!on && (document.activeElement === document.body || form.contains(document.activeElement))) box.focus({ preventScroll: true });
    });
    mico.on("conversation", () => estimate());
    mico.on("server", () => {
      estimate();
      if (!mico.chat.turns.length) mico.showWelcome(mico.root.querySelector(".log"));
    });
    restore();
    mico.focusMessage();
  };

  // What the attach button offers: the kinds of media that the chosen model reads.
  function offering(input) {
    const menu = form.querySelector("details.attach");
    let kind = null;
    const pick = (wanted) => {
      kind = wanted;
      input.accept = wanted ? mico.kinds[wanted].accept || mico.kinds[wanted].endings.join() : "";
      menu.open = false;
      input.click();
    };
    const fill = () => {
      const reads = mico.reads();
      const offer = (name, wanted) => el("button", { type: "button", onclick: () => pick(wanted) }, name);
      const names = reads.map((one) => offer(mico.kinds[one].noun, one));
      menu.querySelector(".menu-list").replaceChildren(...names, ...(reads.length > 1 ? [offer("any of these", null)] : []));
      menu.hidden = !reads.length;
      form.querySelector("[data-do=microphone]").hidden = !mico.recorded("microphone");
      form.querySelector("[data-do=camera]").hidden = !mico.recorded("camera") && !mico.recorded("film");
    };
    input.addEventListener("change", () => {
      attachments.add(input.files, kind);
      input.value = "";
      kind = null;
    });
    input.addEventListener("cancel", () => (kind = null));
    mico.menu(menu);
    mico.on("server", fill);
    fill();
  }

  function dropping() {
    const veil = mico.root.querySelector(".dropping");
    mico.on("server", () => (veil.textContent = mico.reads().length ? `Drop ${mico.readsInWords()}` : `${mico.model().id} reads text alone`));
    const hasFiles = (event) => Array.from(event.dataTransfer?.types || []).includes("Files");
    let depth = 0;
    document.addEventListener("dragenter", (event) => {
      if (hasFiles(event)) veil.hidden = ++depth < 1;
    });
    document.addEventListener("dragleave", (event) => {
      if (hasFiles(event)) veil.hidden = --depth < 1;
    });
    document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      veil.hidden = true;
      (mico.page === "compare" ? mico.compareAttachments : attachments).add(event.dataTransfer.files);
    });
  }

  function send() {
    const message = box.value.trim();
    if (attachments.busy || (!message && !attachments.items.length)) return;
    if (mico.isAnswering()) {
      form.querySelector(".meter").replaceChildren("Not sent yet: wait for the answer, or stop it.");
      return;
    }
    const unread = attachments.cards.filter((card) => !mico.reads().includes(card.kind)).map((card) => card.name);
    if (unread.length) {
      const message = `${mico.model().id} does not read ${unread.join(", ")}.`;
      mico.tell(form.querySelector(".chips-problem"), new mico.Problem({ message, advice: "Remove it, or choose another model above.", away: false }));
      return;
    }
    const cards = attachments.take();
    box.value = "";
    changed();
    mico.ask(message, cards);
    mico.focusMessage();
  }

  // Not where a keyboard would come up on the screen and cover half of it.
  mico.focusMessage = () => matchMedia("(pointer: coarse)").matches || box.focus({ preventScroll: true });

  function changed() {
    box.style.height = "auto";
    box.style.height = `${Math.min(box.scrollHeight, 200)}px`;
    const empty = !box.value.trim() && !attachments.items.length;
    form.querySelector("[type=submit]").disabled = empty || attachments.busy || mico.isAnswering();
    mico.keep("mico-draft", empty ? null : { message: box.value, media: attachments.cards.map(mico.bare) });
    estimate();
  }

  // Add to what is written already.
  mico.draft = function (message, media) {
    box.value = [box.value, message].filter(Boolean).join("\n");
    attachments.restore(media);
    changed();
  };

  // What was written and not sent, or sent and not answered, before the page was loaded anew.
  function restore() {
    const draft = mico.kept("mico-draft", null);
    if (draft) mico.draft(draft.message, draft.media);
    changed();
  }

  // --- what it costs ---

  // One estimate at a time: the server may have to decode media for it.
  let estimating = false;
  let outdated = false;
  const estimate = mico.later(async () => {
    const meter = form.querySelector(".meter");
    const message = box.value.trim();
    outdated = estimating;
    if (estimating) return;
    if (mico.isAnswering() || attachments.busy || (!message && !attachments.cards.length)) {
      meter.replaceChildren();
      return;
    }
    estimating = true;
    try {
      const media = attachments.cards.map(({ id, kind }) => ({ id, kind }));
      const cost = await mico.call("estimate", { asked: { ask: "estimate", message, media, ...mico.place() } });
      attachments.learn(cost.cards);
      const percent = Math.min(100, Math.ceil((100 * (cost.prompt_tokens + cost.max_tokens)) / cost.context_length));
      const words = `${cost.prompt_tokens} tokens + up to ${cost.max_tokens} of ${cost.context_length}`;
      meter.replaceChildren(el("span", { class: `fill${cost.fits ? "" : " over"}`, "aria-hidden": "true" }, el("span", { style: `width:${percent}%` })), el("span", {}, cost.fits ? words + (cost.turns_left_out ? `; without the ${cost.turns_left_out} oldest of the chat` : "") : `${words}: too long. Start a new chat, or lower the longest answer in Settings.`));
    } catch {
      meter.replaceChildren(); // asking tells what is wrong
    }
    estimating = false;
    if (outdated) estimate();
  }, 400);

  // --- an empty chat ---

  let examples = null;
  mico.showWelcome = async function (log) {
    const place = el("div", { class: "welcome" }, el("h2", {}, mico.reads().some((kind) => !mico.kinds[kind].made_of.length) ? "Ask about what you see and hear" : "Ask anything"), el("p"));
    const list = el("div", { class: "examples" });
    place.append(list);
    log.replaceChildren(place);
    try {
      examples = examples || (await mico.call("examples"));
    } catch {
      return; // the banner says why
    }
    const kinds = (example) => example.cards.map((card) => mico.kinds[card.kind].noun).join(" + ");
    const readable = examples.filter((example) => example.cards.every((card) => mico.reads().includes(card.kind)));
    const add = mico.reads().length ? `Add one or several ${mico.readsInWords()}.` : "Ask a question.";
    place.querySelector("p").textContent = readable.length ? `${add} Or try an example:` : add;
    list.replaceChildren(
      ...readable.map((example) =>
        el(
          "button",
          { type: "button", class: "example", "aria-label": `${example.message} (${kinds(example)})`, onclick: (event) => run(event, example) },
          el("span", { class: "thumbs" }, example.cards.map(mico.thumbnail)),
          el("span", { class: "kind" }, kinds(example)),
          el("span", {}, example.message, example.credit && el("small", {}, example.credit)),
        ),
      ),
    );
  };

  async function run(event, example) {
    if (mico.isAnswering()) return;
    const all = event.currentTarget.parentElement.querySelectorAll("button");
    all.forEach((one) => (one.disabled = true));
    try {
      mico.ask(example.message, await mico.call("attach_example", { name: example.name }));
    } catch (error) {
      mico.banner(error);
    }
    all.forEach((one) => (one.disabled = false));
  }
})(window.mico);
