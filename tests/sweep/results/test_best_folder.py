"""`best/` holds the adapter, its config and a card that says how it was made."""

import importlib
import json
import re
from dataclasses import replace

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig, load_train_config
from engine.errors import InputError
from engine.export.model_card import TITLES, ExportFacts, Measured, export_card, peft_code
from engine.system.shared_cache import CACHE_VARIABLE
from sweep.results.best_folder import write_best
from sweep.trials.selection import Rule
from tests.support.records import REEVALUATION, judged, trial


@pytest.fixture
def winner(tmp_path):
    adapter = tmp_path / "trial" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        (adapter / name).write_text(name)
    return trial(7, 1.5, 1.2, 1.3, folder=adapter.parent)


def test_best_holds_the_adapter_its_config_and_a_card(tmp_path, winner):
    write_best(tmp_path / "best", judged(winner), "demo")
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "train_config.json",
    ]
    assert load_train_config(tmp_path / "best" / "train_config.json").model.path == "org/base"
    card = (tmp_path / "best" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/base"\nlibrary_name: peft\n')
    for part in (
        Rule().text,
        "| base model | 2.5000 | 12.182 |",
        "12,345 target tokens",
        "2,000 of 3,000",
        "python -m engine train_config.json",
    ):
        assert part in card


def test_the_card_says_which_of_two_adapters_it_is(tmp_path, winner):
    def card(**losses):
        reports = [replace(report, **losses) if report.rung == 2 else report for report in winner.reports]
        config = {**winner.config, "optim": {"ema_horizon": 0.1}}
        write_best(tmp_path / "best", judged(replace(winner, reports=reports, config=config)), "demo")
        return (tmp_path / "best" / "README.md").read_text()

    average = "| adapter | running average (horizon 0.1): 1.2000; the last step's: 1.2500 |"
    last = "| adapter | the last step's: 1.2000; its running average (horizon 0.1): 1.2500 |"
    assert average in card(raw_eval_loss=1.25, ema_eval_loss=1.2) and last in card(raw_eval_loss=1.2, ema_eval_loss=1.25)
    assert "| adapter |" not in card()


def test_the_code_in_the_card_compiles_and_loads_four_bit_where_training_did(tmp_path, winner):
    write_best(tmp_path / "best", judged(winner), "demo")
    code = (tmp_path / "best" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "load_in_4bit=True" in code


def test_the_card_of_a_builtin_model_says_where_its_base_is(tmp_path, winner, builtin_cache, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(builtin_cache))
    write_best(tmp_path / "best", judged(winner), "demo")
    assert "builtin:" not in (tmp_path / "best" / "README.md").read_text()  # twin
    winner.config["model"]["path"] = "builtin:smollm2-135m-instruct"
    write_best(tmp_path / "best", judged(winner), "demo")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "resolve_model('builtin:smollm2-135m-instruct')" in card
    module = card.split("from ")[-1].split(" import resolve_model")[0]
    assert callable(importlib.import_module(module).resolve_model)


def test_a_disagreeing_second_evaluation_is_said_aloud(tmp_path, winner):
    write_best(tmp_path / "best", judged(winner, reevaluation=replace(REEVALUATION, agrees=False)), "demo")
    assert "**does NOT agree with**" in (tmp_path / "best" / "README.md").read_text()


def test_best_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path, winner):
    for stale in ("best", ".best.new", ".best.old"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "stale").write_text("")
    write_best(tmp_path / "best", judged(winner), "demo")
    assert not (tmp_path / "best" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "trial"]


def test_a_trial_without_an_adapter_is_refused_and_the_older_best_stays(tmp_path, winner):
    write_best(tmp_path / "best", judged(winner), "demo")
    with pytest.raises(InputError, match=r"must hold adapter_config.json and adapter_model.safetensors of trial 8"):
        write_best(tmp_path / "best", judged(trial(8, 1.0, folder=tmp_path / "gone")), "demo")
    assert (tmp_path / "best" / "tokenizer.json").exists()


def test_the_card_of_best_and_of_an_export_have_one_shape(tmp_path, winner):
    write_best(tmp_path / "best", judged(winner), "demo")
    best = (tmp_path / "best" / "README.md").read_text()
    config, measured = parse(TrainConfig, winner.config), Measured(2.0, 1.2, None, 9, "a", "b")
    exported = export_card(ExportFacts("peft", "org/base", 16, 32.0, 7, None, config, measured, {}))
    for card in (best, exported):
        head = r'---\nbase_model: "org/base"\nlibrary_name: peft\npipeline_tag: text-generation\ntags: \["lora", .*\]\n---\n\n# '
        assert re.match(head, card)
        assert "| | eval loss (nats/token) | perplexity |\n|---|---:|---:|\n| base model" in card
        assert "\n\n| setting | value |\n|---|---|\n" in card
    code = [card.split("```python\n")[1].split("```")[0] for card in (best, exported)]
    assert code[0] == code[1]


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        ({"quant_method": "fp8"}, "FineGrainedFP8Config(dequantize=True)"),
        ({"quant_method": "gptq"}, "BitsAndBytesConfig(load_in_4bit=True"),
    ],
)
def test_a_packed_base_is_unpacked_in_the_card_s_code(settings, made, tmp_path, winner):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    winner.config["model"]["path"] = str(tmp_path)
    code = "\n".join(peft_code("org/base", parse(TrainConfig, winner.config)))
    assert made in code and made.partition("(")[0] in code.split("from transformers import")[1].splitlines()[0]


@pytest.mark.parametrize("base", ["/home/me/models/mine", "org/base"])
def test_no_card_names_a_path_of_this_machine(tmp_path, winner, base):
    local = base.startswith("/")
    (tmp_path / "trial" / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    winner.config["model"]["path"], winner.config["data"]["train"] = base, "/home/me/data/mine.jsonl"
    write_best(tmp_path / "best", judged(winner), "demo")
    config, measured = parse(TrainConfig, winner.config), Measured(2.0, 1.2, None, 9, "a", "b")
    facts = {form: ExportFacts(form, base, 16, 32.0, 7, "bfloat16", config, measured, {}) for form in TITLES}
    for card in [(tmp_path / "best" / "README.md").read_text(), *map(export_card, facts.values())]:
        assert "/home" not in card and "`mine.jsonl`" in card
        assert ("base_model:" in card) is not local and ("mine`" in card or "of mine;" in card) is local
        for block in card.split("```python\n")[1:]:
            compile(block.split("```")[0], "card", "exec")
    code = (tmp_path / "best" / "README.md").read_text().split("```python\n")[1]
    assert ('folder = PeftConfig.from_pretrained(".").base_model_name_or_path' in code) is local
