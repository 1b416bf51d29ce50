// Talk: speech in real time, in OpenAI's protocol, over a WebSocket of the page's own server.
(function (mico) {
  const { el } = mico;
  const RATE = 24000; // samples a second of the sound that comes
  const MOST_WAITING = 2 << 20; // bytes that the network has not taken: half a minute of sound
  const MOST_EARLY = 750; // pieces: half a minute
  const LONGEST_SIDE = 640; // of a frame, in pixels
  const INTERRUPTED = "interrupted"; // the name of events that may come when there is nothing left to stop
  const PLAIN = { audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 } };
  let dialog, captions, orb, video, now = null;
  let stored = null; // the chat that has what was said
  const part = (name) => dialog.querySelector(`[data-do=${name}]`);

  mico.startTalk = function () {
    const open = mico.root.querySelector("[data-do=talk]");
    dialog = mico.root.querySelector("dialog.talk");
    [captions, orb, video] = [".captions", ".orb", "video"].map((one) => dialog.querySelector(one));
    open.append(mico.icon("talk"), "Talk");
    open.addEventListener("click", begin);
    orb.append(mico.icon("mic"));
    orb.addEventListener("click", () => mute());
    part("interrupt").addEventListener("click", () => hush(true));
    part("watch").addEventListener("click", () => watch(!now?.camera));
    part("look").addEventListener("click", look);
    dialog.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || part("interrupt").disabled) return;
      event.preventDefault(); // else the dialog closes
      hush(true);
    });
    dialog.addEventListener("close", end);
    mico.on("answering", (on) => (open.disabled = on));
  };

  // A session: `pieces` are sounds that play or wait for it, until `until` of the clock of `sound`;
  // `unsaid` are words that are shown with their sound. `dropped` is the response that was
  // interrupted, whose events are still on their way.
  async function begin() {
    const mine = (now = { pieces: [], unsaid: [], early: [], until: 0, muted: false, sound: new AudioContext() });
    stored = null;
    captions.replaceChildren();
    tell(null);
    for (const name of ["watch", "look"]) part(name).hidden = !mico.recorded("camera");
    state("Connecting");
    mute(false);
    dialog.showModal();
    try {
      const stream = await mico.devices(PLAIN, "microphone", "Allow it in the browser, or write instead.");
      if (now === mine) await mine.sound.audioWorklet.addModule("ear.js");
      if (now !== mine) return mico.endStream(stream);
      mine.stream = stream;
      mute(mine.muted);
      listen(mine);
      const place = mico.place();
      const secret = await mico.call("talk", { system: place.system || "" });
      if (now !== mine) return;
      const url = new URL("talk", location.href.replace(/^http/, "ws"));
      url.search = new URLSearchParams({ conversation: place.fresh ? "new" : place.conversation_id, store_media: mico.settings.recordings });
      const socket = (mine.socket = new WebSocket(url, ["realtime", `openai-insecure-api-key.${secret}`]));
      socket.onmessage = (event) => now === mine && take(JSON.parse(event.data));
      socket.onclose = ({ reason }) => now === mine && over(reason);
    } catch (error) {
      if (now === mine) over("", error);
    }
  }

  // What is said before the session begins is sent as it begins.
  function listen(mine) {
    const { sound, stream } = mine;
    const ear = new AudioWorkletNode(sound, "mico-ear", { numberOfOutputs: 0 });
    sound.createMediaStreamSource(stream).connect(ear);
    sound.resume(); // a browser may have waited for a use of the page
    ear.port.onmessage = ({ data: { pcm, level } }) => {
      if (now !== mine) return;
      orb.style.setProperty("--level", Math.min(1, 4 * level).toFixed(2));
      const audio = btoa(String.fromCharCode(...new Uint8Array(pcm.buffer)));
      if (mine.ticks) send("input_audio_buffer.append", { audio });
      else if (mine.early.push(audio) > MOST_EARLY) mine.early.shift();
      if (mine.socket?.bufferedAmount > MOST_WAITING) mine.socket.close(4000, "The network is too slow for sound.");
    };
  }

  function begun() {
    for (const audio of now.early.splice(0)) send("input_audio_buffer.append", { audio });
    now.ticks = setInterval(show, 100);
    state("Listening");
  }

  const send = (type, more = {}) => now?.socket?.readyState === WebSocket.OPEN && now.socket.send(JSON.stringify({ type, ...more }));
  const state = (text) => dialog.querySelector(".state").textContent !== text && (dialog.querySelector(".state").textContent = text);
  const tell = (error) => mico.tell(dialog.querySelector(".problem"), error);

  // --- what the server says ---

  function take(event) {
    if (event.response_id && event.response_id === now.dropped) return;
    const does = {
      "session.created": begun,
      "conversation.created": () => (now.chat = event.conversation.id),
      "input_audio_buffer.speech_started": started,
      "input_audio_buffer.speech_stopped": stopped,
      "conversation.item.input_audio_transcription.completed": () => heard(event.transcript),
      "response.created": () => ([now.response, stored] = [event.response.id, now.chat]),
      "response.output_audio_transcript.delta": () => now.unsaid.push({ item: event.item_id, text: event.delta, at: Math.max(now.until, now.sound.currentTime) }),
      "response.output_audio.delta": () => play(event),
      "response.done": () => {
        if (event.response.id === now.response) now.response = null;
        mico.emit("list", null);
      },
      error: () => event.error.event_id !== INTERRUPTED && tell(new mico.Problem({ message: event.error.message, advice: "", away: false })),
    };
    does[event.type]?.();
  }

  function started() {
    now.hearing = true;
    tell(null);
    hush(false);
    state("Hearing you");
  }

  // With the camera the page asks for the answer, once what it shows has been sent.
  function stopped() {
    now.hearing = false;
    state("Thinking");
    if (now.camera) write(frame());
  }

  function heard(text) {
    if (text) caption("you", text);
    if (text && now.camera && !now.hearing && !now.response) send("response.create");
    if (!text && !now.hearing) state("Listening");
  }

  function play({ item_id: item, delta }) {
    const bytes = Uint8Array.from(atob(delta), (one) => one.charCodeAt(0));
    const samples = Float32Array.from(new Int16Array(bytes.buffer), (one) => one / 32768);
    const { sound } = now;
    const buffer = sound.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(sound, { buffer });
    source.connect(sound.destination);
    const at = Math.max(now.until, sound.currentTime);
    source.start(at);
    now.until = at + buffer.duration;
    now.pieces = now.pieces.filter((one) => one.item === item || one.end > sound.currentTime);
    now.pieces.push({ item, source, at, end: now.until });
  }

  // Words appear with their sound.
  function show() {
    const time = now.sound.currentTime;
    while (now.unsaid.length && now.unsaid[0].at <= time) {
      const { item, text } = now.unsaid.shift();
      const last = captions.lastElementChild;
      if (last?.dataset.item === item) last.append(text);
      else caption("it", text).dataset.item = item;
    }
    const speaking = now.until > time;
    if (speaking) state("Speaking");
    else if (now.response) state("Thinking");
    else if (now.speaking) state("Listening");
    now.speaking = speaking;
    part("interrupt").disabled = !speaking && !now.response;
  }

  function caption(who, text) {
    const line = el("p", { class: who }, text);
    captions.append(line);
    captions.scrollTop = captions.scrollHeight;
    return line;
  }

  // End what is spoken, and tell the server how much of it was heard. Speech ends it there already.
  function hush(asked) {
    if (!now) return;
    const { sound, pieces, response } = now;
    const time = sound.currentTime;
    const left = pieces.filter((one) => one.end > time);
    if (response && asked) send("response.cancel", { event_id: INTERRUPTED });
    if (left.length) {
      const { item } = left[0];
      const seconds = pieces.filter((one) => one.item === item).reduce((sum, one) => sum + Math.max(0, Math.min(time, one.end) - one.at), 0);
      left.forEach(({ source }) => source.stop());
      send("conversation.item.truncate", { event_id: INTERRUPTED, item_id: item, content_index: 0, audio_end_ms: Math.floor(1000 * seconds) });
    }
    Object.assign(now, { pieces: [], unsaid: [], until: 0, response: null, dropped: response || now.dropped });
  }

  // --- what can be done ---

  function mute(on = !now.muted) {
    now.muted = on;
    orb.setAttribute("aria-pressed", String(on));
    for (const track of now.stream?.getTracks() || []) track.enabled = !on; // silence is sent
  }

  // While the camera is on, each turn ends with what it shows.
  async function watch(on) {
    const mine = now;
    if (!mine?.socket) return;
    part("watch").setAttribute("aria-pressed", String(on));
    video.hidden = !on;
    if (on) {
      try {
        const camera = await mico.camera(video, part("flip"), tell);
        if (now !== mine) return camera.end();
        mine.camera = camera;
      } catch (error) {
        tell(error);
        return watch(false);
      }
    } else {
      mine.camera?.end();
      mine.camera = null;
      part("flip").hidden = true;
    }
    const turn_detection = { type: "server_vad", create_response: !on };
    send("session.update", { session: { type: "realtime", audio: { input: { turn_detection } } } });
  }

  function frame() {
    const scale = Math.min(1, LONGEST_SIDE / Math.max(video.videoWidth, video.videoHeight));
    const image_url = mico.drawn(video, scale).toDataURL("image/jpeg", 0.85);
    return { type: "input_image", image_url };
  }
  const write = (...content) => send("conversation.item.create", { item: { type: "message", role: "user", content } });

  async function look() {
    const mine = now;
    if (!mine?.camera) await watch(true);
    if (now !== mine || !mine?.camera) return;
    hush(true);
    const text = "Look at this.";
    write(frame(), { type: "input_text", text });
    caption("you", text);
    state("Thinking");
    send("response.create");
  }

  // --- the end ---

  // The connection has ended; what was said can still be read.
  function over(reason, error = null) {
    const last = dialog.querySelector(".problem");
    release();
    state("Ended");
    if (error) tell(error);
    else if (last.hidden) tell(new mico.Problem({ message: reason || "The connection has ended.", advice: "Close this, and talk again.", away: false }));
  }

  function release() {
    clearInterval(now.ticks);
    now.pieces.forEach(({ source }) => source.stop());
    now.socket?.close();
    now.camera?.end();
    if (now.stream) mico.endStream(now.stream);
    now.sound.close();
    now = null;
    [video.hidden, part("flip").hidden, part("interrupt").disabled] = [true, true, true];
    part("watch").setAttribute("aria-pressed", "false");
    orb.style.setProperty("--level", 0);
  }

  function end() {
    if (now) release();
    mico.emit("list", null);
    if (stored) mico.openConversation(stored);
  }
})(window.mico);
