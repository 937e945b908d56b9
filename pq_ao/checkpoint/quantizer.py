"""The quantization method "prefixquant" of transformers: its hooks in `save_pretrained` and `from_pretrained`.

Imported while transformers is being imported (see `pq_ao.registration`), so whatever is large is imported in the hooks.
"""

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from pq_ao.checkpoint.config import HINT, QUANT_METHOD, CheckpointConfig

register_quantization_config(QUANT_METHOD)(CheckpointConfig)


@register_quantizer(QUANT_METHOD)
class PrefixQuantizer(HfQuantizer):
    """Saves and loads quantized models; it never quantizes, for that takes `calibrate` and `quantize_`."""

    requires_calibration = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: CheckpointConfig | None, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._expected: dict[str, torch.Tensor] = {}
        self._files: dict[str, str] = {}
        self._record = None

    def is_serializable(self) -> bool:
        """Always; what cannot be saved raises in `get_state_dict_and_metadata`, which knows the model."""
        return True

    def validate_environment(self, device_map: Any = None, weights_only: bool = True, **kwargs) -> None:
        """Refuses to unpickle, and to spread a model over devices.

        Raises:
            ValueError: `weights_only=False`, or a `device_map` of several devices or of the disk.
        """
        if not weights_only:
            raise ValueError("weights_only=False: a prefixquant checkpoint holds nothing to unpickle; leave it out.")
        if isinstance(device_map, dict):
            devices = set(map(str, device_map.values()))
            if len(devices) > 1 or "disk" in devices:
                raise ValueError(
                    f"device_map={device_map}: a prefixquant model is on one device; pass device_map='cuda' or 'cpu'."
                )

    def update_device_map(self, device_map: Any) -> Any:
        """ "auto" and its kin, which could choose several devices, become the first one."""
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            accelerator = torch.accelerator.current_accelerator(check_available=True)  # not what PyTorch was built for
            return {"": torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Scales and codes belong to the dtype that the model was calibrated in.

        Raises:
            ValueError: another dtype is asked for.
        """
        saved = self.quantization_config.dtype
        if dtype != getattr(torch, saved):
            raise ValueError(
                f"dtype={dtype}: this checkpoint is in torch.{saved}, and a calibrated model cannot be converted. "
                "Leave `dtype` out; if it was, restore config.json, whose own dtype is another one."
            )
        return dtype

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs) -> None:
        from pq_ao.checkpoint.config import check_scheme
        from pq_ao.checkpoint.record import record_from_facts
        from pq_ao.checkpoint.skeleton import build_skeleton
        from pq_ao.checkpoint.validation import check_files, check_prefix

        config = self.quantization_config
        if checkpoint_files is None:
            raise ValueError(
                "state_dict: a prefixquant checkpoint is loaded from its folder only, whose files are checked; or call "
                "load_state_dict on a model that was quantized alike."
            )
        check_prefix(config, model.config.vocab_size)
        if config.calibration is not None:
            self._record = record_from_facts(config.calibration, check_scheme(config.scheme), config.prefix_ids)
        build_skeleton(model, config)
        self._expected = model.state_dict()
        self._files = check_files(checkpoint_files, self._expected, config, model.config.name_or_path)

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        from pq_ao.checkpoint.skeleton import assemble
        from pq_ao.checkpoint.validation import check_values

        check_values(model, self._expected, self._files, self.quantization_config)
        assemble(model, self.quantization_config)
        if self._record is not None:
            model.calibration_record = self._record
        self._expected, self._files, self._record = {}, {}, None
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights  # names a file of the folder that was loaded, see `saving`

    def get_state_dict_and_metadata(self, model) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: tensors by their original names, and what stands beside them in each file.

        `model.config` gets the `quantization_config` that belongs to them.

        Raises:
            ValueError: the model is not quantized.
        """
        from pq_ao.checkpoint.description import describe
        from pq_ao.checkpoint.names import stored_tensors
        from pq_ao.fingerprint import fingerprint

        config = describe(model)
        tensors = stored_tensors(model)
        config.tensors_sha256 = fingerprint(tensors.items())
        model.config.quantization_config = self.quantization_config = config
        return tensors, {"pq_ao": HINT, "tensors_sha256": config.tensors_sha256}


def attach(model) -> None:
    """Lets `model.save_pretrained` find the quantizer of a calibrated model."""
    model.hf_quantizer = PrefixQuantizer(None)
