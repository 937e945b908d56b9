"""Every kernel compiles for GPUs that are not there, within the shared memory that a block has."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.results_file import ROOT

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have

# what the kernels that live on matrix units are written for, by the beginning of a specimen's name
MATRIX_UNITS = {"linear tile": "wgmma", "decode_attention": "mma.sync", "prefill_attention": "wgmma"}


@pytest.fixture(scope="module")
def compilers(tmp_path_factory) -> Iterator[dict[int, subprocess.Popen]]:
    """One process for each architecture, all at work at once.

    Processes of their own: the interpreter, chosen for the other tests, replaces the compiler for good.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    running = {}
    for arch in SHARED_MEMORY:
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(f"sm_{arch}"))
        command = [sys.executable, "-m", "tests.kernels.compile_specimens", str(arch)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running[arch] = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_compiles(arch, compilers):
    output, errors = compilers[arch].communicate()
    assert compilers[arch].returncode == 0, errors[-4000:]
    report = json.loads(output.splitlines()[-1])
    too_large = {name: found["shared"] for name, found in report.items() if found["shared"] > SHARED_MEMORY[arch]}
    assert report and not too_large
    if arch == 90:
        for beginning, instruction in MATRIX_UNITS.items():
            found = [found["instructions"] for name, found in report.items() if name.startswith(beginning)]
            assert any(instruction in used for used in found), beginning
