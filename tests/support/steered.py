"""Open a ledger that takes commands, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.steered_ledger import SteeredLedger
from sweep.plan.feasibility import UNPREDICTED
from sweep.space.parse import parse_space
from sweep.steering.command import parse_words
from sweep.steering.history import with_all_settings
from sweep.steering.inbox import new_name, send
from sweep.study.kept_commands import read_commands
from tests.support.studies import WIDE, config_for, ledger_in

Tell = Callable[[str], str | None]


def steered(path, config=None, num_slots: int = 1, fit_check=lambda config: UNPREDICTED, **options) -> tuple[SteeredLedger, Tell]:
    """Return a ledger, and a function that sends it a command and returns the refusal."""
    config = with_all_settings(config or config_for(WIDE, pruner="none", num_trials=3), read_commands(SweepFolder(path)))
    path.mkdir(exist_ok=True)
    kind = partial(SteeredLedger, config=config, space=parse_space(config.space), fit_check=fit_check)
    ledger, folder = ledger_in(path, config, num_slots, kind=kind, **options), SweepFolder(path)

    def tell(words: str) -> str | None:
        send(folder, parse_words(words.split(), "ann@box", 0.0, new_name(len(read_commands(folder)))))
        ledger.take_commands()
        return read_commands(folder)[-1].refusal

    return ledger, tell
