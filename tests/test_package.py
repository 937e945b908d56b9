"""What importing the package does, and does not."""

import subprocess
import sys

import pytest

import pq_ao


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_ops_need_neither_torchao_nor_transformers():
    loaded = _run(
        "import sys, pq_ao.ops; print([n for n in ('torchao', 'transformers', 'datasets') if n in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.parametrize("name", pq_ao.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    assert getattr(pq_ao, name).__doc__


def test_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match="quantise.*calibrate"):
        _ = pq_ao.quantise


def test_config_alone_registers_the_handler_of_quantize_():
    """Users import the config and torchao's function, nothing else."""
    code = (
        "import torch; from pq_ao import prefixquant_config; from torchao.quantization import quantize_\n"
        "try: quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), prefixquant_config())\n"
        "except ValueError as error: print('pq_ao.calibrate(model, tokenizer, config)' in str(error))"
    )
    assert _run(code) == "True"
