// The outlines of the cells of one square of the slide, as the server sends them (cells.py).

export const SQUARE = 2048; // level-0 px
const UNIT = 4; // steps per px
const PATCHES = 4; // patches along a side of a square: what is looked through for a place is hardly more than what is there
const PATCH = SQUARE / PATCHES;

/** Some cells of a square, and the box of their outlines. */
class Patch {
  constructor(x, y) {
    [this.x0, this.y0, this.x1, this.y1] = [x, y, x + PATCH, y + PATCH];
    this.cells = [];
  }

  add(cell, boxes) {
    this.cells.push(cell);
    this.x0 = Math.min(this.x0, boxes[4 * cell]);
    this.y0 = Math.min(this.y0, boxes[4 * cell + 1]);
    this.x1 = Math.max(this.x1, boxes[4 * cell + 2]);
    this.y1 = Math.max(this.y1, boxes[4 * cell + 3]);
  }
}

export const apart = (a, b) => a.x0 > b.x1 || a.y0 > b.y1 || a.x1 < b.x0 || a.y1 < b.y0;

export class Square {
  constructor(column, line, { rows, corners, xy }) {
    [this.x, this.y] = [column * SQUARE, line * SQUARE];
    [this.rows, this.corners, this.xy] = [rows, corners, xy];
    this.starts = new Uint32Array(corners.length + 1);
    this.boxes = new Float32Array(4 * corners.length);
    this.patches = Array.from({ length: PATCHES * PATCHES }, (_, k) => new Patch(this.x + (k % PATCHES) * PATCH, this.y + Math.floor(k / PATCHES) * PATCH));
    for (let cell = 0; cell < corners.length; cell += 1) {
      this.starts[cell + 1] = this.starts[cell] + corners[cell];
      this.measure(cell);
      const [column, row] = this.middle(cell).map((at, k) => Math.max(0, Math.min(PATCHES - 1, Math.floor((at - [this.x, this.y][k]) / PATCH))));
      this.patches[row * PATCHES + column].add(cell, this.boxes);
    }
    const edge = (of, key) => of(...this.patches.map((patch) => patch[key]));
    [this.x0, this.y0, this.x1, this.y1] = [edge(Math.min, 'x0'), edge(Math.min, 'y0'), edge(Math.max, 'x1'), edge(Math.max, 'y1')];
  }

  measure(cell) {
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    const end = 2 * this.starts[cell + 1];
    for (let k = 2 * this.starts[cell]; k < end; k += 2) {
      const x = this.xy[k], y = this.xy[k + 1];
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < top) top = y;
      if (y > bottom) bottom = y;
    }
    this.boxes.set([this.x + left / UNIT, this.y + top / UNIT, this.x + right / UNIT, this.y + bottom / UNIT], 4 * cell);
  }

  middle(cell) {
    const { boxes } = this, k = 4 * cell;
    return [(boxes[k] + boxes[k + 2]) / 2, (boxes[k + 1] + boxes[k + 3]) / 2];
  }

  /** The cells whose box meets another. */
  * meeting(box) {
    const { boxes } = this;
    for (const patch of this.patches) {
      if (apart(patch, box)) continue;
      for (const cell of patch.cells) {
        const k = 4 * cell;
        if (boxes[k] <= box.x1 && boxes[k + 1] <= box.y1 && boxes[k + 2] >= box.x0 && boxes[k + 3] >= box.y0) yield cell;
      }
    }
  }

  /** Add an outline to a path, without corners that are nearer than `gap` px to the one before. It ends with its first two corners again: closePath
   * looks through the whole path in Chromium, and took half of the time to draw some thousand outlines. */
  trace(path, cell, gap = 0) {
    const { xy, boxes } = this, start = 2 * this.starts[cell], end = 2 * this.starts[cell + 1];
    const side = boxes[4 * cell + 2] - boxes[4 * cell] + boxes[4 * cell + 3] - boxes[4 * cell + 1];
    const least = (Math.min(gap, side / 16) * UNIT) ** 2; // some 12 corners at least
    let x = xy[start], y = xy[start + 1], second = -1;
    path.moveTo(this.x + x / UNIT, this.y + y / UNIT);
    for (let k = start + 2; k < end; k += 2) {
      if ((xy[k] - x) ** 2 + (xy[k + 1] - y) ** 2 < least) continue;
      x = xy[k];
      y = xy[k + 1];
      if (second < 0) second = k;
      path.lineTo(this.x + x / UNIT, this.y + y / UNIT);
    }
    for (const k of second < 0 ? [start] : [start, second]) path.lineTo(this.x + xy[k] / UNIT, this.y + xy[k + 1] / UNIT);
  }

  /** Distance of a point from an outline: 0 inside. */
  gap(cell, atX, atY) {
    const { xy } = this, start = 2 * this.starts[cell], end = 2 * this.starts[cell + 1];
    const x = (atX - this.x) * UNIT, y = (atY - this.y) * UNIT;
    let inside = false, least = Infinity;
    for (let k = start, before = end - 2; k < end; before = k, k += 2) {
      const ax = xy[before], ay = xy[before + 1], bx = xy[k], by = xy[k + 1];
      if ((ay > y) !== (by > y) && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
      const length = (bx - ax) ** 2 + (by - ay) ** 2;
      const t = length ? Math.max(0, Math.min(1, ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length)) : 0;
      least = Math.min(least, Math.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay)));
    }
    return inside ? 0 : least / UNIT;
  }

  area(cell) {
    const { xy } = this, start = 2 * this.starts[cell], end = 2 * this.starts[cell + 1];
    let sum = 0;
    for (let k = start, before = end - 2; k < end; before = k, k += 2) sum += xy[before] * xy[k + 1] - xy[k] * xy[before + 1];
    return Math.abs(sum) / 2 / UNIT ** 2;
  }
}
