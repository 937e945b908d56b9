"""Every kernel compiles for GPUs that are not there, within the shared memory that a block has."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.results_file import ROOT

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have

# what the kernels that live on matrix units are written for, by the beginning of a specimen's name
MATRIX_UNITS = {"linear tile": "wgmma", "decode_attention": "mma.sync", "prefill_attention": "wgmma"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict]:
    """What a process of its own says of each architecture: the interpreter replaces the compiler for good."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.compile_specimens", *map(str, SHARED_MEMORY)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_compiles(arch, reports):
    report = reports[str(arch)]
    too_large = {name: found["shared"] for name, found in report.items() if found["shared"] > SHARED_MEMORY[arch]}
    assert report and not too_large
    if arch == 90:
        for beginning, instruction in MATRIX_UNITS.items():
            found = [found["instructions"] for name, found in report.items() if name.startswith(beginning)]
            assert any(instruction in used for used in found), beginning
