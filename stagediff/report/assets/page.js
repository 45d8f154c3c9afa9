"use strict";
/* What every section's script may use: its data, packed columns, number formats, DOM helpers, a sortable table, text with shaded tokens.
   Text from a corpus only ever enters the page through text nodes. */
window.stagediff = (() => {
  const cache = new Map();

  /* The data a section handed in, parsed once. */
  function data(name) {
    if (!cache.has(name)) {
      const element = document.getElementById("data-" + name);
      cache.set(name, element ? JSON.parse(element.textContent) : null);
    }
    return cache.get(name);
  }

  const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, float32: Float32Array };

  /* A typed array from what stagediff.packing wrote. */
  function column(packed) {
    if (!packed) return null;
    const text = atob(packed.b64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    if (TYPES[packed.as]) return new TYPES[packed.as](bytes.buffer);
    const codes = new Uint16Array(bytes.buffer);
    const out = new Float32Array(codes.length);
    const log = packed.as === "log";
    for (let i = 0; i < codes.length; i++) {
      const c = codes[i];
      if (c === 65535) out[i] = NaN;
      else if (log) out[i] = c === 0 ? 0 : Math.exp(packed.low + (packed.span * (c - 1)) / 65533);
      else out[i] = packed.low + (packed.span * c) / 65534;
    }
    return out;
  }

  function number(v, digits = 3) {
    if (v === null || v === undefined || Number.isNaN(v)) return "–";
    const a = Math.abs(v);
    if (a !== 0 && a < 1e-3) return v.toExponential(Math.max(0, digits - 1)).replace("e-", "e−");
    if (a >= 1000) return Math.round(v).toLocaleString("en");
    if (Number.isInteger(v)) return String(v);
    return v.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(a))));
  }
  const fixed = (v, places = 3) => (Number.isNaN(v) || v === null || v === undefined ? "–" : v.toFixed(places).replace("-", "−"));

  /* el("p", {class: "x", onclick: f}, "text", node, …): strings become text nodes. */
  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [k, v] of Object.entries(attributes || {})) {
      if (v === null || v === undefined || v === false) continue;
      if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
      else node.setAttribute(k, v === true ? "" : v);
    }
    node.append(...children.flat().filter((c) => c !== null && c !== undefined));
    return node;
  }

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [k, v] of Object.entries(attributes || {})) node.setAttribute(k, v);
    node.append(...children);
    return node;
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = [];
  /* Calls f now and again whenever the system's theme changes. */
  function onTheme(f) {
    themed.push(f);
    f();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => themed.forEach((f) => f()));

  const CONTROL = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/g;
  /* White space and control characters made visible. */
  function visible(token) {
    return token.replace(CONTROL, (c) => (c === "\n" ? "↵" : c === "\t" ? "⇥" : c === "\r" ? "␍" : "\u00b7"));
  }

  /* Tokens with their background shaded by activation (0…1); `peak` is the index of the strongest. */
  function tokens(texts, weights, peak) {
    const box = el("div", { class: "tokens", dir: "ltr" });
    texts.forEach((text, i) => {
      const span = el("span", null, visible(text));
      if (weights[i] > 0) {
        span.style.backgroundColor = `rgba(${colour("--shade")}, ${(0.1 + 0.62 * weights[i]).toFixed(3)})`;
        span.title = number(weights[i] * (tokens.scale || 1));
      } else if (!text.trim()) span.className = "ws";
      if (i === peak) span.classList.add("peak");
      box.append(span);
    });
    return box;
  }

  /* A table that is sorted by clicking its head and shows one page at a time.
     columns: [{name, title, hint, value(id) -> number | string, cell(id) -> Node | string, numeric}]; the first column's cell opens the row. */
  function grid({ mount, columns, sort, descending = false, pageSize = 25, label, open }) {
    let ids = [], page = 0, current = null;
    let by = columns.find((c) => c.name === sort);
    const heads = columns.map((c) => el("th", { scope: "col", class: c.numeric ? "n" : null }, c.value ? el("button", { type: "button", title: c.hint, onclick: () => order(c) }, c.title) : el("button", { type: "button", disabled: true, title: c.hint }, c.title)));
    const body = el("tbody");
    const box = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, el("table", { class: "grid" }, el("thead", null, el("tr", null, heads)), body));
    const where = el("span", { role: "status" });
    const back = el("button", { type: "button", class: "button", onclick: () => turn(-1) }, "← Previous");
    const next = el("button", { type: "button", class: "button", onclick: () => turn(1) }, "Next →");
    mount.replaceChildren(box, el("div", { class: "bar pager" }, back, next, where));

    function order(c) {
      if (by === c) descending = !descending;
      else [by, descending] = [c, false];
      arrange();
    }
    function arrange() {
      const keys = new Map(ids.map((id) => [id, by.value(id)]));
      const sign = descending ? -1 : 1;
      ids.sort((a, b) => {
        const p = keys.get(a), q = keys.get(b);
        if (typeof p === "string") return sign * p.localeCompare(q) || a - b;
        const noP = Number.isNaN(p), noQ = Number.isNaN(q);
        if (noP || noQ) return noP - noQ || a - b; // what has no value comes last either way
        return sign * (p - q) || a - b;
      });
      heads.forEach((h, i) => (columns[i] === by ? h.setAttribute("aria-sort", descending ? "descending" : "ascending") : h.removeAttribute("aria-sort")));
      page = 0;
      draw();
    }
    function turn(step) {
      page += step;
      draw();
    }
    function draw() {
      const shown = ids.slice(page * pageSize, (page + 1) * pageSize);
      body.replaceChildren(
        ...shown.map((id) => {
          const cells = columns.map((c, i) => {
            const inner = i === 0 ? el("button", { type: "button", class: "link" }, c.cell(id)) : c.cell(id);
            return el("td", { class: c.numeric ? "n" : null }, inner);
          });
          return el("tr", { "data-id": id, "aria-current": id === current ? "true" : null, onclick: () => open(id) }, cells);
        }),
      );
      if (!ids.length) body.append(el("tr", null, el("td", { colspan: columns.length, class: "muted" }, "Nothing passes the filter.")));
      back.disabled = page === 0;
      next.disabled = (page + 1) * pageSize >= ids.length;
      where.textContent = ids.length ? `${(page * pageSize + 1).toLocaleString("en")}–${Math.min(ids.length, (page + 1) * pageSize).toLocaleString("en")} of ${ids.length.toLocaleString("en")}` : "0 rows";
    }
    return {
      rows(list) {
        ids = Array.from(list);
        arrange();
      },
      mark(id) {
        current = id;
        body.querySelectorAll("tr").forEach((r) => (Number(r.dataset.id) === id ? r.setAttribute("aria-current", "true") : r.removeAttribute("aria-current")));
      },
      order: () => ids.slice(),
    };
  }

  return { data, column, number, fixed, el, svg, colour, onTheme, visible, tokens, grid };
})();
