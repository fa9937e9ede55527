"""Import modules one after the other in one fresh process, and see what each of them loads."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.paths import ENV

CODE = """
import importlib, json, sys
found = []
for name, heavy in json.loads(sys.argv[1]):
    importlib.import_module(name)
    found += [f"{name} loads {other}" for other in heavy if other in sys.modules]
print(json.dumps(found))
"""


def too_heavy(rules: list[tuple[tuple[str, ...], tuple[str, ...]]]) -> list[str]:
    """Return a line for each module that loads what its rule forbids.

    A rule is a group of modules and what they must not load. A module that a later rule allows to
    load more stands in that rule.
    """
    asked = [(module, heavy) for modules, heavy in rules for module in modules]
    command = [sys.executable, "-c", CODE, json.dumps(asked)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
