"""A measurement names the code it was made with."""

import subprocess

from engine.system import provenance as module
from engine.system.provenance import provenance


def test_versions_of_the_packages_that_matter_are_there():
    tags = provenance()
    assert {"version.torch", "version.ray", "version.optuna", "version.transformers", "python"} <= tags.keys()


def test_the_commit_is_marked_where_files_differ_from_it(tmp_path, monkeypatch):
    source = tmp_path / "engine" / "system" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    monkeypatch.setattr(module, "__file__", str(source))
    assert "git.commit" not in provenance()
    for arguments in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    clean = provenance()["git.commit"]
    assert len(clean) == 40
    source.write_text("two")
    assert provenance()["git.commit"] == clean + "+changes"
