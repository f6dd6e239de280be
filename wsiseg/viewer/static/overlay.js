// What is drawn over the slide: outlines of the cells in view, or their density, clicks, regions, the cell under the pointer.

import { paintClicks, paintCrosshair, paintDensity, paintOpen, paintRegions, ringPath, strokeTwice } from './painting.js';
import { Pictures } from './pictures.js';
import { getDensity, getOutlines, getTypes } from './server.js';
import { apart, SQUARE, Square } from './square.js';

const MOST_SQUARES = 48; // in view; beyond, few cells on much glass: density
const KEPT_SQUARES = 48; // half a MB each
const BIN = 16; // screen px of a square of density
const AROUND = 0.5; // of the view, on each side: what is fetched and drawn ahead
const MOST_TYPED = 24; // boxes whose types are known
const THIN = 1.25; // level-0 px per screen px: beyond, cells are some ten screen px wide, and a thin outline leaves more of them to be seen
const CORNER = 2; // device px between two corners that are drawn: nearer ones cannot be told apart
const UNKNOWN = 255;

const isEmpty = (box) => box.x0 >= box.x1 || box.y0 >= box.y1;
const holds = (a, b) => a.x0 <= b.x0 && a.y0 <= b.y0 && a.x1 >= b.x1 && a.y1 >= b.y1;
const sameBox = (a, b) => a !== null && holds(a, b) && holds(b, a);
/** What of a box lies around another: left, right, above, below. */
function without(box, other) {
  const inner = { x0: Math.max(box.x0, other.x0), y0: Math.max(box.y0, other.y0), x1: Math.min(box.x1, other.x1), y1: Math.min(box.y1, other.y1) };
  if (isEmpty(inner)) return [box];
  return [
    { ...inner, x0: box.x0, x1: inner.x0 }, { ...inner, x0: inner.x1, x1: box.x1 }, { ...box, y1: inner.y0 }, { ...box, y0: inner.y1 },
  ].filter((part) => !isEmpty(part));
}

export class Overlay {
  constructor(view, size, viewCells, onProblem) {
    this.view = view; // gives the box in view and the scale
    this.size = size;
    this.viewCells = viewCells;
    this.onProblem = onProblem;
    this.canvas = document.createElement('canvas');
    this.canvas.className = 'overlay';
    this.canvas.setAttribute('aria-hidden', 'true');
    view.element.append(this.canvas);
    this.context = this.canvas.getContext('2d');
    this.pictures = new Pictures((context, box, px) => this.drawOutlines(context, box, px));
    this.shown = { outlines: true, fill: true, marks: true, kinds: new Set(), score: 0, margin: 0 };
    this.density = null;
    this.mode = 'outlines';
    this.clear();
    this.state = null;
    this.kindsKey = '';
    this.draft = null;
    this.marked = null;
    this.crosshair = false;
    this.counts = null; // of the view, by kind
    this.onCounts = () => {};
    this.onSettled = () => {};
    this.lastRetype = 0;
  }

  clear() {
    this.squares = new Map();
    this.version = '';
    this.codes = null;
    this.perArea = 0;
    this.hovered = null;
    this.asked = null; // the box of the last question
    this.typed = { key: '', boxes: [], whole: true }; // where the types are those of the clicks that hold
    this.replaced = false; // the pictures are those of the cells before, until the new ones are there
  }

  /** Take what the server says; other cells make everything old. */
  update(state) {
    this.state = state;
    const version = state.cells?.version ?? '';
    const kindsKey = JSON.stringify(state.kinds);
    if (version !== this.version) {
      this.clear();
      this.version = version;
      this.replaced = true;
      if (version) {
        this.codes = new Uint8Array(state.cells.count).fill(UNKNOWN);
        this.scores = new Uint8Array(state.cells.count);
        this.margins = new Uint8Array(state.cells.count);
        this.fresh = new Uint8Array(state.cells.count); // 1: typed with the clicks that hold
      }
    } else if (kindsKey !== this.kindsKey) {
      this.recolour();
    }
    this.kindsKey = kindsKey;
  }

  recolour() {
    this.pictures.clear();
    this.draw();
  }

  /** The code of a cell that is drawn, else -1: its type is not asked for yet, or what the user chose leaves it out. */
  codeShown(row) {
    const code = this.codes[row];
    if (code === UNKNOWN || this.shown.kinds.has(code)) return -1;
    return code === 0 || (this.scores[row] >= this.shown.score * 255 && this.margins[row] >= this.shown.margin * 255) ? code : -1;
  }

  /** Everything in view is there and drawn. */
  get settled() { return !this.busy && !this.frame && (!this.version || sameBox(this.asked, this.boxInView())); }

  boxInView() {
    const { x0, y0, x1, y1 } = this.view.box;
    return { x0: Math.max(x0, 0), y0: Math.max(y0, 0), x1: Math.min(x1, this.size[0]), y1: Math.min(y1, this.size[1]) };
  }

  squaresInView(box) {
    const [columns, rows] = this.state.cells.grid;
    const found = [];
    const last = (edge, count) => Math.min(Math.floor(edge / SQUARE), count - 1);
    for (let row = Math.floor(box.y0 / SQUARE); row <= last(box.y1, rows); row += 1) {
      for (let column = Math.floor(box.x0 / SQUARE); column <= last(box.x1, columns); column += 1) found.push([column, row]);
    }
    return found;
  }

  /** Ask for what the view needs; the answer to an older question is dropped. One question at a time. */
  refresh() {
    if (!this.version) {
      this.draw();
      return Promise.resolve();
    }
    this.wanted = true;
    if (!this.busy) this.running = this.answer();
    return this.running;
  }

  /** The same, unless the view is still what was asked for. */
  follow() {
    if (!sameBox(this.asked, this.boxInView())) this.refresh();
  }

  async answer() {
    this.busy = true;
    try {
      while (this.wanted) {
        this.wanted = false;
        await this.load();
      }
    } catch (error) {
      this.asked = null; // to be asked again when the view moves
      this.onProblem(error);
    } finally {
      this.busy = false;
    }
    this.onSettled();
  }

  async load() {
    const version = this.version, box = this.boxInView(), key = this.typedKey();
    this.asked = box;
    if (isEmpty(box)) return;
    const area = (box.x1 - box.x0) * (box.y1 - box.y0);
    const squares = this.squaresInView(box);
    const many = squares.length > MOST_SQUARES || this.perArea * area > 1.3 * this.viewCells;
    if (!many) {
      const missing = squares.filter(([column, row]) => !this.squares.has(`${column}/${row}`));
      const started = performance.now();
      const [types] = await Promise.all([
        this.isTyped(box, key) ? null : getTypes(box), ...(this.mode === 'outlines' ? missing.map(([column, row]) => this.fetchSquare(version, column, row)) : [])]);
      if (version !== this.version) return;
      if (types) [this.lastRetype, this.perArea] = [performance.now() - started, types.total / area];
      if (!types || types.total <= this.viewCells) {
        if (this.mode !== 'outlines') {
          await Promise.all(missing.map(([column, row]) => this.fetchSquare(version, column, row)));
          if (version !== this.version) return;
        }
        this.mode = 'outlines';
        if (this.replaced) this.pictures.clear();
        this.replaced = false;
        if (types) this.keep(types, box, key);
        this.count(box);
        this.forget(squares);
        this.draw();
        return;
      }
    }
    const scale = this.view.scale;
    const columns = Math.max(1, Math.round(((box.x1 - box.x0) * scale) / BIN)), lines = Math.max(1, Math.round(((box.y1 - box.y0) * scale) / BIN));
    const density = await getDensity(box, Math.min(columns, 512), Math.min(lines, 512), { score: this.shown.score, margin: this.shown.margin });
    if (version !== this.version) return;
    this.density = density;
    this.mode = 'density';
    this.countDensity(area);
    this.draw();
  }

  /** Names the clicks that types are for. */
  typedKey() { return `${this.version}/${this.state.revision}/${this.state.applied}`; }

  /** Whether all cells in a box have types of these clicks. */
  isTyped(box, key) {
    if (this.typed.key !== key) return false;
    return this.typed.boxes.reduce((open, known) => open.flatMap((part) => without(part, known)), [box]).length === 0;
  }

  /** Take the types of the cells in a box; what looks otherwise now is drawn anew. Until the next click a cell keeps the first that it gets: typed
   * with other neighbours it may have another, and its colour would change as the view moves. */
  keep(types, box, key) {
    if (this.typed.key !== key) {
      this.typed = { key, boxes: [], whole: types.whole };
      this.fresh.fill(0);
    }
    this.typed.boxes = [...this.typed.boxes.slice(-MOST_TYPED), box];
    const other = new Set();
    for (let k = 0; k < types.rows.length; k += 1) {
      const row = types.rows[k], before = this.codeShown(row);
      if (this.fresh[row]) continue;
      this.fresh[row] = 1;
      this.codes[row] = types.codes[k];
      this.scores[row] = types.scores[k];
      this.margins[row] = types.margins[k];
      if (this.codeShown(row) !== before) other.add(row);
    }
    if (!other.size) return;
    for (const square of this.squares.values()) {
      if (apart(square, box)) continue;
      for (const patch of square.patches) if (!apart(patch, box) && patch.cells.some((cell) => other.has(square.rows[cell]))) this.pictures.drop(patch);
    }
  }

  /** Count the cells in view by their types. */
  count(box) {
    const counts = new Array(this.state.kinds.length).fill(0);
    for (const square of this.squares.values()) {
      if (apart(square, box)) continue;
      for (const cell of square.meeting(box)) {
        const code = this.codes[square.rows[cell]], [x, y] = square.middle(cell);
        if (code !== UNKNOWN && x >= box.x0 && x < box.x1 && y >= box.y0 && y < box.y1) counts[code] += 1;
      }
    }
    this.counts = { counts, whole: this.typed.whole };
    this.onCounts();
  }

  countDensity(area) {
    const counts = new Array(this.state.kinds.length).fill(0), { density } = this, each = density.columns * density.lines;
    let total = 0;
    for (let k = 0; k < density.counts.length; k += 1) {
      counts[Math.floor(k / each)] += density.counts[k];
      total += density.counts[k];
    }
    this.perArea = total / area;
    this.counts = { counts, whole: density.whole };
    this.onCounts();
  }

  async fetchSquare(version, column, row) {
    const data = await getOutlines(version, column, row).catch((error) => {
      if (version === this.version) throw error; // else the cells were replaced meanwhile
      return null;
    });
    if (!data || version !== this.version) return;
    const square = new Square(column, row, data);
    this.squares.set(`${column}/${row}`, square);
    this.pictures.drop(square);
  }

  /** Fetch and draw what lies around the view, until it moves: the next pan finds it. */
  async prefetch(still) {
    if (this.mode !== 'outlines' || !this.version) return;
    const { version } = this, key = this.typedKey(), box = this.boxInView(), around = this.around(box);
    const goes = () => still() && key === this.typedKey();
    const squares = this.squaresInView(around);
    if (isEmpty(box) || squares.length > MOST_SQUARES) return;
    for (const strip of without(around, box)) {
      if (!goes()) return;
      if (this.isTyped(strip, key)) continue;
      const types = await getTypes(strip).catch(() => null);
      if (types && types.total <= this.viewCells && goes()) this.keep(types, strip, key);
    }
    for (const [column, row] of squares) {
      if (!goes()) return;
      if (!this.squares.has(`${column}/${row}`)) await this.fetchSquare(version, column, row).catch(() => {});
    }
    this.draw(); // outlines that cross the edge of the view
    while (goes() && this.shown.outlines && this.pictures.ahead(around)) await new Promise((done) => { setTimeout(done); });
  }

  around({ x0, y0, x1, y1 }) {
    const wide = AROUND * (x1 - x0), high = AROUND * (y1 - y0);
    return { x0: Math.max(x0 - wide, 0), y0: Math.max(y0 - high, 0), x1: Math.min(x1 + wide, this.size[0]), y1: Math.min(y1 + high, this.size[1]) };
  }

  forget(needed) {
    const keep = new Set(needed.map(([column, row]) => `${column}/${row}`));
    for (const key of this.squares.keys()) {
      if (this.squares.size <= KEPT_SQUARES) break;
      if (!keep.has(key)) this.squares.delete(key);
    }
  }

  /** The cell that a click at a place would mean: the smallest outline that holds it, else the nearest within reach. */
  cellAt(x, y) {
    if (this.mode !== 'outlines' || !this.version || !this.shown.outlines) return null;
    const { reach } = this.state, near = { x0: x - reach, y0: y - reach, x1: x + reach, y1: y + reach };
    let best = null;
    for (const square of this.squares.values()) {
      if (apart(square, near)) continue;
      for (const cell of square.meeting(near)) {
        const gap = square.gap(cell, x, y);
        if (gap > reach) continue;
        const area = square.area(cell);
        if (!best || gap < best.gap || (gap === best.gap && area < best.area)) best = { square, cell, row: square.rows[cell], gap, area };
      }
    }
    return best;
  }

  hover(x, y) {
    const found = x === null ? null : this.cellAt(x, y);
    if (found?.row !== this.hovered?.row || found?.square !== this.hovered?.square) {
      this.hovered = found;
      this.draw();
    }
    return found;
  }

  /** Show one outline besides all others, that of the cell under review. */
  mark(ring) {
    this.marked = ring;
    this.draw();
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.paint();
    });
  }

  paint() {
    const ratio = window.devicePixelRatio || 1, { canvas, context } = this;
    const width = Math.round(this.view.element.clientWidth * ratio), height = Math.round(this.view.element.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    const scale = this.view.scale * ratio, box = this.view.box;
    if (!Number.isFinite(scale) || scale <= 0) return;
    const onSlide = () => context.setTransform(scale, 0, 0, scale, -box.x0 * scale, -box.y0 * scale);
    const px = ratio / scale;
    if (this.state) {
      onSlide();
      paintOpen(context, this.state.segmenting?.open ?? [], px, box);
      if (this.shown.outlines && this.version) {
        if (this.mode === 'density') {
          if (this.density) paintDensity(context, this.density, this.state.kinds, this.shown.kinds);
        } else {
          this.pictures.paint(context, scale, box, this.replaced || this.view.zooming);
          onSlide();
          this.paintHovered(px);
        }
      }
      if (this.marked) strokeTwice(context, ringPath(this.marked), px, 3);
      paintRegions(context, this.state.regions, this.draft, px);
      if (this.shown.marks) paintClicks(context, this.state.types, px, box);
    }
    if (this.crosshair) paintCrosshair(context, ratio, width, height);
  }

  paintHovered(px) {
    if (!this.hovered) return;
    const path = new Path2D();
    this.hovered.square.trace(path, this.hovered.cell);
    strokeTwice(this.context, path, px, 2.5);
  }

  /** Draw the outlines that meet a box, one path for each type; whether there are any. Cells whose type is still asked for are left out. */
  drawOutlines(context, box, px) {
    const ratio = window.devicePixelRatio || 1, paths = new Map(), thin = ratio * px > THIN;
    for (const square of this.squares.values()) {
      if (apart(square, box)) continue;
      for (const cell of square.meeting(box)) {
        const code = this.codeShown(square.rows[cell]);
        if (code < 0) continue;
        if (!paths.has(code)) paths.set(code, new Path2D());
        square.trace(paths.get(code), cell, CORNER * px);
      }
    }
    for (const [code, path] of paths) {
      const colour = this.state.kinds[code]?.color ?? '#808080';
      if (this.shown.fill && code !== 0) {
        context.globalAlpha = thin ? 0.45 : 0.28;
        context.fillStyle = colour;
        context.fill(path);
      }
      context.globalAlpha = 1;
      context.strokeStyle = colour;
      context.lineWidth = (thin ? 1 : code === 0 ? 1.5 : 2) * ratio * px;
      context.stroke(path);
    }
    return paths.size > 0;
  }
}
