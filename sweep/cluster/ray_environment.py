"""Set the environment variables that Ray reads when it is imported, or at its first calls.

A Ray that we start serves this machine alone. Ray opens a port for its control store, two for the
raylet and one for each worker. Anyone who reaches one of them can run code as the user.

By default Ray listens on all interfaces, whatever `_node_ip_address` says (seen with 2.60). Told
that this machine forms no cluster, Ray binds its ports to 127.0.0.1. Every call also carries a
token, new for each sweep, which keeps out other users of this machine.
"""

from __future__ import annotations

import os
import secrets

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else Ray sends usage reports to an outside host
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config mean the user's folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trial folders hold the reports
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the driver's own handler stops at a safe point
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # no one reads Tune's snapshot
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # a checkpoint is always whole, so Ray may kill a worker
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner at any verbosity
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_prestart_worker_first_driver": "0",  # else a process for each CPU core loads Ray, and no trial uses it
}
# Ray's name for "may form a cluster", on every system
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def set_ray_environment(address: str | None, max_waiting_trials: int = 1) -> None:
    """Set Ray's environment variables. Call this before anything imports ray.

    address: an existing cluster, whose token the user supplies. None: this machine starts its own
    Ray.

    max_waiting_trials: how many trials may wait for a slot. With one, the sampler is asked as late
    as possible. Mixed cards need more, so that a trial waiting for the one card it fits keeps no
    other card idle.

    RAY_AUTH_MODE and a token that the user has set stay as they are.
    """
    os.environ.update(SETTINGS, TUNE_MAX_PENDING_TRIALS_PG=str(max_waiting_trials))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address is None or address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        os.environ.update(LOOPBACK)
    if address is None and not any(os.environ.get(name) for name in TOKEN):
        # not in ~/.ray/auth_token, which Ray makes readable by everyone
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
