"""Give the room's tests an MLflow store, and read back what a test wrote to it."""

import pytest

from sweep.tracking.sqlite_store import local_uri
from sweep.tracking.tracker import Tracker
from tests.support.tracked import CONFIG


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Create one database for the room, which takes 2 s; each test has a separate experiment."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(local_uri(store))


@pytest.fixture
def tracker(store, tmp_path, request):
    """Return a function that makes trackers of the same sweep, as a resume does."""
    return lambda: Tracker(local_uri(store), request.node.name, "my sweep", tmp_path / "it's a sweep", CONFIG)


@pytest.fixture
def runs(client, request):
    """Return a function that gives this test's runs by name. Two runs of a name are an error."""

    def read():
        found = client.search_runs([client.get_experiment_by_name(request.node.name).experiment_id])
        named = {run.info.run_name: run for run in found}
        assert len(named) == len(found)
        return named

    return read
