"use strict";
/* The comparison: a line per run in every figure, over relative progress or over steps. */
(() => {
  const S = stagediff, C = S.charts, L = C.layers, { el, number, fixed } = S, runs = S.data("runs").runs;
  const KIND = { token: "--k-token", concept: "--k-concept", noise: "--k-noise", unclear: "--k-unclear", dead: "--k-dead" };
  const NAMES = { token: "token-level", concept: "concept-level", noise: "noise", unclear: "too few examples", dead: "dead" };
  const COLOURS = ["#0b7fab", "#d1495b", "#d98e04", "#3c9d5b", "#8457b8", "#c0559b", "#8f6b3f", "#18a3a3"], DASHES = [[], [6, 4], [2, 3], [9, 3, 2, 3]];
  const colour = (k) => COLOURS[k % COLOURS.length], dash = (k) => DASHES[k % DASHES.length], at = (id) => document.getElementById(id);
  const count = (v) => v.toLocaleString("en"), percent = (v) => `${Math.round(100 * v)} %`;
  const off = new Set(), shown = () => runs.map((r, k) => [r, k]).filter(([r]) => !off.has(r.name));
  const AXES = { progress: ["relative training progress, log scale", (r) => r.progress], share: ["share of training", (r) => r.steps.map((s) => s / (r.steps[r.steps.length - 1] || 1))], log: ["training step, log scale", (r) => r.steps.map((s) => Math.log10(s + 1))] };
  let axis = "progress";
  function scale(title = true) {
    const all = runs.map((r) => AXES[axis][1](r)), high = Math.max(...all.flat()), ticks = axis === "log" ? [[0, "0"], ...C.decades(1, 10 ** high).map((v) => [Math.log10(v + 1), count(v)])] : C.ticks(0, 1, 5).map((v) => [v, axis === "share" ? percent(v) : String(v)]);
    return { all, low: Math.min(...all.flat()) - 0.01 * high, high: high * 1.01, ticks, title: title ? AXES[axis][0] : "" };
  }
  document.querySelectorAll("select.compare-axis").forEach((s) => s.addEventListener("change", () => { axis = s.value; document.querySelectorAll("select.compare-axis").forEach((o) => { o.value = axis; }); C.redraw(); }));

  const legends = [];
  function legend(id) {
    const mount = at(id);
    if (!mount) return;
    const draw = () => C.legend(mount, runs.map((r, k) => ({ name: r.name, title: r.name, colour: colour(k), line: true, dash: dash(k).length > 0 })), () => { legends.forEach((f) => f()); C.redraw(); }, off);
    legends.push(draw);
    draw();
  }
  ["kinds-legend", "formation-legend", "drift-legend", "quality-legend"].forEach(legend);
  const figure = (root, caption) => { const mount = el("div"); root.append(el("figure", null, el("figcaption", null, caption), mount)); return mount; };

  /* Lines of all runs; values(run) -> a value per checkpoint, or null. Every checkpoint of every run can be hovered. */
  function lines(mount, label, height, y, values, text) {
    C.chart(mount, {
      height, label,
      build: () => {
        const x = scale(), mine = shown().map(([r, k]) => [r, k, values(r)]).filter(([, , v]) => v), [low, high] = y.high !== undefined ? [y.low, y.high] : C.range(mine.flatMap(([, , v]) => v), y), points = [], info = [];
        mine.forEach(([r, k, v]) => v.forEach((value, t) => { points.push([x.all[k][t], value]); info.push([r, k, t, value]); }));
        return { x, y: { low, high, title: y.title, format: y.format }, draw: mine.map(([, k, v]) => L.line(x.all[k], v, colour(k), { dash: dash(k), dots: 2.4 })), points, tip: (p) => { const [r, k, t, value] = info[p]; return { title: r.name, rows: [[colour(k), `step ${count(r.steps[t])}`, text(value)], [null, "progress", fixed(r.progress[t], 2)]] }; } };
      },
    });
  }

  // --- kinds
  const alive = (r, t) => ["token", "concept", "noise"].reduce((sum, k) => sum + r.shares[k][t], 0) || NaN;
  if (at("kinds-figures")) {
    for (const kind of ["token", "concept", "noise"]) lines(figure(at("kinds-figures"), NAMES[kind]), `Share of ${NAMES[kind]} features`, 250, { low: 0, high: 1, title: "share of alive features", format: percent }, (r) => r.shares && r.shares[kind].map((v, t) => v / alive(r, t)), (v) => `${number(100 * v)} %`);
    const order = ["token", "concept", "noise", "unclear", "dead"];
    C.legend(at("stacks-legend"), order.map((k) => ({ title: NAMES[k], colour: KIND[k] })));
    runs.forEach((r, k) => {
      if (!r.shares) return;
      C.chart(figure(at("stacks"), r.name), {
        height: 230, label: `Kinds in ${r.name}`,
        build: () => {
          const x = scale(), xs = x.all[k], draw = [];
          let below = r.steps.map(() => 0);
          for (const kind of order) { const top = r.shares[kind].map((v, t) => below[t] + v / r.features); draw.push(L.band(xs, below, top, KIND[kind], 0.92)); below = top; }
          for (const b of ((r.phases || {}).boundaries || {})[at("phases-axis") ? at("phases-axis").value : "index"] || []) draw.push(L.moment(xs[b.at], b.low === null ? null : xs[b.low], b.high === null ? null : xs[b.high], "--ink", count(r.steps[b.at])));
          return { x, y: { low: 0, high: 1, title: "share of all", format: percent }, draw, hover: xs, tip: (t) => ({ title: `step ${count(r.steps[t])}`, rows: order.map((kind) => [KIND[kind], NAMES[kind], `${number((100 * r.shares[kind][t]) / r.features)} %`]) }) };
        },
      });
    });
  }

  // --- phases
  if (at("boundaries")) {
    const rows = () => runs.map((r, k) => [r, k, ((r.phases || {}).boundaries || {})[at("phases-axis").value] || []]);
    C.chart(at("boundaries"), {
      height: 60 + 46 * runs.length, label: "Boundaries of phases by run",
      build: () => {
        const x = scale(), draw = [], points = [], info = [];
        rows().forEach(([r, k, list]) => list.forEach((b, i) => {
          const xs = x.all[k], y = runs.length - k;
          draw.push((g, X, Y) => { g.strokeStyle = g.fillStyle = colour(k); g.lineWidth = 5; g.globalAlpha = 0.3; if (b.low !== null && b.high !== null) { g.beginPath(); g.moveTo(X(xs[b.low]), Y(y)); g.lineTo(X(xs[b.high]), Y(y)); g.stroke(); } g.globalAlpha = 1; g.beginPath(); g.arc(X(xs[b.at]), Y(y), 6, 0, 7); g.fill(); });
          points.push([xs[b.at], y]);
          info.push([r, k, b, i]);
        }));
        return { x, y: { low: 0.4, high: runs.length + 0.6, ticks: runs.map((r, k) => [runs.length - k, r.name.length > 28 ? r.name.slice(0, 27) + "…" : r.name]) }, draw, points, tip: (p) => { const [r, k, b, i] = info[p]; return { title: `${r.name}: boundary ${i + 1}`, rows: [[colour(k), "step", count(r.steps[b.at])], [null, "progress", fixed(r.progress[b.at], 2)], ...(b.low === null ? [] : [[null, "90 % interval", `${count(r.steps[b.low])} – ${count(r.steps[b.high])}`]])] }; } };
      },
    });
    at("phases-axis").addEventListener("change", () => C.redraw());
  }

  // --- formation
  if (at("formation-figures")) for (const kind of ["token", "concept"]) lines(figure(at("formation-figures"), `${NAMES[kind]}: share that has formed`), `Formation of ${NAMES[kind]} features`, 250, { low: 0, high: 1, title: "share that has formed", format: percent }, (r) => r.formed && r.formed[kind] && r.formed[kind].formed, (v) => `${number(100 * v)} %`);
  if (at("progress")) {
    const measure = at("progress-measure");
    for (const kind of ["token", "concept"]) lines(figure(at("progress"), `${NAMES[kind]}: mean M of the strongest positions`), `M of ${NAMES[kind]} features`, 250, { zero: true, title: "likeness above random" }, (r) => { const m = ((r.progress_by || {}).top || {})[measure.value]; return m && m[kind] && m[kind].m; }, (v) => fixed(v));
    measure.addEventListener("change", () => C.redraw());
  }

  // --- drift
  if (at("cosines")) lines(at("cosines"), "Median cosine with the final direction", 290, { low: 0, high: 1.03, title: "median cosine" }, (r) => r.cosines && r.cosines.all && r.cosines.all.median, (v) => fixed(v));
  if (at("turns")) {
    const parts = [["before", "before formation", "--c-b"], ["after", "after formation", "--good"], ["null", "null", "--soft"]];
    C.legend(at("turns-legend"), parts.map(([, title, c]) => ({ title, colour: c })));
    C.chart(at("turns"), {
      height: 264, label: "Drift before and after formation by run",
      build: () => {
        const draw = [], points = [], info = [], mine = shown().filter(([r]) => r.turns && r.turns.all);
        mine.forEach(([r], i) => parts.forEach(([key, title, c], j) => { const v = r.turns.all[key], x = i + (j - 1) * 0.22; draw.push(L.whisker(x, v[0], v[1], v[2], c)); points.push([x, v[0]]); info.push([r, title, c, v]); }));
        const [low, high] = C.range(info.flatMap(([, , , v]) => v), { zero: true });
        return { x: { low: -0.6, high: Math.max(1, mine.length) - 0.4, ticks: mine.map(([r], i) => [i, r.name.length > 18 ? r.name.slice(0, 17) + "…" : r.name]), title: "run" }, y: { low, high, title: "median of 1 − cosine" }, draw, points, tip: (p) => ({ title: `${info[p][0].name}, ${info[p][1]}`, rows: [[info[p][2], "median", number(info[p][3][0])], [null, "90 % interval", `${number(info[p][3][1])} – ${number(info[p][3][2])}`]] }) };
      },
    });
  }

  // --- quality
  const spreadOut = (r, name) => { const c = ((r.efficiency || {}).quality || {}).chained; if (!c || !c[name]) return null; const out = r.steps.map(() => null); c.at.forEach((t, i) => { out[t] = c[name][i]; }); return out; };
  for (const [name, title, options, say] of [["explained_variance", "explained variance", {}, (v) => fixed(v)], ["loss_recovered", "loss recovered", {}, (v) => `${number(100 * v)} %`], ["l0", "L0, active features per token", { zero: true }, (v) => number(v)], ["dead", "share of dead features", { zero: true }, (v) => `${number(100 * v)} %`]]) {
    const mount = at(`quality-${name}`);
    if (mount) lines(mount, `${title} by run`, 230, { ...options, title }, (r) => spreadOut(r, name), say);
  }
})();
