// The playground: one prompt for one or several models.

import { html, useRef, useState } from './vendor/htm-preact.js';
import { api } from './api.js';
import { Column } from './column.js';
import { makerOf } from './makers.js';
import { copy, curl, python, request, streamed } from './request.js';

/** A browser opens six connections to a host, and one of them is for the state. */
const MOST_MODELS = 4;
const SEED_MAX = 2 ** 31;

// Numbers stay text until they are sent: "0." is on the way to "0.5".
const FIRST = { chat: true, prompt: '', temperature: '0.7', maxTokens: '256', seed: '1' };

function NumberField({ id, label, value, change, ...rest }) {
  return html`<div class="field">
    <label for=${id}>${label}</label>
    <input id=${id} type="number" inputmode="decimal" value=${value} ...${rest} onInput=${(event) => change(event.target.value)} />
  </div>`;
}

function Choice({ models, chosen, toggle }) {
  if (models.length === 0) return html`<p class="muted">No model yet.</p>`;
  return html`<div class="choice">
    ${models.map(
      ({ name, served }) => html`<label class="check" key=${name}>
        <input type="checkbox" checked=${chosen.includes(name)} onChange=${() => toggle(name)}
          disabled=${!chosen.includes(name) && chosen.length >= MOST_MODELS} />
        <span>${name}</span>${!served && html` <small class="muted">no node yet</small>`}
      </label>`,
    )}
  </div>`;
}

function CopyButtons({ form, chosen, keys }) {
  const ready = form !== null && chosen.length > 0;
  const [said, setSaid] = useState('');
  const base = api('');
  async function put(kind, text) {
    try {
      await copy(text);
      setSaid(`Copied as ${kind}`);
    } catch (error) {
      setSaid(`Not copied: ${error.message}`);
    }
    setTimeout(() => setSaid(''), 3000);
  }
  return html`<div class="copy">
    <button type="button" class="small" disabled=${!ready} onClick=${() => put('curl', curl(form, chosen, base, keys))}>Copy as curl</button>
    <button type="button" class="small" disabled=${!ready} onClick=${() => put('Python', python(form, chosen, base, keys))}>Copy as Python</button>
    <span class="muted" role="status">${said}</span>
  </div>`;
}

/** The form with numbers, or null if it can't be sent. Without a seed, the router draws one. */
function parsed(form) {
  const [temperature, maxTokens, seed] = [form.temperature, form.maxTokens, form.seed].map((text) => (text.trim() === '' ? null : Number(text)));
  const valid = form.prompt !== '' && temperature !== null && temperature >= 0 && Number.isInteger(maxTokens) && maxTokens > 0;
  return valid && (seed === null || Number.isInteger(seed)) ? { ...form, temperature, maxTokens, seed } : null;
}

export function Playground({ hidden, state, unauthorized }) {
  const [form, setForm] = useState(FIRST);
  const [picked, setPicked] = useState(null);
  const [wishes, setWishes] = useState([]);
  const [running, setRunning] = useState(0);
  const answers = useRef(new Set());
  const models = state?.models ?? [];
  const names = models.map((model) => model.name);
  // Until the user chooses, the first model is chosen. Models that went away are not sent.
  const chosen = (picked ?? names.slice(0, 1)).filter((name) => names.includes(name));
  const set = (field) => (value) => setForm((old) => ({ ...old, [field]: value }));
  const toggle = (name) => setPicked(chosen.includes(name) ? chosen.filter((other) => other !== name) : [...chosen, name]);
  const values = parsed(form);
  const ready = values !== null && chosen.length > 0;

  function report(answer) {
    if (answer.running) answers.current.add(answer);
    else answers.current.delete(answer);
    setRunning(answers.current.size);
  }
  const stop = () => answers.current.forEach((answer) => answer.stop());
  function submit(event) {
    event?.preventDefault();
    if (!ready || running > 0) return;
    const round = (wishes[0]?.round ?? 0) + 1;
    // Colours go by the order of the list, not by who answers first.
    names.filter((name) => chosen.includes(name)).forEach((model) => makerOf({ stage: 'decode', model }));
    setWishes(names.filter((name) => chosen.includes(name)).map((model) => ({ round, request: streamed(request(values, model)) })));
  }
  const shortcut = (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) submit(event);
  };

  return html`<div class="playground" hidden=${hidden}>
    <h1 class="hidden">Playground</h1>
    <form class="panel" onSubmit=${submit} onKeyDown=${shortcut} novalidate>
      <fieldset class="segments">
        <legend>Prompt as</legend>
        <label><input type="radio" name="kind" checked=${form.chat} onChange=${() => set('chat')(true)} /><span>Chat</span></label>
        <label><input type="radio" name="kind" checked=${!form.chat} onChange=${() => set('chat')(false)} /><span>Completion</span></label>
      </fieldset>
      <div class="field">
        <label for="prompt">${form.chat ? 'Message' : 'Prompt'}</label>
        <textarea id="prompt" rows="8" value=${form.prompt} onInput=${(event) => set('prompt')(event.target.value)}></textarea>
      </div>
      <fieldset>
        <legend>Models <small class="muted">side by side, at most ${MOST_MODELS}</small></legend>
        <${Choice} models=${models} chosen=${chosen} toggle=${toggle} />
      </fieldset>
      <div class="row">
        <${NumberField} id="temperature" label="temperature" min="0" max="2" step="0.1" value=${form.temperature} change=${set('temperature')} />
        <${NumberField} id="max-tokens" label="max_tokens" min="1" step="1" value=${form.maxTokens} change=${set('maxTokens')} />
        <${NumberField} id="seed" label="seed" min="0" step="1" value=${form.seed} change=${set('seed')} />
      </div>
      <div class="actions">
        <button class="primary" disabled=${!ready || running > 0}>Send</button>
        <button type="button" disabled=${running === 0} onClick=${stop}>Stop</button>
        <button type="button" onClick=${() => set('seed')(String(Math.floor(Math.random() * SEED_MAX)))}>New seed</button>
      </div>
      <p class="muted small">Ctrl + Enter sends. All models get the same prompt and seed.</p>
      <${CopyButtons} form=${values} chosen=${chosen} keys=${state?.keys_required ?? false} />
    </form>
    <div class=${`answers of-${wishes.length}`}>
      ${wishes.length === 0 && html`<p class="nothing">The answer appears here: its text coloured by the model that made each token, its speed, and where the time went.</p>`}
      ${wishes.map(
        (wish) => html`<${Column} key=${`${wish.round} ${wish.request.body.model}`} wish=${wish} report=${report} unauthorized=${unauthorized} />`,
      )}
    </div>
  </div>`;
}
