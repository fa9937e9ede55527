// Hold what is known of one sweep, and take in what has changed.

import { getJson } from './dom.js';

export class Sweep {
  constructor(index, folder) {
    Object.assign(this, { index, folder, cursor: '', fault: null, trials: new Map(), ranks: [], about: null, progress: null });
    Object.assign(this, { slots: [], log: '', answers: null, revision: 0, changed: new Set() });
  }

  get path() { return `api/sweeps/${this.index}`; }

  // Ask for what has changed; return whether anything has
  async ask() {
    const answer = await getJson(`${this.path}/changes?cursor=${encodeURIComponent(this.cursor)}`);
    this.fault = answer.fault ?? null;
    this.cursor = answer.cursor;
    if (this.fault !== null) return false;
    Object.assign(this, { progress: answer.progress, slots: answer.slots, log: answer.log });
    if (answer.trials === undefined) return false;
    if (answer.is_whole) this.trials.clear();
    for (const trial of answer.trials) {
      this.trials.set(trial.number, trial);
      this.changed.add(trial.number);
    }
    Object.assign(this, { ranks: answer.ranks, about: answer.about, answers: answer.answers, revision: this.revision + 1 });
    return true;
  }

  get name() { return this.about?.name ?? this.folder; }
  get best() { return this.about?.best == null ? undefined : this.trials.get(this.about.best); }

  // What decides which trial wins: a loss, or a task metric
  value(trial) { return this.about.chosen_by === 'eval_loss' ? trial.eval_loss : trial.metrics?.[this.about.chosen_by] ?? null; }
  // A trial's points: tokens and loss, or tokens and a metric where it was measured
  curve(trial, measure) { return measure === 'eval_loss' ? trial.curve : trial.metric_curves?.[measure] ?? []; }
  get bestLabel() { return this.about.chosen_by === 'eval_loss' ? 'lowest eval loss' : `${this.about.sign > 0 ? 'lowest' : 'highest'} ${this.about.chosen_by}`; }
  inOrder() { return this.ranks.map((number) => this.trials.get(number)).filter(Boolean); }
}

// Outcomes whose adapter may win
export const CONTENDERS = ['COMPLETE', 'STOPPED', 'PAUSED'];
