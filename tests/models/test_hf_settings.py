# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A config.json is read completely: both spellings, and nothing that changes a model is passed over."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_ptq.errors import PtqError
from nemo_ptq.models.hugging_face import HuggingFaceClass
from nemo_ptq.models.registry import class_of_architecture
from nemo_ptq.models.spec import LongRope
from tests.families import FAMILIES

ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model, as transformers writes it."""
    import transformers

    record = FAMILIES[family]
    config = getattr(transformers, record.config)(**{**record.arguments, record.layers: 2, **changes})
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return {**config.to_dict(), "architectures": [model.__name__]}


def class_of(config: dict[str, Any]) -> HuggingFaceClass:
    return class_of_architecture(config["architectures"][0])


def in_new_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The same as transformers 5 writes it."""
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    parameters = {name: config[name] for name in ROTARY if name in config and name != "rope_scaling"}
    others = {name: value for name, value in config.items() if name not in ROTARY}
    return {**others, "rope_parameters": {**parameters, **scaling}}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"starcoder"}))  # which has learned positions
def test_both_spellings_are_the_same_model(family: str) -> None:
    config = config_of(family, rope_theta=654321.0)
    new = in_new_spelling(config)
    assert "rope_theta" not in new
    hf_class = class_of(config)
    expected = hf_class.nemo_arguments(hf_class.read(config))
    assert expected[1]["rotary_base"] == 654321.0
    assert hf_class.nemo_arguments(hf_class.read(new)) == expected
    assert hf_class.nemo_arguments(hf_class.read({**config, **new})) == expected, "both in one file"


def test_a_file_of_transformers_5() -> None:
    """What a Llama 3.2 has in the new spelling."""
    rope = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rope_parameters": rope, **sizes}
    hf_class = class_of(config)
    name, common, special = hf_class.nemo_arguments(hf_class.read(config))
    assert (name, common["rotary_base"]) == ("Llama31Config", 500000.0)
    assert special | {"vocab_size": 0} == {
        "vocab_size": 0,
        "scale_factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "old_context_len": 8192,
    }


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def long_rope_of(**changes: Any) -> LongRope:
    """What is read from the config.json of a Phi with a longrope."""
    config = {**config_of("phi3"), "original_max_position_embeddings": 64, "rope_scaling": LONGROPE, **changes}
    hf_class = class_of(config)
    found = hf_class.nemo_arguments(hf_class.read(config))[2]["long_rope"]
    assert isinstance(found, LongRope)
    return found


def test_longrope() -> None:
    found = long_rope_of()
    assert (found.short_factors, found.long_factors, found.context) == ((1.0,) * 16, (2.0,) * 16, 64)
    assert found.attention_factor == pytest.approx(math.sqrt(1 + 1 / 3))  # 256 positions of 64
    new = {name: value for name, value in LONGROPE.items() if name != "type"} | {"rope_type": "longrope"}
    new |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
    assert long_rope_of(rope_scaling=None, rope_parameters=new) == found, "as transformers 5 writes it"
    assert long_rope_of(rope_parameters=new) == found, "both in one file"
    assert long_rope_of(max_position_embeddings=64).attention_factor == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"type": "su"},
            "rope_scaling of type 'su'; Phi 3 and 4 know longrope: early files call longrope su, write ",
        ),
        ({"type": "yarn"}, "rope_scaling of type 'yarn'; Phi 3 and 4 know longrope: if it was added for longer texts"),
        ({"short_mscale": 1.2}, "rope_scaling of type 'longrope' with short_mscale, which Phi 3 and 4 do not have"),
        ({"short_factor": [1.0] * 15}, "rope_scaling with short_factor [1.0, 1.0, "),
        (
            {"long_factor": None},
            "rope_scaling with long_factor None: it must be a list of 16 numbers, one for every ",
        ),
        ({"long_factor": [0.0] * 16}, "rope_scaling.long_factor 0.0: it must be a number above 0"),
        ({"original_max_position_embeddings": 32}, "original_max_position_embeddings 64 and, for the rotary embedding"),
    ],
)
def test_a_longrope_that_no_model_has_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PtqError) as caught:
        long_rope_of(rope_scaling={**LONGROPE, **changes})
    assert said in str(caught.value)
    assert len(str(caught.value)) < 260


def test_two_rotary_embeddings_in_the_new_spelling() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = config_of("gemma3", rope_theta=5e5, rope_local_base_freq=3e4, rope_scaling=scaling)
    new = {name: value for name, value in old.items() if name not in (*ROTARY, "rope_local_base_freq")}
    own = {"rope_type": "default", "rope_theta": 3e4}
    new["rope_parameters"] = {"full_attention": {**scaling, "rope_theta": 5e5}, "sliding_attention": own}
    hf_class = class_of(old)
    expected = hf_class.nemo_arguments(hf_class.read(old))
    assert expected[2]["rotary_base"] == (3e4, 5e5) and expected[2]["rope_scaling_factor"] == 8.0
    assert hf_class.nemo_arguments(hf_class.read(new)) == expected
    with pytest.raises(
        PtqError, match="there must be full_attention, and sliding_attention with a rope_theta and no scaling"
    ):
        hf_class.read({**new, "rope_parameters": {**new["rope_parameters"], "sliding_attention": scaling}})


def test_two_bases_of_layers_with_a_window_agree() -> None:
    old = config_of("gemma3")
    hf_class, expected = class_of(old), class_of(old).nemo_arguments(class_of(old).read(old))
    base = {"rope_type": "default", "rope_theta": old["rope_theta"]}
    for local in ({"rope_type": "default"}, {"rope_type": "default", "rope_theta": 1e4}):
        both = {**old, "rope_parameters": {"full_attention": base, "sliding_attention": local}}
        assert hf_class.nemo_arguments(hf_class.read(both)) == expected
        del both["rope_local_base_freq"]
        assert hf_class.nemo_arguments(hf_class.read(both)) == expected, "transformers' default"
    local = {"rope_type": "default", "rope_theta": 2e4}
    with pytest.raises(
        PtqError, match=r"has rope_local_base_freq 10000\.0 and, for layers with a window, rope_theta 2"
    ):
        hf_class.read({**old, "rope_parameters": {"full_attention": base, "sliding_attention": local}})


def test_layers_of_gemma_3_are_read_from_their_list_alone() -> None:
    config = config_of("gemma3", num_hidden_layers=5, sliding_window_pattern=3)
    hf_class = class_of(config)
    expected = hf_class.nemo_arguments(hf_class.read(config))
    assert expected[2]["interleaved_attn_pattern"] == (2, 1)
    others = {name: value for name, value in config.items() if "sliding_window_pattern" not in name}
    assert others["layer_types"].count("full_attention") == 1
    assert hf_class.nemo_arguments(hf_class.read(others)) == expected
    for types in (["full_attention"] * 5, [*config["layer_types"][:4], "full_attention"], "full_attention"):
        with pytest.raises(PtqError, match="has layer_types "):
            hf_class.read({**others, "layer_types": types})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_file_leaves_out_is_what_transformers_fills_in(family: str) -> None:
    import transformers

    config = config_of(family)
    hf_class, theirs = class_of(config), getattr(transformers, FAMILIES[family].config)
    own = {*hf_class.defaults, *hf_class.fields.values(), *hf_class.fixed, "num_key_value_heads", "head_dim"}
    counted = {"num_hidden_layers", "n_layer"}  # of which other settings have one item each
    for name in sorted((own & config.keys()) - counted):
        given = {key: value for key, value in config.items() if key != name}
        assert model_of(hf_class, given) == model_of(hf_class, filled(theirs, given)), name


def model_of(hf_class: HuggingFaceClass, config: dict[str, Any]) -> Any:
    """NeMo's configuration class of a model and its arguments, or why there is none."""
    try:
        name, common, special = hf_class.nemo_arguments(hf_class.read(config))
    except PtqError as error:
        return str(error)
    return name, {**common, **special}


def filled(config_class: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what transformers fills in."""
    return {**config_class.from_dict(dict(given)).to_dict(), "architectures": given["architectures"]}


def test_switches_that_are_null_are_off() -> None:
    config = config_of("llama2") | {"attention_bias": None, "mlp_bias": None, "tie_word_embeddings": None}
    config |= {"quantization_config": None, "is_causal": True, "layer_types": None}
    assert not class_of(config).read(config)["tie_word_embeddings"]


def test_the_number_of_experts_has_two_names() -> None:
    config = config_of("qwen3_moe")
    hf_class, others = class_of(config), {name: value for name, value in config.items() if name != "num_experts"}
    expected = hf_class.nemo_arguments(hf_class.read(config))
    assert expected[2]["num_moe_experts"] == 8
    assert hf_class.nemo_arguments(hf_class.read({**others, "num_local_experts": 8})) == expected, "transformers 5"
    assert hf_class.nemo_arguments(hf_class.read({**config, "num_local_experts": 8})) == expected
    with pytest.raises(PtqError, match="has num_experts 8 and num_local_experts 4, which are one setting: leave the"):
        hf_class.read({**config, "num_local_experts": 4})


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", None), ("num_hidden_layers", 0)])
def test_a_size_is_looked_at_before_it_is_counted_with(name: str, value: Any) -> None:
    config = {**config_of("gemma3"), name: value}
    with pytest.raises(PtqError, match=f"has {name} {value}, which is no size"):
        class_of(config).read(config)


def test_the_rotated_share_of_a_head_is_read_from_the_new_spelling() -> None:
    config = in_new_spelling(config_of("nemotron", partial_rotary_factor=0.25))
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.25
    hf_class = class_of(config)
    assert hf_class.nemo_arguments(hf_class.read(config))[1]["rotary_percent"] == 0.25


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_setting_of_transformers_own_class_is_known(family: str) -> None:
    config = config_of(family)
    assert len(config) > 60
    class_of(config).read(config)


def test_settings_of_published_files_are_known() -> None:
    """Some that transformers' classes do not have, or no longer."""
    starcoder2 = {"attention_softmax_in_fp32": True, "layer_norm_epsilon": 1e-5, "mlp_type": "default"}
    starcoder2 |= {"norm_type": "layer_norm", "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True}
    starcoder = {"inference_runner": 0, "max_batch_size": None, "pad_key_length": True, "summary_type": "cls_index"}
    llama = {"pretraining_tp": 1, "_name_or_path": "a/b", "unsloth_version": "2024.9", "max_length": 4096}
    qwen2 = {"max_window_layers": 24, "sliding_window": 32768, "use_mrope": False, "use_sliding_window": False}
    gemma2 = {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096}
    gemma3 = {"cache_implementation": "hybrid", "sliding_window_pattern": 2, "rope_local_base_freq": 10000}
    phi3 = {"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rope_scaling": None}
    new = {"qwen2": qwen2, "gemma2": gemma2, "gemma3": gemma3, "phi3": phi3}
    old = {"starcoder2": starcoder2, "starcoder": starcoder, "llama31": llama}
    for family, more in (old | new).items():
        config = config_of(family)
        class_of(config).read(config | more)


REFUSED = {
    "made up": ({"residual_multiplier": 0.22}, "has residual_multiplier 0.22: the import of LlamaForCausalLM does not"),
    "two": ({"logit_scale": 0.1, "qk_norm": True}, "has logit_scale 0.1, qk_norm True: "),
    "of another class": ({"scale_attn_weights": False}, "has scale_attn_weights False: "),
    "not as a flag": ({"use_qk_norm": 0}, "has use_qk_norm 0: "),
    "rotated in part": ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5: "),
    "windows in some layers": ({"layer_types": ["sliding_attention", "full_attention"]}, "has layer_types ["),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
    "yarn, new": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "rope_scaling of type 'yarn'",
    ),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
    "more to a scaling": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 0.7}},
        "of type 'linear' with attention_factor",
    ),
    "no factor": ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "rope_scaling.factor nan: it must be"),
    "no object": ({"rope_parameters": "llama3"}, "has rope_parameters 'llama3': it must be an object"),
    "two bases": ({"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}, "rope_theta 10000.0 and, for"),
    "two scalings": (
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        "contradict one another",
    ),
    "no heads": ({"num_attention_heads": 0}, "has num_attention_heads 0, which is no size"),
    "a size as text": ({"hidden_size": "256"}, "has hidden_size '256', which is no size"),
    "a yes as a size": ({"num_hidden_layers": True}, "has num_hidden_layers True, which is no size"),
    "no epsilon": ({"rms_norm_eps": None}, "has rms_norm_eps None: it must be a number above 0"),
    "epsilon NaN": ({"rms_norm_eps": math.nan}, "has rms_norm_eps nan: it must be a number above 0"),
    "endless base": ({"rope_theta": math.inf}, "has rope_theta inf: it must be a number above 1"),
    "uneven groups": ({"num_key_value_heads": 3}, "num_key_value_heads 3, which does not divide 8"),
    "tied as text": ({"tie_word_embeddings": "false"}, "has tie_word_embeddings 'false': it must be true or false"),
    "another activation": ({"hidden_act": "swish"}, "can only have 'silu': if the model was trained with that, it ca"),
    "not causal": ({"is_causal": False}, "has is_causal False: "),
    "yarn's way out": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "if it was added for longer texts, take it "),
    "biases": ({"attention_bias": True}, "has attention_bias True, but NeMo's LlamaModel can only have False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_model_is_refused_by_name(case: str) -> None:
    changes, said = REFUSED[case]
    config = config_of("llama2")
    with pytest.raises(PtqError) as caught:
        class_of(config).read(config | changes)
        hf_class = class_of(config)
        hf_class.nemo_arguments(hf_class.read(config | changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_refuses_what_it_does_not_know(family: str) -> None:
    config = config_of(family)
    with pytest.raises(PtqError, match=r"has secret_gate True: .* take it out of config\.json if it changes nothing"):
        class_of(config).read({**config, "secret_gate": True})
    class_of(config).read({**config, "secret_gate": None})


def test_a_window_in_every_layer_may_be_said_layer_by_layer() -> None:
    config = config_of("mistral", sliding_window=64)
    assert class_of(config).read({**config, "layer_types": ["sliding_attention"] * 2})["sliding_window"] == 64
    with pytest.raises(PtqError, match="layer_types"):
        class_of(config).read({**config, "layer_types": ["full_attention"] * 2})


@pytest.mark.parametrize("family", ["mistral", "phi3", "starcoder2", "gemma2", "gemma3"])
@pytest.mark.parametrize("value", [0, -1, False, "64", None])
def test_a_window_is_a_size_or_null(family: str, value: Any) -> None:
    config = {**config_of(family), "sliding_window": value}
    hf_class = class_of(config)
    if value is None and "gemma" not in family:  # whose layers differ in it
        assert "window_size" not in {k: v for k, v in hf_class.nemo_arguments(hf_class.read(config))[2].items() if v}
        return
    with pytest.raises(PtqError, match=f"has sliding_window {value!r}, which is no size: it must be a positive whole"):
        hf_class.nemo_arguments(hf_class.read(config))


@pytest.mark.parametrize("value", ["</s>", ["</s>"], True, 2.0, [], {"id": 2}])
def test_special_tokens_are_numbers(value: Any) -> None:
    config = config_of("llama2")
    with pytest.raises(PtqError, match=r"has eos_token_id .*: it must be a token's number, a list of them, or null"):
        class_of(config).read({**config, "eos_token_id": value})
    for allowed in (None, 2, [2, 7]):
        class_of(config).read({**config, "eos_token_id": allowed, "pad_token_id": -1})


def test_a_window_does_not_shorten_the_sequences() -> None:
    config = config_of("mistral", sliding_window=64, max_position_embeddings=256)
    hf_class = class_of(config)
    _, common, special = hf_class.nemo_arguments(hf_class.read(config))
    assert {**common, **special}["seq_length"] == 256
    assert special["window_size"] == [64, 0]


def test_gemma_computes_the_approximation_alone() -> None:
    config = config_of("gemma")
    for activation in ("gelu", "gelu_pytorch_tanh"):  # what early files call it
        class_of(config).read({**config, "hidden_act": activation, "hidden_activation": None})
    with pytest.raises(PtqError, match="hidden_activation 'gelu'"):
        class_of(config).read({**config, "hidden_activation": "gelu"})


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "has num_experts_per_tok 9, and only 8 experts"),
        ("mixtral", {"num_experts_per_tok": None}, "has num_experts_per_tok None, which is no size"),
        ("mixtral", {"num_local_experts": None}, "has num_local_experts None, which is no size"),
        ("qwen3_moe", {"num_experts": 2}, "has num_experts_per_tok 3, and only 2 experts"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "has moe_intermediate_size None, which is no size"),
    ],
)
def test_experts_are_as_many_as_a_model_can_have(family: str, changes: dict[str, Any], said: str) -> None:
    config = config_of(family)
    with pytest.raises(PtqError, match=said):
        class_of(config).read({**config, **changes})


@pytest.mark.parametrize("scalar", [256, 168, 168.5, 1 / 3])
def test_what_queries_are_scaled_by_comes_back_as_it_was(scalar: float) -> None:
    config = config_of("gemma3", query_pre_attn_scalar=scalar)
    hf_class = class_of(config)
    _, _, special = hf_class.nemo_arguments(hf_class.read(config))
    written = hf_class.nemo_settings(SimpleNamespace(**special, kv_channels=128))["query_pre_attn_scalar"]
    assert written == pytest.approx(scalar, rel=1e-14) and isinstance(written, type(scalar))
