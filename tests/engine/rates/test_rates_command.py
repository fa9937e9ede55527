"""The command keeps a measurement once, takes in files, and refuses in one line."""

from __future__ import annotations

import io
import threading
from dataclasses import replace

import pytest

from engine.__main__ import main
from engine.errors import InputError
from engine.planning.known_cards import measured_here, stored_folder
from engine.planning.measured_card import MeasuredCard
from engine.rates import rates_command
from engine.rates.rates_command import known_or_measured, progress, refuse_shared, result_lines
from tests.support.measured import RTX_4090, keep, measured


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def never() -> MeasuredCard:
    raise AssertionError("measured again")


def test_a_machine_without_a_card_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["calibrate"]) == 2
    assert capsys.readouterr().err == f"error: card = None: {rates_command.NO_CARD}\n"


def test_what_is_measured_is_kept_and_known_the_next_time():
    assert known_or_measured(RTX_4090, True, measured) == measured_here(RTX_4090) == measured()
    assert known_or_measured(RTX_4090, True, never) == measured()
    again = measured(seconds=1.0)
    assert known_or_measured(RTX_4090, False, lambda: again) == measured_here(RTX_4090) == again


def test_a_measurement_from_before_products_in_int8_is_made_again():
    old = measured()
    keep(replace(old, rates=replace(old.rates, int8=None)))
    assert measured_here(RTX_4090).rates.int8 is None
    assert known_or_measured(RTX_4090, True, measured) == measured_here(RTX_4090) == old
    assert any("products in INT8  TOPS" in line for line in result_lines(old))


def test_a_damaged_file_is_measured_again():
    path = keep(measured())
    path.write_text(path.read_text()[:-20])
    assert known_or_measured(RTX_4090, True, measured) == measured_here(RTX_4090) == measured()


def test_one_process_measures_and_the_others_wait_for_it():
    began, go, count = threading.Event(), threading.Event(), []

    def measure() -> MeasuredCard:
        count.append(1)
        began.set()
        go.wait(10)
        return measured()

    results = []
    workers = [threading.Thread(target=lambda: results.append(known_or_measured(RTX_4090, True, measure))) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert began.wait(10) and results == []
    go.set()
    for worker in workers:
        worker.join()
    assert len(count) == 1 and results == [measured()] * 3


def test_a_failed_measurement_leaves_nothing_and_frees_the_lock():
    with pytest.raises(AssertionError):
        known_or_measured(RTX_4090, True, never)
    assert list(stored_folder().glob("*.json")) == []
    assert known_or_measured(RTX_4090, True, measured) == measured()


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"^QLORA_SWEEP_CACHE = .*must be a writable folder"):
        known_or_measured(RTX_4090, True, never)


@pytest.mark.parametrize("out", [".", "no/such/folder/card.json", "file/card.json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch, out):
    (tmp_path / "file").touch()
    monkeypatch.setattr(rates_command, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match="^--out = .*: must be a file in a writable folder$"):
        rates_command.calibrate(["--out", str(tmp_path / out)])


def test_a_file_of_another_machine_is_taken_in_and_passed_on(tmp_path, capsys):
    sent, copy = tmp_path / "sent.json", tmp_path / "copy.json"
    measured().write(sent)
    assert main(["calibrate", "--from", str(sent), "--out", str(copy)]) == 0
    assert measured_here(RTX_4090) == measured() and copy.read_text() == sent.read_text()
    assert "GeForce RTX 4090, torch" in capsys.readouterr().out


def test_a_foreign_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert main(["calibrate", "--from", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --from = ") and error.count("\n") == 1 and not stored_folder().exists()


def test_a_card_that_others_use_is_not_measured():
    refuse_shared(RTX_4090, 20 * 2**30, 24 * 2**30, 10)  # a desktop
    for free_gib, busy in ((16, 0), (20, 90)):
        with pytest.raises(InputError, match=rf"other programs hold {24 - free_gib}\.0 GiB of it and keep it busy {busy} %"):
            refuse_shared(RTX_4090, free_gib * 2**30, 24 * 2**30, busy)


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere():
    lines, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for stream in (lines, terminal):
        say = progress(stream)
        say(0, 2, "matmul")
        say(2, 2, "")
    assert lines.getvalue() == f"[{'.' * 24}] 0/2 matmul\n[{'#' * 24}] 2/2 \n"
    assert terminal.getvalue().count("\r") == 2 and terminal.getvalue().count("\n") == 1


def test_the_result_is_told_in_numbers():
    text = "\n".join(result_lines(measured()))
    assert "25.0 GB/s to the card, 24.0 back, 20.0 each at once" in text and "8B keep 4x1000 10.0 ms (+10%)" in text
