# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""verify(): every check of a finished directory, from the manifest down to single scales, one line for each."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.verify import context, manifest
from nemo_ptq.verify.huggingface import hf_checks
from nemo_ptq.verify.huggingface.hf_directory import HuggingFaceDirectory, is_hugging_face
from nemo_ptq.verify.model_config import Config
from nemo_ptq.verify.nemo import megatron_model, nemo_checks
from nemo_ptq.verify.nemo.sharded_tensors import ShardedTensors
from nemo_ptq.verify.readers import REGISTERED, Check, Reader
from nemo_ptq.verify.tensor_file import TensorFile
from nemo_ptq.verify.trtllm import values
from nemo_ptq.verify.trtllm.config_rules import LAYOUT_RULES, OTHER_RULES
from nemo_ptq.verify.trtllm.expected_tensors import rank_tensors
from nemo_ptq.verify.trtllm.trtllm_reader import Checkpoint, open_checkpoint

# Problems that one check's line spells out; the rest are counted.
_SPELLED_OUT = 4

# Key of the free-form header metadata under which a rank file may say which rank it belongs to.
RANK_METADATA = "rank"


def verify(path: Path | str, load_tokenizer: bool = False, checksums: bool = True) -> list[Check]:
    """Checks an exported directory without NeMo, a GPU or a server, and without running anything that it names.

    Args:
        path: The directory.
        load_tokenizer: Also load the tokenizer with transformers or sentencepiece and use it once.
        checksums: Also read every file and compare its checksum; not needed right after they were computed.

    Returns:
        One entry for each check. Every problem with the files is an entry with ``ok`` false, never an exception. Checks
        that depend on a failed one are left out.
    """
    directory = Path(path)
    if not directory.is_dir():
        return [Check("directory", False, f"{directory} is not a directory")]
    reader = next(reader for reader in (*REGISTERED, *_READERS) if reader.recognises(directory))
    return [
        *_guarded("manifest", _manifest_checks(directory, checksums)),
        *_guarded(reader.name, reader.checks(directory, load_tokenizer)),
    ]


def _hugging_face(path: Path, load_tokenizer: bool) -> Iterator[Check]:
    return _guarded("config.json", _hugging_face_checks(HuggingFaceDirectory(path)))


def _nemo(path: Path, load_tokenizer: bool) -> Iterator[Check]:
    yield from _guarded("weights", _nemo_checks(path))
    yield from _guarded("tokenizer", _nemo_tokenizer_checks(path, load_tokenizer))


def _megatron(path: Path, load_tokenizer: bool) -> Iterator[Check]:
    yield from _guarded("weights", _megatron_checks(path))
    yield from _guarded("tokenizer", _megatron_tokenizer_checks(path, load_tokenizer))


def _qnemo(path: Path, load_tokenizer: bool) -> Iterator[Check]:
    yield from _guarded("config.json", _config_and_tensor_checks(path))
    yield from _guarded("tokenizer", _context_checks(path, load_tokenizer))


# A directory that is nothing else is checked as the first format that there was.
_READERS = (
    Reader("huggingface", is_hugging_face, _hugging_face),
    Reader("nemo", nemo_checks.is_nemo, _nemo),
    Reader("megatron", megatron_model.is_megatron, _megatron),
    Reader("trtllm", lambda directory: True, _qnemo),
)


def _hugging_face_checks(directory: HuggingFaceDirectory) -> Iterator[Check]:
    quantization = directory.quantization
    algorithm = quantization.algorithm if quantization else "unquantized"
    problems = hf_checks.config_problems(directory)
    yield _check("config.json", problems, f"{directory.config.get('model_type')}, {algorithm}")
    problems = hf_checks.tensor_problems(directory)
    yield _check("tensors", problems, f"{len(directory.expected)} with the promised types and shapes")
    if problems:
        yield Check("values", False, "not checked: the files do not hold what config.json promises")
    else:
        yield _check("values", hf_checks.value_problems(directory), "finite, scales positive")
        quantized = sum(1 for _ in directory.quantized)
        yield Check("quantized layers", True, f"{quantized} linear layers" if quantized else "none")
    yield _check("tokenizer", hf_checks.tokenizer_problems(directory), "encodes and decodes")


def _guarded(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Passes checks on; an exception ends them and becomes one that failed."""
    try:
        yield from checks
    except PtqError as error:
        yield Check(name, False, _one_line(str(error)))
    except Exception as error:
        # Files from outside can break any assumption, and the user should get a line instead of a traceback.
        yield Check(name, False, _one_line(f"cannot be checked: {type(error).__name__}: {error}"))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _check(name: str, problems: Sequence[str], fine: str) -> Check:
    if not problems:
        return Check(name, True, fine)
    more = len(problems) - _SPELLED_OUT
    detail = "; ".join(problems[:_SPELLED_OUT]) + (f"; and {more} more" if more > 0 else "")
    return Check(name, False, _one_line(detail))


def _manifest_checks(directory: Path, checksums: bool) -> Iterator[Check]:
    entries = manifest.read_manifest(directory)
    yield Check("manifest", True, f"{manifest.MANIFEST} lists {len(entries)} files")
    yield _check("files", manifest.file_problems(directory, entries), "exactly those of the manifest")
    if not checksums:
        return
    size = sum(entry.size for entry in entries.values())
    yield _check("checksums", manifest.checksum_problems(directory, entries), f"{size:,} bytes match")


def _nemo_checks(directory: Path) -> Iterator[Check]:
    files = ShardedTensors(directory)
    if problems := nemo_checks.missing_files(directory) or files.file_problems():
        yield _check("weights", problems, "")
        return
    model = context.read_model_yaml(directory).get("config")
    yield from _sharded_checks(directory / "weights", files, "context/model.yaml", model)


def _megatron_checks(directory: Path) -> Iterator[Check]:
    iteration = megatron_model.iteration_of(directory)
    options = megatron_model.read_options(iteration)
    files = megatron_model.read_tensors(iteration, options)
    if problems := files.file_problems():
        yield _check("weights", problems, "")
        return
    yield from _sharded_checks(iteration, files, f"what describes the model in {iteration.name}/", options)


def _sharded_checks(weights: Path, files: ShardedTensors, source: str, described: Any) -> Iterator[Check]:
    """Checks torch_dist files against the model that something beside them describes.

    Args:
        weights: Directory of the files.
        files: Their tensors.
        source: Name of the description, for messages.
        described: The model's fields, under NeMo's names.
    """
    stored = files.shapes
    model = nemo_checks.read_sizes(source, described, stored)
    yield Check("weights", True, f"{len(stored)} entries, all of their shards whole")
    yield _check("shapes", nemo_checks.weight_problems(model, stored), f"as {source} promises")
    if not model.has_quantizers and not (weights / "modelopt_state").exists():
        yield Check("coverage", True, "no layer is quantized")
        return
    problems = nemo_checks.quantizer_problems(weights, stored)
    yield _check("modelopt_state", problems, f"quantizers of {nemo_checks.quantized_layers(stored)} linear layers")


def _megatron_tokenizer_checks(directory: Path, load_tokenizer: bool) -> Iterator[Check]:
    path = megatron_model.tokenizer_of(directory)
    if path is None:
        yield Check("tokenizer", True, "none in it: Megatron-LM is told of one that is elsewhere")
        return
    yield _check("tokenizer", context.vocabulary_problems(path), f"in {path.parent.name}/{path.name}/")
    if load_tokenizer:
        yield _check("tokenizer round trip", context.round_trip_problems(path), "the text is unchanged")


def _nemo_tokenizer_checks(directory: Path, load_tokenizer: bool) -> Iterator[Check]:
    path = context.tokenizer_path(directory, context.read_model_yaml(directory))
    yield Check("tokenizer", True, f"restorable from {path.name} without NeMo")
    if load_tokenizer:
        yield _check("tokenizer round trip", context.round_trip_problems(path), "the text is unchanged")


def _config_and_tensor_checks(directory: Path) -> Iterator[Check]:
    checkpoint = open_checkpoint(directory)
    yield Check("config.json", True, "readable")
    failed = False
    for name, rule in {**LAYOUT_RULES, **OTHER_RULES}.items():
        problems = rule(checkpoint.raw_config, checkpoint.config)
        failed |= bool(problems) and name in LAYOUT_RULES
        yield _check(f"config.json: {name}", problems, "as the format requires")
    if failed:
        yield Check("tensors", False, "not checked: config.json does not say which there must be")
        return
    sound = True
    for check in _structure_checks(checkpoint):
        sound &= check.ok
        yield check
    if sound:
        yield from _value_checks(checkpoint)
        yield _coverage_check(checkpoint.config)
    else:
        yield Check("values", False, "not checked: the rank files do not hold what config.json promises")


def _structure_checks(checkpoint: Checkpoint) -> Iterator[Check]:
    world_size, tp_size = checkpoint.config.mapping.world_size, checkpoint.config.mapping.tp_size
    found = {
        int(match[1]): file
        for file in checkpoint.path.iterdir()
        if (match := re.fullmatch(r"rank(0|[1-9][0-9]*)\.safetensors", file.name))
    }
    problems = [f"{file.name} is beyond world_size {world_size}" for rank, file in found.items() if rank >= world_size]
    expected = {rank: file for rank, file in sorted(found.items()) if rank < world_size}
    if len(expected) < world_size:
        problems.append(f"{world_size - len(expected)} of {world_size} rank files are missing")
    strays = [file.name for file in checkpoint.path.glob("*.safetensors") if file not in found.values()]
    problems += [f"{name} is no rank's file" for name in strays]
    yield _check("rank files", problems, f"{world_size} of them")
    for rank, path in expected.items():
        yield from _guarded(path.name, _rank_checks(checkpoint.config, TensorFile(path), rank, rank // tp_size))


def _rank_checks(config: Config, file: TensorFile, rank: int, pp_rank: int) -> Iterator[Check]:
    name = file.path.name
    header = file.header
    layers = {match[1] for tensor in header if (match := re.match(r"transformer\.layers\.([^.]*)\.", tensor))}
    if len(layers) != config.layers_per_stage:
        # Said apart from the names: config.json may promise more layers than anybody wants to see listed.
        yield Check(f"{name}: names", False, f"{len(layers)} layers, config.json promises {config.layers_per_stage}")
        return
    specs = rank_tensors(config, pp_rank)
    missing = sorted(tensor for tensor, spec in specs.items() if not spec.optional and tensor not in header)
    extra = sorted(header.keys() - specs.keys())
    present = [(tensor, spec) for tensor, spec in specs.items() if tensor in header]
    yield _check(
        f"{name}: names",
        [f"{tensor} is missing" for tensor in missing] + [f"{tensor} is not expected" for tensor in extra],
        f"all of {len(header)} tensors",
    )
    yield _check(
        f"{name}: shapes",
        [
            f"{tensor} is {list(header[tensor][1])}, expected {list(spec.shape)}"
            for tensor, spec in present
            if header[tensor][1] != spec.shape
        ],
        "as config.json promises",
    )
    yield _check(
        f"{name}: dtypes",
        [
            f"{tensor} is {header[tensor][0]}, expected {spec.dtype}"
            for tensor, spec in present
            if header[tensor][0] != spec.dtype
        ],
        "as the algorithm demands",
    )
    # Tensor-parallel ranks have the same names and shapes: only the file itself can say which one it is.
    said = file.metadata.get(RANK_METADATA)
    problems = [f"its header says that it belongs to rank {said}"] if said not in (None, str(rank)) else []
    yield _check(f"{name}: rank", problems, "its header does not say which" if said is None else "its header agrees")


def _value_checks(checkpoint: Checkpoint) -> Iterator[Check]:
    for name, find_problems, fine in (
        ("values", values.finiteness_problems, "no NaN, no infinity"),
        ("scales", values.scale_problems, "positive and normal"),
        ("zeros", values.zero_problems, "no weight is all zero"),
        ("ranges", values.range_problems, "quantized weights fill the range of their codes, few are saturated"),
        ("ranks agree", values.agreement_problems, "on replicated tensors and copies of key and value heads"),
        ("padding", values.padding_problems, "zero where there is any"),
        ("shared embedding", values.tied_problems, "equal where there are copies"),
        ("KV cache scales", values.kv_scale_problems, "consistent where there are any"),
    ):
        yield from _guarded(name, _value_check(name, checkpoint, find_problems, fine))


def _value_check(
    name: str, checkpoint: Checkpoint, find_problems: Callable[[Checkpoint], list[str]], fine: str
) -> Iterator[Check]:
    yield _check(name, find_problems(checkpoint), fine)


def _coverage_check(config: Config) -> Check:
    """Which linear layers are quantized, and what keeps the others from it."""
    quantized: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for name, linear in values.model_linears(config):
        kind = re.sub(r"^transformer\.layers\.\d+\.", "", name)
        pattern = config.quantization.exclusion(linear.module)
        quantized.setdefault(kind, 0)
        if config.quantization.algorithm_of(linear.module):
            quantized[kind] += 1
        elif config.quantization.algorithm:
            reasons[kind] = f"excluded by {pattern}"
    if config.quantization.algorithm is None:
        return Check("coverage", True, "no layer is quantized: quant_algo is null")
    if config.lm_head_is_shared:
        reasons["lm_head"] = "shares the embedding"
    covered = [f"{kind} {count}/{config.num_hidden_layers}" for kind, count in quantized.items() if count]
    left = [f"{kind} ({reason})" for kind, reason in reasons.items()]
    left += ["embeddings and norms (never)"] + (["mlp.router (never)"] if config.moe else [])
    detail = f"{config.quantization.algorithm}: {', '.join(covered) or 'nothing'}; not: {', '.join(left)}"
    return Check("coverage", bool(covered), detail)


def _context_checks(directory: Path, load_tokenizer: bool) -> Iterator[Check]:
    model_yaml = context.read_model_yaml(directory)
    config = open_checkpoint(directory).config
    yield _check("context", context.config_problems(config, model_yaml), "config.json is of the model it describes")
    path = context.tokenizer_path(directory, model_yaml)
    yield _check("tokenizer", context.tokenizer_problems(path, config), f"restorable from {path.name} without NeMo")
    if load_tokenizer:
        yield _check("tokenizer round trip", context.round_trip_problems(path), "the text is unchanged")
