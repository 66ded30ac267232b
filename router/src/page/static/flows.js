// Handoffs drawn over the lanes: a curve per pair of nodes, and a dot that moves along it for each new handoff.

const SVG = 'http://www.w3.org/2000/svg';
/** How long a dot moves. Slower than most handoffs, or nobody would see it. */
const FLIGHT_MS = 900;
/** New handoffs of one poll are spread over the time until the next one. */
const SPREAD_MS = 1000;
/** More dots at a time would be a blur, and cost frames. */
const MOST_DOTS = 24;

// Survive the view: a handoff that was drawn once is not drawn again after the user comes back.
let router = null;
let last = null;

/** The handoffs that no earlier call returned. The first call returns none: they are history. */
export function fresh(state) {
  const newest = state.handoffs.reduce((most, handoff) => Math.max(most, handoff.id), -1);
  // A restarted router counts from the start.
  const known = state.router_id === router ? last : newest;
  router = state.router_id;
  last = Math.max(newest, known ?? newest);
  return state.handoffs.filter((handoff) => handoff.id > known).slice(-MOST_DOTS);
}

const still = matchMedia('(prefers-reduced-motion: reduce)');

export class Flows {
  constructor(root, svg, dots) {
    this.root = root;
    this.svg = svg;
    this.dots = dots;
    this.handoffs = [];
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(root);
  }

  /** Takes all handoffs for the curves, and the new ones for the dots. */
  update(handoffs, news) {
    this.handoffs = handoffs;
    const paths = this.draw();
    if (still.matches || news.length === 0 || document.hidden) return;
    const first = Math.min(...news.map((handoff) => handoff.ended));
    const span = Math.max(...news.map((handoff) => handoff.ended)) - first || 1;
    for (const handoff of news) {
      const path = paths.get(pair(handoff));
      if (path) this.fly(path, handoff, ((handoff.ended - first) / span) * SPREAD_MS);
    }
  }

  draw() {
    const box = this.root.getBoundingClientRect();
    const places = new Map();
    for (const node of this.root.querySelectorAll('[data-node]')) {
      places.set(`${node.dataset.role} ${node.dataset.node}`, node.getBoundingClientRect());
    }
    const numbers = new Map();
    for (const handoff of this.handoffs) numbers.set(pair(handoff), (numbers.get(pair(handoff)) ?? 0) + 1);
    const most = Math.max(1, ...numbers.values());
    const paths = new Map();
    const curves = [];
    for (const [name, number] of numbers) {
      const [from, to] = name.split('\n');
      const path = curve(places.get(`prefill ${from}`), places.get(`decode ${to}`), box);
      if (!path) continue;
      paths.set(name, path);
      const element = document.createElementNS(SVG, 'path');
      element.setAttribute('d', path);
      element.setAttribute('stroke-width', (1 + (2 * number) / most).toFixed(2));
      curves.push(element);
    }
    this.svg.replaceChildren(...curves);
    return paths;
  }

  fly(path, handoff, delay) {
    const dot = document.createElement('i');
    const size = Math.min(12, 5 + Math.log2(1 + handoff.bytes / 65536));
    dot.style.width = `${size}px`;
    dot.style.height = `${size}px`;
    dot.style.offsetPath = `path("${path}")`;
    this.dots.append(dot);
    const flight = dot.animate(
      [
        { offsetDistance: '0%', opacity: 0 },
        { offsetDistance: '12%', opacity: 1, offset: 0.12 },
        { offsetDistance: '88%', opacity: 1, offset: 0.88 },
        { offsetDistance: '100%', opacity: 0 },
      ],
      { duration: FLIGHT_MS, delay, easing: 'ease-in-out', fill: 'both' },
    );
    flight.onfinish = () => dot.remove();
    flight.oncancel = () => dot.remove();
  }

  stop() {
    this.observer.disconnect();
    this.dots.replaceChildren();
  }
}

const pair = (handoff) => `${handoff.prefill_node}\n${handoff.decode_node}`;

/** From the right edge of one box to the left edge of the other, or along the right side if they are stacked. */
function curve(from, to, box) {
  if (!from || !to) return null;
  const y1 = from.top + from.height / 2 - box.top;
  const y2 = to.top + to.height / 2 - box.top;
  const x1 = from.right - box.left;
  if (to.left >= from.right) {
    const x2 = to.left - box.left;
    const middle = (x1 + x2) / 2;
    return `M${x1} ${y1} C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`;
  }
  const x2 = to.right - box.left;
  const out = box.width - 1;
  return `M${x1} ${y1} C${out} ${y1} ${out} ${y1} ${out} ${(y1 + y2) / 2} S${out} ${y2} ${x2} ${y2}`;
}
