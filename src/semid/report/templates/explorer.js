"use strict";
// The code tree: a map of the chosen prefix, its items, words and nearest codes, and a search.
(function () {
  const data = JSON.parse(document.getElementById("semid-explorer").textContent);
  const root = document.getElementById("explorer");
  const PAGE = 20;
  const CELL = 2400; // square pixels of a code's rectangle, on average: room for a word
  const LINE = 15; // pixels of a line of text in it
  const METRICS = [
    ["error", "Relative error", "share", "worse"],
    ["flips", "Ids that flip under noise", "share", "worse"],
    ["unique", "Different ids an item", "share", "better"],
    ["interactions", "Interactions an item", "number", "more"],
    ["items", "Items", "count", "more"],
  ];
  const levelWord = data.hierarchical ? "Level" : "Codebook";

  // Tree with children. Node -1 is the whole catalogue.
  const trees = data.trees.map((tree) => {
    const children = new Map([[-1, []]]);
    tree.parent.forEach((parent, node) => {
      if (!children.has(parent)) children.set(parent, []);
      children.get(parent).push(node);
    });
    const depth = [];
    tree.parent.forEach((parent, node) => { depth.push(parent < 0 ? 1 : depth[parent] + 1); });
    return { ...tree, children, depth };
  });
  const state = { tree: 0, node: -1, metric: null, query: "", page: 1, found: -1 };

  const make = (tag, options, ...inside) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(options || {})) {
      if (key === "text") element.textContent = value;
      else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...inside.filter((part) => part !== null && part !== undefined));
    return element;
  };
  const count = (value) => Math.round(value).toLocaleString("en-US");
  const number = (value) => value === 0 ? "0" : Math.abs(value) >= 1000 ? count(value)
    : value.toFixed(Math.min(4, Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))))));
  const share = (value) => {
    const percent = 100 * value;
    if (percent > 0 && percent < 0.01) return "<0.01%";
    return percent.toFixed(percent !== 0 && percent < 1 ? 2 : 1) + "%";
  };
  const write = { count, number, share };

  const path = (tree, node) => {
    const codes = [];
    for (let at = node; at >= 0; at = tree.parent[at]) codes.unshift(tree.code[at]);
    return codes;
  };
  const itemCodes = (item) => data.codes.slice(item * data.levels, (item + 1) * data.levels);
  const name = (tree, node) => path(tree, node).join(" · ");
  const words = (tree, node) => (tree.words[node] || []).map((index) => tree.vocabulary[index]);
  const metricOf = (tree, node) => state.metric === "items" ? tree.items[node] : tree.metrics[state.metric][node];
  const itemsOf = (tree, node) => {
    const first = node < 0 ? 0 : tree.first[node];
    const shown = node < 0 ? data.shown : tree.shown[node];
    return tree.order.slice(first, first + shown);
  };
  const examples = (tree, node) => !data.titles ? []
    : itemsOf(tree, node).slice(0, 3).map((item) => data.titles[item]).filter(Boolean);
  // The deepest node on the way to a list of codes.
  const walk = (tree, codes) => {
    let node = -1;
    for (const code of codes) {
      const next = (tree.children.get(node) || []).find((child) => tree.code[child] === code);
      if (next === undefined) break;
      node = next;
    }
    return node;
  };

  // Squarified treemap (Bruls, Huizing, van Wijk 2000): rectangles as square as they come.
  const squarify = (sizes, width, height) => {
    const total = sizes.reduce((sum, size) => sum + size, 0);
    const scale = (width * height) / total;
    const out = [];
    let x = 0, y = 0, w = width, h = height, start = 0;
    while (start < sizes.length) {
      const side = Math.min(w, h);
      let end = start, sum = 0, worst = Infinity;
      while (end < sizes.length) {
        const next = sum + sizes[end] * scale;
        const ratio = Math.max(
          (side * side * sizes[start] * scale) / (next * next),
          (next * next) / (side * side * sizes[end] * scale),
        );
        if (ratio > worst) break;
        worst = ratio; sum = next; end += 1;
      }
      const thick = sum / side;
      let along = 0;
      for (let i = start; i < end; i += 1) {
        const length = (sizes[i] * scale) / thick;
        out.push(w >= h ? [x, y + along, thick, length] : [x + along, y, length, thick]);
        along += length;
      }
      if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
      start = end;
    }
    return out;
  };

  // One color scale for all levels, so that a code keeps its color where it is seen again. It runs
  // from the 2nd to the 98th percentile of all codes; counts, which fall from level to level, by
  // their logarithm.
  const scales = {};
  const scaleOf = (metric) => {
    if (!scales[metric]) {
      const all = trees.flatMap((tree) => metric === "items" ? tree.items : tree.metrics[metric]).sort((a, b) => a - b);
      const at = (q) => all[Math.round(q * (all.length - 1))];
      scales[metric] = metric === "items" ? [1, all[all.length - 1]] : [at(0.02), at(0.98)];
    }
    return scales[metric];
  };
  const shade = (metric, value) => {
    const [low, high] = scaleOf(metric).map((end) => metric === "items" ? Math.log(end) : end);
    const t = ((metric === "items" ? Math.log(value) : value) - low) / (high - low);
    return high > low ? Math.min(1, Math.max(0, t)) : 0.3;
  };

  // Parts of the page, made once.
  const available = METRICS.filter(([key]) => key === "items" || key in trees[0].metrics);
  state.metric = available[0][0];
  const metricPick = make("select", { id: "explorer-metric", onchange: () => { state.metric = metricPick.value; drawMap(); } },
    ...available.map(([key, label]) => make("option", { value: key, text: label })));
  const treePick = trees.length > 1 ? make("select", { id: "explorer-tree", onchange: () => go(Number(treePick.value), -1) },
    ...trees.map((tree, index) => make("option", { value: index, text: `${levelWord} ${tree.level + 1}` }))) : null;
  const search = make("input", { type: "search", id: "explorer-search", placeholder: "item id, words of a title, or codes such as 17 203", autocomplete: "off", spellcheck: "false" });
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.query = search.value; state.page = 1; drawDetail(); }, 120);
  });
  const trail = make("ol", { class: "trail", "aria-label": "Chosen prefix" });
  const map = make("div", { class: "map", role: "group", "aria-label": "Codes, sized by their items" });
  const frame = make("div", { class: "frame" }, map);
  const legend = make("div", { class: "legend" });
  const detail = make("div", { class: "detail" });
  const said = make("p", { class: "hidden-text", role: "status", "aria-live": "polite" });
  root.append(
    make("div", { class: "tools" },
      make("label", { class: "grow" }, "Search", search),
      treePick ? make("label", {}, "Codebook", treePick) : null,
      make("label", {}, "Color", metricPick)),
    trail, frame, legend, said, detail);

  const go = (tree, node, options) => {
    const { focus, keepQuery, found } = options || {};
    state.tree = tree; state.node = node; state.page = 1; state.found = found === undefined ? -1 : found;
    if (!keepQuery) { state.query = ""; search.value = ""; }
    if (treePick) treePick.value = tree;
    frame.scrollTop = 0;
    draw();
    const here = trees[tree];
    said.textContent = node < 0 ? "All items" : `${levelWord} code ${name(here, node)}: ${count(here.items[node])} items`;
    if (focus) (map.querySelector("button") || trail.querySelector("[aria-current]")).focus();
  };

  const drawTrail = () => {
    const tree = trees[state.tree];
    const nodes = [];
    for (let at = state.node; at >= 0; at = tree.parent[at]) nodes.unshift(at);
    const all = trees.length > 1 ? `${levelWord} ${tree.level + 1}, all codes` : "All codes";
    const step = (label, node, last) => make("li", {}, last
      ? make("span", { "aria-current": "true", tabindex: "-1", text: label })
      : make("button", { type: "button", class: "link", text: label, onclick: () => go(state.tree, node, { focus: true }) }));
    trail.replaceChildren(step(all, -1, state.node < 0), ...nodes.map((node, index) =>
      step(`${trees.length > 1 ? "Code" : `Level ${index + 1}:`} ${tree.code[node]}`, node, node === state.node)));
  };

  const drawMap = () => {
    const tree = trees[state.tree];
    const nodes = tree.children.get(state.node) || [];
    const [, label, kind, sense] = available.find(([key]) => key === state.metric);
    map.replaceChildren();
    legend.replaceChildren();
    frame.style.display = nodes.length ? "" : "none";
    if (!nodes.length) return;
    // The map is as high as its codes need to show words, up to five screens, and scrolls inside.
    const needed = nodes.length * CELL / frame.clientWidth;
    map.style.height = `${Math.min(Math.max(frame.clientHeight, needed), 5 * frame.clientHeight)}px`;
    const boxes = squarify(nodes.map((node) => tree.items[node]), map.clientWidth, map.clientHeight);
    const values = nodes.map((node) => metricOf(tree, node));
    const [low, high] = scaleOf(state.metric);
    // Where white and dark text read equally well on the mixed color.
    const flip = document.documentElement.dataset.theme === "dark" ? 0.55 : 0.66;
    nodes.forEach((node, index) => {
      const [x, y, w, h] = boxes[index];
      const t = shade(state.metric, values[index]);
      const told = words(tree, node), titles = examples(tree, node);
      const button = make("button", {
        type: "button", tabindex: index ? "-1" : "0", "data-node": node,
        "aria-label": `Code ${name(tree, node)}, ${count(tree.items[node])} items, ${label.toLowerCase()} ${write[kind](values[index])}${told.length ? ", " + told.join(" ") : ""}`,
        title: `${name(tree, node)}: ${count(tree.items[node])} items\n${label}: ${write[kind](values[index])}${told.length ? "\n" + told.join(", ") : ""}${titles.length ? "\n\n" + titles.join("\n") : ""}`,
        onclick: () => go(state.tree, node, { focus: true }),
      });
      button.style.cssText = `left:${x}px;top:${y}px;width:${w}px;height:${h}px;`
        + `background:color-mix(in oklab, var(--hi) ${(100 * t).toFixed(1)}%, var(--lo));`
        + `color:${t > flip ? "var(--on-hi)" : "var(--on-lo)"}`;
      // As many lines as there is room for: the code, then a word a line.
      const lines = Math.floor((h - 4) / LINE);
      if (w > 22 && lines > 0) button.append(make("b", { text: tree.code[node] }));
      // A plural beside its singular says nothing new.
      const apart = told.filter((word, at) => !told.slice(0, at).some((other) => word.startsWith(other) || other.startsWith(word)));
      if (w > 36) button.append(...apart.slice(0, Math.max(0, lines - 1)).map((word) => make("span", { text: word })));
      if (w < 44 || h < 34) button.style.padding = "2px";
      map.append(button);
    });
    const drawn = nodes.reduce((sum, node) => sum + tree.items[node], 0);
    const whole = state.node < 0 ? data.items : tree.items[state.node];
    legend.append(
      make("span", { text: `${label} (more color: ${sense})` }), make("span", { class: "num", text: write[kind](low) }),
      make("i", { "aria-hidden": "true" }), make("span", { class: "num", text: write[kind](high) }),
      make("span", { text: `· one scale for all ${levelWord.toLowerCase()}s` }),
      ...(drawn < whole ? [make("span", { text: `· codes with ${count(whole - drawn)} more items are not drawn` })] : []));
  };

  // Arrow keys move in the map by place, Home and End to the ends, Escape or Backspace goes up.
  map.addEventListener("keydown", (event) => {
    const cells = [...map.querySelectorAll("button")];
    const at = cells.indexOf(document.activeElement);
    if (at < 0) return;
    if (event.key === "Escape" || event.key === "Backspace") {
      if (state.node >= 0) { event.preventDefault(); go(state.tree, trees[state.tree].parent[state.node], { focus: true }); }
      return;
    }
    const middle = (cell) => [cell.offsetLeft + cell.offsetWidth / 2, cell.offsetTop + cell.offsetHeight / 2];
    const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    let next = null;
    if (event.key === "Home") next = cells[0];
    else if (event.key === "End") next = cells[cells.length - 1];
    else if (event.key in ways) {
      const [dx, dy] = ways[event.key];
      const [x, y] = middle(cells[at]);
      let best = Infinity;
      for (const cell of cells) {
        const [cx, cy] = middle(cell);
        const forward = (cx - x) * dx + (cy - y) * dy;
        const aside = Math.abs((cx - x) * dy) + Math.abs((cy - y) * dx);
        if (forward > 1 && forward + 2 * aside < best) { best = forward + 2 * aside; next = cell; }
      }
    }
    if (!next) return;
    event.preventDefault();
    cells[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  const open = (codes, level, item) => {
    const tree = trees.length > 1 ? level : 0;
    const chosen = trees.length > 1 ? [codes[level]] : codes;
    go(tree, walk(trees[tree], chosen), { found: item });
  };

  const itemRow = (item) => {
    const codes = itemCodes(item);
    const title = data.titles ? data.titles[item] : null;
    const links = codes.flatMap((code, level) => [
      level ? " · " : "",
      make("button", {
        type: "button", class: "link", text: code,
        "aria-label": trees.length > 1 ? `Codebook ${level + 1}, code ${code}` : `Prefix ${codes.slice(0, level + 1).join(" ")}`,
        onclick: () => open(trees.length > 1 ? codes : codes.slice(0, level + 1), level, item),
      })]);
    return make("li", { class: item === state.found ? "found" : null, "data-item": data.ids[item] },
      make("span", { class: "name" }, title || data.ids[item], title ? make("span", { class: "id code", text: data.ids[item] }) : null),
      make("span", { class: "path code" }, ...links));
  };

  let lowered = null;
  const matches = (query) => {
    const plain = query.trim().toLowerCase();
    if (!plain) return null;
    lowered = lowered || data.ids.map((id, item) => `${id}\n${(data.titles && data.titles[item]) || ""}`.toLowerCase());
    const parts = plain.split(/\s+/);
    const exact = [], others = [];
    lowered.forEach((text, item) => {
      if (text.startsWith(plain + "\n")) exact.push(item);
      else if (parts.every((part) => text.includes(part))) others.push(item);
    });
    const numbers = plain.split(/[\s.,·-]+/);
    if (numbers.every((part) => /^\d+$/.test(part)) && numbers.length <= data.levels && data.hierarchical) {
      const codes = numbers.map(Number);
      const node = walk(trees[0], codes);
      if (node >= 0 && trees[0].depth[node] === codes.length) {
        const under = itemsOf(trees[0], node);
        const already = new Set([...exact, ...others]);
        others.push(...under.filter((item) => !already.has(item)));
      }
    }
    return [...exact, ...others];
  };
  const wordCodes = (query) => {
    const tree = trees[state.tree];
    const wanted = query.trim().toLowerCase();
    if (wanted.length < 3) return [];
    const known = new Set(tree.vocabulary.flatMap((word, index) => (word.startsWith(wanted) ? [index] : [])));
    return Object.entries(tree.words).filter(([node, listed]) => tree.depth[node] === 1 && listed.some((word) => known.has(word)))
      .map(([node]) => Number(node)).slice(0, 12);
  };

  const drawDetail = () => {
    const tree = trees[state.tree];
    const hits = matches(state.query);
    const items = hits || itemsOf(tree, state.node);
    const side = make("div", {});
    if (hits) {
      side.append(make("h3", { text: "Search" }), make("p", { class: "muted", text: `${count(hits.length)} items match` }));
      const codes = wordCodes(state.query);
      if (codes.length) {
        side.append(make("h3", { text: "Codes described so" }), make("ul", { class: "chips" }, ...codes.map((node) => make("li", {},
          make("button", { type: "button", text: `${tree.code[node]} ${words(tree, node)[0] || ""}`, onclick: () => go(state.tree, node, { focus: true }) })))));
      }
    } else if (state.node < 0) {
      side.append(make("h3", { text: "All codes" }), make("p", { class: "muted", text: `${count((tree.children.get(-1) || []).length)} codes hold ${count(data.items)} items. Choose one in the map.` }));
    } else {
      describe(side, tree, state.node);
    }
    const shown = items.slice(0, state.page * PAGE);
    const list = make("ul", { class: "list" }, ...shown.map(itemRow));
    const rest = items.length - shown.length;
    const total = hits ? hits.length : state.node < 0 ? data.items : tree.items[state.node];
    const right = make("div", {},
      make("h3", { text: hits ? "Items found" : `Items${total > items.length ? ` (${count(items.length)} of ${count(total)} on this page)` : ""}` }),
      items.length ? list : make("p", { class: "muted", text: "None on this page." }),
      rest > 0 ? make("p", { class: "pager" }, make("button", {
        type: "button", text: `Show ${count(Math.min(PAGE, rest))} more of ${count(rest)}`,
        onclick: () => { state.page += 1; drawDetail(); const rows = root.querySelectorAll(".list li"); rows[(state.page - 1) * PAGE].querySelector("button").focus(); },
      })) : null);
    detail.replaceChildren(side, right);
    if (hits) said.textContent = `${count(hits.length)} items match`;
  };

  const describe = (side, tree, node) => {
    const facts = make("dl", {});
    for (const [key, label, kind] of available) {
      const value = key === "items" ? tree.items[node] : tree.metrics[key][node];
      facts.append(make("dt", { text: label }), make("dd", { text: write[kind](value) }));
    }
    side.append(make("h3", { text: `Code ${name(tree, node)}` }), facts);
    const told = words(tree, node);
    if (told.length) {
      side.append(make("h3", { text: "Words that describe it" }), make("ul", { class: "chips" }, ...told.map((word) => make("li", { text: word }))));
    }
    const level = trees.length > 1 ? tree.level : tree.depth[node] - 1;
    const near = data.neighbors[level];
    const at = near.code.indexOf(tree.code[node]);
    if (at >= 0) {
      side.append(make("h3", { text: "Nearest codes by overlap" }),
        make("p", { class: "muted small", text: "The closer, the likelier noise moves an item there. Squared distance between the codewords, as a share of that between two random items:" }),
        make("ul", { class: "chips" }, ...near.near[at].map((code, index) => {
          const target = walk(tree, [...path(tree, node).slice(0, -1), code]);
          const label = `${code}: ${share(near.distance[at][index])}`;
          const reached = target >= 0 && tree.code[target] === code && tree.depth[target] === tree.depth[node];
          return make("li", {}, reached
            ? make("button", { type: "button", text: label, onclick: () => go(state.tree, target, { focus: true }) })
            : label);
        })));
    }
  };

  const draw = () => { drawTrail(); drawMap(); drawDetail(); };
  draw();
  let width = frame.clientWidth;
  new ResizeObserver(() => { if (frame.clientWidth && frame.clientWidth !== width) { width = frame.clientWidth; drawMap(); } }).observe(root);
  document.addEventListener("semid-theme", drawMap);
  document.querySelectorAll("[data-path]").forEach((button) => button.addEventListener("click", () => {
    const codes = button.dataset.path.split(".").map(Number);
    open(codes, 0);
    document.getElementById("explore").scrollIntoView();
  }));
})();
