"""Published families have the published number of parameters, computed from shapes alone."""

import functools
import math

import jax
import pytest

from gpt4o_jax.model import flops, gpt
from gpt4o_jax.model.families import GEMMA2, GEMMA3, GPT2, LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN2, QWEN3
from gpt4o_jax.ops.compute import Compute

# Parameters of transformers 5.23's classes (GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM,
# Qwen3MoeForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, MistralForCausalLM, MixtralForCausalLM, Olmo2ForCausalLM) on
# torch's meta device, shared tables counted once, with the sizes of the checkpoints' own configuration files. If a model
# card or paper gives a count, it is this one rounded.
PUBLISHED = {
    "gpt2": (GPT2, {"124m": 124_439_808, "355m": 354_823_168, "774m": 774_030_080, "1558m": 1_557_611_200}),
    "llama": (
        LLAMA,
        {
            "1b": 1_235_814_400,
            "3b": 3_212_749_824,
            "8b": 8_030_261_248,
            "70b": 70_553_706_496,
            "405b": 405_853_388_800,
            "2-7b": 6_738_415_616,
            "2-13b": 13_015_864_320,
            "2-70b": 68_976_648_192,
        },
    ),
    "qwen2": (QWEN2, {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "7b": 7_615_616_512, "72b": 72_706_203_648}),
    "qwen3": (
        QWEN3,
        {
            "0.6b": 596_049_920,
            "1.7b": 1_720_574_976,
            "4b": 4_022_468_096,
            "8b": 8_190_735_360,
            "14b": 14_768_307_200,
            "32b": 32_762_123_264,
            "30b-a3b": 30_532_122_624,
            "235b-a22b": 235_093_634_560,
        },
    ),
    "gemma2": (GEMMA2, {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}),
    "gemma3": (GEMMA3, {"1b": 999_885_952, "4b": 3_880_263_168, "12b": 11_766_034_176, "27b": 27_009_346_304}),
    "mistral": (MISTRAL, {"7b": 7_241_732_096}),
    "mixtral": (MIXTRAL, {"8x7b": 46_702_792_704, "8x22b": 140_620_634_112}),
    "olmo2": (OLMO2, {"7b": 7_298_617_344, "13b": 13_716_198_400}),
}
SIZES = [(family, size) for family, (_, counts) in PUBLISHED.items() for size in counts]


def test_every_size_has_its_number():
    for sizes, counts in PUBLISHED.values():
        assert set(sizes) == set(counts)


@pytest.mark.parametrize("family, size", SIZES, ids="-".join)
def test_parameters_are_the_published_number(one_device, family, size):
    sizes, counts = PUBLISHED[family]
    model = gpt.GPT(sizes[size], Compute("cpu", "float32"))
    shapes = jax.eval_shape(functools.partial(gpt.init, model), jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == counts[size]
    assert flops.parameter_count(sizes[size]) == counts[size]


@pytest.mark.parametrize(
    "family, size, billions",
    [("mixtral", "8x7b", 12.9), ("mixtral", "8x22b", 39), ("qwen3", "30b-a3b", 3.3), ("qwen3", "235b-a22b", 22)],
)
def test_active_parameters_are_those_of_the_model_card(family, size, billions):
    assert flops.parameter_count(PUBLISHED[family][0][size], active=True) == pytest.approx(billions * 1e9, rel=0.02)
