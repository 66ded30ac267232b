// Text of an answer. 20,000 tokens stay smooth because each frame only appends to one text node, and because
// layout stays within the last block.

/** A text node is shaped as a whole, so a run of tokens is cut into pieces of this many characters. */
const PIECE_CHARS = 1024;
/** After this many characters, the next line break starts a new block. A block is laid out as a whole. */
const BLOCK_CHARS = 4096;
/** More text in one frame would make the frame late. The rest follows in the next frame. */
const FRAME_CHARS = 16_384;

export class Output {
  /** `painted` is called in each frame that appends text. */
  constructor(element, painted = () => {}) {
    this.element = element;
    this.painted = painted;
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
    this.painted();
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

  /** Shows all that is pending. */
  finish() {
    cancelAnimationFrame(this.frame);
    if (this.pending.length > 0) this.frame = requestAnimationFrame(() => this.flush(FRAME_CHARS));
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
  }
}

const isHigh = (unit) => unit >= 0xd800 && unit < 0xdc00;
