// The reader: the bundle's network in ONNX Runtime, and the rules of vision/classify. The file that is read goes nowhere.
import { decode, filmBox, greyCounts, heatOnFilm, looksBlank, prepare, qualityFlags, smaller } from './picture.js';

export class SetupError extends Error {
  constructor(code, message) { super(message); this.code = code; }
}

async function fetched(url, { sha256, bytes }, arrived) {
  const answer = await fetch(url);
  if (!answer.ok) throw new SetupError('missing_file', `${url} did not come (${answer.status}).`);
  const whole = new Uint8Array(bytes), source = answer.body.getReader();
  let at = 0;
  for (let part = await source.read(); !part.done; part = await source.read()) {
    if (at + part.value.length > bytes) throw new SetupError('bundle_changed', `${url} is longer than the file that the page lists.`);
    whole.set(part.value, at); at += part.value.length; arrived(part.value.length);
  }
  // browsers hash over https and on this machine only; the length is checked everywhere
  const hash = globalThis.crypto?.subtle && Array.from(new Uint8Array(await crypto.subtle.digest('SHA-256', whole)), v => v.toString(16).padStart(2, '0')).join('');
  if (at !== bytes || (hash && hash !== sha256)) throw new SetupError('bundle_changed', `${url} is not the file that the page lists.`);
  return whole;
}

export async function openReader(base, progress = () => {}) {
  const at = name => new URL(name, base).href;
  const answer = await fetch(at('page.json'), { cache: 'no-cache' });
  if (!answer.ok) throw new SetupError('missing_file', `page.json did not come (${answer.status}).`);
  const page = await answer.json(), total = Object.values(page.files).reduce((n, f) => n + f.bytes, 0);
  let sofar = 0;
  const get = name => fetched(at(name), page.files[name], n => progress((sofar += n) / total));
  const [ort, wasm, model, ...json] = await Promise.all([import(at('ort.wasm.bundle.min.mjs')), get('ort-wasm-simd-threaded.wasm'), get(`bundle/${page.engine}`),
    ...['labels', 'calibration', 'preprocessing'].map(n => get(`bundle/${n}.json`))]);
  const [labels, calibration, preprocessing] = json.map(b => JSON.parse(new TextDecoder().decode(b)));
  ort.env.wasm.wasmBinary = wasm.buffer;
  // more than one thread needs a page that the server isolates (COOP and COEP)
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  const session = await ort.InferenceSession.create(model, { executionProviders: ['wasm'] });
  return new Reader(ort, session, { ...page, labels, calibration, preprocessing });
}

export class Reader {
  constructor(ort, session, page) { Object.assign(this, { ort, session, page }); }

  async outputs(square) {   // size * size grey levels
    const { size } = this.page.preprocessing;
    const out = await this.session.run({ image: new this.ort.Tensor('uint8', square, [1, 1, size, size]) });
    return Object.fromEntries(Object.entries(out).map(([name, t]) => [name, { data: t.data, dims: t.dims }]));
  }

  async read(bytes) {
    const start = performance.now(), film = await decode(bytes), { calibration: c, preprocessing, labels, quality } = this.page;
    const counts = greyCounts(film.pixels), small = smaller(film), decoded = performance.now();
    const refused = looksBlank(counts, c.reject.blank_range) ? 'blank' : film.colour > c.reject.colour ? 'not_a_radiograph' : null;
    if (refused) return { status: 'rejected', reason_code: refused, film };
    const square = prepare(film, preprocessing, counts, small), ready = performance.now();
    const out = await this.outputs(square), done = performance.now();
    const timings = { decode_ms: decoded - start, preprocess_ms: ready - decoded, model_ms: done - ready };
    const { temperature, limit } = ownNumbers(out.logits.data, c, labels, this.page.chest), p = softmax(out.logits.data, temperature), ood = out.ood.data[0], [status, reason_code] = decide(p, ood, c, labels, this.page.chest);
    if (status === 'rejected') return { status, reason_code, ood, timings, film, square };
    const top = p.indexOf(Math.max(...p)), label = labels[top], [, , rows, columns] = out.heat.dims, n = rows * columns;
    const heat = label === 'NORMAL' ? new Float32Array(n) : heatOnFilm(out.heat.data.slice(top * n, (top + 1) * n), rows, filmBox(film.width, film.height, preprocessing.size, preprocessing.resize), preprocessing.size);   // what is not there has no place
    const flags = qualityFlags(film, counts, small, quality);
    const finding = {
      label, probability: p[top], probabilities: Object.fromEntries(labels.map((l, i) => [l, p[i]])), prediction_set: predictionSet(p, limit, labels), coverage: c.conformal.coverage,
      severity: severity(out.severity?.data, label, c), zones: flags.includes('sideways') ? [] : zones(heat, rows, this.page.chest.includes(label), label, this.page.spread), quality_flags: flags,
      ood_score: ood, ood_threshold: c.ood.threshold, model_version: this.page.version,
    };
    return { status, reason_code, finding, spread: isSpread(heat, this.page.spread) || !heat.some(v => v > 0), heat, side: rows, ood, timings, film, square };
  }
}

export function softmax(logits, temperature) {
  const z = Array.from(logits, v => v / temperature), top = Math.max(...z), e = z.map(v => Math.exp(v - top)), sum = e.reduce((a, b) => a + b, 0);
  return e.map(v => v / sum);
}

// Temperature, and for each class the limit of its set, of the part of the body that the likeliest class belongs to; of all films where the bundle does not set the parts apart.
// An illness has a limit of its own where the bundle rules out none of at least `not_ruled_out`.
export function ownNumbers(scores, c, labels, chest) {
  const part = chest.includes(labels[scores.indexOf(Math.max(...scores))]) ? 'chest' : 'limb', { temperature, qhat } = c.parts?.[part] ?? { temperature: c.temperature, qhat: c.conformal.qhat };
  return { temperature, limit: labels.map(l => l === 'NORMAL' ? qhat : Math.max(qhat, 1 - (c.conformal.not_ruled_out ?? 1))) };
}

export function predictionSet(p, limit, labels) {
  const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a]);
  return order.filter((i, n) => n === 0 || 1 - p[i] <= limit[i]).map(i => labels[i]);
}

export function decide(p, ood, c, labels, chest) {
  if (ood > c.ood.reject) return ['rejected', 'not_a_radiograph'];
  if (ood > c.ood.threshold) return ['abstained', 'unusual_film'];
  if (Math.max(...p) < c.abstain.min_probability) return ['abstained', 'low_confidence'];
  const names = predictionSet(p, ownNumbers(p, c, labels, chest).limit, labels), chests = names.filter(n => chest.includes(n)).length;
  const mixed = (names.includes('NORMAL') && names.length > 1) || (chests > 0 && chests < names.length);
  return mixed || names.length > c.abstain.max_set ? ['abstained', 'ambiguous'] : ['ok', 'ok'];
}

function severity(logits, label, c) {
  if (!logits || !c.severity?.graded.includes(label)) return 'unknown';
  return label === 'NORMAL' ? 'none' : ['mild', 'moderate', 'severe'][(logits[1] > 0) + (logits[2] > 0)];
}

// as NumPy's array_split: the first parts are the longer ones
const split = (n, parts) => Array.from({ length: parts }, (_, i) => { const start = i * Math.floor(n / parts) + Math.min(i, n % parts); return [start, start + Math.floor(n / parts) + (i < n % parts)]; });

const hotPart = heat => { const most = Math.max(...heat); return Array.from(heat, v => v > 0 && v >= 0.5 * most); };

// a hot part that covers more than the share `most` of the film is no place
export const isSpread = (heat, most) => hotPart(heat).filter(Boolean).length / heat.length > most;

// the strongest patch of a chest in the middle quarter, where spine and heart are, or in the lowest eighth, below the lungs
function besideLungs(heat, side) {
  const at = heat.indexOf(Math.max(...heat)), x = at % side, y = Math.floor(at / side);
  return Math.abs(x + 0.5 - side / 2) < side / 8 || y + 0.5 > side * 7 / 8;
}

export function zones(heat, side, chest, label, most) {
  const hot = hotPart(heat);
  if (label === 'NORMAL' || !hot.includes(true) || isSpread(heat, most) || chest && besideLungs(heat, side)) return [];
  const sum = ([top, bottom], [left, right]) => { let s = 0; for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) s += hot[y * side + x] ? heat[y * side + x] : 0; return s; };
  const heights = ['upper', 'middle', 'lower'], rows = split(side, 3), columns = split(side, 2);
  const cells = heights.flatMap((height, r) => chest ? ['right', 'left'].map((s, c) => [`${s} ${height} zone`, sum(rows[r], columns[c])]) : [[`${height} third of the film`, sum(rows[r], [0, side])]]);
  const ranked = cells.sort((a, b) => b[1] - a[1]);
  return ranked.slice(0, 2).filter(([, v]) => v >= 0.6 * ranked[0][1]).map(([name]) => name);
}
