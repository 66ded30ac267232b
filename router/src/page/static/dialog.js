// A modal dialog of the browser: it keeps the focus inside, and Escape closes it.

import { html, useLayoutEffect, useRef } from './vendor/htm-preact.js';

export function Dialog({ title, close, children }) {
  const element = useRef(null);
  useLayoutEffect(() => {
    const before = document.activeElement;
    const dialog = element.current;
    dialog.showModal();
    return () => {
      // Without this, the browser may give the focus to what is in the dialog, and that is gone.
      dialog.close();
      before?.focus?.();
    };
  }, []);
  const cancel = (event) => {
    // Without `close`, the page is of no use until the dialog is answered.
    if (close) close();
    else event.preventDefault();
  };
  // A browser closes a dialog at the second Escape whatever the page says.
  const closed = () => {
    if (!close && element.current) element.current.showModal();
  };
  return html`<dialog ref=${element} aria-labelledby="dialog-title" onCancel=${cancel} onClose=${closed}>
    <h2 id="dialog-title">${title}</h2>
    ${children}
  </dialog>`;
}
