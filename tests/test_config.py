"""The scheme: named settings, what is refused and in which words, and the way through torchao's JSON form."""

import dataclasses
import json

import pytest
from torchao.core.config import config_from_dict, config_to_dict

import pq_ao
from pq_ao.config import SCHEMES, PrefixQuantConfig, prefixquant_config


class TestSchemes:
    @pytest.mark.parametrize(
        "name, bits",
        [("w4a4kv4", (4, 4, 4)), ("w4a8kv4", (4, 8, 4)), ("w8a8kv8", (8, 8, 8)), ("w4a4kv16", (4, 4, 16))],
    )
    def test_bits_of_each_name(self, name, bits):
        config = prefixquant_config(name)
        assert (config.weight_bits, config.act_bits, config.kv_bits) == bits
        assert config.scheme == name

    def test_these_are_all(self):
        assert tuple(SCHEMES) == ("w4a4kv4", "w4a8kv4", "w8a8kv8", "w4a4kv16")

    def test_default_is_w4a4kv4_static_with_prefix_and_rotation(self):
        expected = PrefixQuantConfig(4, 4, 4, mode="static", prefix=True, rotation=True, act_codes="spread", version=1)
        assert prefixquant_config() == expected
        # what configurations of before the field meant
        assert PrefixQuantConfig() == prefixquant_config(act_codes="even")

    def test_spread_codes_are_for_static_scales_and_four_bits(self):
        assert prefixquant_config("w4a4kv16").act_codes == "spread"
        assert prefixquant_config("w4a8kv4").act_codes == prefixquant_config(mode="dynamic").act_codes == "even"
        with pytest.raises(ValueError, match="act_codes='spread' with act_bits=4, mode='dynamic'"):
            prefixquant_config(mode="dynamic", act_codes="spread")
        with pytest.raises(ValueError, match="act_codes='spread' with act_bits=8"):
            prefixquant_config("w4a8kv4", act_codes="spread")

    def test_other_fields_are_passed_on(self):
        config = prefixquant_config("w4a8kv4", mode="dynamic", prefix=False, rotation=False)
        assert config == PrefixQuantConfig(4, 8, 4, "dynamic", False, False)

    def test_a_scheme_without_a_name_can_be_built(self):
        assert PrefixQuantConfig(weight_bits=4, act_bits=8, kv_bits=16).scheme == "w4a8kv16"

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(ValueError) as error:
            prefixquant_config("w3a3kv3")
        assert "'w3a3kv3'" in str(error.value)
        assert all(name in str(error.value) for name in SCHEMES)

    def test_public_names(self):
        assert pq_ao.PrefixQuantConfig is PrefixQuantConfig
        assert pq_ao.prefixquant_config is prefixquant_config


class TestRefused:
    @pytest.mark.parametrize(
        "field, value, allowed",
        [
            ("weight_bits", 3, "(4, 8)"),
            ("weight_bits", 16, "(4, 8)"),
            ("weight_bits", "4", "(4, 8)"),
            ("weight_bits", 4.0, "(4, 8)"),
            ("weight_bits", None, "(4, 8)"),
            ("act_bits", 16, "(4, 8)"),
            ("act_bits", 0, "(4, 8)"),
            ("act_bits", -4, "(4, 8)"),
            ("kv_bits", 2, "(4, 8, 16)"),
            ("kv_bits", 32, "(4, 8, 16)"),
            ("kv_bits", 16.0, "(4, 8, 16)"),
            ("mode", "Static", "('static', 'dynamic')"),
            ("mode", "", "('static', 'dynamic')"),
            ("mode", None, "('static', 'dynamic')"),
            ("prefix", None, "(True, False)"),
            ("prefix", "yes", "(True, False)"),
            ("rotation", None, "(True, False)"),
            ("version", 2, "(1,)"),
            ("version", "1", "(1,)"),
            # True == 1 and 1.0 == 1: of the right value, but of another type
            ("prefix", 1, "(True, False)"),
            ("prefix", 0, "(True, False)"),
            ("prefix", 1.0, "(True, False)"),
            ("rotation", 1, "(True, False)"),
            ("rotation", 0, "(True, False)"),
            ("version", True, "(1,)"),
            ("weight_bits", True, "(4, 8)"),
            ("act_bits", False, "(4, 8)"),
        ],
    )
    def test_names_the_field_the_value_and_what_is_allowed(self, field, value, allowed):
        with pytest.raises(ValueError) as error:
            PrefixQuantConfig(**{field: value})
        assert f"{field}={value!r}" in str(error.value)
        assert allowed in str(error.value)

    def test_wide_weights_with_narrow_activations(self):
        with pytest.raises(ValueError, match="weight_bits=8 with act_bits=4.*act_bits=8"):
            PrefixQuantConfig(weight_bits=8, act_bits=4)

    @pytest.mark.parametrize("field, value", [("mode", "fast"), ("prefix", 1), ("rotation", "no")])
    def test_through_the_short_form_as_well(self, field, value):
        with pytest.raises(ValueError, match=f"{field}={value!r}"):
            prefixquant_config("w4a4kv4", **{field: value})


class TestJson:
    @pytest.mark.parametrize("mode", ["static", "dynamic"])
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_round_trip(self, scheme, mode):
        config = prefixquant_config(scheme, mode=mode, prefix=False, rotation=mode == "static")
        restored = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
        assert type(restored) is PrefixQuantConfig
        assert restored == config
        types = [type(value) for value in dataclasses.astuple(restored)]
        assert types == [type(value) for value in dataclasses.astuple(config)]

    def test_written_fields(self):
        written = config_to_dict(prefixquant_config())
        fields = {"weight_bits": 4, "act_bits": 4, "kv_bits": 4, "mode": "static", "prefix": True, "rotation": True}
        assert written == {"_type": "PrefixQuantConfig", "_version": 1, "_data": fields | {"act_codes": "spread"}}

    def test_a_tampered_file_is_refused(self):
        written = config_to_dict(prefixquant_config())
        written["_data"]["kv_bits"] = 5
        with pytest.raises(ValueError, match="kv_bits=5"):
            config_from_dict(written)
