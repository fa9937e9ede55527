"""The best adapter becomes a model version in MLflow's registry."""

from pathlib import Path

import pytest

from sweep.tracking import background_writer as background
from sweep.tracking.sqlite_store import local_uri
from sweep.tracking.tracker import Tracker
from sweep.trials.record import Outcome
from tests.support.tracked import CONFIG, trial


@pytest.fixture
def best_folder(tmp_path):
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    (folder / "README.md").write_text("card")
    return folder


@pytest.fixture
def register(store, tmp_path, request):
    """End a sweep, as a resume does too; return the warnings."""

    def end(folder, number=1, model=request.node.name):
        one = Tracker(local_uri(store), request.node.name, "my sweep", tmp_path / "sweep", CONFIG, model)
        winner = trial(number, Outcome.COMPLETE, 1.5, config={"model": {"path": "org/base"}})
        one.on_sweep_finished({"best_eval_loss": 1.5, "base_eval_loss": 2.5}, winner, folder)
        return one.close(60)

    return end


def versions(client, name):
    return sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))


def test_the_best_adapter_is_a_model_version_that_loads_and_says_what_it_is(register, best_folder, client, runs, store, request):
    assert register(best_folder) == []
    (version,) = versions(client, request.node.name)
    run = runs()["0001 COMPLETE (best)"]
    assert (version.run_id, version.tags["sweep.trial_number"]) == (run.info.run_id, "1")
    assert "`org/base`" in version.description and "| with this adapter | 1.5000 | 4.482 |" in version.description
    assert version.tags["sweep.folder"] in version.description
    import mlflow

    mlflow.set_tracking_uri(local_uri(store))
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{request.node.name}/1"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in best_folder.iterdir()
    }


def test_the_same_adapter_is_registered_once_and_another_one_is_the_next_version(register, best_folder, client, runs, request):
    # as when a finished sweep is resumed
    assert register(best_folder) == register(best_folder) == []
    assert len(versions(client, request.node.name)) == 1
    # the same trial, trained further after a resume
    (best_folder / "adapter_model.safetensors").write_bytes(b"two")
    assert register(best_folder) == []
    first, second = versions(client, request.node.name)
    places = [version.source.rsplit("/", 1)[-1] for version in (first, second)]
    kept = [client.download_artifacts(first.run_id, f"{place}/adapter_model.safetensors") for place in places]
    assert [Path(file).read_bytes() for file in kept] == [b"one", b"two"]
    assert register(best_folder, number=2) == []
    assert len(versions(client, request.node.name)) == 3
    assert "0001 COMPLETE" in runs() and "0002 COMPLETE (best)" in runs()


def test_no_version_where_none_is_wanted_and_the_files_are_with_the_run(register, best_folder, client, runs):
    assert register(best_folder, model=None) == []
    assert client.search_model_versions(f"run_id = '{runs()['0001 COMPLETE (best)'].info.run_id}'") == []
    files = client.list_artifacts(runs()["0001 COMPLETE (best)"].info.run_id, "best")
    assert {file.path for file in files} == {"best/README.md", "best/adapter_model.safetensors"}


def test_a_registry_that_fails_is_a_warning_and_the_sweep_is_finished_all_the_same(register, best_folder, runs, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(background, "FIRST_RETRY_S", 0.001)
        broken.setattr("mlflow.MlflowClient.create_model_version", lambda *_, **__: 1 / 0)
        (warning,) = register(best_folder)
    assert "1 update not written (best adapter): ZeroDivisionError" in warning
    assert runs()["my sweep"].info.status == "FINISHED"
    assert register(best_folder) == []  # a resume writes it
