"""Which decoders are known, and that the others are refused before anything of them is changed."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PhiConfig, PhiForCausalLM

import pq_ao
from pq_ao.families import FAMILIES, family_of, head_dim_of, replace_submodule

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


def snapshot(model) -> tuple:
    """All that a refusal must leave alone: modules, tensors, config, mode and attention."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        [parameter.requires_grad for parameter in model.parameters()],
        copy.deepcopy(model.config.to_dict()),
        model.config._attn_implementation,
        model.training,
    )


def assert_untouched(model, before: tuple) -> None:
    modules, tensors, *rest = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in tensors.items())
    assert rest == list(before[2:])


def gpt2(make_tiny):
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_head=4, n_layer=1, n_positions=64))


def opt(make_tiny):
    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64))


def phi(make_tiny):
    return PhiForCausalLM(PhiConfig(**SMALL, intermediate_size=64))


def sliding_mistral(make_tiny):
    return make_tiny("mistral", sliding_window=16)


def sliding_qwen2(make_tiny):
    return make_tiny("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)


def sliding_qwen3(make_tiny):
    return make_tiny("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=0)


def dynamic_rope(make_tiny):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return make_tiny("llama", rope_parameters=rope)


def dynamic_rope_in_the_old_words(make_tiny):
    return make_tiny("llama", rope_scaling={"type": "dynamic", "factor": 2.0})


def longrope(make_tiny):
    factors = {"short_factor": [1.0] * 12, "long_factor": [2.0] * 12}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512, **factors}
    return make_tiny("llama", rope_parameters=rope)


def partial_rope(make_tiny):
    return make_tiny("phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})


def odd_head_dim(make_tiny):
    model = make_tiny("llama")
    model.config.head_dim = 25  # newer transformers build no such model
    return model


REFUSED = [
    (gpt2, ["learned absolute positions", "wpe", "RoPE"]),
    (opt, ["learned absolute positions", "embed_positions", "RoPE"]),
    (phi, ["family 'phi' is not supported", *FAMILIES, "pq_ao/families.py"]),
    (sliding_mistral, ["sliding-window", "sliding_window=16", "sliding_window=None"]),
    (sliding_qwen2, ["sliding-window", "sliding_window=16"]),
    (sliding_qwen3, ["sliding-window", "sliding_window=16"]),
    (dynamic_rope, ["rope_type='dynamic'", "longrope"]),
    (dynamic_rope_in_the_old_words, ["rope_type='dynamic'"]),
    (longrope, ["rope_type='longrope'", "dynamic"]),
    (partial_rope, ["partial_rotary_factor=0.5", "partial_rotary_factor=1.0"]),
    (odd_head_dim, ["head_dim=25", "even"]),
]


@pytest.mark.parametrize("build, words", [pytest.param(*case, id=case[0].__name__) for case in REFUSED])
class TestRefused:
    def check(self, model, words, call) -> None:
        before = snapshot(model)
        with pytest.raises(ValueError, match="^model: ") as error:
            call(model)
        assert all(word in str(error.value) for word in words)
        assert_untouched(model, before)

    def test_by_family_of(self, make_tiny, build, words):
        self.check(build(make_tiny), words, family_of)

    def test_by_rotate(self, make_tiny, build, words):
        self.check(build(make_tiny), words, lambda model: pq_ao.rotate_(model, pq_ao.prefixquant_config()))

    def test_by_calibrate(self, make_tiny, tiny_tokenizer, english, build, words):
        self.check(
            build(make_tiny),
            words,
            lambda model: pq_ao.calibrate(model, tiny_tokenizer, data=english, num_sequences=2, sequence_length=16),
        )


class TestKnown:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_part_is_where_the_table_says(self, make_tiny, name):
        model = make_tiny(name)
        family = family_of(model)
        assert family is FAMILIES[name]
        parts = {field: getattr(family, field) for field in family.__dataclass_fields__}
        layer_parts = list(parts)[list(parts).index("attention_norm") :]
        for field, paths in parts.items():
            root = model.get_submodule(family.layers)[0] if field in layer_parts else model
            for path in paths if isinstance(paths, tuple) else (paths or "",):
                root.get_submodule(path)  # raises AttributeError where there is none

    def test_only_qwen3_has_norms_on_its_heads(self):
        with_norms = [name for name, family in FAMILIES.items() if family.query_norm or family.key_norm]
        assert with_norms == ["qwen3"]

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512},
        ],
        ids=lambda rope: rope["rope_type"],
    )
    def test_rope_that_does_not_depend_on_the_length(self, make_tiny, rope):
        assert family_of(make_tiny("llama", rope_parameters=rope)) is FAMILIES["llama"]

    def test_a_window_that_is_switched_off(self, make_tiny):
        model = make_tiny("qwen2", use_sliding_window=False, sliding_window=16)
        assert family_of(model) is FAMILIES["qwen2"]


class TestHeadDim:
    @pytest.mark.parametrize("head_dim", [24, 48])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_from_the_config(self, make_tiny, name, head_dim):
        assert head_dim_of(make_tiny(name, head_dim=head_dim).config) == head_dim

    def test_from_hidden_size_where_not_given(self, make_tiny):
        assert head_dim_of(make_tiny("llama", head_dim=None).config) == 96 // 4


def test_replace_submodule():
    root = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.ReLU())})
    new = torch.nn.SiLU()
    replace_submodule(root, "a.0", new)
    assert root["a"][0] is new
    replace_submodule(root, "a", new)
    assert root["a"] is new
