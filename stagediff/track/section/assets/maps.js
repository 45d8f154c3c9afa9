"use strict";
/* Paths of several features side by side, and the UMAPs. Last of the track's scripts: it opens the first feature. */
(() => {
  const S = stagediff, C = S.charts, R = S.track, { el } = S, L = C.layers;

  // --- paths
  const paths = document.getElementById("paths");
  if (paths) {
    const form = document.getElementById("paths-form"), said = document.getElementById("paths-said"), MOST = 24;
    const byKind = (k) => R.outstanding.filter((i) => R.kind(i) === k && R.inFull(i) && R.formed(i) !== null).slice(0, 4);
    const first = [...byKind("token"), ...byKind("concept"), ...byKind("noise")];
    let shown = first.length ? first : R.outstanding.filter(R.inFull).slice(0, 8);
    function show() {
      paths.replaceChildren();
      C.prune();
      for (const i of shown) {
        const mount = el("div"), kind = R.kind(i);
        paths.append(el("figure", null, el("figcaption", null, el("a", { href: `#feature-${i}` }, `Feature ${R.count(i)}`), el("button", { type: "button", class: "close", "aria-label": `Leave out feature ${i}`, onclick: () => { shown = shown.filter((j) => j !== i); show(); } }, "×"), el("br"), el("span", { class: "small muted" }, [kind ? R.KIND_NAMES[kind] : "unclear", R.formed(i) === null ? "never formed" : `formed at ${R.stepName(R.formed(i))}`].join(", "))), mount));
        R.path(mount, i, 180, true);
      }
      form.elements.features.value = shown.join(", ");
    }
    form.addEventListener("submit", (e) => {
      e.preventDefault();
      const asked = [...new Set(form.elements.features.value.split(/[\s,;]+/).filter(Boolean))], fine = asked.map(Number).filter((i) => Number.isInteger(i) && i >= 0 && i < R.n && R.inFull(i) && R.fullCurve(i, "pc1").some(C.known)), left = asked.filter((a) => !fine.includes(Number(a)));
      shown = fine.slice(0, MOST);
      said.textContent = [left.length ? `No path in this page: ${left.slice(0, 8).join(", ")}.` : "", fine.length > MOST ? `The first ${MOST} are shown.` : ""].join(" ");
      show();
    });
    show();
  }

  // --- UMAP
  const U = R.unpack(S.data("track-umap")), root = document.getElementById("umaps");
  if (U && root) {
    const COLOURS = ["#d1495b", "#0b7fab", "#d98e04", "#3c9d5b", "#8457b8", "#c0559b", "#5b8def", "#8f6b3f", "#18a3a3", "#7d8a2e", "#e07b53", "#4d5d8a"];
    const chosen = U.features, colour = new Map(chosen.map(([f], k) => [f, COLOURS[k % COLOURS.length]])), off = new Set();
    const say = ([f, kind]) => `${R.count(f)}${kind ? ` · ${R.KIND_NAMES[kind] || kind}` : ""}`;
    C.legend(document.getElementById("umaps-legend"), [...chosen.map((c) => ({ name: c[0], title: say(c), colour: colour.get(c[0]) })), { name: -1, title: "random positions", colour: "--c-dead" }], () => C.redraw(), off);
    U.fits.forEach((fit, f) => {
      const times = [...new Set(Array.from(U.at).filter((_, e) => U.fit[e] === f))].sort((a, b) => a - b), boxes = el("div", { class: "small-multiples" });
      root.append(el("h3", null, fit === "apart" ? "Every checkpoint fitted apart (as published)" : "All checkpoints fitted together (aligned: points can be followed)"), boxes);
      const everything = fit === "apart" ? null : Array.from(U.u.keys()).filter((e) => U.fit[e] === f);
      times.forEach((k) => {
        const mine = Array.from(U.u.keys()).filter((e) => U.fit[e] === f && U.at[e] === k), mount = el("div"), frame = everything || mine;
        boxes.append(el("figure", null, el("figcaption", null, R.stepName(k)), mount));
        const [x0, x1] = C.range(frame.map((e) => U.u[e])), [y0, y1] = C.range(frame.map((e) => U.v[e]));
        C.chart(mount, {
          height: 230, label: `UMAP at ${R.stepName(k)}, ${fit}`,
          build: () => {
            const points = mine.filter((e) => !off.has(U.feature[e])).sort((p, q) => U.feature[p] - U.feature[q]);
            return { x: { low: x0, high: x1, ticks: [], none: true }, y: { low: y0, high: y1, ticks: [], none: true }, draw: [L.points(points.map((e) => U.u[e]), points.map((e) => U.v[e]), (q) => colour.get(U.feature[points[q]]) || "--c-dead", 3)], points: points.map((e) => [U.u[e], U.v[e]]),
              tip: (q) => { const e = points[q], i = U.feature[e]; return { title: i < 0 ? "a random position" : `feature ${R.count(i)}`, node: R.snippet(U, e) || "", rows: [[null, "row, token", `${R.count(U.row[e])}, ${U.position[e]}`]] }; }, pick: (q) => { const i = U.feature[points[q]]; if (i >= 0) R.open(i); } };
          },
        });
      });
    });
  }
  R.begin();
})();
