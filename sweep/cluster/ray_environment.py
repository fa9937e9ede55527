"""What must stand in the environment before Ray is imported: Ray reads most of it once, and C++ parts at their first call.

A Ray that we start serves this machine alone. Ray opens a port for its control store, two for the raylet and one for each worker,
and whoever reaches one of them can run code as the user. By default they listen on all interfaces, whatever `_node_ip_address`
says (seen with 2.60); told that this machine forms no cluster, Ray binds them to 127.0.0.1. On top of that every call carries a
token, made afresh for each sweep, so that other users of this machine are kept out too. No ray here.
"""

from __future__ import annotations

import os
import secrets

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # usage reports go to a host outside
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config mean the user's folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trial folders hold the reports
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the driver's own handler stops at a safe point
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # nobody reads Tune's snapshot
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # checkpoints are whole at any moment, so a worker may be killed
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner at any verbosity
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's name for "may form a cluster", on every system
TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def set_ray_environment(address: str | None, max_waiting_trials: int = 1) -> None:
    """Call before anything imports ray. address: an existing cluster, whose token the user gives; none: a Ray of our own.

    max_waiting_trials: how many may wait for a slot. One, so that the sampler is asked as late as possible. More where cards are
    mixed, so that a trial that waits for the one card it fits keeps no other card idle.

    RAY_AUTH_MODE and a token that are already in the environment are the user's, and stay.
    """
    os.environ.update(SETTINGS, TUNE_MAX_PENDING_TRIALS_PG=str(max_waiting_trials))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address is None or address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        os.environ.update(LOOPBACK)
    if address is None and not any(os.environ.get(name) for name in TOKEN):
        # in the environment, not in Ray's ~/.ray/auth_token, which it writes readable by everyone
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
