"""Take the working folder off the module path. Commands import this first, before any other module.

`engine` itself may lie in the working folder, as someone else's. So it is looked for next to this
package.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from engine.system.no_working_folder import drop_working_folder  # noqa: E402

del sys.path[0]
drop_working_folder()
