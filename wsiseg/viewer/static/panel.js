// The panel beside the slide: types with their clicks and counts, warnings, regions. Text of users is set as text, never as markup.

const element = (name, properties = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith('aria-') || key === 'role') made.setAttribute(key, value);
    else if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
};
const number = (value) => value.toLocaleString('en');
const get = (id) => document.getElementById(id);

export class Panel {
  /** `act` carries out changes: act(change), choose(name), show(code, shown), go(point). */
  constructor(act) {
    this.act = act;
    this.chosen = null;
    this.opened = null;
    this.counts = null;
    this.inView = null;
    this.hidden = new Set();
    this.drawn = '';
    get('add').addEventListener('submit', async (event) => {
      event.preventDefault();
      const name = get('new-type').value.trim();
      if (name && await this.act.change({ kind: 'type', new: { name, color: this.act.nextColor() } })) {
        get('new-type').value = '';
        this.act.choose(name);
      }
    });
  }

  update(state) {
    this.state = state;
    if (!state.types.some((type) => type.name === this.chosen)) this.chosen = state.types[0]?.name ?? null;
    const drawn = JSON.stringify([state.types, state.kinds, this.chosen, this.opened]);
    if (drawn !== this.drawn) {
      this.drawn = drawn;
      this.drawTypes();
      this.drawReviewTypes();
    }
    this.drawCounts();
    this.drawRegions();
  }

  choose(name) {
    this.chosen = name;
    this.update(this.state);
  }

  drawTypes() {
    const focused = document.activeElement?.dataset?.key;
    const own = this.state.types.map((type, place) => this.typeRow(type, place));
    const rest = this.state.kinds.map((kind, code) => [kind, code]).filter(([, code]) => code === 0 || code > this.state.types.length);
    const heads = element('div', { className: 'type heads', 'aria-hidden': 'true' }, element('div', { className: 'line' },
      ...['', 'cells', 'show', 'clicks'].map((textContent) => element('span', { textContent }))));
    get('palette').replaceChildren(heads, ...own, ...rest.map(([kind, code]) => this.otherRow(kind, code)));
    if (focused) get('palette').querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  typeRow(type, place) {
    const clicks = type.points.length + type.negative.length, chosen = type.name === this.chosen, opened = this.opened === type.name;
    const keep = (made, key) => {
      made.dataset.key = `${key} ${type.name}`;
      return made;
    };
    const choose = keep(element('button', {
      type: 'button', className: 'choose', role: 'radio', 'aria-checked': String(chosen), onclick: () => this.act.choose(type.name),
      tabIndex: chosen ? 0 : -1,
      onkeydown: (event) => {
        const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = this.state.types[(place + step + this.state.types.length) % this.state.types.length].name;
        this.act.choose(next);
        get('palette').querySelector(`[data-key="${CSS.escape(`choose ${next}`)}"]`)?.focus();
      },
    },
    this.swatch(type.color), element('span', { className: 'name', textContent: type.name, title: type.name }),
    place < 9 ? element('kbd', { textContent: String(place + 1), 'aria-hidden': 'true' }) : ''), 'choose');
    const line = element('div', { className: 'line' }, choose, element('span', { className: 'count' }), this.eye(type.name, place + 1),
      keep(element('button', {
        type: 'button', className: 'icon', textContent: clicks, title: 'Clicks, name and colour', 'aria-expanded': String(opened),
        'aria-label': `${clicks} ${clicks === 1 ? 'click' : 'clicks'} of ${type.name}: list, name and colour`,
        onclick: () => {
          this.opened = opened ? null : type.name;
          this.update(this.state);
        },
      }), 'open'));
    const row = element('div', { className: `type${chosen ? ' chosen' : ''}` }, line);
    row.dataset.code = String(place + 1);
    if (opened) row.append(this.details(type));
    return row;
  }

  otherRow(kind, code) {
    const row = element('div', { className: 'type' }, element('div', { className: 'line' },
      element('span', { className: 'choose' }, this.swatch(kind.color), element('span', { className: 'name', textContent: kind.name, title: kind.name })),
      element('span', { className: 'count' }), this.eye(kind.name, code), ''));
    row.dataset.code = String(code);
    return row;
  }

  swatch(color) {
    const made = element('span', { className: 'swatch', 'aria-hidden': 'true' });
    made.style.backgroundColor = color;
    return made;
  }

  eye(name, code) {
    return element('input', {
      type: 'checkbox', checked: !this.hidden.has(name), title: `Show ${name}`, 'aria-label': `Show ${name}`,
      onchange: (event) => {
        if (event.target.checked) this.hidden.delete(name);
        else this.hidden.add(name);
        this.act.show(code, event.target.checked);
      },
    });
  }

  hiddenCodes() {
    return new Set(this.state.kinds.flatMap((kind, code) => (this.hidden.has(kind.name) ? [code] : [])));
  }

  details(type) {
    const name = element('input', { value: type.name, maxLength: 100, 'aria-label': 'Name of the type' });
    const color = element('input', { type: 'color', value: type.color, 'aria-label': 'Colour of the type' });
    const change = async () => {
      const fresh = name.value.trim();
      if (await this.act.change({ kind: 'type', old: type.name, new: { name: fresh, color: color.value } })) {
        this.opened = fresh;
        this.act.choose(fresh);
      }
    };
    const clicks = ['points', 'negative'].flatMap((side) => type[side].map((point) => element('li', {},
      element('span', { textContent: `${side === 'points' ? 'is' : 'is not'} at ${point[0]}, ${point[1]}` }),
      element('button', { type: 'button', className: 'icon', textContent: 'Show', 'aria-label': `Show the click at ${point}`, onclick: () => this.act.go(point) }),
      element('button', {
        type: 'button', className: 'icon', textContent: 'Remove', 'aria-label': `Remove the click at ${point}`,
        onclick: () => this.act.change({ kind: 'unclick', type: type.name, side, point }),
      }))));
    return element('div', { className: 'more' }, element('div', { className: 'row' }, name, color,
      element('button', { type: 'button', textContent: 'Rename', onclick: change }),
      element('button', { type: 'button', textContent: 'Remove type', onclick: () => this.act.change({ kind: 'type', old: type.name }) })),
    element('ul', { 'aria-label': `Clicks of ${type.name}` }, ...clicks));
  }

  drawCounts() {
    const rows = get('palette').querySelectorAll('[data-code]'), { counts, inView, state } = this;
    for (const row of rows) {
      const kind = state.kinds[Number(row.dataset.code)];
      if (!kind) continue;
      const slide = counts?.counts[kind.name], view = inView?.counts[Number(row.dataset.code)];
      const label = row.querySelector('.count');
      label.textContent = slide === undefined ? '' : `${counts.whole ? '' : '≈ '}${number(slide)}`;
      label.title = view === undefined ? '' : `${inView.whole ? '' : 'about '}${number(Math.round(view))} in view`;
    }
    if (counts) {
      const seen = inView ? `, ${number(Math.round(inView.counts.reduce((a, b) => a + b, 0)))} in view` : '';
      const how = state.applied ? 'applied' : counts.whole ? 'not applied yet' : 'estimated until you apply';
      const clicked = state.types.some((type) => type.points.length), wait = clicked && !state.applied && state.cannotApply;
      get('total').textContent = `${number(counts.cells)} cells${seen}${clicked ? `; ${how}` : ''}.${wait ? ` Apply waits: ${wait}.` : ''}`;
      get('warnings').replaceChildren(...[...state.notices, ...counts.warnings].map((text) => element('li', { textContent: text })));
    } else {
      get('total').textContent = '';
      get('warnings').replaceChildren(...state.notices.map((text) => element('li', { textContent: text })));
    }
  }

  drawReviewTypes() {
    const select = get('review-type'), before = select.value;
    const any = element('option', { value: '', textContent: 'any type' });
    select.replaceChildren(any, ...this.state.kinds.map((kind) => element('option', { value: kind.name, textContent: kind.name })));
    select.value = [...select.options].some((option) => option.value === before) ? before : '';
  }

  drawRegions() {
    get('regions').replaceChildren(...this.state.regions.map((ring, place) => element('li', {},
      element('span', { textContent: `Region ${place + 1}, ${ring.length} corners` }),
      element('span', {},
        element('button', { type: 'button', className: 'icon', textContent: 'Show', 'aria-label': `Show region ${place + 1}`, onclick: () => this.act.go(ring[0]) }),
        element('button', {
          type: 'button', className: 'icon', textContent: 'Remove', 'aria-label': `Remove region ${place + 1}`,
          onclick: () => this.act.change({ kind: 'region', drop: place }),
        })))));
    get('get-regions').hidden = this.state.regions.length === 0;
  }
}
