"""Run a Ray of one or more nodes on this machine, for drivers to connect to and nodes to lose.

Ray runs in a separate process. `python -m tests.faults.nodes NUM_CPUS` prints the address, then
obeys lines on stdin and answers each with a line. The lines are `add NUM_CPUS [CARD [DEVICE]]`,
`kill NODE` and `terminate NODE`. Added nodes are counted from 0. The program ends with its stdin.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys

from tests.support import paths

ENV = {
    **paths.ENV,
    "RAY_AUTH_MODE": "token",  # no other user's drivers, and no file in the home folder
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "FAKE_TORCH": "1",
}


class Nodes:
    """Controls the program from outside. A context manager."""

    def __init__(self, num_cpus: int, env: dict[str, str] = ENV) -> None:
        command = [sys.executable, "-m", "tests.faults.nodes", str(num_cpus)]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.address = self._answer()

    def add(self, num_cpus: int, card: str = "", device: str = "") -> str:
        """Add a node.

        card: gives the node a GPU, as far as Ray knows, and the label that names it. device: the
        number of a real GPU for its workers to see.
        """
        return self._say(f"add {num_cpus} {card} {device}")

    def has(self, node: int, pid: int) -> bool:
        """Return whether the process is one of the node's workers."""
        return self._say(f"has {node} {pid}") == "True"

    def kill(self, node: int) -> str:
        """SIGKILL the node's Ray and its workers at once, like a power cut."""
        return self._say(f"kill {node}")

    def terminate(self, node: int) -> str:
        """SIGTERM the node's Ray and its workers, like a machine about to be taken away."""
        return self._say(f"terminate {node}")

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _say(self, line: str) -> str:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        for line in self._process.stdout:
            if line.startswith("nodes: "):
                return line.removeprefix("nodes: ").strip()
        raise RuntimeError("the nodes' process has ended")


def main(num_cpus: int) -> None:
    from ray.cluster_utils import Cluster

    os.environ["FAULTS_PLACE"] = "cluster"  # of all its processes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False})
    print(f"nodes: {cluster.address}", flush=True)
    added = []
    for line in sys.stdin:
        command, *arguments = line.split()
        answer: object = "done"
        if command == "add":
            num_cpus, card, device, *_ = [*arguments, "", ""]
            cards = {"num_gpus": 1, "labels": {"card": card}} if card else {}
            if device:
                os.environ["CUDA_VISIBLE_DEVICES"] = device
            added.append(cluster.add_node(num_cpus=int(num_cpus), **cards))
        elif command == "has":
            answer = int(arguments[1]) in [process.pid for process in _processes(added[int(arguments[0])])]
        else:
            for process in _processes(added[int(arguments[0])]):
                process.send_signal(signal.SIGKILL if command == "kill" else signal.SIGTERM)
        print(f"nodes: {answer}", flush=True)
    cluster.shutdown()


def _processes(node) -> list:
    """Return the raylet and all its descendants."""
    import psutil

    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [*raylet.children(recursive=True), raylet]


if __name__ == "__main__":
    main(int(sys.argv[1]))
