// Queue, handoffs and models as tables.

import { html } from './vendor/htm-preact.js';
import { bytes, count, duration } from './format.js';

const SHOWN_HANDOFFS = 8;
/** The router keeps the list of tenants short, but a table of hundreds would push the rest away. */
const SHOWN_TENANTS = 12;

export function Queue({ queue }) {
  const tenants = [...queue.by_tenant].sort((a, b) => b.running + b.waiting - a.running - a.waiting);
  const most = Math.max(1, ...tenants.map((tenant) => tenant.running + tenant.waiting));
  const width = (value) => ({ width: `${(100 * value) / most}%` });
  return html`<section class="panel queue" aria-label="Queue">
    <header><h2>Queue</h2><span class="muted">${count(queue.running)} running, ${count(queue.waiting)} waiting</span></header>
    ${tenants.length === 0
      ? html`<p class="nothing">No request</p>`
      : html`<table>
          <thead><tr><th scope="col">Tenant</th><th scope="col" class="n">Running</th><th scope="col" class="n">Waiting</th><td class="share"></td></tr></thead>
          <tbody>
            ${tenants.slice(0, SHOWN_TENANTS).map(
              ({ tenant, running, waiting }) => html`<tr key=${tenant}>
                <th scope="row">${tenant || 'no name'}</th><td class="n">${count(running)}</td><td class="n">${count(waiting)}</td>
                <td class="share" aria-hidden="true"><div class="stack"><i class="running" style=${width(running)}></i><i class="waiting" style=${width(waiting)}></i></div></td>
              </tr>`,
            )}
          </tbody>
        </table>`}
    ${tenants.length > SHOWN_TENANTS && html`<p class="muted">and ${tenants.length - SHOWN_TENANTS} more tenants</p>`}
  </section>`;
}

export function Handoffs({ handoffs, now }) {
  const newest = handoffs.slice(-SHOWN_HANDOFFS).reverse();
  return html`<section class="panel handoffs" aria-label="Handoffs">
    <header><h2>Handoffs</h2><span class="muted">KV cache from prefill to decode, newest first</span></header>
    ${newest.length === 0
      ? html`<p class="nothing">No handoff yet</p>`
      : html`<div class="scroll"><table>
          <thead><tr><th scope="col">From</th><th scope="col">To</th><th scope="col" class="n">Size</th><th scope="col" class="n">Time</th>
            <th scope="col" class="n" title="the part of the transfer after the prefill was computed">Exposed</th><th scope="col" class="n">Ago</th></tr></thead>
          <tbody>
            ${newest.map(
              (handoff) => html`<tr key=${handoff.id}>
                <td class="prefill">${handoff.prefill_node}</td><td class="decode">${handoff.decode_node}</td>
                <td class="n">${bytes(handoff.bytes)}</td><td class="n">${duration(handoff.seconds)}</td>
                <td class="n">${duration(handoff.exposed_seconds)}</td><td class="n">${Math.max(0, now - handoff.ended).toFixed(0)} s</td>
              </tr>`,
            )}
          </tbody>
        </table></div>`}
  </section>`;
}

export function Models({ models }) {
  return html`<section class="panel models" aria-label="Models">
    <header><h2>Models</h2></header>
    ${models.length === 0
      ? html`<p class="nothing">No model: no node has joined, and none is configured</p>`
      : html`<div class="scroll"><table>
          <thead><tr><th scope="col">Model</th><th scope="col">Full model</th><th scope="col" class="n">Context</th><th scope="col">State</th></tr></thead>
          <tbody>
            ${models.map(
              (model) => html`<tr key=${model.name}>
                <th scope="row">${model.name}</th><td>${model.full_model ?? '–'}</td><td class="n">${count(model.max_context_tokens)}</td>
                <td>${model.served ? html`<span class="badge served">served</span>` : html`<span class="badge draining" title="Requests wait until a node has joined">no node yet</span>`}</td>
              </tr>`,
            )}
          </tbody>
        </table></div>`}
  </section>`;
}
