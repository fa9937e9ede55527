// Charts. plotly.js is loaded once, from this server; figures that the report also has are drawn as it draws them.

import { byId, escaped, fill, getJson, make, theme } from './dom.js';

const MODEBAR = { bgcolor: 'rgba(0,0,0,0)', color: '#8a949d', activecolor: '#2f81d6' };
// plotly's own button would send a chart to its maker's server
const PRIVATE = { displaylogo: false, responsive: true, plotlyServerURL: '', modeBarButtonsToRemove: ['sendChartToCloud', 'select2d', 'lasso2d'] };
const chartConfig = () => ({ ...PRIVATE, displayModeBar: innerWidth < 720 ? false : 'hover' });
const BEST = { light: '#e6a700', dark: '#ffc93c' }, PICKED = { light: '#d6249f', dark: '#ff7bd0' };
const SERIES = { light: ['#2166ac', '#d95f02', '#1b9e77', '#7b3294', '#b2182b', '#a6761d'], dark: ['#6aa9e9', '#f08a3c', '#3fc79a', '#b57bd0', '#ec6a6f', '#d2a24c'] };
const FADED = ['PRUNED', 'INFEASIBLE'];
const WIDE = ['Parallel coordinates', 'Slices', 'Slots', 'Loss, memory and time'];
export const seriesColour = (index) => SERIES[theme()][index % 6];

let loading = null;
function plotly() {
  loading ??= new Promise((resolve, reject) => {
    document.head.append(make('script', { src: 'static/plotly.min.js', onload: () => resolve(window.Plotly), onerror: () => reject(new Error('plotly.min.js')) }));
  });
  return loading;
}

function look(more) {
  const dark = theme() === 'dark', ink = dark ? '#e4e7ea' : '#1d2329', grid = dark ? '#30373e' : '#e6e9ec';
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true };
  return { paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: { color: ink }, hovermode: 'closest', uirevision: 'kept',
    margin: { l: 56, r: 12, t: 8, b: 44 }, legend: { orientation: 'h', y: 1.02, yanchor: 'bottom', x: 0 }, modebar: MODEBAR, ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis } };
}

const hover = (trial) => [`trial ${trial.number} ${trial.outcome}`, ...Object.entries(trial.params).map(([path, value]) => escaped(`${path} = ${value}`))].join('<br>');

const labelOf = (measure) => (measure === 'eval_loss' ? 'eval loss' : escaped(measure));

function line(sweep, measure, trials, name, colour, width, opacity) {
  const x = [], y = [], text = [], customdata = [];
  for (const trial of trials) {
    const words = hover(trial);
    for (const [tokens, value] of sweep.curve(trial, measure)) { x.push(tokens); y.push(value); text.push(words); customdata.push(trial.number); }
    x.push(null); y.push(null); text.push(''); customdata.push(null);
  }
  return { x, y, text, customdata, name, mode: 'lines+markers', type: 'scatter', opacity, line: { color: colour, width }, marker: { size: 5 },
    connectgaps: false, hovertemplate: `%{text}<br>%{x:,} tokens, ${labelOf(measure)} %{y:.4f}<extra></extra>` };
}

// What the curves show: what decides, or what the user chose for this sweep
const wanted = new Map();
function measureOf(sweep, again) {
  const { about } = sweep, box = byId('measure'), names = ['eval_loss', ...about.metrics], first = about.shown_by;
  const measure = names.includes(wanted.get(sweep)) ? wanted.get(sweep) : first;
  const shown = [first, ...names.filter((name) => name !== first)], state = JSON.stringify([sweep.index, shown, measure]);
  byId('measures').hidden = shown.length < 2;
  box.onchange = () => { wanted.set(sweep, box.value); again(); };
  if (box.dataset.state !== state) {
    box.dataset.state = state;
    fill(box, ...shown.map((name) => make('option', { value: name, selected: name === measure }, `${name}${name === about.chosen_by ? ' (decides)' : ''}`)));
  }
  return measure;
}

export async function drawCurves(sweep, colours, picked, pick) {
  const box = byId('curves'), measure = measureOf(sweep, () => drawCurves(sweep, colours, picked, pick));
  const trials = sweep.inOrder().filter((trial) => sweep.curve(trial, measure).length);
  if (!trials.length) return fill(box, make('p', { class: 'none' }, 'No trial has reported yet.'));
  const Plotly = await plotly();
  if (!box.data) fill(box);
  const { about, best } = sweep, chosen = sweep.trials.get(picked), special = [picked, about.best], traces = [];
  const add = (...rest) => traces.push(line(sweep, measure, ...rest));
  for (const outcome of Object.keys(colours).reverse()) {
    const ours = trials.filter((trial) => trial.outcome === outcome && !special.includes(trial.number));
    if (ours.length) add(ours, outcome, colours[outcome], 1.6, FADED.includes(outcome) ? 0.5 : 0.9);
  }
  if (trials.includes(best)) add([best], `best: trial ${best.number}`, BEST[theme()], 3.5, 1);
  if (trials.includes(chosen) && chosen !== best) add([chosen], `picked: trial ${picked}`, PICKED[theme()], 3, 1);
  const isLoss = measure === 'eval_loss', unit = about.metrics.includes('preference_accuracy') ? 'a pair' : 'per target token';
  const layout = look({ height: innerWidth < 720 ? 340 : 370, uirevision: measure, xaxis: { title: { text: 'tokens seen' }, rangemode: 'tozero', tickformat: ',d' },
    yaxis: { title: { text: isLoss ? `eval loss (nats ${unit})` : labelOf(measure) }, ...(isLoss ? { range: about.loss_range } : {}) } });
  await Plotly.react(box, traces, layout, chartConfig());
  box.removeAllListeners('plotly_click');
  box.on('plotly_click', (event) => pick(event.points[0].customdata));
}

// Draws a figure of the report when it comes into view, and again when the sweep has changed meanwhile
export class Figures {
  constructor(titles) {
    this.boxes = titles.map((title) => this.box(title));
    fill(byId('figures'), ...this.boxes.map((box) => box.section));
    this.observer = new IntersectionObserver((seen) => {
      for (const entry of seen) this.boxes.find((box) => box.section === entry.target).isSeen = entry.isIntersecting;
      this.refresh();
    }, { rootMargin: '200px' });
    for (const box of this.boxes) this.observer.observe(box.section);
  }

  box(title) {
    const figure = make('figure', { class: WIDE.includes(title) ? 'wide-figure' : '' }), caption = make('p', { class: 'caption' });
    const section = make('section', {}, make('h2', {}, title), caption, make('div', { class: 'figure-box' }, figure));
    return { title, section, figure, caption, isSeen: false, isBusy: false, drawn: '', look: '', version: 0, atMs: 0 };
  }

  show(sweep) { this.sweep = sweep; this.refresh(); }

  refresh() { for (const box of this.boxes) if (this.sweep && box.isSeen) this.draw(box); }

  async draw(box) {
    const sweep = this.sweep, look = `${sweep.index} ${theme()}`, state = `${look} ${sweep.revision}`, isOther = box.look !== look;
    if (box.isBusy || box.drawn === state || (!isOther && performance.now() - box.atMs < 5000)) return;
    box.isBusy = true;
    try {
      const have = isOther ? '' : `&have=${box.version}`;
      const answer = await getJson(`${sweep.path}/figure?theme=${theme()}&title=${encodeURIComponent(box.title)}${have}`);
      const Plotly = await plotly();
      if (answer.caption !== undefined) box.caption.textContent = answer.caption;
      if (answer.none !== undefined) {
        Plotly.purge(box.figure);
        fill(box.figure, make('p', { class: 'none' }, `Not shown: ${answer.none}.`));
      } else if (answer.figure !== undefined) {
        if (!box.figure.data) fill(box.figure);
        const { data, layout } = answer.figure;
        layout.margin = innerWidth < 720 ? { l: 46, r: 6, t: 30, b: 44 } : { l: 64, r: 16, t: 30, b: 48 };
        Object.assign(layout, { uirevision: 'kept', modebar: MODEBAR });
        await Plotly.react(box.figure, data, layout, chartConfig());
      }
      Object.assign(box, { look, version: answer.version, drawn: answer.is_current ? state : '', atMs: performance.now() });
    } catch (error) {
      box.caption.textContent = `Not drawn: ${error.message}`;
    } finally {
      box.isBusy = false;
    }
  }
}

export async function drawComparison(sweeps) {
  const Plotly = await plotly(), soFar = [], curves = [], rules = new Set(sweeps.map(({ about }) => `${about.chosen_by} ${about.sign}`));
  const measures = new Set(sweeps.map(({ about }) => about.shown_by)), measure = measures.size > 1 ? 'eval_loss' : [...measures][0];
  const sign = rules.size > 1 ? 1 : sweeps[0].about.sign, label = rules.size > 1 ? 'lowest eval loss' : sweeps[0].bestLabel;
  sweeps.forEach((sweep, index) => {
    const ended = [...sweep.trials.values()].filter((trial) => trial.ended_s !== null && !trial.source).sort((a, b) => a.ended_s - b.ended_s);
    const x = [], y = [];
    let best = Infinity;
    ended.forEach((trial, i) => {
      const value = rules.size > 1 ? trial.eval_loss : sweep.value(trial);
      if (trial.can_win && value !== null) best = Math.min(best, sign * value);
      if (best < Infinity) { x.push(i + 1); y.push(sign * best); }
    });
    const style = { name: escaped(`${index + 1}: ${sweep.name}`), type: 'scatter', line: { color: seriesColour(index), width: 2.5 } };
    soFar.push({ ...style, x, y, mode: x.length > 60 ? 'lines' : 'lines+markers', line: { ...style.line, shape: 'hv' }, hovertemplate: '%{y:.4f} after %{x} trials<extra>%{fullData.name}</extra>' });
    if (sweep.best) curves.push({ ...line(sweep, measure, [sweep.best], style.name, seriesColour(index), 2.5, 1), name: `${style.name}, trial ${sweep.best.number}` });
  });
  const named = (text) => ({ title: { text } });
  await Plotly.react(byId('best-so-far'), soFar, look({ height: 330, xaxis: { title: { text: 'trials ended or waiting' }, rangemode: 'tozero' }, yaxis: named(`${escaped(label)} so far`) }), chartConfig());
  await Plotly.react(byId('best-curves'), curves, look({ height: 330, xaxis: { title: { text: 'tokens seen by the best trial' }, rangemode: 'tozero' }, yaxis: named(measure === 'eval_loss' ? 'eval loss (nats)' : labelOf(measure)) }), chartConfig());
}

