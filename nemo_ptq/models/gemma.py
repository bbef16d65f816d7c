# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Gemma 1; Gemma 2 and 3 are other models, and refused."""

from nemo_ptq.models.hugging_face import FIELDS, GELU, NEMO, HuggingFaceClass, llama_like, sizes
from nemo_ptq.models.llama import RULES
from nemo_ptq.models.registry import Family

# Early files of Gemma say "gelu" and mean the approximation. transformers reads hidden_act, and vLLM hidden_activation.
_TANH = "gelu_pytorch_tanh"

GEMMA = HuggingFaceClass(
    architecture="GemmaForCausalLM",
    config_class="GemmaConfig",
    nemo_model=NEMO + "gemma.GemmaModel",
    nemo_config=lambda hf: ("GemmaConfig", {}),  # the norms' weights are centred on zero on both sides
    nemo_settings=lambda nemo: {},
    nemo_fixed=llama_like("gelu"),
    written={"hidden_act": _TANH, "hidden_activation": _TANH},
    defaults=sizes(256000, 3072, 24576, 28, 16, positions=8192, num_key_value_heads=16, head_dim=256)
    | {"rms_norm_eps": 1e-6, "hidden_act": GELU[0], "attention_bias": False, "tie_word_embeddings": True},
    fields=FIELDS,
    fixed={
        "hidden_act": GELU,
        "hidden_activation": (_TANH, None),
        "attention_bias": (False,),
        "rope_scaling": (None,),
        "tie_word_embeddings": (True,),
    },
    rules=RULES,
    can_tie=True,
)

FAMILIES = (
    Family("Gemma", "Gemma", "gemma", "openai-gelu", GEMMA),
    Family(
        "Gemma 2",
        "Gemma2",
        None,
        refused="it caps attention scores and logits, and normalises what a sublayer returns",
        refused_architectures=("Gemma2ForCausalLM",),
    ),
    Family(
        "Gemma 3",
        "Gemma3",
        None,
        refused="its layers have two rotary embeddings, and norms of queries, keys and what a sublayer returns",
        refused_architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    ),
)
