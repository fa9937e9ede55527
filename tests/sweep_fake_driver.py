"""A driver process with the fake engine: sweep_fake_driver.py start <config.json> | resume <folder>."""

import json
import sys
from pathlib import Path

from sweep import driver
from sweep.engine_modules import EngineModules

ENGINE = EngineModules(train="sweep_fake_engine", model="sweep_fake_engine", command="sweep_fake_engine")

if __name__ == "__main__":
    command, argument = sys.argv[1:]
    if command == "start":
        sys.exit(driver.start(json.loads(Path(argument).read_text()), engine=ENGINE))
    sys.exit(driver.resume(argument, {}, engine=ENGINE))
