"""The full version of what the fast suite samples: every mesh with every model, every way to split rows, all option crosses."""

import pytest

from gpt4o_jax.config_mesh import PRESETS
from gpt4o_jax.model.cache import KINDS
from gpt4o_jax.training.optimizer import OPTIMIZERS
from tests.interop import test_decoding
from tests.interop.cases import CASES
from tests.model import test_cache, test_gpt
from tests.pairwise import product
from tests.parallel import meshes, test_context, test_meshes

pytestmark = pytest.mark.system

COMPOSITES = [
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=4, tensor=2),
    dict(fsdp=2, tensor=4),
    dict(data=2, context=4),
    dict(fsdp=2, context=4),
    dict(data=2, context=2, tensor=2),
    dict(fsdp=2, context=2, tensor=2),
    dict(expert=4, fsdp=2),
    dict(expert=2, fsdp=2, tensor=2),
    dict(expert=2, fsdp=2, context=2),
    dict(stage=4, data=2),
    dict(stage=2, fsdp=2, tensor=2),
    dict(stage=2, context=2, fsdp=2),
    dict(stage=2, context=2, tensor=2),
    dict(stage=2, expert=2, data=2),
    dict(stage=2, expert=2, tensor=2),
    dict(stage=2, data=4, pipeline_repeats=2),
    dict(stage=2, fsdp=2, tensor=2, pipeline_repeats=2),
    dict(stage=2, context=2, fsdp=2, pipeline_repeats=2),
    dict(stage=2, expert=2, fsdp=2, pipeline_repeats=2),
]
MESHES = [dict(preset=preset) for preset in PRESETS] + COMPOSITES
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
named = lambda sizes: " ".join(f"{axis}={n}" for axis, n in sizes.items())


def stages_divide(sizes, model) -> bool:
    stages = sizes.get("stage", PRESETS.get(sizes.get("preset"), {}).get("stage", 1))
    return meshes.MODELS[model].periods % (stages * repeats(sizes)) == 0


def repeats(sizes) -> int:
    return sizes.get("pipeline_repeats", 1)


def on_meshes(models):
    """Every mesh with each model whose layer periods divide into its stages."""
    cases = [(sizes, model) for sizes in MESHES for model in models if stages_divide(sizes, model)]
    return pytest.mark.parametrize(("sizes", "model"), cases, ids=[f"{named(sizes)}-{model}" for sizes, model in cases])


@PACKED
@on_meshes(meshes.MODELS)
def test_loss_and_gradients_equal_one_device(sizes, model, packed):
    got = meshes.loss_and_gradients(meshes.config(model), meshes.mesh_of(**sizes), meshes.batch(packed), repeats(sizes))
    meshes.assert_equal(got, meshes.on_one_device(model, packed))


@PACKED
@on_meshes(["experts", "some experts"])
def test_every_token_goes_to_the_experts_of_one_device(sizes, model, packed):
    meshes.assert_routes_equal(model, meshes.mesh_of(**sizes), packed, repeats(sizes))


@PACKED
@on_meshes(meshes.MODELS)
def test_training_drifts_no_more_than_a_permutation_of_rows(sizes, model, packed):
    c = meshes.with_optimizer(model, "adamw")
    meshes.assert_drifts_no_more_than_permuted_rows(c, meshes.mesh_of(**sizes), packed, repeats(sizes))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sizes", [dict(preset="fsdp"), COMPOSITES[0]], ids=named)
def test_every_optimizer_drifts_no_more_than_a_permutation_of_rows(sizes, optimizer):
    meshes.assert_drifts_no_more_than_permuted_rows(meshes.with_optimizer("dense", optimizer), meshes.mesh_of(**sizes), False)


@pytest.mark.parametrize("C, K, name, variant", test_context.PRODUCT)
def test_cut_rows_give_what_whole_rows_give(C, K, name, variant):
    assert test_context.error(C, K, name, variant) <= 1e-5


@pytest.mark.parametrize("cross", test_gpt.CROSSES)
def test_counts_are_exact(one_device, cross):
    for options in product(test_gpt.CROSSES[cross]):
        test_gpt.assert_counts_are_exact(options)


@pytest.mark.parametrize("changes", product(test_cache.CROSS), ids=str)
def test_prefill_and_decode_equal_the_full_pass(one_device, changes):
    assert test_cache.distance_from_the_full_pass(changes) <= 1e-5


def test_the_meshes_of_the_fast_suite_are_among_these():
    assert all(sizes in MESHES for sizes, _, _ in test_meshes.CASES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_every_case_of_every_family_decodes_through_every_cache(name, kind):
    in_pieces, from_float32, rounding = test_decoding.distances(name, kind)
    assert in_pieces <= max(1e-4, rounding) and (kind != "float32" or from_float32 <= 1e-5)
