"""Export an adapter for other programs.

    python -m engine.export <adapter folder> --to FORM --out DIR
    python -m engine.export <adapter folder> --to hub --repo ORGANISATION/NAME

- peft: for PEFT and vLLM, with rsLoRA and alpha or rank patterns folded in.
- merged: the base model's original weights with the adapter added, as 16-bit safetensors.
- gguf-adapter, gguf-merged: the same two for llama.cpp.
- hub: the form peft, pushed to the Hugging Face hub, private unless --public; `hf auth login` first.

Each export has a model card. It states the losses on the evaluation set of train_config.json,
measured during the export.
"""

from __future__ import annotations

import engine.system.no_working_folder  # noqa: F401 (must be the first)

# isort: split
import argparse
import sys
from contextlib import closing

from engine.config.permission import FLAG
from engine.config.trial import load_train_config
from engine.export.model_card import TITLES
from engine.system.command_line import ProgressBar, run, telling
from engine.system.user_path import user_path

HUB = "hub"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_options(arguments)), stopped="stopped; nothing was written")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=user_path, help="folder with adapter_config.json, such as best/ of a sweep")
    parser.add_argument("--to", choices=(*TITLES, HUB), default="peft")
    parser.add_argument("--out", type=user_path, help="new or empty folder; not with --to hub")
    parser.add_argument("--repo", help="with --to hub: organisation/name on the hub")
    parser.add_argument("--public", action="store_true", help="with --to hub: everyone may read it")
    parser.add_argument("--base-model", metavar="ID", help="with --to hub: hub id of a base model that is a folder here")
    parser.add_argument("--config", type=user_path, help="train_config.json, if it is neither in the adapter's folder nor above")
    parser.add_argument(FLAG, action="store_true", help="let the base model's own code run")
    parser.add_argument("--no-losses", action="store_true", help="do not measure losses; the model card then says so")
    options = parser.parse_args(arguments)
    if options.to == HUB and (options.out is not None or options.repo is None):
        parser.error("--to hub needs --repo organisation/name and no --out")
    if options.to != HUB and options.out is None:
        parser.error("the following arguments are required: --out")
    if options.to != HUB and (options.repo or options.public or options.base_model):
        parser.error("--repo, --public and --base-model go with --to hub")
    return options


def _main(options: argparse.Namespace) -> int:
    config = load_train_config(options.config) if options.config else None
    from engine.export.forms import export  # late: --help and typing errors do not wait for torch
    from engine.export.hub_push import push

    allowed = {"measure": not options.no_losses, "trust_remote_code": options.trust_remote_code}
    bar = ProgressBar(sys.stderr)
    with telling(bar), closing(bar):
        if options.to == HUB:
            where = {"public": options.public, "base_name": options.base_model}
            place, measured = push(options.adapter, options.repo, config=config, **where, **allowed)
        else:
            place, measured = options.out, export(options.adapter, options.to, options.out, config=config, **allowed)
    if measured is not None:
        merged = "" if measured.merged is None else f", merged {measured.merged:.4f}"
        print(f"eval loss: base model {measured.base:.4f}, with the adapter {measured.adapter:.4f}{merged}")
    print(f"{options.to}: {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
