// Build elements and format numbers. All text goes in as text: nothing from a sweep is ever read as HTML.

export const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === 'class') element.className = value;
    else if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter((child) => child != null).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

export const fill = (element, ...children) => element.replaceChildren(...children.filter((child) => child != null));

// Plotly reads a little HTML in its texts
export const escaped = (text) => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;').replace(/"/g, '&quot;');

const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);
export const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits) : '');
export const whole = (value) => (isNumber(value) ? Math.round(value).toLocaleString('en') : '');

export function valueText(value) {
  if (value === null) return 'null';
  if (value === undefined) return '';
  if (isNumber(value)) return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)));
  return typeof value === 'string' ? value : JSON.stringify(value);
}

export function durationText(seconds) {
  if (!isNumber(seconds)) return '–';
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

// The end of a path that the terminal shows too: rank, or train.0.weight of a mixture
const shortName = (path) => path.slice(path.indexOf('.') + 1);

// The end of each path where it is unique, else the whole path
export function shortNames(paths) {
  const ends = paths.map(shortName);
  return Object.fromEntries(paths.map((path, i) => [path, ends.filter((end) => end === ends[i]).length === 1 ? ends[i] : path]));
}

export const paramsText = (params) => Object.entries(params).map(([path, value]) => `${shortName(path)}=${valueText(value)}`).join(' ');

export async function getJson(path, options) {
  const response = await fetch(path, { cache: 'no-store', ...options });
  if (!response.ok && response.status !== 409) throw new Error(`${response.status}: ${await response.text()}`);
  return response.json();
}

const scheme = matchMedia('(prefers-color-scheme: dark)');
export const theme = () => (scheme.matches ? 'dark' : 'light');
export const onTheme = (react) => scheme.addEventListener('change', react);
