// Channel magnitudes as a surface or a heat map, on canvases that share one scale. Uses the helpers of report.js.

const RAMPS = {
  light: ["#dbe7f0", "#a3cbe2", "#5f97cd", "#5b5fb4", "#9a3a9a", "#d8345f", "#f3722c", "#f9c22e"],
  dark: ["#16263b", "#1d4a73", "#2f7cb8", "#6a74d8", "#b455c4", "#f04a78", "#ff8a4c", "#ffe08a"],
};
const theme = () => document.documentElement.dataset.theme;
const css = v => getComputedStyle(document.documentElement).getPropertyValue(v).trim();

function ramp() {
  const stops = RAMPS[theme()].map(h => [1, 3, 5].map(i => parseInt(h.slice(i, i + 2), 16))), table = [];
  for (let i = 0; i < 256; i++) {
    const at = i / 255 * (stops.length - 1), low = Math.min(stops.length - 2, Math.floor(at)), t = at - low;
    table.push(stops[low].map((c, k) => c + (stops[low + 1][k] - c) * t));
  }
  return table;
}

function decode(entry) {
  const raw = atob(entry.data), values = new Float32Array(raw.length);
  for (let i = 0; i < raw.length; i++) values[i] = entry.peak * (raw.charCodeAt(i) / 255) ** 2;
  return { ...entry, values };
}

const view = { site: "attn_in", layer: 0, kind: "surface", turn: -0.52, tilt: 0.56 };
const layers = [...new Set(Object.keys(landscapes).map(k => Number(k.split("/")[1])))].sort((a, b) => a - b);
let panels = [];

function setUpLandscapes() {
  choice("landscape-sites", Object.fromEntries(Object.keys(SITES).map(s => [s, s])), view.site, s => { view.site = s; show(); });
  choice("landscape-views", { surface: "surface", map: "heat map" }, view.kind, k => { view.kind = k; show(); });
  const slider = $("landscape-layer");
  slider.max = layers.length - 1;
  slider.value = Math.floor(layers.length / 2);
  slider.oninput = show;
  for (const when of WHEN) {
    const title = both ? `<span class="${when}">${when}: ${esc(name(when === "before" ? facts.against : facts.model))}</span>` : esc(name(facts.model));
    $("landscapes").insertAdjacentHTML("beforeend", `<div class="panel"><h3>${title}<span class="peak"></span></h3><canvas></canvas></div>`);
    const panel = $("landscapes").lastElementChild, canvas = panel.querySelector("canvas");
    panels.push({ when, canvas, peak: panel.querySelector(".peak") });
    canvas.onpointerdown = e => canvas.setPointerCapture(e.pointerId);
    canvas.onpointermove = e => {
      if (!e.buttons || view.kind !== "surface") return;
      view.turn = Math.max(-1.4, Math.min(-0.08, view.turn + e.movementX / 250));
      view.tilt = Math.max(0.12, Math.min(1.3, view.tilt + e.movementY / 250));
      show();
    };
  }
  new ResizeObserver(show).observe($("landscapes"));
}

function show() {
  view.layer = layers[Number($("landscape-layer").value)];
  $("landscape-layer-text").textContent = view.layer;
  const data = panels.map(p => decode(landscapes[`${p.when}/${view.layer}/${view.site}`]));
  const top = nice(Math.max(...data.map(d => d.peak))), colours = ramp();
  panels.forEach((panel, i) => {
    const canvas = panel.canvas, scale = devicePixelRatio || 1;
    canvas.className = view.kind === "surface" ? "turns" : "";
    canvas.width = canvas.clientWidth * scale; canvas.height = canvas.clientHeight * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    (view.kind === "surface" ? surface : heatMap)(context, canvas.clientWidth, canvas.clientHeight, data[i], top, colours);
    const { snr } = facts.sites.find(s => s.layer === view.layer && s.site === view.site)[panel.when];
    panel.peak.textContent = `peak ${number(data[i].peak)} × RMS${snr === null ? "" : ` · SNR ${number(snr)} dB`}`;
  });
  colourBar(top, colours);
}

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map(m => m * power).find(v => v >= value * 0.999);
}

// Small values get more of the ramp than large ones: it is linear in the root of |x|.
const shade = (v, top, colours) => colours[Math.min(255, Math.round(255 * Math.sqrt(v / top)))];

function surface(g, width, height, d, top, colours) {
  const cos = Math.cos(view.turn), sin = Math.sin(view.turn), lean = Math.sin(view.tilt), rise = Math.cos(view.tilt);
  const size = Math.min(width * 0.66, height * 0.98 / (lean + 0.6 * rise)), tall = 0.5 * size * rise;
  const deep = 0.72, left = width * 0.5, floor = height * 0.49 + tall * 0.5;
  const project = (u, v, z) => {
    const x = u - 0.5, y = (v - 0.5) * deep;
    return [left + size * (x * cos - y * sin), floor + size * (x * sin + y * cos) * lean * -1 - tall * z];
  };
  const ink = css("--quiet"), line = css("--line");
  g.lineWidth = 1; g.strokeStyle = line;
  const path = points => { g.beginPath(); points.forEach((p, i) => i ? g.lineTo(...p) : g.moveTo(...p)); };
  for (const z of [0, 0.25, 0.5, 0.75, 1]) { path([project(0, 0, z), project(0, 1, z), project(1, 1, z)]); g.stroke(); }
  for (const [u, v] of [[0, 0], [0, 1], [1, 1]]) { path([project(u, v, 0), project(u, v, 1)]); g.stroke(); }
  const { rows, columns, values } = d, step = Math.max(1, columns - 1);
  // From the back (last token, first channel) to the front: what is nearer covers what is behind.
  for (let r = rows - 2; r >= 0; r--) {
    for (let c = 0; c < step; c++) {
      const at = [[r, c], [r, c + 1], [r + 1, c + 1], [r + 1, c]];
      const z = at.map(([i, j]) => values[i * columns + j]);
      path(at.map(([i, j], k) => project(j / step, i / (rows - 1), z[k] / top)));
      const light = 1 + Math.max(-0.22, Math.min(0.16, (z[0] - z[1] + 0.6 * (z[0] - z[3])) / top * 2.2));
      const rgb = shade(Math.max(...z), top, colours).map(x => Math.min(255, x * light));
      g.fillStyle = g.strokeStyle = `rgb(${rgb.map(Math.round)})`;
      g.lineWidth = 0.6; g.fill(); g.stroke();
    }
  }
  g.fillStyle = ink; g.font = "11.5px system-ui, sans-serif";
  const label = (text, u, v, z, dx, dy, align) => { g.textAlign = align; const p = project(u, v, z); g.fillText(text, p[0] + dx, p[1] + dy); };
  for (const z of [0, 0.5, 1]) label(number(z * top), 0, 0, z, -8, 4, "right");
  label("× RMS", 0, 0, 1, -8, -12, "right");
  label("channel →", 0.5, 0, 0, -4, 24, "center");
  label("token →", 1, 0.5, 0, 14, 16, "left");
}

function heatMap(g, width, height, d, top, colours) {
  const image = new ImageData(d.columns, d.rows);
  d.values.forEach((v, i) => image.data.set([...shade(v, top, colours), 255], 4 * i));
  const buffer = new OffscreenCanvas(d.columns, d.rows);
  buffer.getContext("2d").putImageData(image, 0, 0);
  g.imageSmoothingEnabled = false;
  g.drawImage(buffer, 26, 6, width - 34, height - 34);
  g.fillStyle = css("--quiet"); g.font = "11.5px system-ui, sans-serif"; g.textAlign = "center";
  g.fillText("channel →", width / 2, height - 10);
  g.save(); g.translate(14, height / 2); g.rotate(-Math.PI / 2); g.fillText("← token", 0, 0); g.restore();
}

function colourBar(top, colours) {
  $("colourbar").innerHTML = `<span>0</span><canvas width="256" height="1"></canvas><span>${number(top)} × RMS</span>`
    + `<span>· first ${decode(Object.values(landscapes)[0]).rows} tokens${view.kind === "surface" ? " · drag to turn" : ""}</span>`;
  const g = $("colourbar").querySelector("canvas").getContext("2d");
  for (let i = 0; i < 256; i++) { g.fillStyle = `rgb(${shade((i / 255), 1, colours).map(Math.round)})`; g.fillRect(i, 0, 1, 1); }
}
