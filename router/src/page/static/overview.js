// The overview: what the cluster does now, and how fast it was.

import { html, useEffect, useLayoutEffect, useRef, useState } from './vendor/htm-preact.js';
import { Chart } from './charts.js';
import { DrainDialog } from './drain.js';
import { Flows, fresh } from './flows.js';
import { count, duration, percent, plural, rate } from './format.js';
import { Lanes, lanesOf } from './nodes.js';
import { Handoffs, Models, Queue } from './panels.js';

const TTFT = [
  { field: 'ttft_p50', label: 'p50', color: '--prefill', key: 'prefill' },
  { field: 'ttft_p95', label: 'p95', color: '--prefill-soft', key: 'prefill soft' },
];
const ITL = [
  { field: 'itl_p50', label: 'p50', color: '--decode', key: 'decode' },
  { field: 'itl_p95', label: 'p95', color: '--decode-soft', key: 'decode soft' },
];

/** Values older than this say nothing about now. */
const RECENT_SECONDS = 60;

function Tile({ label, value, unit, detail, bad }) {
  return html`<div class="tile">
    <dt>${label}</dt>
    <dd><b class=${bad ? 'bad' : ''}>${value}</b>${unit && html`<small>${unit}</small>`}<span>${detail}</span></dd>
  </div>`;
}

function kvOf(nodes, role) {
  let used = 0;
  let all = 0;
  for (const node of nodes) {
    if (node.role !== role || node.total_blocks === undefined) continue;
    used += node.total_blocks - node.free_blocks;
    all += node.total_blocks;
  }
  return percent(used, all);
}

function Tiles({ state }) {
  const { nodes, queue, history, now } = state;
  const of = (wanted) => nodes.filter((node) => node.state === wanted).length;
  const points = history.points.filter((point) => now - point.t <= RECENT_SECONDS);
  const recent = (field) => points.findLast((point) => point[field] !== null)?.[field];
  const lastPoint = points.at(-1);
  const off = [of('draining') && `${of('draining')} draining`, of('away') && `${of('away')} away`].filter(Boolean);
  return html`<dl class="tiles">
    <${Tile} label="Nodes serving" value=${of('serving')} unit=${`of ${nodes.length}`} detail=${off.join(', ') || (nodes.length ? 'all well' : 'none has joined')} />
    <${Tile} label="Requests running" value=${count(queue.running)} detail=${`${count(queue.waiting)} waiting`} />
    <${Tile} label="Tokens/s" value=${lastPoint ? rate(lastPoint.tokens / history.interval_seconds) : '–'}
      detail=${lastPoint ? `${plural(lastPoint.requests, 'request')} in ${history.interval_seconds} s` : 'no request yet'} />
    <${Tile} label="TTFT p50" value=${duration(recent('ttft_p50'))} detail=${`p95 ${duration(recent('ttft_p95'))}`} />
    <${Tile} label="ITL p50" value=${duration(recent('itl_p50'))} detail=${`p95 ${duration(recent('itl_p95'))}`} />
    <${Tile} label="KV cache, decode" value=${kvOf(nodes, 'decode')} detail=${`prefill ${kvOf(nodes, 'prefill')}`} />
  </dl>`;
}

function Cluster({ state, askDrain }) {
  const root = useRef(null);
  const svg = useRef(null);
  const dots = useRef(null);
  const flows = useRef(null);
  useLayoutEffect(() => {
    flows.current = new Flows(root.current, svg.current, dots.current);
    return () => flows.current.stop();
  }, []);
  useEffect(() => flows.current.update(state.handoffs, fresh(state)), [state]);
  return html`<section class="cluster" ref=${root} aria-label="Pools">
    <${Lanes} role="prefill" lanes=${lanesOf(state.nodes, 'prefill')} askDrain=${askDrain}><${Queue} queue=${state.queue} /><//>
    <${Lanes} role="decode" lanes=${lanesOf(state.nodes, 'decode')} askDrain=${askDrain} />
    <span class="channel" aria-hidden="true">KV cache →</span>
    <svg class="flows" ref=${svg} aria-hidden="true"></svg>
    <div class="dots" ref=${dots} aria-hidden="true"></div>
  </section>`;
}

export function Overview({ state, refresh, unauthorized }) {
  const [draining, setDraining] = useState(null);
  if (!state) return html`<p class="wait" role="status">Waiting for the router's state …</p>`;
  return html`<div class="overview">
    <h1 class="hidden">Overview</h1>
    <${Tiles} state=${state} />
    <${Cluster} state=${state} askDrain=${setDraining} />
    <div class="charts">
      <${Chart} title="TTFT" meaning="Time to first token" series=${TTFT} history=${state.history} now=${state.now} />
      <${Chart} title="ITL" meaning="Inter-token latency" series=${ITL} history=${state.history} now=${state.now} />
    </div>
    <div class="panels">
      <${Handoffs} handoffs=${state.handoffs} now=${state.now} />
      <${Models} models=${state.models} />
    </div>
    ${draining &&
    html`<${DrainDialog} node=${draining} nodes=${state.nodes} close=${() => setDraining(null)} drained=${refresh} unauthorized=${unauthorized} />`}
  </div>`;
}
