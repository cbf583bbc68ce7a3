// The page: a film in, a card out. What it says comes from page.json; what it decides, from reader.js.
import { confidenceWord, explain } from './explain.js';

const $ = selector => document.querySelector(selector);
const page = await (await fetch('page.json', { cache: 'no-cache' })).json(), { words: S, names } = page;
const worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' }), waiting = new Map();
const fill = (sentence, values) => sentence.replace(/\{(\w+)(:[^}]*)?\}/g, (_, name) => values[name]);
const percent = p => p < 0.005 ? '<1' : String(Math.min(99, Math.round(100 * p)));
let asked = 0;

function make(tag, more = {}, ...children) {
  const { data = {}, style = {}, ...rest } = more, e = Object.assign(document.createElement(tag), rest);
  Object.assign(e.dataset, data);
  for (const [k, v] of Object.entries(style)) e.style.setProperty(k, v);
  e.append(...children.flat().filter(c => c != null && c !== false));
  return e;
}

// ---- pictures

const blobOf = canvas => new Promise(done => canvas.toBlob(b => done(URL.createObjectURL(b))));

function canvasOf(pixels, width, height, colour) {
  const c = make('canvas', { width, height }), context = c.getContext('2d'), picture = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) picture.data.set(colour(pixels[i]), 4 * i);
  context.putImageData(picture, 0, 0);
  return c;
}

function within(canvas, most = 1024) {
  const k = Math.min(1, most / Math.max(canvas.width, canvas.height)), small = make('canvas', { width: Math.max(1, Math.round(canvas.width * k)), height: Math.max(1, Math.round(canvas.height * k)) });
  const context = small.getContext('2d');
  context.imageSmoothingQuality = 'high';
  context.drawImage(canvas, 0, 0, small.width, small.height);
  return small;
}

// The colours and their strength are those of vision/classify's heat_overlay.
async function heatPicture(heat, side, width, height) {
  const { resized } = await import('./picture.js'), most = Math.max(...heat, 1e-9), stops = page.heat_colours, last = stops.length - 1;
  const fine = resized(Float32Array.from(heat, v => Math.max(0, v) / most), side, side, width, height, 'bicubic');
  return canvasOf(fine, width, height, v => {
    const h = Math.min(1, Math.max(0, v)), at = Math.min(last - 1, Math.floor(h * last)), part = h * last - at;
    const rgb = stops[at].map((c, k) => c + (stops[at + 1][k] - c) * part);
    return [...rgb, 255 * 0.6 * Math.min(1, Math.max(0, (h - 1 / 3) * 1.5))];
  });
}

// ---- the card

const article = (data, ...inside) => make('article', { className: 'cxr', data }, ...inside, make('p', { className: 'disclaimer', textContent: S.disclaimer }));

function waitingCard() {
  const kinds = Object.entries(page.knows).flatMap(([kind, list]) => [make('dt', { textContent: S.knows_kinds[kind] }), make('dd', { textContent: list.join(', ') })]);
  return article({ status: 'waiting' }, make('h2', { textContent: S.waiting_title }), make('p', { className: 'sure', textContent: page.own.waiting }),
    make('section', { style: { 'margin-top': '1.2rem' } }, make('h3', { textContent: S.knows }), make('dl', { className: 'long' }, kinds), make('p', { className: 'soft', style: { 'margin-top': '.7rem' }, textContent: S.knows_not })));
}

const workingCard = () => article({ status: 'working' }, make('p', { className: 'pending sure', textContent: S.working }));

const errorCard = ({ code, message, hint }) => article({ status: 'error' }, make('h2', { textContent: S.error }), make('p', { className: 'sure', textContent: code === 'internal_error' ? S.error_internal : page.errors[code] ?? message }),
  make('p', { textContent: page.errors[code] ? '' : hint }), make('p', { className: 'soft', style: { 'margin-top': '.6rem' } }, `${S.error_code}: `, make('code', { textContent: code })));

function bar({ probabilities: p, prediction_set: kept }, label) {
  return make('div', { className: kept.includes(label) ? 'bar in' : 'bar' }, make('span', { className: 'n', textContent: names[label] }),
    make('span', { className: 'rail' }, make('i', { style: { width: `${(100 * p[label]).toFixed(1)}%` } })), make('b', { textContent: `${percent(p[label])} %` }));
}

function setSentence({ label, prediction_set: kept, coverage, probabilities: { NORMAL: normal } }) {
  const others = kept.filter(l => l !== label).map(l => names[l]);
  const kind = label.startsWith('FRACTURE') ? '_limb' : label !== 'NORMAL' && normal >= page.may_be_normal ? '_normal' : '';
  return fill(S[(others.length ? 'set_many' : 'set_one') + kind], { coverage: Math.round(100 * coverage), names: others.join(', '), percent: percent(normal) });
}

const placeWords = ({ finding, spread }) => spread ? S.zones_spread : finding.zones.map(z => S.places[z]).join(', ') || S.zones_none;

async function pictures(answer) {
  const { film, status, finding, spread, heat, side } = answer, ok = status === 'ok';
  const whole = within(canvasOf(film.pixels, film.width, film.height, v => [v, v, v, 255])), src = await blobOf(whole), what = S[status === 'rejected' ? 'picture' : 'film'];
  const stack = (...inside) => make('div', { className: 'stack' }, inside);
  const plain = make('figure', { className: 'plain' }, stack(make('img', { src, alt: what })), make('figcaption', { textContent: ok && spread ? `${what}. ${S.heat_spread}` : what }));
  if (!ok || spread) return make('div', { className: 'pictures single' }, plain);
  const over = make('img', { className: 'over', src: await blobOf(await heatPicture(heat, side, whole.width, whole.height)), alt: `${S.heat}: ${placeWords(answer)}` });
  const slider = make('input', { type: 'range', min: 0, max: 100, value: 100, ariaLabel: S.opacity });
  const figure = make('figure', {}, stack(make('img', { src, alt: '' }), over), make('label', { className: 'slider' }, S.opacity, slider),
    make('figcaption', { textContent: `${S.heat}. ${S[page.chest.includes(finding.label) ? 'heat_note' : 'heat_note_limb']}` }));
  slider.oninput = () => figure.style.setProperty('--heat', slider.value / 100);
  return make('div', { className: 'pictures two' }, plain, figure);
}

async function answerCard(answer, example) {
  const { status, reason_code, finding: f, timings } = answer, ok = status === 'ok', said = page.facts && explain(answer, page);
  const chest = l => page.chest.includes(l), mine = f && Object.keys(names).filter(l => chest(l) === chest(f.label)).length;   // of the answer's part of the body
  const ranked = f && Object.keys(names).sort((a, b) => (chest(b) === chest(f.label)) - (chest(a) === chest(f.label)) || f.probabilities[b] - f.probabilities[a]), flags = f?.quality_flags ?? [];
  const bars = f && (ok ? [make('h3', { textContent: S.confidence }), ...ranked.slice(0, mine).map(l => bar(f, l)), make('details', {}, make('summary', { textContent: fill(S.more, { n: ranked.length - mine }) }), ranked.slice(mine).map(l => bar(f, l)))]
    : [make('details', {}, make('summary', { textContent: S.considered }), ranked.map(l => bar(f, l)))]);
  const headline = ok ? names[f.label] : S.headline[status];
  const ms = timings && Object.values(timings).reduce((a, b) => a + b, 0);
  return article({ status, reason: reason_code, label: ok ? f.label : '' },
    make('div', { className: 'top' }, make('h2', { textContent: example ? fill(S.example, { headline }) : headline }), said && (ok || said.urgency !== 'routine') && make('span', { className: `chip ${said.urgency}`, textContent: S.urgency[said.urgency] })),
    example && make('p', { className: 'note', textContent: page.own.example }),
    ok ? make('p', { className: 'sure', textContent: fill(S[f.label.startsWith('FRACTURE') ? 'confidence_line_limb' : 'confidence_line'], { word: S.certainty[confidenceWord(f.probability)], percent: percent(f.probability) }) }) : !said && make('p', { className: 'sure', textContent: S.reason[reason_code] }),
    ok && make('p', { className: 'soft', textContent: setSentence(f) }),
    make('div', { className: ok && !answer.spread ? 'grid' : 'grid alone' }, make('section', { className: 'pic' }, await pictures(answer)),
      said && make('section', { className: 'text' }, make('h3', { textContent: S.explanation }), make('p', { lang: page.facts.language, dir: page.facts.dir, textContent: said.summary }), make('p', { lang: page.facts.language, dir: page.facts.dir, textContent: said.details }),
        make('h3', { style: { 'margin-top': '1rem' }, textContent: S.next_steps }), make('ul', { lang: page.facts.language, dir: page.facts.dir }, said.next_steps.map(t => make('li', { textContent: t }))), make('p', { className: 'soft', textContent: page.own.adults }), make('p', { className: 'soft', textContent: S.source.template })),
      bars && make('section', { className: 'bars' }, bars),
      (ok || flags.length > 0) && make('section', { className: 'about' }, make('h3', { textContent: S.quality }),
        ok && make('dl', {}, make('dt', { textContent: S.zones }), make('dd', { textContent: placeWords(answer) }), make('dt', { textContent: S.severity }), make('dd', { textContent: S.severities[f.severity] })),
        flags.length > 0 && make('ul', {}, flags.map(q => make('li', { textContent: S.flags[q] }))))),
    make('p', { className: 'end' }, make('span', { textContent: `${S.model} ${page.version}` }), ms && make('span', { textContent: fill(S.time, { ms: Math.round(ms) }) })));
}

// ---- what happens

function show(card) {
  for (const img of document.querySelectorAll('#answer img')) URL.revokeObjectURL(img.src);   // the film before is not kept
  $('#answer').replaceChildren(card);
  const { top } = $('#answer').getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $('#answer').scrollIntoView({ block: 'start' });
}

async function read(file, example = false) {
  const id = ++asked;
  $('main').classList.add('read');
  show(workingCard());
  const answer = await new Promise(done => { waiting.set(id, done); file.arrayBuffer().then(b => worker.postMessage({ id, bytes: new Uint8Array(b) }, [b]), () => done({ error: { code: 'upload_gone', message: S.error_internal, hint: '' } })); });
  waiting.delete(id);
  const card = answer.error ? errorCard(answer.error) : await answerCard(answer.answer, example).catch(() => errorCard({ code: 'internal_error', hint: '' }));
  if (id === asked) show(card);   // an answer to an earlier film must not stand under a later one
}

worker.onmessage = ({ data }) => {
  if (data.id) return waiting.get(data.id)?.(data);
  const load = $('#load');
  if (data.share !== undefined) load.querySelector('progress').value = data.share;
  if (data.ready) { load.classList.add('done'); load.lastElementChild.textContent = page.own.ready; }
  if (data.broken) broken(data.broken.code);
};
worker.onerror = () => broken('no_worker');   // a browser from before 2023

function broken(code) {
  $('#load').classList.add('done', 'broken');
  $('#load').lastElementChild.textContent = `${page.own.broken} (${code})`;
}

Object.assign(document.documentElement, { lang: S.language, dir: page.dir });
document.title = $('h1').textContent = S.title;
$('header p').textContent = S.tagline;
$('#side h2').textContent = S.drop;
$('#note').textContent = page.own.drop_note;
$('#drop span').textContent = page.own.choose;
$('#load span').textContent = fill(page.own.loading, { mb: Math.round(Object.values(page.files).reduce((n, f) => n + f.bytes, 0) / 1e6) });
$('#always').textContent = S.disclaimer;
show(waitingCard());

$('#trial').hidden = !page.examples.length;
$('#trial h2').textContent = S.examples;
$('#trial p').textContent = S.examples_note;
$('#examples').append(...page.examples.map(({ file, caption }) => {
  const button = make('button', { type: 'button' }, make('img', { src: file, alt: '', loading: 'lazy' }), make('span', { textContent: caption }));
  button.onclick = async () => read(await (await fetch(file)).blob(), true);
  return button;
}));

const input = $('#drop input');
input.onchange = () => { if (input.files.length) read(input.files[0]); input.value = ''; };
for (const kind of ['dragover', 'dragleave', 'drop']) addEventListener(kind, e => { e.preventDefault(); $('#drop').classList.toggle('over', kind === 'dragover'); });
addEventListener('drop', e => { if (e.dataTransfer.files.length) read(e.dataTransfer.files[0]); });
