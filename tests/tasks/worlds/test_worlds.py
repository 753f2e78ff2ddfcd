"""What holds in every world: items are pure functions, balanced over slices, scored by metrics that exist, small, and those
held out are made of compositions that no training item holds, as read from their texts.
"""

import pytest

from gpt4o_jax.tasks.chat import ROLES
from gpt4o_jax.tasks.worlds import APPLICATIONS, WORLDS

TRAINING = 6000


def items(world, held_out, n, seed=0):
    return [world.item(seed, i, held_out) for i in range(n)]


@pytest.fixture(scope="module", params=WORLDS.values(), ids=lambda w: w.name)
def world(request):
    return request.param


def test_items_are_pure_functions_of_seed_and_index(world):
    for held_out in (False, True):
        assert items(world, held_out, 30) == items(world, held_out, 30)
        assert items(world, held_out, 30) != items(world, held_out, 30, seed=1)
    assert items(world, False, 30) != items(world, True, 30)


def test_slices_take_turns(world):
    slices = [item.slice for item in items(world, False, 3 * len(world.slices))]
    assert slices == 3 * list(world.slices)


def test_items_are_conversations_that_end_in_an_answer(world):
    for item in items(world, False, 200) + items(world, True, 200):
        assert item.messages[-1].role == "assistant" and {m.role for m in item.messages} <= set(ROLES)
        assert item.answer in item.references and item.answer.strip() == item.answer != ""
        assert sum(len(m.text) for m in item.messages) < 650  # 256 tokens of a vocabulary of 1,024, about


def test_two_seeds_give_different_held_out_items(world):
    one, two = ({str(i.messages) for i in items(world, True, 200, seed)} for seed in (0, 1))
    assert len(one & two) < 100


# ---------------------------------------------------------------- compositions, read from texts


def english_number(item):
    return {item.prompt[-1].text.partition(": ")[2] if item.slice.startswith("en") else item.answer}


COMPOSITIONS = {"numbers": english_number}


def test_held_out_compositions_never_occur_in_training(world):
    parts = COMPOSITIONS[world.name]
    held = set().union(*(parts(item) for item in items(world, True, 400)))
    trained = set().union(*(parts(item) for seed in (0, 1) for item in items(world, False, TRAINING, seed)))
    assert held and not held & trained


def test_applications_name_worlds():
    assert {name for names in APPLICATIONS.values() for name in names} <= WORLDS.keys()
