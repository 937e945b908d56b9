"""Every kernel compiles for GPUs that are not there, and uses the matrix units that it is written for."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.results_file import ROOT

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles(arch, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    # a process of its own: the interpreter, chosen for the other tests, replaces the compiler
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compile_specimens", str(arch)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report
    too_large = {name: found["shared"] for name, found in report.items() if found["shared"] > SHARED_MEMORY[arch]}
    assert not too_large
