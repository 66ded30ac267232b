// The legs of a request as bars on one time axis.

import { html, useState } from './vendor/htm-preact.js';
import { bytes, count, duration, plural } from './format.js';

/** Where each leg happens, and the words for it. */
const LEGS = {
  tokenize: { label: 'tokenize', place: () => 'router', stage: 'router' },
  queue: { label: 'queue', place: () => 'router', stage: 'router' },
  reserve: { label: 'reserve', place: (t) => t.decode_node || t.prefill_node, stage: 'router' },
  prefill_queue: { label: 'prefill queue', place: (t) => t.prefill_node, stage: 'queue' },
  prefill: { label: 'prefill', place: (t) => t.prefill_node, stage: 'prefill' },
  handoff: { label: 'handoff', place: (t) => `${t.prefill_node} → ${t.decode_node}`, stage: 'handoff' },
  first_decode_step: { label: 'first decode step', place: (t) => t.decode_node, stage: 'decode' },
  decode: { label: 'decode', place: (t) => t.decode_node, stage: 'decode' },
};

/** Legs with their begin, in order. Legs of no known name are shown as they are. */
function placed(timings) {
  let begin = 0;
  return timings.legs.map(({ leg, seconds }) => {
    const known = LEGS[leg] ?? { label: leg, place: () => '', stage: 'router' };
    const row = { leg, label: known.label, stage: known.stage, place: known.place(timings) || '–', seconds, begin };
    begin += seconds;
    return row;
  });
}

const share = (part, all) => `${(100 * part) / all}%`;

function Row({ row, all, overlap }) {
  const bar = { left: share(row.begin, all), width: share(row.seconds, all) };
  return html`<tr>
    <th scope="row">${row.label}<small class="under" aria-hidden="true">${row.place}</small></th>
    <td class="place" title=${row.place}>${row.place}</td>
    <td class="bars" aria-hidden="true">
      <div>
        ${overlap && html`<i class="bar overlap" style=${{ left: share(overlap.begin, all), width: share(overlap.seconds, all) }}></i>`}
        <i class=${`bar ${row.stage}`} style=${bar}></i>
      </div>
    </td>
    <td class="n">${duration(row.seconds)}</td>
  </tr>`;
}

/** The part of the transfer that ran while the prompt was still computed. It is before the leg. */
function overlapOf(row, handoff) {
  if (row.leg !== 'handoff' || !handoff) return null;
  const seconds = Math.min(row.begin, Math.max(0, handoff.seconds - handoff.exposed_seconds));
  return seconds > 0 ? { begin: row.begin - seconds, seconds } : null;
}

export function Waterfall({ timings }) {
  const [short, setShort] = useState(false);
  const rows = placed(timings).filter((row) => !short || row.leg !== 'decode');
  const all = rows.reduce((sum, row) => sum + row.seconds, 0) || 1;
  const { handoff } = timings;
  return html`<figure class="waterfall">
    <figcaption>
      <span>Legs of the request</span>
      <label class="check"><input type="checkbox" checked=${short} onChange=${(event) => setShort(event.target.checked)} />without decode</label>
    </figcaption>
    <table>
      <thead class="hidden"><tr><th scope="col">Leg</th><th scope="col">Where</th><td></td><th scope="col">Time</th></tr></thead>
      <tbody>${rows.map((row) => html`<${Row} key=${row.leg} row=${row} all=${all} overlap=${overlapOf(row, handoff)} />`)}</tbody>
    </table>
    <${Facts} timings=${timings} />
  </figure>`;
}

function Facts({ timings }) {
  const { handoff } = timings;
  const facts = [
    ['Handoff', handoff ? `${bytes(handoff.bytes)} in ${duration(handoff.seconds)}` : 'none'],
    handoff && ['Exposed', duration(handoff.exposed_seconds)],
    ['Cached tokens, prefill', count(timings.prefill_cached_tokens)],
    ['Held tokens, decode', count(timings.decode_held_tokens)],
    ['TTFT, router', duration(timings.ttft_seconds)],
    ['Mean ITL', duration(timings.mean_itl_seconds)],
    ['Total', duration(timings.total_seconds)],
    timings.migrations > 0 && ['Moved', plural(timings.migrations, 'time')],
  ].filter(Boolean);
  return html`<dl class="facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}
