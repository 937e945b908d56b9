"""Shared fixtures: a tiny tokenizer, tiny random decoders of every family, and real data and models where present.

`PQ_AO_DATA` names the folder of evaluation data; `PQ_AO_CACHE` the one that `recipes.smollm2` keeps its model in.
"""

import os

import torch

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # CPU builds cannot load them, and say so at length
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; must stand before triton is imported

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pq_ao
from pq_ao.data import BLANK_LINE, load_text
from recipes.smollm2 import smollm2_folder
from tests.checkpoints import tiny
from tests.decoders import VOCAB_SIZE, tiny_config

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# bos first, as the templates of Llama and SmolLM2 begin
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# Enough for several windows of 512 tokens with either tokenizer, and tokenized at once.
ENGLISH_CHARACTERS = 60_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that no process is left with one when the others have ended."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny operations on several threads wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def english() -> list[str]:
    """Documents of English text for calibration."""
    documents = load_text("embedded").split(BLANK_LINE)
    total = 0

    def within_budget(document: str) -> bool:
        nonlocal total
        total += len(document)
        return total <= ENGLISH_CHARACTERS

    return list(takewhile(within_budget, documents))


@pytest.fixture(scope="session")
def tiny_tokenizer(english) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens that adds BOS, like Llama's, and has a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(english, trainer)
    bos_id = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights that keep activations of order one, gains away from one and biases away from zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif parameter.ndim == 1:
            parameter.normal_(0, 0.3, generator=generator)
        elif "embed" in name:
            parameter.normal_(0, 1, generator=generator)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., PreTrainedModel]:
    """`make_tiny(family, head_dim=24, tied=False, seed=0, dtype=torch.float32, **config)`: a random two-layer decoder.

    What follows `dtype` goes to the config of transformers. Equal arguments give equal models.
    """

    def make(
        family: str,
        *,
        head_dim: int = 24,
        tied: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **overrides,
    ) -> PreTrainedModel:
        shape = {"head_dim": head_dim, "tie_word_embeddings": tied, "max_position_embeddings": 1024}
        config = tiny_config(family, **(shape | overrides))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model, torch.Generator().manual_seed(seed))
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="module")
def checkpoint(tiny_tokenizer, tmp_path_factory) -> Path:
    """Folder of a tiny quantized model with random codes, and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    pq_ao.save(tiny("llama", vocab_size=len(tiny_tokenizer)), folder, tokenizer=tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of evaluation data."""
    folder = os.environ.get("PQ_AO_DATA")
    if not folder:
        pytest.skip("PQ_AO_DATA does not name the folder of evaluation data")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct; fetched on first use where there is a network."""
    try:
        return smollm2_folder()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had: {error}")
