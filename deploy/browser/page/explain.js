// What an answer means, in the reviewed sentences of the server (language/wordings, or the facts' own language) and the bundle's facts.

const URGENCIES = ['routine', 'soon', 'urgent'];
const fill = (sentence, words) => sentence.replace(/\{(\w+)\}/g, (_, name) => words[name]);
const texts = (entry, ...kinds) => kinds.flatMap(k => entry[k] ?? []);
const joined = (words, last, { comma, beside, ...join }) => words.length === 1 ? words[0] : `${words.slice(0, -1).join(comma)}${beside}${join[last]}${beside}${words.at(-1)}`;

export const confidenceWord = p => p >= 0.9 ? 'very likely' : p >= 0.7 ? 'likely' : p >= 0.5 ? 'possible' : 'unclear';

function details(finding, said) {
  const { words } = said;
  const zones = finding.quality_flags.includes('sideways') ? [] : finding.zones;   // on its side left is not left
  const out = [], flags = finding.quality_flags.map(f => words.flags[f]).filter(Boolean), sides = [...new Set(zones.map(z => z.split(' ')[0]))].filter(w => w === 'left' || w === 'right');
  const side = sides.length ? words.side[sides.length === 2 ? 'both' : sides[0]] : '';
  if (zones.length) out.push(fill(said.place, { zones: joined(zones.map(z => words.zones[z]), 'zones', words.join), side }));
  if (words.severity[finding.severity]) out.push(fill(said.severity, { severity: words.severity[finding.severity] }));
  if (flags.length) out.push(fill(said.film, { flags: joined(flags, 'and', words.join) }));
  return out;
}

function others(finding, facts, said) {
  const others = finding.prediction_set.filter(l => l !== finding.label);
  if (others.includes('COVID19') && others.includes('PNEUMONIA')) { others.splice(others.indexOf('PNEUMONIA'), 1); others.splice(others.indexOf('COVID19') + 1, 0, 'PNEUMONIA'); }
  const another = finding.prediction_set.includes('COVID19') ? said.words.other_pneumonia : facts.classes.PNEUMONIA.name;
  const names = others.map(l => l === 'NORMAL' ? said.words.normal_film : l === 'PNEUMONIA' ? another : facts.classes[l].name);
  return names.length ? [fill(said.others, { others: joined(names, 'or', said.words.join), listed: joined(names, 'and', said.words.join) })] : [];
}

const highest = levels => URGENCIES[Math.max(...levels.map(l => URGENCIES.indexOf(l)))];
const lowest = levels => URGENCIES[Math.min(...levels.map(l => URGENCIES.indexOf(l)))];

// What to do first: the emergency department where severity asks for it, else the first step of what is not ruled out and asks for more than the answer.
// Of a film left open between fractures, the first step of the least urgent.
function firstStep(entry, level, floor, finding, facts, open) {
  if (floor === level && (level === 'urgent' || level !== entry.urgency && level !== 'routine')) return facts.escalation[level][0];
  if (open.length) return texts(facts.classes[[...open].sort((a, b) => URGENCIES.indexOf(facts.classes[a].urgency) - URGENCIES.indexOf(facts.classes[b].urgency) || finding.probabilities[b] - finding.probabilities[a])[0]], 'next_steps')[0];
  if (level === entry.urgency) return texts(entry, 'next_steps')[0];
  const asks = finding.prediction_set.filter(l => facts.classes[l].urgency === level).sort((a, b) => finding.probabilities[b] - finding.probabilities[a])[0];
  return texts(facts.classes[asks], 'next_steps')[0];
}

// What to do until an illness is ruled out that is not the answer.
function whileOpen(entry, finding, facts) {
  const asked = finding.prediction_set.filter(l => l !== finding.label).flatMap(l => texts(facts.classes[l], 'while_open'));
  return [...new Set(asked)].filter(t => !texts(entry, 'next_steps', 'while_open').includes(t));
}

export function explain({ status, reason_code, finding }, { facts, said }) {
  const ok = status === 'ok', entry = ok ? facts.classes[finding.label] : facts.no_answer[reason_code];
  const held = finding && (ok || ['low_confidence', 'ambiguous'].includes(reason_code)) ? finding.prediction_set.map(l => facts.classes[l].urgency) : [];
  const floor = ok ? facts.severity_floor[finding.severity] : 'routine';
  const urgency = highest([entry.urgency, floor, ...(ok ? held : held.length ? [lowest(held)] : [])]);
  const open = !ok && held.length && finding.prediction_set.every(l => l.startsWith('FRACTURE')) ? finding.prediction_set : [];
  const notes = ok ? finding.quality_flags.map(f => facts.film_notes?.[f]).filter(Boolean) : [];
  const lead = ok && (finding.label === 'NORMAL' ? said.normal : finding.label.startsWith('FRACTURE') ? said.lead_limb : said.lead);   // it knows no unbroken limb
  const summary = !ok ? said.none[status] : fill(lead, { ...entry.forms, name: entry.name, word: said.words.word[confidenceWord(finding.probability)] });
  const limits = texts(entry, 'limits'), first = ok && finding.label === 'NORMAL';   // nobody reads on after good news
  const told = ok ? [...others(finding, facts, said), ...texts(entry, 'what_it_is', 'feels_like'), ...details(finding, said), fill(said.closing, said.words)] : texts(entry, 'what_it_is');
  return { summary, details: [...(first ? limits : []), ...told, ...texts(entry, 'caveat'), ...notes, ...(first ? [] : limits), ...texts(entry, 'doctor_may_check')].join(' '), next_steps: [firstStep(entry, urgency, floor, finding, facts, open), ...texts(entry, 'next_steps').slice(1), ...(ok ? whileOpen(entry, finding, facts) : []), ...texts(entry, 'urgent_signs')], urgency };
}
