// The page: ask what has changed, and show it. It asks every two seconds while a sweep runs and the page is looked at.

import { drawComparison, drawCurves, Figures, seriesColour } from './charts.js';
import { prepareCommands, showCommands } from './commands.js';
import { byId, durationText, fill, fixed, getJson, make, onTheme, paramsText, theme, whole } from './dom.js';
import { Sweep } from './sweep.js';
import { showPicked, TrialTable } from './trials.js';

const RUNNING_MS = 2000, RESTING_MS = 10000;
let sweeps = [], current = null, facts = null, table = null, figures = null, picked = null, timer = 0;
const colours = () => facts.colours[theme()];

function pick(number) {
  picked = picked === number ? null : number;
  showTrials();
}

function tile(label, value, more = '', kind = '') {
  return make('div', { class: `tile ${kind}` }, make('span', {}, label), make('b', {}, value), more ? make('span', {}, more) : null);
}

function timeLeft({ is_driven, left_s, num_running, num_waiting, num_ended, num_trials }) {
  if (!is_driven) return '–';
  return num_running === 0 && num_ended + num_waiting >= num_trials ? 'finishing' : durationText(left_s);
}

function showHead() {
  const { progress, about, best, fault } = current;
  byId('fault').hidden = fault === null;
  byId('fault').textContent = fault ?? '';
  byId('name').textContent = current.folder;
  if (!progress) return;
  document.title = `${progress.num_ended}/${progress.num_trials} ${current.name}`;
  const quiet = progress.last_event_s === null ? null : progress.now_s - progress.last_event_s;
  byId('state').className = `pill ${progress.is_driven ? 'on' : ''}`;
  byId('state').textContent = progress.is_driven ? 'running' : 'no driver here';
  byId('bar').style.width = `${Math.min(100, (100 * progress.num_ended) / Math.max(progress.num_trials, 1))}%`;
  const outcomes = Object.entries(progress.outcomes).map(([name, count]) => `${count} ${name}`).join(', ');
  fill(byId('tiles'),
    tile('trials ended', `${progress.num_ended} of ${progress.num_trials}`, outcomes),
    tile('time left', timeLeft(progress), progress.is_driven ? `running for ${durationText(progress.elapsed_s)}` : `ran for ${durationText(progress.elapsed_s)}`),
    tile(current.bestLabel, best ? fixed(current.value(best), 4) : '–', best ? `trial ${best.number}: ${paramsText(best.params)}` : 'no trial can be chosen yet', 'best'),
    tile('slot hours', progress.slot_hours.toFixed(2), progress.steady),
    tile('tokens trained', whole(progress.num_tokens), quiet === null ? '' : `last event ${durationText(quiet)} ago`));
  fill(byId('facts'), ...about.facts.map((fact) => make('li', {}, fact)));
}

const PARTS = ['#1b9e77', '#e6ab02', '#2166ac', '#7b3294', '#d95f02', '#9aa3ab', '#b2182b'];
const PART_NAMES = ['steady training', 'recording and compiling', 'evaluation', 'saving', 'starting and loading', 'idle', 'not reported'];

function slotCard(slot) {
  const trial = slot.trial === null ? null : current.trials.get(slot.trial), sum = Object.values(slot.parts).reduce((a, b) => a + b, 0);
  const bar = make('div', { class: 'parts', title: Object.entries(slot.parts).map(([part, seconds]) => `${part}: ${durationText(seconds)}`).join('\n') });
  for (const [part, seconds] of Object.entries(slot.parts)) {
    const piece = make('span');
    piece.style.width = `${(100 * seconds) / sum}%`;
    piece.style.background = PARTS[PART_NAMES.indexOf(part)];
    bar.append(piece);
  }
  const since = slot.since_s === null ? '' : `, for ${durationText(current.progress.now_s - slot.since_s)}`;
  const memory = trial && trial.peak_allocated_gib !== null
    ? `${fixed(trial.peak_allocated_gib, 2)} GiB peak${trial.predicted_peak_gib === null ? '' : ` (${fixed(trial.predicted_peak_gib, 2)} predicted)`}, ${whole(trial.tokens_per_second)} tokens/s` : null;
  return make('div', { class: 'slot' }, make('b', {}, slot.name),
    make('p', {}, trial ? `trial ${trial.number}, rung ${trial.rung}/${current.about.num_rungs}${since}` : current.progress.is_driven ? 'idle' : 'nothing runs here'),
    trial ? make('p', { class: 'caption' }, paramsText(trial.params)) : null, memory ? make('p', {}, memory) : null,
    make('p', { class: 'caption' }, slot.steady || 'no shares reported yet'), bar);
}

function showSlots() {
  const cards = current.slots.map(slotCard);
  fill(byId('slots'), ...(cards.length ? cards : [make('p', { class: 'none' }, 'No slot has been held yet.')]));
}

function showTrials() {
  if (!current.about) return;
  table.show(current, colours(), picked);
  showPicked(current, picked);
  showCommands(current, picked);
  drawCurves(current, colours(), picked, pick);
}

function showRest() {
  const { answers, about } = current;
  fill(byId('answers'), ...answers.flatMap(({ title, caption, none, header, rows }) => [
    make('h3', {}, title),
    none !== undefined ? make('p', { class: 'none' }, `Not shown: ${none}.`) : make('p', { class: 'caption' }, caption),
    rows && make('div', { class: 'wide' }, make('table', {},
      make('thead', {}, make('tr', {}, ...header.map((name) => make('th', {}, name)))),
      make('tbody', {}, ...rows.map((row) => make('tr', {}, ...row.map((cell) => make('td', { class: 'text' }, cell))))))),
  ]));
  fill(byId('data'), ...(about.data.length ? about.data : ['nothing is known of it']).map((text) => make('li', {}, text)));
}

function showComparison() {
  const ours = sweeps.filter((sweep) => sweep.about);
  byId('compare').hidden = sweeps.length < 2;
  if (sweeps.length < 2 || !ours.length) return;
  const sets = new Set(ours.map((sweep) => sweep.about.evaluation));
  byId('comparable').textContent = sets.has(null) ? 'Not every sweep says on which evaluation samples it measured, so losses may not compare.'
    : sets.size > 1 ? 'The sweeps measured on different evaluation samples, so their losses do NOT compare.' : 'All sweeps measured on the same evaluation samples, so their losses compare.';
  const head = ['', 'sweep', 'state', 'trials ended', 'best by its rule', 'best trial', 'slot hours', 'tokens trained', 'time left', 'parameters of the best trial'];
  const rows = ours.map((sweep) => {
    const { progress, best, index } = sweep, mark = make('td', {}, `${index + 1} ●`);
    mark.style.color = seriesColour(index);
    const cells = [sweep.folder, progress.is_driven ? 'running' : 'no driver here', `${progress.num_ended} of ${progress.num_trials}`, best ? `${fixed(sweep.value(best), 4)} (${sweep.bestLabel})` : '–', best?.number ?? '–',
      progress.slot_hours.toFixed(2), whole(progress.num_tokens), timeLeft(progress), best ? paramsText(best.params) : ''];
    return make('tr', {}, mark, ...cells.map((cell) => make('td', {}, cell)));
  });
  fill(byId('compared'), make('thead', {}, make('tr', {}, ...head.map((name) => make('th', {}, name)))), make('tbody', {}, ...rows));
  drawComparison(ours);
}

function showAll() {
  showHead();
  if (!current.about) return;
  showSlots();
  showTrials();
  showRest();
  figures.show(current);
}

function choose(sweep) {
  if (current !== sweep) picked = null;
  current = sweep;
  fill(byId('tabs'), ...sweeps.map((one) => make('button', { 'aria-pressed': String(one === sweep), onclick: () => choose(one) }, one.folder)));
  byId('tabs').hidden = sweeps.length < 2;
  showAll();
}

async function update() {
  clearTimeout(timer);
  try {
    const changed = await Promise.all(sweeps.map((sweep) => sweep.ask()));
    showHead();
    if (current.about) {
      showSlots();
      byId('log').textContent = current.log || 'empty';
      figures.show(current);
      if (changed[sweeps.indexOf(current)]) { showTrials(); showRest(); }
      if (changed.some(Boolean)) showComparison();
    }
  } catch (error) {
    byId('fault').hidden = false;
    byId('fault').textContent = `The server does not answer (${error.message}). What is shown was true before.`;
    byId('state').textContent = 'not connected';
    byId('state').className = 'pill';
  }
  if (!document.hidden) timer = setTimeout(update, sweeps.some((sweep) => sweep.progress?.is_driven) ? RUNNING_MS : RESTING_MS);
}

async function start() {
  facts = await getJson('api/sweeps');
  sweeps = facts.sweeps.map(({ index, folder }) => new Sweep(index, folder));
  table = new TrialTable(pick);
  figures = new Figures(facts.figures);
  prepareCommands(facts.takes_commands, () => current, update);
  choose(sweeps[0]);
  document.addEventListener('visibilitychange', () => { if (!document.hidden) update(); });
  onTheme(() => { choose(current); showComparison(); });
  await update();
}

start();
