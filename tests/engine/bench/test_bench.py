"""Run the step benchmark on a tiny shape: systems agree, failures are rows, finished rows stay."""

import json
import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from engine.bench import __main__ as bench
from engine.bench import calibrate, children
from engine.bench.children import run_rows
from engine.bench.measure import measure, tokens
from engine.bench.model_folder import write_checkpoint
from engine.bench.process import MARK
from engine.bench.rows import LADDER, OURS_ONLY, POLICIES, SUITES, Row, Setting, plain_rows, suite_rows
from engine.bench.shapes import SHAPES, linear_names, random_config, random_model
from engine.bench.systems import SYSTEMS, System
from engine.bench.table import report
from engine.kernels.ops import IGNORE
from engine.shape.model_shape import ModelShape

TINY = Setting(model="tiny", batch=2, length=32, rank=4, steps=2)
FLAGS = ["--model", "tiny", "--batch", "2", "--length", "32", "--rank", "4", "--steps", "2"]
HERE = ("ours", "ours-unfused", "peft")  # the others need a GPU
CPU = torch.device("cpu")
DONE = {"tokens_per_second": 1000.0, "step_time_ms": 2.0, "peak_allocated_gib": 3.0, "first_step_s": 4.0, "first_loss": 5.0,
        "last_loss": 4.5}  # fmt: skip


def one(system: str, setting: Setting) -> dict:
    return next(measure(system, [setting]))


@pytest.mark.parametrize("policy", ["keep", pytest.param("recompute", marks=pytest.mark.faults)])
def test_all_systems_compute_the_same_loss(policy):
    ours, *others = (one(system, replace(TINY, policy=policy)) for system in HERE)
    for other in others:
        assert other["first_loss"] == pytest.approx(ours["first_loss"], abs=1e-3)
        assert other["last_loss"] == pytest.approx(ours["last_loss"], rel=1e-2)
    # other tokens give another loss
    assert ours["first_loss"] != pytest.approx(ours["last_loss"], abs=1e-3)


SHRUNK = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 16, "vocab_size": 128}  # fmt: skip
GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "global_head_dim": 32,
          "num_global_key_value_heads": None, "vocab_size_per_layer_input": 128}  # fmt: skip
QWEN3_5 = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
RELEASED = ("gemma-4-e2b", "gemma-4-e4b", "smollm3-3b", "granite-3.3-2b", "olmo-3-7b", "phi-4-mini", "ministral-3-8b", "glm-4-9b",
            "exaone-4-1.2b", "qwen3.5-4b")  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("model", RELEASED)
def test_systems_agree_on_a_small_model_of_each_released_family(model, monkeypatch):
    """All else is as released: multipliers, kinds of layers, rotary settings."""
    small = {**SHAPES[model], **SHRUNK}
    if model.startswith("gemma-4"):
        small |= GEMMA4
    if model.startswith("qwen3.5"):
        small |= QWEN3_5
    if "layer_types" in small:
        small["layer_types"] = small["layer_types"][:4]
    rope = small.get("rope_parameters", {})
    small |= {"rope_parameters": {k: v[:6] if isinstance(v, list) else v for k, v in rope.items()}} if rope else {}
    monkeypatch.setitem(SHAPES, model, small)
    systems = [system for system in HERE if system != "ours-unfused" or not model.startswith("qwen3.5")]  # it takes one sample
    ours, *others = (one(system, replace(TINY, model=model)) for system in systems)
    for other in others:
        assert other["first_loss"] == pytest.approx(ours["first_loss"], abs=1e-3)
        assert other["last_loss"] == pytest.approx(ours["last_loss"], rel=1e-2)


@pytest.mark.parametrize("model", [model for model in SHAPES if model != "tiny"])
def test_a_shape_has_the_parameters_of_the_library_s_model(model):
    from transformers import AutoModelForCausalLM

    config = random_config(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.known(config.to_dict(), model)
    if shape is None:  # nothing is predicted for it
        assert model.startswith("qwen3.5")
    elif shape.family != "other":
        assert shape.num_parameters == sum(p.numel() for p in built.parameters())
    else:  # all matrices are counted that its layers may have, and no biases
        real = sum(p.numel() for name, p in built.named_parameters() if not name.endswith(".bias"))
        assert real <= shape.num_parameters < 1.4 * real
    names = {n.rpartition(".")[2] for n, m in built.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert names == set(linear_names(model))


@pytest.mark.parametrize("system", [HERE[0], *(pytest.param(system, marks=pytest.mark.faults) for system in HERE[1:])])
def test_a_setting_is_measured_as_if_it_were_alone_in_its_process(system):
    settings = [TINY, replace(TINY, rank=2, policy="keep"), TINY]
    first, other, again = measure(system, settings)
    for name in ("first_loss", "last_loss"):
        assert again[name] == pytest.approx(first[name], rel=1e-6)
    assert other["last_loss"] != pytest.approx(first["last_loss"], rel=1e-6)


def test_every_token_is_a_label_and_every_step_has_its_own_tokens():
    batch = tokens(TINY, 0)
    ids = batch.input_ids_T.view(2, 32)
    labels = batch.labels_T.view(2, 32)
    assert torch.equal(labels[:, :-1], ids[:, 1:]) and (labels[:, -1] == IGNORE).all()
    assert batch.num_targets == 2 * 31  # as in transformers, which shifts labels
    assert not torch.equal(ids, tokens(TINY, 1).input_ids_T.view(2, 32))


def test_the_model_folder_holds_the_model_in_memory_and_a_tokenizer(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_checkpoint("tiny", tmp_path / "tiny", CPU)
    # In evaluation mode, some CPUs repack the weight.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").train()
    in_memory = random_model("tiny", CPU, torch.float32, "sdpa")[0].train()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, in_memory(ids).logits, rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer.decode(tokenizer("naïve")["input_ids"]) == "naïve"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not list(tmp_path.glob("*.part"))


STAND_IN = """
    import sys
    assert "transformers" not in sys.modules and "peft" not in sys.modules, "unsloth must be imported first"
    import peft, transformers

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit):
            assert load_in_4bit and max_seq_length == 32 and str(dtype) == "torch.bfloat16"
            return transformers.AutoModelForCausalLM.from_pretrained(model_name), None

        @staticmethod
        def get_peft_model(model, use_gradient_checkpointing, random_state, **config):
            assert use_gradient_checkpointing == "unsloth"
            return peft.get_peft_model(model, peft.LoraConfig(**config))

        @staticmethod
        def for_training(model):
            model.train()
"""


@pytest.mark.faults
def test_a_system_that_loads_from_a_folder_sees_the_same_weights_and_the_folder_is_used_again(tmp_path, monkeypatch):
    site, scratch = tmp_path / "site", tmp_path / "scratch"
    (site / "unsloth").mkdir(parents=True)
    (site / "unsloth" / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    scratch.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    row = plain_rows(["unsloth"], TINY)[0]
    first, second = run_rows([row, row], scratch, 100.0)
    assert first["first_loss"] == second["first_loss"] == pytest.approx(one("ours", TINY)["first_loss"], abs=1e-3)
    (folder,) = scratch.glob("tiny-*")
    written = (folder / "config.json").stat().st_mtime_ns
    assert run_rows([row], scratch, 0.1) == [{"error": "timed out", "checkpoint_s": pytest.approx(0.0, abs=0.1)}]
    assert (folder / "config.json").stat().st_mtime_ns == written and first["checkpoint_s"] > 0


@pytest.mark.faults
def test_rows_run_in_processes_of_their_own_and_a_missing_package_is_a_row(tmp_path, monkeypatch, capsys):
    missing = System(SYSTEMS["peft-liger"].build, needs=("no_such_package",))
    monkeypatch.setitem(SYSTEMS, "peft-liger", missing)
    file = tmp_path / "results" / "rows.jsonl"
    assert bench.main([*FLAGS, "--systems", "peft", "peft-liger", "--json", str(file), "--commit", "abc"]) == 0
    peft, liger = (json.loads(text) for text in file.read_text().splitlines())
    assert peft["tokens_per_second"] > 0 and peft["card"] == "CPU" and peft["git.commit"] == "abc"
    assert {field.name: peft[field.name] for field in fields(Setting)} == asdict(replace(TINY, **OURS_ONLY))
    assert liger["error"] == "not installed"
    assert "peft-liger  not installed" in capsys.readouterr().out


def _pretend(monkeypatch, results: list) -> list[Row]:
    """Let each row return or raise the next of `results`; return the started rows."""
    started: list[Row] = []

    def run(rows: list[Row], scratch: Path, timeout_s: float) -> list[dict]:
        return [one(row) for row in rows]

    def one(row: Row) -> dict:
        started.append(row)
        result = results[min(len(started), len(results)) - 1]
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(bench, "run_rows", run)
    monkeypatch.setattr(bench, "card_name", lambda scratch: "a card")
    return started


def test_a_killed_suite_keeps_the_rows_that_were_done(tmp_path, monkeypatch):
    started = _pretend(monkeypatch, [DONE, {"error": "timed out"}, KeyboardInterrupt()])
    file = tmp_path / "rows.jsonl"
    assert bench.main(["--suite", "table", "--systems", "unsloth", "ours", "--json", str(file)]) == 130
    assert [json.loads(text).get("error") for text in file.read_text().splitlines()] == [None]
    assert [(row.system, row.setting.policy) for row in started] == [
        ("unsloth", "offload"),
        ("ours", "offload"),
        ("ours", "keep"),
    ]


def test_a_spent_budget_leaves_rows_out_and_lists_them(monkeypatch, capsys):
    started = _pretend(monkeypatch, [DONE])
    bench.main(["--suite", "table", "--systems", "ours", "--budget-s", "0"])
    listed = capsys.readouterr().out
    assert not started and listed.count("ours: ") == len(SUITES["table"])


def test_the_ladder_prints_what_each_row_adds(monkeypatch, capsys):
    results = [{**DONE, "tokens_per_second": 1000.0 * 2**i} for i in range(len(LADDER))]
    _pretend(monkeypatch, results)
    bench.main(["--suite", "ladder"])
    table = capsys.readouterr().out
    assert table.count("| 2.00 x |") >= len(LADDER) - 1 and f"{2 ** (len(LADDER) - 1)}.00 x |" in table
    started = _pretend(monkeypatch, [DONE])
    bench.main(["--suite", "table", "ladder", "--systems", "ours", "--only", "smollm2-135m", "--model", "smollm2-135m"])
    assert len(started) == len(LADDER) + 1


def test_suites_and_the_ladder_name_what_exists():
    rows = [row for name in (*SUITES, "ladder") for row in suite_rows(name, SYSTEMS, TINY)]
    for row in rows:
        assert row.system in SYSTEMS and row.setting.model in SHAPES and row.setting.policy in POLICIES
    assert len({label for label, _, _ in LADDER}) == len(LADDER)
    long = [row for row in suite_rows("int8", SYSTEMS, TINY, ["bf16", "int8_backward", "int8"]) if row.setting.length == 65536]
    assert [(row.system, row.setting.matmul) for row in long] == [("ours", "bf16"), ("ours", "int8"), ("unsloth", "bf16")]


def test_a_weight_cache_and_kept_layers_are_of_ours_only():
    ours, peft = plain_rows(["ours", "peft"], replace(TINY, weight_cache_gib=2.0, keep_layers=3))
    assert (ours.setting.weight_cache_gib, ours.setting.keep_layers) == (2.0, 3)
    assert (peft.setting.weight_cache_gib, peft.setting.keep_layers) == (0.0, 0)


def _record(system: str, setting: Setting = TINY, **changes) -> dict:
    facts = {"card": "a card", "git.commit": "0123456789abcdef", "version.torch": "2.11.0"}
    return {**Row(system, system, setting).record(), **facts, **(changes if "error" in changes else {**DONE, **changes})}


def test_the_report_has_one_row_per_system_its_latest_and_how_ours_compares():
    table = report([
        _record("peft", tokens_per_second=1.0),
        _record("ours", tokens_per_second=3000.0, host_gib=7.5),
        _record("peft", tokens_per_second=1500.0),
        _record("unsloth", error="out of memory"),
    ])  # fmt: skip
    assert "**tiny, 2 x 32 tokens, r 4, activations recomputed**" in table
    assert "| peft | 1,500 | 2.0 | 3.00 |  | 4.0 | 2.00 x |" in table
    assert "| ours | 3,000 | 2.0 | 3.00 | 7.5 | 4.0 |  |" in table
    assert "| unsloth | out of memory |  |  |  |  |" in table
    assert table.splitlines()[-1] == "a card, torch 2.11.0, commit 012345678, 2 steps"


def test_the_report_keeps_settings_apart_and_marks_rows_of_other_commits():
    other = {"git.commit": "fedcba9876543210+changes"}
    table = report([_record("ours"), _record("peft", **other), _record("peft", replace(TINY, policy="keep"))])
    assert table.count("**tiny") == 2
    assert "| ours (a) |" in table and "| peft (b) |" in table and "\n| peft |" in table
    assert "(b) a card, torch 2.11.0, commit fedcba987+changes, 2 steps" in table


def test_calibration_settings_cover_every_value_and_stay_within_the_longest_row():
    settings = [values for model in calibrate.MAX_TOKENS for values in calibrate.draw(model, 0, 16)]
    assert len(settings) >= 60
    for name, values in (("rank", calibrate.RANKS), ("length", calibrate.LENGTHS), ("targets", calibrate.TARGETS)):
        assert {s[name] for s in settings} == set(values)
    assert all(s["batch"] * s["length"] <= calibrate.MAX_TOKENS[s["model"]] for s in settings)
    for values in settings:
        calibrate.train_config(values)


def test_the_plot_of_predicted_against_measured_is_drawn(tmp_path):
    records = [{"model": "tiny", "card": "a card", "predicted_gib": 1.0 + i, "peak_allocated_gib": 1.1 + i} for i in range(3)]
    records.append({**records[0], "peak_allocated_gib": None})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert calibrate.main(["--plot", str(tmp_path / "a.png"), str(tmp_path / "a.jsonl")]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_row_in_each_mode_of_multiplication_and_one_of_other_systems(tmp_path, capsys, monkeypatch):
    """A system's commands run in this process, because a new one loads torch for seconds; another test starts some."""

    def run_here(arguments: list[str], scratch: Path, timeout_s: float) -> list[dict]:
        assert arguments[:2] == ["-m", "engine.bench"]
        capsys.readouterr()
        assert bench.main(arguments[2:]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]

    monkeypatch.setattr(children, "run_python_all", run_here)
    monkeypatch.setattr(bench, "card_name", lambda scratch: "CPU")
    file = tmp_path / "rows.jsonl"
    modes = ["bf16", "int8_backward", "int8"]
    assert bench.main([*FLAGS, "--systems", "ours", "ours-unfused", "--matmul", *modes, "--json", str(file)]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["label"], r["matmul"]) for r in records] == [
        ("ours", "bf16"), ("ours, int8_backward", "int8_backward"), ("ours, int8", "int8"), ("ours-unfused", "bf16"),
    ]  # fmt: skip
    ours, backward, both, unfused = (r["first_loss"] for r in records)
    assert ours == backward != both and both == pytest.approx(ours, abs=0.01) and unfused == pytest.approx(ours, abs=1e-3)
    assert "| ours, int8 |" in report(records)
