"""Settings that nobody chose: drawn alike each time, valid, planned or refused in one line, and measured again from a file."""

import copy
import json

import pytest
import torch

from engine.bench.drawn_rows import __main__ as command
from engine.bench.drawn_rows import drawn_trial
from engine.bench.drawn_rows.drawn_samples import KINDS, DrawnView
from engine.bench.drawn_rows.drawn_settings import CAPS_GIB, draw, draw_all, plain_shape, train_config
from engine.bench.drawn_rows.drawn_shapes import DRAWN, SIZES, UNFUSED, draw_shape
from engine.bench.drawn_rows.drawn_summary import summary
from engine.config.trial import TrainConfig
from engine.errors import EngineError, InputError
from engine.planning.cards import find_card
from engine.shape.families import FAMILIES, OTHER_TYPES

DRAWN_HERE, PLANNED = 60, 10
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512}  # fmt: skip
LENGTHS = {
    "lognormal": {"mean": 5.0, "deviation": 1.0}, "bimodal": {"short": 30.0, "long": 0.9, "share": 0.4},
    "tiny": {"most": 40.0}, "full": {}, "uniform": {"least": 0.2},
}  # fmt: skip


@pytest.fixture(scope="module")
def settings():
    return list(draw_all(1, DRAWN_HERE))


def tiny_setting(**changes):
    """Return a setting of a tiny Llama with few tokens."""
    values = {"name": "drawn-tiny", "seed": 7, "number": 3, "shape": {"model_type": "llama", "tie_word_embeddings": True, **TINY}}
    config = {"data": {"max_seq_length": 100, "eval_max_seq_length": 70}, "lora": {"rank": 4}, "optim": {"ema_horizon": 0.2},
              "train": {"tokens_per_step": 300, "memory_budget_gib": 23.5}}  # fmt: skip
    return {**values, "config": config, "lengths": {"kind": "tiny", "most": 40.0, "targets": 0.5}, **changes}


def on_a_cpu(monkeypatch, settings):
    """Let the command measure these settings on the CPU, as far as it has no memory to report."""
    stats = {f"{name}_bytes.all.peak": 2**30 for name in ("allocated", "reserved")} | {"num_ooms": 0, "num_alloc_retries": 0}
    fakes = {"get_device_name": "a card", "mem_get_info": (2**37, 2**37), "memory_reserved": 0,
             "reset_peak_memory_stats": None, "reset_accumulated_memory_stats": None, "memory_stats": stats,
             "synchronize": None}  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(drawn_trial, "card_here", lambda: find_card("h200"))
    monkeypatch.setattr(drawn_trial, "limit_memory", lambda *_: None)
    monkeypatch.setattr(drawn_trial, "TRAIN_TOKENS", 600)
    monkeypatch.setattr(command, "has_card", lambda: True)
    monkeypatch.setattr(command, "pick_device", lambda wanted: torch.device("cpu"))
    monkeypatch.setattr(command, "draw_all", lambda seed, count: iter(settings))


def test_a_drawing_depends_on_seed_and_number_alone(settings):
    assert settings[:8] == list(draw_all(1, 8)) and settings[5] == draw(1, 5) != draw(2, 5)
    assert json.loads(json.dumps(settings)) == settings


def test_settings_are_valid_and_have_plans_or_one_line(settings):
    planned = 0
    assert all(isinstance(train_config(values), TrainConfig) for values in settings)
    for values in settings[:PLANNED]:
        try:
            plan = drawn_trial.plan_of(values, find_card("rtx4090"))
        except EngineError as error:
            assert "\n" not in str(error)
            continue
        planned += 1
        assert plan.memory.need_gib <= values["config"]["train"]["memory_budget_gib"] and plan.speed.tokens_per_second > 0
    assert planned > 0.8 * PLANNED


def test_drawn_shapes_are_mixed_and_of_the_size_that_is_wanted(settings):
    assert {values["config"]["train"]["memory_budget_gib"] for values in settings} == set(CAPS_GIB)
    assert {values["lengths"]["kind"] for values in settings} == set(KINDS)
    sizes = [plain_shape(values).num_parameters / 1e9 for values in settings]
    for values, size in zip(settings, sizes, strict=True):
        low, high = SIZES[values["number"] // 2 % len(SIZES)]
        assert 0.6 * low < size < 1.5 * high
    early = {draw_shape(1, number)["model_type"] for number in range(56)}
    assert len(early) > 20 and early & set(UNFUSED)
    assert set(DRAWN) <= {*FAMILIES, *OTHER_TYPES} and not set(UNFUSED) & set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_keep_to_their_lengths(kind):
    lengths = {"kind": kind, "targets": 0.3, **LENGTHS[kind]}
    view, same = (DrawnView(lengths, 200, 5000, 512, seed=1) for _ in range(2))
    assert (view.lengths == same.lengths).all() and view.lengths.min() >= 2 and view.lengths.max() <= 200
    assert view.lengths.sum() >= 5000 and all(view[i].is_target[1:].any() for i in range(len(view.lengths)))
    assert 2 <= len(view.up_to(600).lengths) < len(view.lengths) and view.up_to(600).lengths[:-1].sum() <= 600


def test_a_setting_is_measured_once_and_again_from_its_record(monkeypatch, tmp_path, capsys):
    too_much = tiny_setting(number=4)
    too_much["config"] = copy.deepcopy(too_much["config"])
    too_much["config"]["train"]["memory_budget_gib"] = 0.5
    broken = tiny_setting(number=5, lengths={"kind": "tiny", "targets": 0.5})
    on_a_cpu(monkeypatch, [tiny_setting(), too_much, broken])
    file, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for _ in range(2):
        assert command.main(["--random", "3", "--out", str(file)]) == 0
    first, refused, failed = records = command.read_records(file)
    assert first["fits"] and first["tokens_per_second"] > 0 and first["card"] == "a card"
    assert len(first["step_tokens_per_second"]) == 3 and 0 < first["largest_row"]["tokens"] <= first["largest_row"]["capacity"]
    assert first["peaks_gib"] == {} and first["components_gib"]["adapter"] >= 0 and first["settings"]["micro_batch_size"] >= 1
    assert not refused["fits"] and "needs at least" in refused["refused"]
    assert not failed["fits"] and failed["failed"].startswith("KeyError")
    assert command.main(["--redo", str(file), "--numbers", "3", "--out", str(again)]) == 0
    assert [record["config"] for record in command.read_records(again)] == [first["config"]]
    assert "1 settings of 1 shapes ran: 0 out of memory; 1 refused, 1 failed" in summary(records)


def test_the_summary_names_outliers_with_their_settings():
    good = {**tiny_setting(), "fits": True, "num_out_of_memory": 0, "num_retries": 0, "plan": "a plan", "seconds": 1.0,
            "predicted_gib": 9.5, "predicted_reserved_gib": 10.0, "peak_allocated_gib": 9.5, "peak_reserved_gib": 10.0,
            "predicted_tokens_per_second": 100, "tokens_per_second": 100, "others_gib": 0.0,
            "largest_row": {"tokens": 99, "capacity": 100}}  # fmt: skip
    changes = ({"peak_reserved_gib": 8.0}, {"num_out_of_memory": 1, "tokens_per_second": None}, {"tokens_per_second": 50},
               {"tokens_per_second": 5, "others_gib": 30.0})  # fmt: skip
    text = summary([good, *({**good, **change, "number": number} for number, change in enumerate(changes, 10))])
    assert "5 settings of 1 shapes ran: 1 out of memory" in text and "reserved: |error| p95 25.0%" in text
    assert "reserved where a row is full: |error| p95 25.0%" in text
    assert "speed: |error| p95 100.0%, from +0.0% to +100.0%, median +0.0%, 3 settings" in text
    for title, number in (("out of memory", 11), ("reserved off", 10), ("slower than predicted", 12)):
        assert f"- {title}:  {number} llama" in text
    assert text.count("lora.rank=4") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--random", "3"], "--out FILE goes with"),
        (["--out", "x"], "give one of"),
        (["--random", "0", "--out", "x"], "must be 1 to 10000, not 0"),
        (["--random", "3", "--out", "x", "--numbers", "3"], "--numbers goes with --redo"),
        (["--random", "3", "--out", "x", "--budget-s", "nan"], "above 0 seconds, not nan"),
        (["--summary", "missing.jsonl"], "missing.jsonl is no file"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        command._arguments(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_files_of_something_else_are_refused_and_so_is_a_machine_without_a_card(tmp_path, monkeypatch):
    file = tmp_path / "other.jsonl"
    for line in ("{", "[]", '{"seed": 1}'):
        file.write_text(f"{line}\n")
        with pytest.raises(InputError, match=r"line 1.*must be a record"):
            command.read_records(file)
    file.write_text(json.dumps({"seed": 1, "number": 2, "fits": True}) + "\n")
    with pytest.raises(SystemExit, match=r"--redo: record 2 is no whole setting: 'name'"):
        command.main(["--redo", str(file), "--out", str(tmp_path / "new.jsonl")])
    monkeypatch.setattr(command, "has_card", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        command.main(["--random", "1", "--out", str(tmp_path / "new.jsonl")])
