// What the page asks the server. Addresses are relative: they lie below the token.

export class Refused extends Error {}

async function answer(response) {
  if (response.ok) return response;
  const text = await response.text();
  let reason = text.trim();
  try { reason = JSON.parse(text).error ?? reason; } catch { /* a line of text */ }
  throw new Refused(reason || `the server answered ${response.status}`);
}

async function ask(address, options) {
  try {
    return await answer(await fetch(address, options));
  } catch (error) {
    if (error instanceof Refused) throw error;
    throw new Refused('the server does not answer: is `wsiseg view` still running? Your clicks so far are kept.');
  }
}

const query = (values) => new URLSearchParams(Object.entries(values).map(([key, value]) => [key, String(value)])).toString();
const post = (address, body = {}) => ask(address, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) });
const bytes = async (address) => (await ask(address)).arrayBuffer();

export const getJson = async (address, values = {}) => (await ask(`${address}?${query(values)}`)).json();
export const postJson = async (address, body) => (await post(address, body)).json();

export async function getOutlines(version, column, row) {
  const buffer = await bytes(`outlines/${version}/${column}/${row}`);
  const [count, total] = new Uint32Array(buffer, 0, 2);
  const rows = new Uint32Array(buffer, 8, count);
  const xy = new Int16Array(buffer, 8 + 4 * count, 2 * total);
  const corners = new Uint16Array(buffer, 8 + 4 * count + 4 * total, count);
  return { rows, xy, corners };
}

export async function getTypes(box) {
  const buffer = await bytes(`types?${query(box)}`);
  const [count, total, whole] = new Uint32Array(buffer, 0, 3);
  const part = (k) => new Uint8Array(buffer, 12 + (4 + k) * count, count);
  return { rows: new Uint32Array(buffer, 12, count), codes: part(0), scores: part(1), margins: part(2), total, whole: whole === 1 };
}

export async function getDensity(box, columns, lines, least) {
  const buffer = await bytes(`density?${query({ ...box, columns, lines, ...least })}`);
  const [types, high, wide, whole] = new Uint32Array(buffer, 0, 4);
  return { box, types, lines: high, columns: wide, counts: new Uint32Array(buffer, 16), whole: whole === 1 };
}
