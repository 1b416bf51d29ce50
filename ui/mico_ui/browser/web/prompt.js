// The system prompt of a chat: shown above its messages, and set in a dialog.
(function (mico) {
  let shown, dialog, box, problem;

  mico.startPrompt = function () {
    [shown, dialog] = [mico.root.querySelector(".prompt"), mico.root.querySelector("dialog.system")];
    [box, problem] = [dialog.querySelector("textarea"), dialog.querySelector(".problem")];
    mico.root.querySelector(".tools [data-do=system]").append(mico.icon("prompt"));
    mico.root.querySelectorAll("[data-do=system]").forEach((one) => one.addEventListener("click", open));
    dialog.querySelector("[data-do=close]").addEventListener("click", () => dialog.close());
    dialog.querySelector("form").addEventListener("submit", save);
    mico.on("conversation", show);
    mico.on("answering", show);
    show();
  };

  // A chat begins with the prompt of Settings, if it has none of its own.
  const current = () => mico.chat.system ?? (mico.place().fresh ? mico.settings.system : "");

  function show() {
    const text = current();
    shown.hidden = !text;
    shown.querySelector(".first").textContent = text.trim().split("\n")[0];
    shown.querySelector("p").textContent = text;
  }

  function open() {
    box.value = current();
    box.placeholder = mico.model()?.defaults?.system || "";
    problem.hidden = true;
    dialog.showModal();
  }

  async function save(event) {
    event.preventDefault();
    const { id } = mico.chat;
    const system = box.value.trim();
    try {
      // What is on its way to the server has its prompt already.
      if (!mico.place().fresh || mico.isAnswering()) await mico.call("change", { id, changes: { system: system || null } });
      if (mico.chat.id === id) mico.chat.system = system;
      dialog.close();
      show();
      mico.emit("conversation", id);
    } catch (error) {
      mico.tell(problem, error);
    }
  }
})(window.mico);
