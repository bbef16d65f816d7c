# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's recipes are read as ModelOpt reads them, and are quantized as they say or refused by name."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.config import FAST, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.models.registry import family_of
from nemo_ptq.plan.rules.quantization_limits import algorithm_file_fits_formats, algorithm_file_fits_model
from nemo_ptq.plan.rules.quantization_limits import algorithm_file_is_config as is_config
from nemo_ptq.quantization.modelopt_file import ATTRIBUTES, METHODS, read_config
from nemo_ptq.quantization.modelopt_layers import quantized_by
from nemo_ptq.quantization.modelopt_recipes import find_recipe, read_recipe
from tests.plan.models import LLAMA_8B, MIXTRAL
from tests.ranks import run_ranks

PRESETS = "configs/ptq/presets/model/"
GENERAL = "general/ptq/"
QWEN = "huggingface/qwen3_5/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast.yaml"


def of(pattern: str, settings: str) -> str:
    """An entry of quant_cfg in YAML."""
    return f"- {{quantizer_name: '{pattern}', {settings}}}\n"


OFF = of("*", "enable: false")
FP8 = OFF + of("*weight_quantizer", "cfg: {num_bits: e4m3}") + of("*input_quantizer", "cfg: {num_bits: e4m3}")


def as_text(node: Any) -> Any:
    """With keys as JSON has them, and lists for tuples."""
    if isinstance(node, dict):
        return {str(key): as_text(value) for key, value in node.items()}
    return [as_text(item) for item in node] if isinstance(node, list | tuple) else node


def read_by_modelopt() -> tuple[dict[str, Any], set[str], dict[str, set[str]]]:
    """Every recipe and preset that ModelOpt itself can read; what quantizers and methods can be set to."""
    from modelopt.torch.opt.config import ModeloptBaseConfig
    from modelopt.torch.opt.config_loader import BUILTIN_CONFIG_ROOT, load_config
    from modelopt.torch.quantization import config as classes

    class Recipe(ModeloptBaseConfig):
        """As ModelOpt's class of them, whose module takes long to import."""

        metadata: dict[str, str]
        quantize: classes.QuantizeConfig

    root, found = Path(str(BUILTIN_CONFIG_ROOT)), {}
    for file in sorted(root.rglob("*/ptq/**/*.yaml")):
        is_preset = "presets" in file.parts
        try:
            if is_preset:
                read = load_config(file, schema_type=classes.QuantizeConfig)
            else:
                read = load_config(file, schema_type=Recipe).quantize
        except Exception:  # parts of recipes
            continue
        found[str(file.relative_to(root))] = as_text(read.model_dump(exclude_unset=True))
    methods = [each for each in vars(classes).values() if isinstance(each, type) and hasattr(each, "model_fields")]
    settings = {
        each.model_fields["method"].default: set(each.model_fields) for each in methods if "method" in each.model_fields
    }
    return found, set(classes.QuantizerAttributeConfig.model_fields), settings


def test_every_recipe_is_read_as_modelopt_reads_it() -> None:
    ((found, attributes, methods),) = run_ranks(read_by_modelopt, 1)
    assert len(found) > 80
    for name, expected in found.items():
        content = read_recipe(find_recipe(Path(name)))
        content = as_text(content.get("quantize", content))
        assert (content["quant_cfg"], content.get("algorithm")) == (expected["quant_cfg"], expected.get("algorithm")), (
            name
        )
    assert set(ATTRIBUTES) == attributes
    assert {name: set(keys) for name, keys in METHODS.items()} == {name: methods[name] for name in METHODS}


@pytest.mark.parametrize(
    ("name", "schemes", "caches"),
    [
        (GENERAL + "fp8_default-kv_fp8.yaml", {"fp8": 128}, True),
        (GENERAL + "fp8_default-kv_fp8_cast.yaml", {"fp8": 128}, True),
        (GENERAL + "nvfp4_mlp_only-kv_fp8.yaml", {"nvfp4": 64}, True),
        (GENERAL + "nvfp4_omlp_only-kv_fp8.yaml", {"nvfp4": 96}, True),  # *o_proj* is a name of Hugging Face's
        (GENERAL + "int4_blockwise_weight_only.yaml", {"int4_awq": 128}, False),
        (PRESETS + "w4a8_awq_beta.yaml", {"w4a8_awq": 128}, False),
        (PRESETS + "int8_smoothquant.yaml", {"int8_sq": 128}, False),
        (QWEN, {"fp8": 64, "w4a16_nvfp4": 64}, True),
    ],
)
def test_recipes_quantize_as_they_say(name: str, schemes: dict[str, int], caches: bool) -> None:
    found = quantized_by(read_config(Path(name)), LLAMA_8B)
    assert (Counter(found.schemes.values()), found.caches) == (schemes, caches)
    assert is_config(name) is None and algorithm_file_fits_model(name, None, 2, LLAMA_8B) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (GENERAL + "nvfp4_default-kv_none-gptq.yaml", "its algorithm is 'gptq': it changes weights"),
        (GENERAL + "nvfp4_experts_only-kv_fp8_layerwise.yaml", "its algorithm has layerwise"),
        (GENERAL + "nvfp4_act_headroom-kv_fp8_cast.yaml", "its algorithm is 'nvfp4_act_headroom'"),
        (
            "general/auto_quantize/nvfp4_fp8_at_5p4bits.yaml",
            "auto_quantize: give quantization_config.algorithm=auto",
        ),
        ("general/speculative_decoding/eagle3.yaml", "type speculative_eagle, and must be one of type ptq"),
        (PRESETS + "mxfp4.yaml", "weights of num_bits (2, 1), block 32, scale_bits (8, 0), is_dynamic True"),
        (PRESETS + "nvfp4_mlp_weight_only.yaml", "block 32, scale_bits (4, 3), is_dynamic True and inputs of 16 bits"),
        (PRESETS + "nvfp4_w4a4_weight_mse_fp8_sweep.yaml", "by algorithm mse, which is not exported from a file"),
        (PRESETS + "nvfp4_fp8_mha.yaml", "it quantizes attention itself (*q_bmm_quantizer)"),
        (GENERAL + "nvfp4_default-kv_nvfp4_cast.yaml", "only FP8 (num_bits: e4m3) for both is held"),
        ("huggingface/nemotron_llama/ptq/fp8_output_quant_proj.yaml", "it quantizes the output of decoder.layers.0."),
        (GENERAL + "nvfp4_experts_only-kv_fp8.yaml", "quantizes no linear layer of this model"),
        ("configs/ptq/presets/kv/fp8.yaml", "which ModelOpt then quantizes to INT8: begin with"),
        (GENERAL + "nope.yaml", "cannot be read: No such file"),
    ],
)
def test_what_no_export_holds_is_refused_before_the_job(name: str, problem: str) -> None:
    found = is_config(name) or algorithm_file_fits_model(name, None, 1, LLAMA_8B)
    assert found is not None and problem in found and "\n" not in found
    assert found.startswith(f"quantization_config.algorithm={name} ")


def write(directory: Path, **files: str) -> str:
    """Writes files called NAME.yaml; the path of the last one."""
    for name, content in files.items():
        (directory / f"{name}.yaml").write_text(content)
    return str(directory / f"{name}.yaml")


def test_files_are_imported_from_beside(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        bits="num_bits: e4m3\naxis:\n",
        both="imports: {b: bits}\n---\n"
        + of("*weight_quantizer", "cfg: {$import: b}")
        + of("*input_quantizer", "cfg: {$import: b}"),
        mine="imports: {none: configs/ptq/units/base_disable_all, both: both}\nmetadata: {recipe_type: ptq}\n"
        "quantize: {algorithm: max, quant_cfg: [$import: none, $import: both]}\n",
    )
    assert Counter(quantized_by(read_config(Path(name)), LLAMA_8B).schemes.values()) == {"fp8": 128}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a": "imports: {x: nothing}\nquant_cfg: [$import: x]\n"}, "imports nothing, which is neither beside it nor"),
        ({"a": "imports: {x: a}\nquant_cfg: [$import: x]\n"}, "is imported by itself"),
        ({"a": "imports: {x: b}\n", "b": "imports: {x: a}\n"}, "is imported by itself"),
        ({"a": "quant_cfg: [$import: x]\n"}, "has $import: x, which its imports do not name"),
        ({"a": "imports: [x]\nquant_cfg: [1]\n"}, "has imports ['x'], which must be an object"),
        ({"a": "imports: {x: 3}\nquant_cfg: [1]\n"}, "imports 3 as 'x', which must be the name of a file"),
        ({"b": "- 1\n", "a": "imports: {x: b}\nquant_cfg: {$import: x}\n"}, "imports the list 'x' where an object"),
        ({"a": "a: 1\n---\nb: 2\n---\nc: 3\n"}, "has 3 YAML documents"),
        ({"b": "[", "a": "imports: {x: b}\nquant_cfg: [$import: x]\n"}, "b.yaml is not YAML"),
    ],
)
def test_imports_that_lead_nowhere(files: dict[str, str], problem: str, tmp_path: Path) -> None:
    found = is_config(write(tmp_path, **files))
    assert found is not None and problem in found and "\n" not in found


def test_imports_do_not_multiply_without_end(tmp_path: Path) -> None:
    files = {"f0": "- 1\n" * 100}
    for level in range(1, 6):
        files[f"f{level}"] = f"imports: {{x: f{level - 1}}}\n---\n" + "- {$import: x}\n" * 100
    with pytest.raises(PtqError, match="a list of more than 10000 entries"):
        read_recipe(Path(write(tmp_path, **files)))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (
            of("*weight_quantizer", "cfg: {num_bit: 8}"),
            "has the key 'num_bit', which ModelOpt does not know: did you mean num_bits?",
        ),
        (
            of("*weight_quantizer", "config: {num_bits: 8}"),
            "the key 'config'",
        ),
        (
            "- {'*weight_quantizer': {num_bits: 8, axes: 0}}\n",
            "the key 'axes'",
        ),
        (of("*weight_quantizer", "cfg: [{num_bits: 4}, {typ: dynamic}]"), "the key 'typ'"),
        (of("*weight_quantizer", "cfg: [8]"), "has 8 for *weight_quantizer, which must be an object"),
    ],
)
def test_misspelt_keys_are_known_before_the_job(entries: str, problem: str, tmp_path: Path) -> None:
    found = is_config(write(tmp_path, a=f"algorithm: max\nquant_cfg:\n{entries}"))
    assert found is not None and problem in found and "\n" not in found


@pytest.mark.parametrize(
    ("algorithm", "problem"),
    [
        ("max", None),
        ("null", None),
        ("{method: smoothquant, alpha: 0.5}", None),
        (
            "{method: smoothquant, alpah: 0.5}",
            "its algorithm smoothquant has the key 'alpah'",
        ),
        ("maximum", "its algorithm is 'maximum': the methods whose results are exported are max, mse, smoothquant"),
        ("[max]", "its algorithm is ['max']"),
        ("{alpha: 0.5}", "its algorithm is None"),
    ],
)
def test_methods(algorithm: str, problem: str | None, tmp_path: Path) -> None:
    found = is_config(write(tmp_path, a=f"algorithm: {algorithm}\nquant_cfg:\n{OFF}"))
    assert (found is None) if problem is None else (found is not None and problem in found)


@pytest.mark.parametrize(
    ("entries", "pp", "problem"),
    [
        (FP8, 2, None),
        (FP8 + of("*layers.31.*", "enable: false"), 1, None),
        (
            FP8 + of("*layers.31.*", "enable: false"),
            2,
            "names a layer by its number (*layers.31.*)",
        ),
        (
            FP8 + of("*q_proj*", "enable: false"),
            1,
            "self_attn.q_proj and model.layers.0.self_attn.k_proj in two ways",
        ),
        (FP8 + of("*[qkv]_proj*", "enable: false"), 2, None),
        (FP8 + of("*output_quantizer", "cfg: {num_bits: 8}"), 1, "it quantizes the output of"),
        (
            FP8 + of("*[kv]_bmm_quantizer", "cfg: {num_bits: 8}"),
            1,
            "only FP8 (num_bits: e4m3)",
        ),
        (
            FP8 + of("*k_bmm_quantizer", "cfg: {num_bits: e4m3}"),
            1,
            "only FP8 (num_bits: e4m3)",
        ),
        (
            FP8 + of("*layers.0.*[kv]_bmm_quantizer", "cfg: {num_bits: e4m3}"),
            1,
            "the KV cache of some layers only",
        ),
        (FP8 + of("*weight_quantizer", "cfg: {num_bits: e4m3, unsigned: true}"), 1, "unsigned True"),
        (FP8 + of("*weight_quantizer", "cfg: {num_bits: e4m3, fake_quant: false}"), 1, "fake_quant False"),
        (FP8 + of("*weight_quantizer", "cfg: {num_bits: e4m3, fake_quant: true, narrow_range: true}"), 1, None),
        (
            FP8 + of("*weight_quantizer", "enable: false"),
            1,
            "weights of 16 bits and inputs of",
        ),
        (
            of("*mlp*", "cfg: {num_bits: e4m3}"),
            1,
            "it says nothing of the weight of",
        ),
    ],
)
def test_configurations_and_the_model(entries: str, pp: int, problem: str | None, tmp_path: Path) -> None:
    name = write(tmp_path, a=f"algorithm: max\nquant_cfg:\n{entries}")
    assert is_config(name) is None
    found = algorithm_file_fits_model(name, None, pp, LLAMA_8B)
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_a_kv_cache_is_not_asked_for_and_refused_at_once() -> None:
    found = algorithm_file_fits_model(GENERAL + "fp8_default-kv_fp8.yaml", False, 1, LLAMA_8B)
    assert found is not None and "enable_kv_cache=false: leave out one of both" in found


@pytest.mark.parametrize(
    ("name", "formats", "model", "problem"),
    [
        (GENERAL + "fp8_default-kv_fp8.yaml", ("trtllm", "hf"), LLAMA_8B, None),
        (
            PRESETS + "int8_smoothquant.yaml",
            ("trtllm", "hf"),
            LLAMA_8B,
            "int8_sq, which export_format=hf cannot",
        ),
        (
            "huggingface/qwen3_5/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast.yaml",
            ("trtllm",),
            LLAMA_8B,
            "in 2 ways (fp8, w4a16_nvfp4)",
        ),
        (
            GENERAL + "nvfp4_experts_only-kv_fp8.yaml",
            ("trtllm",),
            MIXTRAL,
            "quantizes experts as nvfp4",
        ),
        (GENERAL + "nvfp4_experts_only-kv_fp8.yaml", ("hf",), MIXTRAL, None),
    ],
)
def test_formats_hold_what_a_file_makes(name: str, formats: tuple[str, ...], model: Any, problem: str | None) -> None:
    family = family_of(model.config_class.rpartition(".")[2])
    found = algorithm_file_fits_formats(name, formats, model, family)
    assert (found is None) if problem is None else (found is not None and problem in found)


def export(checkpoint: Path, root: Path, recipes: dict[str, QuantizationConfig]) -> None:
    from tests import steps

    for name, quantization in recipes.items():
        steps.run_job(steps.job_of(checkpoint, quantization, root / name, formats=["hf"]))


def test_exports_of_recipes_have_the_bits_of_the_algorithms(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    recipes = {
        "fp8": QuantizationConfig("fp8", FAST, enable_kv_cache=True),
        "nvfp4": QuantizationConfig("nvfp4", FAST, enable_kv_cache=True),
        "recipe": QuantizationConfig(GENERAL + "fp8_default-kv_fp8.yaml"),
        "cast": QuantizationConfig(GENERAL + "fp8_default-kv_fp8_cast.yaml"),
        "omlp": QuantizationConfig(GENERAL + "nvfp4_omlp_only-kv_fp8.yaml"),
    }
    run_ranks(export, 1, checkpoint_of("llama32"), tmp_path, recipes)
    found = {name: load_file(tmp_path / name / "hf" / "model.safetensors") for name in recipes}
    assert found["recipe"].keys() == found["fp8"].keys() == found["cast"].keys()
    caches = {name for name in found["fp8"] if name.endswith(("k_scale", "v_scale"))}
    assert len(caches) == 4
    for name, tensor in found["fp8"].items():
        assert torch.equal(tensor.float(), found["recipe"][name].float())
        expected = torch.ones(()) if name in caches else tensor.float()
        assert torch.equal(found["cast"][name].float().reshape(expected.shape), expected)
    layer = "model.layers.1.self_attn"
    assert found["omlp"][f"{layer}.q_proj.weight"].dtype == torch.bfloat16
    for name in (f"{layer}.o_proj", "model.layers.0.mlp.up_proj"):
        for part in ("weight", "weight_scale", "weight_scale_2"):
            assert torch.equal(found["omlp"][f"{name}.{part}"].float(), found["nvfp4"][f"{name}.{part}"].float())
