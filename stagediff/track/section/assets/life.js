"use strict";
/* One feature's own view: its kind and tokens through training, progress by every measure, cosines beside the null, its path, patterns, examples, region. */
(() => {
  const S = stagediff, C = S.charts, R = S.track, { el, number, fixed } = S, L = C.layers, O = R.overview;
  const root = document.getElementById("life");
  if (!root) return;
  const body = root.querySelector(".body"), title = root.querySelector("h3"), MAIN = R.source.measure;
  const card = (heading, node, note) => el("div", { class: "life-card" }, el("h4", null, heading), note ? el("p", { class: "small muted" }, note) : null, node);
  const charts = (R.lifeCharts = {});
  const mount = (name, options) => { const m = el("div"); charts[name] = () => C.chart(m, options); return m; };
  const moment = (i, x) => { const k = R.formed(i); return k === null ? [] : [L.moment(x.at[k], span(i, "formed_low", x), span(i, "formed_high", x), "--good", "formed")]; };
  const span = (i, name, x) => { const k = R.formed(i, name); return k === null ? null : x.at[k]; };

  /* Runs of equal values: [value, from, to]. */
  function runs(values) {
    const found = [];
    values.forEach((v, k) => { const before = found[found.length - 1]; if (before && before[0] === v) before[2] = k; else found.push([v, k, k]); });
    return found;
  }
  function strip(i) {
    const kinds = R.kinds(i), tokens = R.tokens(i);
    if (!kinds) return null;
    const steps = (a, b) => (a === b ? R.stepName(a) : `steps ${R.count(R.steps[a])} to ${R.count(R.steps[b])}`);
    const cell = (text, a, b, kind, hint) => { const c = el("span", { class: "run " + (kind ? "k-" + kind : "plain"), title: hint }, text); c.style.flex = `${b - a + 1} 1 0`; return c; };
    const rows = [el("div", { class: "strip" }, runs(kinds).map(([k, a, b]) => cell(k ? R.KIND_NAMES[k] : "unclear", a, b, k || "unclear", `${k ? R.KIND_NAMES[k] : "too few examples"}, ${steps(a, b)}`)))];
    if (tokens) rows.push(el("div", { class: "strip tokens" }, runs(tokens).map(([t, a, b]) => cell(t === null ? "" : R.say(t), a, b, null, t === null ? `no token, ${steps(a, b)}` : `strongest token “${R.say(t)}”, ${steps(a, b)}`))));
    const keep = Math.ceil(R.T / 16);
    rows.push(el("div", { class: "strip scale", "aria-hidden": "true" }, R.steps.map((s, k) => { const c = el("span", null, (R.last - k) % keep === 0 ? R.count(s) : ""); c.style.flex = "1 1 0"; return c; })));
    return el("div", { class: "strips" }, rows);
  }
  const COLOUR = { top: "--c-a", levels: "--c-born" };
  function progress(i, measure) {
    const base = (O.baseline || {})[measure], both = R.source.sets.map((set) => [set, R.fullCurve(i, `m_${set}_${measure}`)]).filter(([, m]) => m);
    const curves = both.length ? both : measure === MAIN && R.curve(i, "m") ? [["top", R.curve(i, "m")]] : [];
    if (!curves.length) return null;
    const random = base || R.steps.map(() => 0), lifted = curves.map(([set, m]) => [set, m.map((v, k) => (C.known(v) && C.known(random[k]) ? v + random[k] : null))]);
    const [low, high] = C.range([...random, ...lifted.flatMap(([, v]) => v)], { zero: true });
    return mount(`m-${measure}`, {
      height: 176, label: `Progress by ${R.MEASURE_NAMES[measure]}`,
      build: () => {
        const x = R.scale(false);
        return { x, y: { low, high, title: "mean similarity" }, draw: [...(measure === MAIN ? moment(i, x) : []), L.band(x.at, random, lifted[0][1].map((v, k) => (C.known(v) ? Math.max(v, random[k]) : null)), COLOUR[lifted[0][0]], 0.14), L.line(x.at, random, "--soft", { dash: [4, 3], width: 1.5 }), ...lifted.map(([set, v]) => L.line(x.at, v, COLOUR[set], { dots: 2 }))], hover: x.at,
          tip: (k) => ({ title: R.stepName(k), rows: [...curves.map(([set, m]) => [COLOUR[set], `M, ${R.SET_NAMES[set]}`, fixed(m[k])]), ["--soft", "random positions", fixed(random[k])]] }) };
      },
    });
  }
  function cosines(i) {
    const final = R.curve(i, "cos_final"), previous = R.curve(i, "cos_previous");
    if (!final) return null;
    const band = R.nullToFinal && R.nullToFinal(), before = O.null && O.null.previous;
    return mount("cosines", {
      height: 236, label: "Cosine with the end and with the checkpoint before",
      build: () => {
        const x = R.scale(), [low] = C.range([...final, ...previous], { zero: true });
        return { x, y: { low, high: 1.03, title: "cosine" }, draw: [...moment(i, x), ...(before && C.known(before[0]) ? [L.band([x.low, x.high], [before[0], before[0]], [before[2], before[2]], "--c-b", 0.22)] : []), ...(band ? [L.band(x.at, band.low, band.high, "--soft", 0.4)] : []), L.line(x.at, previous, "--c-b", { dots: 2 }), L.line(x.at, final, "--c-a", { dots: 2 })], hover: x.at,
          tip: (k) => ({ title: R.stepName(k), rows: [["--c-a", "with the end", fixed(final[k])], ["--c-b", "with the checkpoint before", fixed(previous[k])], ...(before && C.known(before[0]) ? [[null, "null, checkpoint before", `${fixed(before[0])} – ${fixed(before[2])}`]] : []), ...(band && C.known(band.low[k]) ? [["--soft", "null, with the end", `${fixed(band.low[k])} – ${fixed(band.high[k])}`]] : [])] }) };
      },
    });
  }
  function density(i) {
    const d = R.curve(i, "density"), norm = R.fullCurve(i, "norm");
    if (!d) return null;
    const some = d.filter((v) => v > 0);
    if (!some.length) return null;
    const low = 10 ** Math.floor(Math.log10(Math.min(...some))), high = 10 ** Math.ceil(Math.log10(Math.max(...some) * 1.0001));
    return mount("density", {
      height: 176, label: "Density by checkpoint",
      build: () => { const x = R.scale(false); return { x, y: { low, high, log: true, title: "firings per token", format: (v) => number(v, 1) }, draw: [L.line(x.at, d.map((v) => (v > 0 ? v : null)), "--c-a", { dots: 2 })], hover: x.at, tip: (k) => ({ title: R.stepName(k), rows: [["--c-a", "density", number(d[k])], ...(norm ? [[null, "decoder norm", number(norm[k])]] : [])] }) }; },
    });
  }
  /* The path of the decoder row in its own two components; the unformed part dashed. `small` leaves out the words. */
  R.path = (mount_, i, height, small = false) => {
    const a = R.fullCurve(i, "pc1"), b = R.fullCurve(i, "pc2");
    if (!a || !b || !a.some(C.known)) return null;
    const from = R.formed(i), cut = from === null ? R.T : from;
    const colour = R.KIND[R.kind(i) || "all"];
    return C.chart(mount_, {
      height, label: `Path of feature ${i}`,
      build: () => {
        const [x0, x1] = C.range(a, { air: 0.12 }), [y0, y1] = C.range(b, { air: 0.12 }), side = Math.max(x1 - x0, y1 - y0) / 2, mx = (x0 + x1) / 2, my = (y0 + y1) / 2;
        const wide = (mount_.clientWidth - 70) / (height - 50) || 1, kx = Math.max(1, wide), ky = Math.max(1, 1 / wide);
        const early = a.map((_, k) => k <= cut && k < R.T), xs = a.map((v, k) => (early[k] ? v : null)), ys = b.map((v, k) => (early[k] ? v : null));
        const lx = a.map((v, k) => (k >= cut ? v : null)), ly = b.map((v, k) => (k >= cut ? v : null));
        const mark = (k, text) => (g, X, Y, box) => { if (!C.known(a[k]) || !C.known(b[k])) return; g.fillStyle = S.colour("--ink"); g.textAlign = "left"; g.textBaseline = "bottom"; g.fillText(text, Math.min(X(a[k]) + 5, box.right - g.measureText(text).width), Math.max(Y(b[k]) - 3, box.top + 12)); };
        return { x: { low: mx - side * kx, high: mx + side * kx, ticks: [], title: small ? "" : "first component", none: small }, y: { low: my - side * ky, high: my + side * ky, ticks: [], title: small ? "" : "second component", none: small },
          draw: [L.line(xs, ys, "--soft", { dash: [4, 3], width: 1.5 }), L.points(xs, ys, "--soft", 2.6), L.line(lx, ly, colour, { width: 2 }), L.points(lx, ly, colour, 3.2), mark(0, "start"), mark(R.last, "end"), ...(from !== null && from > 0 && from < R.last && !small ? [mark(from, "formed")] : [])], points: a.map((v, k) => [v, b[k]]),
          tip: (k) => ({ title: R.stepName(k), rows: [[k < cut ? "--soft" : colour, k < cut ? "not formed" : "formed", ""]] }), pick: small ? () => R.open(i) : undefined };
      },
    });
  };
  function events(i) {
    const patterns = R.patterns(i), tokens = R.tokens(i), found = [];
    if (patterns) patterns.forEach((p, k) => {
      if (!p || p === "maintaining" || !k) return;
      const say = tokens && p === "token_to_token" ? `: “${R.say(tokens[k - 1] || "")}” → “${R.say(tokens[k] || "")}”` : "";
      const dot = el("i"); dot.style.background = S.colour(R.PATTERN[p]);
      found.push([k, el("li", null, dot, `step ${R.count(R.steps[k - 1])} → ${R.count(R.steps[k])}: ${R.PATTERN_NAMES[p]}${say}`)]);
    });
    const seen = new Set();
    for (const [a, b, k, c0, c1, shared] of R.merges) if (a === i || b === i) {
      const other = a === i ? b : a;
      if (seen.has(`${other} ${k}`)) continue;
      seen.add(`${other} ${k}`);
      found.push([k, el("li", null, el("i"), `${R.stepName(k)}: merged with `, el("a", { href: `#feature-${other}` }, `feature ${R.count(other)}`), ` (cosine ${fixed(c0, 2)} → ${fixed(c1, 2)}, ${Math.round(100 * shared)} % of examples shared)`)]);
    }
    if (!found.length) return patterns ? el("p", { class: "small muted" }, "It kept its kind and its token through every checkpoint at which it has a kind.") : null;
    const steady = patterns ? patterns.filter((p) => p === "maintaining").length : 0;
    return el("ul", { class: "events" }, found.sort((p, q) => p[0] - q[0]).map(([, node]) => node), steady ? el("li", { class: "muted" }, el("i"), `maintaining between ${steady} of ${R.last} pairs of checkpoints`) : null);
  }
  function examples(i) {
    const list = R.examples(i);
    if (list === null) return el("p", { class: "small muted" }, "The page holds examples of outstanding features and of a random sample; this one is not among them.");
    if (!list.length) return el("p", { class: "small muted" }, "It never fires on the probe rows.");
    return el("ol", { class: "examples" }, list.map((e) => el("li", null, el("div", { class: "about" }, el("span", null, number(e.activation)), el("span", null, `row ${R.count(e.row)}, token ${e.position}`)), e.texts.length ? S.tokens(e.texts, e.weights, e.peak) : null)));
  }
  function region(i) {
    const list = R.datapoints(i);
    if (!list || !list.length) return null;
    const levels = [...new Set(list.map((p) => p.level))].sort((a, b) => b - a), strongest = Math.max(...list.map((p) => p.activation));
    return el("div", { class: "levels" }, levels.map((level) => {
      const mine = list.filter((p) => p.level === level), low = Math.min(...mine.map((p) => p.activation)), high = Math.max(...mine.map((p) => p.activation));
      return el("section", null, el("h5", null, `Level ${level + 1}`, el("span", { class: "muted" }, ` activation ${number(low)}${high > low ? ` to ${number(high)}` : ""}`)), mine.map((p) => { const bar = el("i", { class: "amount" }); bar.style.width = `${(100 * p.activation) / strongest}%`; return el("div", { class: "datapoint", title: `activation ${number(p.activation)}, row ${R.count(p.row)}, token ${p.position}` }, bar, p.text() || el("span", { class: "small muted" }, `row ${R.count(p.row)}, token ${p.position}`)); }));
    }));
  }
  function facts(i) {
    const t = R.table, list = [], k = R.formed(i), low = R.formed(i, "formed_low"), high = R.formed(i, "formed_high"), add = (name, text, hint) => list.push(el("div", { title: hint }, el("dt", null, name), el("dd", null, text)));
    if (t.formed) add("formed", k === null ? "never" : R.stepName(k), "first checkpoint from which M stays above its share of the final value");
    if (t.formed && k !== null && low !== null && high !== null && high > low) add("90 % interval", `${R.count(R.steps[low])} – ${R.count(R.steps[high])}`);
    if (t.final_m) add("final M", fixed(t.final_m[i]));
    if (t.drift_before) add("drift before · after", `${number(t.drift_before[i])} · ${number(t.drift_after[i])}`, "mean 1 − cosine per checkpoint before and from formation on");
    if (t.null) add("null's drift", number(t.null[i]), "the same training with the model standing still");
    if (t.density) add("density", number(t.density[i]), "firings per token at the end");
    if (t.norm) add("decoder norm", number(t.norm[i]));
    const share = R.fullValue(i, "explained"), length = R.fullValue(i, "length");
    if (!Number.isNaN(length)) add("path length", `${number(length)}°`, "sum of the angles between neighbouring checkpoints");
    if (!Number.isNaN(share)) add("shown in two components", `${number(100 * share)} %`);
    return el("dl", { class: "minis" }, list);
  }
  function show(i, jump) {
    title.textContent = `Feature ${R.count(i)}`;
    for (const name of Object.keys(charts)) delete charts[name];
    const minis = R.source.measures.map((m) => [m, progress(i, m)]).filter(([, node]) => node), kind = R.kind(i), token = R.token(i);
    const tags = [kind ? el("span", { class: "tag k-tag k-" + kind }, R.KIND_NAMES[kind] + " at the end") : null, token !== null && kind === "token" ? el("span", { class: "tag mono" }, R.say(token)) : null, R.outstanding.includes(i) ? el("span", { class: "tag" }, "outstanding") : null].filter(Boolean);
    const path = el("div"), strips = strip(i), key = [["top", "strongest positions"], ["levels", "across activation levels"]];
    const legend = el("p", { class: "small muted keyline" }, key.filter(([set]) => R.fullCurve(i, `m_${set}_${MAIN}`)).map(([set, text]) => { const dot = el("i"); dot.style.background = S.colour(COLOUR[set]); return [dot, text]; }).flat(), el("i", { class: "dashed" }), "random positions: what lies above them is M");
    const left = [minis.length ? card("Formation: likeness of its datapoints", [legend, el("div", { class: "four" }, minis.map(([m, node]) => el("figure", null, el("figcaption", null, R.MEASURE_NAMES[m], m === MAIN ? el("span", { class: "muted" }, " · decides when it formed") : null), node)))], minis.length === 1 && R.source.measures.length > 1 ? "At this size the page holds the other measures of outstanding features and of a sample only." : null) : null];
    const turn = cosines(i), dense = density(i);
    const right = [turn ? card("Direction: cosine of its decoder row", [el("p", { class: "small muted keyline" }, [["--c-a", "with the end"], ["--c-b", "with the checkpoint before"], ["--soft", "bands: the null"]].map(([c, text]) => { const dot = el("i"); dot.style.background = S.colour(c); return [dot, text]; }).flat()), turn]) : null, dense ? card("Density", dense) : null];
    const happened = events(i), where = region(i);
    body.replaceChildren(el("div", { class: "bar tags" }, tags), facts(i), ...(strips ? [el("h4", null, "Kind and strongest token at every checkpoint"), strips] : []), el("div", { class: "life-two" }, el("div", null, left), el("div", null, right)),
      el("div", { class: "life-two" }, el("div", null, card("Path of its direction", path, "Its decoder row at every checkpoint in the two directions in which it moved most; dashed until it formed."), happened ? card("What happened to it", happened) : null), el("div", null, card("Top examples at the end", el("div", { class: "scrolled", tabindex: 0, role: "region", "aria-label": "Top examples" }, examples(i))))),
      ...(where ? [card("Its region by activation level", where, "Positions where the feature is active at the last checkpoint, a few from each level, strongest first; the position itself is shaded.")] : []));
    C.prune();
    for (const make of Object.values(charts)) make();
    if (!R.path(path, i, 300)) path.replaceWith(el("p", { class: "small muted" }, R.source.full.pc1 ? "At this size the page holds paths of outstanding features and of a sample only." : "The run has no trajectories."));
    if (jump) root.scrollIntoView({ block: "start", behavior: "instant" });
  }
  R.onOpen(show);
  S.onTheme(() => R.current !== null && R.current !== undefined && show(R.current, false));

  const goto = root.querySelector("form");
  goto.addEventListener("submit", (e) => { e.preventDefault(); const i = Number(goto.elements.feature.value); if (goto.elements.feature.value !== "" && Number.isInteger(i) && i >= 0 && i < R.n) R.open(i); });
  const turn = (by) => { const list = R.tableOrder ? R.tableOrder() : R.outstanding; if (!list.length) return; const at = list.indexOf(R.current); R.open(list[(at + by + list.length) % list.length]); };
  document.getElementById("life-back").addEventListener("click", () => turn(-1));
  document.getElementById("life-next").addEventListener("click", () => turn(1));
})();
