"use strict";
// Asks the service for what explorer.js draws, and draws the state of the catalogue around it.
(function () {
  const by = (id) => document.getElementById(id);
  const percent = (value) => (value === null ? "unknown" : `${(100 * value).toFixed(1)}%`);
  const count = (value) => value.toLocaleString("en-US");
  const text = (tag, content, name) => {
    const element = document.createElement(tag);
    element.textContent = content;
    if (name) element.className = name;
    return element;
  };
  let shown = null;

  const token = () => new Promise((resolve) => {
    const form = by("live-token");
    form.hidden = false;
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("semid-token", form.querySelector("input").value);
      form.hidden = true;
      resolve();
    };
  });
  const ask = async (path, values) => {
    const given = sessionStorage.getItem("semid-token");
    const response = await fetch(`v1/${path}?${new URLSearchParams(values || {})}`,
      given ? { headers: { authorization: `Bearer ${given}` } } : {});
    if (response.status === 401) { await token(); return ask(path, values); }
    const answer = await response.json();
    by("live-problem").hidden = response.ok;
    if (!response.ok) {
      by("live-problem").textContent = answer.error;
      throw new Error(answer.error);
    }
    if (shown !== answer.version) { shown = answer.version; state(); }
    return answer;
  };

  const tile = (title, value, remark) => {
    const box = text("div", "", "tile");
    box.append(text("span", title), text("b", value), text("span", remark));
    return box;
  };
  const state = async () => {
    const [model, versions, fullest] = await Promise.all([ask("model"), ask("versions"), ask("buckets")]);
    const { since } = versions;
    by("live-title").textContent = `${model.tokenizer} on ${count(since.items)} items`;
    by("live-model").textContent = `${model.codebook_sizes.join(" × ")} codes, embeddings of width ${model.dim}, codebook ${model.codebook_fingerprint.slice(0, 12)}`;
    const shift = since.levels.length ? Math.max(...since.levels.map((level) => level.shift - level.chance), 0) : 0;
    by("live-tiles").replaceChildren(
      tile("Version", String(versions.version), versions.kept ? "kept; not the last" : "the last"),
      tile("Health", model.health, model.findings.length ? model.findings[0] : "no finding"),
      tile("New items", count(since.new), "since the version before"),
      tile("Novel items", since.new ? percent(since.novel_share) : "none", "of the new ones; 1% is usual"),
      tile("Drift", percent(shift), "usage that moved beyond chance"));
    by("live-buckets").replaceChildren(...fullest.buckets.slice(0, 30).map((bucket) => {
      const row = document.createElement("li"), head = text("div", "", "bucket-head"), items = text("ul", "", "items small");
      const button = text("button", bucket.codes.join(" · "), "link code");
      button.type = "button";
      button.dataset.path = bucket.codes.join(".");
      button.setAttribute("aria-label", `Open id ${bucket.codes.join(" ")} in the explorer`);
      head.append(text("b", `${count(bucket.items)} items`), button);
      items.append(...bucket.examples.slice(0, 5).map(({ id, title }) => text("li", title || id)));
      row.append(head, items);
      return row;
    }));
    if (!fullest.buckets.length) by("live-buckets").replaceChildren(text("li", "Every item has an id of its own.", "muted"));
  };

  const item = ({ item_id, title, codes }) => ({ id: item_id, title, codes });
  semid.live = (async () => {
    const root = await ask("tree");
    const dotted = (codes) => codes.join(".");
    return {
      hierarchical: root.hierarchical,
      levels: root.levels,
      items: root.items,
      trees: root.hierarchical ? [0] : [...Array(root.levels).keys()],
      metrics: Object.keys(root.metrics),
      node: async (level, codes) => {
        const node = await ask("tree", { level, prefix: dotted(codes) });
        const { code, items, metrics, words, examples } = node.children;
        const children = code.map((each, at) => ({
          code: each, items: items[at], words: words[at], examples: examples[at],
          metrics: Object.fromEntries(Object.entries(metrics).map(([key, values]) => [key, values[at]])),
        }));
        return { ...node, children, allChildren: node.all_children };
      },
      scale: (metric) => metric === "items" ? [1, root.children.items[0]] : [0, Math.max(...root.children.metrics[metric])],
      list: async (level, codes, offset, limit) => {
        const answer = await ask("items", { level, prefix: dotted(codes), offset, limit });
        return { items: answer.items.map(item), total: answer.total };
      },
      find: async (level, q, offset, limit) => {
        const answer = await ask("search", { q, level, offset, limit });
        return { items: answer.items.map(item), total: answer.total, codes: answer.codes };
      },
    };
  })();
})();
