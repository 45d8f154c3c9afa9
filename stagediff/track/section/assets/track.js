"use strict";
/* The run as the scripts see it: checkpoints and their axis, every feature's table row and curves, the texts; and which feature is open. */
stagediff.track = (() => {
  const S = stagediff, source = S.data("track"), texts = S.data("track-features") || {};
  const { column } = S;
  const steps = source.steps, last = steps.length - 1, n = source.n, NEVER = steps.length >= 255 ? 65535 : 255;
  const KIND = { token: "--k-token", concept: "--k-concept", noise: "--k-noise", dead: "--k-dead", unclear: "--k-unclear", all: "--ink" };
  const KIND_NAMES = { token: "token-level", concept: "concept-level", noise: "noise", dead: "dead", unclear: "too few examples", all: "all features" };
  const PATTERN = { maintaining: "--p-maintaining", token_to_token: "--p-token-token", token_to_concept: "--p-token-concept", concept_to_token: "--p-concept-token", grouping: "--p-grouping", losing: "--p-losing", appearing: "--p-appearing", vanishing: "--p-vanishing" };
  const PATTERN_NAMES = { maintaining: "maintaining", token_to_token: "token → token", token_to_concept: "token → concept", concept_to_token: "concept → token", grouping: "grouping (noise → meaning)", losing: "losing (meaning → noise)", appearing: "appearing", vanishing: "vanishing" };
  const MEASURE_NAMES = { activation_cosine: "cosine of activations", feature_cosine: "cosine of features", feature_jaccard: "Jaccard of features", feature_weighted_jaccard: "weighted Jaccard of features" };
  const SET_NAMES = { top: "strongest positions", levels: "across activation levels" };
  const count = (v) => v.toLocaleString("en");
  /* A token that can be seen: white space alone as signs, counted where it is long. */
  const say = (token) => { const text = S.visible(token); return text.trim() ? text : text.length > 4 ? `␣ × ${text.length}` : text.replaceAll(" ", "␣") || "␣"; };

  // --- packed numbers
  function numbers(packed) {
    if (!packed) return null;
    const raw = column(packed);
    if (packed.low === undefined || packed.as !== "uint8") return raw;
    const out = new Float32Array(raw.length), table = new Float32Array(256);
    for (let c = 0; c < 255; c++) {
      const v = packed.low + (packed.span * c) / 254;
      table[c] = packed.turn === "cosine" ? Math.cos(v) : packed.turn === "decades" ? (v < 0.5 ? 0 : 10 ** (packed.from + packed.step * (v - 1))) : v;
    }
    table[255] = NaN;
    for (let i = 0; i < raw.length; i++) out[i] = table[raw[i]];
    return out;
  }
  const lazy = (group) => {
    const made = {};
    for (const [name, packed] of Object.entries(group || {})) {
      let values;
      Object.defineProperty(made, name, { enumerable: true, get: () => (values === undefined ? (values = numbers(packed)) : values) });
    }
    return made;
  };
  const table = lazy(source.table), curves = lazy(source.curves), full = lazy(source.full);
  /* A feature's place among those that a group holds; -1 where it does not. */
  function finder(features) {
    if (!features) return (i) => i;
    return (i) => {
      let low = 0, high = features.length - 1;
      while (low < high) { const m = (low + high) >> 1; if (features[m] < i) low = m + 1; else high = m; }
      return features.length && features[low] === i ? low : -1;
    };
  }
  const inCurves = finder(curves.feature), inFull = finder(full.feature);
  const T = steps.length;
  const part = (values, at) => (values && at >= 0 ? Array.from(values.subarray(at * T, (at + 1) * T)) : null);
  /* A curve of a feature over the checkpoints (an array with NaN for gaps), or null where the page does not hold it. */
  const curve = (i, name) => (source.curves[name] ? part(curves[name], inCurves(i)) : null);
  const fullCurve = (i, name) => (source.full[name] ? part(full[name], inFull(i)) : null);
  const fullValue = (i, name) => { const at = source.full[name] ? inFull(i) : -1; return at < 0 ? NaN : full[name][at]; };
  const kinds = (i) => { const c = curve(i, "kind_pattern"); return c && source.table.kind ? c.map((v) => source.kinds[v & 15] || null) : null; };
  const patterns = (i) => { const c = curve(i, "kind_pattern"); return c && source.table.patterns ? c.map((v) => source.patterns[v >> 4] || null) : null; };
  const tokens = (i) => { const c = curve(i, "token"); return c ? c.map((v) => (v ? texts.words[v - 1] : null)) : null; };
  const kind = (i) => (table.kind ? source.kinds[table.kind[i]] || null : null);
  const token = (i) => (table.token && table.token[i] >= 0 ? texts.words[table.token[i]] : null);
  const formed = (i, name = "formed") => { const v = table[name] ? table[name][i] : NEVER; return v === NEVER ? null : v; };
  const went = (i, pattern) => (table.patterns ? (table.patterns[i] & (1 << source.patterns.indexOf(pattern))) !== 0 : false);

  // --- the axis of training
  const AXES = { index: "training step, checkpoints evenly spaced", log_step: "training step, log scale", step: "training step" };
  let axis = "index";
  const listeners = [];
  const position = (k) => (axis === "index" ? k : axis === "step" ? steps[k] : Math.log10(steps[k] + 1));
  function scale(title = true) {
    const at = steps.map((_, k) => position(k)), pad = (at[last] - at[0] || 1) * 0.015;
    const ticks = axis === "step" ? S.charts.ticks(0, steps[last], 7).map((v) => [v, count(v)]) : axis === "index" ? spread(at.map((p, k) => [p, count(steps[k])])) : [[0, "0"], ...S.charts.decades(1, Math.max(1, steps[last])).map((v) => [Math.log10(v + 1), count(v)])];
    return { at, low: at[0] - pad, high: at[last] + pad, ticks, title: title ? AXES[axis] : "" };
  }
  /* The last label first in importance: every other one counted from the end when there are many. */
  function spread(list) { const keep = Math.ceil(list.length / 16); return list.filter((_, k) => (last - k) % keep === 0); }
  function setAxis(name) {
    axis = name;
    document.querySelectorAll("select.track-axis").forEach((s) => { s.value = name; });
    listeners.forEach((f) => f());
    S.charts.redraw();
  }
  document.querySelectorAll("select.track-axis").forEach((s) => s.addEventListener("change", () => setAxis(s.value)));
  const stepName = (k) => `step ${count(steps[k])}`;

  // --- texts
  const words = texts.words || [];
  function unpack(group) {
    if (!group) return null;
    const found = Object.fromEntries(Object.entries(group).map(([k, v]) => [k, v && v.b64 !== undefined ? numbers(v) : v]));
    const start = [], token = [];
    let a = 0, b = 0;
    if (found.count) found.count.forEach((c) => { start.push(a); a += c; });
    if (found.length) found.length.forEach((l) => { token.push(b); b += l; });
    return { ...found, start, tokenStart: token, place: finder(found.feature) };
  }
  const packedExamples = unpack(texts.examples), packedLevels = unpack(texts.levels);
  function examples(i) {
    const p = packedExamples, at = p ? p.place(i) : -1;
    if (at < 0) return null;
    const found = [];
    for (let e = p.start[at]; e < p.start[at] + p.count[at]; e++) {
      const list = [], weights = [];
      for (let t = p.tokenStart[e]; t < p.tokenStart[e] + p.length[e]; t++) { list.push(words[p.tokens[t]]); weights.push(p.shades[t] / 255); }
      found.push({ row: p.row[e], position: p.position[e], activation: p.activation[e], peak: p.peak[e], texts: list, weights });
    }
    return found;
  }
  /* The tokens around place e of a group that keeps a window of 2 * around + 1 of them, the middle one marked; null where there is no text. */
  function snippet(group, e) {
    if (!group.tokens) return null;
    const size = 2 * group.around + 1, list = [];
    let middle = 0;
    for (let k = 0; k < size; k++) { const w = group.tokens[e * size + k]; if (k === group.around) middle = list.length; if (w) list.push(words[w - 1]); }
    return S.tokens(list, list.map((_, k) => (k === middle ? 0.8 : 0)), middle);
  }
  /* A feature's datapoints, strongest level first: {level, row, position, activation, text()}. */
  function datapoints(i) {
    const p = packedLevels, at = p ? p.place(i) : -1;
    if (at < 0) return null;
    return Array.from({ length: p.count[at] }, (_, k) => { const e = p.start[at] + k; return { level: p.level[e], row: p.row[e], position: p.position[e], activation: p.activation[e], text: () => snippet(p, e) }; });
  }
  const withTexts = packedExamples ? Array.from(packedExamples.feature) : [];

  // --- which feature is open: in the address, so that it can be linked to and the browser's Back works
  const openers = [];
  let current = null;
  function show(i, jump) { current = i; openers.forEach((f) => f(i, jump)); }
  function open(i) { if (location.hash === `#feature-${i}`) show(i, true); else location.hash = `feature-${i}`; }
  const asked = () => { const m = /^#feature-(\d+)$/.exec(location.hash); return m && Number(m[1]) < n ? Number(m[1]) : null; };
  addEventListener("hashchange", () => { const i = asked(); if (i !== null) show(i, true); });
  function begin() { const i = asked(), first = outstanding[0] ?? withTexts[0] ?? 0; if (n) show(i ?? first, i !== null); }
  const outstanding = Array.from(column(source.outstanding) || []);

  return {
    n, steps, T, last, source, table, overview: S.data("track-phases") || {}, KIND, KIND_NAMES, PATTERN, PATTERN_NAMES, MEASURE_NAMES, SET_NAMES, count, say, words, numbers, unpack, snippet,
    curve, fullCurve, fullValue, kinds, patterns, tokens, kind, token, formed, went, inFull: (i) => inFull(i) >= 0, scale, stepName, onAxis: (f) => listeners.push(f), setAxis, get axis() { return axis; },
    examples, datapoints, withTexts, outstanding, open, onOpen: (f) => openers.push(f), begin, get current() { return current; }, merges: source.merges, NEVER,
  };
})();
