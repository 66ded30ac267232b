// One request and its answer. It lives outside of the components, so that tokens do not render anything.

import { send, ApiError } from './api.js';
import { makerOf, UNKNOWN } from './makers.js';
import { events } from './sse.js';

/** Numbers that change faster than this can't be read. */
const SHOW_MS = 150;
/** The speed of the last moments, beside that of the whole answer. */
const WINDOW_MS = 1000;

export class Answer {
  /** `changed` is called when `status` or a number changes, at most once per SHOW_MS while streaming. */
  constructor(request, output, changed) {
    this.request = request;
    this.output = output;
    this.changed = changed;
    this.controller = new AbortController();
    this.status = 'waiting';
    this.error = '';
    this.tokens = 0;
    this.makers = new Map();
    this.started = performance.now();
    this.first = null;
    this.last = null;
    this.ended = null;
    this.recent = [];
    this.finish = '';
    this.usage = null;
    this.timings = null;
    this.shown = 0;
  }

  get model() {
    return this.request.body.model;
  }

  get running() {
    return this.ended === null;
  }

  /** Seconds until the first token, as this browser saw it. */
  get ttft() {
    return this.first === null ? undefined : (this.first - this.started) / 1000;
  }

  get elapsed() {
    return ((this.ended ?? performance.now()) - this.started) / 1000;
  }

  /** Tokens per second after the first one: the speed of decode. */
  get speed() {
    if (this.tokens < 2 || this.last === this.first) return undefined;
    return (this.tokens - 1) / ((this.last - this.first) / 1000);
  }

  /** The same for the last second. */
  get speedNow() {
    const [oldest] = this.recent;
    if (!this.running || !oldest || this.last === null) return undefined;
    const seconds = (this.last - oldest.at) / 1000;
    return seconds > 0.1 ? (this.tokens - oldest.tokens) / seconds : undefined;
  }

  async run() {
    try {
      const response = await send(this.request.path, { body: this.request.body, signal: this.controller.signal });
      for await (const data of events(response)) this.take(JSON.parse(data));
      this.end(this.finish || this.timings ? 'done' : 'cut off');
    } catch (error) {
      if (this.controller.signal.aborted) this.end('stopped');
      else if (error instanceof ApiError) this.fail(error.message, error.status);
      else this.fail(error instanceof SyntaxError ? 'The router sent an event that is not JSON.' : 'The connection to the router was lost.', 0);
    }
  }

  take(chunk) {
    if (chunk.error) throw new ApiError(0, chunk.error.message ?? JSON.stringify(chunk.error));
    const choice = chunk.choices?.[0];
    if (choice) {
      const text = choice.text ?? choice.delta?.content ?? '';
      this.tokensCame(chunk.overfill?.tokens, text);
      if (choice.finish_reason) this.finish = choice.finish_reason;
    }
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.overfill?.timings) this.timings = chunk.overfill.timings;
  }

  tokensCame(tokens, text) {
    // A router that does not say who made a token sends about one token per chunk.
    const made = tokens ?? (text === '' ? [] : [UNKNOWN]);
    let maker = UNKNOWN;
    for (const token of made) {
      maker = token === UNKNOWN ? UNKNOWN : makerOf(token);
      this.makers.set(maker, (this.makers.get(maker) ?? 0) + 1);
    }
    // Text without a token, such as the rest of a character at the end, belongs to the token before it.
    if (made.length === 0) maker = this.maker ?? UNKNOWN;
    this.maker = maker;
    this.output.push(text, maker.css);
    if (made.length === 0) return;
    const now = performance.now();
    if (this.first === null) {
      this.first = now;
      this.status = 'streaming';
    }
    this.last = now;
    this.tokens += made.length;
    if (now - this.shown < SHOW_MS) return;
    this.shown = now;
    this.recent.push({ at: now, tokens: this.tokens });
    while (this.recent.length > 2 && now - this.recent[1].at > WINDOW_MS) this.recent.shift();
    this.changed();
  }

  fail(message, status) {
    this.error = message;
    this.unauthorized = status === 401;
    this.end('failed');
  }

  end(status) {
    this.status = status;
    this.ended = performance.now();
    this.changed();
  }

  stop() {
    this.controller.abort();
  }
}
