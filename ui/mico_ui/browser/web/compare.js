// The page on which media and sentences are compared, each with each, as a heat map.
(function (mico) {
  const { el } = mico;

  mico.startCompare = function () {
    const page = mico.root.querySelector(".compare");
    const [input, problem, grid, box, legend] = ["input[type=file]", ".compare-problem", ".grid", ".sentences", ".legend"].map((one) => page.querySelector(one));
    const attachments = new mico.Attachments(page.querySelector(".chips"), page.querySelector(".chips-problem"), () => undefined);
    mico.compareAttachments = attachments;
    page.querySelector("[data-do=pick-compare]").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      attachments.add(input.files);
      input.value = "";
    });

    const caution = page.querySelector(".caution");
    mico.on("server", (state) => {
      caution.textContent = state.caution;
      caution.hidden = !state.caution;
    });

    const button = page.querySelector("[data-do=compare]");
    async function compare() {
      const texts = box.value.split("\n").map((line) => line.trim()).filter(Boolean);
      mico.tell(problem, null);
      button.disabled = true;
      try {
        const cards = attachments.cards;
        const compared = { model: mico.model()?.id || "", media: cards.map(({ id, kind }) => ({ id, kind })), texts };
        const [least, most] = draw(grid, cards, texts, await mico.call("compare", { compared }));
        legend.querySelector(".scale-least").textContent = least.toFixed(2);
        legend.querySelector(".scale-most").textContent = most.toFixed(2);
        grid.hidden = legend.hidden = false;
        (caution.hidden ? grid : caution).scrollIntoView();
      } catch (error) {
        mico.tell(problem, error);
      }
      button.disabled = false;
    }
    button.addEventListener("click", compare);
    page.querySelector("[data-do=compare-example]").addEventListener("click", async (event) => {
      const again = event.currentTarget;
      again.disabled = true;
      try {
        const example = await mico.call("compare_example");
        attachments.take();
        attachments.restore(example.cards);
        box.value = example.texts.join("\n");
        await compare();
      } catch (error) {
        mico.tell(problem, error);
      }
      again.disabled = false;
    });
  };

  // The table; its least and its largest similarity, from which the colours go.
  function draw(place, cards, texts, found) {
    const heads = [...cards.map((card) => () => el("span", { class: "head" }, mico.thumbnail(card), el("span", {}, card.name))), ...texts.map((text) => () => el("span", { class: "head" }, text))];
    const names = [...cards.map((card) => card.name), ...texts];
    const values = found.similarity.flatMap((row, i) => row.filter((_, j) => i !== j));
    const [least, most] = [Math.min(...values), Math.max(...values)];
    const cell = (i, j) => {
      if (i === j) return el("td", { class: "self" }, "-");
      const value = found.similarity[i][j];
      const warmth = most > least ? (value - least) / (most - least) : 1;
      return el("td", { style: `--warmth:${warmth.toFixed(3)}`, class: "value", title: `${names[i]} / ${names[j]}` }, el("strong", {}, value.toFixed(2)));
    };
    place.replaceChildren(
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, el("td"), heads.map((head) => el("th", { scope: "col" }, head())))),
        el("tbody", {}, heads.map((head, i) => el("tr", {}, el("th", { scope: "row" }, head()), heads.map((_, j) => cell(i, j))))),
      ),
    );
    return [least, most];
  }
})(window.mico);
