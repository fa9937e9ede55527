// Commands to a sweep. All of them are lines that `python -m sweep.control` takes; without it they are disabled.

import { byId, fill, getJson, make } from './dom.js';

const OF_SWEEP = [['Status', 'status'], ['Add 4 trials', 'add 4'], ['Finish after what runs', 'finish']];
const OF_TRIAL = ['stop', 'pause', 'go-on', 'clone', 'clone --warm', 'keep'];
let takes = false, sweepNow = null, after = null;

export function prepareCommands(takesCommands, current, update) {
  [takes, sweepNow, after] = [takesCommands, current, update];
  byId('no-commands').hidden = takes;
  for (const element of byId('command').elements) element.disabled = !takes;
  byId('command').addEventListener('submit', (event) => {
    event.preventDefault();
    send(byId('line').value);
  });
}

const button = (words, onclick, why = null) => make('button', { disabled: !takes || why !== null, title: why, onclick }, words);

// A trial's buttons follow its outcome: the sweep says which commands it would refuse, and why
export function showCommands(sweep, picked) {
  const refused = sweep.trials.get(picked)?.refused ?? {}, words = [...new Set(Object.values(refused))];
  const reasons = words.filter((why) => !words.some((other) => other !== why && other.startsWith(why)));
  const ofTrial = picked === null ? [] : OF_TRIAL.map((verb) => (verb.startsWith('clone')
    ? button(`${verb === 'clone' ? 'clone' : 'warm clone of'} ${picked} with …`, () => beginClone(sweep, picked, verb), refused.clone ?? refused[verb]) : button(`${verb} ${picked}`, () => send(`${verb} ${picked}`), refused[verb])));
  ofTrial.sort((one, other) => one.disabled - other.disabled);
  fill(byId('buttons'), ...OF_SWEEP.map(([words, line]) => button(words, () => send(line))), ...ofTrial,
    picked === null ? make('span', { class: 'caption' }, 'Pick a trial for its commands.') : null,
    takes && reasons.length ? make('span', { class: 'caption' }, `${reasons.join('; ')}.`) : null);
}

// A clone needs another value: the line gets the trial's own, marked, so that typing replaces it.
// A warm one begins with the trial's adapter, and may keep all values.
function beginClone(sweep, picked, verb) {
  const { params } = sweep.trials.get(picked), paths = sweep.about.params;
  const path = paths.find((one) => typeof params[one] === 'number') ?? paths[0], line = byId('line');
  line.value = `clone ${picked}${verb.slice('clone'.length)} ${path}=${params[path]}`;
  line.focus();
  line.setSelectionRange(line.value.lastIndexOf('=') + 1, line.value.length);
}

async function send(line) {
  const reply = byId('reply');
  reply.hidden = false;
  reply.textContent = `${line} …`;
  try {
    const answer = await getJson(`${sweepNow().path}/command`, {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ line }),
    });
    reply.textContent = answer.text || (answer.is_done ? 'done' : 'refused');
    reply.className = answer.is_done ? '' : 'fault';
  } catch (error) {
    reply.textContent = `not sent: ${error.message}`;
    reply.className = 'fault';
  }
  await after();
}
