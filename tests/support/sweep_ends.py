"""End a sweep again and again on given records, with an engine that measures what it is told to."""

from __future__ import annotations

import html
from pathlib import Path

import pytest

from engine.command_answers import AdapterEvaluation
from engine.config.trial import TrainConfig
from engine.errors import EngineError
from engine.sample_losses import SampleLosses
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.report import build
from sweep.report.collect import Collector
from sweep.results.finish import finish
from sweep.trials.record import TrialRecord
from tests.support.records import sampled, trial

CONFIG = {
    "model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400}, "space": {"lora.rank": {"choices": [4, 8]}},
    "sampler": {"name": "random"}, "pruner": {"name": "none"},
}  # fmt: skip


class Ends:
    """Ends one sweep again and again, and collects what each place says of it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.said = SweepFolder(path), []
        path.mkdir()
        self.folder.write_config(parse_sweep_config(CONFIG))
        self.folder.lock_file.touch()
        self.records: list[TrialRecord] = []
        self.by_sample: dict[str, SampleLosses] = {}  # what the engine answers of base and winner
        monkeypatch.setattr(Collector, "_records_of", lambda collector, trials: self.records)

    def end(self, *records: TrialRecord, works: bool = True) -> dict:
        """Run the end of the sweep; return the summary that the tracker gets."""
        self.records, self.said = list(records), []
        for record in records:
            adapter = Path(record.folder) / "adapter"
            adapter.mkdir(parents=True, exist_ok=True)
            (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
            (adapter / "adapter_model.safetensors").write_text(str(record.number))

        def evaluate(config: TrainConfig, adapter: Path, command: str, num_examples: int) -> AdapterEvaluation:
            if not works:
                raise EngineError("out of luck")
            score = next(record.score for record in records if Path(record.folder) == adapter.parent)
            return AdapterEvaluation(3.0, score, 100, **self.by_sample)

        options = {"sweep_name": "s", "device": "cpu", "engine_command": "x", "note": self.said.append}
        options |= {"evaluate": evaluate, "rule": self.folder.read_config().rule}
        return finish(self.folder, self.records, **options)[1]

    def trial(self, number: int, *losses: float, **changes) -> TrialRecord:
        return trial(number, *losses, folder=self.folder.trial(number), **changes)

    def sampled(self, number: int, losses: SampleLosses, **changes) -> TrialRecord:
        return sampled(number, losses, self.folder.trial(number), **changes)

    @property
    def page(self) -> str:
        """Return what stands above the report's first heading, as text."""
        return html.unescape(self.html)

    @property
    def html(self) -> str:
        return build.write_report(self.folder).read_text().split("<h1>")[1].split("<h2>")[0]

    @property
    def board(self) -> str:
        return (self.folder.path / "leaderboard.md").read_text()

    @property
    def terminal(self) -> str:
        return "\n".join(self.said)
