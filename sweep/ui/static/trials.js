// The table of trials: sortable and filtered. Rows are made as they come into view, and again only when they change.

import { byId, durationText, fill, fixed, make, paramsText, shortNames, valueText, whole } from './dom.js';
import { CONTENDERS } from './sweep.js';

const above = (trial) => (trial.above_lowest === null ? '' : `${fixed(trial.above_lowest.nats, 4)}${trial.above_lowest.at_least <= 0 ? ' tied' : ''}`);
const BEFORE = [
  ['#', (t, s) => s.places.get(t.number), String, true],
  ['trial', (t) => t.number, String, true],
  ['outcome', (t) => t.outcome, String, false],
  ['eval loss', (t) => t.eval_loss, (v) => fixed(v, 4), true],
  ['rung', (t) => t.rung, (v, t, s) => `${v}/${s.about.num_rungs}`, true],
];
const afterParams = (about) => [
  [about.sign < 0 ? 'below highest' : 'above lowest', (t) => t.above_lowest?.nats, (v, t) => above(t), true],
  ['train loss', (t) => t.train_loss, (v) => fixed(v, 4), true],
  ['tokens seen', (t) => t.tokens_seen, whole, true],
  ['tokens/s', (t) => t.tokens_per_second, whole, true],
  ['peak GiB', (t) => t.peak_allocated_gib, (v) => fixed(v, 2), true],
  ['predicted GiB', (t) => t.predicted_peak_gib, (v) => fixed(v, 2), true],
  ['steps took', (t) => t.elapsed_s, (v) => (v === null ? '' : durationText(v)), true],
  ['parameters', (t) => t.num_trainable, whole, true],
  ['note', (t) => t.note, String, false, 'text'],
];

const wordsOf = (trial) => (trial.words ??= `${trial.number} ${trial.outcome} ${paramsText(trial.params)} ${trial.note}`.toLowerCase());
const STEP = 100; // rows that are made at once

export class TrialTable {
  constructor(pick) {
    this.pick = pick;
    this.most = STEP;
    const box = byId('trials').parentElement;
    box.addEventListener('scroll', () => {
      if (box.scrollTop + 2 * box.clientHeight < box.scrollHeight || this.most >= this.numFound) return;
      this.most += STEP;
      this.arrange();
    });
    this.sort = { name: null, down: false };
    this.rows = new Map();
    byId('filter').addEventListener('input', () => this.arrange());
  }

  show(sweep, colours, picked) {
    if (this.sweep !== sweep) this.rows.clear();
    const names = shortNames(sweep.about.params);
    const metrics = sweep.about.metrics.map((name) => [name, (t) => t.metrics?.[name], (v) => fixed(v, 4), true, null, `metric ${name}`]);
    const sets = sweep.about.eval_sets.map((name) => [`loss ${name}`, (t) => t.eval_losses?.[name], (v) => fixed(v, 4), true, null, `eval loss ${name}`]);
    const decides = metrics.filter((column) => column[0] === sweep.about.chosen_by), others = metrics.filter((column) => !decides.includes(column));
    const params = sweep.about.params.map((path) => [names[path], (t) => t.params[path], valueText, false, null, path]);
    this.columns = [...BEFORE, ...decides, ...params, ...others, ...sets, ...afterParams(sweep.about)];
    const shape = JSON.stringify([this.columns.map((c) => c[5] ?? c[0]), colours]);
    if (shape !== this.shape) this.rows.clear();
    Object.assign(this, { sweep, colours, picked, shape });
    sweep.places = new Map();
    for (const trial of sweep.inOrder()) {
      if (trial.can_win) sweep.places.set(trial.number, sweep.places.size + 1);
    }
    for (const number of sweep.changed) this.rows.delete(number);
    sweep.changed.clear();
    this.arrange();
  }

  rowOf(trial) {
    const { sweep, rows } = this, { number, outcome } = trial;
    if (!rows.has(number)) rows.set(number, this.row(trial));
    const row = rows.get(number), place = String(sweep.places.get(number) ?? '');
    if (row.cells[0].textContent !== place) row.cells[0].textContent = place;
    const kind = number === this.picked ? 'picked' : number === sweep.about.best ? 'first' : CONTENDERS.includes(outcome) || outcome === 'RUNNING' ? '' : 'faded';
    if (row.className !== kind) row.className = kind;
    return row;
  }

  row(trial) {
    const row = make('tr', { onclick: () => this.pick(trial.number) });
    for (const [name, value, text, isNumber, kind] of this.columns) {
      const found = value(trial, this.sweep);
      const cell = make('td', { class: kind ?? (isNumber ? 'number' : '') }, found == null && kind !== 'text' ? '' : text(found, trial, this.sweep));
      if (name === 'outcome') { cell.className = 'outcome'; cell.style.color = this.colours[trial.outcome]; }
      row.append(cell);
    }
    return row;
  }

  arrange() {
    const { sweep, sort } = this, column = this.columns.find((c) => (c[5] ?? c[0]) === sort.name);
    const words = byId('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
    let trials = words.length ? sweep.inOrder().filter((trial) => words.every((word) => wordsOf(trial).includes(word))) : sweep.inOrder();
    if (column) {
      const of = new Map(trials.map((trial) => [trial, column[1](trial, sweep)]));
      const lacks = (value) => value === null || value === undefined || value === '';
      trials = trials.sort((one, other) => {
        const [a, b] = [of.get(one), of.get(other)];
        if (lacks(a) || lacks(b)) return lacks(a) - lacks(b); // what is not known comes last either way
        const order = typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b), 'en', { numeric: true });
        return sort.down ? -order : order;
      });
    }
    byId('shown').textContent = words.length ? `${trials.length} of ${sweep.trials.size}` : `${sweep.trials.size} trials`;
    byId('rule').textContent = `Rule: ${sweep.about.rule}.`;
    this.numFound = trials.length;
    const table = byId('trials'), wanted = trials.slice(0, this.most).map((trial) => this.rowOf(trial));
    const shown = table.tBodies[0]?.rows;
    this.head(table);
    if (shown?.length === wanted.length && wanted.every((row, i) => row === shown[i])) return;
    fill(table.tBodies[0] ?? table.createTBody(), ...wanted);
  }

  head(table) {
    const state = JSON.stringify([this.shape, this.sort]);
    if (state === this.headState) return;
    this.headState = state;
    const cells = this.columns.map(([name, , , isNumber, , path]) => {
      const key = path ?? name, mark = this.sort.name === key ? (this.sort.down ? ' ▼' : ' ▲') : '';
      const press = () => {
        const isSame = this.sort.name === key;
        this.sort = isSame && this.sort.down ? { name: null, down: false } : { name: key, down: isSame };
        this.arrange();
      };
      const order = mark === '' ? 'none' : this.sort.down ? 'descending' : 'ascending';
      return make('th', { class: isNumber ? 'number' : '', title: key, 'aria-sort': order }, make('button', { onclick: press }, name + mark));
    });
    fill(table.tHead ?? table.createTHead(), make('tr', {}, ...cells));
  }
}

// What is known of the trial that was picked
export function showPicked(sweep, number) {
  const trial = sweep.trials.get(number), box = byId('picked');
  box.hidden = !trial;
  if (!trial) return;
  byId('picked-title').textContent = `Trial ${number}, ${trial.outcome}`;
  const facts = { ...trial.params, 'eval loss': fixed(trial.eval_loss, 4), ...trial.metrics, 'nats above its limits': trial.above_limits ?? null, 'micro batch': trial.micro_batch_size,
    'activation checkpointing': trial.activation_checkpointing, 'ran out of memory': trial.num_out_of_memory, error: trial.error, from: trial.source, start: trial.warm ? `adapter of trial ${trial.warm.trial} at ${whole(trial.warm.tokens)} tokens` : null };
  const rows = Object.entries(facts).filter(([, value]) => value !== null && value !== '').flatMap(([name, value]) => [make('dt', {}, name), make('dd', {}, valueText(value))]);
  fill(byId('picked-facts'), make('dl', {}, ...rows));
}
