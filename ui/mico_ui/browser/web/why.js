// Which medium an answer rests on: its words in the colours of the media, and heat over each medium.
(function (mico) {
  const { el } = mico;
  const COLOURS = 5; // of style.css: rests-0 to rests-4
  const LEAST = 0.1; // nats, as in mico_chat/explain.py
  const colour = (number) => `rests-${number % COLOURS}`;
  const nats = (effect) => `${effect >= 0 ? "-" : "+"}${Math.abs(effect).toFixed(1)}`;

  // Ask the server, and show what it found below the answer. `cards`: all media up to this turn.
  mico.why = async function (place, turn, cards) {
    const note = el("p", { class: "note", role: "status" }, "Leaving out each medium, and each of its parts, in turn ...");
    place.replaceChildren(note);
    place.hidden = false;
    const look = async () => (note.textContent = (await mico.call("explaining")) || note.textContent);
    const looking = setInterval(() => look().catch(() => clearInterval(looking)), 500);
    try {
      const found = await mico.call("explain", { id: mico.chat.id, turn });
      place.replaceChildren(...drawn(found, cards));
    } catch (error) {
      const problem = el("p", { class: "problem", role: "alert" });
      mico.tell(problem, error);
      place.replaceChildren(problem);
    }
    clearInterval(looking);
  };

  function drawn(found, cards) {
    const words = found.words.map(({ text, medium, effects }) => {
      if (medium === null) return document.createTextNode(text);
      const rests = `rests on ${cards[medium].name}: ${nats(effects[medium])} without it`;
      const [space, word] = [text.match(/^\s*/)[0], text.trimStart()];
      return [space, el("mark", { class: colour(medium), title: rests }, word)];
    });
    const most = Math.max(LEAST, ...found.media.flatMap(({ parts }) => parts.map((part) => part.effect)));
    const heat = (part) => Math.max(0, part.effect) / most;
    const media = found.media.map((medium, number) => shown(medium, cards[number], number, heat));
    const same = found.same_without_media && el("p", { class: "note same" }, "Without any medium, the answer would have been the same.");
    const legend = "The numbers are what the answer's log-probability loses when a medium, or the part below the heat, is left out.";
    return [el("p", { class: "words" }, words.flat()), same, el("div", { class: "rests" }, media), el("p", { class: "note" }, legend)].filter(Boolean);
  }

  function shown(medium, card, number, heat) {
    const percent = Math.round(100 * medium.share);
    const of = (what) => medium.parts.filter((part) => part.what === what);
    const others = medium.parts.filter(({ what }) => !["tile", "stretch", "frame"].includes(what));
    const names = { order: "the order of its frames", words: "words read or heard in it" };
    return el(
      "section",
      { class: "rest", "data-kind": card.kind },
      el("h2", {}, el("mark", { class: colour(number) }, card.name), ` ${percent} % `, el("span", { class: "facts" }, nats(medium.effect))),
      el("span", { class: "share-bar", "aria-hidden": "true" }, el("span", { style: `width:${percent}%` })),
      picture(card, of("tile"), heat),
      of("stretch").length > 0 && el("div", { class: "wave" }, mico.thumbnail(card)),
      timeline(of("frame"), heat, "frame", card.pictures),
      timeline(of("stretch"), heat, "stretch"),
      others.length > 0 && el("p", { class: "facts" }, others.map((part) => `${names[part.what] ?? part.what}: ${nats(part.effect)}`).join(", ")),
    );
  }

  // A still with its tiles over it, the more it rests on one, the warmer.
  function picture(card, tiles, heat) {
    if (!tiles.length) return null;
    const cells = tiles.map((tile) => {
      const [left, top, right, bottom] = tile.box.map((edge) => 100 * edge);
      return el("span", { class: "cell", style: `left:${left}%;top:${top}%;width:${right - left}%;height:${bottom - top}%;opacity:${(0.75 * heat(tile)).toFixed(3)}`, title: nats(tile.effect) });
    });
    const best = tiles.reduce((one, other) => (other.effect > one.effect ? other : one));
    const [left, top] = best.box.map((edge) => Math.round(100 * edge));
    return el("div", { class: "heat", role: "img", "aria-label": `It rests most on the part at ${left} % from the left and ${top} % from the top` }, mico.thumbnail(card), ...cells);
  }

  // What is over time: each part below its frame, if there are as many pictures as parts.
  function timeline(parts, heat, what, pictures = []) {
    if (!parts.length) return null;
    const frames = pictures.filter((one) => / s$/.test(one.caption));
    const best = parts.reduce((one, other) => (other.effect > one.effect ? other : one));
    const label = `It rests most on the ${what} at ${best.time[0].toFixed(1)} s`;
    const frame = (number) => frames.length === parts.length && el("img", { src: frames[number].src, alt: "" });
    const cells = parts.map((part, number) => el("span", { title: `${part.time[0].toFixed(1)} to ${part.time[1].toFixed(1)} s: ${nats(part.effect)}` }, frame(number), el("span", { style: `opacity:${heat(part).toFixed(3)}` }), el("small", {}, part.time[0].toFixed(1))));
    return el("div", { class: "timeline", role: "img", "aria-label": label }, cells);
  }
})(window.mico);
