"""The decode kernel against float64, in Triton's interpreter and on a GPU."""

import pytest
import torch

from pq_ao.ops.cache_attention import cache_attention
from tests.ops.cache_attention_case import CacheCase, sqnr

pytest.importorskip("triton")
from pq_ao.ops.kernels.decode_attention import MAX_SPLITS, Tiles, choose_tiles, launch  # noqa: E402
from pq_ao.ops.kernels.interpret import INTERPRETED  # noqa: E402
from pq_ao.ops.kernels.workspace import counters  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (torch.cuda.is_available() or INTERPRETED.value),
        reason="kernels need a GPU or TRITON_INTERPRET=1",
    ),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# probabilities and codes go through fp16 products summed in float32; measured 65 dB and more
SQNR_FLOOR_DB = 55.0
BF16_FLOOR_DB = 45.0  # probabilities in bfloat16 where the cache holds bfloat16

FORMS = [("packed", "static"), ("packed", "per-token"), ("int8", "static"), ("int8", "per-token"), ("float16", None)]
SMALL = Tiles(warps=2, slots=16, stages=2, splits=3, slots_first=False)


def check(case: CacheCase, tiles: Tiles | None = SMALL, floor: float = SQNR_FLOOR_DB) -> torch.Tensor:
    out = launch(*case.args(), tiles=tiles)
    expected = case.expected()
    assert out.dtype == torch.float32 and out.shape == expected.shape and torch.isfinite(out).all()
    assert sqnr(expected, out) >= floor
    assert not counters(out.device).any()
    return out


@pytest.mark.parametrize("start, splits", [(0, 1), (0, 3), (31, 1), (76, 3), (99, 4)])
@pytest.mark.parametrize("stored, scales", FORMS)
def test_equals_float64(stored, scales, start, splits):
    case = CacheCase(stored, scales=scales, start=start, slots=100, head_dim=32, device=DEVICE)
    check(case, Tiles(2, 16, 2, splits))


@pytest.mark.parametrize("prefix", [0, 1, 6])
def test_prefix(prefix):
    check(CacheCase(prefix=prefix, start=40, slots=48, device=DEVICE))


@pytest.mark.parametrize("stored", ["packed", "int8"])
@pytest.mark.parametrize("heads, groups, head_dim", [(6, 2, 30), (4, 4, 24), (3, 1, 6), (8, 1, 64), (2, 2, 80)])
def test_shapes(stored, heads, groups, head_dim):
    check(CacheCase(stored, heads=heads, groups=groups, head_dim=head_dim, start=40, slots=48, device=DEVICE))


@pytest.mark.parametrize("queries", [2, 4])
@pytest.mark.parametrize("hidden", [None, [0, 33]])
def test_several_queries_are_causal(queries, hidden):
    check(CacheCase(queries=queries, start=38, slots=48, hidden=hidden, device=DEVICE))


@pytest.mark.parametrize("stored, scales", FORMS)
def test_padding_hides_slots(stored, scales):
    check(CacheCase(stored, scales=scales, start=40, slots=48, hidden=[0, 35], device=DEVICE))


@pytest.mark.parametrize("scales", ["static", "per-token"])
def test_nothing_seen_is_finite(scales):
    case = CacheCase(scales=scales, prefix=0, start=40, slots=48, hidden=[41, 0], device=DEVICE)
    out = launch(*case.args(), tiles=SMALL)
    torch.testing.assert_close(out, cache_attention(*case.args()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("stored", ["packed", "float16"])
def test_slots_past_the_text_may_hold_anything(stored):
    case = CacheCase(stored, start=20, slots=48, device=DEVICE)
    before = launch(*case.args(), tiles=SMALL)
    case.keys[:, :, 21:], case.values[:, :, 21:] = 77, 77
    if stored == "float16":
        case.keys[:, :, 21:], case.values[:, :, 21:] = torch.nan, torch.inf
    assert torch.equal(launch(*case.args(), tiles=SMALL), before)


def test_uniform_attention_keeps_its_small_sums():
    """Offsets of nibbles would drown the mean of many values, were they not taken off before the sum."""
    check(CacheCase(start=1023, slots=1024, spread=0.0, prefix=0, batch=1, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_query(dtype):
    check(CacheCase(dtype=dtype, start=40, slots=48, device=DEVICE))


@pytest.mark.parametrize("stored, floor", [("bfloat16", BF16_FLOOR_DB), ("float32", SQNR_FLOOR_DB)])
def test_float_caches(stored, floor):
    check(CacheCase(stored, start=40, slots=48, device=DEVICE), floor=floor)


@pytest.mark.parametrize("bits, encoding", [(4, torch.int8), (8, torch.int8), (4, torch.float8_e4m3fn)])
def test_quantized_output(bits, encoding):
    case = CacheCase(queries=2, start=40, slots=48, device=DEVICE)
    codes = launch(*case.args(bits, encoding), tiles=SMALL).float()
    expected = cache_attention(*case.args(bits, encoding)).float()
    assert (codes != expected).float().mean() < 0.02 and (codes - expected).abs().max() <= 1


def test_too_many_rows():
    with pytest.raises(ValueError, match="at most 8 rows"):
        launch(*CacheCase(heads=8, groups=1, queries=3).args())


@pytest.mark.parametrize("kv_heads, slots", [(8, 1024), (64, 2048), (256, 8192), (1024, 2048), (1, 7)])
def test_chosen_tiles_fill_the_gpu(kv_heads, slots):
    tiles = choose_tiles(kv_heads, slots, 4, 132)
    assert 1 <= tiles.splits <= MAX_SPLITS
    assert kv_heads * tiles.splits >= min(132, kv_heads * (slots // (tiles.warps * tiles.slots)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestGpu:
    @pytest.mark.parametrize("batch, slots, start", [(1, 1024, 1000), (3, 4096, 2222), (16, 512, 511)])
    @pytest.mark.parametrize("stored, scales", FORMS)
    def test_llama_shape(self, stored, scales, batch, slots, start):
        check(
            CacheCase(
                stored,
                scales=scales,
                batch=batch,
                heads=32,
                groups=8,
                head_dim=128,
                slots=slots,
                start=start,
                dtype=torch.bfloat16,
                device="cuda",
            ),  # fmt: skip
            None,
        )

    def test_same_bits_on_every_run_and_in_a_graph(self):
        case = CacheCase(batch=2, heads=32, groups=8, head_dim=128, slots=2048, start=1500, device="cuda")
        first = cache_attention(*case.args())
        for _ in range(5):
            assert torch.equal(cache_attention(*case.args()), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cache_attention(*case.args())
        graph.replay()
        assert torch.equal(out, first)
        case.start.fill_(700)  # the length is read on the device
        graph.replay()
        assert torch.equal(out, cache_attention(*case.args()))
        assert sqnr(case.expected(), out) >= SQNR_FLOOR_DB
