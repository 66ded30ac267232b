// One pool as a lane of nodes.

import { html } from './vendor/htm-preact.js';
import { bytes, count, duration, percent, plural, rate, short } from './format.js';

/** Above this fraction of its KV blocks, a node preempts requests soon. */
const NEARLY_FULL = 0.9;

/** A node that was never reached has only an address. */
export const nameOf = (node) => node.node_id ?? node.url.replace(/^https?:\/\//, '');

const natural = new Intl.Collator('en', { numeric: true });

/** The nodes of a role by pool, both in a stable order. */
export function lanesOf(nodes, role) {
  const pools = new Map();
  for (const node of nodes) {
    if (node.role !== role) continue;
    const pool = node.pool ?? '';
    if (!pools.has(pool)) pools.set(pool, []);
    pools.get(pool).push(node);
  }
  const lanes = [...pools].map(([pool, members]) => ({
    pool,
    nodes: members.sort((a, b) => natural.compare(nameOf(a), nameOf(b))),
  }));
  return lanes.sort((a, b) => (a.pool === '') - (b.pool === '') || natural.compare(a.pool, b.pool));
}

/** An `optional` detail is left out where there is no room for it. */
function Bar({ label, part, all, text, detail, optional, warn, title }) {
  const known = all > 0;
  const fraction = known ? Math.min(1, part / all) : 0;
  return html`<div class="meter" title=${title}>
    <span class="label">${label}</span>
    <div
      class="track"
      role="meter"
      aria-label=${label}
      aria-valuemin="0"
      aria-valuemax=${known ? all : 0}
      aria-valuenow=${known ? part : 0}
      aria-valuetext=${[text, detail].filter(Boolean).join(' ')}
    >
      <div class=${`fill ${warn && fraction > NEARLY_FULL ? 'full' : ''}`} style=${{ width: `${fraction * 100}%` }}></div>
    </div>
    <span class="value">${text}${detail && html`<span class=${`detail ${optional ? 'blocks' : ''}`}> ${detail}</span>`}</span>
  </div>`;
}

function Figure({ label, value, unit, title }) {
  return html`<div class="number" title=${title}>
    <span class="label">${label}</span>
    <span class="value">${value}${unit && html`<small> ${unit}</small>`}</span>
  </div>`;
}

/** What the model of a node measures as its speed, in the unit of its role. */
function Pace({ node }) {
  if (node.role === 'prefill') {
    const pace = node.prefill_tokens_per_second;
    return html`<${Figure} label="Pace" value=${pace ? short(pace) : '–'} unit="tok/s" title="prompt tokens per second, measured" />`;
  }
  const step = node.decode_step_microseconds;
  const [value, unit] = duration(step ? step / 1e6 : undefined).split(' ');
  return html`<${Figure} label="Pace" value=${value} unit=${unit && `${unit}/step`} title="duration of a decode step, measured" />`;
}

/** Not only a colour: the state is a word, and the reason of an away node shows on hover and focus. */
function State({ node }) {
  if (node.state === 'serving') return null;
  const id = `error-${node.url.replace(/\W+/g, '-')}`;
  if (!node.error) return html`<span class=${`badge ${node.state}`}>${node.state}</span>`;
  return html`<span class="hint">
    <button type="button" class=${`badge ${node.state}`} aria-describedby=${id}>${node.state}</button>
    <span class="tip" role="tooltip" id=${id}>${node.error}</span>
  </span>`;
}

function Node({ node, askDrain }) {
  const name = nameOf(node);
  // The numbers of a node that is away are those of the past.
  const reached = node.state !== 'away' && node.total_blocks !== undefined;
  const used = reached ? node.total_blocks - node.free_blocks : undefined;
  const model = [node.model, node.weights].filter(Boolean).join(' · ');
  const handoffs = node.open_handoffs ?? 0;
  return html`<li class=${`node ${node.state}`} data-node=${name} data-role=${node.role}>
    <div class="who">
      <span class="name"><i class="dot" aria-hidden="true"></i><b title=${`${node.url} ${node.version ?? ''}`}>${name}</b>
        <${State} node=${node} />
      </span>
      <span class="model">${model || node.url}</span>
      ${node.state === 'serving' &&
      html`<button type="button" class="small" aria-label=${`Drain ${name}`} onClick=${() => askDrain(node)}>Drain</button>`}
    </div>
    ${node.state === 'away' && html`<p class="reason">${node.error || 'not connected'}</p>`}
    ${reached &&
    html`<${Bar} label="KV cache" part=${used} all=${node.total_blocks} warn
        text=${percent(used, node.total_blocks)} detail=${`of ${short(node.total_blocks)}`} optional
        title=${`${count(used)} of ${count(node.total_blocks)} KV blocks are in use`} />
      <${Bar} label="Batch" part=${node.running_requests} all=${node.max_running_requests}
        text=${count(node.running_requests)} detail=${`/ ${count(node.max_running_requests)}`}
        title=${`${plural(node.running_requests, 'running request')}, at most ${count(node.max_running_requests)}`} />
      <${Figure} label="Waiting" value=${short(node.waiting_requests)} title="requests that wait on this node" />
      <${Figure} label="Queued" value=${short(node.queued_tokens ?? 0)} title="prompt tokens that wait on this node" />
      <${Figure} label="Handoffs" value=${short(handoffs)} title="open handoffs" />
      <${Pace} node=${node} />`}
    ${node.stranded_bytes > 0 &&
    html`<p class="note">${bytes(node.stranded_bytes)} of KV are stranded: their requests ended, their transfers have not.</p>`}
  </li>`;
}

function laneSummary({ nodes }) {
  const serving = nodes.filter((node) => node.state === 'serving').length;
  const parts = [`${serving} of ${plural(nodes.length, 'node')} serving`];
  const pace = nodes.reduce((sum, node) => sum + (node.state === 'serving' ? (node.prefill_tokens_per_second ?? 0) : 0), 0);
  if (nodes[0].role === 'prefill' && pace > 0) parts.push(`${rate(pace)} tok/s`);
  return parts.join(' · ');
}

/** "prefill", "prefill-h100" and "prefill big": the role is not said twice. */
function PoolName({ role, pool }) {
  const said = pool.startsWith(role) ? pool : role;
  const rest = pool ? (said === pool ? '' : pool) : 'never reached';
  return html`<span class=${`role ${role}`}>${said}</span>${rest && ` ${rest}`}`;
}

/** The lanes of a role, with `children` below. */
export function Lanes({ role, lanes, askDrain, children }) {
  return html`<div class=${`side ${role}`}>
    ${lanes.length === 0 &&
    html`<section class="lane empty" aria-label=${`${role} nodes`}>
      <header><h3><span class=${`role ${role}`}>${role}</span></h3></header>
      <p>No ${role} node yet. The router takes requests and lets them wait.</p>
    </section>`}
    ${lanes.map(
      (lane) => html`<section class="lane" key=${lane.pool} aria-label=${`${role} pool ${lane.pool}`}>
        <header>
          <h3><${PoolName} role=${role} pool=${lane.pool} /></h3>
          <span class="muted">${laneSummary(lane)}</span>
        </header>
        <ul>${lane.nodes.map((node) => html`<${Node} key=${node.url} node=${node} askDrain=${askDrain} />`)}</ul>
      </section>`,
    )}
    ${children}
  </div>`;
}
