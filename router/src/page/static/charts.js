// TTFT and ITL of the last 15 minutes.

import { html, useEffect, useRef, useState } from './vendor/htm-preact.js';
import { clock, duration } from './format.js';

const { uPlot } = window;
const MINUTES = 15;
const HEIGHT = 150;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Columns for uPlot. Where an interval is missing, a null makes a gap. */
export function columns(history, names) {
  const rows = [[], ...names.map(() => [])];
  let before = null;
  for (const point of history.points) {
    if (before !== null && point.t - before > history.interval_seconds * 1.5) {
      rows[0].push(before + history.interval_seconds);
      names.forEach((_, index) => rows[index + 1].push(null));
    }
    rows[0].push(point.t);
    names.forEach((name, index) => rows[index + 1].push(point[name] ?? null));
    before = point.t;
  }
  return rows;
}

/** Points that have no neighbour: a line would not show them. */
function lonely(u, series) {
  const values = u.data[series];
  const found = [];
  values.forEach((value, index) => {
    if (value !== null && (values[index - 1] ?? null) === null && (values[index + 1] ?? null) === null) found.push(index);
  });
  return found;
}

function options(series, width, clockOf, onCursor) {
  const axis = {
    stroke: () => css('--muted'),
    font: `11px ${css('--font')}`,
    grid: { stroke: () => css('--grid'), width: 1 },
    ticks: { show: false },
  };
  return {
    width,
    height: HEIGHT,
    padding: [8, 12, 0, 0],
    legend: { show: false },
    cursor: { sync: { key: 'overview' }, drag: { x: false, y: false }, y: false, points: { size: 6 } },
    scales: {
      x: { time: true, range: () => [clockOf() - MINUTES * 60, clockOf()] },
      y: { range: (_, __, most) => [0, most > 0 ? most * 1.15 : 1] },
    },
    axes: [
      { ...axis, space: 64, size: 24, gap: 4, incrs: [60, 180, 300], values: (_, ticks) => ticks.map(clock) },
      { ...axis, space: 36, size: 58, gap: 6, values: (_, ticks) => ticks.map((tick) => (tick === 0 ? '0' : duration(tick).replace(/\.0+ /, ' '))) },
    ],
    series: [
      {},
      ...series.map(({ color, dash, fill }) => ({
        stroke: () => css(color),
        width: 1.5,
        dash,
        fill: fill && (() => css(fill)),
        spanGaps: false,
        points: { show: true, size: 5, filter: lonely, fill: () => css(color) },
      })),
    ],
    hooks: { setCursor: [(u) => onCursor(u.cursor.idx ?? null)] },
  };
}

const latest = (values) => values.findLast((value) => value !== null);

/** `series`: [{field, label, color, dash}] */
export function Chart({ title, meaning, history, now, series }) {
  const place = useRef(null);
  const plot = useRef(null);
  const end = useRef(now);
  const [cursor, setCursor] = useState(null);
  const names = series.map(({ field }) => field);
  const data = columns(history, names);
  end.current = now;

  useEffect(() => {
    const element = place.current;
    plot.current = new uPlot(options(series, element.clientWidth, () => end.current, setCursor), data, element);
    const resize = new ResizeObserver(() => plot.current.setSize({ width: element.clientWidth, height: HEIGHT }));
    resize.observe(element);
    const dark = matchMedia('(prefers-color-scheme: dark)');
    const redraw = () => plot.current.redraw(false);
    dark.addEventListener('change', redraw);
    return () => {
      resize.disconnect();
      dark.removeEventListener('change', redraw);
      plot.current.destroy();
    };
  }, []);
  useEffect(() => plot.current.setData(data), [history, now]);

  const values = data.slice(1);
  const empty = values.every((column) => column.every((value) => value === null));
  const at = cursor !== null && cursor < data[0].length ? cursor : null;
  const shown = values.map((column) => (at === null ? latest(column) : column[at]));
  const summary = series.map(({ label }, index) => `${label} ${duration(latest(values[index]))}`).join(', ');
  return html`<section class="panel chart" aria-label=${title}>
    <header>
      <h2 title=${meaning}>${title}</h2>
      <span class="muted">${at === null ? 'latest' : clock(data[0][at])}</span>
      <ul class="keys">
        ${series.map(
          ({ label, key }, index) => html`<li><i class=${`swatch ${key}`} aria-hidden="true"></i>${label} <b>${duration(shown[index])}</b></li>`,
        )}
      </ul>
    </header>
    <div class="plot" ref=${place} role="img" aria-label=${`${title} of the last ${MINUTES} minutes. Latest: ${summary}`}></div>
    ${empty && html`<p class="nothing"><span>No request in the last ${MINUTES} minutes</span></p>`}
  </section>`;
}
