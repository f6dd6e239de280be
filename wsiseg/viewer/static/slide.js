// The slide under OpenSeadragon, and where the view is on it, in level-0 px.

const AHEAD = 2; // tiles on each side of the view that are fetched before they are seen
const MARKS_UM = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];
const MARK_PX = 60; // the scale bar is longer

export class Slide {
  /** `about` is what the server says of the slide. */
  constructor(element, about) {
    [this.element, this.about] = [element, about];
    [this.width, this.height] = about.size;
    this.picture = 0; // grows when tiles are not what they were
    this.top = Math.ceil(Math.log2(Math.max(this.width, this.height)));
    const gestures = { clickToZoom: false, dblClickToZoom: false };
    this.viewer = OpenSeadragon({
      element, tileSources: this.source(), drawer: 'canvas', showNavigationControl: false, keyboardNavEnabled: false,
      gestureSettingsMouse: gestures, gestureSettingsTouch: gestures, gestureSettingsPen: gestures,
      animationTime: 0.25, springStiffness: 10, visibilityRatio: 0.3, maxZoomPixelRatio: 8, minZoomImageRatio: 0.8,
      immediateRender: true, imageLoaderLimit: 4, maxTilesPerFrame: 8, maxImageCacheCount: 64,
    });
    this.viewer.canvas.removeAttribute?.('tabindex'); // the element around it takes the focus
    this.viewer.container.querySelectorAll('[tabindex]').forEach((inner) => inner.setAttribute('tabindex', '-1'));
  }

  source() {
    const { top, about, picture } = this;
    return {
      width: this.width, height: this.height, tileSize: about.tile, tileOverlap: 0, maxLevel: top, minLevel: top - about.zooms + 1,
      getTileUrl: (level, x, y) => `tile/${top - level}/${x}/${y}${picture ? `?${picture}` : ''}`,
    };
  }

  /** Show the tiles anew if they are others by now. */
  renew(picture) {
    if (picture === this.picture) return;
    this.picture = picture;
    this.viewer.open(this.source());
  }

  get zooming() { return Math.abs(this.viewer.viewport.getZoom(true) / this.viewer.viewport.getZoom(false) - 1) > 1e-9; }

  /** Screen px per level-0 px. */
  get scale() { return (this.element.clientWidth * this.viewer.viewport.getZoom(true)) / this.width; }

  get box() {
    const { x, y, width, height } = this.viewer.viewport.getBounds(true);
    return { x0: x * this.width, y0: y * this.width, x1: (x + width) * this.width, y1: (y + height) * this.width };
  }

  get middle() {
    const { x0, y0, x1, y1 } = this.box;
    return [(x0 + x1) / 2, (y0 + y1) / 2];
  }

  /** The place on the slide under a pointer event. */
  place(event) {
    const frame = this.element.getBoundingClientRect(), { box, scale } = this;
    return [box.x0 + (event.clientX - frame.left) / scale, box.y0 + (event.clientY - frame.top) / scale];
  }

  /** Bring a place to the middle, near enough to see its cell. */
  go([x, y]) {
    const { viewport } = this.viewer;
    if (this.scale < 0.8) viewport.zoomTo((1.2 * this.width) / this.element.clientWidth, null, true);
    viewport.panTo(new OpenSeadragon.Point(x / this.width, y / this.width), true);
    viewport.applyConstraints(true);
  }

  /** Width in screen px and text of a scale bar. */
  mark() {
    const { scale, about: { mpp } } = this, hasScale = Number.isFinite(mpp), each = hasScale ? scale / mpp : scale;
    const mark = MARKS_UM.find((length) => length * each > MARK_PX) ?? 10000;
    const text = hasScale ? (mark >= 1000 ? `${mark / 1000} mm` : `${mark} µm`) : `${mark} px`;
    return [mark * each, text];
  }

  /** Fetch the tiles around the view into the browser's cache, the nearest first, while `still()` holds. */
  async prefetch(still) {
    const drawn = this.viewer.world.getItemAt(0)?.lastDrawn ?? [];
    const level = Math.max(...drawn.map((tile) => tile.level)), shown = drawn.filter((tile) => tile.level === level);
    if (!shown.length || shown.length > 60) return;
    const range = (of) => [Math.min(...shown.map(of)), Math.max(...shown.map(of))];
    const [left, right] = range((tile) => tile.x), [up, down] = range((tile) => tile.y), side = this.about.tile * 2 ** (this.top - level);
    const last = (length) => Math.ceil(length / side) - 1, around = [];
    for (let y = Math.max(up - AHEAD, 0); y <= Math.min(down + AHEAD, last(this.height)); y += 1) {
      for (let x = Math.max(left - AHEAD, 0); x <= Math.min(right + AHEAD, last(this.width)); x += 1) {
        const away = Math.max(left - x, x - right, up - y, y - down);
        if (away > 0) around.push([away, x, y]);
      }
    }
    for (const [, x, y] of around.sort((a, b) => a[0] - b[0])) {
      if (!still()) return;
      await fetch(this.source().getTileUrl(level, x, y), { priority: 'low' }).then((answer) => answer.blob()).catch(() => {});
    }
  }
}
