// Asks for the API key.

import { html, useState } from './vendor/htm-preact.js';
import { Dialog } from './dialog.js';

export function KeyDialog({ refused, done }) {
  const [value, setValue] = useState('');
  const submit = (event) => {
    event.preventDefault();
    if (value.trim()) done(value.trim());
  };
  return html`<${Dialog} title="API key">
    <form onSubmit=${submit}>
      <p>This router answers only to clients with a key. The key stays in this browser tab.</p>
      ${refused && html`<p class="error" role="alert" id="key-error">The router refused this key.</p>`}
      <label for="key">Key</label>
      <input
        id="key"
        type="password"
        autocomplete="off"
        spellcheck=${false}
        value=${value}
        aria-invalid=${refused ? 'true' : undefined}
        aria-describedby=${refused ? 'key-error' : undefined}
        onInput=${(event) => setValue(event.target.value)}
      />
      <div class="actions"><button class="primary" disabled=${!value.trim()}>Open</button></div>
    </form>
  <//>`;
}
