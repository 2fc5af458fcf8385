"use strict";
// Theme, figures, and the list that unfolds. Figures name colors; a theme gives them values.
const semid = {};

semid.css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

semid.paint = function (value) {
  if (typeof value === "string") {
    const named = /^@(\w+)$/.exec(value);
    if (!named) return value;
    return semid.css(/^\d+$/.test(named[1]) ? "--c" + named[1] : "--" + named[1]);
  }
  if (Array.isArray(value)) return value.map(semid.paint);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, semid.paint(inner)]));
  }
  return value;
};

semid.layout = function (own) {
  const phone = window.innerWidth < 640;
  const ink = semid.css("--ink"), muted = semid.css("--muted"), line = semid.css("--line");
  const axis = (given) => {
    const title = given && given.title;
    return Object.assign(
      { gridcolor: line, zerolinecolor: line, linecolor: line, ticks: "", automargin: true, tickfont: { color: muted } },
      given,
      title ? { title: Object.assign({ standoff: 10, font: { size: 12, color: muted } }, title) } : {},
    );
  };
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: phone ? 11 : 12, color: ink },
    margin: { l: 52, r: 12, t: 8, b: 44 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: muted } },
    hoverlabel: { bgcolor: semid.css("--card"), bordercolor: line, font: { color: ink }, namelength: -1 },
    hovermode: "closest", dragmode: false, bargap: 0.35,
  };
  const merged = Object.assign(base, semid.paint(own));
  for (const key of Object.keys(merged)) if (/^[xy]axis/.test(key)) merged[key] = axis(merged[key]);
  merged.xaxis = Object.assign({ showgrid: false }, merged.xaxis || axis({}));
  merged.yaxis = merged.yaxis || axis({});
  return merged;
};

// A long legend goes below the plot, and the figure grows by it: the curves keep their height.
semid.roomy = function (place, data, layout) {
  place.style.height = "";
  const names = data.filter((trace) => trace.name && trace.showlegend !== false).map((trace) => trace.name);
  if (layout.showlegend === false || names.length < 7) return layout;
  const width = 44 + 7 * Math.max(...names.map((name) => name.length));
  const columns = Math.max(1, Math.floor((place.clientWidth - 64) / width));
  const rows = Math.ceil(names.length / columns);
  const extra = 20 * rows + 12;
  place.style.height = place.clientHeight + extra + "px";
  layout.legend = Object.assign({}, layout.legend, { yref: "container", y: 0, yanchor: "bottom", maxheight: extra });
  layout.margin = Object.assign({}, layout.margin, { b: layout.margin.b + extra });
  return layout;
};

semid.plots = JSON.parse(document.getElementById("semid-plots").textContent);
semid.draw = function () {
  for (const plot of semid.plots) {
    const place = document.getElementById("plot-" + plot.id);
    if (place) {
      Plotly.react(place, semid.paint(plot.data), semid.roomy(place, plot.data, semid.layout(plot.layout)), {
        displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false,
      });
    }
  }
  document.documentElement.dataset.drawn = "yes";
};

semid.setTheme = function (theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
};

semid.setTheme(document.documentElement.dataset.theme);
semid.draw();
document.getElementById("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("semid-theme", next); } catch (error) { /* no storage from a file */ }
  semid.setTheme(next);
  semid.draw();
  document.dispatchEvent(new Event("semid-theme"));
});
const semidMore = document.getElementById("more-buckets");
if (semidMore) {
  semidMore.addEventListener("click", () => {
    const hidden = document.querySelectorAll("ol.buckets > li[hidden]");
    hidden.forEach((row) => { row.hidden = false; });
    if (hidden.length) hidden[0].querySelector("button").focus();
    semidMore.remove();
  });
}
