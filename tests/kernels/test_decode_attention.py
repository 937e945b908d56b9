"""The decode kernel against float64, in Triton's interpreter and on a GPU."""

import pytest
import torch

from pq_ao.ops.cache_attention import cache_attention
from tests.kernels.code_places import place_of
from tests.ops.cache_attention_case import CacheCase, sqnr

pytest.importorskip("triton")
from pq_ao.ops.kernels.decode_attention import MAX_SPLITS, Tiles, choose_tiles, fills_tiles, launch  # noqa: E402
from pq_ao.ops.kernels.interpret import INTERPRETED  # noqa: E402
from pq_ao.ops.kernels.stored import stored_as  # noqa: E402
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
# what `decode_codes` walks, one warp to 32 slots
FILLING = [("packed", 128), ("int8", 64)]
CODES = Tiles(warps=1, slots=32, stages=2, splits=3)


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


@pytest.mark.parametrize("start, splits", [(0, 3), (63, 1), (99, 4)])
@pytest.mark.parametrize("scales", ["static", "per-token"])
@pytest.mark.parametrize("stored, head_dim", FILLING)
def test_codes_that_fill_tiles(stored, head_dim, scales, start, splits):
    case = CacheCase(stored, scales=scales, start=start, slots=100, head_dim=head_dim, device=DEVICE)
    assert fills_tiles(stored_as(case.keys, head_dim), head_dim)
    check(case, CODES._replace(splits=splits))


@pytest.mark.parametrize("heads, groups, queries", [(1, 1, 1), (3, 1, 1), (5, 1, 1), (8, 1, 1), (6, 2, 2), (4, 4, 7)])
@pytest.mark.parametrize("stored, head_dim", FILLING)
def test_rows_beside_codes(stored, head_dim, heads, groups, queries):
    """One to eight, which four or eight pairs of columns hold."""
    check(CacheCase(stored, heads=heads, groups=groups, queries=queries, start=70, slots=96, head_dim=head_dim,
                    device=DEVICE), CODES)  # fmt: skip


@pytest.mark.parametrize("scales", ["static", "per-token"])
@pytest.mark.parametrize("stored, head_dim", FILLING)
def test_queries_far_apart(stored, head_dim, scales):
    """Queries are rounded in the unit of the largest of a row: others may be far below, a row of zeros has none."""
    case = CacheCase(stored, scales=scales, start=70, slots=96, hidden=[0, 40], head_dim=head_dim, device=DEVICE)
    case.query *= 0.1
    case.query[..., 5] *= 100
    case.query[:, :, 0] = 0
    case.query[:, :, 1] *= 1e-20
    case.query[:, :, 2] *= 1e-5
    check(case, CODES)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")  # of the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stored, head_dim", FILLING)
def test_a_query_that_is_no_number_stays_none(stored, head_dim, value):
    """Nor does it touch its neighbours, though all are integers in between."""
    case = CacheCase(stored, start=70, slots=96, head_dim=head_dim, device=DEVICE)
    expected = launch(*case.args(), tiles=CODES).view(2, 4, head_dim)
    case.query[1, 0, 2, head_dim - 3] = value
    out = launch(*case.args(), tiles=CODES).view(2, 4, head_dim)
    assert out[1, 2].isnan().all()
    out[1, 2] = expected[1, 2]
    assert torch.equal(out, expected)


def test_heads_whose_scores_int32_holds():
    for head_dim, fits in ((512, True), (1024, False)):
        assert (
            fills_tiles(stored_as(torch.zeros(1, 1, 1, head_dim // 2, dtype=torch.uint8), head_dim), head_dim) == fits
        )
    case = CacheCase(heads=2, groups=1, start=40, slots=64, head_dim=512, batch=1, prefix=0, device=DEVICE)
    case.query[:] = case.query.abs().max()
    case.keys.fill_(0)  # codes of -8 ...
    case.keys[:, :, ::2] = 255  # ... and of 7
    codes = torch.tensor([7.0, -8.0], dtype=torch.float64, device=DEVICE).repeat(32).view(1, 1, -1, 1)
    case.key64[:] = codes * case.key_scale.double().view(1, -1, 1, 1)
    check(case, CODES)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("queries", [1, 8])  # 2 and 16 rows
def test_prefix(queries, prefix):
    check(CacheCase(prefix=prefix, queries=queries, start=40, slots=48, device=DEVICE))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("splits", [1, 3])
def test_prefix_beside_codes(splits, apart, prefix):
    case = CacheCase(prefix=prefix, start=70, slots=96, head_dim=128, device=DEVICE)
    check(case, CODES._replace(splits=splits, prefix_apart=apart))


@pytest.mark.parametrize("stored", ["packed", "int8"])
@pytest.mark.parametrize("heads, groups, head_dim", [(6, 2, 30), (4, 4, 24), (3, 1, 6), (8, 1, 64), (2, 2, 80)])
def test_shapes(stored, heads, groups, head_dim):
    check(CacheCase(stored, heads=heads, groups=groups, head_dim=head_dim, start=40, slots=48, device=DEVICE))


@pytest.mark.parametrize("queries", [2, 4])
@pytest.mark.parametrize("hidden", [None, [0, 33]])
@pytest.mark.parametrize("head_dim, tiles", [(16, SMALL), (128, CODES)])
def test_several_queries_are_causal(head_dim, tiles, queries, hidden):
    case = CacheCase(queries=queries, start=38, slots=48, hidden=hidden, head_dim=head_dim, device=DEVICE)
    check(case, tiles)


@pytest.mark.parametrize("stored, scales", FORMS)
def test_padding_hides_slots(stored, scales):
    check(CacheCase(stored, scales=scales, start=40, slots=48, hidden=[0, 35], device=DEVICE))


@pytest.mark.parametrize("stored, head_dim, hidden, prefix", [
    ("packed", 128, [0, 96], 0), ("packed", 128, [32, 33], 1), ("packed", 128, [99, 31], 0), ("int8", 64, [64, 95], 1),
])  # fmt: skip
def test_padding_hides_whole_tiles_and_shares(stored, head_dim, hidden, prefix):
    """Before any slot is seen a maximum is as low as it can be: what is hidden then must leave nothing behind."""
    case = CacheCase(stored, head_dim=head_dim, prefix=prefix, hidden=hidden, start=99, slots=100, device=DEVICE)
    for splits in (1, 4):
        check(case, CODES._replace(splits=splits))


@pytest.mark.parametrize(
    "batch, hidden, start, queries, prefix", [(3, [0, 0, 300], 650, 1, 1), (2, [0, 33], 640, 2, 3)]
)
def test_long_padding(batch, hidden, start, queries, prefix):
    case = CacheCase(
        batch=batch, hidden=hidden, start=start, queries=queries, prefix=prefix, slots=700, heads=4, groups=1,
        head_dim=128, dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip
    check(case, None)


@pytest.mark.parametrize("head_dim, tiles", [(16, SMALL), (128, CODES)])
def test_every_part_is_written(head_dim, tiles, monkeypatch):
    case = CacheCase(start=40, slots=192, head_dim=head_dim, hidden=[0, 35], device=DEVICE)  # some shares have no tile
    expected = launch(*case.args(), tiles=tiles)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options))
    assert torch.equal(launch(*case.args(), tiles=tiles), expected)


@pytest.mark.parametrize("head_dim, tiles", [(16, SMALL), (128, CODES)])
@pytest.mark.parametrize("scales", ["static", "per-token"])
def test_nothing_seen_is_finite(scales, head_dim, tiles):
    case = CacheCase(scales=scales, prefix=0, start=40, slots=48, hidden=[41, 0], head_dim=head_dim, device=DEVICE)
    out = launch(*case.args(), tiles=tiles)
    torch.testing.assert_close(out, cache_attention(*case.args()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "stored, head_dim, tiles", [("packed", 16, SMALL), ("packed", 128, CODES), ("float16", 16, SMALL)]
)
def test_slots_past_the_text_may_hold_anything(stored, head_dim, tiles):
    case = CacheCase(stored, start=20, slots=48, head_dim=head_dim, device=DEVICE)
    before = launch(*case.args(), tiles=tiles)
    case.keys[:, :, 21:], case.values[:, :, 21:] = 77, 77
    if stored == "float16":
        case.keys[:, :, 21:], case.values[:, :, 21:] = torch.nan, torch.inf
    assert torch.equal(launch(*case.args(), tiles=tiles), before)


@pytest.mark.parametrize("head_dim, tiles", [(16, SMALL), (128, CODES)])
def test_uniform_attention_keeps_its_small_sums(head_dim, tiles):
    """Offsets of nibbles would drown the mean of many values, were they large."""
    check(CacheCase(start=1023, slots=1024, spread=0.0, prefix=0, batch=1, head_dim=head_dim, device=DEVICE), tiles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_query(dtype):
    check(CacheCase(dtype=dtype, start=40, slots=48, device=DEVICE))


@pytest.mark.parametrize("stored, floor", [("bfloat16", BF16_FLOOR_DB), ("float32", SQNR_FLOOR_DB)])
def test_float_caches(stored, floor):
    check(CacheCase(stored, start=40, slots=48, device=DEVICE), floor=floor)


@pytest.mark.parametrize(
    "bits, encoding, code_set",
    [(4, torch.int8, "even"), (8, torch.int8, "even"), (4, torch.float8_e4m3fn, "even"), (4, torch.int8, "wide"),
     (4, torch.float8_e4m3fn, "wide")],
)  # fmt: skip
@pytest.mark.parametrize(
    "head_dim, tiles", [(16, SMALL), (128, CODES), (128, CODES._replace(splits=1, prefix_apart=False))]
)
def test_quantized_output(head_dim, tiles, bits, encoding, code_set):
    case = CacheCase(queries=2, start=40, slots=48, head_dim=head_dim, device=DEVICE)
    codes = place_of(launch(*case.args(bits, encoding), tiles=tiles, codes=code_set), code_set)
    expected = place_of(cache_attention(*case.args(bits, encoding), codes=code_set), code_set)
    assert (codes != expected).float().mean() < 0.02 and (codes - expected).abs().max() <= 1


def test_too_many_rows():
    with pytest.raises(ValueError, match="at most 16 rows"):
        launch(*CacheCase(heads=8, groups=1, queries=3).args())
    with pytest.raises(ValueError, match="slots_first with 16 rows"):
        launch(*CacheCase(heads=8, groups=1, queries=2).args(), tiles=CODES)


@pytest.mark.parametrize("stored, head_dim", [*FILLING, ("packed", 64), ("packed", 30), ("bfloat16", 128)])
@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("kv_heads, slots", [(8, 1024), (64, 2048), (256, 8192), (1024, 2048), (1, 7), (2000, 50)])
def test_chosen_tiles_fill_the_gpu(kv_heads, slots, rows, stored, head_dim):
    words = stored_as(CacheCase(stored, head_dim=head_dim).keys, head_dim)
    tiles = choose_tiles(kv_heads, slots, rows, words, head_dim, processors=132)
    assert 1 <= tiles.splits <= MAX_SPLITS
    assert kv_heads * tiles.splits >= min(128, kv_heads * (slots // (tiles.warps * tiles.slots * 4)))
    assert rows <= 8 or not tiles.slots_first


@pytest.mark.parametrize(
    "batch, slots, splits, stages, prefix_apart",
    [
        (1, 1024, 16, 3, True),
        (1, 8192, 45, 3, True),
        (8, 2048, 8, 3, False),
        (32, 8192, 4, 3, False),
        (128, 2048, 1, 3, False),
        (16, 8192, 8, 3, False),
        (64, 4096, 2, 3, False),
        (8, 8192, 8, 4, False),
        (64, 512, 1, 4, False),
    ],
)
def test_tiles_of_llama(batch, slots, splits, stages, prefix_apart):
    """The best of sweeps on an H200, or within 2 % of it (45 splits: between two that were measured)."""
    words = stored_as(torch.zeros(1, 8, 1, 64, dtype=torch.uint8), 128)
    tiles = choose_tiles(batch * 8, slots, 4, words, 128, processors=132)
    assert (tiles.warps, tiles.slots) == (1, 32)
    assert (tiles.splits, tiles.stages, tiles.prefix_apart) == (splits, stages, prefix_apart)


@pytest.mark.parametrize("dtype, head_dim", [(torch.uint8, 256), (torch.int8, 256), (torch.int8, 512)])
@pytest.mark.parametrize("kv_heads, slots", [(1, 8192), (64, 8192), (256, 2048), (512, 512), (1024, 2048)])
def test_tiles_in_flight_fit_the_smallest_shared_memory(kv_heads, slots, dtype, head_dim):
    """99 KB a program, on GPUs of compute capability 8.6 and 8.9."""
    stored = stored_as(torch.zeros(1, 1, 1, head_dim // (2 if dtype == torch.uint8 else 1), dtype=dtype), head_dim)
    tiles = choose_tiles(kv_heads, slots, 4, stored, head_dim, processors=128)
    slot_bytes = 2 * head_dim * stored.bits // 8  # a key and a value
    assert tiles.stages * tiles.warps * tiles.slots * slot_bytes <= 99 * 1024


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
