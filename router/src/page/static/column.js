// The answer of one model, while it streams and afterwards.

import { html, useEffect, useRef, useState } from './vendor/htm-preact.js';
import { Answer } from './answer.js';
import { count, duration, plural, rate } from './format.js';
import { Output } from './output.js';
import { Waterfall } from './waterfall.js';

/** `wish` is one request that the user sent. A new wish replaces the answer. */
export function Column({ wish, report, unauthorized }) {
  const place = useRef(null);
  const answer = useRef(null);
  const [, render] = useState(0);
  useEffect(() => {
    const output = new Output(place.current);
    const current = new Answer(wish.request, output, () => render((value) => value + 1));
    answer.current = current;
    report(current);
    current.run().then(() => {
      report(current);
      if (current.unauthorized) unauthorized();
    });
    // Elapsed time goes on while nothing arrives.
    const tick = setInterval(() => current.running && current.changed(), 250);
    return () => {
      clearInterval(tick);
      current.stop();
      output.stop();
    };
  }, []);
  return html`<article class="answer" aria-label=${`Answer of ${wish.request.body.model}`}>
    ${answer.current && html`<${Head} answer=${answer.current} />`}
    <div class="text" ref=${place} tabindex="0" role="region" aria-label=${`Text of ${wish.request.body.model}`}></div>
    ${answer.current && html`<${Foot} answer=${answer.current} />`}
  </article>`;
}

function Head({ answer }) {
  const { status, running } = answer;
  return html`<header>
      <h3>${answer.model}</h3>
      <span class=${`badge ${status.replace(' ', '-')}`} role="status">${status}</span>
      ${running && html`<button type="button" class="small" aria-label=${`Stop ${answer.model}`} onClick=${() => answer.stop()}>Stop</button>`}
    </header>
    <dl class="speed">
      <div><dt>Tokens/s</dt><dd class="big">${rate(answer.speedNow ?? answer.speed)}</dd></div>
      <div><dt>TTFT</dt><dd>${duration(answer.ttft)}</dd></div>
      <div><dt>ITL</dt><dd>${duration(answer.speed && 1 / answer.speed)}</dd></div>
      <div><dt>Tokens</dt><dd>${count(answer.tokens)}</dd></div>
      <div><dt>Time</dt><dd>${answer.elapsed.toFixed(1)} s</dd></div>
    </dl>`;
}

const REASONS = { stop: 'end of text or stop text', length: 'max_tokens reached' };

function Foot({ answer }) {
  const { usage } = answer;
  const makers = [...answer.makers].filter(([maker]) => maker.stage);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  return html`<footer>
    ${answer.error && html`<p class="error" role="alert">${answer.error}</p>`}
    ${answer.status === 'cut off' && html`<p class="error" role="alert">The stream ended before the answer did.</p>`}
    ${makers.length > 0 &&
    html`<ul class="keys" aria-label="Tokens made by">
      ${makers.map(
        ([maker, tokens]) => html`<li><span class=${maker.css}>${maker.stage}</span> ${maker.model} <b>${plural(tokens, 'token')}</b></li>`,
      )}
    </ul>`}
    ${usage &&
    html`<p class="muted">
      ${plural(usage.prompt_tokens, 'prompt token')}${cached > 0 && `, ${count(cached)} of them cached`}${answer.finish &&
      ` · finish_reason ${answer.finish}${REASONS[answer.finish] ? ` (${REASONS[answer.finish]})` : ''}`}
    </p>`}
    ${answer.timings && html`<${Waterfall} timings=${answer.timings} />`}
  </footer>`;
}
