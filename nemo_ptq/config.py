# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a user can set: how to quantize, and what to export.

NeMo-Run serialises both dataclasses and parses their fields from the command line. They therefore hold exactly what
the user gave; what that means is answered by their properties, and whether it is right by :mod:`nemo_ptq.plan.rules`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Union  # noqa: UP035

NO_QUANT = "no_quant"
ALGORITHMS = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4", NO_QUANT)
CUSTOM = "custom"
"""What :attr:`QuantizationConfig.algorithm_name` says where the user gave a file."""
ALGORITHM_FILES = (".json", ".yaml", ".yml")
KV_CACHE_FORMATS = ("fp8",)
DATASETS = ("cnn_dailymail", "wikitext")
DATA_FILES = (".jsonl", ".json", ".txt")
DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "16": "float16", "fp16": "float16", "float16": "float16"}
"""The spellings of a data type, and torch's name for it."""


def is_text_file(dataset: str) -> bool:
    """Whether a data set's name is the path of a local file rather than the name of a hub data set."""
    return dataset.endswith(DATA_FILES) or "/" in dataset


def read_formats(value: object) -> tuple[str, ...]:
    """Reads `export_format`: a name, a list of names, or the text of one.

    Args:
        value: What the user gave.

    Returns:
        The names in their order, each once, whether there are such formats or not; empty where it is neither text nor
        a list of texts.

    Example:
        >>> read_formats("[trtllm, hf]")
        ('trtllm', 'hf')
    """
    if isinstance(value, str):
        text = value.strip()
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        value = [name.strip().strip("'\"") for name in inner.split(",")]
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        return ()
    return tuple(dict.fromkeys(value))


@dataclass
class QuantizationConfig:
    """How the model is quantized, and on which data it is calibrated.

    Attributes:
        algorithm: "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4", or "no_quant" (None means the same); or the path
            of a JSON or YAML file with a ModelOpt config.
        awq_block_size: Consecutive input features that share a weight scale, in the AWQ algorithms.
        sq_alpha: SmoothQuant's migration strength: 0 leaves the difficulty with the activations, 1 moves all of it
            to the weights.
        enable_kv_cache: Quantize the KV cache. None leaves it to the algorithm and the model: on for fp8, except on
            decoder type "gpt"; off otherwise.
        kv_cache_qformat: Format of a quantized KV cache: "fp8".
        calibration_dataset: "cnn_dailymail" or "wikitext" from the Hugging Face hub, or the path of a local .jsonl,
            .json or .txt file.
        calibration_dataset_size: Samples to calibrate on.
        calibration_batch_size: Samples in a batch.
        calibration_seq_len: Tokens at which a sample is cut.
        evaluation_dataset_size: Further samples of `calibration_dataset`, of at most 256 tokens each, on which the
            quantized model is compared with the unquantized one, for the report. 0 turns that off.
        layerwise: Keep one block of weights in memory at a time, for models larger than it. None does so where the
            weights do not fit.
    """

    algorithm: Optional[str] = "fp8"
    awq_block_size: int = 128
    sq_alpha: float = 0.5
    enable_kv_cache: Optional[bool] = None
    kv_cache_qformat: str = "fp8"
    calibration_dataset: str = "cnn_dailymail"
    calibration_dataset_size: int = 512
    calibration_batch_size: int = 64
    calibration_seq_len: int = 128
    evaluation_dataset_size: int = 8
    layerwise: Optional[bool] = None

    @property
    def algorithm_file(self) -> Optional[Path]:
        """The file with a ModelOpt config, where `algorithm` names one."""
        if self.algorithm is not None and self.algorithm.lower().endswith(ALGORITHM_FILES):
            return Path(self.algorithm).expanduser()
        return None

    @property
    def algorithm_name(self) -> str:
        """One of :data:`ALGORITHMS`, or :data:`CUSTOM` where `algorithm` is a file."""
        if self.algorithm is None:
            return NO_QUANT
        return CUSTOM if self.algorithm_file else self.algorithm

    @property
    def is_awq(self) -> bool:
        """Whether weights are 4-bit integers in blocks of `awq_block_size`."""
        return self.algorithm_name.endswith("_awq")

    @property
    def data_file(self) -> Optional[Path]:
        """The local file with the calibration data, where `calibration_dataset` names one."""
        return Path(self.calibration_dataset).expanduser() if is_text_file(self.calibration_dataset) else None

    def kv_cache_is_quantized(self, decoder: str) -> bool:
        """Whether the KV cache of a model of this decoder type is quantized.

        As in NeMo, an unset `enable_kv_cache` leaves "gpt" decoders alone.
        """
        if self.enable_kv_cache is None:
            return self.algorithm_name == "fp8" and decoder != "gpt"
        return self.enable_kv_cache


@dataclass
class ExportConfig:
    """What is written, and where.

    Attributes:
        path: The directory to make. Its parent exists.
        export_format: "trtllm": a qnemo directory, which is a TensorRT-LLM checkpoint with NeMo's tokenizer. A list of
            formats makes a subdirectory of `path` for each, named like it, from one calibration.
        dtype: Data type of what stays unquantized: "bf16" or "fp16".
        decoder_type: TensorRT-LLM's decoder: "llama", "gpt" or "gemma". None takes it from the model.
        inference_tp: Tensor parallelism of the exported model.
        inference_pp: Pipeline parallelism of the exported model.
        generate_sample: Show a few generated tokens after calibration.
        overwrite: Replace `path` if it exists.
        resume: Continue a run that was killed or has failed, after the last block that it had finished.
    """

    path: str
    export_format: Union[str, List[str]] = "trtllm"  # noqa: UP006
    dtype: str = "bf16"
    decoder_type: Optional[str] = None
    inference_tp: int = 1
    inference_pp: int = 1
    generate_sample: bool = False
    overwrite: bool = False
    resume: bool = False

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that `export_format` names."""
        return read_formats(self.export_format)

    @property
    def has_subdirectories(self) -> bool:
        """Whether each format gets a subdirectory: they do where a list is given, of whatever length."""
        return not isinstance(self.export_format, str) or self.export_format not in self.formats

    @property
    def torch_dtype_name(self) -> str:
        """The name that torch has for `dtype`: "bfloat16" or "float16"."""
        return DTYPES[str(self.dtype)]
