"""Make a small separate disk that can be filled and made read-only; root on Linux only."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Disk:
    """A tmpfs of 4 MiB, as a context manager; PermissionError if mounting is not allowed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    def __enter__(self) -> Disk:
        self.path.mkdir()
        if not self._mount("-t", "tmpfs", "-o", "size=4m", "tmpfs"):
            raise PermissionError("mounting a tmpfs is not allowed here")
        return self

    def __exit__(self, *exception: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def fill(self) -> None:
        """Fill the disk to the last byte."""
        with open(self.path / "ballast", "wb", buffering=0) as ballast:
            try:
                while ballast.write(bytes(4096)):
                    pass
            except OSError:
                return

    def make_room(self) -> None:
        (self.path / "ballast").unlink()

    def remount(self, how: str) -> bool:
        """Mount the disk again. how: ro or rw. Return whether the system does it."""
        return self._mount("-o", f"remount,{how}")

    def _mount(self, *options: str) -> bool:
        return subprocess.run(["mount", *options, str(self.path)], capture_output=True).returncode == 0
