"""Random inputs of `pq_ao::cache_attention` and their result in float64, for the tests of the op and of its kernels.

Shape suffixes: B batch, L queries, S slots, P prefix tokens, H query heads, G KV heads, D head dim.
"""

import torch

from pq_ao.ops import code_range, pack_int4


def sqnr(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Signal over error in dB."""
    expected, got = expected.double().cpu(), got.double().cpu()
    return float(20 * torch.log10(expected.norm() / (expected - got).norm().clamp_min(1e-300)))


class CacheCase:
    """One call of the op.

    Args:
        stored: "packed", "int8", "float32", "bfloat16" or "float16".
        scales: "static" or "per-token", both with shifts.
        start: slot of the first query.
        hidden: per row of the batch, how many of its first slots padding hides; None for no padding mask.
        spread: standard deviation of the queries; larger ones make sharper softmax.
    """

    def __init__(
        self, stored="packed", *, scales="static", batch=2, heads=4, groups=2, queries=1, start=11, slots=24, prefix=2,
        head_dim=16, hidden=None, dtype=torch.float32, spread=1.0, seed=0, device="cpu",
    ):  # fmt: skip
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        self.device = device
        self.query = (normal(batch, queries, heads, head_dim) * spread).to(dtype)
        self.prefix_key = normal(groups, prefix, head_dim).to(dtype)
        self.prefix_value = normal(groups, prefix, head_dim).to(dtype)
        self.scaling = head_dim**-0.5
        self.start = torch.tensor(start, device=device)
        self.visible = None
        if hidden is not None:
            self.visible = torch.arange(start + queries, device=device) >= torch.tensor(hidden, device=device)[:, None]
        body = (batch, groups, slots, head_dim)
        self.key_shift = self.value_shift = self.key_scale = self.value_scale = None
        if stored in ("packed", "int8"):
            low, high = code_range(4 if stored == "packed" else 8)
            codes = [
                torch.randint(low, high + 1, body, dtype=torch.int8, generator=generator, device=device)
                for _ in range(2)
            ]
            self.keys, self.values = (pack_int4(c) for c in codes) if stored == "packed" else codes
            shape = (groups,) if scales == "static" else (batch, groups, slots)
            spreads = [(0.5 + torch.rand(shape, generator=generator, device=device)) * 2 / high for _ in range(2)]
            self.key_scale, self.value_scale = spreads
            view = (1, groups, 1, 1) if scales == "static" else (*shape, 1)
            self.key64, self.value64 = (c.double() * s.double().view(view) for c, s in zip(codes, spreads, strict=True))
            self.key_shift, self.value_shift = normal(groups, 1, head_dim), normal(groups, 1, head_dim)
        else:
            self.keys, self.values = (normal(*body).to(getattr(torch, stored)) for _ in range(2))
            self.key64, self.value64 = self.keys.double(), self.values.double()
        self.out_shift = normal(heads * head_dim) * 0.1
        self.out_scale = torch.full((1,), 0.05, device=device)

    def args(self, bits: int | None = None, encoding: torch.dtype = torch.int8) -> tuple:
        """Arguments of the op; quantized to `bits` where they are given."""
        scale, shift = (None, None) if bits is None else (self.out_scale, self.out_shift)
        return (
            self.query, self.keys, self.values, self.key_scale, self.value_scale, self.key_shift, self.value_shift,
            self.prefix_key, self.prefix_value, self.start, self.visible, self.scaling, scale, shift, bits or 4,
            encoding,
        )  # fmt: skip

    def expected(self) -> torch.Tensor:
        """Head by head and in float64, with the shifts on the body: [B, L, H * D]."""
        batch, queries, heads, head_dim = self.query.shape
        groups, prefix = self.prefix_key.shape[:2]
        start = int(self.start)
        length = start + queries
        seen = torch.ones(queries, length, dtype=torch.bool, device=self.device).tril(diagonal=start)
        out = torch.zeros(batch, queries, heads, head_dim, dtype=torch.float64, device=self.device)
        for b in range(batch):
            visible = seen if self.visible is None else seen & self.visible[b, :length]
            visible = torch.cat((visible.new_ones(queries, prefix), visible), dim=1)
            for h in range(heads):
                g = h // (heads // groups)
                key, value = self.key64[b, g, :length], self.value64[b, g, :length]
                if self.key_shift is not None:
                    key, value = key + self.key_shift[g].double(), value + self.value_shift[g].double()
                key = torch.cat((self.prefix_key[g].double(), key))
                value = torch.cat((self.prefix_value[g].double(), value))
                scores = (self.query[b, :, h].double() @ key.T * self.scaling).masked_fill(~visible, -torch.inf)
                out[b, :, h] = torch.softmax(scores, dim=-1) @ value
        return out.flatten(2)
