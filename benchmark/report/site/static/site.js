// The leaderboard's filters, sorting and plot. The table's rows hold the data; nothing is fetched.
(() => {
  "use strict";
  const form = document.getElementById("filters");
  const body = document.querySelector("#board tbody");
  const rows = [...body.rows];
  const heads = [...document.querySelectorAll("#board th[data-key]")];
  const settings = ["suite", "model", "width", "profile"];
  let sorting = { key: "recovery", down: true };

  const value = (row, key) => (row.dataset[key] === "" ? NaN : Number(row.dataset[key]));
  const chosen = () => Object.fromEntries(new FormData(form));
  const fits = (data, filter, names) => names.every((name) => data[name] === filter[name]);

  // What is not measured together cannot be chosen together.
  const settle = () => {
    settings.forEach((name, at) => {
      const known = new Set(rows.filter((row) => fits(row.dataset, chosen(), settings.slice(0, at))).map((row) => row.dataset[name]));
      const select = form.elements[name];
      for (const option of select.options) option.disabled = option.hidden = !known.has(option.value);
      if (!known.has(select.value)) select.value = [...select.options].find((option) => !option.disabled).value;
      select.closest("label").hidden = known.size < 2 && at > 0 ? true : select.options.length < 2;
    });
  };

  const compare = (one, other) => {
    if (sorting.key === "recovery" && one.dataset.whole !== other.dataset.whole) return one.dataset.whole === "yes" ? -1 : 1;
    const [a, b] = [value(one, sorting.key), value(other, sorting.key)];
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return (sorting.down ? b - a : a - b) || rows.indexOf(one) - rows.indexOf(other);
  };

  const show = () => {
    const filter = chosen();
    const visible = rows.filter((row) => {
      const data = row.dataset;
      row.hidden = !(
        fits(data, filter, settings) &&
        (!filter.trained || data.trained === filter.trained) &&
        (!filter.extra || data.extra === "0")
      );
      return !row.hidden;
    });
    for (const note of document.querySelectorAll(".setting")) note.hidden = !fits(note.dataset, filter, settings);
    for (const part of document.querySelectorAll(".answer [data-suite]")) part.hidden = part.dataset.suite !== filter.suite;
    let rank = 0;
    for (const row of rows.filter((row) => !row.hidden)) row.querySelector(".rank").textContent = row.dataset.whole === "yes" ? ++rank : "--";
    visible.sort(compare).forEach((row) => body.append(row));
    for (const head of heads) {
      if (head.dataset.key === sorting.key) head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    const noun = visible.length === 1 ? "method" : "methods";
    document.getElementById("count").textContent = `${visible.length} ${noun}: ${filter.model}, ${filter.width}, profile ${filter.profile}`;
    plot(visible);
  };

  const svg = (name, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, text] of Object.entries(attributes)) made.setAttribute(key, text);
    made.append(...children);
    return made;
  };

  const shapes = {
    calibrator: (x, y) => svg("circle", { cx: x, cy: y, r: 5.5 }),
    rival: (x, y) => svg("rect", { x: x - 5, y: y - 5, width: 10, height: 10 }),
    control: (x, y) => svg("path", { d: `M${x} ${y - 6.5}L${x + 6} ${y + 5}H${x - 6}Z` }),
    trained: (x, y) => svg("path", { d: `M${x} ${y - 7}L${x + 7} ${y}L${x} ${y + 7}L${x - 7} ${y}Z` }),
  };

  const plot = (visible) => {
    const figure = document.getElementById("pareto");
    const box = figure.querySelector(".plot-box");
    const points = visible
      .map((row) => ({ row, x: Math.max(value(row, "seconds"), 0.01), y: value(row, "recovery") }))
      // a mean over fewer models is no neighbour of one over all
      .filter((point) => point.row.dataset.whole === "yes" && Number.isFinite(point.x) && Number.isFinite(point.y));
    figure.hidden = points.length < 2;
    box.replaceChildren();
    if (figure.hidden) return;
    const narrow = window.innerWidth < 704;
    const [width, height] = narrow ? [380, 360] : [920, 400];
    const edge = { left: 48, right: 16, top: 12, bottom: 44 };
    const xs = points.map((point) => Math.log10(point.x));
    const ys = points.map((point) => point.y);
    const low = { x: Math.min(...xs) - 0.15, y: Math.min(...ys, 99) };
    const high = { x: Math.max(...xs) + 0.25, y: Math.max(...ys, 100) };
    const room = Math.max(high.y - low.y, 2) * 0.07;
    low.y -= room;
    high.y += room;
    const across = (x) => edge.left + ((Math.log10(x) - low.x) / (high.x - low.x)) * (width - edge.left - edge.right);
    const up = (y) => height - edge.bottom - ((y - low.y) / (high.y - low.y)) * (height - edge.top - edge.bottom);
    const drawn = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Percent of FP32 against seconds, a link for each method" });
    const span = high.y - low.y;
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000].find((size) => span / size <= 7) || span;
    for (let y = Math.ceil(low.y / step) * step; y <= high.y; y += step) {
      drawn.append(svg("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: up(y), y2: up(y) }));
      drawn.append(svg("text", { x: edge.left - 6, y: up(y) + 4, "text-anchor": "end" }, String(Math.round(y * 10) / 10)));
    }
    for (let power = Math.ceil(low.x); power <= high.x; power += 1) {
      const x = across(10 ** power);
      drawn.append(svg("line", { class: "grid", x1: x, x2: x, y1: edge.top, y2: height - edge.bottom }));
      drawn.append(svg("text", { x, y: height - edge.bottom + 16, "text-anchor": "middle" }, String(10 ** power)));
    }
    drawn.append(svg("text", { x: (edge.left + width) / 2, y: height - 8, "text-anchor": "middle" }, "seconds; left is cheaper, up keeps more (%)"));
    const beaten = (point) => points.some((other) => other !== point && other.x <= point.x && other.y >= point.y && (other.x < point.x || other.y > point.y));
    const front = points.filter((point) => !beaten(point)).sort((one, other) => one.x - other.x);
    drawn.append(svg("polyline", { class: "front", points: front.map((point) => `${across(point.x)},${up(point.y)}`).join(" ") }));
    const taken = points.map((point) => ({ x0: across(point.x) - 7, x1: across(point.x) + 7, y0: up(point.y) - 7, y1: up(point.y) + 7 }));
    const letters = 6.4;
    const order = [...points].sort((one, other) => front.includes(other) - front.includes(one));
    for (const point of order) {
      const { method, role, page } = point.row.dataset;
      const [x, y] = [across(point.x), up(point.y)];
      const mark = (shapes[role] || shapes.rival)(x, y);
      mark.setAttribute("class", front.includes(point) ? "mark best" : "mark");
      const wide = method.length * letters;
      const places = [[10, 4], [-10 - wide, 4], [-wide / 2, -11], [-wide / 2, 20], [9, 17], [9, -9], [-9 - wide, 17], [-9 - wide, -9]];
      const spot = places.map(([right, down]) => ({ x0: x + right, x1: x + right + wide, y0: y + down - 10, y1: y + down + 3 })).find(
        (one) => one.x0 > 2 && one.x1 < width - 2 && one.y0 > 0 && one.y1 < height - edge.bottom && !taken.some((other) => one.x0 < other.x1 && one.x1 > other.x0 && one.y0 < other.y1 && one.y1 > other.y0),
      );
      const text = `${method}: ${point.y.toFixed(1)} % in ${point.x.toFixed(point.x < 10 ? 1 : 0)} s`;
      const link = svg("a", { href: page, "aria-label": text }, svg("title", {}, text), mark);
      if (spot) {
        taken.push(spot);
        link.append(svg("text", { x: spot.x0, y: spot.y1 - 3 }, method));
      }
      drawn.append(link);
    }
    box.append(drawn);
  };

  const remember = () => {
    const words = new URLSearchParams([...new FormData(form)].filter(([, text]) => text !== ""));
    history.replaceState(null, "", `#${words}`);
  };
  const recall = () => {
    for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
      const select = form.elements[name];
      if (select && [...select.options].some((option) => option.value === text)) select.value = text;
    }
  };
  const update = () => {
    settle();
    show();
  };

  form.hidden = false;
  recall();
  update();
  form.addEventListener("change", () => {
    update();
    remember();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    setTimeout(() => {
      sorting = { key: "recovery", down: true };
      update();
      history.replaceState(null, "", location.pathname + location.search);
    });
  });
  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      const key = head.dataset.key;
      sorting = { key, down: sorting.key === key ? !sorting.down : key === "recovery" };
      show();
    });
  }
  window.addEventListener("hashchange", () => {
    recall();
    update();
  });
  let resized;
  window.addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(show, 150);
  });
})();
