"use strict";
/* Small canvas charts: axes, lines with bands, stacked areas, bars, points; hovered by pointer or arrow keys. A chart is asked for its content anew at
   every drawing (`build`), so that themes, sizes and switches need nothing else. */
stagediff.charts = (() => {
  const { el, colour, number } = stagediff;
  const FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', 'DejaVu Sans', sans-serif";
  const all = [];
  const known = (v) => v !== null && v !== undefined && !Number.isNaN(v);
  const css = (name) => (name.startsWith("--") ? colour(name) : name);

  /* About n round values between low and high. */
  function ticks(low, high, n) {
    const rough = (high - low) / Math.max(n, 1);
    if (!(rough > 0)) return [low];
    const power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
    return found;
  }
  function decades(low, high) {
    const found = [];
    for (let k = Math.ceil(Math.log10(low) - 1e-9); 10 ** k <= high * 1.0001; k++) found.push(10 ** k);
    return found;
  }
  /* A range that holds the values, with some air; `zero` keeps 0 in it. */
  function range(values, { zero = false, air = 0.06, low = null, high = null } = {}) {
    const some = values.filter(known);
    let a = some.length ? Math.min(...some) : 0, b = some.length ? Math.max(...some) : 1;
    if (zero) [a, b] = [Math.min(a, 0), Math.max(b, 0)];
    const span = b - a || Math.abs(b) || 1;
    return [low ?? (zero && a === 0 ? 0 : a - air * span), high ?? b + air * span];
  }

  /* What can be drawn. xs are positions on the x axis, ys values; null and NaN leave a gap. */
  const layers = {
    line: (xs, ys, c, { width = 2, dash = [], dots = 0, alpha = 1 } = {}) => (g, X, Y) => {
      g.strokeStyle = g.fillStyle = css(c); g.lineWidth = width; g.setLineDash(dash); g.globalAlpha = alpha; g.lineJoin = "round"; g.beginPath();
      let open = false;
      xs.forEach((x, i) => { if (known(ys[i])) { open ? g.lineTo(X(x), Y(ys[i])) : g.moveTo(X(x), Y(ys[i])); open = true; } else open = false; });
      g.stroke(); g.setLineDash([]);
      if (dots) xs.forEach((x, i) => { if (known(ys[i])) { g.beginPath(); g.arc(X(x), Y(ys[i]), dots, 0, 7); g.fill(); } });
      g.globalAlpha = 1;
    },
    band: (xs, low, high, c, alpha = 0.18) => (g, X, Y) => {
      g.fillStyle = css(c); g.globalAlpha = alpha;
      for (let i = 0; i < xs.length; ) {
        if (!known(low[i]) || !known(high[i])) { i++; continue; }
        let j = i;
        while (j + 1 < xs.length && known(low[j + 1]) && known(high[j + 1])) j++;
        g.beginPath();
        for (let k = i; k <= j; k++) g.lineTo(X(xs[k]), Y(high[k]));
        for (let k = j; k >= i; k--) g.lineTo(X(xs[k]), Y(low[k]));
        if (i === j) g.fillRect(X(xs[i]) - 3, Y(high[i]), 6, Y(low[i]) - Y(high[i]));
        g.fill();
        i = j + 1;
      }
      g.globalAlpha = 1;
    },
    bar: (x0, x1, y0, y1, c, alpha = 1) => (g, X, Y) => {
      g.fillStyle = css(c); g.globalAlpha = alpha;
      g.fillRect(X(x0), Math.min(Y(y0), Y(y1)), Math.max(1, X(x1) - X(x0)), Math.abs(Y(y0) - Y(y1)));
      g.globalAlpha = 1;
    },
    points: (xs, ys, c, radius = 3, alpha = 0.85) => (g, X, Y) => {
      g.globalAlpha = alpha;
      xs.forEach((x, i) => { if (known(x) && known(ys[i])) { g.fillStyle = css(typeof c === "function" ? c(i) : c); g.beginPath(); g.arc(X(x), Y(ys[i]), radius, 0, 7); g.fill(); } });
      g.globalAlpha = 1;
    },
    /* An interval: a line from low to high, a dot at the value. */
    whisker: (x, value, low, high, c) => (g, X, Y) => {
      g.strokeStyle = g.fillStyle = css(c); g.lineWidth = 2;
      if (known(low) && known(high)) { g.beginPath(); g.moveTo(X(x), Y(low)); g.lineTo(X(x), Y(high)); g.stroke(); }
      if (known(value)) { g.beginPath(); g.arc(X(x), Y(value), 4.5, 0, 7); g.fill(); }
    },
    level: (y, c, text, dash = [5, 4]) => (g, X, Y, box) => {
      if (!known(y)) return;
      g.strokeStyle = css(c); g.lineWidth = 1.3; g.setLineDash(dash); g.beginPath(); g.moveTo(box.left, Y(y)); g.lineTo(box.right, Y(y)); g.stroke(); g.setLineDash([]);
      if (!text) return;
      const wide = g.measureText(text).width;
      g.globalAlpha = 0.78; g.fillStyle = css("--plot"); g.fillRect(box.right - wide - 7, Y(y) - 17, wide + 5, 15); g.globalAlpha = 1;
      g.fillStyle = css(c); g.textAlign = "right"; g.textBaseline = "bottom"; g.fillText(text, box.right - 4, Y(y) - 3);
    },
    /* A moment with its interval; the text stands at the top. */
    moment: (x, low, high, c, text) => (g, X, Y, box) => {
      g.fillStyle = g.strokeStyle = css(c);
      if (known(low) && known(high) && high > low) { g.globalAlpha = 0.1; g.fillRect(X(low), box.top, X(high) - X(low), box.bottom - box.top); g.globalAlpha = 1; }
      g.lineWidth = 1.4; g.setLineDash([6, 4]); g.beginPath(); g.moveTo(X(x), box.top); g.lineTo(X(x), box.bottom); g.stroke(); g.setLineDash([]);
      if (!text) return;
      const width = g.measureText(text).width, right = X(x) + width + 8 > box.right, at = right ? X(x) - 5 - width : X(x) + 5;
      g.globalAlpha = 0.78; g.fillStyle = css("--plot"); g.fillRect(at - 2, box.top + 3, width + 4, 16); g.globalAlpha = 1;
      g.fillStyle = css(c); g.textAlign = "left"; g.textBaseline = "top"; g.fillText(text, at, box.top + 5);
    },
  };

  /* mount: an empty element. build() -> {x: {low, high, ticks: [[position, label]], title}, y: {low, high, title, log, format}, draw: [layer], hover: [positions] or
     null, tip(k) -> {title, rows: [[colour or null, name, value]]}, points: [[x, y]] (hover takes the nearest), pick(k)}. */
  function chart(mount, { height = 250, label, build }) {
    const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": label }), tip = el("div", { class: "chart-tip", role: "status", hidden: true });
    mount.classList.add("chart");
    mount.replaceChildren(canvas, tip);
    mount.style.height = height + "px";
    const g = canvas.getContext("2d");
    let width = 0, spec = null, box = null, X = null, Y = null, hovered = null, queued = false;

    function layout() {
      g.font = FONT;
      const { y, x } = spec, log = y.log;
      const labels = y.none ? [] : y.ticks || (log ? decades(y.low, y.high) : ticks(y.low, y.high, Math.max(2, height / 44))).map((v) => [v, (y.format || plain)(v)]);
      const wide = Math.max(0, ...labels.map(([, t]) => g.measureText(t).width));
      box = { left: (y.none ? 8 : wide + 12) + (y.title ? 18 : 0), right: width - (y.right ?? 12), top: 10, bottom: height - (x.none ? 8 : x.title ? 42 : 24) };
      const kx = (box.right - box.left) / (x.high - x.low || 1), f = log ? Math.log : (v) => v;
      const a = f(y.low), ky = (box.bottom - box.top) / (f(y.high) - a || 1);
      X = (v) => box.left + (v - x.low) * kx;
      Y = (v) => box.bottom - (f(log ? Math.max(v, y.low) : v) - a) * ky;
      return labels;
    }
    const plain = (v) => (v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5) ? v.toExponential(0).replace("e-", "e−").replace("e+", "e") : String(Number(v.toPrecision(4))).replace("-", "−"));
    function draw() {
      const ratio = Math.min(2, window.devicePixelRatio || 1);
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) { canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); }
      g.setTransform(ratio, 0, 0, ratio, 0, 0);
      g.clearRect(0, 0, width, height);
      spec = build();
      if (!spec) return;
      const labels = layout();
      g.lineWidth = 1;
      for (const [v, text] of labels) {
        const p = Math.round(Y(v)) + 0.5;
        if (p < box.top - 1 || p > box.bottom + 1) continue;
        g.strokeStyle = colour("--grid"); g.beginPath(); g.moveTo(box.left, p); g.lineTo(box.right, p); g.stroke();
        g.fillStyle = colour("--soft"); g.textAlign = "right"; g.textBaseline = "middle"; g.fillText(text, box.left - 7, p);
      }
      if (!spec.x.none) drawX();
      g.save(); g.beginPath(); g.rect(box.left, box.top - 4, box.right - box.left, box.bottom - box.top + 4); g.clip();
      for (const layer of spec.draw) layer(g, X, Y, box);
      g.restore();
      if (!spec.x.none) { g.strokeStyle = colour("--line-strong"); g.lineWidth = 1; g.beginPath(); g.moveTo(box.left, box.bottom + 0.5); g.lineTo(box.right, box.bottom + 0.5); g.stroke(); }
      if (spec.y.title) {
        g.save(); g.translate(12, (box.top + box.bottom) / 2); g.rotate(-Math.PI / 2); g.fillStyle = colour("--ink"); g.textAlign = "center"; g.textBaseline = "middle";
        g.fillText(spec.y.title, 0, 0); g.restore();
      }
      if (hovered !== null) drawHover();
    }
    function drawX() {
      let last = -Infinity;
      g.textBaseline = "top"; g.textAlign = "center";
      for (const [v, text] of spec.x.ticks) {
        const p = X(v), half = g.measureText(text).width / 2;
        if (p < box.left - 1 || p > box.right + 1) continue;
        g.strokeStyle = colour("--line-strong"); g.beginPath(); g.moveTo(p, box.bottom); g.lineTo(p, box.bottom + 4); g.stroke();
        const at = Math.min(p, width - half - 1);
        if (at - half < last + 7) continue;
        g.fillStyle = colour("--soft"); g.fillText(text, at, box.bottom + 7);
        last = at + half;
      }
      if (spec.x.title) { g.fillStyle = colour("--ink"); g.textBaseline = "alphabetic"; g.fillText(spec.x.title, (box.left + box.right) / 2, height - 5); }
    }
    function drawHover() {
      g.strokeStyle = colour("--soft"); g.lineWidth = 1;
      if (spec.points) {
        const p = spec.points[hovered];
        if (p) { g.strokeStyle = colour("--ink"); g.lineWidth = 2; g.beginPath(); g.arc(X(p[0]), Y(p[1]), 6, 0, 7); g.stroke(); }
      } else { const p = Math.round(X(spec.hover[hovered])) + 0.5; g.beginPath(); g.moveTo(p, box.top); g.lineTo(p, box.bottom); g.stroke(); }
    }
    function nearest(mx, my) {
      if (!spec) return null;
      if (spec.points) {
        let best = null, most = 16 * 16;
        spec.points.forEach((p, i) => { if (!p || !known(p[0]) || !known(p[1])) return; const d = (X(p[0]) - mx) ** 2 + (Y(p[1]) - my) ** 2; if (d < most) { most = d; best = i; } });
        return best;
      }
      if (!spec.hover || !spec.hover.length || mx < box.left - 12 || mx > box.right + 12) return null;
      let best = null, most = Infinity;
      spec.hover.forEach((x, i) => { if (!known(x)) return; const d = Math.abs(X(x) - mx); if (d < most) { most = d; best = i; } });
      return best;
    }
    function hover(k) {
      hovered = k;
      draw();
      const said = k === null || !spec || !spec.tip ? null : spec.tip(k);
      tip.hidden = !said;
      canvas.style.cursor = k !== null && spec && spec.pick ? "pointer" : "default";
      if (!said) return;
      const row = ([c, name, value]) => { const mark = el("i"); if (c) mark.style.background = css(c); return el("div", null, el("dt", null, c ? mark : null, name), el("dd", null, value)); };
      tip.replaceChildren(el("strong", null, said.title), said.node || "", el("dl", null, (said.rows || []).map(row)));
      const px = spec.points ? X(spec.points[k][0]) : X(spec.hover[k]), py = spec.points ? Y(spec.points[k][1]) : box.top + 8, w = tip.offsetWidth, h = tip.offsetHeight;
      tip.style.left = Math.max(2, px + 14 + w > width ? px - w - 14 : px + 14) + "px";
      tip.style.top = Math.max(2, Math.min(py, height - h - 2)) + "px";
    }
    const place = (e) => { const b = canvas.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top]; };
    canvas.addEventListener("pointermove", (e) => { const k = nearest(...place(e)); if (k !== hovered) hover(k); });
    canvas.addEventListener("pointerleave", () => hover(null));
    canvas.addEventListener("blur", () => hover(null));
    canvas.addEventListener("click", (e) => { const k = nearest(...place(e)); if (k !== null) { hover(k); if (spec.pick) spec.pick(k); } });
    canvas.addEventListener("keydown", (e) => {
      const n = spec && (spec.points || spec.hover || []).length, step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (!n) return;
      if (step) { e.preventDefault(); hover(hovered === null ? (step > 0 ? 0 : n - 1) : Math.max(0, Math.min(n - 1, hovered + step))); }
      if (e.key === "Enter" && hovered !== null && spec.pick) spec.pick(hovered);
      if (e.key === "Escape") hover(null);
    });
    function redraw() {
      if (queued || !mount.isConnected) return;
      queued = true;
      requestAnimationFrame(() => { queued = false; width = mount.clientWidth; if (width > 20) draw(); });
    }
    const observer = new ResizeObserver(redraw);
    observer.observe(mount);
    const handle = { redraw, mount, at: (k) => { const b = canvas.getBoundingClientRect(); return spec.points ? [b.left + X(spec.points[k][0]), b.top + Y(spec.points[k][1])] : [b.left + X(spec.hover[k]), b.top + (box.top + box.bottom) / 2]; } };
    all.push(handle);
    redraw();
    return handle;
  }
  /* A row of names with their colours; where `toggle` is given each switches something. */
  function legend(mount, items, toggle = null, off = new Set()) {
    const mark = (item) => { const i = el("i", { class: item.line ? "stroke" : null }); if (item.line) { i.style.borderTopColor = css(item.colour); i.style.borderTopStyle = item.dash ? "dashed" : "solid"; } else i.style.background = css(item.colour); return i; };
    mount.classList.add("bar", "chart-legend");
    const show = () => mount.replaceChildren(...items.map((item) => toggle
      ? el("button", { type: "button", class: "key", "aria-pressed": off.has(item.name) ? "false" : "true", onclick: () => { off.has(item.name) ? off.delete(item.name) : off.add(item.name); show(); toggle(); } }, mark(item), item.title)
      : el("span", { class: "key still", title: item.hint }, mark(item), item.title)));
    stagediff.onTheme(show);
  }
  stagediff.onTheme(() => all.forEach((c) => c.redraw()));
  /* Forgets charts whose elements left the page. */
  function prune() { for (let i = all.length - 1; i >= 0; i--) if (!all[i].mount.isConnected) all.splice(i, 1); }
  return { chart, legend, layers, ticks, decades, range, known, prune, redraw: () => { prune(); all.forEach((c) => c.redraw()); }, number };
})();
