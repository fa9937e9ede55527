"""Train one trial, or check, inspect, plan or evaluate it.

python -m engine <train_config.json>              train, or replay and compare with its reports
python -m engine prepare <configs.json>           check configs and fill the caches, without GPU
python -m engine show-sample <train_config.json or folder>
                                                  print a sample as the model sees it, its targets marked
python -m engine cards                            print torch, CUDA and the visible GPUs as JSON
python -m engine calibrate                        measure this card and host, for predictions
python -m engine inspect <train_config.json>      print model shape and GPU as JSON
python -m engine plan <train_config.json> --card rtx4090
                                                  predict peak memory and speed on that card
python -m engine evaluate <train_config.json> --adapter <folder>
                                                  print the losses of base model and adapter
python -m engine standby                          load torch, then run the command that comes as JSON on stdin
python -m engine.export <adapter folder> --to FORM --out DIR
                                                  convert it for PEFT, vLLM or llama.cpp
python -m engine.chat <adapter folder>            chat with the adapter
"""

from __future__ import annotations

import engine.system.no_working_folder  # noqa: F401 (must be the first)

# isort: split
import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from engine.config.parsing import load_json, parse
from engine.config.permission import FLAG, METRICS_FLAG, permitted_config
from engine.config.trial import TRAIN_CONFIG, TrainConfig, load_train_config
from engine.errors import InputError, Interrupted
from engine.planning.cards import find_card
from engine.planning.known_cards import speed_basis, with_known_rates
from engine.planning.planner import make_compute_plan
from engine.sources.hub_ids import refuse_missing_files
from engine.system.command_line import asked_to_end, progress_lines, run, telling
from engine.system.files import write_text
from engine.system.user_path import user_path
from engine.trial_report import read_reports
from engine.units import counted

STOPPED = "stopped; run the same command again to continue from the last save"
ENDING = "ending after this step and saving it; press Ctrl-C again to stop at once"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    An EngineError prints one line on stderr and gives exit code 2, or the error's own code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": _train, "prepare": _prepare, "inspect": _inspect, "plan": _plan, "evaluate": _evaluate}
    commands |= {"show-sample": _show_sample, "cards": _cards, "calibrate": _calibrate, "standby": _standby}
    command = arguments[0] if arguments[:1] and arguments[0] in commands else "train"
    rest = arguments[1:] if arguments[:1] == [command] else arguments
    return run(lambda: commands[command](rest), stopped=STOPPED if command == "train" else "stopped")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m engine {command}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=user_path)
    parser.add_argument(FLAG, action="store_true", help="let the model's own code run; the config alone cannot permit it")
    parser.add_argument(
        METRICS_FLAG, action="store_true", help="let your own metrics run; the config alone cannot permit it"
    )
    return parser


def _load(options: argparse.Namespace) -> TrainConfig:
    return permitted_config(load_train_config(options.config), options.trust_remote_code, options.run_own_metrics)


def _train(arguments: list[str]) -> int:
    parser = _parser("train")
    parser.add_argument(
        "--out", type=user_path, help="trial folder to write and to continue from (default: replay/ next to the config)"
    )
    options = parser.parse_args(arguments)
    config = _load(options)
    out = options.out or options.config.resolve().parent / "replay"
    from engine.dialogue.encoding import printed_day
    from engine.model.device import pick_device
    from engine.model.load import load_base
    from engine.training.loop import train

    out.mkdir(parents=True, exist_ok=True)
    recorded = {report.rung: report.eval_loss for report in read_reports(options.config.resolve().parent)}
    print(
        f"{'rung':>4} {'tokens':>10} {'train loss':>10} {'eval loss':>10} {'recorded':>10} {'tok/s':>8} {'peak GiB':>8}",
        flush=True,
    )
    base = load_base(config.model, pick_device(config.train.device))
    if config.data.date is None and (day := printed_day(base.tokenizer, config.data)):
        print(f"note: the chat template prints the day; data.date={day} gives the same samples later", flush=True)
    with asked_to_end(ENDING) as interrupted:
        try:
            for report in train(config, out, base=base, interrupted=interrupted):
                known = recorded.get(report.rung)
                compared = "-" if known is None else f"{known:.5f}"
                print(
                    f"{report.rung:>4} {report.tokens_seen:>10} {report.train_loss:>10.5f} {report.eval_loss:>10.5f} "
                    f"{compared:>10} {report.tokens_per_second:>8.0f} {report.peak_allocated_gib:>8.2f}",
                    flush=True,
                )
        except Interrupted:
            raise KeyboardInterrupt from None
    print(f"adapter: {out / 'adapter'}")
    return 0


def _prepare(arguments: list[str]) -> int:
    parser = _parser("prepare")
    parser.add_argument("--answer", type=user_path)
    parser.add_argument("--progress", action="store_true", help="print JSON lines of how far it is: part, done, total")
    options = parser.parse_args(arguments)
    listed = load_json(options.config)
    if not isinstance(listed, list):
        raise InputError("configs", listed, "must be a JSON list of training configs")
    configs = [parse(TrainConfig, values, f"configs.{i}") for i, values in enumerate(listed)]
    configs = [permitted_config(config, options.trust_remote_code, options.run_own_metrics) for config in configs]
    for config in configs:
        refuse_missing_files(config.data)
    from engine.prepare import prepare

    with telling(progress_lines(sys.stdout)) if options.progress else nullcontext():
        found = prepare(configs)
    return _answer(found.to_dict(), options.answer)


def _inspect(arguments: list[str]) -> int:
    parser = _parser("inspect")
    parser.add_argument("--answer", type=user_path)
    options = parser.parse_args(arguments)
    config = _load(options)
    from engine.prepare import inspect

    return _answer(inspect(config.model).to_dict(), options.answer)


def _plan(arguments: list[str]) -> int:
    parser = _parser("plan")
    parser.add_argument("--card", required=True, help="rtx3090, rtx4090, a10g, l4 ...")
    options = parser.parse_args(arguments)
    config, card = _load(options), with_known_rates(find_card(options.card))
    from engine.model.inspect import model_shape

    chosen = make_compute_plan(config, model_shape(config.model), card)
    print(f"plan: {chosen.describe()}")
    print(f"predicted memory in GiB, of {card.memory_gib:g} on {card.name}: {chosen.memory.describe()}")
    print(f"predicted speed: {chosen.speed.tokens_per_second:,.0f} tok/s, {speed_basis(card)}; ms per micro-batch:")
    for name, ms in sorted(chosen.speed.parts.items(), key=lambda item: -item[1]):
        print(f"  {name:<22}{ms:8.1f}")
    return 0


def _evaluate(arguments: list[str]) -> int:
    parser = _parser("evaluate")
    parser.add_argument("--adapter", type=user_path, required=True)
    parser.add_argument("--examples", type=int, default=0, help="evaluation samples for base model and adapter to answer")
    parser.add_argument("--inputs", type=user_path, help="JSON of digests (engine/sources/identity.py) that the inputs must have")
    parser.add_argument("--answer", type=user_path)
    options = parser.parse_args(arguments)
    if options.examples < 0:
        raise InputError("--examples", options.examples, "must be 0 or more")
    config, inputs = _load(options), load_json(options.inputs) if options.inputs else None
    from engine.evaluation.reevaluate import evaluate_adapter

    return _answer(evaluate_adapter(config, options.adapter, options.examples, inputs).to_dict(), options.answer)


def _show_sample(arguments: list[str]) -> int:
    parser = _parser("show-sample")
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="which sample, from 1")
    parser.add_argument("--eval", action="store_true", help="of the evaluation set instead of the training samples")
    options = parser.parse_args(arguments)
    config = permitted_config(load_train_config(_train_config(options.config)), options.trust_remote_code, own_metrics=True)
    from engine.data.views import load_data
    from engine.evaluation.marked_sample import carries_loss, legend, marked, marks_for
    from engine.model.inspect import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    view = load_data(config.data, tokenizer)[1 if options.eval else 0]
    if not 1 <= options.sample <= len(view):
        raise InputError("--sample", options.sample, f"must be from 1 to {len(view)}, the number of samples")
    sample, marks = view[options.sample - 1], marks_for(sys.stdout)
    sys.stdout.reconfigure(errors="backslashreplace")
    print(f"sample {options.sample:,} of {len(view):,} {'for evaluation' if options.eval else 'for training'}: ", end="")
    print(f"{counted(len(sample.input_ids), 'token')}, loss falls on {sum(carries_loss(sample)):,} ({legend(marks)})\n")
    print(marked(sample, tokenizer, marks))
    return 0


def _train_config(path: Path) -> Path:
    """Return the config file that a path names: itself, or the one in the folder."""
    if path.is_dir() and not (path / TRAIN_CONFIG).is_file():
        raise InputError("config", str(path), f"must be a {TRAIN_CONFIG} or hold one, as best/ and trials/0000/ of a sweep do")
    return path / TRAIN_CONFIG if path.is_dir() else path


def _cards(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine cards", description="Print torch, CUDA and the visible GPUs as JSON.")
    parser.add_argument("--answer", type=user_path)
    options = parser.parse_args(arguments)
    from engine.model.device import find_cards

    return _answer(find_cards().to_dict(), options.answer)


def _calibrate(arguments: list[str]) -> int:
    from engine.rates.rates_command import calibrate

    return calibrate(arguments)


def _standby(arguments: list[str]) -> int:
    """Load what `evaluate` needs, then run the command of a JSON list on stdin; without a line, end."""
    argparse.ArgumentParser(prog="python -m engine standby").parse_args(arguments)
    # what the command to come will load, but for bitsandbytes, which takes memory on the card
    import transformers.modeling_utils  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import engine.evaluation.reevaluate  # noqa: F401

    line = sys.stdin.readline()
    return main(json.loads(line)) if line else 0


def _answer(values: dict[str, Any], report: Path | None) -> int:
    text = json.dumps(values, indent=2, sort_keys=True)
    if report is None:
        print(text)
    else:
        write_text(report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
