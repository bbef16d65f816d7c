# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""io.json is data: the model is read from it, and what it names is imported or called only if it is on the list."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.checkpoint.allowed_names import AllowedNames, Name, read_names
from nemo_ptq.checkpoint.context_graph import Call, read_model
from nemo_ptq.checkpoint.metadata import read_model as read_checked_model
from nemo_ptq.errors import ConfigError
from tests.conftest import Demo
from tests.hostile import (
    NOTHING_TRUSTED,
    Graph,
    call,
    call_of,
    change_graph,
    copy_of,
    leaf,
    make_file,
    node,
    pyref,
    sequence,
    with_argument,
)


@pytest.fixture
def checkpoint(demo: Demo, tmp_path: Path) -> Path:
    """A copy of the demo's checkpoint, to be changed."""
    return copy_of(demo.checkpoint, tmp_path / "checkpoint")


def problems_of(checkpoint: Path, allowed: AllowedNames = NOTHING_TRUSTED) -> list[str]:
    try:
        read_checked_model(checkpoint, allowed)
    except ConfigError as error:
        assert all("\n" not in problem for problem in error.problems)
        return list(error.problems)
    return []


def test_the_model_is_read_with_its_config_and_tokenizer(demo: Demo) -> None:
    model = read_model(demo.checkpoint / "context", NOTHING_TRUSTED)
    config, tokenizer = model.arguments["config"], model.arguments["tokenizer"]
    assert str(model.function) == "nemo.collections.llm.gpt.model.llama.LlamaModel"
    assert str(config.function) == "nemo.collections.llm.gpt.model.llama.LlamaConfig"
    assert (config.arguments["num_layers"], config.arguments["hidden_size"]) == (4, 256)
    assert config.arguments["params_dtype"] == Name("torch", "bfloat16")
    assert tokenizer.arguments == {"pretrained_model_name": "nemo_tokenizer"}


HOSTILE: dict[str, tuple[Any, str]] = {
    "a call": (call("subprocess.getoutput", cmd=leaf("x")), "subprocess.getoutput"),
    "a later call": (call("os.system", "fiddle._src.partial.Partial", command=leaf("x")), "os.system"),
    "NeMo-Run's call": (call("os.system", "nemo_run.config.Config", command=leaf("x")), "os.system"),
    "a name": (pyref("os.system"), "os.system"),
    "a builtin": (call("builtins.eval", source=leaf("1")), "builtins.eval"),
    "what a module of NeMo's imports": (
        call_of({"type": "pyref", "module": "nemo.collections.llm.gpt.model.base", "name": "os.system"}),
        "nemo.collections.llm.gpt.model.base.os.system",
    ),
    "another function of NeMo's": (call("nemo.utils.exp_manager.exp_manager"), "nemo.utils.exp_manager.exp_manager"),
    "a tokenizer that unpickles": (
        call("nemo.collections.common.tokenizers.tabular_tokenizer.TabularTokenizer", coder=leaf("x.pkl")),
        "nemo.collections.common.tokenizers.tabular_tokenizer.TabularTokenizer",
    ),
    "a loader of torch's": (call("torch.load", f=leaf("x.pt"), weights_only=leaf(False)), "torch.load"),
    "a module of torch's": (call("torch.hub.load", repo_or_dir=leaf("x")), "torch.hub.load"),
    "an activation that is called": (call("torch.nn.functional.gelu", input=leaf(1)), "torch.nn.functional.gelu"),
    "another class of transformers'": (
        call("nemo.lightning.io.artifact.hf_auto.from_pretrained", auto_cls=pyref("transformers.pipelines.Pipeline")),
        "transformers.pipelines.Pipeline",
    ),
    "inside a list": (sequence(leaf(1), call("os.system", command=leaf("x")), kind="list"), "os.system"),
    "inside a call that is allowed": (
        call("nemo.lightning.io.artifact.file.FileArtifact", attr=call("os.system", command=leaf("x"))),
        "os.system",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["model.config.rotary_base", "model.tokenizer.vocab_file"])
def test_other_names_are_refused_with_their_place_and_the_way_to_allow_them(
    kind: str, place: str, checkpoint: Path
) -> None:
    value, name = HOSTILE[kind]
    _, target, argument = place.split(".")
    prefix = "llama_config" if target == "config" else "auto_tokenizer"
    change_graph(checkpoint, lambda graph: with_argument(graph, prefix, argument, value))
    (problem,) = problems_of(checkpoint)
    assert problem.startswith(f"{checkpoint}/context/io.json names {name} at {place}")
    assert problem.endswith(f"if you trust it, add trust_checkpoint={name}")
    assert problems_of(checkpoint, AllowedNames((name,))) == []


@pytest.mark.parametrize("prefix", ["llama_model", "llama_config", "auto_tokenizer"])
def test_model_config_and_tokenizer_are_of_known_classes(prefix: str, checkpoint: Path) -> None:
    def replace_class(graph: Graph) -> None:
        metadata = graph["objects"][node(graph, prefix)["metadata"]["key"]]
        metadata["items"][0][1] = pyref("my_package.models.Mine")

    change_graph(checkpoint, replace_class)
    (problem,) = problems_of(checkpoint)
    assert "names my_package.models.Mine at model" in problem
    assert problems_of(checkpoint, AllowedNames(read_names("my_package.models"))) == []
    assert problems_of(checkpoint, AllowedNames(read_names("my_package.mod"))) != []


def test_all_names_are_told_together(checkpoint: Path) -> None:
    change_graph(checkpoint, lambda graph: with_argument(graph, "llama_config", "rotary_base", pyref("a.b")))
    change_graph(checkpoint, lambda graph: with_argument(graph, "auto_tokenizer", "use_fast", pyref("c.d")))
    assert [problem.rpartition("=")[2] for problem in problems_of(checkpoint)] == ["a.b", "c.d"]
    assert problems_of(checkpoint, AllowedNames(read_names("a.b,c.d"))) == []


@pytest.mark.parametrize(
    ("prefix", "argument"),
    [
        ("trainer_context", "extra"),
        ("trainer_1", "callbacks"),
        ("megatron_strategy", "ddp"),
        ("llama_model", "optim"),
        ("llama_model", "model_transform"),
        ("llama_config", "forward_step_fn"),
        ("llama_config", "transformer_layer_spec"),
        ("llama_config", "init_method"),
    ],
)
def test_what_training_needs_is_left_out(prefix: str, argument: str, checkpoint: Path, demo: Demo) -> None:
    change_graph(checkpoint, lambda graph: with_argument(graph, prefix, argument, make_file(checkpoint / "marker")))
    unchanged = read_model(demo.checkpoint / "context", NOTHING_TRUSTED)
    assert read_model(checkpoint / "context", NOTHING_TRUSTED) == unchanged


def test_code_beside_a_tokenizer_is_never_asked_for(checkpoint: Path) -> None:
    change_graph(checkpoint, lambda graph: with_argument(graph, "auto_tokenizer", "trust_remote_code", leaf(True)))
    tokenizer = read_model(checkpoint / "context", NOTHING_TRUSTED).arguments["tokenizer"]
    assert tokenizer.arguments["trust_remote_code"] is False


def test_a_pickle_is_not_read(checkpoint: Path) -> None:
    pickled = {
        "type": pyref("nemo.collections.llm.gpt.model.llama.LlamaConfig"),
        "items": [["x", leaf("abc")]],
        "metadata": None,
    }
    change_graph(checkpoint, lambda graph: with_argument(graph, "llama_config", "rotary_base", pickled))
    for allowed in (NOTHING_TRUSTED, AllowedNames(("nemo",))):
        (problem,) = problems_of(checkpoint, allowed)
        assert "LlamaConfig at model.config.rotary_base, which may be a pickle: none is ever read" in problem


def test_an_object_that_nemo_has_saved_by_its_configuration_is_one(checkpoint: Path, demo: Demo) -> None:
    def as_object(graph: Graph) -> None:
        tokenizer = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
        node(graph, "auto_tokenizer")["type"] = pyref(tokenizer)

    change_graph(checkpoint, as_object)
    assert read_model(checkpoint / "context", NOTHING_TRUSTED) == read_model(
        demo.checkpoint / "context", NOTHING_TRUSTED
    )


def test_functions_and_constants_of_real_configs_are_read(checkpoint: Path) -> None:
    values = {
        "activation_func": pyref("torch._C._nn.gelu"),
        "attention_backend": {
            "type": "pyref",
            "module": "megatron.core.transformer.enums",
            "name": "AttnBackend.flash",
        },
        "pipeline_dtype": pyref("torch.bfloat16"),
        "moe_layer_freq": sequence(leaf(1), leaf(0), kind="list"),
        "window_size": sequence(leaf(4096), leaf(0)),
        "vocab_size": {"type": pyref("fiddle._src.config.NoValue"), "items": [], "metadata": None},
    }
    for name, value in values.items():
        change_graph(
            checkpoint, lambda graph, name=name, value=value: with_argument(graph, "llama_config", name, value)
        )
    config = read_model(checkpoint / "context", NOTHING_TRUSTED).arguments["config"].arguments
    assert config["activation_func"] == Name("torch._C._nn", "gelu")
    assert config["attention_backend"] == Name("megatron.core.transformer.enums", "AttnBackend.flash")
    assert (config["moe_layer_freq"], config["window_size"]) == ([1, 0], (4096, 0))
    assert "vocab_size" not in config


def test_a_model_may_stand_alone(checkpoint: Path) -> None:
    def without_trainer(graph: Graph) -> None:
        graph["root"]["key"] = next(key for key in graph["objects"] if key.startswith("llama_model"))

    expected = read_model(checkpoint / "context", NOTHING_TRUSTED)
    change_graph(checkpoint, without_trainer)
    assert read_model(checkpoint / "context", NOTHING_TRUSTED) == expected


def _set(*path: Any, value: Any) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        inner: Any = graph
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def _circle(graph: Graph) -> None:
    graph["objects"]["a"] = {"type": "ref", "key": "b"}
    graph["objects"]["b"] = {"type": "ref", "key": "a"}
    with_argument(graph, "llama_config", "rotary_base", {"type": "ref", "key": "a"})


def _deep(graph: Graph) -> None:
    graph["objects"]["a"] = sequence({"type": "ref", "key": "a"})
    with_argument(graph, "llama_config", "rotary_base", {"type": "ref", "key": "a"})


def _many(graph: Graph) -> None:
    graph["objects"]["a0"] = sequence(leaf(1))
    for index in range(1, 10):
        graph["objects"][f"a{index}"] = sequence(*[{"type": "ref", "key": f"a{index - 1}"}] * 10)
    with_argument(graph, "llama_config", "rotary_base", {"type": "ref", "key": "a9"})


def _with(argument: str, value: Any) -> Callable[[Graph], None]:
    return lambda graph: with_argument(graph, "llama_config", argument, value)


MALFORMED: dict[str, tuple[Callable[[Graph], object], str]] = {
    "no objects": (_set("objects", value=None), "it has no root and objects"),
    "no root": (lambda graph: graph.pop("root"), "it has no root and objects"),
    "a root that is not there": (_set("root", "key", value="nothing"), "nothing has the key 'nothing'"),
    "a root of no type": (_set("root", value=7), "its root has no model"),
    "references in a circle": (_circle, "references go in a circle"),
    "a list in itself": (_deep, "more than 50 of them in one another"),
    "lists that multiply": (_many, "more than 100000 values"),
    "a number that is none": (_with("rotary_base", leaf(float("nan"))), "model.config.rotary_base is nan"),
    "an object of no type": (_with("rotary_base", {"x": 1}), "is of no type that fiddle has"),
    "a name with a line break": (_with("rotary_base", pyref("os\nError: x.y")), "is no name"),
    "an argument with a line break": (_with("a\nb", leaf(1)), "arguments have no names"),
    "a name without a module": (_with("rotary_base", {"type": "pyref", "name": "x"}), "is no name"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_damaged_graph_is_refused_in_a_line(kind: str, checkpoint: Path) -> None:
    change, reason = MALFORMED[kind]
    change_graph(checkpoint, change)
    (problem,) = problems_of(checkpoint)
    assert problem.startswith(f"{checkpoint}/context/io.json does not describe a model (")
    assert reason in problem
    assert problem.endswith("copy or save the checkpoint again")


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"root": 1}', "[" * 100_000, "\0"])
def test_a_damaged_file_is_refused_in_a_line(content: str, checkpoint: Path) -> None:
    (checkpoint / "context" / "io.json").write_text(content)
    (problem,) = problems_of(checkpoint)
    assert problem.startswith(f"{checkpoint}/context/io.json ")
    assert problem.endswith("copy or save the checkpoint again")


@pytest.mark.parametrize("value", [10**6, 10**12, "4", 4.0, None, [4], True])
def test_a_model_of_another_size_than_the_planned_one_is_refused(value: Any, checkpoint: Path) -> None:
    change_graph(
        checkpoint, _with("num_layers", leaf(value) if not isinstance(value, list) else sequence(leaf(4), kind="list"))
    )
    (problem,) = problems_of(checkpoint)
    assert problem == (
        f"{checkpoint}/context: num_layers is 4 in model.yaml and {value!r} in io.json: copy or save the checkpoint "
        "again"
    )


def test_whatever_is_changed_is_read_or_refused(checkpoint: Path) -> None:
    file = checkpoint / "context" / "io.json"
    original = file.read_text()
    chance = random.Random(0)
    outcomes = set()
    for _ in range(400):
        graph = json.loads(original)
        _damage(graph, chance)
        file.write_text(json.dumps(graph))
        outcomes.add(bool(problems_of(checkpoint)))
    assert outcomes == {True, False}


def _damage(graph: Graph, chance: random.Random) -> None:
    """Replaces a value somewhere in the graph."""
    inner: Any = graph
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = chance.choice(keys)
        if isinstance(inner[key], dict | list) and inner[key] and chance.random() < 0.85:
            inner = inner[key]
            continue
        inner[key] = chance.choice([None, 7, "x", [], {}, [1], {"type": "ref"}, {"type": {}}, True, "tuple_1"])
        return


@pytest.mark.parametrize("text", ["a b", "a.", ".a", "a..b", "1a", "a,b-c", "os.system()"])
def test_names_to_trust_are_dotted_names(text: str) -> None:
    with pytest.raises(ValueError, match="is no dotted name"):
        read_names(text)


def test_names_to_trust_are_read() -> None:
    assert read_names(" my_models.MyConfig,other ") == ("my_models.MyConfig", "other")
    assert read_names(None) == read_names("") == ()


def test_what_is_read_is_plain(demo: Demo) -> None:
    def kinds(value: Any) -> set[type]:
        if isinstance(value, Call):
            return {Call}.union(*map(kinds, value.arguments.values()))
        return {type(value)}

    assert kinds(read_model(demo.checkpoint / "context", NOTHING_TRUSTED)) <= {Call, Name, int, float, bool, str}
