"use strict";
(() => {
  const images = JSON.parse(document.getElementById("images").textContent);
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // One image with its labels. Pictures are in the page once, however often an image is shown.
  const makeShot = (number) => {
    const image = images[number];
    const shot = make("figure", "shot");
    const picture = make("img");
    picture.src = image.picture;
    picture.alt = `${image.name}: labeled ${image.truth}, predicted ${image.predicted}`;
    picture.dataset.number = number;
    picture.addEventListener("load", () => picture.classList.toggle("tiny", picture.naturalWidth < 40));
    const said = make("div", "said");
    said.append("labeled ", make("b", "", image.truth), make("br"));
    said.append("predicted ", make("b", image.right === false ? "wrong" : "", image.predicted));
    const top = image.top.map(([label, value]) => `${label} ${value.replace(" ", "\u00a0")}`).join(", ");
    shot.append(picture, said, make("div", "", top), make("div", "file", `${image.name} (${image.split})`));
    return shot;
  };

  const fill = (list, numbers) => {
    list.replaceChildren(...numbers.map((number) => {
      const item = make("li");
      item.append(makeShot(number));
      return item;
    }));
  };

  all("[data-images]").forEach((list) => fill(list, JSON.parse(list.dataset.images)));

  const heat = document.getElementById("heat");
  if (heat) {
    heat.addEventListener("click", () => {
      const isShown = heat.getAttribute("aria-pressed") !== "true";
      heat.setAttribute("aria-pressed", String(isShown));
      all("#galleries img").forEach((picture) => {
        const image = images[picture.dataset.number];
        picture.src = isShown && image.heat ? image.heat : image.picture;
      });
    });
  }

  // The images of one cell of the confusion matrix, of one pair of classes, or of the mistakes of one label.
  const panel = document.getElementById("cell");
  let opener = null;
  const close = () => {
    panel.hidden = true;
    all("td.chosen").forEach((cell) => cell.classList.remove("chosen"));
    if (opener) opener.focus();
  };
  const open = (button) => {
    const cell = button.dataset.cell;
    const numbers = images.flatMap((image, i) => (image.keys.includes(cell) ? [i] : []));
    all("td.chosen").forEach((each) => each.classList.remove("chosen"));
    button.closest("td").classList.add("chosen");
    opener = button;
    const count = Number(button.dataset.count);
    const shown = numbers.length < count ? `, of which ${numbers.length} ${numbers.length === 1 ? "is" : "are"} shown` : "";
    panel.querySelector("h3").textContent = `${button.dataset.title}${shown}`;
    fill(panel.querySelector(".shots"), numbers);
    panel.hidden = false;
  };
  if (panel) {
    all("button[data-cell]").forEach((button) => button.addEventListener("click", () => open(button)));
    panel.querySelector("button").addEventListener("click", close);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !panel.hidden) close();
    });
  }

  // Sorts rows and columns of the matrix alike. Arrow keys move between the cells that have images.
  const matrix = document.querySelector("table.matrix");
  if (matrix) {
    const head = matrix.tHead.rows[0];
    const rows = all("tbody tr", matrix);
    const names = rows.map((row) => row.cells[0].textContent);
    const headers = [...head.cells].slice(1);
    const cells = rows.map((row) => [...row.cells].slice(1));
    const counts = cells.map((row) => row.map((cell) => Number(cell.textContent)));
    const total = (k) => counts[k].reduce((sum, n) => sum + n, 0);
    const mistakes = (k) => total(k) - counts[k][k];
    const confused = (a, b) => counts[a][b] + counts[b][a];
    const chainAlike = (start) => {
      const order = [start];
      while (order.length < names.length) {
        const last = order[order.length - 1];
        const rest = names.map((_, k) => k).filter((k) => !order.includes(k));
        order.push(rest.reduce((best, k) => (confused(last, k) > confused(last, best) ? k : best)));
      }
      return order;
    };
    const orders = {
      listed: (all) => all,
      name: (all) => all.sort((a, b) => names[a].localeCompare(names[b])),
      mistakes: (all) => all.sort((a, b) => mistakes(b) - mistakes(a)),
      recall: (all) => all.sort((a, b) => counts[a][a] / (total(a) || 1) - counts[b][b] / (total(b) || 1)),
      alike: (all) => chainAlike(all.reduce((best, k) => (mistakes(k) > mistakes(best) ? k : best))),
    };
    document.getElementById("order").addEventListener("change", (event) => {
      const order = orders[event.target.value](names.map((_, k) => k));
      head.append(...order.map((k) => headers[k]));
      order.forEach((k) => {
        rows[k].append(...order.map((j) => cells[k][j]));
        matrix.tBodies[0].append(rows[k]);
      });
    });
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    matrix.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      const cell = event.target.closest("td");
      if (!step || !cell) return;
      event.preventDefault();
      let [row, column] = [cell.parentElement.rowIndex + step[0], cell.cellIndex + step[1]];
      for (; matrix.rows[row] && matrix.rows[row].cells[column]; row += step[0], column += step[1]) {
        const button = matrix.rows[row].cells[column].querySelector("button");
        if (button) { button.focus(); return; }
      }
    });
  }

  // Maps and scatters: the pointer or the arrow keys choose a point, whose image is shown beside its charts.
  all(".map").forEach((group) => {
    const side = group.querySelector(".shown");
    const points = all(".point[data-image]", group);
    const choose = (point) => {
      points.forEach((each) => each.classList.toggle("chosen", each.dataset.image === point.dataset.image));
      side.replaceChildren(makeShot(Number(point.dataset.image)));
    };
    points.forEach((point) => {
      point.addEventListener("pointerenter", () => choose(point));
      point.addEventListener("click", () => choose(point));
    });
    all("svg[tabindex]", group).forEach((chart) => {
      const own = all(".point[data-image]", chart);
      if (!own.length) return;
      const place = (point) => [Number(point.dataset.x), Number(point.dataset.y)];
      const byX = [...own].sort((a, b) => place(a)[0] - place(b)[0]);
      const byY = [...own].sort((a, b) => place(a)[1] - place(b)[1]);
      const chosen = () => own.find((point) => point.classList.contains("chosen"));
      chart.addEventListener("focus", () => chosen() || choose(byX[0]));
      chart.addEventListener("keydown", (event) => {
        const orders = { ArrowLeft: [byX, -1], ArrowRight: [byX, 1], ArrowUp: [byY, -1], ArrowDown: [byY, 1] };
        if (!orders[event.key]) return;
        event.preventDefault();
        const [order, step] = orders[event.key];
        const next = order.indexOf(chosen()) + step;
        choose(order[(next + order.length) % order.length]);
      });
    });
  });
})();
