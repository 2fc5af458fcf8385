"use strict";
// The code tree: a map of the chosen prefix, its items, words and nearest codes, and a search.
(async function () {
  const root = document.getElementById("explorer");
  const PAGE = 20;
  const CELL = 2400; // square pixels of a code's rectangle, on average: room for a word
  const LINE = 15; // pixels of a line of text in it
  const METRICS = [
    ["error", "Relative error", "share", "worse"],
    ["flips", "Ids that flip under noise", "share", "worse"],
    ["unique", "Different ids an item", "share", "better"],
    ["interactions", "Interactions an item", "number", "more"],
    ["novel", "Novel items", "share", "worse"],
    ["new", "New in this version", "share", "more"],
    ["items", "Items", "count", "more"],
  ];
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
  const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 }); // toLocaleString makes one a call
  const count = (value) => grouped.format(value);
  const number = (value) => value === 0 ? "0" : Math.abs(value) >= 1000 ? count(value)
    : value.toFixed(Math.min(4, Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))))));
  const share = (value) => {
    const percent = 100 * value;
    if (percent > 0 && percent < 0.01) return "<0.01%";
    return percent.toFixed(percent !== 0 && percent < 1 ? 2 : 1) + "%";
  };
  const write = { count, number, share };

  // Where the tree comes from: from this page, or from a service (see live.js). Both answer
  //   node(tree, codes) -> {codes, items, metrics, words, near, allChildren,
  //     children: [{code, items, metrics, words, examples}]} of the deepest known node on the way,
  //   scale(metric) -> [low, high] for colors,
  //   list(tree, codes, offset, count) -> {items: [{id, title, codes}], total},
  //   find(tree, query, offset, count) -> {items, total, codes: [{code, word}]}.
  const fromPage = (data) => {
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
    // Node -1 is the whole catalogue. The deepest node on the way to a list of codes:
    const walk = (tree, codes) => {
      let node = -1;
      for (const code of codes) {
        const next = (tree.children.get(node) || []).find((child) => tree.code[child] === code);
        if (next === undefined) break;
        node = next;
      }
      return node;
    };
    const path = (tree, node) => {
      const codes = [];
      for (let at = node; at >= 0; at = tree.parent[at]) codes.unshift(tree.code[at]);
      return codes;
    };
    const words = (tree, node) => (tree.words[node] || []).map((index) => tree.vocabulary[index]);
    const rows = (tree, node) => {
      const first = node < 0 ? 0 : tree.first[node];
      return tree.order.slice(first, first + (node < 0 ? data.shown : tree.shown[node]));
    };
    const examples = (tree, node) => !data.titles ? []
      : rows(tree, node).slice(0, 3).map((row) => data.titles[row]).filter(Boolean);
    const facts = (tree, node) => ({
      examples: examples(tree, node), code: tree.code[node], items: node < 0 ? data.items : tree.items[node], words: words(tree, node),
      metrics: Object.fromEntries(Object.entries(tree.metrics).map(([key, values]) => [key, values[node]])),
    });
    const item = (row) => ({
      id: data.ids[row], title: data.titles ? data.titles[row] : null,
      codes: data.codes.slice(row * data.levels, (row + 1) * data.levels),
    });
    const near = (tree, node) => {
      if (node < 0) return [];
      const listed = data.neighbors[trees.length > 1 ? tree.level : tree.depth[node] - 1];
      const at = listed.code.indexOf(tree.code[node]);
      return at < 0 ? [] : listed.near[at].map((code, index) => {
        const target = walk(tree, [...path(tree, node).slice(0, -1), code]);
        const reached = target >= 0 && tree.code[target] === code && tree.depth[target] === tree.depth[node];
        return { code, distance: listed.distance[at][index], reached };
      });
    };
    let lowered = null;
    const matches = (query) => {
      const plain = query.trim().toLowerCase();
      lowered = lowered || data.ids.map((id, row) => `${id}\n${(data.titles && data.titles[row]) || ""}`.toLowerCase());
      const parts = plain.split(/\s+/);
      const exact = [], others = [];
      lowered.forEach((text, row) => {
        if (text.startsWith(plain + "\n")) exact.push(row);
        else if (parts.every((part) => text.includes(part))) others.push(row);
      });
      const numbers = plain.split(/[\s.,·-]+/);
      if (numbers.every((part) => /^\d+$/.test(part)) && numbers.length <= data.levels && data.hierarchical) {
        const codes = numbers.map(Number);
        const node = walk(trees[0], codes);
        if (node >= 0 && trees[0].depth[node] === codes.length) {
          const already = new Set([...exact, ...others]);
          others.push(...rows(trees[0], node).filter((row) => !already.has(row)));
        }
      }
      return [...exact, ...others];
    };
    const wordCodes = (tree, query) => {
      const wanted = query.trim().toLowerCase();
      if (wanted.length < 3) return [];
      const known = new Set(tree.vocabulary.flatMap((word, index) => (word.startsWith(wanted) ? [index] : [])));
      return Object.entries(tree.words).filter(([node, listed]) => tree.depth[node] === 1 && listed.some((word) => known.has(word)))
        .map(([node]) => ({ code: tree.code[node], word: words(tree, node)[0] || "" })).slice(0, 12);
    };
    return {
      hierarchical: data.hierarchical, levels: data.levels, items: data.items,
      trees: trees.map((tree) => tree.level), metrics: Object.keys(trees[0].metrics),
      node: (index, codes) => {
        const tree = trees[index], node = walk(tree, codes);
        const children = (tree.children.get(node) || []).map((child) => facts(tree, child));
        return { ...facts(tree, node), codes: path(tree, node), children, allChildren: children.length, near: near(tree, node) };
      },
      // From the 2nd to the 98th percentile of all codes.
      scale: (metric) => {
        const all = trees.flatMap((tree) => metric === "items" ? tree.items : tree.metrics[metric]).sort((a, b) => a - b);
        const at = (q) => all[Math.round(q * (all.length - 1))];
        return metric === "items" ? [1, all[all.length - 1]] : [at(0.02), at(0.98)];
      },
      list: (index, codes, offset, size) => {
        const under = rows(trees[index], walk(trees[index], codes));
        return { items: under.slice(offset, offset + size).map(item), total: under.length };
      },
      find: (index, query, offset, size) => {
        const hits = matches(query);
        return { items: hits.slice(offset, offset + size).map(item), total: hits.length, codes: wordCodes(trees[index], query) };
      },
    };
  };
  const embedded = document.getElementById("semid-explorer");
  const source = embedded ? fromPage(JSON.parse(embedded.textContent)) : await semid.live;
  const levelWord = source.hierarchical ? "Level" : "Codebook";
  const several = source.trees.length > 1;
  const state = { tree: 0, node: null, metric: null, query: "", page: 1, found: null, turn: 0 };
  const name = (codes) => codes.join(" · ");

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

  // One color scale for all levels, so that a code keeps its color where it is seen again; counts,
  // which fall from level to level, by their logarithm.
  const scales = {};
  const scaleOf = (metric) => (scales[metric] = scales[metric] || source.scale(metric));
  const shade = (metric, value) => {
    const [low, high] = scaleOf(metric).map((end) => metric === "items" ? Math.log(end) : end);
    const t = ((metric === "items" ? Math.log(value) : value) - low) / (high - low);
    return high > low ? Math.min(1, Math.max(0, t)) : 0.3;
  };

  // Parts of the page, made once.
  const available = METRICS.filter(([key]) => key === "items" || source.metrics.includes(key));
  state.metric = available[0][0];
  const valueOf = (node, key) => (key === "items" ? node.items : node.metrics[key]);
  const metricPick = make("select", { id: "explorer-metric", onchange: () => { state.metric = metricPick.value; drawMap(); } },
    ...available.map(([key, label]) => make("option", { value: key, text: label })));
  const treePick = several ? make("select", { id: "explorer-tree", onchange: () => go(Number(treePick.value), []) },
    ...source.trees.map((level, index) => make("option", { value: index, text: `${levelWord} ${level + 1}` }))) : null;
  const search = make("input", { type: "search", id: "explorer-search", placeholder: "item id, words of a title, or codes such as 17 203", autocomplete: "off", spellcheck: "false" });
  // While one search is under way, the last of those typed meanwhile waits.
  let searching = false, later = 0;
  search.addEventListener("input", async () => {
    if (searching) return;
    searching = true;
    try {
      do {
        state.query = search.value;
        state.page = 1;
        await drawDetail();
      } while (state.query !== search.value);
    } finally { searching = false; }
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

  // An answer that comes after a later question is dropped.
  const go = async (tree, codes, options) => {
    const { focus, found, keepAddress } = options || {};
    const turn = ++state.turn;
    const items = source.list(tree, codes, 0, PAGE); // both are asked for at once
    const node = await source.node(tree, codes);
    if (turn !== state.turn) return;
    Object.assign(state, { tree, node, page: 1, found: found === undefined ? null : found });
    state.query = search.value = "";
    if (treePick) treePick.value = tree;
    if (!keepAddress) history.replaceState(null, "", address(tree, node.codes));
    frame.scrollTop = 0;
    drawTrail();
    drawMap();
    said.textContent = node.codes.length ? `${levelWord} code ${name(node.codes)}: ${count(node.items)} items` : "All items";
    if (focus) (map.querySelector("button") || trail.querySelector("[aria-current]")).focus();
    await drawDetail({ items: node.codes.length === codes.length ? items : null });
  };
  // A link to a code: #code=17.203, of the second codebook #code=2:17.
  const address = (tree, codes) => `#code=${several ? `${tree + 1}:` : ""}${codes.join(".")}`;
  const addressed = () => {
    const [, tree, codes] = /^#code=(?:(\d+):)?((?:\d+(?:\.\d+)*)?)$/.exec(location.hash) || [];
    if (codes === undefined) return null;
    return [Math.min(Math.max((tree || 1) - 1, 0), source.trees.length - 1), codes ? codes.split(".").map(Number) : []];
  };

  const drawTrail = () => {
    const { codes } = state.node;
    const all = several ? `${levelWord} ${source.trees[state.tree] + 1}, all codes` : "All codes";
    const step = (label, depth) => make("li", {}, depth === codes.length
      ? make("span", { "aria-current": "true", tabindex: "-1", text: label })
      : make("button", { type: "button", class: "link", text: label, onclick: () => go(state.tree, codes.slice(0, depth), { focus: true }) }));
    trail.replaceChildren(step(all, 0), ...codes.map((code, index) => step(`${several ? "Code" : `Level ${index + 1}:`} ${code}`, index + 1)));
  };

  const drawMap = () => {
    const nodes = state.node.children;
    const [, label, kind, sense] = available.find(([key]) => key === state.metric);
    clearTimeout(later);
    map.replaceChildren();
    legend.replaceChildren();
    frame.style.display = nodes.length ? "" : "none";
    if (!nodes.length) return;
    // The map is as high as its codes need to show words, up to five screens, and scrolls inside.
    const needed = nodes.length * CELL / frame.clientWidth;
    map.style.height = `${Math.min(Math.max(frame.clientHeight, needed), 5 * frame.clientHeight)}px`;
    const boxes = squarify(nodes.map((node) => node.items), map.clientWidth, map.clientHeight);
    const values = nodes.map((node) => valueOf(node, state.metric));
    const [low, high] = scaleOf(state.metric);
    // Where white and dark text read equally well on the mixed color.
    const flip = document.documentElement.dataset.theme === "dark" ? 0.55 : 0.66;
    const cell = (index) => {
      const node = nodes[index], [x, y, w, h] = boxes[index];
      const t = shade(state.metric, values[index]);
      const codes = [...state.node.codes, node.code];
      const button = make("button", {
        type: "button", tabindex: index ? "-1" : "0", "data-node": node.code,
        "aria-label": `Code ${name(codes)}, ${count(node.items)} items, ${label.toLowerCase()} ${write[kind](values[index])}${node.words.length ? ", " + node.words.join(" ") : ""}`,
        title: `${name(codes)}: ${count(node.items)} items\n${label}: ${write[kind](values[index])}${node.words.length ? "\n" + node.words.join(", ") : ""}${node.examples.length ? "\n\n" + node.examples.join("\n") : ""}`,
        onclick: () => go(state.tree, codes, { focus: true }),
      });
      button.style.cssText = `left:${x}px;top:${y}px;width:${w}px;height:${h}px;`
        + `background:color-mix(in oklab, var(--hi) ${(100 * t).toFixed(1)}%, var(--lo));`
        + `color:${t > flip ? "var(--on-hi)" : "var(--on-lo)"}`;
      // As many lines as there is room for: the code, then a word a line.
      const lines = Math.floor((h - 4) / LINE);
      if (w > 22 && lines > 0) button.append(make("b", { text: node.code }));
      // A plural beside its singular says nothing new.
      const apart = node.words.filter((word, at) => !node.words.slice(0, at).some((other) => word.startsWith(other) || other.startsWith(word)));
      if (w > 36 && lines > 1 && apart.length) button.append(make("span", { text: apart.slice(0, lines - 1).join("\n") }));
      if (w < 44 || h < 34) button.style.padding = "2px";
      return button;
    };
    // What is in sight first; the rest when that is on the screen.
    const order = [...boxes.keys()], height = frame.clientHeight;
    map.append(...order.filter((index) => boxes[index][1] < height).map(cell));
    later = setTimeout(() => map.append(...order.filter((index) => boxes[index][1] >= height).map(cell)), 30);
    const drawn = nodes.reduce((sum, node) => sum + node.items, 0);
    legend.append(
      make("span", { text: `${label} (more color: ${sense})` }), make("span", { class: "num", text: write[kind](low) }),
      make("i", { "aria-hidden": "true" }), make("span", { class: "num", text: write[kind](high) }),
      make("span", { text: `· one scale for all ${levelWord.toLowerCase()}s` }),
      ...(drawn < state.node.items ? [make("span", { text: `· codes with ${count(state.node.items - drawn)} more items are not drawn` })] : []));
  };

  // Arrow keys move in the map by place, Home and End to the ends, Escape or Backspace goes up.
  map.addEventListener("keydown", (event) => {
    const cells = [...map.querySelectorAll("button")];
    const at = cells.indexOf(document.activeElement);
    if (at < 0) return;
    if (event.key === "Escape" || event.key === "Backspace") {
      if (state.node.codes.length) { event.preventDefault(); go(state.tree, state.node.codes.slice(0, -1), { focus: true }); }
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

  const open = (codes, level, item) => go(several ? level : 0, several ? [codes[level]] : codes, { found: item });

  const itemRow = (item) => {
    const { codes, title } = item;
    const links = codes.flatMap((code, level) => [
      level ? " · " : "",
      make("button", {
        type: "button", class: "link", text: code,
        "aria-label": several ? `Codebook ${level + 1}, code ${code}` : `Prefix ${codes.slice(0, level + 1).join(" ")}`,
        onclick: () => open(several ? codes : codes.slice(0, level + 1), level, item.id),
      })]);
    return make("li", { class: item.id === state.found ? "found" : null, "data-item": item.id },
      make("span", { class: "name" }, title || item.id, title ? make("span", { class: "id code", text: item.id }) : null),
      make("span", { class: "path code" }, ...links));
  };

  const drawDetail = async ({ focus, items } = {}) => {
    const { node, tree, turn, page } = state;
    const query = state.query.trim();
    const shownItems = page * PAGE;
    const hits = query ? await source.find(tree, query, 0, shownItems) : null;
    const listed = hits || await (items || source.list(tree, node.codes, 0, shownItems));
    if (turn !== state.turn || query !== state.query.trim() || page !== state.page) return;
    const side = make("div", {});
    if (hits) {
      side.append(make("h3", { text: "Search" }), make("p", { class: "muted", text: `${count(hits.total)} items match` }));
      if (hits.codes.length) {
        side.append(make("h3", { text: "Codes described so" }), make("ul", { class: "chips" }, ...hits.codes.map(({ code, word }) => make("li", {},
          make("button", { type: "button", text: `${code} ${word}`, onclick: () => go(tree, [code], { focus: true }) })))));
      }
    } else if (!node.codes.length) {
      side.append(make("h3", { text: "All codes" }), make("p", { class: "muted", text: `${count(node.allChildren)} codes hold ${count(node.items)} items. Choose one in the map.` }));
    } else {
      describe(side, node);
    }
    const list = make("ul", { class: "list" }, ...listed.items.map(itemRow));
    const rest = listed.total - listed.items.length;
    const total = hits ? hits.total : node.items;
    const right = make("div", {},
      make("h3", { text: hits ? "Items found" : `Items${total > listed.total ? ` (${count(listed.total)} of ${count(total)} on this page)` : ""}` }),
      listed.items.length ? list : make("p", { class: "muted", text: "None on this page." }),
      rest > 0 ? make("p", { class: "pager" }, make("button", {
        type: "button", text: `Show ${count(Math.min(PAGE, rest))} more of ${count(rest)}`,
        onclick: () => { state.page += 1; drawDetail({ focus: true }); },
      })) : null);
    detail.replaceChildren(side, right);
    if (focus) root.querySelectorAll(".list li")[(page - 1) * PAGE].querySelector("button").focus();
    if (hits) said.textContent = `${count(hits.total)} items match`;
  };

  const describe = (side, node) => {
    const facts = make("dl", {});
    for (const [key, label, kind] of available) {
      facts.append(make("dt", { text: label }), make("dd", { text: write[kind](valueOf(node, key)) }));
    }
    side.append(make("h3", { text: `Code ${name(node.codes)}` }), facts);
    if (node.words.length) {
      side.append(make("h3", { text: "Words that describe it" }), make("ul", { class: "chips" }, ...node.words.map((word) => make("li", { text: word }))));
    }
    if (node.near.length) {
      const tree = state.tree;
      side.append(make("h3", { text: "Nearest codes by overlap" }),
        make("p", { class: "muted small", text: "The closer, the likelier noise moves an item there. Squared distance between the codewords, as a share of that between two random items:" }),
        make("ul", { class: "chips" }, ...node.near.map(({ code, distance, reached }) => {
          const label = `${code}: ${share(distance)}`;
          return make("li", {}, reached
            ? make("button", { type: "button", text: label, onclick: () => go(tree, [...node.codes.slice(0, -1), code], { focus: true }) })
            : label);
        })));
    }
  };

  const linked = addressed();
  go(...(linked || [0, []]), { keepAddress: true });
  if (linked) document.getElementById("explore").scrollIntoView();
  addEventListener("hashchange", () => { const [tree, codes] = addressed() || []; if (codes) go(tree, codes, { keepAddress: true }); });
  let width = frame.clientWidth;
  new ResizeObserver(() => { if (state.node && frame.clientWidth && frame.clientWidth !== width) { width = frame.clientWidth; drawMap(); } }).observe(root);
  document.addEventListener("semid-theme", () => state.node && drawMap());
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-path]");
    if (!button) return;
    open(button.dataset.path.split(".").map(Number), 0);
    document.getElementById("explore").scrollIntoView();
  });
})();
