"use strict";
/* The diff's features as the script sees them: columns, groups, and the examples of those that carry some. Shared by the plot, the panel and the table. */
stagediff.features = (() => {
  const source = stagediff.data("scatter");
  const { column } = stagediff;
  const n = source.n, stages = source.stages;
  const col = {};
  for (const [name, packed] of Object.entries(source.columns)) {
    Object.defineProperty(col, name, { configurable: true, enumerable: true, get() { const values = column(packed); Object.defineProperty(col, name, { value: values, enumerable: true }); return values; } });
  }
  const flags = column(source.flags), aliveIn = column(source.alive), quadrant = column(source.quadrant);
  const alive = (i) => (flags[i] & 1) !== 0, selected = (i) => (flags[i] & 2) !== 0, born = (i) => (flags[i] & 4) !== 0;
  const score = (i) => col.x[i] + col.y[i];

  const extra = stagediff.data("features") || {};
  const histograms = extra.histograms && { edges: extra.histograms.edges, bins: extra.histograms.bins, feature: column(extra.histograms.feature), base: column(extra.histograms.base), new: column(extra.histograms.new) };
  const packed = extra.examples && Object.fromEntries(Object.entries(extra.examples).map(([k, v]) => [k, k === "words" ? v : column(v)]));
  const place = new Map(), first = [], start = [];
  if (packed) {
    let example = 0;
    packed.feature.forEach((f, k) => { place.set(f, k); first.push(example); example += packed.count[k]; });
    let token = 0;
    packed.length.forEach((l) => { start.push(token); token += l; });
  }

  /* A feature's examples, strongest first: {row, position, isNew, activation, peak, texts, weights}; none where the page holds none. */
  function examples(feature, most = Infinity) {
    const k = place.get(feature);
    if (k === undefined) return [];
    const found = [];
    for (let e = first[k]; e < first[k] + Math.min(most, packed.count[k]); e++) {
      const texts = [], weights = [];
      for (let t = start[e]; t < start[e] + packed.length[e]; t++) {
        texts.push(packed.words[packed.tokens[t]]);
        weights.push(packed.shades[t] / 255);
      }
      found.push({ row: packed.row[e], position: packed.position[e], isNew: packed.is_new[e] === 1, activation: packed.activation[e], peak: packed.peak[e], texts, weights });
    }
    return found;
  }

  function histogram(feature) {
    if (!histograms) return null;
    let low = 0, high = histograms.feature.length - 1;
    while (low < high) { const m = (low + high) >> 1; if (histograms.feature[m] < feature) low = m + 1; else high = m; }
    if (histograms.feature[low] !== feature) return null;
    const at = low * histograms.bins;
    return { edges: histograms.edges, base: histograms.base.subarray(at, at + histograms.bins), new: histograms.new.subarray(at, at + histograms.bins) };
  }

  const listeners = [];
  let current = null;
  /* Opens a feature everywhere: the panel shows it, the plot circles it, the table marks its row. */
  function open(feature, by) {
    current = feature;
    listeners.forEach((f) => f(feature, by));
  }
  return {
    n, stages, col, quadrant, quadrants: source.quadrants, cut: source.cut, alive, selected, born, score, aliveIn, examples, histogram, open,
    hasExamples: (f) => place.has(f), withExamples: packed ? Array.from(packed.feature) : [], extreme: new Set(extra.extreme), random: new Set(extra.random),
    onOpen: (f) => listeners.push(f), get current() { return current; },
  };
})();
