// Cards of media: small ones beside a question, whole ones in the report under an answer.
(function (mico) {
  const { el } = mico;

  // Shows what is known of a card by `fill`, now and when its pictures have come: the page's server
  // may have to make them first.
  async function show(place, card, fill) {
    place.dataset.of = card.id;
    place.fill = fill;
    fill();
    if (card.pictures.length || card.asked) return;
    card.asked = true;
    try {
      const { pictures, facts, cut } = await mico.call("preview", { shown: { id: card.id, kind: card.kind, pages: card.pages || [] } });
      // What is known of the pages that were sent is this turn's.
      Object.assign(card, card.pages?.length ? { pictures } : { pictures, facts, cut });
    } catch (error) {
      card.cut = [...card.cut, mico.problemOf(error).message];
    }
    for (const other of mico.root.querySelectorAll(`[data-of="${CSS.escape(card.id)}"]`)) other.fill();
  }

  const look = (card) => mico.kinds[card.kind].layout; // of style.css
  const plays = (card) => !["img", ""].includes(mico.kinds[card.kind].player);
  const picture = (one) => (one.src ? el("img", { src: one.src, alt: one.alt, loading: "lazy" }) : el("span", { class: "leaf", "aria-hidden": "true" }, one.text.slice(0, 500)));
  // The text of a page, to fold out; of one without a picture it is all that there is.
  const read = (one, open = false) => one.text && el("details", { class: "read", open }, el("summary", {}, `Text of ${one.caption}`), el("pre", { tabindex: "0" }, one.text));

  // The file itself, fetched when it is asked for: large, or with sound.
  async function open(card) {
    const dialog = mico.root.querySelector("dialog.viewer");
    const body = dialog.querySelector(".viewer-body");
    body.replaceChildren(el("p", { role: "status" }, "Fetching ", card.name, " ..."));
    dialog.showModal();
    try {
      const url = await mico.call("original", { id: card.id });
      const player = mico.kinds[card.kind].player;
      const alt = card.pictures[0]?.alt || card.name;
      const seen = card.pictures.filter((one) => one.src);
      const shown = player ? el(player, { src: url, ...(plays(card) ? { controls: true, autoplay: true, playsinline: true } : { alt }) }) : el("span", {}, seen.map(picture));
      shown.addEventListener("error", () =>
        body.append(el("p", { class: "problem" }, "This browser cannot show this format. ", el("a", { href: url, download: card.name }, "Save the file"))),
      );
      const looked = plays(card) ? [shown] : player || seen.length ? [zoomable(shown)] : [];
      body.replaceChildren(...looked, ...card.pictures.map((one) => read(one, !one.src)).filter(Boolean), el("p", {}, card.name, " ", el("a", { href: url, download: card.name }, "Save")));
    } catch (error) {
      const place = el("p", { class: "problem", role: "alert" });
      mico.tell(place, error);
      body.replaceChildren(place);
    }
    dialog.addEventListener("close", () => body.replaceChildren(), { once: true });
  }

  // A picture that a click shows larger, and at the next one whole again.
  function zoomable(shown) {
    const frame = el("button", { type: "button", class: "zoom", "aria-pressed": "false", title: "Zoom" }, shown);
    frame.addEventListener("click", () => frame.setAttribute("aria-pressed", String(frame.getAttribute("aria-pressed") === "false")));
    return frame;
  }

  mico.thumbnail = function (card) {
    const place = el("span", { class: `thumb ${look(card)}` });
    show(place, card, () => {
      const frames = card.pictures.filter((one) => one.caption.endsWith(" s")).slice(0, 4);
      place.replaceChildren(...(frames.length ? frames : card.pictures.slice(0, 1)).map(picture));
    });
    return place;
  };

  // The thumbnail as a button that shows or plays the whole medium.
  mico.openable = function (card) {
    const action = plays(card) ? "Play" : "Open";
    const play = plays(card) && el("span", { class: "play" }, mico.icon("play"));
    return el("button", { type: "button", class: "card-open", "aria-label": `${action} ${card.name}`, onclick: () => open(card) }, mico.thumbnail(card), play);
  };

  // What is pinned stays in the chat when the chat no longer fits and its oldest turns are left out.
  function pin(card) {
    const place = mico.button("pin", "", async () => {
      const pinned = !card.pinned;
      try {
        await mico.call("pin", { id: mico.chat.id, medium: card.id, pinned });
        card.pinned = pinned;
        // The card may have been drawn anew meanwhile.
        for (const one of mico.root.querySelectorAll(`[data-medium="${CSS.escape(card.id)}"] .pin`)) label(one, card);
        mico.say(pinned ? "Pinned: it stays when the chat no longer fits." : "Unpinned.");
      } catch (error) {
        mico.banner(error);
      }
    });
    place.classList.add("pin");
    label(place, card);
    return place;
  }
  function label(place, { name, pinned }) {
    for (const attribute of ["aria-label", "title"]) place.setAttribute(attribute, `${pinned ? "Unpin" : "Pin"} ${name}`);
    place.classList.toggle("pinned", Boolean(pinned));
  }

  mico.smallCard = function (card, view) {
    const facts = el("span", { class: "facts" });
    show(facts, card, () => {
      const words = [mico.kinds[card.kind].noun, ...card.facts.filter((fact) => /^(nearest|estimated)/.test(fact))];
      facts.textContent = [...words, card.tokens ? `${card.tokens} tokens` : ""].filter(Boolean).join(" · ");
    });
    return el(
      "figure",
      { class: `card ${look(card)}`, "data-kind": card.kind, "data-medium": card.id },
      mico.openable(card),
      typeof view.turn === "number" && pin(card),
      el("figcaption", {}, el("span", { class: "name" }, card.name), facts, mico.teaches(card) && el("button", { type: "button", "aria-label": `Teach ${card.name}`, onclick: () => mico.teach(card, view) }, "Teach")),
    );
  };

  function share(card, all) {
    if (!card.tokens) return null;
    const percent = Math.max(1, Math.round((100 * card.tokens) / Math.max(all, card.tokens)));
    return el(
      "div",
      { class: "share" },
      el("span", { class: "share-bar", "aria-hidden": "true" }, el("span", { style: `width:${percent}%` })),
      el("span", {}, `${card.tokens} tokens, ${percent} % of the question`),
    );
  }

  function wholeCard(card, promptTokens) {
    const pictures = el("div", { class: `pictures ${look(card)}` });
    const words = el("ul", { class: "facts" });
    show(pictures, card, () => {
      pictures.replaceChildren(
        ...card.pictures.map((one) => el("figure", { class: /^[\d.]+ s$/.test(one.caption) ? null : "wide" }, one.src && picture(one), one.caption && el("figcaption", {}, one.caption), read(one))),
      );
      words.replaceChildren(...card.facts.map((fact) => el("li", {}, fact)), ...card.cut.map((cut) => el("li", { class: "cut" }, cut)));
    });
    return el("section", { class: `taken ${look(card)}`, "data-kind": card.kind }, el("h2", {}, `${mico.kinds[card.kind].noun}: ${card.name}`), pictures, words, share(card, promptTokens));
  }

  // What an answer cost, in a line.
  function cost(view) {
    const { prompt_tokens, media_tokens, cached_tokens, completion_tokens } = view.usage;
    const media = media_tokens ? ` (${media_tokens} of media)` : "";
    const cached = cached_tokens ? ` ${cached_tokens} tokens were already computed.` : "";
    const speed = view.tokens_per_second ? `, ${view.tokens_per_second.toFixed(view.tokens_per_second < 10 ? 1 : 0)} tokens a second` : "";
    return el("p", { class: "usage" }, `Conversation up to here: ${prompt_tokens} tokens${media}.${cached} Answer: ${completion_tokens} tokens${speed}.`);
  }

  // Under an answer: what it cost; and where there are media, what was taken from each, to fold out.
  mico.report = function (view) {
    const usage = view.usage;
    const n = view.media.length;
    if (!n) return usage && el("details", { class: "report cost" }, el("summary", { "aria-label": "What the answer cost", title: "What the answer cost" }, mico.icon("info")), cost(view));
    const tokens = view.media.reduce((sum, card) => sum + (card.tokens || 0), 0);
    const head = `What was taken from ${n === 1 ? "the " + mico.kinds[view.media[0].kind].noun : n + " media"}: ${tokens} tokens`;
    const details = el("details", { class: "report" }, el("summary", {}, head));
    const body = el("div", { class: "report-body" });
    details.append(body);
    details.addEventListener("toggle", () => {
      if (!details.open || body.childElementCount) return;
      body.append(...view.media.map((card) => wholeCard(card, usage ? usage.prompt_tokens : tokens)));
      if (usage) body.append(cost(view));
    });
    return details;
  };
})(window.mico);
