# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A job whose arguments have been checked, as the engine runs it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.allowed_names import read_names
from nemo_ptq.config import CUSTOM, NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.home import without_home
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.algorithms import kv_cache_is_quantized
from nemo_ptq.quantization.excluded import unquantized_layers


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """Leaves out settings that do not change an export: whether the run is continued, and the server it is for."""
    return {name: value for name, value in settings.items() if name not in ("resume", "server")}


@dataclass(frozen=True)
class Job:
    """One run of the main job. Only :func:`nemo_ptq.plan.rules.check_job` makes these.

    Attributes:
        checkpoint: The NeMo 2.0 checkpoint or Hugging Face directory, absolute.
        metadata: The model, as the checkpoint's files describe it.
        output: The directory to make, absolute. With `export.overwrite` it may exist.
        quantization: How to quantize and calibrate.
        export: What to export.
        decoder: TensorRT-LLM's decoder type: the user's, else that of the model's family.
        calibration_tp: Tensor parallelism during calibration.
        calibration_pp: Pipeline parallelism during calibration.
        calibration_ep: Expert parallelism during calibration.
        num_layers_in_first_pipeline_stage: Layers of the first stage, where stages are uneven.
        num_layers_in_last_pipeline_stage: Layers of the last stage, where stages are uneven.
        forward_loop: The user's own calibration loop: called with the model, it runs it on data.
        tokenizer_path: A tokenizer to use in place of the checkpoint's.
        adapter: A LoRA adapter that is merged into the checkpoint's weights as they are read, absolute; None for none.
        calibration_state: File of a calibration to use in place of calibrating, or of the one that a quantized
            checkpoint was made with; `quantization` is then the configuration that it was made with.
        legacy_ckpt: Whether the checkpoint may come from another version of Transformer Engine.
        trust_checkpoint: Names of code that the checkpoint may have called, with commas between; see
            :func:`nemo_ptq.checkpoint.allowed_names.read_names`.
        fast_because: Why the quality is "fast" if the user has not set it.
        tracking: Where the figures go, beside the record of the run: `mlflow:URL`, `tensorboard:DIR`, `wandb:PROJECT`.
    """

    checkpoint: Path
    metadata: ModelSpec
    output: Path
    quantization: QuantizationConfig
    export: ExportConfig
    decoder: str
    calibration_tp: int = 1
    calibration_pp: int = 1
    calibration_ep: int = 1
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    forward_loop: Callable[[Any], Any] | None = None
    tokenizer_path: str | None = None
    adapter: Path | None = None
    calibration_state: Path | None = None
    legacy_ckpt: bool = False
    trust_checkpoint: str | None = None
    fast_because: str | None = None
    tracking: str | None = None

    def directories(self, root: Path) -> dict[str, Path]:
        """The directory of each format below `root`, which is where `output` is or will be."""
        formats = self.export.formats
        return {name: root / name if self.export.has_subdirectories else root for name in formats}

    @property
    def arguments(self) -> dict[str, Any]:
        """The task's arguments, nested as its configs are, paths absolute or below "~": exports hold them."""
        # A quantized checkpoint holds its own calibration: none is given with it.
        given = None if self.metadata.is_quantized else self.calibration_state
        arguments = {
            "nemo_checkpoint": str(self.checkpoint),
            "calibration_tp": self.calibration_tp,
            "calibration_pp": self.calibration_pp,
            "calibration_ep": self.calibration_ep,
            "num_layers_in_first_pipeline_stage": self.num_layers_in_first_pipeline_stage,
            "num_layers_in_last_pipeline_stage": self.num_layers_in_last_pipeline_stage,
            "forward_loop": None if self.forward_loop is None else getattr(self.forward_loop, "__qualname__", "yes"),
            "tokenizer_path": self.tokenizer_path,
            "calibration_state": None if given is None else str(given),
            "legacy_ckpt": self.legacy_ckpt,
            **({} if self.adapter is None else {"adapter": str(self.adapter)}),
            **({} if self.trust_checkpoint is None else {"trust_checkpoint": self.trust_checkpoint}),
            "quantization_config": asdict(self.quantization),
            "export_config": {**_lasting(asdict(self.export)), "path": str(self.output)},
        }
        return dict(without_home(arguments))

    @property
    def reads_data(self) -> bool:
        """Whether it calibrates on `calibration_dataset`."""
        is_calibrated = self.calibration_state is not None or self.metadata.is_quantized
        return self.quantization.algorithm_name != NO_QUANT and self.forward_loop is None and not is_calibrated

    @cached_property
    def unquantized(self) -> frozenset[str]:
        """Megatron's names of the linear layers that the user has left out of the quantization."""
        return unquantized_layers(self.quantization, self.metadata)

    @property
    def is_custom(self) -> bool:
        """Whether the algorithm is a ModelOpt configuration of the user's own."""
        return self.quantization.algorithm_name == CUSTOM

    @property
    def loading_options(self) -> dict[str, Any]:
        """How the model is built: arguments of :func:`nemo_ptq.checkpoint.loading.open_model`."""
        return {
            "tokenizer_path": self.tokenizer_path,
            "num_layers_in_first_pipeline_stage": self.num_layers_in_first_pipeline_stage,
            "num_layers_in_last_pipeline_stage": self.num_layers_in_last_pipeline_stage,
            "trusted": read_names(self.trust_checkpoint),
            "adapter": self.adapter,
        }

    @property
    def quantizes_kv_cache(self) -> bool:
        """Whether the KV cache is quantized."""
        return kv_cache_is_quantized(self.quantization, self.decoder)
