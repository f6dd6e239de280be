// What is drawn over the slide: outlines of the cells in view, or their density, clicks, regions, the cell under the pointer.

import { getDensity, getOutlines, getTypes } from './server.js';

const SQUARE = 2048; // level-0 px, as in cells.py
const UNIT = 4;
const PATCHES = 4; // patches along a side of a square: what is drawn, and drawn anew after a click, is hardly more than what is in view
const PATCH = SQUARE / PATCHES;
const MOST_SQUARES = 48; // in view; beyond, few cells on much glass: density
const KEPT_SQUARES = 160;
const BIN = 16; // screen px of a square of density
const UNKNOWN = 255;

/** Some cells of a square, drawn together; `paths` holds them by type once they were drawn. */
class Patch {
  constructor(x, y) {
    [this.x0, this.y0, this.x1, this.y1] = [x, y, x + PATCH, y + PATCH];
    this.cells = [];
    this.paths = null;
  }

  add(cell, boxes) {
    this.cells.push(cell);
    this.x0 = Math.min(this.x0, boxes[4 * cell]);
    this.y0 = Math.min(this.y0, boxes[4 * cell + 1]);
    this.x1 = Math.max(this.x1, boxes[4 * cell + 2]);
    this.y1 = Math.max(this.y1, boxes[4 * cell + 3]);
  }
}

class Square {
  constructor(column, row, data) {
    this.x = column * SQUARE;
    this.y = row * SQUARE;
    this.rows = data.rows;
    this.corners = data.corners;
    this.xy = new Float32Array(data.xy.length);
    for (let k = 0; k < data.xy.length; k += 2) {
      this.xy[k] = this.x + data.xy[k] / UNIT;
      this.xy[k + 1] = this.y + data.xy[k + 1] / UNIT;
    }
    this.starts = new Uint32Array(data.corners.length + 1);
    this.boxes = new Float32Array(4 * data.corners.length);
    for (let cell = 0; cell < data.corners.length; cell += 1) {
      this.starts[cell + 1] = this.starts[cell] + data.corners[cell];
      let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
      for (let k = this.starts[cell]; k < this.starts[cell + 1]; k += 1) {
        const x = this.xy[2 * k], y = this.xy[2 * k + 1];
        if (x < left) left = x;
        if (x > right) right = x;
        if (y < top) top = y;
        if (y > bottom) bottom = y;
      }
      this.boxes.set([left, top, right, bottom], 4 * cell);
    }
    this.patches = Array.from({ length: PATCHES * PATCHES }, (_, k) => new Patch(this.x + (k % PATCHES) * PATCH, this.y + Math.floor(k / PATCHES) * PATCH));
    for (let cell = 0; cell < data.corners.length; cell += 1) {
      const place = (k, corner) => Math.max(0, Math.min(PATCHES - 1, Math.floor(((this.boxes[4 * cell + k] + this.boxes[4 * cell + k + 2]) / 2 - corner) / PATCH)));
      this.patches[place(1, this.y) * PATCHES + place(0, this.x)].add(cell, this.boxes);
    }
  }

  trace(path, cell) {
    let k = this.starts[cell];
    const end = this.starts[cell + 1];
    path.moveTo(this.xy[2 * k], this.xy[2 * k + 1]);
    for (k += 1; k < end; k += 1) path.lineTo(this.xy[2 * k], this.xy[2 * k + 1]);
    path.closePath();
  }

  /** Distance of a point from an outline: 0 inside. */
  gap(cell, x, y) {
    let inside = false, least = Infinity;
    const start = this.starts[cell], end = this.starts[cell + 1];
    for (let k = start, before = end - 1; k < end; before = k, k += 1) {
      const ax = this.xy[2 * before], ay = this.xy[2 * before + 1], bx = this.xy[2 * k], by = this.xy[2 * k + 1];
      if ((ay > y) !== (by > y) && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
      const length = (bx - ax) ** 2 + (by - ay) ** 2;
      const t = length ? Math.max(0, Math.min(1, ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length)) : 0;
      least = Math.min(least, Math.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay)));
    }
    return inside ? 0 : least;
  }

  area(cell) {
    let sum = 0;
    const start = this.starts[cell], end = this.starts[cell + 1];
    for (let k = start, before = end - 1; k < end; before = k, k += 1) {
      sum += this.xy[2 * before] * this.xy[2 * k + 1] - this.xy[2 * k] * this.xy[2 * before + 1];
    }
    return Math.abs(sum) / 2;
  }
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
    this.shown = { outlines: true, fill: true, marks: true, kinds: new Set(), score: 0, margin: 0 };
    this.clear();
    this.state = null;
    this.kindsKey = '';
    this.draft = null;
    this.marked = null;
    this.crosshair = false;
    this.counts = null; // of the view, by kind
    this.onCounts = () => {};
    this.lastRetype = 0;
  }

  clear() {
    this.squares = new Map();
    this.version = '';
    this.codes = null;
    this.density = null;
    this.mode = 'outlines';
    this.perArea = 0;
    this.hovered = null;
    this.asked = 0;
  }

  /** Take what the server says; other cells make everything old. */
  update(state) {
    this.state = state;
    const version = state.cells?.version ?? '';
    const kindsKey = JSON.stringify(state.kinds);
    if (version !== this.version) {
      this.clear();
      this.version = version;
      if (version) {
        this.codes = new Uint8Array(state.cells.count).fill(UNKNOWN);
        this.scores = new Uint8Array(state.cells.count);
        this.margins = new Uint8Array(state.cells.count);
      }
    } else if (kindsKey !== this.kindsKey) {
      this.recolour();
    }
    this.kindsKey = kindsKey;
  }

  recolour() {
    for (const square of this.squares.values()) for (const patch of square.patches) patch.paths = null;
    this.draw();
  }

  kindsShown(code) { return !this.shown.kinds.has(code); }

  isShown(row) {
    const code = this.codes[row];
    if (code === UNKNOWN) return true;
    if (!this.kindsShown(code)) return false;
    return code === 0 || (this.scores[row] >= this.shown.score * 255 && this.margins[row] >= this.shown.margin * 255);
  }

  boxInView() {
    const { x0, y0, x1, y1 } = this.view.box();
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
  async refresh() {
    if (!this.version) return this.draw();
    this.wanted = true;
    if (this.busy) return;
    this.busy = true;
    try {
      while (this.wanted) {
        this.wanted = false;
        await this.load();
      }
    } catch (error) {
      this.onProblem(error);
    } finally {
      this.busy = false;
    }
    return undefined;
  }

  async load() {
    const version = this.version, box = this.boxInView();
    if (box.x0 >= box.x1 || box.y0 >= box.y1) return;
    const area = (box.x1 - box.x0) * (box.y1 - box.y0);
    const squares = this.squaresInView(box);
    const many = squares.length > MOST_SQUARES || this.perArea * area > 1.3 * this.viewCells;
    if (!many) {
      const missing = squares.filter(([column, row]) => !this.squares.has(`${column}/${row}`));
      const started = performance.now();
      const [types] = await Promise.all([
        getTypes(box), ...(this.mode === 'outlines' ? missing.map(([column, row]) => this.fetchSquare(version, column, row)) : [])]);
      this.lastRetype = performance.now() - started;
      if (version !== this.version) return;
      this.perArea = types.total / area;
      if (types.total <= this.viewCells) {
        if (this.mode !== 'outlines') {
          await Promise.all(missing.map(([column, row]) => this.fetchSquare(version, column, row)));
          if (version !== this.version) return;
        }
        const changed = this.take(types), other = this.mode !== 'outlines' || missing.length > 0;
        this.mode = 'outlines';
        this.forget(squares);
        if (changed) this.recolour();
        else if (other) this.draw();
        return;
      }
    }
    const scale = this.view.scale();
    const columns = Math.max(1, Math.round(((box.x1 - box.x0) * scale) / BIN)), lines = Math.max(1, Math.round(((box.y1 - box.y0) * scale) / BIN));
    const density = await getDensity(box, Math.min(columns, 512), Math.min(lines, 512), { score: this.shown.score, margin: this.shown.margin });
    if (version !== this.version) return;
    this.density = density;
    this.mode = 'density';
    this.countDensity(area);
    this.draw();
  }

  take(types) {
    const counts = new Array(this.state.kinds.length).fill(0);
    let changed = false;
    for (let k = 0; k < types.rows.length; k += 1) {
      const row = types.rows[k];
      changed ||= this.codes[row] !== types.codes[k] || this.scores[row] !== types.scores[k] || this.margins[row] !== types.margins[k];
      this.codes[row] = types.codes[k];
      this.scores[row] = types.scores[k];
      this.margins[row] = types.margins[k];
      counts[types.codes[k]] += 1;
    }
    this.counts = { counts, whole: types.whole };
    this.onCounts();
    return changed;
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
    if (data && version === this.version) this.squares.set(`${column}/${row}`, new Square(column, row, data));
  }

  /** Fetch the squares around those in view, one after the other, until the view moves: the next pan finds them. */
  async prefetch(still) {
    if (this.mode !== 'outlines' || !this.version) return;
    const version = this.version, box = this.boxInView(), [columns, rows] = this.state.cells.grid;
    const inside = this.squaresInView(box);
    if (!inside.length || inside.length > 12) return;
    const [left, top] = inside[0], [right, bottom] = inside[inside.length - 1];
    for (let row = Math.max(top - 1, 0); row <= Math.min(bottom + 1, rows - 1); row += 1) {
      for (let column = Math.max(left - 1, 0); column <= Math.min(right + 1, columns - 1); column += 1) {
        if (!still() || version !== this.version) return;
        if (!this.squares.has(`${column}/${row}`)) await this.fetchSquare(version, column, row).catch(() => {});
      }
    }
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
    const reach = this.state.reach;
    let best = null;
    for (const square of this.squares.values()) {
      if (x < square.x - SQUARE || y < square.y - SQUARE || x > square.x + 2 * SQUARE || y > square.y + 2 * SQUARE) continue;
      for (let cell = 0; cell < square.rows.length; cell += 1) {
        const b = square.boxes, k = 4 * cell;
        if (x < b[k] - reach || y < b[k + 1] - reach || x > b[k + 2] + reach || y > b[k + 3] + reach) continue;
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
    const scale = this.view.scale() * ratio, box = this.view.box();
    if (!Number.isFinite(scale) || scale <= 0) return;
    context.setTransform(scale, 0, 0, scale, -box.x0 * scale, -box.y0 * scale);
    const px = ratio / scale;
    if (this.state) {
      this.paintOpen(px, box);
      if (this.shown.outlines && this.version) {
        if (this.mode === 'density') this.paintDensity();
        else this.paintOutlines(px, box);
      }
      if (this.marked) this.paintRing(this.marked, px);
      this.paintRegions(px);
      if (this.shown.marks) this.paintClicks(px, box);
    }
    if (this.crosshair) this.paintCrosshair(ratio, width, height);
  }

  paintOutlines(px, box) {
    const { context } = this;
    for (const square of this.squares.values()) {
      for (const patch of square.patches) {
        if (patch.x0 > box.x1 || patch.y0 > box.y1 || patch.x1 < box.x0 || patch.y1 < box.y0) continue;
        if (!patch.paths) this.group(square, patch);
        for (const [code, path] of patch.paths) {
          const colour = code === UNKNOWN ? '#808080' : this.state.kinds[code]?.color ?? '#808080';
          if (this.shown.fill && code !== UNKNOWN && code !== 0) {
            context.globalAlpha = 0.28;
            context.fillStyle = colour;
            context.fill(path);
          }
          context.globalAlpha = 1;
          context.strokeStyle = colour;
          context.lineWidth = (code === 0 || code === UNKNOWN ? 1.5 : 2) * px;
          context.stroke(path);
        }
      }
    }
    if (this.hovered) {
      const path = new Path2D();
      this.hovered.square.trace(path, this.hovered.cell);
      this.strokeTwice(path, px, 2.5);
    }
  }

  paintRing(ring, px) {
    const path = new Path2D();
    ring.forEach(([x, y], k) => (k ? path.lineTo(x, y) : path.moveTo(x, y)));
    path.closePath();
    this.strokeTwice(path, px, 3);
  }

  /** Black on white shows on every slide and colour. */
  strokeTwice(path, px, thick) {
    const { context } = this;
    context.globalAlpha = 1;
    context.lineWidth = 2 * thick * px;
    context.strokeStyle = '#ffffff';
    context.stroke(path);
    context.lineWidth = thick * px;
    context.strokeStyle = '#111111';
    context.stroke(path);
  }

  group(square, patch) {
    patch.paths = new Map();
    for (const cell of patch.cells) {
      const row = square.rows[cell];
      if (!this.isShown(row)) continue;
      const code = this.codes[row];
      if (!patch.paths.has(code)) patch.paths.set(code, new Path2D());
      square.trace(patch.paths.get(code), cell);
    }
  }

  paintDensity() {
    const { context, density } = this;
    const wide = (density.box.x1 - density.box.x0) / density.columns, high = (density.box.y1 - density.box.y0) / density.lines;
    const each = density.columns * density.lines;
    const best = new Int16Array(each).fill(-1), most = new Uint32Array(each);
    let top = 1;
    for (let type = 0; type < density.types; type += 1) {
      if (!this.kindsShown(type)) continue;
      for (let k = 0; k < each; k += 1) {
        const count = density.counts[type * each + k];
        if (count > most[k]) [most[k], best[k]] = [count, type];
        if (count > top) top = count;
      }
    }
    for (let k = 0; k < each; k += 1) {
      if (best[k] < 0) continue;
      context.globalAlpha = 0.15 + 0.6 * Math.sqrt(most[k] / top);
      context.fillStyle = this.state.kinds[best[k]]?.color ?? '#808080';
      context.fillRect(density.box.x0 + (k % density.columns) * wide, density.box.y0 + Math.floor(k / density.columns) * high, wide, high);
    }
    context.globalAlpha = 1;
  }

  paintClicks(px, box) {
    const { context } = this, arm = 7 * px;
    for (const type of this.state.types) {
      for (const side of ['points', 'negative']) {
        for (const [x, y] of type[side]) {
          if (x < box.x0 - arm || x > box.x1 + arm || y < box.y0 - arm || y > box.y1 + arm) continue;
          const path = new Path2D();
          if (side === 'points') path.arc(x, y, 6 * px, 0, 7);
          else {
            path.moveTo(x - arm, y - arm);
            path.lineTo(x + arm, y + arm);
            path.moveTo(x + arm, y - arm);
            path.lineTo(x - arm, y + arm);
          }
          context.strokeStyle = '#ffffff';
          context.lineWidth = 6 * px;
          context.stroke(path);
          context.strokeStyle = type.color;
          context.lineWidth = 3 * px;
          context.stroke(path);
          if (side === 'points') {
            context.fillStyle = type.color;
            context.beginPath();
            context.arc(x, y, 2.5 * px, 0, 7);
            context.fill();
          }
        }
      }
    }
  }

  paintRegions(px) {
    const { context } = this, rings = this.draft ? [...this.state.regions, this.draft] : this.state.regions;
    for (const ring of rings) {
      if (!ring.length) continue;
      const path = new Path2D();
      ring.forEach(([x, y], k) => (k ? path.lineTo(x, y) : path.moveTo(x, y)));
      if (ring !== this.draft) path.closePath();
      context.lineWidth = 5 * px;
      context.strokeStyle = '#ffffff';
      context.stroke(path);
      context.lineWidth = 2.5 * px;
      context.strokeStyle = '#0b5cad';
      context.setLineDash(ring === this.draft ? [8 * px, 5 * px] : []);
      context.stroke(path);
      context.setLineDash([]);
      for (const [x, y] of ring === this.draft ? ring : []) {
        context.fillStyle = '#0b5cad';
        context.fillRect(x - 4 * px, y - 4 * px, 8 * px, 8 * px);
      }
    }
  }

  /** Blocks that are not segmented yet, of a run in progress. */
  paintOpen(px, box) {
    const { context } = this;
    for (const [x0, y0, x1, y1] of this.state.segmenting?.open ?? []) {
      if (x0 > box.x1 || y0 > box.y1 || x1 < box.x0 || y1 < box.y0) continue;
      context.fillStyle = 'rgb(255 255 255 / 30%)';
      context.fillRect(x0, y0, x1 - x0, y1 - y0);
      context.strokeStyle = 'rgb(60 70 80 / 70%)';
      context.lineWidth = px;
      context.setLineDash([6 * px, 4 * px]);
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
      context.setLineDash([]);
    }
  }

  paintCrosshair(ratio, width, height) {
    const { context } = this, arm = 14 * ratio;
    context.setTransform(1, 0, 0, 1, width / 2, height / 2);
    for (const [colour, thick] of [['#ffffff', 4], ['#111111', 1.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = thick * ratio;
      context.beginPath();
      context.moveTo(-arm, 0);
      context.lineTo(arm, 0);
      context.moveTo(0, -arm);
      context.lineTo(0, arm);
      context.stroke();
    }
  }
}
