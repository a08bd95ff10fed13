"use strict";
// The page holds: facts (JSON), geometry (base64 of zlib of the arrays that facts.arrays lists), sound (base64 of a wav).
// A frame is   base + sum_k weights[frame][k] * shapes[k]   in millimetres; see export/html.py, which packs it.

const $ = id => document.getElementById(id);
const facts = JSON.parse($("facts-json").textContent);

function bytesOf(id) {
  const text = atob($(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function say(text) { $("message").textContent = text; $("message").hidden = false; }

async function unpack() {
  const stream = new Blob([bytesOf("geometry")]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = new Uint8Array(await new Response(stream).arrayBuffer());
  const arrays = {};
  let at = 0;
  for (const [name, kind, count] of facts.arrays) {
    if (kind === "u8") { arrays[name] = data.subarray(at, at + count); at += count; continue; }
    // Integers are stored as differences or values, zigzagged, all low bytes first: that is what makes them small.
    const bytes = kind.endsWith("32") ? 4 : 2, out = new Int32Array(count), delta = kind.startsWith("d");
    let last = 0;
    for (let i = 0; i < count; i++) {
      let z = 0;
      for (let b = bytes - 1; b >= 0; b--) z = z * 256 + data[at + b * count + i];
      const value = z % 2 ? -(z + 1) / 2 : z / 2;
      out[i] = last = delta ? last + value : value;
    }
    arrays[name] = out;
    at += bytes * count;
  }
  return arrays;
}

// ---------------------------------------------------------------- the face in time

class Face {
  constructor(arrays) {
    this.count = facts.vertices;
    this.faces = this.count > 65535 ? Uint32Array.from(arrays.faces) : Uint16Array.from(arrays.faces);
    this.base = Float32Array.from(arrays.base, v => v * facts.base_step);
    this.shapes = [];
    for (let k = 0; k < facts.shapes; k++) {
      this.shapes.push(Int16Array.from(arrays.shapes.subarray(k * 3 * this.count, (k + 1) * 3 * this.count)));
    }
    this.weights = Float32Array.from(arrays.weights, (v, i) => v * facts.weight_steps[i % facts.shapes]);
    this.opening = arrays.opening && Float32Array.from(arrays.opening, v => v / 1000);
    this.positions = new Float32Array(3 * this.count);
    this.normals = new Float32Array(3 * this.count);
  }

  // Between two frames the weights are mixed, so that a 60 Hz screen shows 60 different faces of a 30 frames/s clip.
  pose(time) {
    const at = Math.min(Math.max(time * facts.fps, 0), facts.frames - 1), before = Math.floor(at);
    const after = Math.min(before + 1, facts.frames - 1), mix = at - before;
    const K = facts.shapes, W = this.weights, p = this.positions, n = p.length;
    p.set(this.base);
    for (let k = 0; k < K; k++) {
      const w = W[before * K + k] * (1 - mix) + W[after * K + k] * mix, shape = this.shapes[k];
      if (w !== 0) for (let i = 0; i < n; i++) p[i] += w * shape[i];
    }
    this.open = this.opening ? this.opening[before] * (1 - mix) + this.opening[after] * mix : 0;
    this.smoothNormals();
  }

  smoothNormals() { // sums of face normals, weighted by area as cross products are; the shader normalises
    const p = this.positions, n = this.normals, f = this.faces;
    n.fill(0);
    for (let i = 0; i < f.length; i += 3) {
      const a = f[i] * 3, b = f[i + 1] * 3, c = f[i + 2] * 3;
      const ux = p[b] - p[a], uy = p[b + 1] - p[a + 1], uz = p[b + 2] - p[a + 2];
      const vx = p[c] - p[a], vy = p[c + 1] - p[a + 1], vz = p[c + 2] - p[a + 2];
      const x = uy * vz - uz * vy, y = uz * vx - ux * vz, z = ux * vy - uy * vx;
      n[a] += x; n[a + 1] += y; n[a + 2] += z;
      n[b] += x; n[b + 1] += y; n[b + 2] += z;
      n[c] += x; n[c + 1] += y; n[c + 2] += z;
    }
  }
}

// ---------------------------------------------------------------- drawing

const VERTEX = `
attribute vec3 position, normal, rest;
attribute vec4 paint;    // rgb; ambient occlusion
attribute vec4 surface;  // eye: x, y in irises from its middle, how much of an eye; gloss
uniform mat4 projection, camera;
varying vec3 at, n, home, colour;
varying vec4 kind;
varying float light;
void main() {
  vec4 seen = camera * vec4(position, 1.0);
  at = seen.xyz; n = mat3(camera) * normal; home = rest;
  colour = paint.rgb; light = paint.a; kind = surface;
  gl_Position = projection * seen;
}`;

const FRAGMENT = `
precision highp float;
varying vec3 at, n, home, colour;
varying vec4 kind;
varying float light;
uniform float open, known;
uniform vec4 eyes[2];    // middle of each eye, its radius

// A key light that wraps around skin further in red than in blue, as light under the skin does.
vec3 wrapped(float d, vec3 wrap) { return clamp((d + wrap) / (1.0 + wrap), 0.0, 1.0); }

float gloss(vec3 N, vec3 V, vec3 L, float power) { return pow(max(dot(N, normalize(V + L)), 0.0), power); }

// How much eyebrow is at a point of the face at rest, in eye radii from an eye: an arc that thins out to the side.
float brow(vec4 eye) {
  vec3 q = (home - eye.xyz) / eye.w;
  float out_ = q.x * sign(eye.x), s = clamp((out_ + 1.15) / 2.95, 0.0, 1.0);
  float middle = 1.60 + 0.50 * s - 0.84 * s * s * s;
  float thick = 0.30 * (1.0 - 0.75 * s) * smoothstep(1.95, 1.2, out_), start = smoothstep(-1.32, -0.90, out_);
  return q.z < -0.6 ? 0.0 : start * smoothstep(thick + 0.12, thick - 0.20, abs(q.y - middle)) * step(0.01, thick);
}

// The edge of the upper lid: skin that dips into the eyeball's sphere, where lashes would grow.
float lash(vec4 eye) {
  vec3 q = (home - eye.xyz) / eye.w;
  return q.z < 0.1 ? 0.0 : smoothstep(1.03, 0.95, length(q)) * smoothstep(-0.05, 0.10, q.y);
}

float spot(vec3 q, vec3 middle, float radius) { vec3 d = (q - middle) / radius; return exp(-dot(d, d)); }

void main() {
  vec3 N = normalize(n + vec3(0.0, 0.0, 1e-5)), V = normalize(-at);
  if (!gl_FrontFacing) N = -N;
  float eye = kind.z, shine = kind.w, ao = light, solid = 1.0;
  vec3 albedo = colour * colour * (0.35 + 0.65 * colour);   // about sRGB to linear
  if (known > 0.5 && abs(eye) < 0.01) {
    float apart = distance(eyes[0].xyz, eyes[1].xyz);
    vec3 q = (home - 0.5 * (eyes[0].xyz + eyes[1].xyz)) / apart;
    // Blood under the skin: cheeks, nose and ears.
    float warm = spot(vec3(abs(q.x), q.yz), vec3(0.62, -0.78, 0.0), 0.42) + 0.8 * spot(q, vec3(0.0, -0.72, 0.5), 0.30) + 0.7 * spot(vec3(abs(q.x), q.yz), vec3(1.30, -0.2, -1.3), 0.45);
    albedo *= mix(vec3(1.0), vec3(1.04, 0.82, 0.80), clamp(warm, 0.0, 1.0) * 0.75);
    albedo = mix(albedo, vec3(0.050, 0.032, 0.024), 0.90 * max(brow(eyes[0]), brow(eyes[1])));
    albedo = mix(albedo, vec3(0.030, 0.018, 0.014), 0.85 * max(lash(eyes[0]), lash(eyes[1])));
    // The mesh ends at a ragged cut; the picture ends before it, softly.
    solid = 1.0 - smoothstep(2.35, 3.25, -q.y + 0.55 * max(abs(q.x) - 0.9, 0.0));
  }
  if (eye > 0.5) {
    float r = length(kind.xy), edge = 0.05 + fwidth_(r);
    float iris = 1.0 - smoothstep(1.0 - edge, 1.0 + edge, r);
    float spokes = 0.90 + 0.10 * sin(atan(kind.y, kind.x) * 29.0 + 1.2 * sin(r * 7.0));
    vec3 tint = mix(vec3(0.155, 0.095, 0.045), vec3(0.050, 0.058, 0.045), smoothstep(0.35, 0.85, r)) * spokes;
    tint *= 1.0 - 0.75 * smoothstep(0.80, 1.0, r);
    albedo *= mix(vec3(1.0), vec3(0.80, 0.62, 0.58), smoothstep(1.2, 2.1, r));
    albedo = mix(albedo, tint, iris);
    albedo = mix(albedo, vec3(0.006), 1.0 - smoothstep(0.36 - edge, 0.36 + edge, r));
    ao = 0.20 + 0.65 * ao;
    albedo *= 1.0 - 0.55 * smoothstep(0.05, 0.70, kind.y);   // the shadow of the upper lid
  }
  // Teeth and tongue lie in the dark of a closed mouth; an open one lets light in.
  if (eye < -0.5) ao *= 0.30 + 0.55 * clamp(open, 0.0, 1.0);

  vec3 key = normalize(vec3(-0.55, 0.62, 0.80)), fill = normalize(vec3(0.85, 0.05, 0.55)), rim = normalize(vec3(0.65, 0.45, -0.75));
  vec3 under = abs(eye) > 0.5 ? vec3(0.15) : vec3(0.34, 0.20, 0.14);
  vec3 lit = wrapped(dot(N, key), under) * vec3(2.35, 2.22, 2.05) * (0.30 + 0.70 * ao);
  lit += wrapped(dot(N, fill), under) * vec3(0.38, 0.43, 0.52) * ao;
  lit += mix(vec3(0.17, 0.145, 0.13), vec3(0.36, 0.39, 0.44), 0.5 + 0.5 * N.y) * ao * ao * (0.5 + 0.5 * ao);
  vec3 result = albedo * lit;
  float power = mix(14.0, 400.0, shine * shine * shine), strength = mix(0.050, 0.60, shine * shine) * ao;
  float facing = clamp(1.0 - dot(N, V), 0.0, 1.0), fresnel = 0.45 + 0.55 * facing * facing * facing;
  result += strength * fresnel * (gloss(N, V, key, power) * vec3(2.2, 2.15, 2.0) + 0.30 * gloss(N, V, fill, power));
  if (eye > 0.5) result += 1.1 * gloss(N, V, normalize(vec3(-0.42, 0.20, 0.88)), 700.0);   // the spark that makes an eye alive
  result += pow(facing, 3.5) * max(dot(N, rim) + 0.15, 0.0) * vec3(0.62, 0.68, 0.78) * ao;
  result = result * (1.0 + result * 0.12) / (1.0 + result * 0.62);   // a soft shoulder for the highlights
  gl_FragColor = vec4(pow(clamp(result, 0.0, 1.0), vec3(0.4545)) * solid, solid);
}`;

class Stage {
  constructor(canvas, face, arrays) {
    const gl = this.gl = canvas.getContext("webgl", { antialias: true, alpha: true, powerPreference: "low-power" });
    if (!gl) throw new Error("This browser shows no WebGL, which the face is drawn with.");
    if (face.faces instanceof Uint32Array && !gl.getExtension("OES_element_index_uint")) throw new Error("This browser cannot draw a mesh this large.");
    const smooth = gl.getExtension("OES_standard_derivatives");
    const fragment = (smooth ? "#extension GL_OES_standard_derivatives : enable\n" : "") +
      FRAGMENT.replace("varying vec3 at", `${smooth ? "#define fwidth_(x) fwidth(x)" : "#define fwidth_(x) 0.02"}\nvarying vec3 at`);
    const program = this.program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source.trim());
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    gl.clearColor(0, 0, 0, 0);
    Object.assign(this, { canvas, face });
    this.dynamic = [this.attribute("position", face.positions, 3, gl.FLOAT), this.attribute("normal", face.normals, 3, gl.FLOAT)];
    this.attribute("rest", face.base, 3, gl.FLOAT);
    this.attribute("paint", Uint8Array.from(arrays.paint), 4, gl.UNSIGNED_BYTE, true);
    // Eye coordinates reach 4 irises either way in a byte; the third is -1 inside the mouth, 0 on skin, 1 on an eye.
    const surface = Float32Array.from(arrays.surface, (v, i) => i % 4 < 2 ? (v - 128) / 32 : i % 4 === 2 ? v - 1 : v / 255);
    this.attribute("surface", surface, 4, gl.FLOAT);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, face.faces, gl.STATIC_DRAW);
    this.where = name => gl.getUniformLocation(program, name);
    gl.uniform1f(this.where("known"), facts.eyes ? 1 : 0);
    gl.uniform4fv(this.where("eyes"), new Float32Array(facts.eyes || 8));
    this.front();
  }

  attribute(name, data, size, type, normalised = false) {
    const gl = this.gl, buffer = gl.createBuffer(), at = gl.getAttribLocation(this.program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.DYNAMIC_DRAW);
    if (at >= 0) { gl.enableVertexAttribArray(at); gl.vertexAttribPointer(at, size, type, normalised, 0, 0); }
    return buffer;
  }

  front() { this.yaw = -0.2; this.pitch = 0.03; this.zoom = 1; }

  // How far the camera must stand for the head to fill the free part of the window, whatever its shape.
  draw() {
    const gl = this.gl, { canvas, face } = this, ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    gl.viewport(0, 0, width, height);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    for (const [buffer, data] of [[this.dynamic[0], face.positions], [this.dynamic[1], face.normals]]) {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferSubData(gl.ARRAY_BUFFER, 0, data);
    }
    const footer = Math.min(0.4, (window.innerHeight - $("controls").getBoundingClientRect().top) / window.innerHeight);
    const tan = Math.tan(0.5 * 24 * Math.PI / 180), aspect = width / height;
    const [cx, cy, cz, halfWidth, halfHeight] = facts.view;
    const far = Math.max(halfHeight / (1 - footer), halfWidth * 1.04 / aspect) / tan / this.zoom;
    const near = Math.max(far - 4 * halfHeight, far * 0.02), end = far + 4 * halfHeight;
    // The head sits in the middle of what the controls leave free: the picture is shifted up, not the camera.
    gl.uniformMatrix4fv(this.where("projection"), false, new Float32Array([
      1 / (tan * aspect), 0, 0, 0, 0, 1 / tan, 0, 0, 0, -footer * 0.92, (end + near) / (near - end), -1, 0, 0, 2 * end * near / (near - end), 0]));
    const cosY = Math.cos(this.yaw), sinY = Math.sin(this.yaw), cosP = Math.cos(this.pitch), sinP = Math.sin(this.pitch);
    const r = [cosY, sinP * sinY, -cosP * sinY, 0, cosP, sinP, sinY, -sinP * cosY, cosP * cosY]; // columns of the rotation
    const move = i => -(r[i] * cx + r[i + 3] * cy + r[i + 6] * cz);
    gl.uniformMatrix4fv(this.where("camera"), false, new Float32Array([
      r[0], r[1], r[2], 0, r[3], r[4], r[5], 0, r[6], r[7], r[8], 0, move(0), move(1), move(2) - far, 1]));
    gl.uniform1f(this.where("open"), Math.min(Math.max(face.open, 0), 1));
    gl.drawElements(gl.TRIANGLES, face.faces.length, face.faces instanceof Uint32Array ? gl.UNSIGNED_INT : gl.UNSIGNED_SHORT, 0);
  }
}

// ---------------------------------------------------------------- time

// The sound card is the clock. A browser may report its time in steps of 20 ms and more, so between two reports the
// computer's clock goes on from the last one, by a quarter of a second at most (a stalled sound stalls the face too).
class Clock {
  constructor(wav) {
    this.length = Math.max(facts.duration, facts.frames / facts.fps);
    this.rate = 1; this.loop = false; this.playing = false; this.still = 0;
    if (!facts.sound) return;
    this.sound = new Audio();
    this.sound.src = URL.createObjectURL(new Blob([wav], { type: "audio/wav" }));
    this.sound.preload = "auto";
    this.sound.onended = () => this.ended();
    this.sound.onpause = () => { if (this.playing && !this.sound.ended) this.pause(); };
  }
  now() {
    if (!this.playing) return this.still;
    const t = performance.now() / 1000;
    if (this.sound && this.sound.currentTime !== this.reported) { this.reported = this.sound.currentTime; this.mark = t; }
    const ahead = (t - this.mark) * this.rate;
    return Math.min(this.reported + (this.sound ? Math.min(ahead, 0.25 * this.rate) : ahead), this.length);
  }
  async play() {
    if (this.still >= this.length - 0.5 / facts.fps) this.seek(0);
    this.reported = this.still; this.mark = performance.now() / 1000; this.playing = true;
    if (!this.sound) return;
    this.sound.playbackRate = this.rate;
    try { await this.sound.play(); } catch (error) { this.playing = false; changed(); if (error.name !== "AbortError") say(`The sound could not be played: ${error.message}`); }
  }
  pause() { this.still = this.now(); this.playing = false; if (this.sound) this.sound.pause(); changed(); }
  seek(time) {
    this.still = this.reported = Math.min(Math.max(time, 0), this.length);
    this.mark = performance.now() / 1000;
    if (this.sound) this.sound.currentTime = this.still;
  }
  ended() {
    if (this.loop && this.playing) { this.seek(0); this.play(); return; }
    this.still = this.length; this.playing = false; changed();
  }
  speed(rate) { const t = this.now(); this.rate = rate; this.reported = t; this.mark = performance.now() / 1000; if (this.sound) this.sound.playbackRate = rate; }
}

// ---------------------------------------------------------------- the timeline: loudness, and how far the mouth is open

class Timeline {
  constructor(canvas, face, length, wav) {
    Object.assign(this, { canvas, face, length });
    if (facts.sound) this.samples = new Int16Array(wav.buffer, 44, (wav.length - 44) >> 1); // after a wav file's header
  }
  measure(columns) { // the loudest sample and the widest opening of every column, once per size
    this.columns = columns;
    const per = (n, c) => [Math.floor(n * c / columns), Math.max(Math.ceil(n * (c + 1) / columns), Math.floor(n * c / columns) + 1)];
    const peak = (data, n, c, of) => { let best = 0; const [from, to] = per(n, c); for (let i = from; i < to && i < data.length; i++) best = Math.max(best, of(data[i])); return best; };
    const n = this.samples ? Math.round(this.length * facts.sound) : 0, m = Math.round(this.length * facts.fps);
    this.loud = Array.from({ length: columns }, (_, c) => n ? peak(this.samples, n, c, v => Math.abs(v)) / 32768 : 0);
    const most = Math.max(...this.loud, 1e-3);
    this.loud = this.loud.map(v => v / most);
    this.open = this.face.opening && Array.from({ length: columns }, (_, c) => Math.min(peak(this.face.opening, m, c, v => v), 1.3) / 1.3);
  }
  draw(time) {
    const canvas = this.canvas, ratio = window.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
    if (!w) return;
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
    const columns = Math.max(1, Math.floor(w / 4));
    if (this.columns !== columns) this.measure(columns);
    const g = canvas.getContext("2d"), middle = h / 2, x = w * time / this.length;
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, w, h);
    for (let c = 0; c < columns; c++) {
      const left = w * c / columns, tall = Math.max(1, this.loud[c] * (h - 8) / 2);
      g.fillStyle = left < x ? "#e8a27c" : "#ffffff38";
      g.beginPath();
      if (g.roundRect) g.roundRect(left + 0.75, middle - tall, w / columns - 1.5, 2 * tall, 1.2); else g.rect(left + 0.75, middle - tall, w / columns - 1.5, 2 * tall);
      g.fill();
    }
    if (this.open) {
      g.beginPath();
      this.open.forEach((v, c) => g[c ? "lineTo" : "moveTo"](w * (c + 0.5) / columns, h - 2 - v * (h - 6)));
      g.strokeStyle = "#9fd0dccc"; g.lineWidth = 1.4; g.lineJoin = "round"; g.stroke();
    }
    g.fillStyle = "#fff";
    g.fillRect(Math.min(Math.max(x - 0.75, 0), w - 1.5), 0, 1.5, h);
  }
}

// ---------------------------------------------------------------- the page

let changed = () => {};

async function main() {
  if (typeof DecompressionStream === "undefined") throw new Error("This page needs a browser of 2023 or newer.");
  const arrays = await unpack();
  const wav = bytesOf("sound"), face = new Face(arrays), stage = new Stage($("view"), face, arrays), clock = new Clock(wav);
  const timeline = new Timeline($("curves"), face, clock.length, wav);
  const seconds = t => `${Math.floor(t / 60)}:${(t % 60 < 10 ? "0" : "") + (Math.floor(t % 60 * 10) / 10).toFixed(1)}`;
  $("facts").textContent = [facts.subject, `${facts.vertices} vertices`, `${facts.frames} frames at ${+facts.fps.toFixed(3)} fps`].filter(Boolean).join(" · ");
  $("facts").title = `Packed to within ${facts.error_mm.toFixed(3)} mm of the model's vertices.`;
  $("scrub").max = clock.length;

  let posed = null, stale = true;
  changed = () => { stale = true; };
  function show() {
    const time = clock.now();
    if (time !== posed) { face.pose(time); posed = time; stale = true; }
    if (stale) {
      stale = false;
      stage.draw();
      timeline.draw(time);
      $("scrub").value = time;
      $("scrub").setAttribute("aria-valuetext", `${time.toFixed(1)} of ${clock.length.toFixed(1)} seconds`);
      $("time").innerHTML = `<b>${seconds(time)}</b> / ${seconds(clock.length)}`;
      document.body.classList.toggle("playing", clock.playing);
      $("play").setAttribute("aria-label", clock.playing ? "Pause" : "Play");
      Object.assign(document.documentElement.dataset, { time: time.toFixed(3), frame: Math.min(Math.floor(time * facts.fps + 1e-6), facts.frames - 1) });
    }
    if (clock.playing && !clock.sound && time >= clock.length) clock.ended();
    requestAnimationFrame(show);
  }

  const toggle = () => { clock.playing ? clock.pause() : clock.play(); changed(); };
  const goto = time => { clock.seek(time); changed(); };
  const step = frames => { if (clock.playing) clock.pause(); goto((Math.round(clock.now() * facts.fps) + frames) / facts.fps); };
  const loop = () => { clock.loop = !clock.loop; $("loop").setAttribute("aria-pressed", clock.loop); };
  const front = () => { stage.front(); changed(); };
  $("play").onclick = toggle;
  $("scrub").oninput = () => goto(+$("scrub").value);
  $("loop").onclick = loop;
  $("front").onclick = front;
  $("speed").onchange = () => clock.speed(+$("speed").value);
  addEventListener("resize", () => changed());
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const act = { " ": () => { if (event.target.tagName !== "BUTTON") toggle(); else return false; }, ArrowLeft: () => step(event.shiftKey ? -10 : -1),
      ArrowRight: () => step(event.shiftKey ? 10 : 1), Home: () => goto(0), End: () => goto(clock.length), l: loop, r: front }[event.key];
    if (act && act() !== false) event.preventDefault();
  });

  // One pointer turns the head, two zoom.
  const view = $("view"), pointers = new Map();
  const spread = () => { const [a, b] = [...pointers.values()]; return Math.hypot(a.x - b.x, a.y - b.y); };
  const zoom = by => { stage.zoom = Math.min(Math.max(stage.zoom * by, 0.5), 6); changed(); };
  view.onpointerdown = event => { view.setPointerCapture(event.pointerId); pointers.set(event.pointerId, { x: event.clientX, y: event.clientY }); view.classList.add("held"); };
  view.onpointermove = event => {
    const was = pointers.get(event.pointerId);
    if (!was) return;
    const before = pointers.size === 2 ? spread() : 0, dx = event.clientX - was.x, dy = event.clientY - was.y;
    was.x = event.clientX; was.y = event.clientY;
    if (pointers.size === 2) { if (before > 0) zoom(spread() / before); return; }
    stage.yaw += dx * 0.008;
    stage.pitch = Math.min(Math.max(stage.pitch + dy * 0.006, -1.2), 1.2);
    changed();
  };
  view.onpointerup = view.onpointercancel = event => { pointers.delete(event.pointerId); if (!pointers.size) view.classList.remove("held"); };
  view.onwheel = event => { event.preventDefault(); zoom(Math.exp(-event.deltaY * 0.0012)); };
  view.ondblclick = front;

  // #t=1.5&yaw=0.6&pitch=0&zoom=2 starts there.
  const hash = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    if (given.has("t")) goto(parseFloat(given.get("t")) || 0);
    for (const name of ["yaw", "pitch", "zoom"]) if (Number.isFinite(parseFloat(given.get(name)))) stage[name] = parseFloat(given.get(name));
    changed();
  };
  addEventListener("hashchange", hash);
  hash();
  show();
  window.viewer = { face, stage, clock, show }; // for whoever scripts the page
  document.documentElement.dataset.ready = "yes";
}

main().catch(error => { say(error.message); document.documentElement.dataset.ready = "no"; });
