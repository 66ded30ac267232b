// The frame of the page: tabs, the state of the router each second, and the key.

import { html, render, useEffect, useState } from './vendor/htm-preact.js';
import * as api from './api.js';
import { duration } from './format.js';
import { KeyDialog } from './key.js';
import { Overview } from './overview.js';
import { Playground } from './playground.js';

const POLL_MS = 1000;
/** A hidden page asks seldom. */
const POLL_HIDDEN_MS = 15_000;
const VIEWS = { overview: 'Overview', playground: 'Playground' };

const viewOfHash = () => (location.hash === '#playground' ? 'playground' : 'overview');

function useView() {
  const [view, setView] = useState(viewOfHash);
  useEffect(() => {
    const change = () => setView(viewOfHash());
    addEventListener('hashchange', change);
    return () => removeEventListener('hashchange', change);
  }, []);
  return view;
}

/** The state, the error of the last try, and whether a key is asked for. */
function useRouterState() {
  const [state, setState] = useState(null);
  const [error, setError] = useState(null);
  const [asking, setAsking] = useState(false);
  const [round, setRound] = useState(0);
  useEffect(() => {
    if (asking) return undefined;
    let timer;
    let ended = false;
    async function poll() {
      try {
        const next = await api.state();
        if (ended) return;
        setState(next);
        setError(null);
      } catch (failure) {
        if (ended) return;
        if (failure.status === 401) {
          ask();
          return;
        }
        setError(failure.message);
      }
      schedule();
    }
    function schedule() {
      clearTimeout(timer);
      timer = setTimeout(poll, document.hidden ? POLL_HIDDEN_MS : POLL_MS);
    }
    const wake = () => {
      if (!document.hidden) {
        clearTimeout(timer);
        poll();
      }
    };
    document.addEventListener('visibilitychange', wake);
    poll();
    return () => {
      ended = true;
      clearTimeout(timer);
      document.removeEventListener('visibilitychange', wake);
    };
  }, [asking, round]);
  const ask = () => {
    setState(null);
    setAsking(true);
  };
  const refresh = () => setRound((value) => value + 1);
  return { state, error, asking, ask, answered: () => setAsking(false), refresh };
}

function Tabs({ view }) {
  return html`<nav class="tabs" aria-label="Views">
    ${Object.entries(VIEWS).map(
      ([name, label]) => html`<a href=${`#${name}`} aria-current=${view === name ? 'page' : undefined}>${label}</a>`,
    )}
  </nav>`;
}

function Status({ state, error }) {
  if (error) return html`<span class="status bad"><i class="dot" aria-hidden="true"></i>no answer</span>`;
  if (!state) return html`<span class="status"><i class="dot" aria-hidden="true"></i>connecting</span>`;
  return html`<span class="status good" title=${`router ${state.router_id}`}>
    <i class="dot" aria-hidden="true"></i>live<span class="wide"> · up ${duration(state.uptime_seconds)}</span>
    <span class="wide"> · ${state.version}</span>
  </span>`;
}

function App() {
  const view = useView();
  const { state, error, asking, ask, answered, refresh } = useRouterState();
  useEffect(() => {
    document.title = `${VIEWS[view]} · Overfill`;
  }, [view]);
  const forget = () => {
    api.setKey('');
    ask();
  };
  return html`
    <header class="top">
      <a class="brand" href="#overview"><img src="icon.svg" alt="" width="22" height="22" />Overfill</a>
      <${Tabs} view=${view} />
      <div class="right">
        <${Status} state=${state} error=${error} />
        ${api.key() && !asking && html`<button type="button" class="plain" onClick=${forget}>Forget key</button>`}
      </div>
    </header>
    ${error && html`<p class="banner" role="alert">${error}${state && ' The values below are old.'}</p>`}
    <main class=${error ? 'stale' : ''}>
      ${view === 'overview' && html`<${Overview} state=${state} refresh=${refresh} unauthorized=${ask} />`}
      <${Playground} hidden=${view !== 'playground'} state=${state} unauthorized=${ask} />
    </main>
    ${asking &&
    html`<${KeyDialog}
      refused=${api.key() !== ''}
      done=${(value) => {
        api.setKey(value);
        answered();
      }}
    />`}
  `;
}

render(html`<${App} />`, document.getElementById('app'));
