// Server-sent events of a completion.

/** Work for longer than this without a pause would delay frames and input. */
const SLICE_MS = 8;

/** A macrotask. A promise alone would let neither the browser paint nor the user click. */
function breathe() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port2.onmessage = () => {
      port1.close();
      resolve();
    };
    port1.postMessage(0);
  });
}

/** Yields the data of each event of a response, until "[DONE]" or the end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let since = performance.now();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split('\n');
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith('data:')) continue;
        const data = line.slice(5).trim();
        if (data === '[DONE]') return;
        yield data;
        if (performance.now() - since > SLICE_MS) {
          await breathe();
          since = performance.now();
        }
      }
    }
  } finally {
    // Ends the request as well, if the caller stops early.
    reader.cancel().catch(() => {});
  }
}
