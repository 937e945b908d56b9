"""The linears and the embedding of a calibrated decoder: those that `quantize_` packs, and those that are kept."""

from torch import Tensor, nn

from pq_ao.config import PrefixQuantConfig
from pq_ao.ops import unscaled_linear
from pq_ao.ops.kernels.workspace import counters
from pq_ao.quantizers import ActivationQuantizer, FixedDtype, KVQuantizer, Path
from pq_ao.tensors import PackedWeight


class KeptEmbedding(FixedDtype, nn.Embedding):
    """The token embedding, which stays in high precision."""

    def __init__(self, weight: Tensor, padding_idx: int | None):
        nn.Embedding.__init__(self, *weight.shape, padding_idx=padding_idx, _weight=weight, _freeze=True)
        self.fixed_dtype = weight.dtype


class KeptLinear(FixedDtype, nn.Linear):
    """The language-model head, which stays in high precision and which `quantize_` passes over."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        nn.Linear.__init__(self, weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.fixed_dtype = weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., V] in the model's dtype."""
        # as rows: of the last token of each sequence, which do not lie together, PyTorch would make a product a
        # sequence, and each would read the whole weight
        rows = x.reshape(-1, x.shape[-1])
        return nn.functional.linear(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


class CalibratedLinear(FixedDtype, nn.Linear):
    """A linear of a decoder block. Calibration gives it final codes; `quantize_` puts them in place of the weight.

    Attributes:
        config: the scheme that it was calibrated for.
        packed: final codes and scales, a `PackedWeight`; None before calibration and after `quantize_`.
        packed_bias: float32 [N], the bias that goes with the codes, or None.
        quantizers: what goes over to integers together with this linear, its input's quantizer first; owned by the
            modules that feed it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        config: PrefixQuantConfig,
        quantizers: tuple[ActivationQuantizer | KVQuantizer, ...],
    ):
        nn.Linear.__init__(self, weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.fixed_dtype = weight.dtype
        self.config = config
        self.quantizers = quantizers
        self.path = Path.FLOAT
        self.register_buffer("packed", None)
        self.register_buffer("packed_bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N] in the model's dtype."""
        if self.path is not Path.REFERENCE:
            return nn.functional.linear(x, self.weight, self.bias)
        is_packed = isinstance(self.weight, PackedWeight)
        weight, bias = (self.weight, self.bias) if is_packed else (self.packed, self.packed_bias)
        shift = self.quantizers[0].shift
        x = x if shift is None else x - shift  # its product with the weight stands in the bias
        return nn.functional.linear(x.float(), weight.dequantize(), bias).to(self.fixed_dtype)

    def unscaled(self, x: Tensor) -> tuple[Tensor, tuple]:
        """What `forward` gives, and (); or, where that saves a pass over memory, what an op needs to make it itself.

        Returns:
            [..., N] in the model's dtype and (); or accumulators [..., N], see `unscaled_linear`, and (scale [N], bias
            [N] or None).
        """
        if self.path is Path.INTEGER:
            raw = unscaled_linear(x.qdata, x.scale, self.weight.qdata, self.weight.scale, self.fixed_dtype)
            if raw is not None:
                return raw[0], (raw[1], self.bias)
        return self(x), ()

    def pack_(self) -> None:
        """Drops the floating-point weight for the codes, and sends this linear and its quantizers over to integers."""
        self.weight = nn.Parameter(self.packed, requires_grad=False)
        self.bias = None if self.packed_bias is None else nn.Parameter(self.packed_bias, requires_grad=False)
        self.packed = self.packed_bias = None
        self.compute_on_integers_()

    def compute_on_integers_(self) -> None:
        """Sends this linear, whose weight is packed, and its quantizers over to integers."""
        counters(self.weight.device)  # must exist before a CUDA graph is recorded
        for module in (self, *self.quantizers):
            module.path = Path.INTEGER

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        incoming = state_dict.get(f"{prefix}weight")
        error_msgs = args[-1]
        is_packed = isinstance(self.weight, PackedWeight)
        if incoming is not None and isinstance(incoming, PackedWeight) != is_packed:
            error_msgs.append(
                f"{prefix}weight is floating point in the state_dict, but this model is quantized: "
                "load it before `quantize_`."
                if is_packed
                else f"{prefix}weight is quantized (PackedWeight) in the state_dict, but this model's is not: "
                "call `quantize_(model, config)` before load_state_dict."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
