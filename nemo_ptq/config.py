# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a user can set: how to quantize, and what to export.

NeMo-Run serialises both dataclasses and parses their fields from the command line. They therefore hold exactly the
user's values; their properties interpret these, and :mod:`nemo_ptq.plan.rules` checks them. Each field declares how it
is set from a command line, from which :mod:`nemo_ptq.options` makes its tables.
"""

import os
import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, List, Optional, Union  # noqa: UP035

NO_QUANT = "no_quant"
AUTO = "auto"
"""The algorithm that chooses one of the others for each layer."""
CUSTOM = "custom"
"""The value of :attr:`QuantizationConfig.algorithm_name` where the user gave a file."""
ALGORITHM_FILES = (".json", ".yaml", ".yml")
FAST, BALANCED, MAX = "fast", "balanced", "max"
QUALITIES = (FAST, BALANCED, MAX)
"""The values of `quality`, the quickest first."""
FP8_CACHE, NVFP4_CACHE = "fp8", "nvfp4"
KV_CACHE_FORMATS = (FP8_CACHE, NVFP4_CACHE)
"""The values of `kv_cache_qformat`."""
DATA_FILES = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSED_FILES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")
# Endings of data files that are not supported, so that such a path is not taken for a name.
_OTHER_FILES = (*COMPRESSED_FILES, ".csv", ".tsv", ".arrow", ".yaml", ".yml", ".md")
BUILT_IN_DATA = "builtin"
"""The data set that is part of the package."""
DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "16": "float16", "fp16": "float16", "float16": "float16"}
"""The spellings of a data type, and torch's name for it."""


def is_algorithm_file(name: str) -> bool:
    """Whether an algorithm's name is a path, or the name of a ModelOpt recipe, whose ending may be left out."""
    return name.lower().endswith(ALGORITHM_FILES) or "/" in name


def is_data_file(name: str) -> bool:
    """Whether a data source's name is the path of a local file rather than the name of a data set."""
    return (
        name.lower().endswith((*DATA_FILES, *_OTHER_FILES))
        or name.startswith(("/", "./", "../", "~"))
        or name.count("/") > 1
    )


@dataclass(frozen=True)
class DataSource:
    """Where calibration samples come from.

    Attributes:
        name: A name of :data:`nemo_ptq.calibration.datasets.DATASETS`, "OWNER/NAME" on the Hugging Face hub, or the
            path of a local file.
        split: Split of a data set of the hub.
        config: Configuration of a data set of the hub; None is its default.
        column: The column or key with the text or the messages; None looks for the usual ones.
        weight: Its share of the samples, relative to the weights of the other sources.
    """

    name: str
    split: str = "train"
    config: Optional[str] = None
    column: Optional[str] = None
    weight: float = 1.0

    @property
    def is_file(self) -> bool:
        """Whether it is a local file."""
        return is_data_file(self.name)

    @property
    def is_on_hub(self) -> bool:
        """Whether it is named as a data set of the hub."""
        return "/" in self.name and not self.is_file


# The settings that may follow a source's name, and the beginning of the next source.
_DATA_SETTING = re.compile(r",(column|config|weight)=")
_OTHER_SETTING = re.compile(r",(\w+)=")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[^:,]+))?")


def read_sources(value: str) -> tuple[DataSource, ...]:
    """Reads `calibration_dataset`: sources with semicolons between.

    Args:
        value: The user's value.

    Raises:
        ValueError: If it is not valid; the message says why.

    Example:
        >>> read_sources("owner/talks:train_sft,column=messages,weight=3;builtin")[0].split
        'train_sft'
    """
    return tuple(_read_source(text.strip()) for text in value.split(";"))


def absolute_sources(value: str) -> str:
    """Names the local files of a sound `calibration_dataset` by their absolute paths."""
    texts = [text.strip() for text in value.split(";")]
    return ";".join(
        os.path.abspath(os.path.expanduser(text)) if source.is_file else text
        for text, source in zip(texts, read_sources(value), strict=True)
    )


def _check_name(name: str) -> None:
    """Refuses misspelled settings and URLs."""
    if "://" in name:
        raise ValueError(f"{name!r} is an address: download the file, and give its path")
    if (other := _OTHER_SETTING.search(name)) is not None and not name.lower().endswith(DATA_FILES):
        split = "; a split stands behind the name, as in OWNER/NAME:SPLIT" if other[1] == "split" else ""
        raise ValueError(f"{other[1]} is not a setting of a data set: it must be column, config or weight{split}")


def _read_source(text: str) -> DataSource:
    name, *pairs = _DATA_SETTING.split(text)
    settings: dict[str, Any] = dict(zip(pairs[::2], pairs[1::2], strict=True))
    _check_name(name)
    if not name or "" in settings.values() or len(settings) < len(pairs) // 2:
        raise ValueError(f"{text!r} is not NAME[:SPLIT][,column=COLUMN][,config=CONFIG][,weight=WEIGHT]")
    if "weight" in settings:
        try:
            settings["weight"] = float(settings["weight"])
        except ValueError:
            settings["weight"] = 0.0
        if not 0 < settings["weight"] < float("inf"):
            raise ValueError(f"the weight in {text!r} must be a number above zero")
    if is_data_file(name):
        if "config" in settings:
            raise ValueError(f"{text!r} is a local file, which has no config")
        return DataSource(name, **settings)
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        if "/" in name:
            raise ValueError(f"{name!r} is no name on the Hugging Face hub: write OWNER/NAME, or OWNER/NAME:SPLIT")
        if settings.keys() - {"weight"}:
            raise ValueError(f"{name!r} takes no column and no config: name a data set of the hub as OWNER/NAME")
        return DataSource(name, **settings)
    return DataSource(match["name"], match["split"] or "train", **settings)


def read_list(value: object) -> tuple[str, ...]:
    """Reads `export_format` or `exclude`: a name, a list of names, or the text of one.

    Args:
        value: The user's value.

    Returns:
        The names in their order, each once, whether there is anything of that name or not; empty if the value is
        neither a text nor a list of texts.

    Example:
        >>> read_list("[trtllm, hf]")
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
        help: Its purpose; {names} stands for the values that have names.
        flags: Its flags in :mod:`nemo_ptq.script`; messages use the first.
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
        algorithm: "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"; "fp8_dynamic", "int8_dynamic" or "w4a16_nvfp4",
            which need no data; "auto", which chooses for each layer; or "no_quant" (None means the same); or the path
            of a JSON or YAML file with a ModelOpt config or recipe, or the name of one of the recipes of ModelOpt.
        quality: "fast" takes scales from largest magnitudes, or AWQ's search, and rounds weights to the nearest codes.
            None is "balanced" where that is available, and "fast" elsewhere.
            "balanced" chooses scales and codes together, by how close each layer comes to the unquantized model.
            "max" has layers make up for the errors of those before, and compares on samples that are held out.
        awq_block_size: Consecutive input features that share a weight scale, in the AWQ algorithms.
        sq_alpha: SmoothQuant's migration strength: 0 leaves the difficulty with the activations, 1 moves all of it
            to the weights. None is 0.8; with quality "balanced" or "max" it is then chosen for each layer.
        enable_kv_cache: Quantize the KV cache. None leaves it to the algorithm and the model: on for fp8, except on
            decoder type "gpt"; off otherwise.
        kv_cache_qformat: Format of a quantized KV cache: "fp8", or in export format "hf" "nvfp4".
        kv_cache_only: Quantize the KV cache and no weights, which stay in 16 bits.
        exclude: Linear layers that stay unquantized: patterns of Megatron's or Hugging Face's names ("*down_proj*"),
            numbers of transformer layers ("0"), the "first2" or the "last1" of them.
        calibration_dataset: "cnn_dailymail" or "wikitext" from the Hugging Face hub, "builtin", which is part of this
            package, any data set of the hub as OWNER/NAME[:SPLIT][,column=COLUMN][,config=CONFIG], or the path of a
            local .jsonl, .json, .txt or .parquet file; several with semicolons between, each with ,weight=WEIGHT.
        calibration_dataset_size: Samples to calibrate on.
        calibration_batch_size: Samples in a batch.
        calibration_seq_len: Tokens at which a sample is cut.
        evaluation_dataset_size: Further samples of `calibration_dataset`, of at most 256 tokens each, on which the
            quantized model is compared with the unquantized one, for the report. 0 turns that off.
        layerwise: Keep one block of weights in memory at a time, for models larger than it. None does so where the
            weights do not fit.
        effective_bits: Bits of a weight on average over the layers that algorithm "auto" chooses for, scales counted.
            None aims at the export's `min_recovery`, with as few bits as reach it.
        candidates: The algorithms that "auto" chooses from, beside 16 bits: of "fp8", "int4_awq", "nvfp4" and
            "int8_dynamic" those that the formats mix. None takes what they mix of the first three.
    """

    algorithm: Optional[str] = _setting(
        "algorithm",
        "{names}, or a JSON or YAML file with a ModelOpt config, or the name of a ModelOpt recipe",
        "--algorithm",
        "-algo",
        default="fp8",
    )
    quality: Optional[str] = _setting(
        "quality",
        "how much work goes into losing little accuracy: {names}; if not set, balanced where that is available",
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
        "KV cache format", "format of a quantized KV cache: {names}", "--kv_cache_qformat", default=FP8_CACHE
    )
    kv_cache_only: bool = _setting(
        "switch",
        "quantize the KV cache alone, and leave the weights in 16 bits",
        "--kv_cache_only",
        default=False,
    )
    exclude: Union[str, List[str], None] = _setting(  # noqa: RUF009, UP006
        "patterns",
        "linear layers to leave unquantized: names with wildcards, numbers of transformer layers, firstN, lastN",
        "--exclude",
        default=None,
    )
    calibration_dataset: str = _setting(
        "data set",
        "{names}, OWNER/NAME[:SPLIT][,column=COLUMN] on the hub, or a local .jsonl, .json, .txt or .parquet file; "
        "several with semicolons between, each with ,weight=WEIGHT",
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
    effective_bits: Optional[float] = _setting(
        "bits",
        "with algorithm=auto: bits of a weight on average, scales counted, such as 6; if not set, as few as reach "
        "min_recovery",
        "--effective_bits",
        default=None,
    )
    candidates: Union[str, List[str], None] = _setting(  # noqa: RUF009, UP006
        "algorithms",
        "with algorithm=auto: the algorithms to choose from beside 16 bits; if not set, what the formats mix of fp8, "
        "int4_awq and nvfp4",
        "--candidates",
        default=None,
    )

    @property
    def algorithm_file(self) -> Optional[Path]:
        """The file with a ModelOpt config, or the name of a recipe of ModelOpt's, where `algorithm` is one."""
        if self.algorithm is not None and is_algorithm_file(self.algorithm):
            return Path(self.algorithm).expanduser()
        return None

    @property
    def algorithm_name(self) -> str:
        """Name of an algorithm, or :data:`CUSTOM` where `algorithm` is a file."""
        if self.algorithm is None:
            return NO_QUANT
        return CUSTOM if self.algorithm_file else self.algorithm

    @property
    def exclusions(self) -> tuple[str, ...]:
        """The patterns that `exclude` names."""
        return read_list([str(pattern) for pattern in self.exclude] if isinstance(self.exclude, list) else self.exclude)

    @property
    def candidate_names(self) -> tuple[str, ...]:
        """The algorithms that `candidates` names."""
        return read_list(self.candidates)

    @property
    def is_balanced(self) -> bool:
        """Whether weights are rounded by the effect on the layers' outputs: qualities "balanced" and "max"."""
        return self.quality in (BALANCED, MAX)

    @property
    def is_max(self) -> bool:
        """Whether layers make up for the errors of those before as well: quality "max"."""
        return self.quality == MAX

    @property
    def fixed_alpha(self) -> Optional[float]:
        """SmoothQuant's migration strength; None where it is chosen for each layer."""
        return 0.8 if self.sq_alpha is None and not self.is_balanced else self.sq_alpha

    @property
    def data_files(self) -> list[Path]:
        """The local files with calibration data that `calibration_dataset` names."""
        return [Path(source.name).expanduser() for source in self.data_sources if source.is_file]

    @property
    def has_built_in_data(self) -> bool:
        """Whether the samples come from the package's own data set alone."""
        return [source.name for source in self.data_sources] == [BUILT_IN_DATA]

    @property
    def data_sources(self) -> tuple[DataSource, ...]:
        """Where calibration samples come from; empty where `calibration_dataset` is not sound."""
        try:
            return read_sources(self.calibration_dataset)
        except (AttributeError, ValueError):
            return ()


@dataclass
class ExportConfig:
    """What is written, and where.

    Attributes:
        path: The directory to make. Its parent exists.
        export_format: "trtllm": a qnemo directory, which is a TensorRT-LLM checkpoint with NeMo's tokenizer. A list of
            formats makes a subdirectory of `path` for each, named like it, from one calibration.
        dtype: Data type of what stays unquantized: "bf16" or "fp16".
        decoder_type: TensorRT-LLM's decoder: "gpt", "llama", "gemma", "gemma2", "gemma3", "qwen2", "qwen3" or
            "qwen3_moe". None takes it from the model.
        inference_tp: Tensor parallelism of the exported model.
        inference_pp: Pipeline parallelism of the exported model.
        generate_sample: Show a few generated tokens after calibration.
        overwrite: Replace `path` if it exists.
        resume: Continue a run that was killed or has failed, after the last block that it had finished.
        server: What the export is for: "vllm", "tensorrt_llm", "tensorrt_llm_engines", "sglang" or "transformers". What
            it is not known to load is then refused; None warns of what the servers of the format refuse.
        min_recovery: The least perplexity of the unquantized model over that of the quantized one, from 0 to 1: below
            it the job fails, and `path` is not made. None reports the recovery and fails nothing. Algorithm "auto"
            without `effective_bits` chooses so that it is reached.
        keep_failed: Make `path` although the recovery is below `min_recovery`; the job fails all the same.
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
    server: Optional[str] = _setting(
        "server", "refuse what this server is not known to load: {names}", "--server", default=None
    )

    min_recovery: Optional[float] = _setting(
        "fraction",
        "fail the job if unquantized / quantized perplexity is below, and make no directory",
        "--min_recovery",
        default=None,
    )
    keep_failed: bool = _setting(
        "switch", "make the directory although the recovery is below min_recovery", "--keep_failed", default=False
    )

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that `export_format` names."""
        return read_list(self.export_format)

    @property
    def has_subdirectories(self) -> bool:
        """Whether each format gets a subdirectory: they do where a list is given, of whatever length."""
        return not isinstance(self.export_format, str) or self.export_format not in self.formats

    @property
    def torch_dtype_name(self) -> str:
        """The name that torch has for `dtype`: "bfloat16" or "float16"."""
        return DTYPES[str(self.dtype)]
