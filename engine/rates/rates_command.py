"""Run `python -m engine calibrate`: measure this card, or take in a file of another one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from engine.errors import EngineError, InputError
from engine.planning.known_cards import KIND, measured_here, stored_file, stored_folder
from engine.planning.measured_card import MeasuredCard
from engine.planning.rates import Rates
from engine.system.file_lock import FileLock
from engine.system.shared_cache import CACHE_VARIABLE
from engine.system.user_path import user_path
from engine.units import GIB

BAR = 24
# What a desktop takes may be there. Another program that computes would slow down what is measured.
FREE, MOST_BUSY = 0.75, 30  # share of the card's memory, and percent of the time
NO_CARD = (
    "no CUDA device is visible, so there is nothing to measure: check `nvidia-smi`, or take in what another machine measured "
    "with --from FILE"
)
DESCRIPTION = """Measure this card and host, in about a minute: matrix products, memory, NF4, attention, the link to the host,
launches, and whole steps of shallow models. Predictions then say `measured here`. The result is kept in the cache folder, by
card, driver, versions and host."""


def calibrate(arguments: list[str]) -> int:
    """Run the command; return its exit code. Raises InputError without a card, or for a file that is none."""
    parser = argparse.ArgumentParser(prog="python -m engine calibrate", description=DESCRIPTION)
    parser.add_argument("--out", type=user_path, help="file to write the measurement to as well, to send or to keep")
    parser.add_argument("--from", dest="source", type=user_path, help="take in such a file, of any machine; measure nothing")
    parser.add_argument("--if-missing", action="store_true", help="only if card, driver, host or versions are new here")
    options = parser.parse_args(arguments)
    out = options.out
    if out is not None and (out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK)):
        raise InputError("--out", str(out), "must be a file in a writable folder")  # before a minute is spent
    if options.source is not None:
        return _take_in(options.source, options.out)
    known = _measure(options.if_missing)
    if options.out is not None:
        known.write(options.out)
        print(f"written to {options.out}")
    return 0


def _take_in(source: Path, out: Path | None) -> int:
    found = MeasuredCard.read(source, "--from")
    _made(stored_folder())
    found.write(stored_file(found.stack))
    if out is not None:
        found.write(out)
    print(f"kept: {found.described()}; predictions for such a card now say `{KIND}`")
    return 0


def _measure(if_missing: bool) -> MeasuredCard:
    import torch  # --from needs none

    if not torch.cuda.is_available():
        raise InputError("card", None, NO_CARD)
    from engine.rates.measuring import Bench, measure_card, pick_card

    device, name, memory_gib = pick_card()

    def measure() -> MeasuredCard:
        torch.cuda.set_device(device)
        refuse_shared(name, *torch.cuda.mem_get_info(device), busy_percent(device))
        print(f"measuring {name}, once for this driver, host and these versions: about a minute", flush=True)
        try:
            return measure_card(Bench.of(device), name, memory_gib, progress(sys.stdout))
        except torch.OutOfMemoryError as error:
            raise EngineError(f"card = {name!r}: has too little free memory to be measured, about 6 GiB") from error

    found = known_or_measured(name, if_missing, measure)
    print("\n".join(result_lines(found)), flush=True)
    return found


def known_or_measured(card: str, if_missing: bool, measure: Callable[[], MeasuredCard]) -> MeasuredCard:
    """Return the card's measurement, and keep it if it is new.

    One process of this cache measures at a time: the others wait, and with `if_missing` take its
    result. A file that is damaged, or of other versions, counts as missing. Raises InputError if
    the cache cannot be written.
    """
    with FileLock(_made(stored_folder()) / ".lock").held():
        known = measured_here(card) if if_missing else None
        if known is not None and known.is_complete:
            return known
        found = measure()
        found.write(stored_file(found.stack))
        return found


def busy_percent(device: Any) -> int:
    """Return the percent of the last second in which the card computed; 0 if NVML does not say."""
    import torch

    try:
        return torch.cuda.utilization(device)
    except Exception:  # NVML raises errors of its own
        return 0


def refuse_shared(name: str, free_bytes: int, total_bytes: int, busy: int) -> None:
    """Raise InputError if others use the card: they would slow down what is measured.

    busy: percent of the time in which they compute.
    """
    if free_bytes < FREE * total_bytes or busy > MOST_BUSY:
        held = (total_bytes - free_bytes) / GIB
        use = f"other programs hold {held:.1f} GiB of it and keep it busy {busy} % of the time"
        raise InputError("card", name, f"{use}, and would slow down what is measured: end them first (`nvidia-smi`)")


def progress(stream: TextIO) -> Callable[[int, int, str], None]:
    """Return what shows progress: one bar on a terminal, a line for each part elsewhere."""
    is_terminal = stream.isatty()

    def say(done: int, total: int, part: str) -> None:
        full = BAR * done // total
        line = f"[{'#' * full}{'.' * (BAR - full)}] {done}/{total} {part}"
        stream.write(f"\r\x1b[K{line}" if is_terminal and done < total else f"\r\x1b[K{line}\n" if is_terminal else f"{line}\n")
        stream.flush()

    return say


def result_lines(found: MeasuredCard) -> list[str]:
    """Return the measurement for people to read."""
    rates, raw, host = found.rates, found.raw, found.stack.host
    products = "  ".join(f"{size:,.0f}: {rate:,.0f}" for size, rate in rates.matmul_tflops.points)
    attention = "  ".join(f"{dim:.0f}: {rate:,.0f}" for dim, rate in rates.attention_tflops.points)
    both_ways = f"{raw['link to card GB/s']:.1f} GB/s to the card, {raw['link to host GB/s']:.1f} back"
    layers = f"{rates.host_ms:.2f} ms a fused layer, {rates.unfused_host_ms:.2f} ms an unfused one"
    errors = {name: step["predicted_ms"] / step["measured_ms"] - 1 for name, step in found.steps.items()}
    steps = (f"{name} {found.steps[name]['measured_ms']:.1f} ms ({error:+.0%})" for name, error in errors.items())
    return [
        f"{found.described()}, driver {found.stack.driver}, {host}; {found.seconds:.0f} s",
        f"  matrix products   TFLOP/s by hidden size {products}",
        *_int8_line(rates),
        f"  attention         TFLOP/s by head dim {attention}",
        f"  memory            {raw['copy GB/s']:,.0f} GB/s copied, {rates.nf4_gb_s.points[-1][1]:,.0f} in NF4",
        f"  link              {both_ways}, {raw['link both at once GB/s']:.1f} each at once",
        f"  host              {raw['launch us']:.1f} us a launch, {layers}",
        f"  whole steps       {', '.join(steps)}; in brackets: predicted against measured",
    ]


def _int8_line(rates: Rates) -> list[str]:
    if rates.int8 is None:
        return []
    tops = "  ".join(f"{size:,.0f}: {rate:,.0f}" for size, rate in rates.int8.matmul_tops.points)
    return [f"  products in INT8  TOPS by hidden size {tops}"]


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise InputError(CACHE_VARIABLE, str(folder), f"must be a writable folder with free space ({error.strerror})") from None
    return folder
