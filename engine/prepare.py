"""Check model folder, adapter targets and data before a trial uses a GPU. Loads no weights.

The check also fills the caches (builtin model and data, tokens). Otherwise the trials of one
machine would all fill them at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from engine.adapter.expert_lora import check_experts
from engine.adapter.made_start import check_made
from engine.adapter.origin import is_same_base
from engine.adapter.start import check_start, read_start
from engine.adapter.token_rows import check_rows_of
from engine.command_answers import EVALUATION, TRAINING, DataAccount, Facts, PreparedFacts, VisibleCard
from engine.config.targets import layer_ranks, layer_scalings, resolve_targets
from engine.config.trial import ModelConfig, TrainConfig
from engine.data.account import account_data
from engine.data.view import AnyView
from engine.data.views import identify, identify_samples
from engine.dialogue.encoding import printed_day
from engine.errors import InputError
from engine.evaluation.task_metrics import check_metrics
from engine.model.device import host_share_gib
from engine.model.inspect import ModelFacts, inspect_model, known_shape, load_tokenizer
from engine.preference.trial_pairs import ONE_SAMPLE
from engine.sources.identity import variant
from engine.sources.locate import locate
from engine.system.command_line import tell
from engine.units import GIB


def prepare(configs: list[TrainConfig]) -> PreparedFacts:
    """Check every config; raise InputError at the first fault.

    Returns the facts that `inspect` returns for the first config, its sample counts and the digests
    of its inputs, and the number of trainable parameters of every config.
    """
    if not configs:
        raise InputError("configs", configs, "must hold at least one training config")
    models: dict[str, tuple[ModelFacts, Any]] = {}  # facts and tokenizer
    accounts: dict[str, list[DataAccount]] = {}
    digests: dict[str, str] = {}
    days: list[str | None] = []
    first_views: tuple[AnyView, AnyView] | None = None
    num_trainable: list[int] = []
    notes: list[str] = []
    task: tuple[int, int] | None = None
    for done, config in enumerate(configs):
        tell("checking each choice of the space", done, len(configs))
        key = repr(config.model)
        if key not in models:
            models[key] = inspect_model(config.model), load_tokenizer(config.model)
        facts, tokenizer = models[key]
        num_rows = len(check_rows_of(tokenizer, config.model.train_tokens, facts.num_rows)) * facts.row_values
        features = facts.features
        targets = resolve_targets(list(features), config.lora.target_modules)
        ranks = layer_ranks(config.lora, targets)
        layer_scalings(config.lora, ranks)  # raises for what it cannot apply
        check_experts(config.lora, targets, config.optim.name)
        notes += _check_start(config, ranks, features)
        lengths = sum(features[name][0] for name in ranks) if config.lora.use_dora else 0
        values = sum(rank // config.lora.halves * sum(features[name]) for name, rank in ranks.items())
        num_trainable.append(num_rows + lengths + values)
        data_key = key + repr(config.data)
        if data_key not in accounts:
            *both, accounts[data_key] = account_data(config.data, tokenizer)
            views = both[0], both[1]
            first_views = first_views or views
            digests |= _identify(config, configs[0], tokenizer, views, first_views)
            days.append(printed_day(tokenizer, config.data))
            notes += _check_tokens(config, facts, tokenizer, views)
            if config.learns_pairs and not facts.route.shares_rows:
                raise InputError("data.format", config.data.format, ONE_SAMPLE)
            if config.metrics.names:
                task = task or _check_task(config, facts, tokenizer, views[1])
    training, *others = next(iter(accounts.values()))
    found, first = inspect(configs[0].model), next(iter(models.values()))[0]
    return PreparedFacts(
        shape=found.shape if first.route.is_predicted else None,
        card=found.card,
        host_gib=found.host_gib,
        model_path=locate(configs[0].model),
        layers=first.describe(),
        model_notes=list(dict.fromkeys([*first.notes, *notes])),
        num_train_samples=training.num_used,
        num_eval_samples=sum(one.num_used for one in others if one.part.split("/")[0] == EVALUATION),
        num_dropped_samples=training.num_dropped,
        num_trainable=num_trainable,
        data=digests,
        day=next(filter(None, days), None),
        num_task_samples=task[0] if task else 0,
        longest_task_prompt=task[1] if task else 0,
        accounts=_distinct(account for both in accounts.values() for account in both),
    )


def _identify(
    config: TrainConfig, first: TrainConfig, tokenizer: Any, views: tuple[AnyView, AnyView], first_views: tuple[AnyView, AnyView]
) -> dict[str, str]:
    """Return the digests of the first config, or those of the samples that other variables of the template give.

    Raises InputError if the variables change what the trials are scored on.
    """
    if views is first_views:
        return identify(config, tokenizer, views)
    variables, others = config.data.template_kwargs, first.data.template_kwargs
    if variables == others:
        return {}
    if views[1].targets_digest() != first_views[1].targets_digest():
        allowed = f"trials would be scored on other target tokens than with {others}, so their losses would not compare"
        way_out = "take values that leave the answers as they are, and {} instead of null" if None in (variables, others) else (
            "take values that leave the answers as they are, or sweep with each value on its own"
        )
        raise InputError("data.template_kwargs", variables, f"{allowed}; {way_out}")
    return {variant(part, config): digest for part, digest in identify_samples(views).items()}


def _check_task(config: TrainConfig, facts: ModelFacts, tokenizer: Any, view: AnyView) -> tuple[int, int]:
    """Check the metrics against samples and model. Returns the number of their samples, and the longest prompt."""
    num_samples, longest = check_metrics(config, view, tokenizer)
    most = facts.num_positions
    if config.metrics.generates and most is not None and not facts.rotary and longest + config.metrics.max_new_tokens > most:
        allowed = f"must be at most {most - longest}: the model has {most} positions, and a prompt takes {longest} of them"
        raise InputError("metrics.max_new_tokens", config.metrics.max_new_tokens, allowed)
    return num_samples, longest


def _check_start(config: TrainConfig, ranks: dict[str, int], features: dict[str, tuple[int, int]]) -> list[str]:
    """Check the adapter that trials start from; return what to tell the user."""
    adapter = read_start(config.lora)
    check_made(config, ranks, features)
    if adapter is None:
        return []
    check_start(adapter, config.lora, ranks, features)
    if is_same_base(config.model.path, adapter.base):
        return []
    return [f"lora.start_from was trained on a base model of another name, {adapter.base!r}; its layers have the same shapes"]


def _distinct(accounts: Iterable[DataAccount]) -> list[DataAccount]:
    """Return the accounts without repeats, training first, by length; all configs share one evaluation set."""
    found: list[DataAccount] = []
    for account in accounts:
        if account not in found:
            found.append(account)
    return sorted(found, key=lambda account: (not account.part.startswith(TRAINING), account.max_seq_length))


def _check_tokens(config: TrainConfig, facts: ModelFacts, tokenizer: Any, views: tuple[AnyView, AnyView]) -> list[str]:
    """Check token ids and lengths of the samples against the model; return what to tell the user."""
    largest = max(view.largest_id() for view in views)
    if largest >= facts.num_rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        allowed = f"its tokenizer makes token {largest} ({token!r}) of the data, but its embedding has {facts.num_rows} rows"
        raise InputError("model.path", config.model.path, f"{allowed}: take the tokenizer that belongs to these weights")
    notes = _unseen_tokens(config, tokenizer, views[0])
    if len(tokenizer) > facts.num_rows:
        known = f"its tokenizer knows {len(tokenizer):,} tokens, its embedding {facts.num_rows:,}"
        notes.append(f"{known}; the data uses none of the others")
    longest = max(int(view.lengths.max()) for view in views)
    if facts.num_positions is not None and longest > facts.num_positions:
        if not facts.rotary:
            allowed = f"must be at most {facts.num_positions}: the model has no more positions, and a sample has {longest} tokens"
            raise InputError("data.max_seq_length", config.data.max_seq_length, allowed)
        notes.append(f"it was made for {facts.num_positions:,} positions, and samples have up to {longest:,} tokens")
    return notes


def _unseen_tokens(config: TrainConfig, tokenizer: Any, view: AnyView) -> list[str]:
    """Name trained tokens that no training sample has: they may be mistyped."""
    tokens = config.model.train_tokens
    trained = dict(zip(tokenizer.convert_tokens_to_ids(list(tokens)), tokens, strict=True))
    unseen = sorted(trained.keys() - view.ids_among(list(trained))) if trained else []
    named = ", ".join(repr(trained[number]) for number in unseen[:3])
    return [f"model.train_tokens: no training sample has {named}, so nothing shows how to use it"] if unseen else []


def inspect(config: ModelConfig) -> Facts:
    """Return the facts that decide memory and speed. Reads only config.json from the model folder.

    shape: the fields of ModelShape, or None for a model it does not describe. card: name and memory
    of the visible card with the least memory, or None without CUDA. host_gib: host memory that a
    trial may pin, or None if not known.
    """
    host_gib, shape = host_share_gib(), known_shape(config)
    return Facts(shape=shape, card=_card(), host_gib=host_gib if math.isfinite(host_gib) else None)


def _card() -> VisibleCard | None:
    if not torch.cuda.is_available():
        return None
    found = [(torch.cuda.mem_get_info(i)[1], torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    memory, name = min(found)
    return VisibleCard(name, memory / GIB)
