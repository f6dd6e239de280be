// Outlines as pictures: drawn once for a zoom and the types of the cells, in squares of the screen, and put together at every frame. To draw some
// thousand outlines takes longer than a frame.

const SIDE = 256; // device px
const KEPT = 240; // a quarter of a MB each

export class Pictures {
  /** `draw(context, box, px)` draws the cells that meet a box, all in level-0 px, and says whether there were any; a device px is `px` of them. */
  constructor(draw) {
    this.draw = draw;
    this.scale = 0; // device px per level-0 px
    this.clear();
  }

  clear() { this.held = new Map(); }

  /** Forget those that meet a box. */
  drop(box) {
    for (const [key, { column, row }] of this.held) {
      const mine = this.box(column, row);
      if (mine.x0 <= box.x1 && mine.y0 <= box.y1 && mine.x1 >= box.x0 && mine.y1 >= box.y0) this.held.delete(key);
    }
  }

  box(column, row) {
    const side = SIDE / this.scale;
    return { x0: column * side, y0: row * side, x1: (column + 1) * side, y1: (row + 1) * side };
  }

  /** Paint a view. With `hold`, what is there is stretched and nothing is drawn: for a zoom that lasts one frame, or cells that are being replaced. */
  paint(context, scale, box, hold) {
    const held = hold && this.held.size > 0;
    if (!held && Math.abs(scale / this.scale - 1) > 1e-9) {
      this.clear();
      this.scale = scale;
    }
    const stretch = held ? scale / this.scale : 1, left = Math.round(box.x0 * scale), top = Math.round(box.y0 * scale), side = SIDE * stretch;
    context.setTransform(1, 0, 0, 1, 0, 0);
    const shown = held ? [...this.held.values()] : this.needed(box);
    for (const { column, row } of shown) {
      const canvas = held ? this.held.get(`${column}/${row}`).canvas : this.picture(column, row);
      if (canvas) context.drawImage(canvas, column * side - left, row * side - top, side, side);
    }
    if (!held) this.forget(Math.max(KEPT, 2 * shown.length));
  }

  /** Draw one picture that a view needs and is not there; whether there was one. */
  ahead(box) {
    if (!this.scale) return false;
    const needed = this.needed(box), next = needed.find(({ column, row }) => !this.held.has(`${column}/${row}`));
    if (!next || needed.length > KEPT) return false;
    this.picture(next.column, next.row);
    this.forget(KEPT);
    return true;
  }

  needed({ x0, y0, x1, y1 }) {
    const found = [], side = SIDE / this.scale;
    for (let row = Math.floor(y0 / side); row * side < y1; row += 1) {
      for (let column = Math.floor(x0 / side); column * side < x1; column += 1) found.push({ column, row });
    }
    return found;
  }

  picture(column, row) {
    const key = `${column}/${row}`;
    const found = this.held.get(key) ?? { column, row, canvas: this.make(column, row) };
    this.held.delete(key); // the one used last is the last
    this.held.set(key, found);
    return found.canvas;
  }

  make(column, row) {
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [SIDE, SIDE];
    const context = canvas.getContext('2d');
    context.setTransform(this.scale, 0, 0, this.scale, -column * SIDE, -row * SIDE);
    return this.draw(context, this.box(column, row), 1 / this.scale) ? canvas : null;
  }

  forget(most) {
    for (const key of this.held.keys()) {
      if (this.held.size <= most) return;
      this.held.delete(key);
    }
  }
}
