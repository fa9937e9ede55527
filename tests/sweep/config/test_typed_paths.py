"""A path on the command line means the file of that name, whatever characters the name has."""

from __future__ import annotations

import shlex
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from engine.config.parsing import CONTROL
from engine.errors import InputError
from sweep.__main__ import compose, main
from sweep.config.absolute_paths import absolute_path, absolute_uri, sqlite_file, sqlite_uri, with_absolute_paths
from sweep.config.compose import given_keys, parsed, repeated_keys, run_keys
from sweep.config.sweep import parse_sweep_config
from sweep.config.typed_paths import AS_HYDRA_HAS_IT, PATH_OR_LIST, PATHS, QUOTED, SEVERAL

GIVEN = ["model=local", "data=local", "space=none", "model.path=m", "data.train=t.jsonl"]
TYPED = [
    "~/x.jsonl", "データ/é.jsonl", "it's", "say \"hi\"", "a#b", "a=b", "data(1)", "a&b", "two words",
    " leading", "trailing ", "a,b", "$x", "100%", "wow!", "C:\\data\\x", "\\", "a\\'", "{a}", "{a,b}",
    "[a]", "[a", "true", "1", "1e5", "null ", "-", "+x", "~", "@x", "a:b", "a|b", "a;b", "a*?", "<a>",
    "`ls`", "😀", "👨‍👩‍👧", "wide\u3000space", "a\xa0b", "str(5)", "'a'b'", "a'b\"c", "$", "$ {a}",
    "\\\\'", "choice(a,b)", "x\\", "''x", "_", ".", "..", "None", "inf",
]  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=tuple(CONTROL)), min_size=1, max_size=12).filter(
    lambda text: "${" not in text and text not in AS_HYDRA_HAS_IT and not QUOTED.fullmatch(text)
)


def composed(*overrides):
    return parse_sweep_config(compose([*GIVEN, *overrides]))


def flat(config, key):
    section, field = key.split(".")
    return getattr(getattr(config, section), field)


def is_list(key, name):
    """Return whether brackets make a list or a section of the name. For a file of that name, see the test of lists."""
    return key in PATH_OR_LIST and ((name.startswith("[") and name.endswith("]")) or SEVERAL.fullmatch(name) is not None)


KEYS = [key for key in PATHS if key != "resume"]


@pytest.mark.parametrize("start", range(0, len(TYPED), len(KEYS)))
def test_every_path_key_takes_what_was_typed(start):
    wanted = {key: name for key, name in zip(KEYS, TYPED[start:] + TYPED) if not is_list(key, name)}
    config = composed(*(f"{key}={typed}" for key, typed in wanted.items()))
    assert {key: flat(config, key) for key in wanted} == wanted


def resolved(override):
    """Return what Hydra and OmegaConf make of one override."""
    return OmegaConf.to_container(OmegaConf.create({"value": parsed(override)[1]}), resolve=True)["value"]


@settings(max_examples=300, deadline=None)
@given(NAMES | st.sampled_from(TYPED), st.sampled_from(PATHS))
@example("'\\", "data.train")
@example("\\\\'\\", "resume")
def test_a_typed_name_comes_back_as_it_is(name, key):
    assert is_list(key, name) or resolved(f"{key}={name}") == name
    assert run_keys([f"resume={name}"])[0]["resume"] == name
    if not name.startswith("["):  # that is a list
        assert resolved(f"sweep.warm_start={name}") == [name]


@settings(max_examples=100, deadline=None)
@given(st.lists(NAMES.map(str.strip).filter(lambda name: name and not set(name) & set(",[]{}\\'\"$")), max_size=3))
def test_a_list_of_names_comes_back_as_it_is(names):
    assert resolved(f"sweep.warm_start=[{', '.join(names)}]") == names


def test_data_may_be_a_list_of_files_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolved("data.train=[~/it's.jsonl, parts/*.jsonl,2024]") == ["~/it's.jsonl", "parts/*.jsonl", "2024"]
    assert composed("data.eval=[a(1).jsonl,b.csv]").data.eval == ("a(1).jsonl", "b.csv")
    assert composed(f"data.eval=[{'x' * 300}]").data.eval == ("x" * 300,)
    (tmp_path / "[1].jsonl]").touch()
    assert composed("data.train=[1].jsonl]").data.train == "[1].jsonl]"


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("data.train", '"my file.jsonl"', "my file.jsonl"), ("data.train", "'it\\'s'", "it's"), ("data.eval", "null", None),
        ("data.eval", "${data.train}", "t.jsonl"), ("data.eval", "a b/${data.train}", "a b/t.jsonl"),
        ("data.eval", r"\${data.train}", "${data.train}"), ("data.eval", "it's ${data.train}", "it's t.jsonl"),
        ("sweep.warm_start", "[]", ()), ("sweep.warm_start", "[a, 'b,c', \"d\"]", ("a", "b,c", "d")),
        ("sweep.warm_start", "[~/it's, a(1)#x]", ("~/it's", "a(1)#x")), ("sweep.warm_start", "[2024, true]", ("2024", "true")),
        ("sweep.warm_start", r"[a\,b]", ("a,b",)), ("sweep.warm_start", "[${data.train},x]", ("t.jsonl", "x")),
    ],
)  # fmt: skip
def test_what_hydra_has_always_read_it_still_reads(key, typed, value):
    assert flat(composed(f"{key}={typed}"), key) == value


@pytest.mark.parametrize("typed", ["${nope.x}", "${", "${oc.env:HOME}"])
def test_a_reference_that_leads_nowhere_is_one_line(typed):
    with pytest.raises(InputError) as error:
        compose([*GIVEN, f"data.eval={typed}"])
    assert "\n" not in str(error.value) and typed in str(error.value)


def test_other_values_keep_hydras_grammar_and_the_line_says_how_to_quote():
    assert composed("train.report_at_tokens=[1024,4096]").train.report_at_tokens == (1024, 4096)
    with pytest.raises(InputError, match=r"model\.revision=~x.*quoted: 'model\.revision=\"\.\.\.\"'"):
        compose([*GIVEN, "model.revision=~x"])
    with pytest.raises(InputError, match=r"space\.data\.train\.choices.*cannot be searched over"):
        compose([*GIVEN, "space.data.train.choices=[~/a,~/b]"])


def test_the_home_folder_is_meant_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "it's.jsonl").touch()
    (tmp_path / "old").mkdir()
    here = tmp_path / "here"
    here.mkdir()
    config = composed("data.train=~/it's.jsonl", "data.eval=~/nope.jsonl", "data.chat_template=~/x.j2", "model.path=~/m",
                      "sweep.output_dir=~/sw", "sweep.warm_start=[~/old]", "tracking.uri=sqlite:///~/runs.db")  # fmt: skip
    found = with_absolute_paths(config, here)
    assert found.data.train == f"{tmp_path}/it's.jsonl" and found.data.eval == f"{tmp_path}/nope.jsonl"
    assert (found.data.chat_template, found.model.path) == (f"{tmp_path}/x.j2", f"{tmp_path}/m")
    assert (found.sweep.output_dir, found.sweep.warm_start) == (f"{tmp_path}/sw", (f"{tmp_path}/old",))
    assert found.tracking.uri == f"sqlite:///{tmp_path}/runs.db"
    assert with_absolute_paths(found, here) == found


def test_a_user_that_does_not_exist_is_a_name(tmp_path):
    assert absolute_path("~no-such-user-x/y", tmp_path) == "~no-such-user-x/y"
    (tmp_path / "~no-such-user-x").mkdir()
    assert absolute_path("~no-such-user-x", tmp_path) == str(tmp_path / "~no-such-user-x")


@settings(max_examples=100, deadline=None)
@given(NAMES.filter(lambda name: "/" not in name and name not in (".", "..")))
def test_the_address_of_a_database_leads_back_to_its_file(name):
    from pathlib import Path

    from sqlalchemy.engine import make_url

    file = Path("/tmp") / name / "mlflow.db"
    uri = sqlite_uri(file)
    assert sqlite_file(uri) == file == Path(make_url(uri).database)
    assert absolute_uri(uri, Path("/elsewhere")) == uri
    assert absolute_uri("sqlite:///x.db", file.parent) == sqlite_uri(file.parent / "x.db")


def test_the_same_key_twice_is_a_warning_with_both_values():
    assert given_keys(["lora.rank=8", "model=local", "~data.eval", "++optim={eps: 1, beta1: 0.5}"]) == {
        "lora.rank": 8, "optim.eps": 1, "optim.beta1": 0.5}  # fmt: skip
    assert given_keys(["lora.rank=8", "lora.rank=8"]) == {"lora.rank": 8}
    assert given_keys(["lora.rank=8", "lora={rank: 16}"]) == {"lora.rank": 16}
    (line,) = repeated_keys(["lora.rank=8", "lora={rank: 16}", "lora.rank=16"])
    assert line == "lora.rank = 8 has no effect, because a later argument sets lora.rank = 16"
    assert repeated_keys(["lora.rank=nan"]) == []  # nan differs from itself


def test_a_resume_takes_a_folder_by_its_name(tmp_path, capsys, monkeypatch):
    from datetime import datetime

    from sweep.folder.sweep_folder import SweepFolder

    monkeypatch.setenv("HOME", str(tmp_path))
    folder = SweepFolder.create(composed(f"sweep.output_dir={tmp_path}/it's a#b"), datetime(2026, 1, 1))
    for typed in (folder.path, f"~/it's a#b/{folder.path.name}", shlex.split(shlex.quote(str(folder.path)))[0]):
        assert main([f"resume={typed}", "lora.rank=8"]) == 2
        assert "cannot be changed on resume" in capsys.readouterr().err


def test_invisible_characters_that_control_nothing_may_stand_in_a_name():
    for char in ("\x1b", "\x85", "\u2028", "\x7f"):
        assert unicodedata.category(char) in CONTROL
        with pytest.raises(InputError, match="control characters"):
            parse_sweep_config({"model": {"path": f"a{char}"}, "data": {"train": "t"}, "train": {"max_tokens": 400}})
