// Asks before a node is drained, and says what that means for it.

import { html, useState } from './vendor/htm-preact.js';
import * as api from './api.js';
import { Dialog } from './dialog.js';
import { plural } from './format.js';
import { nameOf } from './nodes.js';

export function DrainDialog({ node, nodes, close, drained, unauthorized }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState('');
  const name = nameOf(node);
  const running = node.running_requests ?? 0;
  const others = nodes.filter(
    (other) => other.url !== node.url && other.role === node.role && other.model === node.model && other.state === 'serving',
  );
  async function drain() {
    setBusy(true);
    setError('');
    try {
      await api.drain(node.url);
      drained();
      close();
    } catch (failure) {
      if (failure.status === 401) {
        close();
        unauthorized();
        return;
      }
      setError(failure.message);
      setBusy(false);
    }
  }
  return html`<${Dialog} title=${`Drain ${name}?`} close=${close}>
    <p>
      The node gets no new requests. It finishes ${running === 0 ? 'what it has' : `its ${plural(running, 'running request')}`} and
      exits. This can't be undone from here.
    </p>
    ${others.length === 0 &&
    html`<p class="warning">It is the last serving ${node.role} node of ${node.model}. New requests will wait for another one.</p>`}
    ${error && html`<p class="error" role="alert">${error}</p>`}
    <div class="actions">
      <button type="button" onClick=${close}>Cancel</button>
      <button type="button" class="danger" disabled=${busy} onClick=${drain}>${busy ? 'Draining …' : 'Drain node'}</button>
    </div>
  <//>`;
}
