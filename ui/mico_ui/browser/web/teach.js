// Teaching a name: a picture or sound of a question gets one, or a wrong answer is put right.
(function (mico) {
  mico.teaches = (card) => ["image", "audio"].includes(card.kind);

  // Ask for the name of a card in a turn. The turn is a correction if its answer lacks the name.
  mico.teach = function (card, view) {
    const dialog = mico.root.querySelector("dialog.teach");
    const [form, list, problem] = ["form", ".chips", ".problem"].map((one) => dialog.querySelector(one));
    const { name } = form.elements;
    const files = form.querySelector("input[type=file]");
    const more = new mico.Attachments(list, problem, () => (form.querySelector(".primary").disabled = more?.busy));
    const close = () => dialog.close();
    name.value = "";
    mico.tell(problem, null);
    files.onchange = () => {
      more.add(files.files, card.kind);
      files.value = "";
    };
    form.querySelector("[data-do=close]").onclick = close;
    form.onsubmit = async (event) => {
      event.preventDefault();
      const told = name.value.trim();
      const wrong = view.answer && !view.answer.toLowerCase().includes(told.toLowerCase());
      const media = [card, ...more.cards].map(({ id, kind }) => ({ id, kind }));
      try {
        mico.say(`${await mico.call("teach", { name: told, media, id: mico.chat.id, turn: wrong ? view.turn : null })} is taught.`);
        close();
      } catch (error) {
        mico.tell(problem, error);
      }
    };
    dialog.onclose = () => {
      more.items.forEach((item) => more.forget(item));
      more.take();
    };
    dialog.showModal();
  };
})(window.mico);
