"use strict";
const { facts, landscapes } = JSON.parse(document.getElementById("data").textContent);
const both = facts.against !== null, WHEN = both ? ["before", "after"] : ["after"];
const SITES = { h: "residual stream", attn_in: "input of q, k, v", k: "K cache", v: "V cache", o_in: "input of o",
  mlp_in: "input of gate, up", down_in: "input of down" };
const METRICS = {
  peak_to_rms: ["peak / RMS", "Largest |x| of a token over its RMS. 1 is flat, about 3 is Gaussian, √d is one spike.", false],
  gsr: ["GSR", "Quantizer step over standard deviation of a token: rounding costs (Δ/σ)²/12 of its energy.", false],
  kurtosis: ["kurtosis", "Mean fourth power over squared variance within a token: 1.8 uniform, 3 Gaussian.", false],
  difficulty: ["difficulty", "Spread of the channels' norms, as a share of their RMS: 0 when all channels are equal.", false],
  common: ["common", "Share of the energy that the mean over tokens holds: what a shift takes off before rounding.", false],
  qsur: ["QSUR", "Volume of the data in the quantizer's cube, per dimension, 1 for a ball: how much of the range is used.", true],
  snr: ["SNR dB", "Energy over quantization error, every token counting the same, in decibels.", true],
};
const name = path => path.replace(/\/+$/, "").split("/").pop();
const esc = text => String(text).replace(/[&<>"]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const $ = id => document.getElementById(id);
const mean = values => { const k = values.filter(v => v !== null); return k.length ? k.reduce((a, b) => a + b) / k.length : null; };
const of = (site, when, metric) => facts.sites.filter(s => s.site === site).map(s => s[when] && s[when][metric]);
const number = v => v === null || v === undefined ? "–" : Number.isInteger(v) ? String(v)
  : Math.abs(v) >= 100 ? v.toFixed(0) : Math.abs(v) >= 10 ? v.toFixed(1) : Math.abs(v) >= 0.1 ? v.toFixed(2) : v.toFixed(3);

function choice(id, options, chosen, pick) {
  const place = $(id), buttons = {};
  for (const [key, text] of Object.entries(options)) {
    const b = buttons[key] = document.createElement("button");
    b.type = "button"; b.textContent = text; place.append(b);
    b.onclick = () => { for (const k in buttons) buttons[k].ariaPressed = String(k === key); pick(key); };
  }
  buttons[chosen].ariaPressed = "true";
}

// ---- head and tiles ---------------------------------------------------------------------------------

function head() {
  $("title").innerHTML = both
    ? `<span class="from">${esc(name(facts.against))}</span> <span class="arrow">→</span> <span class="to">${esc(name(facts.model))}</span>`
    : esc(name(facts.model));
  const quantizers = {};
  for (const s of facts.sites) if (s.format.bits < 16) {
    const f = s.format, kind = `int${f.bits} ${f.symmetric ? "symmetric" : "asymmetric"}`;
    const one = quantizers[kind] ??= { sites: new Set(), clips: [] };
    one.sites.add(s.site);
    one.clips.push(+f.clip.toPrecision(4));
  }
  const range = clips => [...new Set([Math.min(...clips), Math.max(...clips)])].join(" to ");
  $("run").textContent = `${facts.tokens} tokens of ${facts.text} in ${facts.windows} windows of ${facts.seq_len}. `
    + Object.entries(quantizers)
      .map(([kind, one]) => `${[...one.sites].join(", ")}: ${kind}, clip ${range(one.clips)}`).join("; ") + ".";
  const linear = ["attn_in", "o_in", "mlp_in", "down_in"];
  const over = (sites, metric) => WHEN.map(when => mean(sites.flatMap(s => of(s, when, metric))));
  const largest = WHEN.map(when => Math.max(...facts.sites.filter(s => s.site === "h").map(s => s[when].massive.largest)));
  tile("activation SNR", over(linear, "snr"), "dB", "inputs of all linears");
  tile("KV cache SNR", over(["k", "v"], "snr"), "dB", "K and V, per head");
  tile("weight SNR", WHEN.map(when => mean(facts.linears.map(l => l[when]))), "dB", "rounding noise of the grid");
  tile("peak / RMS", over(linear, "peak_to_rms"), "", "of a token, inputs of all linears");
  tile("largest activation", largest, "", "|x| in the residual stream");
}

function tile(title, values, unit, note) {
  const was = both ? `<span class="was">${number(values[0])}</span> <span class="unit">→</span> ` : "";
  $("tiles").insertAdjacentHTML("beforeend", `<div class="tile"><div class="name">${title}</div><div class="value">${was}`
    + `<span class="now">${number(values.at(-1))}</span> <span class="unit">${unit}</span></div><div class="note">${note}</div></div>`);
}

// ---- curves over layers -----------------------------------------------------------------------------

function setUpCurves() {
  if (both) $("legend").innerHTML = WHEN.map(w => `<span><i style="background:var(--${w})"></i>${w}</span>`).join("");
  choice("curve-metrics", Object.fromEntries(Object.entries(METRICS).map(([k, m]) => [k, m[0]])), "peak_to_rms", curves);
  curves("peak_to_rms");
}

function curves(metric) {
  $("curve-meaning").textContent = METRICS[metric][1] + (METRICS[metric][2] ? " Higher is better." : " Lower is better.");
  $("curves").innerHTML = Object.keys(SITES).map(site => {
    const series = Object.fromEntries(WHEN.map(when => [when, of(site, when, metric)]));
    if (Object.values(series).every(v => v.every(x => x === null))) return "";
    return `<div class="small"><h3>${site} <span class="what">${SITES[site]}</span></h3>${chart(series, metric === "kurtosis", metric === "snr")}</div>`;
  }).join("");
}

function chart(series, log, free, width = 300, height = 150) {
  const values = Object.values(series).flat().filter(v => v !== null), f = log ? Math.log10 : v => v;
  let low = log ? f(Math.min(...values)) - 0.08 : free ? Math.floor(Math.min(...values)) - 1 : 0, high = f(Math.max(...values));
  high += (high - low) * 0.08 || 1;
  const count = Object.values(series)[0].length;
  const x = i => 36 + (width - 46) * (count > 1 ? i / (count - 1) : 0.5), y = v => height - 22 - (height - 32) * (f(v) - low) / (high - low);
  const ticks = log ? logTicks(low, high) : linearTicks(low, high, 4);
  let out = ticks.map(t => `<line class="grid" x1="36" x2="${width - 8}" y1="${y(t)}" y2="${y(t)}"/><text x="30" y="${y(t) + 4}" text-anchor="end">${+t.toPrecision(3)}</text>`).join("");
  const every = Math.max(1, Math.ceil(count / 8));
  for (let i = 0; i < count; i += every) out += `<text x="${x(i)}" y="${height - 6}" text-anchor="middle">${i}</text>`;
  for (const [when, list] of Object.entries(series)) {
    const c = when[0], points = list.map((v, i) => v === null ? null : [x(i), y(v), v, i]).filter(Boolean);
    out += `<polyline class="${c}" stroke-width="2.2" stroke-linejoin="round" points="${points.map(p => `${p[0]},${p[1]}`).join(" ")}"/>`;
    out += points.map(p => `<circle class="${c}f" cx="${p[0]}" cy="${p[1]}" r="${count > 40 ? 1.8 : 3}"><title>layer ${p[3]}, ${both ? when + ": " : ""}${number(p[2])}</title></circle>`).join("");
  }
  return `<svg viewBox="0 0 ${width} ${height}">${out}</svg>`;
}

function linearTicks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough), out = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high; t += step) out.push(t);
  return out;
}

function logTicks(low, high) {
  const out = [];
  for (let p = Math.floor(low); p <= high; p++) for (const m of high - low < 1.5 ? [1, 2, 5] : [1]) {
    const at = p + Math.log10(m);
    if (at >= low && at <= high) out.push(m * 10 ** p);
  }
  return out;
}

// ---- dumbbells --------------------------------------------------------------------------------------

function dumbbells(id, rows) {
  rows = rows.filter(r => WHEN.some(w => r[w].some(v => v !== null)));
  const width = 560, step = 44, height = rows.length * step + 26, start = 100;
  const values = rows.flatMap(r => WHEN.flatMap(w => r[w])).filter(v => v !== null);
  const low = Math.floor(Math.min(...values)) - 1, high = Math.max(...values) + 1;
  const x = v => start + (width - start - 14) * (v - low) / (high - low);
  let out = linearTicks(low, high, 5).map(t => `<line class="grid" x1="${x(t)}" x2="${x(t)}" y1="4" y2="${height - 20}"/><text x="${x(t)}" y="${height - 4}" text-anchor="middle">${+t.toPrecision(3)}</text>`).join("");
  rows.forEach((row, i) => {
    const y = 26 + i * step, m = Object.fromEntries(WHEN.map(w => [w, mean(row[w])]));
    out += `<text class="strong" x="${start - 16}" y="${y + 4}" text-anchor="end">${row.name}</text>`;
    if (both && m.before !== null && m.after !== null)
      out += `<line class="axis" x1="${x(m.before)}" x2="${x(m.after)}" y1="${y}" y2="${y}" stroke-width="5" stroke-linecap="round"/>`;
    for (const w of WHEN) {
      out += row[w].map((v, layer) => v === null ? "" : `<circle class="${w[0]}f faint" cx="${x(v)}" cy="${y}" r="3.2"><title>layer ${layer}: ${number(v)} dB</title></circle>`).join("");
      if (m[w] === null) continue;
      const other = m[w === "after" ? "before" : "after"] ?? null, gap = other === null ? 99 : x(m[w]) - x(other);
      const beside = Math.abs(gap) > 28 ? "middle" : gap > 0 ? "start" : "end";
      out += `<circle class="${w[0]}f" cx="${x(m[w])}" cy="${y}" r="6.5"/><text class="${w[0]}f" x="${x(m[w])}" y="${y - 11}" text-anchor="${beside}">${m[w].toFixed(1)}</text>`;
    }
  });
  $(id).innerHTML = `<svg viewBox="0 0 ${width} ${height}">${out}</svg>`;
}

function signalToNoise() {
  dumbbells("snr", Object.keys(SITES).map(site => ({ name: site, ...Object.fromEntries(WHEN.map(w => [w, of(site, w, "snr")])) })));
  const linears = [...new Set(facts.linears.map(l => l.name))];
  dumbbells("weights", linears.map(l => ({ name: l.split(".").pop(), ...Object.fromEntries(WHEN.map(w => [w, facts.linears.filter(r => r.name === l).map(r => r[w])])) })));
}

// ---- massive tokens, table, meanings ----------------------------------------------------------------

// Neighbouring layers whose massive tokens are the same, together: the stream carries them on.
function runs(sites, when) {
  const same = (a, b) => ["count", "position", "channel"].every(k => a[when].massive[k] === b[when].massive[k])
    && number(a[when].massive.largest) === number(b[when].massive.largest) && b.layer === a.layer + 1;
  const out = [];
  for (const site of sites) {
    if (out.length && same(out.at(-1).last, site)) out.at(-1).last = site; else out.push({ first: site, last: site });
  }
  return out;
}

function massive() {
  const stream = facts.sites.filter(s => s.site === "h");
  const series = Object.fromEntries(WHEN.map(w => [w, stream.map(s => s[w].massive.largest)]));
  $("massive-chart").innerHTML = `<div class="small"><h3>largest |x| <span class="what">entering each layer</span></h3>${chart(series, true, false, 460, 190)}</div>`;
  const rows = WHEN.flatMap(w => runs(stream.filter(s => s[w].massive.count), w).slice(0, 40).map(({ first, last }, i) => {
    const m = first[w].massive, text = facts.token_texts[m.token] ?? "";
    const layers = first === last ? first.layer : `${first.layer}–${last.layer}`;
    return `<tr class="${i ? "" : "first"}"><td class="l ${w}">${both && !i ? w : ""}</td><td>${layers}</td><td>${m.count}</td>`
      + `<td class="l">${m.positions.slice(0, 2).map(p => `${p[0]} (${p[1]}×)`).join(", ")}${m.positions.length > 2 ? " …" : ""}</td>`
      + `<td>${number(m.largest)}</td><td>${number(m.largest / m.median)}×</td><td class="l">${esc(text).replace(/Ġ/g, "␣")} · ch ${m.channel}</td></tr>`;
  })).join("");
  $("massive-list").innerHTML = rows
    ? `<div class="scroll"><table><tr><th></th><th>layer</th><th>tokens</th><th class="l">at position</th><th>largest |x|</th><th>over median</th><th class="l">which</th></tr>${rows}</table></div>`
    : "<p>None in the residual stream of these tokens.</p>";
}

function table() {
  let last = null;
  const cell = (s, metric, better) => {
    const b = s.before && s.before[metric], a = s.after[metric];
    if (!both || b === null) return `<td>${number(a)}</td>`;
    const clear = a !== null && Math.abs(a - b) > 0.02 * Math.abs(b), kind = clear ? ((a > b) === better ? "good" : "bad") : "";
    return `<td><span class="was">${number(b)} →</span> <span class="${kind}">${number(a)}</span></td>`;
  };
  const rows = facts.sites.map(s => {
    const first = s.layer !== last; last = s.layer;
    return `<tr class="${first ? "first" : ""}"><td class="l">${first ? s.layer : ""}</td><td class="l">${s.site}</td>`
      + Object.entries(METRICS).map(([k, m]) => cell(s, k, m[2])).join("") + "</tr>";
  });
  $("table").innerHTML = `<table><tr><th class="l">layer</th><th class="l">site</th>${Object.values(METRICS).map(m => `<th>${m[0]}</th>`).join("")}</tr>${rows.join("")}</table>`;
  $("meanings").innerHTML = Object.values(METRICS).map(m => `<dt>${m[0]}</dt><dd>${m[1]} ${m[2] ? "Higher" : "Lower"} is better.</dd>`).join("")
    + "<dt>massive tokens</dt><dd>Tokens whose largest |x| is over 10 times that of the median token of the site.</dd>"
    + "<dt>sites</dt><dd>Inputs of the linears as they are quantized, after their online transform; K after RoPE and R3. "
    + "A full-precision model is measured as if it were quantized in the other model's format. The residual stream is not quantized.</dd>";
}

function setTheme(dark) { document.documentElement.dataset.theme = dark ? "dark" : "light"; }
function start() {
  setTheme(location.hash === "#dark" || (location.hash !== "#light" && matchMedia("(prefers-color-scheme: dark)").matches));
  for (const e of document.querySelectorAll(".two")) e.hidden = !both;
  $("theme").onclick = () => { setTheme(theme() !== "dark"); show(); };
  head(); setUpLandscapes(); setUpCurves(); signalToNoise(); massive(); table();
}
