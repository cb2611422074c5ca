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
    target.addEventListener("pointerleave", hide);
  });
  all(".dot").forEach((dot) => {
    dot.addEventListener("focus", () => show(dot));
    dot.addEventListener("blur", hide);
  });
  all("tr[data-key]").forEach((row) => {
    row.addEventListener("pointerenter", () => light(row.dataset.key));
    row.addEventListener("pointerleave", () => light(null));
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // one stop of the Tab key for each plot; the arrow keys go from mark to mark
  all(".plot").forEach((plot) => {
    const dots = all(".dot", plot);
    const goTo = (index) => {
      const next = dots[(index + dots.length) % dots.length];
      dots.forEach((dot) => dot.setAttribute("tabindex", dot === next ? "0" : "-1"));
      next.focus({ preventScroll: true });
    };
    dots.forEach((dot, index) => dot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) goTo(index + step);
      else if (event.key === "Home") goTo(0);
      else if (event.key === "End") goTo(dots.length - 1);
      else return;
      event.preventDefault();
    }));
  });

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
