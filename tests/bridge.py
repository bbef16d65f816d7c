# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Has Megatron-Bridge itself import a Hugging Face model and save it, on a CPU, in a process of its own.

python -m tests.bridge BRIDGE HF OUT

BRIDGE is where `pip install --no-deps --target BRIDGE megatron-bridge==0.3.0` has put it. As it is imported, it takes
Transformer Engine, Triton and a few more to be installed; nothing that this process does calls them.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# What is imported and not called. Megatron's own kernels in Triton are such as well.
_ABSENT = ("transformer_engine", "nvidia_resiliency_ext", "megatron.core.inference.contexts.attention_context.triton")
# Imported before: they look for what is absent, and do without it.
_BEFORE = (
    *("megatron.core.models.gpt.gpt_layer_specs", "megatron.core.extensions.transformer_engine"),
    *("megatron.core.transformer.moe.moe_layer", "megatron.core.ssm.mamba_layer", "modelopt.torch.opt.plugins"),
)
_FUSIONS = (
    *("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion"),
    *("masked_softmax_fusion", "persist_layer_norm"),
)


class _AbsentClass(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(name)


def _absent(name: str) -> type:
    return _AbsentClass(name, (), {"__init__": lambda *_, **__: None})


class _AbsentModule(ModuleType):
    __version__ = "2.8.0"
    __path__: Any = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(name)


class _Absent(MetaPathFinder, Loader):
    """Finds modules that are not installed; their classes can be named, and nothing else."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(_ABSENT) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def main(bridge: str, source: str, output: str) -> None:
    """Saves a model.

    Args:
        bridge: Where Megatron-Bridge is.
        source: A Hugging Face directory.
        output: The directory to make.
    """
    import torch

    for name in _BEFORE:
        with suppress(ImportError):
            importlib.import_module(name)
    sys.meta_path.insert(0, _Absent())
    sys.path.append(bridge)  # its `megatron` is a part of the one that is there
    # What asks for the device and its random numbers, where there is none.
    state = torch.zeros(8, dtype=torch.uint8)
    for owner, name, value in (
        (torch.cuda, "current_device", torch.device("cpu")),
        (torch.cuda, "synchronize", None),
        (torch.cuda, "get_rng_state", state),
        (torch.cuda.random, "get_rng_state", state),
    ):
        setattr(owner, name, lambda *_, value=value, **__: value)

    from megatron.bridge import AutoBridge
    from megatron.bridge.models import gpt_provider
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model_bridge = AutoBridge.from_hf_pretrained(source)
    provider = model_bridge.to_megatron_provider()
    provider.transformer_layer_spec = gpt_provider.local_layer_spec
    provider.use_cpu_initialization = True
    for name in _FUSIONS:
        setattr(provider, name, False)
    provider.finalize()
    parallel_state.initialize_model_parallel()
    tensor_parallel.random.initialize_rng_tracker()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    model_bridge.load_hf_weights(model)
    model_bridge.save_megatron_model(model, output, hf_tokenizer_path=source)


if __name__ == "__main__":
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    main(*(str(Path(argument).absolute()) for argument in sys.argv[1:]))
