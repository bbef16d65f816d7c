# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a user can set: how to quantize, and what to export.

NeMo-Run serialises both dataclasses and parses their fields from the command line. They therefore hold exactly what
the user gave; what that means is answered by their properties, and whether it is right by :mod:`nemo_ptq.plan.rules`.
Each field declares how it is set from a command line, from which :mod:`nemo_ptq.options` makes its tables.
"""

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, List, Optional, Union  # noqa: UP035

NO_QUANT = "no_quant"
CUSTOM = "custom"
"""What :attr:`QuantizationConfig.algorithm_name` says where the user gave a file."""
ALGORITHM_FILES = (".json", ".yaml", ".yml")
FAST, BALANCED = "fast", "balanced"
QUALITIES = (FAST, BALANCED)
"""What `quality` can be, the quickest first."""
KV_CACHE_FORMATS = ("fp8",)
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


@dataclass(frozen=True)
class Setting:
    """How a field is set from a command line: the `setting` of its metadata.

    Attributes:
        kind: Which values it takes, by the names of :mod:`nemo_ptq.options`.
        help: What it is for; {names} stands for the values that have names.
        flags: Its flags in :mod:`nemo_ptq.script`, of which the first is what messages call it.
        off_flags: Flags that set it to false, where `flags` set it to true.
    """

    kind: str
    help: str
    flags: tuple[str, ...]
    off_flags: tuple[str, ...] = ()


def _setting(kind: str, help: str, *flags: str, off: tuple[str, ...] = (), default: Any = MISSING) -> Any:
    return field(default=default, metadata={"setting": Setting(kind, help, flags, off)})


@dataclass
class QuantizationConfig:
    """How the model is quantized, and on which data it is calibrated.

    Attributes:
        algorithm: "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4", or "no_quant" (None means the same); or the path
            of a JSON or YAML file with a ModelOpt config.
        quality: "fast" takes scales from largest magnitudes, or AWQ's search, and rounds weights to the nearest codes.
            None is "balanced" where that is available, and "fast" elsewhere.
            "balanced" chooses scales and codes together, by how close each layer comes to the unquantized model.
        awq_block_size: Consecutive input features that share a weight scale, in the AWQ algorithms.
        sq_alpha: SmoothQuant's migration strength: 0 leaves the difficulty with the activations, 1 moves all of it
            to the weights. None is 0.8; with quality "balanced" it is then chosen for each layer.
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

    algorithm: Optional[str] = _setting(
        "algorithm", "{names}, or a JSON or YAML file with a ModelOpt config", "--algorithm", "-algo", default="fp8"
    )
    quality: Optional[str] = _setting(
        "quality",
        "how much is computed to lose little: {names}; if not set, balanced where that is available",
        "--quality",
        default=None,
    )
    awq_block_size: int = _setting(
        "size", "input features that share a weight scale in AWQ", "--awq_block_size", "-awq_bs", default=128
    )
    sq_alpha: Optional[float] = _setting(
        "fraction",
        "SmoothQuant's migration strength, from 0 to 1; if not set, chosen by layer, or with quality=fast 0.8",
        "--sq_alpha",
        default=None,
    )
    enable_kv_cache: Optional[bool] = _setting(
        "switch",
        "quantize the KV cache; if not set, fp8 does except on decoder gpt",
        "--enable_kv_cache",
        off=("--disable_kv_cache",),
        default=None,
    )
    kv_cache_qformat: str = _setting(
        "KV cache format", "format of a quantized KV cache", "--kv_cache_qformat", default="fp8"
    )
    calibration_dataset: str = _setting(
        "data set",
        "{names}, or a local .jsonl, .json or .txt file",
        "--calibration_dataset",
        "-calib_ds",
        default="cnn_dailymail",
    )
    calibration_dataset_size: int = _setting(
        "size", "samples to calibrate on", "--calibration_dataset_size", "-calib_size", default=512
    )
    calibration_batch_size: int = _setting("size", "samples in a batch", "--batch_size", "-bs", default=64)
    calibration_seq_len: int = _setting("size", "tokens at which a sample is cut", "--seq_len", "-sl", default=128)
    evaluation_dataset_size: int = _setting(
        "count",
        "further samples on which the report compares with the unquantized model; 0 for none",
        "--evaluation_dataset_size",
        default=8,
    )
    layerwise: Optional[bool] = _setting(
        "switch",
        "keep one block of weights in memory at a time; if not set, where the weights do not fit",
        "--layerwise",
        off=("--resident",),
        default=None,
    )

    @property
    def algorithm_file(self) -> Optional[Path]:
        """The file with a ModelOpt config, where `algorithm` names one."""
        if self.algorithm is not None and self.algorithm.lower().endswith(ALGORITHM_FILES):
            return Path(self.algorithm).expanduser()
        return None

    @property
    def algorithm_name(self) -> str:
        """Name of an algorithm, or :data:`CUSTOM` where `algorithm` is a file."""
        if self.algorithm is None:
            return NO_QUANT
        return CUSTOM if self.algorithm_file else self.algorithm

    @property
    def is_balanced(self) -> bool:
        """Whether weights are rounded by what that does to the layers' outputs."""
        return self.quality == BALANCED

    @property
    def fixed_alpha(self) -> Optional[float]:
        """SmoothQuant's migration strength; None where it is chosen for each layer."""
        return 0.8 if self.sq_alpha is None and not self.is_balanced else self.sq_alpha

    @property
    def data_file(self) -> Optional[Path]:
        """The local file with the calibration data, where `calibration_dataset` names one."""
        return Path(self.calibration_dataset).expanduser() if is_text_file(self.calibration_dataset) else None


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

    path: str = _setting("path", "directory to make; required", "--export_path", "-out", "--output_path")
    export_format: Union[str, List[str]] = _setting(  # noqa: RUF009, UP006
        "formats", "{names}, or a list of them", "--export_format", default="trtllm"
    )
    dtype: str = _setting(
        "data type", "data type of what stays unquantized: bf16 or fp16", "--dtype", "-dt", default="bf16"
    )
    decoder_type: Optional[str] = _setting(
        "decoder", "{names}; if not set, that of the model's family", "--decoder_type", default=None
    )
    inference_tp: int = _setting(
        "size",
        "tensor parallelism of the exported model",
        "--inference_tp",
        "-itp",
        "--tensor_parallelism_size",
        default=1,
    )
    inference_pp: int = _setting(
        "size",
        "pipeline parallelism of the exported model",
        "--inference_pp",
        "-ipp",
        "--pipeline_parallelism_size",
        default=1,
    )
    generate_sample: bool = _setting(
        "switch", "show a few generated tokens after calibration", "--generate_sample", default=False
    )
    overwrite: bool = _setting(
        "switch", "replace an export that stands at export_config.path", "--overwrite", default=False
    )
    resume: bool = _setting(
        "switch",
        "continue a run that was killed or has failed, after its last finished block",
        "--resume",
        default=False,
    )

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
