// What is painted over the slide at every frame besides the outlines. Coordinates are level-0 px; a screen px is `px` of them.

/** Black on white shows on every slide and colour. */
export function strokeTwice(context, path, px, thick) {
  context.globalAlpha = 1;
  context.lineWidth = 2 * thick * px;
  context.strokeStyle = '#ffffff';
  context.stroke(path);
  context.lineWidth = thick * px;
  context.strokeStyle = '#111111';
  context.stroke(path);
}

export function ringPath(ring, closed = true) {
  const path = new Path2D();
  ring.forEach(([x, y], k) => (k ? path.lineTo(x, y) : path.moveTo(x, y)));
  if (closed) path.closePath();
  return path;
}

/** Squares in the colour of their most frequent type, the denser the stronger. `hidden` holds the types that are not shown. */
export function paintDensity(context, density, kinds, hidden) {
  const wide = (density.box.x1 - density.box.x0) / density.columns, high = (density.box.y1 - density.box.y0) / density.lines;
  const each = density.columns * density.lines;
  const best = new Int16Array(each).fill(-1), most = new Uint32Array(each);
  let top = 1;
  for (let type = 0; type < density.types; type += 1) {
    if (hidden.has(type)) continue;
    for (let k = 0; k < each; k += 1) {
      const count = density.counts[type * each + k];
      if (count > most[k]) [most[k], best[k]] = [count, type];
      if (count > top) top = count;
    }
  }
  for (let k = 0; k < each; k += 1) {
    if (best[k] < 0) continue;
    context.globalAlpha = 0.15 + 0.6 * Math.sqrt(most[k] / top);
    context.fillStyle = kinds[best[k]]?.color ?? '#808080';
    context.fillRect(density.box.x0 + (k % density.columns) * wide, density.box.y0 + Math.floor(k / density.columns) * high, wide, high);
  }
  context.globalAlpha = 1;
}

export function paintClicks(context, types, px, box) {
  const arm = 7 * px;
  for (const type of types) {
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

export function paintRegions(context, regions, draft, px) {
  for (const ring of draft ? [...regions, draft] : regions) {
    if (!ring.length) continue;
    const path = ringPath(ring, ring !== draft);
    context.lineWidth = 5 * px;
    context.strokeStyle = '#ffffff';
    context.stroke(path);
    context.lineWidth = 2.5 * px;
    context.strokeStyle = '#0b5cad';
    context.setLineDash(ring === draft ? [8 * px, 5 * px] : []);
    context.stroke(path);
    context.setLineDash([]);
    for (const [x, y] of ring === draft ? ring : []) {
      context.fillStyle = '#0b5cad';
      context.fillRect(x - 4 * px, y - 4 * px, 8 * px, 8 * px);
    }
  }
}

/** Blocks that are not segmented yet, of a run in progress. */
export function paintOpen(context, blocks, px, box) {
  for (const [x0, y0, x1, y1] of blocks) {
    if (x0 > box.x1 || y0 > box.y1 || x1 < box.x0 || y1 < box.y0) continue;
    context.strokeStyle = 'rgb(60 70 80 / 70%)';
    context.lineWidth = px;
    context.setLineDash([6 * px, 4 * px]);
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    context.setLineDash([]);
  }
}

/** In the middle of a canvas of this size, device px. */
export function paintCrosshair(context, ratio, width, height) {
  const arm = 14 * ratio;
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
