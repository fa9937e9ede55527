"""`--help` names every option, and Tab completes them in a real bash."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from engine.config.trial import TrainConfig
from sweep.__main__ import groups, main
from sweep.cli.completion import candidates
from sweep.cli.completion import script as script_of
from sweep.cli.config_keys import keys, sections
from sweep.config.conf_files import about
from tests.support.paths import ENV

TRY = r"""
source <(cat <<'END'
%(script)s
END
)
COMP_LINE='%(line)s'; COMP_POINT=${#COMP_LINE}
# bash breaks words at = and : too
read -ra COMP_WORDS <<< "$(sed 's/[=:]/ & /g' <<< "$COMP_LINE")"
[[ "$COMP_LINE" == *[[:space:]] ]] && COMP_WORDS+=("")
COMP_WORDS[0]=%(python)s
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_qlora_sweep 2>/dev/null
printf '%%s\n' "${COMPREPLY[@]}"
"""


def test_help_names_every_group_option_and_section(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for options in groups().values() for option in options)
    assert all(section in text for section in sections())
    assert max(map(len, text.splitlines())) <= 130


def test_every_option_but_the_config_models_own_names_says_what_it_is_for():
    assert [(group, option) for group, options in groups().items() for option in options if not about(group, option)] == []


@pytest.mark.parametrize("section", sections())
def test_help_on_a_section_lists_every_key_of_its_model(section, capsys):
    assert main([section, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(key.path in text for key in keys(section))
    if section in TrainConfig.model_fields:
        fields = TrainConfig.model_fields[section].annotation.model_fields
        assert {key.path for key in keys(section)} == {f"{section}.{name}" for name in fields}


def test_help_on_nothing_known_is_one_line(capsys):
    assert main(["--help", "lorra"]) == 2
    assert capsys.readouterr().err.startswith("error: --help = 'lorra': must be one of cluster, data")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("mod", {"model=", "model."}),
        ("+exp", {"+experiment="}),
        ("+debug=o", {"+debug=one-trial", "+debug=overfit-one-batch"}),
        ("lora.", {"lora.rank=", "lora.lora_alpha=", "lora.lora_dropout=", "lora.target_modules=", "lora.use_rslora=",
                   "lora.rank_pattern=", "lora.alpha_pattern=", "lora.start=", "lora.start_from=", "lora.start_digest=",
                       "lora.use_dora="}),
        ("lora.use_rslora=", {"lora.use_rslora=true", "lora.use_rslora=false"}),
        ("cluster.card=rtx40", {"cluster.card=rtx4090"}),
        ("train.activation_checkpointing=s", {"train.activation_checkpointing=selective"}),
        ("space.lora.r", {"space.lora.rank.", "space.lora.rank_pattern."}),
        ("data.train=my", {"<files>"}),
        ("nonsense", set()),
        ("nonsense=", set()),
    ],
)
def test_a_word_may_become(typed, expected):
    assert set(candidates(typed)) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("lora.use_r", {"lora.use_rslora="}),
        ("+experiment=quickstart lora.use_rslora=", {"true", "false"}),
        ("sampler=tpe pruner=med", {"median"}),
        ("data.train=my", {"my.jsonl", "mydata"}),
    ],
)
def test_bash_completes(typed, expected, tmp_path):
    (tmp_path / "my.jsonl").touch()
    (tmp_path / "mydata").mkdir()
    script = TRY % {"script": script_of("bash"), "python": sys.executable, "line": f"python -m sweep {typed}"}
    command = ["bash", "--norc", "--noprofile", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert set(done.stdout.removesuffix("\n").split("\n")) == expected, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_other_commands_of_the_same_interpreter_are_completed_as_before(tmp_path):
    (tmp_path / "script.py").touch()
    script = TRY % {"script": script_of("bash"), "python": sys.executable, "line": "python scr"}
    done = subprocess.run(["bash", "--norc", "--noprofile", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "script.py\n", done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_asks_for_the_same_words(shell, capsys):
    assert main(["--completion", shell]) == 0
    text = capsys.readouterr().out
    assert "-m sweep --complete" in text and "<files>" in text and "python3" in text
    assert f"--completion={shell}" in candidates("--completion=")


def test_another_shell_is_refused_in_one_line(capsys):
    assert main(["--completion", "tcsh"]) == 2
    assert capsys.readouterr().err == "error: --completion = 'tcsh': must be one of bash, zsh, fish\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_valid_where_the_shell_is(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    subprocess.run([shell, "-n"], input=script_of(shell), text=True, check=True)
