"""config.json of published checkpoints is read as it is and describes the sizes of model/families.py."""

import dataclasses

import pytest

from gpt4o_jax.errors import RunError
from gpt4o_jax.interop import config_json
from gpt4o_jax.interop.families import FAMILIES
from gpt4o_jax.model import flops
from tests.interop.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_size_of_that_name(name):
    """Reading it gives our config and refuses nothing; the parameter count is that of tests/model/test_sizes.py."""
    size, content, other = PUBLISHED[name]
    family = FAMILIES[content["model_type"]]
    assert content["architectures"] == [family.architecture]
    read, ours = config_json.to_model(family, content, "config.json"), dataclasses.replace(size, **other)
    assert config_json.from_model(family, read) == config_json.from_model(family, ours)
    assert config_json.choose(ours, family.name) is family  # what config.json omits, the family fixes at our values
    assert flops.parameter_count(read) == flops.parameter_count(size)


@pytest.mark.parametrize("name", ["gemma-2-9b", "Qwen3-8B"])
def test_scores_multiplied_by_zero_are_not_written_as_the_usual_scale(name):
    size, content, other = PUBLISHED[name]
    model = dataclasses.replace(size, **other, attention_scale=0.0)
    with pytest.raises(RunError, match=r"attention_scale=0\.0 \(there: 0\."):
        config_json.choose(model, content["model_type"])


# Keys accepted above, with values that change, or might change, what a model computes.
CHANGED = [
    ("Qwen3-30B-A3B", dict(use_sliding_window=True, sliding_window=4096), "max_window_layers=48 is not supported"),
    ("Qwen3-30B-A3B", dict(max_window_layers="48"), "max_window_layers='48', expected int"),
    ("Qwen2.5-7B", dict(use_mrope=True), "use_mrope=True is not supported for qwen2; expected False"),
    ("Qwen3-8B", dict(use_mrope=False), "use_mrope=False is not known for qwen3"),
    ("gpt2-medium", dict(n_special=3), "n_special=3 is not supported for gpt2; expected 0"),
    ("gpt2-medium", dict(predict_special_tokens=1), "predict_special_tokens=1 is not supported"),
    ("gemma-2-9b", dict(sliding_window_size=2048), "sliding_window_size=2048 is not supported for gemma2; expected 4096"),
]


@pytest.mark.parametrize(("name", "changes", "says"), CHANGED, ids=str)
def test_with_a_value_that_changes_something_it_is_refused(name, changes, says):
    content = PUBLISHED[name].content | changes
    with pytest.raises(RunError) as e:
        config_json.to_model(FAMILIES[content["model_type"]], content, "config.json")
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_mixture_of_experts_with_a_window_in_every_layer():
    content = PUBLISHED["Qwen3-30B-A3B"].content | dict(use_sliding_window=True, sliding_window=4096, max_window_layers=0)
    model = config_json.to_model(FAMILIES["qwen3_moe"], content, "config.json")
    assert (model.layer_pattern, model.window) == (("local",), 4096)
