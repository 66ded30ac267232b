// Numbers as text. Every function takes undefined and null: a node that was never reached has no numbers.

const NONE = '–';
const whole = new Intl.NumberFormat('en', { maximumFractionDigits: 0 });
const missing = (value) => value === undefined || value === null || Number.isNaN(value);

/** 1234567 -> "1,234,567" */
export function count(value) {
  return missing(value) ? NONE : whole.format(value);
}

/** Three significant digits, so that columns stay narrow: 12345 -> "12.3k" */
export function short(value) {
  if (missing(value)) return NONE;
  if (value < 10_000) return whole.format(value);
  if (value < 1e6) return `${digits(value / 1e3)}k`;
  return `${digits(value / 1e6)}M`;
}

function digits(value) {
  if (value >= 100) return value.toFixed(0);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** Seconds -> "340 µs", "8.40 ms", "1.25 s", "3 min 20 s" */
export function duration(seconds) {
  if (missing(seconds)) return NONE;
  if (seconds === 0) return '0 ms';
  if (seconds < 0.001) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (seconds < 1) return `${digits(seconds * 1e3)} ms`;
  if (seconds < 120) return `${digits(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 120) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Bytes -> "1.00 MiB" */
export function bytes(value) {
  if (missing(value)) return NONE;
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return unit === 0 ? `${value} B` : `${digits(value)} ${units[unit]}`;
}

/** Tokens per second. Slow models need the fraction. */
export function rate(value) {
  if (missing(value) || !Number.isFinite(value)) return NONE;
  return value > 0 && value < 100 ? value.toFixed(1) : short(value);
}

export function percent(part, all) {
  return all > 0 ? `${Math.round((100 * part) / all)} %` : NONE;
}

/** "1 request", "2 requests" */
export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? '' : 's'}`;
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', hourCycle: 'h23' });
}
