"use strict";
// Filters and sorts the cards of each gallery, and shows a picture enlarged.
for (const gallery of document.querySelectorAll(".gallery")) {
  const [form, grid] = [gallery.querySelector("form"), gallery.querySelector(".grid")];
  const cards = [...grid.children], [search, output] = [form.querySelector("input"), form.querySelector("output")];
  const { tag, sort, order } = form.elements;
  let group = "", rising = true;

  function show() {
    const wanted = search.value.toLowerCase().split(/\s+/);
    for (const card of cards) {
      const text = card.querySelector("figcaption").textContent.toLowerCase();
      card.hidden = !(wanted.every(word => text.includes(word))
        && (!group || card.dataset.groups.split(" ").includes(group))
        && (!tag.value || card.dataset.tags.split(" ").includes(tag.value)));
    }
    // A number that is not known comes last in both orders.
    const value = card => sort.value in card.dataset ? Number(card.dataset[sort.value]) : null;
    cards.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return (x === null) - (y === null) || (rising ? x - y : y - x) || a.dataset.place - b.dataset.place;
    });
    grid.append(...cards);
    output.value = `${cards.filter(card => !card.hidden).length} of ${cards.length}`;
  }

  function choose(button) {
    group = button.dataset.group;
    for (const other of form.querySelectorAll("[data-group]")) other.classList.toggle("on", other === button);
    show();
  }

  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", show);
  form.querySelectorAll("[data-group]").forEach(button => button.addEventListener("click", () => choose(button)));
  order.addEventListener("click", () => {
    rising = !rising;
    order.textContent = rising ? "lowest first" : "highest first";
    show();
  });
  grid.addEventListener("click", event => { if (event.target.tagName === "IMG") enlarge(event.target); });
  form.hidden = false;
  show();
}

function enlarge(image) {
  const dialog = document.createElement("dialog");
  dialog.append(image.cloneNode());
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
