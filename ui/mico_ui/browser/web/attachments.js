// Files on their way into a message: dropped, pasted, picked or recorded, and sent at once, so that
// what was understood of them shows before the question is asked.
(function (mico) {
  const { el } = mico;

  // Send a file to the page's own server; `part` hears how much of it, from 0 to 1, has arrived.
  function upload(file, part) {
    const [form, request] = [new FormData(), new XMLHttpRequest()];
    form.append("files", file, file.name || "pasted");
    const tooLarge = new mico.Problem({ message: `${file.name}: the file is too large: at most ${mico.largest >> 20} MB are taken.`, advice: "", away: false });
    return new Promise((resolve, reject) => {
      if (file.size > mico.largest) return reject(tooLarge);
      request.upload.addEventListener("progress", (event) => event.lengthComputable && part(event.loaded / event.total));
      request.addEventListener("load", () => {
        const answer = request.response;
        if (request.status === 200 && answer) resolve(answer[0]);
        else if (answer?.problem) reject(mico.failed(answer.problem));
        else reject(request.status === 413 ? tooLarge : mico.lostServer()); // a proxy's words
      });
      request.addEventListener("error", () => reject(mico.lostServer()));
      request.open("POST", "gradio_api/upload");
      request.responseType = "json";
      const { user, key } = mico.profile();
      request.setRequestHeader("x-mico-user", user);
      request.setRequestHeader("x-mico-key", encodeURIComponent(key));
      request.send(form);
    });
  }

  mico.upload = (file) => upload(file, () => undefined);

  // A list of chips; `onchange` is called whenever it changes.
  mico.Attachments = class {
    constructor(list, problem, onchange) {
      this.list = list;
      this.problem = problem;
      this.onchange = onchange;
      this.items = [];
      this.failed = [];
    }

    get cards() {
      return this.items.filter((item) => item.card).map((item) => item.card);
    }

    get busy() {
      return this.items.some((item) => !item.card);
    }

    add(files, kind = null) {
      this.clear();
      const most = mico.model()?.max_media ?? 32;
      const [all, room] = [Array.from(files), most - this.items.length];
      if (all.length > room) {
        const names = all.slice(Math.max(0, room)).map((file) => file.name);
        const left = names.length > 3 ? `${names[0]}, ${names[1]} and ${names.length - 2} others` : names.join(", ");
        this.fail(new mico.Problem({ message: `${left}: not added. A message takes at most ${most} files.`, advice: "Ask about some of them first.", away: false }));
      }
      return Promise.all(all.slice(0, Math.max(0, room)).map((file) => this.send({ file, kind, card: null })));
    }

    // Whatever went wrong since the last step of the user's, each on a line of its own.
    fail(error) {
      this.failed.push(mico.problemOf(error));
      const told = (name) => [...new Set(this.failed.map((one) => one[name]).filter(Boolean))].join("\n");
      mico.tell(this.problem, new mico.Problem({ ...this.failed.at(-1), message: told("message"), advice: told("advice") }));
    }

    clear() {
      this.failed = [];
      mico.tell(this.problem, null);
    }

    restore(cards) {
      for (const card of cards) this.items.push({ card, kind: card.kind, file: null });
      this.draw();
    }

    async send(item) {
      if (!this.items.includes(item)) this.items.push(item);
      const former = item.card;
      item.card = null;
      this.draw();
      try {
        const path = await upload(item.file, (part) => {
          item.state.textContent = part < 1 ? `sending: ${Math.floor(100 * part)} %` : "reading ...";
        });
        item.card = await mico.call("attach", { file: { path, name: item.file.name || "pasted", kind: item.kind, reads: mico.reads() } });
        if (!this.items.includes(item)) this.forget(item); // taken away meanwhile
        if (former) this.forget({ ...item, card: former });
      } catch (error) {
        // A file that cannot be shown as another kind stays what it was.
        if (former) Object.assign(item, { card: former, kind: former.kind });
        else this.items = this.items.filter((other) => other !== item);
        this.fail(error);
      }
      this.draw();
    }

    // Show the same file as another kind: the server decodes it anew. As text: what is said in it.
    async change(item, kind) {
      if (kind === "text") {
        this.remove(item);
        mico.draft(item.card.spoken, []);
        mico.focusMessage();
        return;
      }
      this.clear();
      item.kind = kind;
      await this.send(item);
      if (this.items.includes(item)) item.element.querySelector("select").focus();
      else this.list.closest("form, .drop").querySelector("textarea, button").focus();
    }

    // The estimated depth map of a picture, behind it.
    async estimateDepth(item, button) {
      button.disabled = true;
      this.clear();
      try {
        const card = await mico.call("estimate_depth", { id: item.card.id });
        button.remove();
        const place = this.items.indexOf(item);
        const found = { card, kind: card.kind, file: null };
        if (place < 0) return;
        this.items.splice(place + 1, 0, found);
        this.draw();
        item.element.after(found.element);
      } catch (error) {
        button.disabled = false;
        this.fail(error);
      }
    }

    forget(item) {
      // Examples and questions asked again show media that a conversation may show too: those stay.
      if (item.card && item.file) mico.call("forget", { id: item.card.id }).catch(() => undefined);
    }

    remove(item) {
      const next = this.items[this.items.indexOf(item) + 1] || this.items.at(-2);
      this.items = this.items.filter((other) => other !== item);
      this.forget(item);
      this.draw();
      (next?.element.lastChild || this.list.closest("form, .drop").querySelector("textarea, button")).focus();
    }

    // What was read in media after they were attached, which may take long.
    learn(cards) {
      for (const item of this.items) {
        const found = cards.find((card) => card.id === item.card?.id);
        if (!found || (found.tokens === item.card.tokens && found.spoken === item.card.spoken)) continue;
        const { tokens, spoken, facts, cut } = found;
        Object.assign(item.card, { tokens, spoken, facts, cut });
        item.drawn = null;
      }
      if (this.items.some((item) => item.card && !item.drawn)) this.draw();
    }

    take() {
      const cards = this.cards;
      this.items = [];
      this.clear();
      this.draw();
      return cards;
    }

    draw() {
      // Only what is new is drawn: the list keeps its place, and its buttons the focus.
      for (const item of this.items) {
        if (item.element && item.drawn === item.card) continue;
        const chip = this.chip(item);
        if (item.element) {
          const focused = item.element.contains(document.activeElement) && document.activeElement.getAttribute("aria-label");
          item.element.replaceWith(chip);
          if (focused) chip.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
        }
        else {
          this.list.append(chip);
          this.list.scrollTop = this.list.scrollHeight;
        }
        Object.assign(item, { element: chip, drawn: item.card });
      }
      const shown = this.items.map((item) => item.element);
      for (const chip of Array.from(this.list.children)) if (!shown.includes(chip)) chip.remove();
      this.list.hidden = !this.items.length;
      this.onchange();
    }

    chip(item) {
      const card = item.card;
      const name = card ? card.name : item.file.name;
      const remove = mico.button("close", `Remove ${name}`, () => this.remove(item));
      if (!card) {
        item.state = el("span", { role: "status" }, "sending ...");
        return el("li", { class: "chip busy" }, el("span", { class: "name" }, name), item.state, remove);
      }
      const asText = Boolean(card.spoken) && this === mico.attachments;
      const choice =
        (card.kinds.length > 1 || asText) && item.file
          ? el(
              "select",
              { "aria-label": `Show ${name} as`, onchange: (event) => this.change(item, event.target.value) },
              card.kinds.map((kind) => el("option", { value: kind, selected: kind === card.kind }, `as ${mico.kinds[kind].noun}`)),
              asText && el("option", { value: "text", title: card.spoken }, "as text"),
            )
          : el("span", { class: "kind" }, mico.kinds[card.kind].noun);
      const facts = [...card.facts.filter((f) => /^(nearest|estimated)/.test(f) || /^([\d.]+ s|\d+ of \d+ pages?)$/.test(f)), card.tokens ? `${card.tokens} tokens` : ""];
      const estimates = mico.kinds[card.kind].estimates_depth && this === mico.attachments && mico.model()?.depth_model;
      const depth = estimates && mico.button("depth", `Estimate the depth of ${name}`, (event) => this.estimateDepth(item, event.currentTarget));
      return el(
        "li",
        { class: "chip", "data-kind": card.kind },
        mico.openable(card),
        el("span", { class: "chip-words" }, el("span", { class: "name" }, name), choice, el("span", { class: "facts" }, facts.filter(Boolean).join(" · "))),
        depth,
        remove,
      );
    }
  };

  // --- recording ---

  function recorder(stream, name, done) {
    const recording = new MediaRecorder(stream);
    const pieces = [];
    recording.ondataavailable = (event) => pieces.push(event.data);
    recording.onstop = () => {
      const type = recording.mimeType || "video/webm";
      done(new File(pieces, `${name}.${type.includes("mp4") ? "mp4" : "webm"}`, { type }));
    };
    recording.start();
    return recording;
  }
  const end = (mico.endStream = (stream) => stream.getTracks().forEach((track) => track.stop()));
  let recordings = 0;

  const devices = (mico.devices = async function (wanted, what, advice = "Allow it in the browser, or add a file instead.") {
    try {
      return await navigator.mediaDevices.getUserMedia(wanted);
    } catch (error) {
      const reason = navigator.mediaDevices ? error.message : "a browser only allows it on https and on this machine's own address";
      throw new mico.Problem({ message: `No ${what}: ${reason}.`, advice, away: false });
    }
  });

  // Show a camera's picture in `video`, if there is sound with its sound; `flip` is the button of
  // another camera.
  mico.camera = async function (video, flip, failed, sound = false) {
    const camera = { stream: null, end: () => (camera.stream && end(camera.stream), (video.srcObject = null)) };
    let facing = matchMedia("(pointer: coarse)").matches ? "environment" : "user"; // what is before a phone
    const look = async () => {
      if (camera.stream) end(camera.stream);
      const wanted = { facingMode: { ideal: facing } };
      const silent = () => devices({ video: wanted }, "camera");
      camera.stream = sound ? await devices({ video: wanted, audio: true }, "camera").catch(silent) : await silent();
      video.srcObject = camera.stream;
    };
    await look();
    flip.hidden = (await navigator.mediaDevices.enumerateDevices()).filter((one) => one.kind === "videoinput").length < 2;
    flip.disabled = false;
    flip.onclick = async () => {
      facing = facing === "user" ? "environment" : "user";
      flip.disabled = true;
      await look().catch(failed);
      flip.disabled = false;
    };
    return camera;
  };

  // What a video shows at this moment.
  mico.drawn = function (video, scale = 1) {
    const [width, height] = [video.videoWidth, video.videoHeight].map((one) => Math.max(1, Math.round(scale * one)));
    const canvas = el("canvas", { width, height });
    canvas.getContext("2d").drawImage(video, 0, 0, width, height);
    return canvas;
  };

  mico.recordSound = function (button, time, attachments) {
    let recording = null;
    button.addEventListener("click", async () => {
      if (recording) {
        recording.stop();
        return;
      }
      try {
        const stream = await devices({ audio: true }, "microphone");
        const endTimer = mico.timer(time);
        recording = recorder(stream, `recording-${++recordings}`, (file) => {
          endTimer();
          end(stream);
          recording = null;
          button.classList.remove("recording");
          button.setAttribute("aria-label", "Record sound");
          attachments.add([file], mico.recorded("microphone"));
        });
        button.classList.add("recording");
        button.setAttribute("aria-label", "Stop recording");
      } catch (error) {
        mico.tell(attachments.problem, error);
      }
    });
  };

  mico.openCamera = async function (attachments) {
    const dialog = mico.root.querySelector("dialog.camera");
    const [video, film] = [dialog.querySelector("video"), dialog.querySelector("[data-do=film]")];
    film.hidden = !mico.recorded("film");
    dialog.querySelector("[data-do=snap]").hidden = !mico.recorded("camera");
    const flip = dialog.querySelector("[data-do=flip]");
    const failed = (error) => mico.tell(attachments.problem, error);
    let camera, recording = null;
    try {
      camera = await mico.camera(video, flip, failed, true);
    } catch (error) {
      return failed(error);
    }
    // Esc takes nothing along.
    dialog.oncancel = () => recording && (recording.onstop = null);
    dialog.querySelector("[data-do=snap]").onclick = () => {
      mico.drawn(video).toBlob((blob) => attachments.add([new File([blob], `photo-${++recordings}.jpg`, { type: "image/jpeg" })], mico.recorded("camera")), "image/jpeg", 0.92);
      dialog.close();
    };
    film.textContent = "Record a video";
    let endTimer = () => undefined;
    film.onclick = () => {
      if (recording) return dialog.close();
      flip.disabled = true;
      recording = recorder(camera.stream, `video-${++recordings}`, (file) => attachments.add([file], mico.recorded("film")));
      film.textContent = "Stop and attach";
      endTimer = mico.timer(dialog.querySelector(".timer"));
    };
    dialog.querySelector("[data-do=close-camera]").onclick = () => {
      if (recording) recording.onstop = null;
      dialog.close();
    };
    dialog.addEventListener("close", () => {
      endTimer();
      if (recording && recording.state !== "inactive") recording.stop();
      camera.end();
    }, { once: true });
    dialog.showModal();
  };
})(window.mico);
