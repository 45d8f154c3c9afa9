"use strict";
/* The table of features: sorted by its heads, filtered by kind, pattern, words and conditions; a click opens the feature's own view. */
(() => {
  const S = stagediff, R = S.track, { el, svg, number, fixed } = S, t = R.table, mount = document.getElementById("track-table");
  if (!mount) return;
  const at = (id) => document.getElementById(id), scope = at("track-scope"), kind = at("track-kind"), pattern = at("track-pattern"), filter = at("track-filter"), said = at("track-said");
  const step = (name) => (i) => { const k = R.formed(i, name); return k === null ? NaN : R.steps[k]; };
  const measures = { feature: (i) => i };
  if (t.formed) measures.formed = step("formed");
  for (const name of ["final_m", "drift", "drift_before", "drift_after", "null", "density", "norm"]) if (t[name]) measures[name] = (i) => t[name][i];

  function spark(i) {
    const m = R.curve(i, "m");
    if (!m || !m.some((v) => v === v)) return "–";
    const W = 92, H = 22, high = Math.max(0.1, ...m.filter((v) => v === v)), low = Math.min(0, ...m.filter((v) => v === v)), x = (k) => 2 + ((W - 4) * k) / Math.max(1, R.last), y = (v) => H - 2 - ((H - 4) * (v - low)) / (high - low);
    const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": `M from ${fixed(m[0], 2)} to ${fixed(m[R.last], 2)}`, class: "spark" });
    picture.append(svg("line", { x1: 2, x2: W - 2, y1: y(0), y2: y(0), class: "zero" }));
    picture.append(svg("path", { d: m.map((v, k) => (v === v ? `${k && m[k - 1] === m[k - 1] ? "L" : "M"}${x(k).toFixed(1)} ${y(v).toFixed(1)}` : "")).join("") }));
    const from = R.formed(i);
    if (from !== null) picture.append(svg("circle", { cx: x(from), cy: y(m[from] === m[from] ? m[from] : 0), r: 2.6 }));
    return picture;
  }
  function formed(i) {
    const k = R.formed(i), low = R.formed(i, "formed_low"), high = R.formed(i, "formed_high");
    if (k === null) return "–";
    return el("span", null, R.count(R.steps[k]), low !== null && high !== null && high > low ? el("span", { class: "muted small" }, ` ${R.count(R.steps[low])}–${R.count(R.steps[high])}`) : null);
  }
  const kindTag = (i) => { const k = R.kind(i); return k ? el("span", { class: "k-dot k-" + k }, R.KIND_NAMES[k]) : el("span", { class: "muted" }, "unclear"); };
  const numeric = (name, title, hint, places) => measures[name] && { name, title, hint, numeric: true, value: measures[name], cell: (i) => (places ? fixed(measures[name](i), places) : number(measures[name](i), 2)) };
  const sort = t.final_m ? "final_m" : "feature";
  const grid = S.grid({
    mount, label: "Features", sort, descending: sort !== "feature", pageSize: 15, open: R.open,
    columns: [
      { name: "feature", title: "Feature", hint: "its index in every dictionary of the chain", value: (i) => i, cell: (i) => String(i) },
      t.kind && { name: "kind", title: "Kind at the end", hint: "the rule is told under Limits", value: (i) => R.kind(i) || "~", cell: kindTag },
      t.token && { name: "token", title: "Token", hint: "the token with the largest share of its strongest activations, at the end", value: (i) => R.token(i) ?? "\uffff", cell: (i) => { const text = R.token(i); return text === null ? "–" : el("code", null, R.say(text)); } },
      measures.formed && { name: "formed", title: "Formed at step", hint: "first step from which M stays above its share of the final value; 90 % interval", numeric: true, value: measures.formed, cell: formed },
      numeric("final_m", "Final M", "likeness of its datapoints above random positions, at the last checkpoint", 3), numeric("drift", "Drift", "mean 1 − cosine with the checkpoint before"), numeric("density", "Density", "firings per token at the last checkpoint"), numeric("norm", "Norm", "of its decoder row at the last checkpoint"),
      R.source.curves.m && { name: "curve", title: "M through training", hint: "the dot: when it formed", cell: spark },
    ].filter(Boolean),
  });
  R.tableOrder = () => grid.order();
  const CONDITION = /^([a-zA-Z_]+)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/;
  let texts = null;
  /* Does the feature's token, or a text of its examples, hold the phrase? */
  function says(i, phrase) {
    if ((R.token(i) || "").toLowerCase().includes(phrase)) return true;
    if (!texts) texts = new Map();
    if (!texts.has(i)) texts.set(i, (R.examples(i) || []).map((e) => e.texts.join("")).join("\n").toLowerCase());
    return texts.get(i).includes(phrase);
  }
  function apply() {
    const tests = [], plain = [], unknown = [];
    for (const word of filter.value.trim().split(/\s+/).filter(Boolean)) {
      const m = CONDITION.exec(word);
      if (!m) plain.push(word);
      else if (!measures[m[1]]) unknown.push(m[1]);
      else { const f = measures[m[1]], v = Number(m[3]); tests.push({ "<": (i) => f(i) < v, ">": (i) => f(i) > v, "<=": (i) => f(i) <= v, ">=": (i) => f(i) >= v, "=": (i) => f(i) === v }[m[2]]); }
    }
    if (kind && kind.value) tests.push(kind.value === "unclear" ? (i) => R.kind(i) === null : (i) => R.kind(i) === kind.value);
    if (pattern && pattern.value) tests.push((i) => R.went(i, pattern.value));
    const phrase = plain.join(" ").toLowerCase();
    if (phrase) tests.push((i) => String(i) === phrase || says(i, phrase));
    let ids = [];
    if (scope.value === "outstanding") ids = R.outstanding;
    else if (scope.value === "examples") ids = R.withTexts;
    else for (let i = 0; i < R.n; i++) if (scope.value === "all" || !t.alive || t.alive[i]) ids.push(i);
    grid.rows(ids.filter((i) => tests.every((f) => f(i))));
    said.textContent = unknown.length ? `No measure is named ${unknown.join(", ")}. There are: ${Object.keys(measures).join(", ")}.` : "";
  }
  let wait = 0;
  filter.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(apply, 140); });
  for (const select of [scope, kind, pattern]) if (select) select.addEventListener("change", apply);
  R.onOpen((i) => grid.mark(i));
  apply();
})();
