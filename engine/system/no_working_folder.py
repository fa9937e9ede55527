"""Take the working folder off the module path. Commands import this first, before any other module.

`python -m` puts the working folder there. It may hold other people's files, and one named yaml.py
or a folder named engine would run in place of the module. Only a folder that holds this program
stays.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def drop_working_folder() -> None:
    """Take the working folder off the module path, unless it holds this program."""
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        here = ""
    if not sys.flags.safe_path and sys.path[:1] in ([""], [here]) and here != os.path.realpath(ROOT):
        del sys.path[0]


drop_working_folder()
