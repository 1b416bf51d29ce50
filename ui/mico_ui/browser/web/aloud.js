// Reads an answer aloud, a piece at a time: while one is heard, the next is made.
(function (mico) {
  const LONGEST = 1000; // characters of a piece; the first one is short, so that it is soon heard
  const FIRST = 200;
  const player = new Audio();
  let now = null; // the text that is read, and its button

  // The button that begins to read a text aloud, and then ends it.
  mico.aloud = function (text) {
    const place = mico.button("speaker", "Read aloud", () => (now?.place === place ? end() : read(place, text)));
    if (now?.text === text) now.place = mark(place, true); // the answer is drawn anew
    return place;
  };

  // Nobody wants to hear code.
  function piecesOf(text) {
    const words = text.replace(/(```|~~~)[\s\S]*?(\1|$)/g, "\n").trim();
    const first = words.match(new RegExp(`^[\\s\\S]{1,${FIRST}}(?:[.!?]+(?=\\s|$)|$)`))?.[0] || "";
    return [first, ...(words.slice(first.length).match(new RegExp(`[\\s\\S]{1,${LONGEST}}(?=\\s|$)|\\S{1,${LONGEST}}`, "g")) || [])].filter((one) => /[\p{L}\p{N}]/u.test(one));
  }

  async function read(place, text) {
    end();
    const pieces = piecesOf(text);
    if (!pieces.length) return mico.say("Nothing in this answer can be read aloud.");
    const mine = (now = { text, place: mark(place, true) });
    try {
      for (let coming = made(pieces[0]), n = 1; coming && now === mine; n += 1) {
        const url = await coming;
        coming = n < pieces.length && made(pieces[n]);
        coming?.catch?.(() => {}); // it is awaited when this piece was heard, or by nobody
        if (now === mine) await heard(url);
        URL.revokeObjectURL(url);
      }
    } catch (error) {
      if (now === mine) mico.banner(error);
    }
    if (now === mine) end();
  }

  async function made(piece) {
    const bytes = Uint8Array.from(atob(await mico.call("speak", { text: piece })), (one) => one.charCodeAt(0));
    return URL.createObjectURL(new Blob([bytes], { type: "audio/mpeg" }));
  }

  const heard = (url) =>
    new Promise((done, failed) => {
      player.onpause = player.onended = done;
      player.onerror = () => failed(new Error("This browser cannot play the voice's sound."));
      player.src = url;
      player.play().catch((error) => (error.name === "AbortError" ? done() : failed(error)));
    });

  function mark(place, on) {
    for (const name of ["aria-label", "title"]) place.setAttribute(name, on ? "Stop reading" : "Read aloud");
    return place;
  }

  function end() {
    if (!now) return;
    mark(now.place, false);
    now = null;
    player.pause();
  }

  // What is no longer shown is no longer read.
  mico.on("conversation", () => now && !now.place.isConnected && end());
  document.addEventListener("keydown", (event) => event.key === "Escape" && end());
})(window.mico);
