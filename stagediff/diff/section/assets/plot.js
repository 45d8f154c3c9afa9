"use strict";
/* The scatter. Points are drawn into a pixel buffer by hand: 262,144 of them take a few milliseconds, on any machine, without WebGL.
   Axes, cut and marks are drawn on a second canvas above it. */
(() => {
  const S = stagediff, F = S.features, root = document.getElementById("plot");
  if (!root) return;
  const { el, fixed, number, colour } = S;
  const points = root.querySelector("canvas.points"), over = root.querySelector("canvas.over"), tip = root.querySelector(".tip"), legend = document.getElementById("plot-legend");
  const modeSelect = document.getElementById("plot-colour"), scaleSelect = document.getElementById("plot-scale");
  const g = over.getContext("2d"), pg = points.getContext("2d", { alpha: false });
  const PAD = { left: 58, right: 14, top: 12, bottom: 46 };

  // --- scales: positions are cosines, or angles drawn so that the lower left stays what moved most
  const degrees = (c) => (-Math.acos(Math.max(-1, Math.min(1, c))) * 180) / Math.PI;
  const SCALES = { cosine: { map: (c) => c, label: (v) => trim(v), back: (v) => v }, angle: { map: degrees, label: (v) => trim(-v) + "°", back: (v) => Math.cos((v * Math.PI) / 180) } };
  const trim = (v) => String(Number(v.toFixed(6))).replace("-", "−");
  let scale = SCALES.cosine, px, py, home, view;

  // --- colours: every point has a code into 256 colours, and a group that can be switched off
  const code = new Uint8Array(F.n), group = new Uint8Array(F.n), order = new Uint32Array(F.n);
  const lut = new Uint8Array(256 * 3);
  let groups = [], off = new Set(), big = new Uint8Array(F.n);
  const QUADRANTS = { lower_left: ["both (lower left)", "--c-both"], upper_left: ["model only (upper left)", "--c-a"], lower_right: ["data only (lower right)", "--c-b"], upper_right: ["neither (upper right)", "--c-none"] };

  const GRADIENT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  function gradient(t) {
    const p = t * (GRADIENT.length - 1), i = Math.min(GRADIENT.length - 2, Math.floor(p)), f = p - i;
    return GRADIENT[i].map((v, k) => Math.round(v + (GRADIENT[i + 1][k] - v) * f));
  }
  function rgb(name) {
    const c = document.createElement("canvas").getContext("2d");
    c.fillStyle = colour(name);
    const hex = c.fillStyle;
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }

  function paint() {
    const mode = modeSelect.value;
    groups = [];
    const add = (name, css) => { groups.push({ name, css, count: 0 }); return groups.length - 1; };
    const values = F.col[mode];
    if (values) {
      const log = mode.startsWith("density");
      let low = Infinity, high = -Infinity;
      for (let i = 0; i < F.n; i++) if (F.alive(i) && values[i] > 0) { low = Math.min(low, values[i]); high = Math.max(high, values[i]); }
      if (!log) [low, high] = [0, 1];
      const at = (v) => (log ? Math.log(Math.max(v, low) / low) / Math.log(high / low || 2) : v);
      add("dead", "--c-dead");
      add("alive", null);
      for (let c = 0; c < 255; c++) lut.set(gradient(c / 254), 3 * c);
      lut.set(rgb("--c-dead"), 3 * 255);
      for (let i = 0; i < F.n; i++) {
        group[i] = F.alive(i) ? 1 : 0;
        code[i] = group[i] && values[i] === values[i] ? Math.round(254 * Math.max(0, Math.min(1, at(values[i])))) : 255;
        groups[group[i]].count++;
      }
      groups.ramp = { low, high, log };
    } else if (mode === "quadrant") {
      const names = F.quadrants.map((q) => add(...QUADRANTS[q]));
      const dead = add("dead", "--c-dead"), born = add("born", "--c-born"), none = add("no quadrant", "--line-strong");
      for (let i = 0; i < F.n; i++) group[i] = F.quadrant[i] ? names[F.quadrant[i] - 1] : F.born(i) ? born : F.alive(i) ? none : dead;
      finish();
    } else {
      const dead = add("dead", "--c-dead"), rest = add("alive, not selected", "--c-a"), born = add("born", "--c-born"), chosen = add("selected", "--c-both");
      for (let i = 0; i < F.n; i++) group[i] = F.selected(i) ? chosen : F.born(i) ? born : F.alive(i) ? rest : dead;
      finish();
    }
    arrange();
    drawLegend();
    draw();
  }
  function finish() {
    groups.forEach((q, k) => lut.set(rgb(q.css), 3 * k));
    for (let i = 0; i < F.n; i++) { code[i] = group[i]; groups[group[i]].count++; }
  }
  /* Drawn last is seen best: dead, then the common, then the rare, then the selected. A counting sort over 1,024 levels. */
  function arrange() {
    const ranks = groups.map((q, k) => ({ k, rank: q.name === "dead" ? -1 : -q.count })).sort((a, b) => (a.rank === -1 ? -1 : b.rank === -1 ? 1 : a.rank - b.rank));
    const rank = new Uint8Array(groups.length);
    ranks.forEach((r, i) => (rank[r.k] = i));
    const key = (i) => (F.selected(i) ? 512 : 0) + (groups.ramp ? (group[i] ? 1 + code[i] : 0) : rank[group[i]]);
    const starts = new Uint32Array(1025);
    for (let i = 0; i < F.n; i++) starts[key(i) + 1]++;
    for (let k = 0; k < 1024; k++) starts[k + 1] += starts[k];
    for (let i = 0; i < F.n; i++) order[starts[key(i)]++] = i;
    for (let i = 0; i < F.n; i++) big[i] = F.selected(i) ? 1 : 0;
  }

  function drawLegend() {
    const items = groups.map((q, k) =>
      q.count === 0 ? null : el("button", { type: "button", class: "key", "aria-pressed": off.has(q.name) ? "false" : "true", onclick: () => { off.has(q.name) ? off.delete(q.name) : off.add(q.name); drawLegend(); draw(); } },
        swatch(q, k), `${q.name} `, el("span", { class: "muted" }, q.count.toLocaleString("en"))));
    const ramp = groups.ramp && el("span", { class: "ramp" }, number(groups.ramp.low, 2), rampBar(), number(groups.ramp.high, 2));
    legend.replaceChildren(...[...items, ramp].filter(Boolean));
  }
  function swatch(q) {
    const s = el("i");
    s.style.background = q.css ? colour(q.css) : `rgb(${gradient(0.5)})`;
    return s;
  }
  function rampBar() {
    const s = el("b");
    s.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((t) => `rgb(${gradient(t)})`)})`;
    return s;
  }

  // --- geometry
  function rescale() {
    scale = SCALES[scaleSelect.value];
    px = new Float32Array(F.n);
    py = new Float32Array(F.n);
    const box = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < F.n; i++) {
      const a = (px[i] = scale.map(F.col.x[i])), b = (py[i] = scale.map(F.col.y[i]));
      if (a !== a || b !== b) continue;
      box[0] = Math.min(box[0], a); box[1] = Math.max(box[1], a); box[2] = Math.min(box[2], b); box[3] = Math.max(box[3], b);
    }
    if (box[0] > box[1]) box.splice(0, 4, 0, 1, 0, 1);
    const mx = 0.04 * (box[1] - box[0] || 0.1), my = 0.04 * (box[3] - box[2] || 0.1);
    home = { x0: box[0] - mx, x1: box[1] + mx, y0: box[2] - my, y1: box[3] + my };
    view = { ...home };
  }
  let width = 0, height = 0, ratio = 1, image = null, pixels = null;
  function resize() {
    ratio = Math.min(2, window.devicePixelRatio || 1);
    width = root.clientWidth;
    height = root.clientHeight;
    if (!width || !height) return;
    for (const c of [points, over]) { c.width = Math.round(width * ratio); c.height = Math.round(height * ratio); }
    image = pg.createImageData(points.width, points.height);
    pixels = new Uint32Array(image.data.buffer);
    draw();
  }
  const X = (v) => PAD.left + ((v - view.x0) / (view.x1 - view.x0)) * (width - PAD.left - PAD.right);
  const Y = (v) => height - PAD.bottom - ((v - view.y0) / (view.y1 - view.y0)) * (height - PAD.top - PAD.bottom);
  const inX = (p) => view.x0 + ((p - PAD.left) / (width - PAD.left - PAD.right)) * (view.x1 - view.x0);
  const inY = (p) => view.y0 + ((height - PAD.bottom - p) / (height - PAD.top - PAD.bottom)) * (view.y1 - view.y0);

  // --- drawing
  let queued = false;
  function draw() {
    if (queued || !width) return;
    queued = true;
    requestAnimationFrame(() => { queued = false; drawPoints(); drawOver(); });
  }
  const radius = () => (F.n <= 4000 ? 3.1 : F.n <= 40000 ? 2.2 : 1.5) * Math.min(1.7, Math.pow((home.x1 - home.x0) / (view.x1 - view.x0), 0.22));
  /* A disc's coverage, 0…256, with soft edges. */
  function stamp(r) {
    const size = Math.ceil(r + 0.5), cells = [];
    for (let dy = -size; dy <= size; dy++) for (let dx = -size; dx <= size; dx++) {
      const c = Math.max(0, Math.min(1, r + 0.5 - Math.hypot(dx, dy)));
      if (c > 0.02) cells.push([dx, dy, c]);
    }
    return { size, cells };
  }
  function drawPoints() {
    const w = points.width, h = points.height, background = rgb("--plot");
    pixels.fill((255 << 24) | (background[2] << 16) | (background[1] << 8) | background[0]);
    const left = PAD.left * ratio, right = w - PAD.right * ratio, top = PAD.top * ratio, bottom = h - PAD.bottom * ratio;
    const kx = (right - left) / (view.x1 - view.x0), ky = (bottom - top) / (view.y1 - view.y0);
    const r = radius() * ratio, alpha = F.n <= 4000 ? 0.78 : F.n <= 40000 ? 0.6 : 0.42;
    gridLines(w, left, right, top, bottom);
    const stamps = [0, 1].map((b) => {
      const s = stamp(b ? r * 1.28 : r), n = s.cells.length;
      const shift = new Int32Array(n), cover = new Int32Array(n);
      s.cells.forEach(([dx, dy, c], k) => { shift[k] = dy * w + dx; cover[k] = Math.round(256 * c * (b ? 0.92 : alpha)); });
      return { size: s.size, shift, cover };
    });
    const hidden = groups.map((q) => off.has(q.name));
    for (let o = 0; o < F.n; o++) {
      const i = order[o];
      if (hidden[group[i]]) continue;
      const x = left + (px[i] - view.x0) * kx, y = bottom - (py[i] - view.y0) * ky;
      const s = stamps[big[i]];
      if (!(x > left - s.size && x < right + s.size && y > top - s.size && y < bottom + s.size)) continue;
      const cx = Math.round(x), cy = Math.round(y);
      if (cx < s.size || cy < s.size || cx >= w - s.size || cy >= h - s.size) continue;
      const at = cy * w + cx, c = 3 * code[i], R = lut[c], G = lut[c + 1], B = lut[c + 2];
      for (let k = 0; k < s.shift.length; k++) {
        const p = at + s.shift[k], a = s.cover[k], old = pixels[p], q = 256 - a;
        pixels[p] = 0xff000000 | ((((old >>> 16) & 255) * q + B * a) >> 8 << 16) | ((((old >>> 8) & 255) * q + G * a) >> 8 << 8) | (((old & 255) * q + R * a) >> 8);
      }
    }
    pg.putImageData(image, 0, 0);
  }

  /* Below the points, so that no line crosses one. */
  function gridLines(w, left, right, top, bottom) {
    const c = rgb("--grid"), ink = (255 << 24) | (c[2] << 16) | (c[1] << 8) | c[0];
    for (const v of ticks(view.x0, view.x1, room())) {
      const x = Math.floor(X(v) * ratio);
      if (x > left && x < right) for (let y = top; y < bottom; y++) pixels[Math.round(y) * w + x] = ink;
    }
    for (const v of ticks(view.y0, view.y1, room())) {
      const y = Math.floor(Y(v) * ratio);
      if (y > top && y < bottom) pixels.fill(ink, y * w + Math.round(left), y * w + Math.round(right));
    }
  }
  const room = () => (width < 460 ? 4 : 7);

  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const out = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) out.push(Math.abs(v) < step * 1e-6 ? 0 : v);
    return out;
  }
  function drawOver() {
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    const l = PAD.left, r = width - PAD.right, t = PAD.top, b = height - PAD.bottom;
    // What was drawn beyond the frame is covered, so that labels stay readable.
    g.fillStyle = colour("--plot");
    g.fillRect(0, 0, l, height); g.fillRect(r, 0, width - r, height); g.fillRect(0, 0, width, t); g.fillRect(0, b, width, height - b);
    g.font = `12px ${colour("--sans")}`;
    g.lineWidth = 1;
    for (const v of ticks(view.x0, view.x1, room())) {
      const p = Math.round(X(v)) + 0.5;
      g.fillStyle = colour("--soft"); g.textAlign = "center"; g.textBaseline = "top"; g.fillText(scale.label(v), p, b + 7);
    }
    for (const v of ticks(view.y0, view.y1, room())) {
      const p = Math.round(Y(v)) + 0.5;
      if (p < t || p > b) continue;
      g.fillStyle = colour("--soft"); g.textAlign = "right"; g.textBaseline = "middle"; g.fillText(scale.label(v), l - 8, p);
    }
    g.strokeStyle = colour("--line-strong"); line(l + 0.5, t, l + 0.5, b + 0.5); line(l, b + 0.5, r, b + 0.5);
    g.fillStyle = colour("--ink"); g.textAlign = "center"; g.textBaseline = "alphabetic";
    g.fillText(width < 460 ? "x = cos(D, F via D)" : "x = cos(D, F via D):  adding the model after the data", (l + r) / 2, height - 9);
    g.save(); g.translate(14, (t + b) / 2); g.rotate(-Math.PI / 2);
    g.fillText(height < 420 ? "y = cos(M, F via M)" : "y = cos(M, F via M):  adding the data after the model", 0, 0);
    g.restore();
    g.save(); g.beginPath(); g.rect(l, t, r - l, b - t); g.clip();
    drawCut();
    if (F.current !== null) mark(F.current, colour("--ink"), 8, 2);
    if (hover !== null && hover !== F.current) mark(hover, colour("--ink"), 6, 1.5);
    g.restore();
  }
  function line(x0, y0, x1, y1) { g.beginPath(); g.moveTo(x0, y0); g.lineTo(x1, y1); g.stroke(); }
  function mark(i, css, r, w) {
    g.strokeStyle = css; g.lineWidth = w; g.beginPath(); g.arc(X(px[i]), Y(py[i]), r, 0, 7); g.stroke(); g.lineWidth = 1;
  }
  /* The cut: a box (absolute), or the line x + y = edge (quantile), bent where the scale is. */
  function drawCut() {
    const edge = F.cut.kind === "absolute" ? F.cut.value : F.cut.score;
    if (edge === null || edge === undefined) return;
    g.strokeStyle = colour("--c-both"); g.setLineDash([6, 4]); g.lineWidth = 1.3; g.beginPath();
    if (F.cut.kind === "absolute") {
      const at = scale.map(edge);
      g.moveTo(X(view.x0), Y(at)); g.lineTo(X(at), Y(at)); g.lineTo(X(at), Y(view.y0));
    } else {
      let started = false;
      for (let k = 0; k <= 200; k++) {
        const v = view.x0 + ((view.x1 - view.x0) * k) / 200, c = edge - scale.back(v);
        if (c < -1 || c > 1) continue;
        const q = Y(scale.map(c));
        started ? g.lineTo(X(v), q) : g.moveTo(X(v), q);
        started = true;
      }
    }
    g.stroke(); g.setLineDash([]); g.lineWidth = 1;
  }

  // --- hover and click
  let hover = null;
  function nearest(mx, my, reach) {
    const ax = inX(mx), ay = inY(my), kx = (width - PAD.left - PAD.right) / (view.x1 - view.x0), ky = (height - PAD.top - PAD.bottom) / (view.y1 - view.y0);
    const hidden = groups.map((q) => off.has(q.name));
    let best = null, bestD = reach * reach;
    for (let i = 0; i < F.n; i++) {
      const dx = (px[i] - ax) * kx, dy = (py[i] - ay) * ky;
      const d = (dx * dx + dy * dy) * (big[i] ? 0.5 : 1); // of two equally near, the selected one
      if (d < bestD && !hidden[group[i]]) { bestD = d; best = i; }
    }
    return best;
  }
  function show(i) {
    hover = i;
    tip.hidden = i === null;
    if (i !== null) {
      const d = F.col.density_F_D || F.col["density_" + F.stages[F.stages.length - 1]];
      const fact = (k, v) => el("div", null, el("dt", null, k), el("dd", null, v));
      tip.replaceChildren(
        el("strong", null, `Feature ${i.toLocaleString("en")}`), F.selected(i) ? " · selected" : F.alive(i) ? "" : " · dead",
        el("dl", null, fact("x", fixed(F.col.x[i])), fact("y", fixed(F.col.y[i])), fact("x + y", fixed(F.score(i))), fact("S·D", fixed(F.col.cos_s_d[i])), fact("S·M", fixed(F.col.cos_s_m[i])), fact("F·F", fixed(F.col.cos_f_f[i])),
          fact("density", number(d[i], 3)), F.col.new_top ? fact("new top", fixed(F.col.new_top[i], 2)) : null));
      const x = X(px[i]), y = Y(py[i]), w = tip.offsetWidth, h = tip.offsetHeight;
      tip.style.left = Math.max(4, Math.min(width - w - 4, x + 14 + w > width ? x - w - 14 : x + 14)) + "px";
      tip.style.top = Math.max(4, Math.min(height - h - 4, y + 14 + h > height ? y - h - 14 : y + 14)) + "px";
    }
    over.style.cursor = i === null ? "grab" : "pointer";
    drawOver();
  }
  const local = (e) => { const b = over.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top]; };
  const fingers = new Map();
  let moved = 0, spread = 0;
  over.addEventListener("pointerdown", (e) => {
    over.setPointerCapture(e.pointerId);
    fingers.set(e.pointerId, local(e));
    moved = 0;
    spread = 0;
  });
  over.addEventListener("pointermove", (e) => {
    const p = local(e), before = fingers.get(e.pointerId);
    if (!before) return show(nearest(p[0], p[1], 14));
    const dx = p[0] - before[0], dy = p[1] - before[1];
    if (fingers.size === 1) {
      moved += Math.hypot(dx, dy);
      if (moved > 4) { pan(dx, dy); fingers.set(e.pointerId, p); tip.hidden = true; hover = null; }
      return;
    }
    fingers.set(e.pointerId, p);
    const [a, b] = [...fingers.values()], now = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (spread) zoom(spread / now, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    spread = now;
    moved = 99;
  });
  over.addEventListener("pointerup", (e) => {
    const p = local(e);
    fingers.delete(e.pointerId);
    if (moved > 4) return;
    const i = nearest(p[0], p[1], e.pointerType === "touch" ? 24 : 14);
    show(i);
    if (i !== null) F.open(i, "plot");
  });
  over.addEventListener("pointercancel", (e) => fingers.delete(e.pointerId));
  over.addEventListener("pointerleave", () => { if (!fingers.size) show(null); });
  over.addEventListener("dblclick", reset);
  over.addEventListener("wheel", (e) => {
    // The page keeps its wheel until the plot is in use: clicked, focused, or with Ctrl.
    if (!e.ctrlKey && !e.metaKey && document.activeElement !== over) return;
    e.preventDefault();
    zoom(Math.exp(Math.max(-60, Math.min(60, e.deltaY)) * 0.004), ...local(e));
  }, { passive: false });
  function pan(dx, dy) {
    const sx = ((view.x1 - view.x0) * dx) / (width - PAD.left - PAD.right), sy = ((view.y1 - view.y0) * dy) / (height - PAD.top - PAD.bottom);
    view = { x0: view.x0 - sx, x1: view.x1 - sx, y0: view.y0 + sy, y1: view.y1 + sy };
    draw();
  }
  function zoom(factor, mx = (PAD.left + width - PAD.right) / 2, my = (PAD.top + height - PAD.bottom) / 2) {
    const ax = inX(mx), ay = inY(my), span = (view.x1 - view.x0) * factor;
    if (span > 3 * (home.x1 - home.x0) || span < 1e-4 * (home.x1 - home.x0)) return;
    view = { x0: ax + (view.x0 - ax) * factor, x1: ax + (view.x1 - ax) * factor, y0: ay + (view.y0 - ay) * factor, y1: ay + (view.y1 - ay) * factor };
    tip.hidden = true;
    draw();
  }
  function reset() { view = { ...home }; draw(); }
  over.addEventListener("keydown", (e) => {
    const step = 40, keys = { ArrowLeft: () => pan(step, 0), ArrowRight: () => pan(-step, 0), ArrowUp: () => pan(0, step), ArrowDown: () => pan(0, -step), "+": () => zoom(0.8), "=": () => zoom(0.8), "-": () => zoom(1.25), 0: reset, n: () => F.step(1), p: () => F.step(-1) };
    if (keys[e.key] && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); keys[e.key](); }
  });
  document.getElementById("plot-in").addEventListener("click", () => zoom(0.7));
  document.getElementById("plot-out").addEventListener("click", () => zoom(1.43));
  document.getElementById("plot-reset").addEventListener("click", reset);
  modeSelect.addEventListener("change", paint);
  scaleSelect.addEventListener("change", () => { rescale(); draw(); });

  F.onOpen((i, by) => {
    const x = px[i], y = py[i];
    if (by !== "plot" && (x < view.x0 || x > view.x1 || y < view.y0 || y > view.y1)) view = { ...home };
    draw();
  });
  /* For tests and the console: where a feature is drawn, in pixels of the page. */
  S.plot = { at: (i) => { const b = over.getBoundingClientRect(); return [b.left + X(px[i]), b.top + Y(py[i])]; }, time: () => { const t = performance.now(); drawPoints(); drawOver(); return performance.now() - t; } };
  rescale();
  new ResizeObserver(resize).observe(root);
  S.onTheme(paint);
})();
