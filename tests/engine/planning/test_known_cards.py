"""A measurement is a file that carries its checksum, and predictions say where their rates are from."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from engine.errors import InputError
from engine.planning import known_cards
from engine.planning.cards import CARDS, found_card
from engine.planning.known_cards import GUESS, HERE, KIND, SHEET, measured_here, speed_basis, stored_file, with_known_rates
from engine.planning.measured_card import MeasuredCard, _digest
from engine.system import provenance
from tests.support.measured import RTX_4090, keep, measured

TILE = {"t": 128, "n": 128, "k": 64, "warps": 4, "stages": 3}
OTHER = "NVIDIA Some Other Card"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_cards, "KEPT", tmp_path / "kept")
    return tmp_path


def basis(name: str, here: bool = True) -> str:
    return speed_basis(with_known_rates(found_card(name, 23.6), here))


def test_a_file_reads_back_as_it_was_written(tmp_path):
    found = measured()
    found.write(tmp_path / "card.json")
    assert MeasuredCard.read(tmp_path / "card.json") == found


@pytest.mark.parametrize(("damage", "said"), [
    (lambda v: {**v, "rates": {**v["rates"], "link_gb_s": 26.0}}, "has changed"),
    (lambda v: {**v, "digest": "0"}, "has changed"),
    (lambda v: {**v, "format": 2}, "format 1, not 2"),
    (lambda v: {name: v[name] for name in v if name != "digest"}, "no measurement"),
    (lambda v: [v], "no measurement"),
    (lambda v: {"digest": "0"}, "format 1, not None"),
])  # fmt: skip
def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path, damage, said):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(damage(json.loads(measured().text()))))
    with pytest.raises(InputError, match=said) as error:
        MeasuredCard.read(path, "--from")
    assert str(error.value).startswith("--from = ") and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    {"steps": []}, {"steps": {"a": 1}}, {"raw": {"a": 10**400}}, {"raw": {"a": math.nan}}, {"raw": None}, {"memory_gib": "24"},
    {"card": ""}, {"day": 7}, {"day": "tomorrow"}, {"rates": {}}, {"steps": {"a": {"measured_ms": 1.0}}},
    {"steps": {"a": {"measured_ms": 0, "predicted_ms": 1.0}}}, {"day": "9999-99-99"}, {"memory_gib": 0}, {"seconds": -5.0},
    {"raw": {}}, {"raw": {**measured().raw, "launch us": -1.0}}, {"tiles": {"long": {**TILE, "t": 100}}},
    {"tiles": {"long": {**TILE, "warps": 3}}}, {"tiles": {"long": {**TILE, "t": True}}},
])  # fmt: skip
def test_a_file_with_a_right_checksum_and_an_impossible_part_is_refused(tmp_path, change):
    content = {name: value for name, value in json.loads(measured().text()).items() if name != "digest"} | change
    (tmp_path / "card.json").write_text(json.dumps({**content, "digest": _digest(content)}))
    with pytest.raises(InputError, match="no whole measurement"):
        MeasuredCard.read(tmp_path / "card.json")


def test_names_from_a_file_cannot_steer_the_terminal_or_the_disk():
    found = measured("NVIDIA \x1b[2J/../x" + "y" * 500)
    assert "\x1b" not in found.described()
    keep(found)
    assert stored_file(found.stack).parent == known_cards.stored_folder()


@pytest.mark.parametrize("lost", ["card", "rates", "raw", "steps", "day", "seconds"])
def test_a_file_with_a_right_checksum_and_a_part_missing_is_refused(tmp_path, lost):
    values = json.loads(measured().text())
    content = {name: value for name, value in values.items() if name not in ("digest", lost)}
    (tmp_path / "card.json").write_text(json.dumps({**content, "digest": _digest(content)}))
    with pytest.raises(InputError, match=f"no whole measurement .*{lost}"):
        MeasuredCard.read(tmp_path / "card.json")


def test_without_a_measurement_the_data_sheet_or_a_guess_counts():
    assert (basis(RTX_4090), basis(OTHER)) == (SHEET, GUESS)
    assert with_known_rates(CARDS["rtx4090"]) is CARDS["rtx4090"]


def test_a_card_measured_here_has_its_own_rates():
    keep(measured())
    card = with_known_rates(found_card(RTX_4090, 20.0), here=True)
    assert (card.rates, card.measured, card.memory_gib) == (measured().rates, HERE, 20.0)
    assert basis(OTHER) == GUESS


def test_a_card_by_name_and_one_of_another_machine_are_of_this_kind():
    keep(measured())
    assert basis(RTX_4090, here=False).startswith(f"{KIND} (GeForce RTX 4090, torch ")
    assert speed_basis(with_known_rates(CARDS["rtx4090"])).startswith(KIND)
    assert speed_basis(with_known_rates(CARDS["rtx3090"])) == SHEET


@pytest.mark.parametrize("other", ["driver", "torch", "triton", "host"])
def test_a_measurement_of_another_stack_counts_for_the_kind_only(other):
    found = measured()
    keep(replace(found, stack=replace(found.stack, **{other: "x"})))
    assert measured_here(RTX_4090) is None and basis(RTX_4090).startswith(KIND)


def test_the_newest_day_of_a_kind_counts_and_the_cache_comes_before_what_is_kept(tmp_path):
    (tmp_path / "kept").mkdir()
    measured(day="2027-01-01").write(tmp_path / "kept" / "rtx4090.json")
    assert basis(RTX_4090).endswith("2027-01-01)")
    for day in ("2026-01-02", "2026-01-03", "2026-01-01"):
        keep(measured(day=day, stack=replace(measured().stack, driver=day)))
    assert basis(RTX_4090).endswith("2026-01-03)")


def test_a_damaged_file_in_the_cache_is_named_once_and_not_used(capsys):
    path = keep(measured())
    path.write_text(path.read_text().replace("25.0", "26.0"))
    assert (basis(RTX_4090), basis(RTX_4090)) == (SHEET, SHEET)
    assert capsys.readouterr().err.count("has changed since it was written") == 1


def test_a_file_under_the_name_of_another_stack_is_not_this_machines():
    found = measured()
    keep(found).rename(stored_file(replace(found.stack, card=OTHER)))
    assert measured_here(OTHER) is None


def test_the_kept_files_of_the_program_are_whole(monkeypatch):
    monkeypatch.undo()
    files = sorted(known_cards.KEPT.glob("*.json"))
    assert files and [MeasuredCard.read(path).stack.card for path in files]


def test_driver_and_host_are_read_from_the_system(tmp_path, monkeypatch):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\nGCC version: 12.2.0\n")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Some CPU @ 2 GHz\n")
    monkeypatch.setattr(provenance, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(provenance, "PROCESSOR", tmp_path / "cpuinfo")
    assert (provenance.nvidia_driver(), provenance.host_name()) == ("550.54.15", "Some CPU @ 2 GHz")
    assert provenance.package_version("no-such-package") == "none"
