// A request as the playground sends it, and the same request for other programs.

/** What the form holds -> path and body for one model. */
export function request(form, model) {
  const body = { model };
  if (form.chat) body.messages = [{ role: 'user', content: form.prompt }];
  else body.prompt = form.prompt;
  body.temperature = form.temperature;
  body.max_tokens = form.maxTokens;
  if (form.seed !== null) body.seed = form.seed;
  return { path: form.chat ? 'v1/chat/completions' : 'v1/completions', body };
}

export function streamed({ path, body }) {
  return { path, body: { ...body, stream: true, stream_options: { include_usage: true, include_overfill: true } } };
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** A key is never part of the text: it would end up in histories and chats. */
export function curl(form, models, base, keys) {
  return models
    .map((model) => {
      const { path, body } = streamed(request(form, model));
      const lines = [`curl -N ${quoted(`${base}${path}`)}`, `-H 'content-type: application/json'`];
      if (keys) lines.push('-H "authorization: Bearer $OVERFILL_API_KEY"');
      lines.push(`-d ${quoted(JSON.stringify(body))}`);
      return lines.join(' \\\n  ');
    })
    .join('\n\n')
    .concat('\n');
}

// A JSON string is a Python string as well.
const literal = (value) => JSON.stringify(value);

export function python(form, models, base, keys) {
  const { body } = request(form, models[0]);
  const call = form.chat ? 'chat.completions' : 'completions';
  const text = form.chat ? 'chunk.choices[0].delta.content or ""' : 'chunk.choices[0].text';
  const input = form.chat
    ? `messages=[{"role": "user", "content": ${literal(form.prompt)}}]`
    : `prompt=${literal(form.prompt)}`;
  const key = keys ? 'os.environ["OVERFILL_API_KEY"]' : '"none"';
  const rest = ['temperature', 'max_tokens', 'seed'].filter((name) => name in body).map((name) => `${name}=${body[name]}`);
  return `${keys ? 'import os\n\n' : ''}from openai import OpenAI

client = OpenAI(base_url=${literal(`${base}v1`)}, api_key=${key})
for model in [${models.map(literal).join(', ')}]:
    stream = client.${call}.create(
        model=model,
        ${input},
        ${rest.join(', ')},
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(${text}, end="", flush=True)
    print()
`;
}

/** The clipboard API exists only on https and localhost; a router in a cluster is often reached by plain http. */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = document.createElement('textarea');
  area.value = text;
  area.className = 'hidden';
  area.setAttribute('aria-hidden', 'true');
  document.body.append(area);
  area.select();
  const done = document.execCommand('copy');
  area.remove();
  if (!done) throw new Error('the browser refused the clipboard');
}
