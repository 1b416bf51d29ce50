// The models that the server has: which one answers, and what it reads.
(function (mico) {
  const { el } = mico;
  let models = [];
  let shown = "";

  // The chosen model, or the server's first; null until the server has told its models.
  mico.model = () => models.find((one) => one.id === mico.settings.model) || models[0] || null;
  // The model that answers beside it; empty without one.
  mico.second = () => (models.some((one) => one.id === mico.settings.second) && mico.settings.second !== mico.model().id ? mico.settings.second : "");
  mico.reads = () => mico.model()?.kinds || Object.keys(mico.kinds);
  mico.readsInWords = function () {
    const names = mico.reads().map((kind) => mico.kinds[kind].plural);
    return names.length > 1 ? `${names.slice(0, -1).join(", ")} or ${names.at(-1)}` : names[0] || "";
  };

  mico.startModels = () => mico.menu(mico.root.querySelector(".picker"));

  // A name that the server does not have chooses nothing.
  mico.chooseModel = function (id) {
    if (!models.some((one) => one.id === id)) return;
    if (id === mico.second()) mico.settings.second = mico.model().id; // both still answer
    mico.settings.model = id;
    draw();
  };

  mico.showModels = function (found) {
    models = found;
    draw();
  };

  const STATES = { unloaded: "not loaded", loading: "loading", failed: "failed" };

  function choice(one, chosen) {
    const reads = `text${one.kinds.map((kind) => `, ${mico.kinds[kind].plural}`).join("")}`;
    const facts = [reads, STATES[one.status], one.reason].filter(Boolean).join(" · ");
    const choose = () => {
      mico.root.querySelector(".picker").open = false;
      mico.chooseModel(one.id);
      mico.keep("mico-settings", mico.settings);
      mico.focusMessage();
    };
    return el("button", { type: "button", "aria-current": chosen && "true", onclick: choose }, el("span", { class: "name" }, one.id), el("small", {}, facts));
  }

  function beside(model) {
    const others = models.filter((one) => one !== model).map((one) => el("option", { selected: one.id === mico.second() }, one.id));
    const choose = (event) => {
      mico.settings.second = event.target.value;
      mico.keep("mico-settings", mico.settings);
      draw();
    };
    return el("label", {}, "Side by side with", el("select", { onchange: choose }, el("option", { value: "" }, "no other"), others));
  }

  function draw() {
    const model = mico.model();
    mico.chosen = models.length > 1 ? model.id : "";
    const now = JSON.stringify([models, model.id, mico.second()]);
    if (now === shown) return;
    shown = now;
    const picker = mico.root.querySelector(".picker");
    picker.hidden = models.length < 2;
    const summary = picker.querySelector("summary");
    const names = [model.id, mico.second()].filter(Boolean).join(" + ");
    summary.replaceChildren(el("span", { class: "name" }, names), mico.icon("down"));
    summary.setAttribute("aria-label", `Model: ${names}`);
    picker.querySelector(".menu-list").replaceChildren(...models.map((one) => choice(one, one === model)), beside(model));
    const length = model.context_length === null ? "loaded when it is asked" : `${model.context_length} tokens`;
    mico.root.querySelector(".model").textContent = models.length > 1 ? length : `${model.id} · ${length}`;
    mico.emit("server", model);
  }
})(window.mico);
