"""Serve a sweep's numbers to Prometheus at `tracking.metrics_port`.

Each request builds the page from the trials' records and the timeline; nothing is measured for it.
Separate threads answer, so training never waits for a reader. The driver only leaves each new
record here.

This does not use `ray.util.metrics`, which needs the agents of `ray[default]` on every node. A Ray
that the sweep starts itself has no agents, so the common sweep on one machine would show nothing.

Counters count since this driver started. Totals over all sessions are gauges: after a kill, the
next driver may read a slightly lower total from disk. Prometheus treats a falling counter as a
reset.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from engine.errors import InputError, first_line
from engine.units import GIB
from sweep.config.sweep import TrackingConfig
from sweep.folder.slot_times import shown_parts
from sweep.folder.timeline import Timeline
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord

PREFIX = "qlora_sweep_"
MetricsPage = CollectorRegistry
"""The page that Prometheus reads: it shows every registered collector."""


class SweepMetrics(Collector):
    """Keeps the newest record of each trial and builds metrics from them on request.

    It is a listener of the ledger.
    """

    def __init__(self, sweep: str, num_trials: int, num_slots: int, clock: Callable[[], float] = time.time) -> None:
        """sweep: name of the sweep folder, which the label `sweep` of every metric holds."""
        self._sweep, self.num_trials, self._num_slots, self._wall = sweep, num_trials, num_slots, clock
        self._records: dict[int, TrialRecord] = {}
        self._lock = threading.Lock()
        self._timeline: Timeline | None = None

    def on_trial_updated(self, record: TrialRecord) -> None:
        with self._lock:
            self._records[record.number] = record

    def begin(
        self,
        timeline: Timeline,
        clock: Callable[[], float] | None = None,
        time_left: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Start the counters: the driver is about to hand out trials.

        clock: that of the timeline's events. time_left: expects the seconds until the sweep's end.
        """
        self._clock, self._time_left = clock or self._wall, time_left
        self._timeline, self._before, self._began_s = timeline, timeline.usage, self._clock()
        self._tokens_before = _tokens(self._own())

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics; none before begin()."""
        if self._timeline is None:
            return
        own = self._own()
        yield from self._of_trials(own)
        yield from self._of_time()
        yield from self._of_losses(own)
        yield from self._of_slots(own)

    def _own(self) -> list[TrialRecord]:
        """Return the trials of this sweep, without those of the earlier sweeps it started from."""
        with self._lock:
            return [record for record in self._records.values() if record.source is None]

    def _of_trials(self, own: list[TrialRecord]) -> Iterator[Metric]:
        counts = Counter(record.outcome for record in own)
        trials = self._gauge("trials", "trials by outcome; RUNNING, PAUSED and STOPPED trials may go on", "outcome")
        for outcome in Outcome:
            trials.add_metric([self._sweep, str(outcome)], counts[outcome])
        yield trials
        yield self._value("trials_wanted", "trials asked for (sweep.num_trials); INFEASIBLE ones do not count", self.num_trials)
        tokens = CounterMetricFamily(PREFIX + "tokens", "tokens trained on since this driver started", labels=["sweep"])
        tokens.add_metric([self._sweep], _tokens(own) - self._tokens_before)
        yield tokens

    def _of_time(self) -> Iterator[Metric]:
        usage, before, now_s = self._timeline.usage, self._before, self._clock()
        occupied_s = usage.occupied_until_s(now_s)
        yield self._value("slots", "trials that can run at once", self._num_slots)
        yield self._value("slots_busy", "slots held by a trial", len(usage.assigned_s))
        busy = CounterMetricFamily(
            PREFIX + "slot_busy_seconds", "seconds for which slots were held since this driver started, over all slots",
            labels=["sweep"],
        )  # fmt: skip
        busy.add_metric([self._sweep], occupied_s - before.occupied_until_s(self._began_s))
        yield busy
        yield self._value("occupied_seconds", "seconds for which slots were held, over all sessions: GPU hours", occupied_s)
        yield self._value("elapsed_seconds", "seconds for which the sweep ran, over all sessions", usage.elapsed_until_s(now_s))
        # as the readers' clock has it, which may have been set since
        newest_s = max(usage.newest_s, self._began_s) + self._wall() - now_s
        yield self._value("last_event_timestamp_seconds", "when a trial last started, reported or ended, Unix time", newest_s)
        dead = SummaryMetricFamily(
            PREFIX + "dead_time_seconds", "from the end of a trial to the first step of the next in the same worker",
            labels=["sweep"],
        )  # fmt: skip
        parts = self._gauge("part_seconds", "seconds of held slots by what was done up to the newest report", "part")
        for part, seconds in shown_parts(usage.parts).items():
            parts.add_metric([self._sweep, part], seconds)
        yield parts
        left = self._gauge("expected_seconds_left", "seconds until the last trial ends, as trials went so far")
        if (left_s := self._time_left()) is not None:
            left.add_metric([self._sweep], left_s)
        yield left
        num_dead_times = usage.num_dead_times - before.num_dead_times
        dead.add_metric([self._sweep], count_value=num_dead_times, sum_value=usage.dead_time_s - before.dead_time_s)
        yield dead

    def _of_losses(self, own: list[TrialRecord]) -> Iterator[Metric]:
        """Leave out the sample where there is no loss yet: 0 would be the best possible loss."""
        for name, help_text, outcomes in (
            ("best_eval_loss", "lowest loss of the trials whose adapter can be chosen now, nats per token", CONTENDERS),
            ("lowest_eval_loss", "lowest loss that any trial has reported, nats per token", tuple(Outcome)),
        ):
            losses = [record for record in own if record.outcome in outcomes and record.eval_loss is not None]
            scores = [record.eval_loss for record in losses if record.keeps_limits or outcomes is not CONTENDERS]
            family = self._gauge(name, help_text)
            if scores:
                family.add_metric([self._sweep], min(scores))
            yield family

    def _of_slots(self, own: list[TrialRecord]) -> Iterator[Metric]:
        """Show the trial that runs in each slot, as of its newest report.

        The label is the slot and not the trial, because slots are few. After a resume two records
        may name one slot; the later one counts, because two equal labels would make the page
        unreadable.
        """
        running = {
            record.slot: record
            for record in sorted(own, key=lambda record: record.started_s or 0.0)
            if record.outcome is Outcome.RUNNING and record.slot is not None and record.reports
        }
        trial = self._gauge("slot_trial", "number of the trial in the slot", "slot")
        speed = self._gauge("slot_tokens_per_second", "speed of the trial in the slot, since its previous report", "slot")
        loss = self._gauge("slot_eval_loss", "newest loss of the trial in the slot, nats per token", "slot")
        peak = self._gauge("slot_peak_memory_bytes", "predicted, measured and reserved peak of the slot's trial", "slot", "kind")
        for slot, record in running.items():
            newest = record.reports[-1]
            trial.add_metric([self._sweep, slot], record.number)
            speed.add_metric([self._sweep, slot], newest.tokens_per_second)
            loss.add_metric([self._sweep, slot], newest.eval_loss)
            peaks = {"predicted": record.predicted_peak_gib, "measured": record.peak_allocated_gib}
            for kind, gib in {**peaks, "reserved": newest.peak_reserved_gib}.items():
                if gib is not None:
                    peak.add_metric([self._sweep, slot, kind], gib * GIB)
        yield from (trial, speed, loss, peak)

    def _gauge(self, name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(PREFIX + name, help_text, labels=["sweep", *labels])

    def _value(self, name: str, help_text: str, value: float) -> GaugeMetricFamily:
        family = self._gauge(name, help_text)
        family.add_metric([self._sweep], value)
        return family


@contextmanager
def serve(tracking: TrackingConfig, say: Callable[[str], None]) -> Iterator[MetricsPage]:
    """Answer requests for the registered metrics until the block ends.

    say: takes the address, in one line. InputError if the port or the address cannot be used,
    because the user asked for these numbers.
    """
    registry, host, port = CollectorRegistry(), tracking.metrics_host, tracking.metrics_port
    try:
        server, thread = start_http_server(port, host, registry)
    except PermissionError as error:
        raise InputError("tracking.metrics_port", port, f"must be a port that this user may open ({first_line(error)})") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError("tracking.metrics_port", port, f"must be free on {host}; another process uses it") from None
        raise InputError("tracking.metrics_host", host, f"must be an address of this machine ({first_line(error)})") from None
    # a reader may go away at any time; the default handler would print that on the terminal
    server.handle_error = lambda *request: None
    try:
        say(f"metrics    http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics")
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _tokens(records: list[TrialRecord]) -> int:
    return sum(record.reports[-1].tokens_seen for record in records if record.reports)
