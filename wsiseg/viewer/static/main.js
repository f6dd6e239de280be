// The page: the slide under OpenSeadragon, what is drawn over it, the panel, and what keys and clicks do.

import { getJson, postJson } from './server.js';
import { Overlay } from './overlay.js';
import { Panel } from './panel.js';
import { Review } from './review.js';
import { Slide } from './slide.js';

const COLOURS = ['#d55e00', '#0072b2', '#009e73', '#f0e442', '#56b4e9', '#e69f00', '#cc79a7', '#000000']; // Okabe and Ito
const STEP = 0.25; // of the view, per arrow key
const POLL_MS = 1500;
const FOLLOW_MS = 100; // between questions while the view moves
const REST_MS = 150; // without movement, before what lies around the view is fetched
const get = (id) => document.getElementById(id);

const about = await getJson('slide').catch((error) => {
  get('slide').textContent = error.message;
  throw error;
});
const [width, height] = about.size;
const hasScale = Number.isFinite(about.mpp);
get('slide').textContent = about.slide;
get('slide').title = about.folder;
document.title = `${about.slide} – wsiseg`;
get('facts').textContent = `${width} × ${height} px${hasScale ? `, ${about.mpp.toFixed(3)} µm per px` : ''}`;

let state = null;
let pointer = null; // the last event of it over the slide

const slide = new Slide(get('viewer'), about), { viewer } = slide;

function go(place) {
  hover(null); // what is under the pointer is another cell then
  slide.go(place);
}

// --- messages ------------------------------------------------------------------------------------------------------------------------

let silence = 0;
function tell(text, bad = false) {
  get('status').textContent = text;
  get('status').classList.toggle('bad', bad);
  clearTimeout(silence);
  silence = setTimeout(() => { get('status').textContent = ''; }, bad ? 9000 : 4000);
}

// --- state ---------------------------------------------------------------------------------------------------------------------------

const overlay = new Overlay(slide, about.size, about.viewCells, (error) => tell(error.message, true));
const panel = new Panel({
  change,
  choose,
  go,
  nextColor: () => COLOURS.find((color) => !state.types.some((type) => type.color === color)) ?? COLOURS[state.types.length % COLOURS.length],
  show: () => {
    overlay.shown.kinds = panel.hiddenCodes();
    overlay.recolour();
  },
});
const review = new Review({ change, go, tell, state: () => state, mark: (ring) => overlay.mark(ring) }, hasScale ? about.mpp : 0.25);
overlay.onSettled = () => {
  clearTimeout(resting);
  resting = setTimeout(prefetch, REST_MS);
};
overlay.onCounts = () => {
  if (pointer) hover(pointer); // the cell may have another type by now
  panel.inView = overlay.counts;
  panel.drawCounts();
};

function take(fresh) {
  const changed = !state || fresh.revision !== state.revision || fresh.applied !== state.applied
    || fresh.cells?.version !== state.cells?.version || fresh.cells?.count !== state.cells?.count;
  const ended = state?.applying && !fresh.applying;
  state = fresh;
  overlay.update(state);
  panel.update(state);
  overlay.shown.kinds = panel.hiddenCodes();
  get('undo').disabled = !state.canUndo;
  get('redo').disabled = !state.canRedo;
  const clicked = state.types.some((type) => type.points.length);
  get('get-seeds').hidden = !clicked;
  get('apply').disabled = state.applying || state.applied || !clicked || state.cannotApply !== '';
  get('apply').textContent = state.applying ? 'Applying…' : state.applied && clicked ? 'Applied' : 'Apply';
  get('apply').title = state.cannotApply ? `Not now: ${state.cannotApply}` : 'Type the whole slide with these clicks';
  drawSegmenting();
  if (ended) tell(state.applyError || 'The whole slide is typed with your clicks.', state.applyError !== '');
  slide.renew(state.picture);
  overlay.draw();
  if (!changed) return;
  overlay.refresh();
  count();
}

let counting = false, countAgain = false;
async function count() {
  if (!state.cells) return;
  countAgain = true;
  if (counting) return;
  counting = true;
  try {
    while (countAgain) {
      countAgain = false;
      await overlay.running; // the view first
      panel.counts = await getJson('counts');
      panel.drawCounts();
    }
  } catch (error) {
    tell(error.message, true);
  } finally {
    counting = false;
  }
}

/** Ask for a change; whether it was made. */
async function change(request) {
  clearTimeout(resting); // what lies around the view comes after what is in it
  try {
    take(await postJson('do', request));
    return true;
  } catch (error) {
    tell(error.message, true);
    return false;
  }
}

function choose(name) {
  panel.choose(name);
  get('hint').textContent = `Click cells of ${name}; right click what is not.`;
}

async function save() {
  try {
    const { written } = await postJson('save');
    get('saved').textContent = `Saved: ${written.join(', ')}`;
    tell('Saved.');
  } catch (error) {
    tell(error.message, true);
  }
}

async function apply() {
  try {
    take(await postJson('apply'));
    tell('Applying your clicks to the whole slide.');
  } catch (error) {
    tell(error.message, true);
  }
}

async function poll() {
  if (!document.hidden) {
    try {
      take(await getJson('state'));
      get('viewer').dataset.alive = 'yes';
    } catch (error) {
      if (get('viewer').dataset.alive !== 'no') tell(error.message, true);
      get('viewer').dataset.alive = 'no';
    }
  }
  setTimeout(poll, POLL_MS);
}

function drawSegmenting() {
  const work = state.segmenting;
  get('segmenting').hidden = !work;
  if (!work) return;
  const failed = work.failures.length ? ` Not read: ${work.failures[work.failures.length - 1]}` : '';
  const next = work.now ? ` Outlining a block: ${work.early} of ${work.each} tiles${work.waiting ? `; ${work.waiting} more in view` : ''}.` : '';
  const rest = work.tiles[1] ? `: ${work.tiles[0]} of ${work.tiles[1]} tiles` : '';
  const done = work.all ? `Segmenting the rest${rest}.` : `${work.done} of ${work.blocks} blocks are done.${next}`;
  get('progress').textContent = `${done}${failed}`;
  get('rest').disabled = work.all;
}

// --- clicks --------------------------------------------------------------------------------------------------------------------------

async function clickAt(point, opposite) {
  const negative = opposite !== get('against').checked;
  if (!panel.chosen) return tell('Add a type first.', true);
  if (overlay.mode === 'density' && overlay.version) return tell('Zoom in until cells are outlined, then click.', true);
  const type = panel.chosen;
  if (await change({ kind: 'click', type, negative, point })) {
    const made = state.types.find((one) => one.name === type);
    tell(negative ? `Not ${type}: ${made.negative.length}` : `${type}: ${made.points.length} ${made.points.length === 1 ? 'click' : 'clicks'}`);
  }
  return undefined;
}

function pressAt(point, negative) {
  if (overlay.draft) {
    overlay.draft.push(point.map((edge) => Math.round(edge * 100) / 100));
    get('close-region').hidden = overlay.draft.length < 3;
    overlay.draw();
  } else {
    clickAt(point.map((edge) => Math.round(edge * 100) / 100), negative);
  }
}

viewer.addHandler('canvas-click', (event) => {
  if (event.quick) pressAt(slide.place(event.originalEvent), event.originalEvent.altKey);
});
viewer.addHandler('canvas-double-click', () => { if (overlay.draft?.length >= 3) finishRegion(); });
get('viewer').addEventListener('contextmenu', (event) => {
  event.preventDefault();
  pressAt(slide.place(event), true);
});


function hover(event) {
  const tip = get('hover');
  pointer = event;
  if (!event || !state) {
    overlay.hover(null);
    tip.hidden = true;
    return;
  }
  const [x, y] = slide.place(event);
  showPlace(x, y);
  const found = overlay.hover(x, y), code = found ? overlay.codes[found.row] : 255;
  tip.hidden = !found || code === 255;
  if (tip.hidden) return;
  const sure = code === 0 ? '' : `, score ${(overlay.scores[found.row] / 255).toFixed(2)}, margin ${(overlay.margins[found.row] / 255).toFixed(2)}`;
  tip.textContent = `${state.kinds[code].name}${sure}`;
  const frame = get('viewer').getBoundingClientRect();
  const left = Math.min(event.clientX - frame.left + 14, frame.width - tip.offsetWidth - 4);
  tip.style.transform = `translate(${left}px, ${Math.max(event.clientY - frame.top - tip.offsetHeight - 10, 4)}px)`;
}
get('viewer').addEventListener('pointermove', hover);
get('viewer').addEventListener('pointerleave', () => hover(null));

// --- the view ------------------------------------------------------------------------------------------------------------------------

function showPlace(x, y) {
  const um = hasScale ? ` (${Math.round(x * about.mpp)}, ${Math.round(y * about.mpp)} µm)` : '';
  get('where').textContent = `${Math.round(x)}, ${Math.round(y)} px${um}`;
}

function showScale() {
  const [wide, text] = slide.mark();
  get('scale').style.width = `${wide}px`;
  get('scale').textContent = text;
}

let settled = 0, resting = 0, moves = 0, followed = 0;
function moved() {
  moves += 1;
  overlay.draw();
  showScale();
  if (document.activeElement === get('viewer')) {
    showPlace(...slide.middle);
    if (overlay.crosshair) overlay.hover(...slide.middle);
  }
  if (performance.now() - followed > FOLLOW_MS && state) {
    followed = performance.now();
    overlay.follow();
  }
  clearTimeout(settled);
  settled = setTimeout(look, 40);
}

/** Fetch what lies around the view while nothing else is to do: cells, then tiles into the browser's cache, the nearest first. */
async function prefetch() {
  const move = moves, still = () => move === moves && !overlay.busy;
  await overlay.prefetch(still);
  await slide.prefetch(still);
}

let looked = '';
async function look() {
  if (!state) return;
  overlay.follow();
  const box = overlay.boxInView(), key = JSON.stringify(box);
  if (state.segmenting && !state.segmenting.all && key !== looked && box.x0 < box.x1 && box.y0 < box.y1) {
    looked = key;
    postJson('segment', box).then(take).catch((error) => tell(error.message, true));
  }
}
viewer.addHandler('update-viewport', () => overlay.draw());
viewer.addHandler('animation', moved);
viewer.addHandler('animation-finish', moved);
viewer.addHandler('resize', moved);
viewer.addHandler('open', async () => {
  showScale();
  if (!state) {
    take(await getJson('state'));
    choose(panel.chosen);
    setTimeout(poll, POLL_MS);
  }
  look();
  document.documentElement.dataset.ready = 'yes';
});
viewer.addHandler('open-failed', (event) => tell(`The slide cannot be shown: ${event.message}`, true));
viewer.addHandler('tile-load-failed', (event) => { tell(`Some of the slide cannot be read: ${event.message}`, true); });

// --- buttons -------------------------------------------------------------------------------------------------------------------------

get('undo').addEventListener('click', () => change({ kind: 'undo' }));
get('redo').addEventListener('click', () => change({ kind: 'redo' }));
get('save').addEventListener('click', save);
get('apply').addEventListener('click', apply);
get('rest').addEventListener('click', () => postJson('segment', { all: true }).then(take).catch((error) => tell(error.message, true)));
for (const id of ['outlines', 'fill', 'marks']) {
  get(id).addEventListener('change', (event) => {
    overlay.shown[id] = event.target.checked;
    overlay.recolour();
  });
}
for (const [id, key] of [['min-score', 'score'], ['min-margin', 'margin']]) {
  get(id).addEventListener('input', (event) => {
    overlay.shown[key] = Number(event.target.value);
    event.target.nextElementSibling.textContent = event.target.value;
    overlay.recolour();
    if (overlay.mode === 'density') overlay.refresh();
  });
}
get('jump').addEventListener('submit', (event) => {
  event.preventDefault();
  const numbers = get('place').value.split(/[\s,;]+/).filter(Boolean).map(Number);
  if (numbers.length !== 2 || numbers.some((n) => !Number.isFinite(n))) return tell('Write two numbers: x, y in px of the slide.', true);
  if (numbers[0] < 0 || numbers[1] < 0 || numbers[0] > width || numbers[1] > height) return tell(`The slide has ${width} × ${height} px.`, true);
  return go(numbers);
});

function draw(start) {
  overlay.draft = start ? [] : null;
  get('draw').setAttribute('aria-pressed', String(start));
  get('draw').textContent = start ? 'Cancel the region' : 'Draw a region';
  get('close-region').hidden = true;
  if (start) tell('Click the corners of the region; double click the last, or press Finish.');
  overlay.draw();
}
async function finishRegion() {
  const ring = overlay.draft;
  draw(false);
  await change({ kind: 'region', add: ring });
}
get('draw').addEventListener('click', () => draw(!overlay.draft));
get('close-region').addEventListener('click', finishRegion);

// --- keys ----------------------------------------------------------------------------------------------------------------------------

const toggle = (id) => {
  get(id).checked = !get(id).checked;
  get(id).dispatchEvent(new Event('change'));
};
get('viewer').addEventListener('focus', () => {
  overlay.crosshair = get('viewer').matches(':focus-visible');
  moved();
});
get('viewer').addEventListener('blur', () => {
  overlay.crosshair = false;
  overlay.draw();
});
get('viewer').addEventListener('pointerdown', () => {
  overlay.crosshair = false;
  get('viewer').focus({ preventScroll: true });
  overlay.crosshair = false;
});
get('viewer').addEventListener('keydown', (event) => {
  const { viewport } = viewer, bounds = viewport.getBounds(true);
  const pan = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (pan) viewport.panBy(new OpenSeadragon.Point(pan[0] * STEP * bounds.width * (event.shiftKey ? 0.1 : 1), pan[1] * STEP * bounds.height * (event.shiftKey ? 0.1 : 1)));
  else if (event.key === '+' || event.key === '=') viewport.zoomBy(1.5);
  else if (event.key === '-') viewport.zoomBy(1 / 1.5);
  else if (event.key === '0') viewport.goHome();
  else if (event.key === 'Enter') pressAt(slide.middle, event.shiftKey || event.altKey);
  else return;
  overlay.crosshair = true;
  event.preventDefault();
  viewport.applyConstraints();
  moved();
});
document.addEventListener('keydown', (event) => {
  const typing = event.target.matches?.('input:not([type=checkbox]):not([type=range]), textarea, select');
  const key = event.key.toLowerCase(), command = event.ctrlKey || event.metaKey;
  if (command && key === 's') save();
  else if (typing) return;
  else if (command && key === 'z') change({ kind: event.shiftKey ? 'redo' : 'undo' });
  else if (command && key === 'y') change({ kind: 'redo' });
  else if (command || event.altKey) return;
  else if (key >= '1' && key <= '9' && key.length === 1) {
    const type = state?.types[Number(key) - 1];
    if (!type) return;
    if (review.active) review.give(type.name);
    else choose(type.name);
  } else if (key === 'h') toggle('outlines');
  else if (key === 'f') toggle('fill');
  else if (key === 'c') toggle('marks');
  else if (key === 'r') review.start();
  else if (key === 'k') review.keep();
  else if (key === 'n') review.noCell();
  else if (key === 'j') review.skip();
  else if (key === 'escape') {
    if (overlay.draft) draw(false);
    else if (review.active) review.stop();
    return;
  } else return;
  event.preventDefault();
});

// For the tests.
window.wsiseg = { overlay, viewer, change, state: () => state };
