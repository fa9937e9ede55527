"""List the errors with which a command may end, and what a user then sees."""

import importlib

from engine.errors import InputError, StorageError

ENDS = [
    (InputError("model.path", "x", "must be there"), 2, "error: model.path = 'x': must be there\n"),
    (StorageError("the disk is full"), 1, "error: the disk is full\n"),
    (FileNotFoundError(2, "No such file or directory", "nowhere.json"), 2, "error: nowhere.json: No such file or directory\n"),
    (ConnectionResetError("reset by the peer"), 2, "error: file: reset by the peer\n"),
    (BrokenPipeError(32, "Broken pipe"), 2, "error: file: Broken pipe\n"),  # not a broken stdout
]


def raising(error):
    """Return a command that raises this error."""

    def command(*_):
        raise error

    return command


def end_of(name, inner, arguments, error, monkeypatch):
    """Return the exit code of the module's command if its inner function raises the error."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, inner, raising(error))
    return module.main(arguments)
