"""The sampler gives means and peaks of process and card, as far as the card reports them."""

from sweep.tracking.system_metrics import SystemSampler, machine_reader


def test_means_of_a_rung_begin_anew_after_each_and_memory_is_the_highest():
    values = ((100.0, 5.0), (200.0, 3.0), (50.0, 1.0))
    readings = iter([{"gpu_power_watts": watts, "gpu_memory_used_gib": gib} for watts, gib in values])
    sampler = SystemSampler(lambda: next(readings), interval_s=3600.0)
    for _ in range(2):
        sampler._add(sampler._read())
    assert sampler.take() == {"gpu_power_watts": 150.0, "gpu_memory_used_gib": 5.0}
    # no sample since, so take() reads one
    assert sampler.take() == {"gpu_power_watts": 50.0, "gpu_memory_used_gib": 1.0}
    sampler.stop()


def test_a_card_is_read_as_far_as_it_can_be(monkeypatch):
    import torch

    def none():
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 312_000)
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: none())
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda device: 3 * 2**30)
    found = machine_reader("cuda")()
    card = {name: value for name, value in found.items() if name.startswith("gpu")}
    assert card == {"gpu_utilization_percent": 97.0, "gpu_power_watts": 312.0, "gpu_memory_used_gib": 3.0}
    assert found["process_resident_gib"] > 0.01 and not any(name.startswith("gpu") for name in machine_reader("cpu")())
