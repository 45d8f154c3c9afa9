"use strict";
/* The figures about the whole run: phases, patterns, formation, drift, efficiency. */
(() => {
  const S = stagediff, C = S.charts, R = S.track, { el, number, fixed } = S, O = R.overview, L = C.layers;
  const at = (id) => document.getElementById(id);
  const percent = (v) => (C.known(v) ? `${number(100 * v, 3)} %` : "–");
  const mapped = (scale, indices) => indices.map((k) => scale.at[k]);
  const charts = (R.charts = {});
  const on = (id, options) => { const mount = at(id); if (mount) charts[id] = C.chart(mount, options); return charts[id]; };

  /* Boundaries of the axis that is shown. */
  function moments(scale) {
    const list = ((O.phases || {}).boundaries || {})[R.axis] || [];
    return list.map((b) => L.moment(scale.at[b.at], C.known(b.low) ? scale.at[b.low] : null, C.known(b.high) ? scale.at[b.high] : null, "--ink", R.stepName(b.at)));
  }

  // --- shares of kinds
  if (O.shares) {
    const order = ["token", "concept", "noise", "unclear", "dead"];
    C.legend(at("shares-legend"), order.map((k) => ({ name: k, title: R.KIND_NAMES[k], colour: R.KIND[k] })));
    on("shares", {
      height: 300, label: "Share of features of each kind by checkpoint",
      build: () => {
        const x = R.scale(), draw = [];
        let below = R.steps.map(() => 0);
        for (const kind of order) {
          const top = O.shares[kind].map((v, k) => below[k] + v / R.n);
          draw.push(L.band(x.at, below, top, R.KIND[kind], 0.92));
          below = top;
        }
        return { x, y: { low: 0, high: 1, title: "share of all features", format: (v) => `${Math.round(100 * v)} %` }, draw: [...draw, ...moments(x)], hover: x.at, tip: (k) => ({ title: R.stepName(k), rows: order.map((kind) => [R.KIND[kind], R.KIND_NAMES[kind], `${R.count(O.shares[kind][k])} · ${percent(O.shares[kind][k] / R.n)}`]) }) };
      },
    });
  }

  // --- what features did from one checkpoint to the next
  if (O.counts) {
    const off = new Set(["maintaining"]), names = R.source.patterns;
    C.legend(at("patterns-legend"), names.map((p) => ({ name: p, title: R.PATTERN_NAMES[p], colour: R.PATTERN[p] })), () => charts.patterns.redraw(), off);
    on("patterns", {
      height: 270, label: "Features that went through each pattern between checkpoints",
      build: () => {
        const x = R.scale(), draw = [], shown = names.filter((p) => !off.has(p)), tops = [];
        for (let k = 1; k < R.T; k++) {
          const a = x.at[k - 1], b = x.at[k], gap = (b - a) * 0.06;
          let sum = 0;
          for (const p of shown) { const v = O.counts[p][k]; if (v) draw.push(L.bar(a + gap, b - gap, sum, sum + v, R.PATTERN[p])); sum += v; }
          tops.push(sum);
        }
        const middles = R.steps.map((_, k) => (k ? (x.at[k] + x.at[k - 1]) / 2 : null));
        return { x, y: { low: 0, high: Math.max(1, ...tops) * 1.05, title: "features" }, draw: [...draw, ...moments(x)], hover: middles, tip: (k) => ({ title: `step ${R.count(R.steps[k - 1])} → ${R.count(R.steps[k])}`, rows: names.map((p) => [R.PATTERN[p], R.PATTERN_NAMES[p], R.count(O.counts[p][k])]) }) };
      },
    });
  }

  // --- drift by checkpoint
  const series = (O.phases || {}).series || {};
  if (series.drift) on("drift-series", {
    height: 210, label: "Drift from checkpoint to checkpoint",
    build: () => {
      const x = R.scale(), d = series.drift, xs = mapped(x, d.at), null95 = O.null && O.null.previous[0], stands = O.null && C.known(O.null.previous[1]) ? 1 - O.null.previous[1] : null;
      const [low, high] = C.range([...d.low, ...d.high, stands], { zero: true });
      return { x, y: { low, high, title: "drift, 1 − cosine" }, draw: [L.band(xs, d.low, d.high, "--c-a"), L.line(xs, d.value, "--c-a", { dots: 2.5 }), L.level(stands, "--soft", "median of the null: the same training, model standing still"), ...moments(x)], hover: xs,
        tip: (k) => ({ title: R.stepName(d.at[k]), rows: [["--c-a", "drift since the checkpoint before", number(d.value[k])], [null, "90 % interval", `${number(d.low[k])} – ${number(d.high[k])}`], ...(C.known(null95) ? [["--soft", "null: median · 95 % quantile", `${number(stands)} · ${number(1 - null95)}`]] : [])] }) };
    },
  });

  // --- formation
  const chosen = (id) => at(id) && at(id).value;
  if (O.progress) {
    const kinds = ["token", "concept", "noise"];
    C.legend(at("progress-legend"), kinds.map((k) => ({ name: k, title: R.KIND_NAMES[k] + " at the end", colour: R.KIND[k] })));
    on("progress", {
      height: 290, label: "Progress measure by kind",
      build: () => {
        const x = R.scale(), by = (O.progress[chosen("progress-set")] || {})[chosen("progress-measure")] || {}, shown = kinds.filter((k) => by[k]);
        const [low, high] = C.range(shown.flatMap((k) => [...by[k].low, ...by[k].high, ...by[k].m]), { zero: true });
        return { x, y: { low, high, title: "M: likeness above random" }, draw: [...shown.map((k) => L.band(x.at, by[k].low, by[k].high, R.KIND[k])), ...shown.map((k) => L.line(x.at, by[k].m, R.KIND[k], { dots: 2.5 })), L.level(0, "--line-strong", "", [])], hover: x.at,
          tip: (k) => ({ title: R.stepName(k), rows: shown.map((q) => [R.KIND[q], `${R.KIND_NAMES[q]} (${R.count(by[q].features || 0)})`, `${fixed(by[q].m[k])}  (${fixed(by[q].low[k])} – ${fixed(by[q].high[k])})`]) }) };
      },
    });
    for (const id of ["progress-set", "progress-measure"]) at(id).addEventListener("change", () => charts.progress.redraw());
  }
  if (O.formed) on("formed", {
    height: 290, label: "Share of features that have formed by each checkpoint",
    build: () => {
      const x = R.scale(), kinds = Object.keys(O.formed);
      return { x, y: { low: 0, high: 1, title: "share that has formed", format: (v) => `${Math.round(100 * v)} %` }, draw: kinds.map((k) => L.line(x.at, O.formed[k].formed, R.KIND[k], { dots: 2.5 })), hover: x.at,
        tip: (k) => ({ title: `formed by ${R.stepName(k)}`, rows: kinds.map((q) => [R.KIND[q], `${R.KIND_NAMES[q]} at the end`, `${percent(O.formed[q].formed[k])} of ${R.count(O.formed[q].features)}`]) }) };
    },
  });
  if (O.agreement) {
    const show = () => {
      const a = O.agreement[chosen("agreement-set")];
      const square = (rows, title) => el("table", { class: "matrix" }, el("caption", null, title), el("thead", null, el("tr", null, el("td"), R.source.measures.map((m) => el("th", { scope: "col" }, R.MEASURE_NAMES[m])))), el("tbody", null, R.source.measures.map((m, i) => el("tr", null, el("th", { scope: "row" }, R.MEASURE_NAMES[m]), rows[i].map((v) => { const cell = el("td", null, C.known(v) ? fixed(v, 2) : "–"); cell.style.setProperty("--share", Math.max(0, Math.min(1, v || 0))); return cell; })))));
      at("agreement-tables").replaceChildren(...(a ? [square(a.m, "Correlation of M over features and checkpoints (Pearson)"), square(a.time, "Correlation of formation steps over features (Spearman)")] : [el("p", { class: "muted" }, "Not measured for this set.")]));
    };
    at("agreement-set").addEventListener("change", show);
    show();
  }

  // --- drift
  const H = O.histograms;
  if (H) {
    const againsts = ["final", "previous"].filter((a) => H[a]), select = at("histogram-against");
    let step = Math.max(0, R.last - 1);
    const slider = at("histogram-step");
    const counts = () => (H[select.value] || {}).counts || [];
    const null_ = () => H.null && H.null.counts.find((c) => c);
    if (!againsts.includes(select.value)) select.value = againsts[0];
    slider.max = R.last;
    slider.value = step;
    const pick = (k) => { step = k; slider.value = k; at("histogram-said").textContent = R.stepName(k); charts.heat.redraw(); charts.histogram.redraw(); };
    slider.addEventListener("input", () => pick(Number(slider.value)));
    select.addEventListener("change", () => pick(step));
    on("heat", {
      height: 290, label: "Histograms of the cosine by checkpoint, one column each",
      build: () => {
        const x = R.scale(), edges = H[select.value].edges, most = Math.max(1, ...counts().flatMap((c) => c || [])), draw = [];
        const floor = lowest(edges, counts());
        counts().forEach((c, k) => { if (!c) return; const a = k ? (x.at[k] + x.at[k - 1]) / 2 : x.low, b = k < R.last ? (x.at[k] + x.at[k + 1]) / 2 : x.high; c.forEach((v, i) => { if (v) draw.push(L.bar(a, b, edges[i], edges[i + 1], "--c-a", 0.08 + (0.92 * Math.log(1 + v)) / Math.log(1 + most))); }); });
        draw.push((g, X, Y, box) => { g.strokeStyle = S.colour("--c-both"); g.lineWidth = 2; const a = step ? (x.at[step] + x.at[step - 1]) / 2 : x.low, b = step < R.last ? (x.at[step] + x.at[step + 1]) / 2 : x.high; g.strokeRect(X(a), box.top, X(b) - X(a), box.bottom - box.top); });
        return { x, y: { low: floor, high: 1, title: "cosine" }, draw, hover: x.at, pick, tip: (k) => ({ title: R.stepName(k), rows: [[null, "features", counts()[k] ? R.count(counts()[k].reduce((p, q) => p + q, 0)) : "–"], [null, "click", "shows its histogram"]] }) };
      },
    });
    on("histogram", {
      height: 290, label: "Histogram of the cosine at one checkpoint, and the null's",
      build: () => {
        const edges = H[select.value].edges, mine = counts()[step] || [], other = null_() || [], middles = edges.slice(1).map((v, i) => (v + edges[i]) / 2), most = Math.max(10, ...mine, ...other);
        const floor = lowest(edges, [...counts(), other]);
        const total = mine.reduce((p, q) => p + q, 0);
        return { x: { low: floor, high: 1, ticks: C.ticks(floor, 1, 8).map((v) => [v, String(v).replace("-", "−")]), title: select.value === "final" ? "cosine with the same feature at the end" : "cosine with the same feature one checkpoint before" }, y: { low: 0.7, high: most * 1.3, log: true, title: "features (log)", format: R.count },
          draw: [...mine.map((v, i) => (v ? L.bar(edges[i], edges[i + 1], 0.7, v, "--c-a", 0.85) : () => {})), outline(edges, other)], hover: middles,
          tip: (i) => ({ title: `cosine ${fixed(edges[i], 2)} to ${fixed(edges[i + 1], 2)}`, rows: [["--c-a", R.stepName(step), `${R.count(mine[i] || 0)} of ${R.count(total)}`], ...(other.length ? [["--c-both", "null", number(other[i])]] : [])] }) };
      },
    });
    pick(step);
  }
  /* Below it there is nothing: plots begin there. */
  function lowest(edges, lists) {
    let first = edges.length - 2;
    for (const c of lists) if (c) { const i = c.findIndex((v) => v > 0); if (i >= 0) first = Math.min(first, i); }
    return Math.min(edges[Math.max(0, first - 1)], 0.9);
  }
  function outline(edges, counts) {
    return (g, X, Y) => {
      if (!counts.length) return;
      g.strokeStyle = S.colour("--c-both"); g.lineWidth = 1.6; g.beginPath();
      counts.forEach((v, i) => { const y = Y(Math.max(v, 0.7)); i ? g.lineTo(X(edges[i]), y) : g.moveTo(X(edges[i]), y); g.lineTo(X(edges[i + 1]), y); });
      g.stroke();
    };
  }
  if (O.cosines) {
    const groups = Object.keys(O.cosines), off = new Set(groups.length > 1 ? ["all"] : []);
    C.legend(at("cosines-legend"), groups.map((k) => ({ name: k, title: `${R.KIND_NAMES[k]}${k === "all" ? "" : " at the end"}`, colour: R.KIND[k] })), () => charts.cosines.redraw(), off);
    on("cosines", {
      height: 290, label: "Cosine with the final decoder row: medians and quartiles by kind",
      build: () => {
        const x = R.scale(), shown = groups.filter((k) => !off.has(k)), c = O.cosines, band = O.null && nullToFinal();
        const [low] = C.range(shown.flatMap((k) => c[k].low), { zero: true });
        return { x, y: { low: Math.min(0, low), high: 1.02, title: "cosine with the final direction" }, draw: [...shown.map((k) => L.band(x.at, c[k].low, c[k].high, R.KIND[k], 0.13)), ...shown.map((k) => L.line(x.at, c[k].median, R.KIND[k], { dots: 2.5 })), ...(band ? [L.band(x.at, band.low, band.high, "--soft", 0.35)] : [])], hover: x.at,
          tip: (k) => ({ title: R.stepName(k), rows: [...shown.map((q) => [R.KIND[q], `${R.KIND_NAMES[q]} (${R.count(c[q].features)})`, `${fixed(c[q].median[k])}  (${fixed(c[q].low[k])} – ${fixed(c[q].high[k])})`]), ...(band && C.known(band.low[k]) ? [["--soft", "null, 5 – 95 %", `${fixed(band.low[k])} – ${fixed(band.high[k])}`]] : [])] }) };
      },
    });
  }
  /* What training alone would leave of the cosine with the end: r checkpoints before the end, the null after r repeats. */
  function nullToFinal() {
    const low = R.steps.map(() => null), high = low.slice();
    O.null.start.forEach((b, r) => { const k = R.last - 1 - r; if (k >= 0) { low[k] = b[0]; high[k] = b[2]; } });
    low[R.last] = high[R.last] = 1;
    return { low, high };
  }
  R.nullToFinal = O.null ? nullToFinal : null;
  if (O.turns) {
    const groups = Object.keys(O.turns), parts = [["before", "before formation", "--c-b"], ["after", "after formation", "--good"], ["null", "null: model standing still", "--soft"]];
    C.legend(at("turns-legend"), parts.map(([, title, colour]) => ({ title, colour })));
    on("turns", {
      height: 290, label: "Drift per checkpoint before and after formation, and the null's",
      build: () => {
        const draw = [], points = [], info = [];
        groups.forEach((name, i) => parts.forEach(([key, title, colour], j) => { const v = O.turns[name][key], x = i + (j - 1) * 0.22; draw.push(L.whisker(x, v[0], v[1], v[2], colour)); points.push([x, v[0]]); info.push([name, title, colour, v]); }));
        const [low, high] = C.range(info.flatMap(([, , , v]) => v), { zero: true });
        return { x: { low: -0.6, high: groups.length - 0.4, ticks: groups.map((name, i) => [i, `${name} (${R.count(O.turns[name].features)})`]), title: "kind at the end (features with both)" }, y: { low, high, title: "median drift per checkpoint" }, draw, points,
          tip: (k) => ({ title: `${R.KIND_NAMES[info[k][0]]}, ${info[k][1]}`, rows: [[info[k][2], "median of 1 − cosine", number(info[k][3][0])], [null, "90 % interval", `${number(info[k][3][1])} – ${number(info[k][3][2])}`]] }) };
      },
    });
  }

  if (O.same_step) {
    const s = O.same_step, groups = [["drift_formed", "formed", "has formed", "--good"], ["drift_unformed", "unformed", "forms later", "--c-b"]];
    C.legend(at("same-step-legend"), groups.map(([, , title, colour]) => ({ title, colour })));
    on("same-step", {
      height: 250, label: "Drift of formed and not yet formed features by checkpoint",
      build: () => {
        const x = R.scale(), xs = mapped(x, s.at), [low, high] = C.range(groups.flatMap(([key]) => s[key]), { zero: true });
        return { x, y: { low, high, title: "median of 1 − cosine" }, draw: groups.map(([key, , , colour]) => L.line(xs, s[key], colour, { dots: 3 })), hover: xs,
          tip: (k) => ({ title: R.stepName(s.at[k]), rows: [...groups.map(([key, n, title, colour]) => [colour, `${title} (${R.count(s[n][k] || 0)})`, number(s[key][k])]), [null, "difference", C.known(s.difference[k]) ? `${number(s.difference[k], 2)}  (${number(s.low[k], 2)} – ${number(s.high[k], 2)})` : "too few features"]] }) };
      },
    });
  }

  // --- efficiency
  const E = O.efficiency && O.efficiency.quality;
  if (E) {
    const HOW = { chained: ["carried along the chain", "--c-a", { dots: 3 }], scratch_full: ["from scratch, first budget", "--c-both", { dots: 4, dash: [5, 4] }], scratch_short: ["from scratch, following budget", "--c-b", { dots: 4, dash: [2, 3] }] };
    const hows = Object.keys(HOW).filter((h) => E[h]);
    C.legend(at("efficiency-legend"), hows.map((h) => ({ title: HOW[h][0], colour: HOW[h][1], line: true, dash: HOW[h][2].dash })));
    const figures = [["explained_variance", "explained variance", {}], ["l0", "L0, active features per token", { zero: true }], ["dead", "share of dead features", { zero: true }], ["loss_recovered", "loss recovered", {}]];
    for (const [name, title, options] of figures) on(`efficiency-${name}`, {
      height: 230, label: `${title} by checkpoint`,
      build: () => {
        const x = R.scale(), values = hows.flatMap((h) => E[h][name] || []), [low, high] = C.range(values, options);
        return { x, y: { low, high, title, format: name === "dead" || name === "loss_recovered" ? (v) => `${Number((100 * v).toPrecision(3))} %` : undefined }, draw: hows.map((h) => L.line(mapped(x, E[h].at), E[h][name] || [], HOW[h][1], HOW[h][2])), hover: x.at,
          tip: (k) => ({ title: R.stepName(k), rows: hows.map((h) => { const i = E[h].at.indexOf(k); return i < 0 ? null : [HOW[h][1], HOW[h][0], `${number(E[h][name][i])} · ${R.count(E[h].tokens[i])} tokens`]; }).filter(Boolean) }) };
      },
    });
  }
})();
