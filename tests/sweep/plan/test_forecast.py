"""`dry_run=true` predicts memory, speed and cost on a named card, without GPU, weights or data."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from engine.__main__ import main as engine_main
from engine.command_answers import Facts
from engine.planning.cards import CARDS
from engine.shape.model_shape import ModelShape
from sweep import preflight
from sweep.__main__ import main
from tests.support.fake_engine import SHAPE
from tests.support.prepared import prepared

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
CARD_NAMES = ", ".join(CARDS)
NEVER = 100_000_000  # a sequence length that fits no card
SWEEP = ["model=local", "data=local", "data.train=t.jsonl", "space=none", "dry_run=true",
         f"train.max_tokens={20 * NEVER}"]  # fmt: skip


@pytest.fixture
def seen(monkeypatch, tmp_path) -> list[Facts]:
    """Return what inspecting model and machine finds."""
    answer = [Facts(shape=SHAPE)]
    monkeypatch.setattr(preflight, "inspect", lambda config, module: answer[0])
    monkeypatch.setattr(preflight, "prepare", lambda configs, module: prepared(answer[0]))
    monkeypatch.setattr("sweep.cluster.slots.count_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    return answer


DRY_RUN = """
import json, sys
from engine.command_answers import Facts
from sweep import preflight
from sweep.__main__ import main
preflight.inspect = lambda config, module: Facts.from_dict(json.loads({found!r}))
print(main({arguments}), "torch" in sys.modules)
"""


def test_a_laptop_is_told_what_a_sweep_of_an_8b_model_needs_on_a_named_card(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    arguments = [
        *SWEEP, f"model.path={tmp_path}", "cluster.card=rtx4090", f"space.data.max_seq_length.choices=[1024,{NEVER}]",
        "space.lora.rank.choices=[8,64]", "sweep.num_trials=3", "train.tokens_per_step=2048",  # two micro-batches to choose from
    ]  # fmt: skip
    request, answer = tmp_path.with_suffix(".request"), tmp_path.with_suffix(".answer")
    request.write_text(json.dumps({"model": {"path": str(tmp_path)}, "data": {"train": "t"}, "train": {"max_tokens": 9}}))
    # the engine's command, but in this process: a new one would load torch for seconds
    assert engine_main(["inspect", str(request), "--answer", str(answer)]) == 0
    found = answer.read_text()
    code = DRY_RUN.format(found=found, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    # the forecast needs no tokenizer, weights or data, but a sweep does
    assert done.stderr.startswith("error: data.train = 't.jsonl': no such file; allowed: ") and done.stderr.count("\n") == 1
    lines = done.stdout.splitlines()
    assert lines[-1] == "2 False"
    table = lines[lines.index("forecast   every point of the space") :]
    assert "card       rtx4090, 23.6 GiB; speed extrapolated from the data sheet" in lines
    assert table[1].split() == ["max_seq_length", "rank", "peak", "GiB", "tok/s", "hours", "plan"]
    rows = [line.split() for line in table[2:6]]
    assert [row[:2] for row in rows] == [["1024", "8"], ["1024", "64"], [str(NEVER), "8"], [str(NEVER), "64"]]
    for row in rows[:2]:
        assert 5 < float(row[2]) < 23.6 and float(row[4]) > 0 and row[5] == "micro-batch"
    for row in rows[2:]:
        assert row[3:7] == ["does", "not", "fit:", "needs"]
    assert table[6].startswith("cost ") and "2 trials of" in table[6]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_large_space_is_shown_by_its_corners_without_what_changes_nothing(seen, capsys):
    lengths = ["space.data.max_seq_length.choices=[256,512,1024]", "space.lora.rank.choices=[4,8,16]"]
    assert main([*SWEEP, "model.path=m", "space=rank-targets-rate", *lengths, "cluster.card=a10g"]) == 0
    text = capsys.readouterr().out
    assert "corners of the space" in text
    header = next(line for line in text.splitlines() if "peak GiB" in line)
    assert "max_seq_length" in header and "learning_rate" not in header
    assert main([*SWEEP, "model.path=m", "space=learning-rate", "cluster.card=a10g"]) == 0
    assert "forecast   1 corner of the space, " in capsys.readouterr().out
    assert "the tokens of 4 full trials of" in text and "evaluation left out" in text


@pytest.mark.parametrize("mode", ["bf16", "auto", "int8_backward", "int8"])
def test_a_forecast_says_what_products_in_int8_bring(seen, capsys, mode):
    seen[0] = Facts(shape=ModelShape.of(LLAMA_8B, "8B"))
    lengths = ["space.data.max_seq_length.choices=[1024,2048]", "train.max_tokens=1000000", "train.tokens_per_step=2048"]
    assert main([*SWEEP[:-1], *lengths, "model.path=m", "cluster.card=rtx4090", f"train.matmul={mode}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("matmul ")]
    if not mode.startswith("int8"):
        unmeasured = "matmul     auto is bf16: products in INT8 are not measured on rtx4090 (`python -m engine calibrate`)"
        assert lines == ([unmeasured] if mode == "auto" else [])
        return
    (line,) = lines
    gain = float(re.fullmatch(rf"matmul +{mode}: (1\.\d\d) times the [\d,]+ tok/s of bf16 at the first point that fits", line)[1])
    assert 1.05 < gain < 2.0


def test_a_space_in_which_nothing_fits_is_shown_and_is_one_error(seen, capsys):
    assert main([*SWEEP, "model.path=m", f"space.data.max_seq_length.choices=[{NEVER},{2 * NEVER}]", "cluster.card=l4"]) == 2
    shown = capsys.readouterr()
    assert "none of these points fits the card" in shown.out
    assert shown.err.startswith(f"error: space = 'max_seq_length={NEVER}': ") and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "shape", "line"),
    [
        ([], SHAPE, f"forecast   none: no GPU here; set cluster.card=<name> to predict memory and speed: {CARD_NAMES}"),
        (["train.device=cpu", "cluster.card=l4"], SHAPE, "forecast   none: nothing is predicted for train.device=cpu"),
        (["cluster.card=l4"], None, "forecast   none: nothing is predicted for a model of this architecture"),
    ],
)
def test_where_nothing_is_predicted_one_line_says_why(seen, capsys, arguments, shape, line):
    seen[0] = Facts(shape=shape)
    assert main([*SWEEP, "model.path=m", *arguments]) == 0
    *_, shown, disk = capsys.readouterr().out.splitlines()
    assert shown == line and disk.startswith("disk       at most ")


QWEN3_5 = {**LLAMA_8B, "model_type": "qwen3_5_text", "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
           "num_attention_heads": 8, "num_key_value_heads": 2, "linear_num_value_heads": 16}  # fmt: skip


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_a_forecast_says_that_linear_attention_is_an_estimate(seen, capsys, kernels):
    shape = ModelShape.of(QWEN3_5, "x")
    seen[0] = Facts(shape=shape.with_kernels() if kernels else shape)
    lengths = ["space.data.max_seq_length.choices=[512]", "cluster.card=rtx4090", "train.max_tokens=1000000",
               "train.tokens_per_step=1024"]  # fmt: skip
    assert main([*SWEEP, "model.path=m", *lengths]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("estimate ")]
    assert "18 of 24 layers" in line and ("no flash-linear-attention here" in line) is not kernels
    assert ("without CUDA graphs" in line) is not kernels
    assert any("micro-batch" in line for line in lines)


def test_a_model_that_cannot_be_forecast_is_one_line(seen, capsys):
    seen[0] = Facts(shape=None)
    assert main([*SWEEP, "model.path=m", "cluster.card=rtx4090"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "forecast" in line] == [
        "forecast   none: nothing is predicted for a model of this architecture"]  # fmt: skip
