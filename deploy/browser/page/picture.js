// From the bytes of a PNG or JPEG to grey levels and to the square that the network reads,
// with the arithmetic of Pillow, so that the same file gives the same square as on the server.

export const MAX_PIXELS = 16_777_216;   // what the canvas of an iPhone holds

export class PictureError extends Error {
  constructor(code, message, hint = '') { super(message); Object.assign(this, { code, hint }); }
}

const truncated = () => new PictureError('truncated', 'The file ends before its picture does.', 'Copy or download it again.');
const corrupt = () => new PictureError('corrupt', 'The file is damaged and cannot be decoded.', 'Export it again from where it came.');

// ---- the file

export function kindOf(b) {
  if (b.length > 8 && [0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10].every((v, i) => b[i] === v)) return 'PNG';
  if (b[0] === 0xff && b[1] === 0xd8 && b[2] === 0xff) return 'JPEG';
  return null;
}

function pngHeader(b) {
  const view = new DataView(b.buffer, b.byteOffset, b.byteLength), data = [];
  const head = {};
  for (let at = 8; ;) {
    if (at + 12 > b.length) throw truncated();
    const length = view.getUint32(at), kind = String.fromCharCode(...b.subarray(at + 4, at + 8));
    if (at + 12 + length > b.length) throw truncated();
    if (kind === 'IHDR') Object.assign(head, { width: view.getUint32(at + 8), height: view.getUint32(at + 12), depth: b[at + 16], colour: b[at + 17], interlaced: b[at + 20] });
    if (kind === 'acTL') throw new PictureError('multi_frame', 'The file holds several pictures.', 'Save the one to be read on its own.');
    if (kind === 'IDAT') data.push(b.subarray(at + 8, at + 8 + length));
    if (kind === 'IEND') break;
    at += 12 + length;
  }
  if (!head.width || !head.height || !data.length) throw corrupt();
  return { ...head, data };
}

function jpegHeader(b) {
  const head = {};
  for (let at = 2; ;) {
    while (b[at] === 0xff && b[at + 1] === 0xff) at++;
    if (at + 4 > b.length) throw truncated();
    const marker = b[at + 1], length = b[at + 2] << 8 | b[at + 3];
    if (b[at] !== 0xff || length < 2) throw corrupt();
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) Object.assign(head, { height: b[at + 5] << 8 | b[at + 6], width: b[at + 7] << 8 | b[at + 8] });
    at += 2 + length;
    if (marker !== 0xda) continue;
    // a browser fills what is missing with grey and says nothing
    for (let end = b.length - 2; end >= at; end--) if (b[end] === 0xff && b[end + 1] === 0xd9) { if (head.width && head.height) return head; throw corrupt(); }
    throw truncated();
  }
}

function paeth(a, b, c) {
  const pa = Math.abs(b - c), pb = Math.abs(a - c), pc = Math.abs(a + b - 2 * c);
  return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}

// A canvas has 8 bits. Of 16 it would keep the upper ones, and a detector that uses 12 would lose all but four.
async function deepGrey({ width, height, data }) {
  let raw;
  try { raw = new Uint8Array(await new Response(new Blob(data).stream().pipeThrough(new DecompressionStream('deflate'))).arrayBuffer()); }
  catch { throw corrupt(); }
  const row = 2 * width, out = new Uint16Array(width * height);
  if (raw.length < (row + 1) * height) throw truncated();
  let above = new Uint8Array(row);
  for (let y = 0; y < height; y++) {
    const filter = raw[y * (row + 1)], line = raw.subarray(y * (row + 1) + 1, (y + 1) * (row + 1));
    if (filter > 4) throw corrupt();
    for (let x = 0; x < row; x++) {
      const a = x > 1 ? line[x - 2] : 0, b = above[x], c = x > 1 ? above[x - 2] : 0;
      line[x] += filter === 0 ? 0 : filter === 1 ? a : filter === 2 ? b : filter === 3 ? a + b >> 1 : paeth(a, b, c);
    }
    for (let x = 0; x < width; x++) out[y * width + x] = line[2 * x] << 8 | line[2 * x + 1];
    above = line;
  }
  const shift = Math.max(0, 24 - Math.clz32(out.reduce((m, v) => Math.max(m, v), 0)));
  return { pixels: Uint8Array.from(out, v => v >> shift), width, height, colour: 0 };
}

export async function decode(bytes) {
  if (!bytes.length) throw new PictureError('empty_file', 'The file is empty.', 'Copy or download it again.');
  const kind = kindOf(bytes);
  if (!kind) throw new PictureError('unsupported_format', 'The file is not a PNG or JPEG file.', 'Export the film as PNG or JPEG. DICOM and TIFF are read by the server only.');
  const head = (kind === 'PNG' ? pngHeader : jpegHeader)(bytes);
  if (head.width * head.height > MAX_PIXELS) throw new PictureError('too_large', `The film is ${head.width} x ${head.height} pixels; over ${MAX_PIXELS.toLocaleString('en')} a telephone cannot hold.`, 'Export it smaller.');
  if (head.depth === 16 && head.colour === 0) {
    if (head.interlaced) throw new PictureError('unsupported_format', 'The file is an interlaced PNG of 16 bits.', 'Save it without interlacing.');
    return deepGrey(head);
  }
  let bitmap;
  try { bitmap = await createImageBitmap(new Blob([bytes], { type: `image/${kind.toLowerCase()}` }), { colorSpaceConversion: 'none' }); }
  catch { throw corrupt(); }
  const { width, height } = bitmap, context = new OffscreenCanvas(width, height).getContext('2d', { alpha: false, willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data, pixels = new Uint8Array(width * height);
  let grey = true;
  for (let i = 0, j = 0; i < pixels.length; i++, j += 4) {
    pixels[i] = rgba[j] * 19595 + rgba[j + 1] * 38470 + rgba[j + 2] * 7471 + 0x8000 >> 16;
    grey &&= rgba[j] === rgba[j + 1] && rgba[j] === rgba[j + 2];
  }
  return { pixels, width, height, colour: grey ? 0 : colourShare(rgba, width, height) };
}

function colourShare(rgba, width, height, chroma = 40) {
  const channel = c => shrunk(Uint8Array.from({ length: width * height }, (_, i) => rgba[4 * i + c]), width, height, Math.min(width, 256), Math.min(height, 256));
  const [r, g, b] = [0, 1, 2].map(channel);
  let n = 0;
  for (let i = 0; i < r.length; i++) n += Math.max(r[i], g[i], b[i]) - Math.min(r[i], g[i], b[i]) > chroma;
  return n / r.length;
}

// ---- Pillow's resize and reduce

const FILTERS = {
  box: [0.5, x => x > -0.5 && x <= 0.5 ? 1 : 0],
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, x => (x = Math.abs(x)) < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0],
};

function weights(inSize, from, to, outSize, [reach, filter]) {
  const scale = Math.fround(to - from) / outSize, wide = Math.max(1, scale), support = reach * wide;
  return Array.from({ length: outSize }, (_, i) => {
    const centre = from + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5)), last = Math.min(inSize, Math.trunc(centre + support + 0.5));
    const k = Float64Array.from({ length: last - first }, (_, x) => filter((x + first - centre + 0.5) / wide)), sum = k.reduce((a, b) => a + b, 0);
    return { first, k: sum ? k.map(v => v / sum) : k };
  });
}

// 8 bits in fixed point, as Pillow has it; floats as they are
function along(source, outer, inner, strideOuter, strideInner, table, out, outOuter, outInner) {
  const whole = out instanceof Uint8Array;
  table.forEach(({ first, k }, i) => {
    const w = whole ? Int32Array.from(k, v => Math.trunc(v * 2 ** 22 + (v < 0 ? -0.5 : 0.5))) : k;
    for (let o = 0; o < outer; o++) {
      let sum = whole ? 2 ** 21 : 0, at = o * strideOuter + first * strideInner;
      for (let x = 0; x < w.length; x++, at += strideInner) sum += source[at] * w[x];
      out[o * outOuter + i * outInner] = whole ? Math.max(0, Math.min(255, Math.floor(sum / 2 ** 22))) : sum;
    }
  });
  return out;
}

export function resized(source, width, height, outWidth, outHeight, filter = 'bilinear', box = [0, 0, width, height]) {
  const [x0, y0, x1, y1] = box.map(Math.fround), make = n => new source.constructor(n), f = FILTERS[filter];
  const middle = outWidth === width && x0 === 0 && x1 === width ? source : along(source, height, width, width, 1, weights(width, x0, x1, outWidth, f), make(outWidth * height), outWidth, 1);
  if (outHeight === height && y0 === 0 && y1 === height) return middle;
  return along(middle, outWidth, height, 1, outWidth, weights(height, y0, y1, outHeight, f), make(outWidth * outHeight), 1, outWidth);
}

export function reduced(source, width, height, fx, fy = fx) {
  const w = Math.ceil(width / fx), h = Math.ceil(height / fy), out = new Uint8Array(w * h);
  for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
    const right = Math.min(width, (x + 1) * fx), bottom = Math.min(height, (y + 1) * fy), n = (right - x * fx) * (bottom - y * fy);
    let sum = n >> 1;
    for (let v = y * fy; v < bottom; v++) for (let u = x * fx; u < right; u++) sum += source[v * width + u];
    out[y * w + x] = Math.floor(sum * Math.trunc(Math.fround(2 ** 32 / Math.fround(256 * n))) / 2 ** 24);
  }
  return { pixels: out, width: w, height: h };
}

// Pillow's resize(BOX, reducing_gap=2)
export function shrunk(source, width, height, outWidth, outHeight) {
  const fx = Math.trunc(width / outWidth / 2) || 1, fy = Math.trunc(height / outHeight / 2) || 1;
  if (fx === 1 && fy === 1) return resized(source, width, height, outWidth, outHeight, 'box');
  const r = reduced(source, width, height, fx, fy);
  return resized(r.pixels, r.width, r.height, outWidth, outHeight, 'box', [0, 0, width / fx, height / fy]);
}

// ---- measurements and preparation, as in data/quality and data/images

export function greyCounts(pixels) {
  const n = new Float64Array(256);
  for (let i = 0; i < pixels.length; i++) n[pixels[i]]++;
  return n;
}

export function percentileLevels(counts, percentiles) {
  const all = counts.reduce((a, b) => a + b, 0);
  return percentiles.map(p => {
    let level = 0, sum = counts[0];
    while (level < 255 && sum / all < p / 100 - 1e-12) sum += counts[++level];
    return level;
  });
}

export function looksBlank(counts, levels) {
  const [low, high] = percentileLevels(counts, [0.5, 99.5]);
  return high - low < levels;
}

export function smaller(film, side = 800, above = 1024) {
  const long = Math.max(film.width, film.height);
  return long <= above ? film : reduced(film.pixels, film.width, film.height, Math.ceil(long / side));
}

const even = v => { const r = Math.round(v); return r - v === 0.5 && r % 2 ? r - 1 : r; };   // half to even, as NumPy and Python round

export function filmBox(width, height, size, resize) {
  if (resize === 'squash') return [0, 0, size, size];
  const [w, h] = [width, height].map(v => Math.max(1, even(v * size / Math.max(width, height))));
  const left = size - w >> 1, top = size - h >> 1;
  return [left, top, left + w, top + h];
}

export function prepare(film, { size, resize, percentiles }, counts = greyCounts(film.pixels), small = smaller(film)) {
  const [low, high] = percentileLevels(counts, percentiles), from = Math.min(small.width, small.height) >= 2 * size ? small : film;
  const tone = Uint8Array.from({ length: 256 }, (_, v) => high > low ? even(Math.max(0, Math.min(high - low, v - low)) * (255 / (high - low))) : v);
  const [left, top, right, bottom] = filmBox(film.width, film.height, size, resize);
  const inside = resized(from.pixels.map(v => tone[v]), from.width, from.height, right - left, bottom - top);
  if (right - left === size && bottom - top === size) return inside;
  const out = new Uint8Array(size * size);
  for (let y = top; y < bottom; y++) out.set(inside.subarray((y - top) * (right - left), (y - top + 1) * (right - left)), y * size + left);
  return out;
}

export function heatOnFilm(heat, side, box, size) {
  if (box.every((v, i) => v === [0, 0, size, size][i])) return heat;
  return resized(heat, side, side, side, side, 'bilinear', box.map(v => v * side / size));
}

// ---- what may be wrong with a film

function chestMatch(small, chest) {
  const standard = a => { const m = a.reduce((s, v) => s + v, 0) / a.length, d = Math.sqrt(a.reduce((s, v) => s + (v - m) ** 2, 0) / a.length) + 1e-9; return a.map(v => (v - m) / d); };
  const film = standard(Array.from(shrunk(small.pixels, small.width, small.height, 16, 16)));
  let turned = standard(chest.flat());
  return [0, 1, 2, 3].map(() => {
    const match = turned.reduce((s, v, i) => s + v * film[i], 0) / 256;
    turned = turned.map((_, i) => turned[(i % 16) * 16 + 15 - (i >> 4)]);   // a quarter counterclockwise
    return match;
  });
}

function darkShare(small) {
  const a = shrunk(small.pixels, small.width, small.height, 32, 32), sorted = Float64Array.from(a).sort();
  const [low, high] = [0.01, 0.99].map(q => { const at = q * (sorted.length - 1), i = Math.floor(at); return sorted[i] + (sorted[Math.min(i + 1, sorted.length - 1)] - sorted[i]) * (at - i); });
  return a.reduce((n, v) => n + (v < low + (high - low) / 10), 0) / a.length;
}

// All flags of the server but burnt_in_text, which warns before a film is passed on; here none is.
export function qualityFlags(film, counts, small, { chest, blank_range, colour_trace }) {
  const [low, high] = percentileLevels(counts, [2, 98]), blank = looksBlank(counts, blank_range);
  const [up, left, down, right] = blank ? [0, 0, 0, 0] : chestMatch(small, chest), side = Math.max(left, right);
  const found = {
    blank, low_contrast: !blank && high - low < 40, tiny: Math.min(film.width, film.height) < 100,
    saturated: !blank && (counts[253] + counts[254] + counts[255]) / film.pixels.length > 0.25, not_greyscale: film.colour > colour_trace,
    sideways: !blank && side >= 0.5 && side - Math.max(up, down) >= 0.3 && darkShare(small) < 0.2, looks_negative: !blank && up <= -0.35,
  };
  return Object.keys(found).filter(k => found[k]);
}
