"use strict";
/* The panel beside the plot: one feature with its cosines, stages, histogram and examples; and the table of features below. */
(() => {
  const S = stagediff, F = S.features, panel = document.getElementById("feature-panel");
  const { el, svg, fixed, number } = S;
  const COSINES = [["x", "D → F via D", "what adding the model did after the data (x)"], ["y", "M → F via M", "what adding the data did after the model (y)"], ["cos_s_d", "S → D", "what the data did alone"], ["cos_s_m", "S → M", "what the model did alone"], ["cos_d_m", "D · M", "whether data and model pull the same way"], ["cos_f_f", "F via D · F via M", "whether both paths end at the same feature"], ["cos_s_f_direct", "S → F direct", "both at once, in one finetune"]];
  const STAGE = { F_D: "F via D", F_M: "F via M", F_direct: "F direct" };
  let byScore = null;

  function ordered() {
    if (!byScore) {
      byScore = [];
      for (let i = 0; i < F.n; i++) if (F.selected(i)) byScore.push(i);
      if (!byScore.length) byScore = F.withExamples.slice();
      byScore.sort((a, b) => F.score(a) - F.score(b) || a - b);
    }
    return byScore;
  }
  /* The next or previous selected feature by score. */
  F.step = (step) => {
    const list = ordered();
    if (!list.length) return;
    let at = list.indexOf(F.current);
    if (at < 0) at = F.current === null ? (step > 0 ? -1 : 0) : list.findIndex((i) => F.score(i) > F.score(F.current)) - (step > 0 ? 1 : 0);
    F.open(list[(at + step + list.length) % list.length], "step");
  };

  function cosines(i) {
    return el("table", { class: "cosines" }, el("tbody", null, COSINES.filter(([k]) => F.col[k]).map(([k, name, hint]) => {
      const v = F.col[k][i], bar = el("div", { class: "meter" }, el("i"));
      bar.firstChild.style.width = `${Math.max(0, Math.min(1, v || 0)) * 100}%`;
      return el("tr", { title: hint }, el("th", { scope: "row" }, name), el("td", { class: "wide" }, bar), el("td", { class: "n" }, fixed(v)));
    })));
  }
  function stages(i) {
    return el("table", { class: "stages" }, el("thead", null, el("tr", null, ["stage", "density", "decoder norm", ""].map((h, k) => el("th", { scope: "col", class: k ? "n" : null }, h)))),
      el("tbody", null, F.stages.map((s, k) => el("tr", null, el("th", { scope: "row" }, STAGE[s] || s), el("td", { class: "n" }, number(F.col["density_" + s][i])), el("td", { class: "n" }, number(F.col["norm_" + s][i])), el("td", { class: "n muted" }, F.aliveIn[i] & (1 << k) ? "alive" : "dead")))));
  }
  function histogram(i) {
    const h = F.histogram(i);
    if (!h) return null;
    const W = 380, H = 104, foot = 18, total = [h.base, h.new].map((c) => c.reduce((a, b) => a + b, 0));
    if (!total[0] && !total[1]) return null;
    let from = h.base.length, to = 0;
    h.base.forEach((_, b) => { if (h.base[b] || h.new[b]) { from = Math.min(from, b); to = Math.max(to, b + 1); } });
    from = Math.max(0, from - 1); to = Math.min(h.base.length, to + 1);
    const most = Math.max(...h.base, ...h.new), y = (v) => (v ? 6 + ((H - foot - 6) * Math.log(1 + v)) / Math.log(1 + most) : 0), w = W / (to - from);
    const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Firings by activation: ${total[0]} on base rows, ${total[1]} on new rows` });
    const draw = (counts, css) => counts.forEach((v, b) => { if (v && b >= from && b < to) picture.append(svg("rect", { x: (b - from) * w + 0.5, width: Math.max(1, w - 1), y: H - foot - y(v), height: y(v), class: css }, svg("title", {}, `${number(h.edges[b])}–${number(h.edges[b + 1])}: ${v.toLocaleString("en")} ${css === "old" ? "base" : "new"} tokens`))); });
    draw(h.base, "old");
    draw(h.new, "fresh");
    picture.append(svg("line", { x1: 0, x2: W, y1: H - foot + 0.5, y2: H - foot + 0.5, class: "axis" }));
    for (const [b, anchor] of [[from, "start"], [Math.round((from + to) / 2), "middle"], [to, "end"]]) picture.append(svg("text", { x: (b - from) * w, y: H - 4, "text-anchor": anchor }, number(h.edges[b], 2)));
    return [el("h4", null, "Firings by activation"), el("p", { class: "small muted keyline" }, el("i", { class: "old" }), `base rows ${total[0].toLocaleString("en")}`, el("i", { class: "fresh" }), `new rows ${total[1].toLocaleString("en")}`, " · tokens, log scale"), picture];
  }
  function examples(i) {
    const list = F.examples(i);
    if (!list.length) return [el("h4", null, "Top examples"), el("p", { class: "muted small" }, F.hasExamples(i) ? "It never fires on the held-out rows." : "The page holds examples of selected, extreme and random features. This one's: ", F.hasExamples(i) ? null : el("code", null, `stagediff feature KEY ${i}`))];
    const fresh = list.filter((e) => e.isNew).length;
    return [el("h4", null, `Top examples in F via D: ${list.length}, ${fresh} of them from new rows`),
      el("ol", { class: "examples" }, list.map((e) => el("li", null, el("div", { class: "about" }, el("span", null, number(e.activation)), e.isNew ? el("span", { class: "tag new" }, "new") : el("span", { class: "tag" }, "base"), el("span", null, `row ${e.row.toLocaleString("en")}, token ${e.position}`)), S.tokens(e.texts, e.weights, e.peak))))];
  }
  function tags(i) {
    const tag = (text, kind = "") => el("span", { class: "tag " + kind }, text);
    return [F.selected(i) && tag("selected", "hot"), F.born(i) && tag("born"), !F.alive(i) && tag("dead"), F.quadrant[i] && tag(F.quadrants[F.quadrant[i] - 1].replaceAll("_", " ")), F.extreme.has(i) && tag("extreme"), F.random.has(i) && tag("random sample")].filter(Boolean);
  }
  function show(i) {
    const facts = [["x + y", fixed(F.score(i))]];
    if (F.col.pair_novelty) facts.push(["paired novelty", fixed(F.col.pair_novelty[i])]);
    if (F.col.new_top) facts.push(["new rows in top", fixed(F.col.new_top[i], 2)]);
    if (F.col.new_mass) facts.push(["mass on new rows", fixed(F.col.new_mass[i], 2)]);
    const body = panel.querySelector(".body");
    body.replaceChildren(
      ...[el("div", { class: "bar tags" }, tags(i)), el("dl", { class: "minis" }, facts.map(([k, v]) => el("div", null, el("dt", null, k), el("dd", null, v)))), el("h4", null, "Cosines between stages"), cosines(i), histogram(i), examples(i), el("h4", null, "In every stage"), stages(i)].flat().filter(Boolean));
    body.scrollTop = 0;
    panel.querySelector("h3").textContent = `Feature ${i.toLocaleString("en")}`;
  }

  // --- the table
  const scope = document.getElementById("table-scope"), filter = document.getElementById("table-filter"), said = document.getElementById("table-said"), mount = document.getElementById("feature-table");
  const density = F.col.density_F_D ? "density_F_D" : "density_" + F.stages[F.stages.length - 1];
  const measures = { x: (i) => F.col.x[i], y: (i) => F.col.y[i], score: F.score, density: (i) => F.col[density][i], feature: (i) => i };
  if (F.col.new_mass) measures.new_mass = (i) => F.col.new_mass[i];
  if (F.col.new_top) measures.new_top = (i) => F.col.new_top[i];
  for (const name of Object.keys(F.col)) if (!measures[name]) measures[name] = (i) => F.col[name][i];

  function snippet(i) {
    const [e] = F.examples(i, 1);
    if (!e) return el("span", { class: "muted" }, "–");
    const from = Math.max(0, e.peak - 9), to = Math.min(e.texts.length, e.peak + 8);
    const box = S.tokens(e.texts.slice(from, to), e.weights.slice(from, to), e.peak - from);
    box.classList.add("snippet");
    return box;
  }
  const numeric = (name, title, hint, places) => ({ name, title, hint, numeric: true, value: measures[name], cell: (i) => (places ? fixed(measures[name](i), places) : number(measures[name](i), 2)) });
  const grid = S.grid({
    mount, label: "Features", sort: "score", open: (i) => { F.open(i, "table"); document.getElementById("scatter").scrollIntoView(); },
    columns: [{ name: "feature", title: "Feature", hint: "index in every dictionary", value: (i) => i, cell: (i) => String(i) }, numeric("x", "x", "cos(D, F via D)", 3), numeric("y", "y", "cos(M, F via M)", 3), numeric("score", "x + y", "low is suspicious", 3), measures.pair_novelty && numeric("pair_novelty", "Paired novelty", "of its latent in F via D and the one matched in F via M; low is suspicious", 3), numeric("density", "Density", "firings per token in F via D"),
      measures.new_mass && numeric("new_mass", "New mass", "share of its activation mass on new rows", 2), measures.new_top && numeric("new_top", "New top", "share of new rows among its top examples", 2), { name: "example", title: "Strongest example", hint: "the activating tokens are shaded", cell: snippet }].filter(Boolean),
  });
  let texts = null;
  function text(i) {
    if (!texts) texts = new Map();
    if (!texts.has(i)) texts.set(i, F.examples(i).map((e) => e.texts.join("")).join("\n").toLowerCase());
    return texts.get(i);
  }
  const CONDITION = /^([a-zA-Z_]+)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/;
  function apply() {
    const words = filter.value.trim().split(/\s+/).filter(Boolean), tests = [], plain = [], unknown = [];
    for (const word of words) {
      const m = CONDITION.exec(word);
      if (!m) plain.push(word);
      else if (!measures[m[1]]) unknown.push(m[1]);
      else {
        const f = measures[m[1]], v = Number(m[3]);
        tests.push({ "<": (i) => f(i) < v, ">": (i) => f(i) > v, "<=": (i) => f(i) <= v, ">=": (i) => f(i) >= v, "=": (i) => f(i) === v }[m[2]]);
      }
    }
    const phrase = plain.join(" ").toLowerCase();
    if (phrase) tests.push((i) => String(i) === phrase || text(i).includes(phrase));
    let ids = [];
    const everything = { selected: F.selected, alive: F.alive, all: () => true }[scope.value];
    if (everything) { for (let i = 0; i < F.n; i++) if (everything(i)) ids.push(i); }
    else ids = scope.value === "extreme" ? [...F.extreme] : scope.value === "random" ? [...F.random] : F.withExamples;
    grid.rows(ids.filter((i) => tests.every((t) => t(i))));
    said.textContent = unknown.length ? `No measure is named ${unknown.join(", ")}. There are: ${Object.keys(measures).join(", ")}.` : "";
  }
  let wait = 0;
  filter.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(apply, 120); });
  scope.addEventListener("change", apply);
  const goto = document.getElementById("feature-goto");
  goto.addEventListener("submit", (e) => {
    e.preventDefault();
    const i = Number(goto.elements.feature.value);
    if (Number.isInteger(i) && i >= 0 && i < F.n && goto.elements.feature.value !== "") F.open(i, "goto");
  });
  document.getElementById("feature-next").addEventListener("click", () => F.step(1));
  document.getElementById("feature-back").addEventListener("click", () => F.step(-1));

  F.onOpen((i, by) => {
    show(i);
    grid.mark(i);
    history.replaceState(null, "", `#feature=${i}`);
    if (by === "plot" && matchMedia("(max-width: 900px)").matches) panel.scrollIntoView({ block: "nearest" });
  });
  S.onTheme(() => F.current !== null && show(F.current));
  apply();
  const asked = /^#feature=(\d+)$/.exec(location.hash), list = ordered();
  const first = asked && Number(asked[1]) < F.n ? Number(asked[1]) : list[0];
  if (first !== undefined) { show(first); grid.mark(first); F.begin = first; }
  if (asked && Number(asked[1]) < F.n) F.open(Number(asked[1]), "link");
})();
