// Calls to the router. Paths are relative to the page, so it also works behind a proxy that adds a prefix.

const KEY = 'overfill.key';
/** A state that takes longer than this is as good as none. */
const STATE_TIMEOUT_MS = 8000;

// The key lives as long as the tab. sessionStorage is refused in some private windows; then it lives as long as the page.
let memory = '';

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? memory;
  } catch {
    return memory;
  }
}

export function setKey(value) {
  memory = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // See above.
  }
}

/** An answer with an error. `message` is the server's own. `status` is 0 if there was no answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const api = (path) => new URL(`../${path}`, document.baseURI).href;

function headers(body) {
  const result = {};
  if (key()) result.authorization = `Bearer ${key()}`;
  if (body !== undefined) result['content-type'] = 'application/json';
  return result;
}

/** Sends a request and returns the response, or throws an ApiError. */
export async function send(path, { body, signal } = {}) {
  let response;
  try {
    response = await fetch(api(path), {
      method: body === undefined ? 'GET' : 'POST',
      headers: headers(body),
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: 'no-store',
      signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, 'The router does not answer.');
  }
  if (!response.ok) throw new ApiError(response.status, await messageOf(response));
  return response;
}

async function messageOf(response) {
  const text = await response.text().catch(() => '');
  try {
    const message = JSON.parse(text)?.error?.message;
    if (message) return message;
  } catch {
    // A proxy answers with HTML or plain text.
  }
  const plain = text.startsWith('<') ? '' : text.slice(0, 300).trim();
  return plain || `The answer was ${response.status} ${response.statusText}`.trim();
}

export async function state() {
  const signal = AbortSignal.timeout(STATE_TIMEOUT_MS);
  try {
    const response = await send('page/state', { signal });
    return await response.json();
  } catch (error) {
    if (error instanceof ApiError) throw error;
    throw new ApiError(0, signal.aborted ? 'The router does not answer.' : 'The state of the router is not valid JSON.');
  }
}

export async function drain(url) {
  await send('page/drain', { body: { url } });
}
