"""bitsandbytes is imported without torch's compiler, and without code from the hub on CPUs where it would fetch some."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import ModuleType

import pytest

from engine.quant.bnb import load_library
from tests.support.paths import ENV

# the import of bitsandbytes 0.49 to 0.50 on a CPU with avx512_bf16
LIBRARY = """
    import logging
    try:
        import torch._inductor.compile_fx
        compiles = True
    except ImportError:
        compiles = False
    try:
        from kernels import get_kernel
        get_kernel()
    except Exception as error:
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("%s: pip install kernels", error)
"""
KERNELS = "def get_kernel(*_, **__): print('code from the hub runs')"
# makes the real library believe that it is on such a CPU
CODE = """
import importlib.abc, sys

class Capable(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "bitsandbytes.backends.cpu.ops":
            sys.modules["bitsandbytes.functional"].has_avx512bf16 = lambda: True

sys.meta_path.insert(0, Capable())
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Put a folder for packages before all others, and forget that bitsandbytes was imported."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("bitsandbytes", "kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bitsandbytes.py").write_text(textwrap.dedent(LIBRARY))
    yield tmp_path
    sys.modules.pop("bitsandbytes", None)
    sys.modules.pop("kernels", None)


@pytest.mark.parametrize("installed", [False, True], ids=["without kernels", "with kernels"])
def test_the_import_says_nothing_and_runs_nothing(packages, capfd, caplog, installed):
    if installed:
        (packages / "kernels.py").write_text(KERNELS)
    load_library()
    assert "bitsandbytes" in sys.modules and "kernels" not in sys.modules
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")
    del sys.modules["bitsandbytes"]
    import bitsandbytes  # noqa: F401  the twin

    assert "pip install kernels" in caplog.text or "code from the hub runs" in capfd.readouterr().out


def test_the_import_loads_no_compiler_and_leaves_one_that_was_there(packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.compile_fx", compiler := ModuleType("torch._inductor.compile_fx"))
    load_library()
    assert sys.modules["bitsandbytes"].compiles is False
    assert sys.modules["torch._inductor.compile_fx"] is compiler
    del sys.modules["bitsandbytes"]
    import bitsandbytes  # the twin

    assert bitsandbytes.compiles is True


@pytest.mark.faults
@pytest.mark.parametrize("load", ["from engine.quant.bnb import load_library; load_library()", "import bitsandbytes"])
def test_the_library_that_is_installed_behaves_so(tmp_path, load):
    (tmp_path / "kernels.py").write_text(KERNELS)
    env = {**ENV, "PYTHONPATH": f"{tmp_path}:{ENV['PYTHONPATH']}"}
    said = "; print('a compiler is there' * ('torch._inductor.compile_fx' in sys.modules), end='')"
    done = subprocess.run([sys.executable, "-c", CODE + load + said], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr == "") is ("load_library" in load)
    assert ("compiler" in done.stdout) is ("load_library" not in load)
