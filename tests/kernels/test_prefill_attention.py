"""The prefill kernel against float64, in Triton's interpreter and on a GPU."""

import pytest
import torch

from pq_ao.ops.cache_attention import cache_attention
from tests.kernels.code_places import place_of
from tests.ops.cache_attention_case import CacheCase, sqnr

pytest.importorskip("triton")
from pq_ao.ops.kernels import prefill_attention  # noqa: E402
from pq_ao.ops.kernels.interpret import INTERPRETED  # noqa: E402
from pq_ao.ops.kernels.prefill_attention import Tiles, choose_tiles, launch  # noqa: E402
from pq_ao.ops.kernels.prefill_operands import prefix_parts  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (torch.cuda.is_available() or INTERPRETED.value), reason="kernels need a GPU or TRITON_INTERPRET=1"
    ),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# probabilities and codes go through fp16 products summed in float32; measured 65 dB and more
SQNR_FLOOR_DB = 55.0
BF16_FLOOR_DB = 45.0  # probabilities in bfloat16 where queries or cache hold bfloat16

FORMS = [("packed", "static"), ("packed", "per-token"), ("int8", "static"), ("int8", "per-token"), ("float16", None)]
WAYS = {"by pointers": Tiles(rows=32, slots=16, warps=4, stages=2)}
# the interpreter has descriptors; of GPUs, those of compute capability 9.0 and newer
if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0):
    WAYS["by descriptors"] = Tiles(rows=64, slots=16, warps=4, stages=2, tma=True)


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def tiles(request) -> Tiles:
    return request.param


def check(case: CacheCase, tiles: Tiles | None, floor: float = SQNR_FLOOR_DB) -> torch.Tensor:
    out = launch(*case.args(), tiles=tiles)
    expected = case.expected()
    assert out.dtype == torch.float32 and out.shape == expected.shape and torch.isfinite(out).all()
    assert sqnr(expected, out) >= floor
    return out


@pytest.mark.parametrize("queries, start", [(5, 0), (37, 0), (20, 29), (1, 50)])
@pytest.mark.parametrize("stored, scales", FORMS)
def test_equals_float64(stored, scales, queries, start, tiles):
    check(CacheCase(stored, scales=scales, queries=queries, start=start, slots=64, head_dim=32, device=DEVICE), tiles)


@pytest.mark.parametrize("prefix", [0, 1, 18])
def test_prefix(prefix, tiles):
    check(CacheCase(prefix=prefix, queries=20, start=0, slots=24, device=DEVICE), tiles)


@pytest.mark.parametrize("kind, bits", [(torch.bfloat16, 14), (torch.float16, 21), (torch.float32, 24)])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_prefix_parts(tokens, kind, bits):
    """Two numbers hold what the prefix is less its shift (bfloat16 even where conversions cut off); zeros follow."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(3, tokens, 40, generator=generator).bfloat16().to(DEVICE) for _ in range(2))
    shift = torch.randn(3, 1, 40, generator=generator).to(DEVICE)
    parts = prefix_parts(key, value, shift, None, kind, 16).double()
    assert parts.shape == (4, 3, 16 * -(-tokens // 16), 40) and not parts[:, :, tokens:].any()
    assert not parts[3].any() and torch.equal(parts[2, :, :tokens], value.double())
    expected = key.double() - shift.double()
    torch.testing.assert_close(parts[0, :, :tokens] + parts[1, :, :tokens], expected, rtol=0.5**bits, atol=0.5**24)


@pytest.mark.parametrize("stored", ["packed", "int8"])
@pytest.mark.parametrize("heads, groups, head_dim", [(6, 2, 40), (4, 4, 24), (3, 1, 8), (8, 1, 80)])
def test_shapes(stored, heads, groups, head_dim, tiles):
    case = CacheCase(
        stored, heads=heads, groups=groups, head_dim=head_dim, queries=19, start=5, slots=24, device=DEVICE
    )
    check(case, tiles)


@pytest.mark.parametrize("stored", ["packed", "int8", "float16"])
@pytest.mark.parametrize("heads, groups, head_dim", [(6, 2, 30), (3, 1, 6)])
def test_heads_too_odd_for_descriptors(stored, heads, groups, head_dim):
    case = CacheCase(stored, heads=heads, groups=groups, head_dim=head_dim, queries=19, start=5, device=DEVICE)
    check(case, WAYS["by pointers"])
    check(case, None)


@pytest.mark.parametrize("stored, scales", FORMS)
def test_padding_hides_slots(stored, scales, tiles):
    check(CacheCase(stored, scales=scales, queries=20, start=20, slots=40, hidden=[0, 17], device=DEVICE), tiles)


def test_nothing_seen_is_finite(tiles):
    """Queries that are padding themselves see nothing at all where there is no prefix."""
    case = CacheCase(prefix=0, queries=20, start=0, slots=24, hidden=[9, 0], device=DEVICE)
    out = launch(*case.args(), tiles=tiles)
    torch.testing.assert_close(out, cache_attention(*case.args()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("stored", ["packed", "float16"])
def test_slots_past_the_text_may_hold_anything(stored, tiles):
    case = CacheCase(stored, queries=20, start=4, slots=40, device=DEVICE)
    before = launch(*case.args(), tiles=tiles)
    case.keys[:, :, 24:], case.values[:, :, 24:] = 77, 77
    if stored == "float16":
        case.keys[:, :, 24:], case.values[:, :, 24:] = torch.nan, torch.inf
    assert torch.equal(launch(*case.args(), tiles=tiles), before)


@pytest.mark.parametrize("stored, floor", [("bfloat16", BF16_FLOOR_DB), ("float32", SQNR_FLOOR_DB)])
def test_float_caches(stored, floor, tiles):
    check(CacheCase(stored, queries=20, start=4, slots=24, device=DEVICE), tiles, floor)


@pytest.mark.parametrize(
    "bits, encoding, code_set",
    [(4, torch.int8, "even"), (8, torch.int8, "even"), (4, torch.float8_e4m3fn, "even"), (4, torch.int8, "wide"),
     (4, torch.float8_e4m3fn, "wide")],
)  # fmt: skip
def test_quantized_output(bits, encoding, code_set, tiles):
    case = CacheCase(queries=20, start=4, slots=24, dtype=torch.bfloat16, device=DEVICE)
    codes = place_of(launch(*case.args(bits, encoding), tiles=tiles, codes=code_set), code_set)
    expected = place_of(cache_attention(*case.args(bits, encoding), codes=code_set), code_set)
    assert (codes != expected).float().mean() < 0.02 and (codes - expected).abs().max() <= 1


def test_owners_part_by_part(tiles, monkeypatch):
    """Where operands exceed the scratch, one part of the KV heads follows the other; few run together."""
    case = CacheCase(batch=3, queries=37, start=4, slots=50, scales="per-token", hidden=[0, 7, 20], device=DEVICE)
    whole = launch(*case.args(), tiles=tiles)
    owner_bytes = 2 * 128 * 16 * 2
    monkeypatch.setattr(prefill_attention, "_TOGETHER_BYTES", 3 * owner_bytes)
    assert torch.equal(launch(*case.args(), tiles=tiles), whole)
    monkeypatch.setattr(prefill_attention, "SCRATCH_LIMIT", 4 * owner_bytes)
    assert torch.equal(launch(*case.args(), tiles=tiles), whole)
    check(case, tiles)


def test_chosen_tiles_fit():
    assert choose_tiles(8192, 256, 232448, tma=True) == Tiles(64, 64, 4, 3, tma=True)
    assert choose_tiles(8192, 256, 232448, tma=False) == Tiles(128, 64, 8, 3)
    assert choose_tiles(8192, 256, 101376, tma=False) == Tiles(128, 64, 8, 2)
    assert choose_tiles(40, 256, 232448, tma=False) == Tiles(64, 64, 4, 2)
    assert choose_tiles(8192, 1024, 101376, tma=False) == Tiles(32, 16, 4, 1)
    check(CacheCase(queries=20, start=4, slots=24, device=DEVICE), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestGpu:
    @pytest.mark.parametrize("tiles", [None, Tiles(128, 64, 8, 2)], ids=["chosen", "by pointers"])
    @pytest.mark.parametrize("batch, queries, start", [(1, 512, 0), (2, 300, 211), (3, 17, 1000)])
    @pytest.mark.parametrize("stored, scales", FORMS)
    def test_llama_shape(self, stored, scales, batch, queries, start, tiles):
        case = CacheCase(
            stored, scales=scales, batch=batch, heads=32, groups=8, head_dim=128, slots=1024, queries=queries,
            start=start, dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        check(case, tiles, BF16_FLOOR_DB)

    def test_prefix_is_not_rounded(self):
        """Sharp scores on a prefix rounded to bfloat16 in units of codes lost 20 dB."""
        case = CacheCase(prefix=3, queries=40, start=7, slots=60, spread=4.0, dtype=torch.bfloat16, device="cuda")
        check(case, None, 60.0)

    def test_same_bits_on_every_run_and_in_a_graph(self):
        case = CacheCase(batch=2, heads=32, groups=8, head_dim=128, slots=1024, queries=200, start=100, device="cuda")
        first = cache_attention(*case.args())
        for _ in range(5):
            assert torch.equal(cache_attention(*case.args()), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cache_attention(*case.args())
        graph.replay()
        assert torch.equal(out, first)
        case.start.fill_(300)
        graph.replay()
        assert torch.equal(out, cache_attention(*case.args()))
