// Review: the least certain cells one after the other; keep, give another type, or say that it is no cell.

import { getJson } from './server.js';

const SIDE_UM = 40; // of the crop: a nucleus and its neighbours
const get = (id) => document.getElementById(id);

export class Review {
  /** `act` carries out changes: change(request), go(point), tell(text, bad), state(). */
  constructor(act, mpp) {
    this.act = act;
    this.side = SIDE_UM / mpp;
    this.cells = [];
    this.cell = null;
    this.busy = false;
    get('review').addEventListener('click', () => this.start());
    get('keep').addEventListener('click', () => this.keep());
    get('nocell').addEventListener('click', () => this.noCell());
    get('skip').addEventListener('click', () => this.skip());
    get('stop').addEventListener('click', () => this.stop());
  }

  get active() { return this.cell !== null; }

  get waiting() { return this.cell === null || this.busy; }

  async start() {
    this.cells = [];
    await this.next();
    if (!this.active) return;
    get('card').scrollIntoView({ block: 'nearest' });
    get('keep').focus();
  }

  async next() {
    if (!this.cells.length) {
      const only = get('review-type').value;
      const found = await getJson('review', only ? { type: only } : {}).catch((error) => {
        this.act.tell(error.message, true);
        return { cells: [] };
      });
      [this.cells, this.version] = [found.cells, found.version];
    }
    this.cell = this.cells.shift() ?? null;
    get('card').hidden = !this.cell;
    get('card').dataset.row = this.cell?.row ?? '';
    this.act.mark(this.cell?.ring ?? null);
    if (!this.cell) {
      this.act.tell('No more cells to review here.');
      return;
    }
    const kind = this.act.state().kinds[this.cell.kind].name;
    get('verdict').textContent = `${kind}: score ${this.cell.score.toFixed(2)}, margin ${this.cell.margin.toFixed(2)}`;
    get('crop').setAttribute('aria-label', `The cell under review, at ${this.cell.point}, typed ${kind}`);
    get('others').replaceChildren(...this.act.state().types.flatMap((type, place) => (type.name === kind ? [] : [this.button(type, place + 1)])));
    this.act.go(this.cell.point);
    this.paint(this.cell); // not waited for: the outline is in the view already
  }

  button(type, key) {
    const made = document.createElement('button'), swatch = document.createElement('span');
    made.type = 'button';
    swatch.className = 'swatch';
    swatch.style.backgroundColor = type.color;
    made.append(swatch, type.name);
    if (key <= 9) made.append(Object.assign(document.createElement('kbd'), { textContent: key }));
    made.addEventListener('click', () => this.give(type.name));
    return made;
  }

  async paint(cell) {
    const canvas = get('crop'), context = canvas.getContext('2d'), [x, y] = cell.centre;
    const picture = new Image();
    picture.src = `crop?x=${x}&y=${y}&side=${this.side}`;
    await picture.decode().catch(() => {});
    if (cell !== this.cell) return;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (picture.naturalWidth) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const scale = canvas.width / this.side;
    for (const [colour, thick] of [['#ffffff', 4], [this.act.state().kinds[cell.kind]?.color ?? '#111111', 2]]) {
      context.beginPath();
      cell.ring.forEach(([px, py], k) => {
        const at = [(px - x + this.side / 2) * scale, (py - y + this.side / 2) * scale];
        if (k) context.lineTo(...at);
        else context.moveTo(...at);
      });
      context.closePath();
      [context.strokeStyle, context.lineWidth] = [colour, thick];
      context.stroke();
    }
  }

  /** Carry out a verdict; the next cells are asked for again, since a click changes which are uncertain. */
  async decide(request, renew) {
    this.busy = true; // a key pressed meanwhile would mean the next cell, which is not shown yet
    try {
      if (await this.act.change(request)) {
        if (renew) this.cells = [];
        await this.next();
      }
    } finally {
      this.busy = false;
    }
  }

  ownType() {
    const name = this.act.state().kinds[this.cell.kind].name;
    return this.act.state().types.some((type) => type.name === name) ? name : null;
  }

  seen() { return { kind: 'seen', row: this.cell.row, version: this.version }; }

  async keep() {
    if (this.waiting) return;
    const type = this.ownType();
    if (type) await this.decide({ kind: 'click', type, point: this.cell.point, seen: true }, true);
    else await this.decide(this.seen(), false);
  }

  async give(type) {
    if (!this.waiting) await this.decide({ kind: 'click', type, point: this.cell.point, seen: true }, true);
  }

  async noCell() {
    if (this.waiting) return;
    const type = this.ownType();
    if (type) await this.decide({ kind: 'click', type, point: this.cell.point, negative: true, seen: true }, true);
    else await this.decide(this.seen(), false);
  }

  async skip() {
    if (!this.waiting) await this.decide(this.seen(), false);
  }

  stop() {
    this.cell = null;
    this.act.mark(null);
    get('card').hidden = true;
    get('review').focus();
  }
}
