// Text of an answer. 20,000 tokens stay smooth because each frame only appends to one text node, and because
// layout stays within the last block.

/** A text node is shaped as a whole, so a run of tokens is cut into pieces of this many characters. */
const PIECE_CHARS = 1024;
/** After this many characters, the next line break starts a new block. A block is laid out as a whole. */
const BLOCK_CHARS = 2048;
/** After this many characters without a line break, the last line on the screen becomes a new block. */
const PARAGRAPH_CHARS = 4096;
/** More text in one frame would make the frame late. The rest follows in the next frame. */
const FRAME_CHARS = 16_384;

export class Output {
  constructor(element) {
    this.element = element;
    this.pending = [];
    this.frame = 0;
    this.block = null;
    this.blockChars = 0;
    this.span = null;
    this.spanMaker = null;
    this.follow = true;
    // Reading the position in every frame would force a layout. Only the user scrolls up.
    this.onScroll = () => {
      this.follow = element.scrollTop + element.clientHeight >= element.scrollHeight - 40;
    };
    element.addEventListener('scroll', this.onScroll, { passive: true });
    element.addEventListener('copy', copyText);
  }

  /** Adds the text of some tokens. `maker` is the class of those who made them. */
  push(text, maker) {
    if (text === '') return;
    const last = this.pending.at(-1);
    if (last && last.maker === maker && last.text.length < FRAME_CHARS) last.text += text;
    else this.pending.push({ text, maker });
    if (!this.frame) this.frame = requestAnimationFrame(() => this.flush(FRAME_CHARS));
  }

  flush(budget) {
    this.frame = 0;
    while (budget > 0 && this.pending.length > 0) {
      const { text, maker } = this.pending.shift();
      this.append(text, maker);
      budget -= text.length;
    }
    if (this.pending.length > 0) this.frame = requestAnimationFrame(() => this.flush(FRAME_CHARS));
    if (this.follow) this.element.scrollTop = 1e9;
    if (this.blockChars > PARAGRAPH_CHARS) this.cutLine();
  }

  append(text, maker) {
    while (text !== '') {
      if (!this.block) this.open();
      if (!this.span || this.spanMaker !== maker || this.span.length >= PIECE_CHARS) this.piece(maker);
      let take = Math.min(text.length, PIECE_CHARS - this.span.length);
      // Half of a character that takes two units would show as a box.
      if (take < text.length && isHigh(text.charCodeAt(take - 1))) take += 1;
      let part = text.slice(0, take);
      const full = this.blockChars + part.length > BLOCK_CHARS;
      const cut = full ? part.indexOf('\n') : -1;
      if (cut >= 0) part = part.slice(0, cut + 1);
      text = text.slice(part.length);
      this.span.appendData(part);
      this.blockChars += part.length;
      if (cut >= 0) this.block = this.span = null;
    }
  }

  /** A cut where the browser wraps the line anyway can't be seen. */
  cutLine() {
    const begin = lastLine(this.span);
    // The line began in an earlier piece. It will have ended a few frames later.
    if (begin === 0) return;
    const rest = this.span.data.slice(begin);
    this.span.deleteData(begin, rest.length);
    this.open();
    this.piece(this.spanMaker);
    this.span.appendData(rest);
    this.blockChars = rest.length;
  }

  open() {
    this.block = document.createElement('div');
    this.blockChars = 0;
    this.span = null;
    this.element.append(this.block);
  }

  piece(maker) {
    const span = document.createElement('span');
    span.className = maker;
    this.span = document.createTextNode('');
    this.spanMaker = maker;
    span.append(this.span);
    this.block.append(span);
  }

  clear() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.pending = [];
    this.block = this.span = null;
    this.follow = true;
    this.element.replaceChildren();
  }

  stop() {
    this.clear();
    this.element.removeEventListener('scroll', this.onScroll);
    this.element.removeEventListener('copy', copyText);
  }
}

const isHigh = (unit) => unit >= 0xd800 && unit < 0xdc00;

/** Where the last line of a text node begins. 0 if that is in an earlier node. */
function lastLine(node) {
  const range = document.createRange();
  const top = (index) => {
    range.setStart(node, index);
    range.setEnd(node, index + 1);
    return range.getBoundingClientRect().top;
  };
  let high = node.length - 1;
  if (high < 1) return 0;
  const last = top(high);
  let low = 0;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (top(middle) < last) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The browser would add a line break between blocks. */
function copyText(event) {
  const selection = getSelection();
  if (selection.rangeCount === 0) return;
  event.clipboardData.setData('text/plain', selection.getRangeAt(0).cloneContents().textContent);
  event.preventDefault();
}
