"use strict";
(() => {
  const tip = document.getElementById("tip");
  const said = document.getElementById("said");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // what a mark says stands in its attributes; the text goes in as text, never as markup
  const show = (target) => {
    const lines = [["b", target.dataset.title], ...target.dataset.lines.split("|").map((line) => ["span", line])];
    tip.replaceChildren(...lines.map(([name, text]) => Object.assign(document.createElement(name), { textContent: text })));
    tip.hidden = false;
    const spot = (target.querySelector("path") ?? target).getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, spot.left + spot.width / 2 - box.width / 2), innerWidth - box.width - 8);
    const above = spot.top - box.height - 12;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 8 ? spot.bottom + 12 : above}px`;
    light(target.dataset.key);
  };
  const hide = () => { tip.hidden = true; light(null); };
  const light = (key) => all("tr[data-key], .dot").forEach((one) => {
    one.classList.toggle("lit", key != null && one.dataset.key === key);
  });
  all(".dot, .heat i").forEach((target) => {
    target.addEventListener("pointerenter", () => show(target));
    // a finger leaves as soon as it is lifted; what it touched has the focus then, until something else is touched
    target.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
    target.addEventListener("focus", () => show(target));
    target.addEventListener("blur", hide);
  });
  all("tr[data-key]").forEach((row) => {
    row.addEventListener("pointerenter", () => light(row.dataset.key));
    row.addEventListener("pointerleave", () => light(null));
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  // what has the focus may have been scrolled into sight by it
  addEventListener("scroll", () => {
    const focused = document.activeElement;
    if (!tip.hidden && focused?.dataset.lines) show(focused);
    else tip.hidden = true;
  }, { passive: true });

  // one stop of the Tab key for each plot and each map; the arrow keys go from mark to mark, in a map by rows and columns
  const rove = (marks, columns) => {
    const goTo = (index) => {
      const next = marks[(index + marks.length) % marks.length];
      marks.forEach((mark) => mark.setAttribute("tabindex", mark === next ? "0" : "-1"));
      next.focus({ preventScroll: columns === 1 });
    };
    marks.forEach((mark, index) => mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: columns, ArrowLeft: -1, ArrowUp: -columns }[event.key];
      if (step) goTo(index + step);
      else if (event.key === "Home") goTo(0);
      else if (event.key === "End") goTo(marks.length - 1);
      else return;
      event.preventDefault();
    }));
  };
  all(".plot").forEach((plot) => rove(all(".dot", plot), 1));
  all(".heat").forEach((map) => rove(all("i", map), Number(map.dataset.columns)));

  // rows without a value stay below, whichever way a column is sorted
  const body = document.querySelector("#table tbody");
  const heads = all("#table thead th");
  const words = new Intl.Collator("pl", { numeric: true });
  const cellAt = (row, column) => {
    let place = 0;
    for (const cell of row.cells) {
      place += cell.colSpan;
      if (column < place) return cell.colSpan > 1 ? "" : cell.dataset.value;
    }
    return "";
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", (event) => {
    const button = event.currentTarget;
    const before = head.getAttribute("aria-sort");
    const order = before === "none" ? button.dataset.start : before === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const numeric = head.classList.contains("number");
    const rows = all("tr", body).map((row) => [row, cellAt(row, column)]);
    rows.sort(([, one], [, other]) => {
      if (one === "" || other === "") return (one === "") - (other === "");
      return sign * (numeric ? Number(one) - Number(other) : words.compare(one, other));
    });
    body.append(...rows.map(([row]) => row));
    heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
    said.textContent = `Sorted by ${button.textContent.trim()}, ${order}.`;
  }));
})();
