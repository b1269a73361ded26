"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // An image that several questions share is in the page once.
  all("img[data-same]").forEach((image) => { image.src = document.getElementById("i" + image.dataset.same).src; });
  all(".card img").forEach((image) => image.addEventListener("click", () => image.closest(".card").classList.toggle("big")));

  // A table that is wider than the screen says so.
  const hints = () => all(".scroll").forEach((box) => { box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth + 1; });
  addEventListener("resize", hints);
  hints();

  const form = document.querySelector(".filters");
  if (form) {
    const cards = all(".card"), count = document.getElementById("count"), none = document.querySelector(".none");
    const more = document.querySelector(".more"), page = 24;
    const state = { flip: "", category: "", set: "", text: "" };
    let room = page;
    const total = count.textContent;
    const apply = () => {
      let shown = 0;
      const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
      for (const card of cards) {
        const text = words.length ? card.textContent.toLowerCase() : "";
        const fits = (!state.flip || card.dataset.flip === state.flip) && (!state.category || card.dataset.category === state.category)
          && (!state.set || card.dataset.set === state.set) && words.every((word) => text.includes(word));
        shown += fits;
        card.hidden = !fits || shown > room;
      }
      count.textContent = shown === cards.length ? total : `${shown} of ${cards.length} fit`;
      none.hidden = shown > 0;
      more.hidden = shown <= room;
      more.textContent = `Show ${Math.min(page, shown - room)} more of ${shown - room}`;
    };
    const filter = () => { room = page; apply(); };
    more.addEventListener("click", () => { room += page; apply(); });
    addEventListener("beforeprint", () => { room = cards.length; apply(); });
    all("button[data-flip]", form).forEach((button) => button.addEventListener("click", () => {
      state.flip = button.dataset.flip;
      all("button[data-flip]", form).forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      filter();
    }));
    all("select, input", form).forEach((field) => field.addEventListener("input", () => { state[field.name] = field.value; filter(); }));
    apply();
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  // The values under the pointer.
  all("figure").forEach((figure) => {
    const svg = figure.querySelector("svg"), output = figure.querySelector("output");
    if (!svg) return;
    const series = all("path", svg).map((path) => ({
      name: path.dataset.name,
      points: path.dataset.points.split(" ").map((point) => point.split(",").map(Number)),
    }));
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const nearest = series.map((s) => s.points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best)));
      const at = nearest.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
      for (const [key, value] of [["x1", at[0]], ["x2", at[0]], ["y1", 12], ["y2", svg.viewBox.baseVal.height - 30]]) cursor.setAttribute(key, value);
      svg.append(cursor);
      const values = series.map((s, i) => [s, nearest[i]]).filter(([, p]) => Math.abs(p[0] - at[0]) < 8);
      output.textContent = `step ${at[2]}: ` + values.map(([s, p]) => (series.length > 1 ? `${s.name} ` : "") + p[3]).join(", ");
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => { cursor.remove(); output.textContent = ""; });
  });
})();
