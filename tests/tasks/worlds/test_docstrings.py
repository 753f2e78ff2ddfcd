"""Docstrings become pairs of a body and its summary; held-out summaries do not occur in training."""

import pytest

from gpt4o_jax.errors import RunError
from gpt4o_jax.tasks.worlds import docstrings

LINE = "It goes on for some time, so that there is something to be told in short. "


def document(n, body=LINE):
    return f"Return the number of things that is {n}.\n\n{body}"


def test_pairs_are_cut_from_documents():
    long = "\n".join(f"{i}: {LINE}" for i in range(9))
    others = ["no sentence", "Short.\n\nbut too short", f"Two lines, of which\nnone ends the other.\n\n{LINE}", LINE]
    found = docstrings.pairs([document(1), document(1, LINE * 2), document(2, long), *others])
    assert [s for _, s in found] == ["Return the number of things that is 1.", "Return the number of things that is 2."]
    assert found[0][0] == LINE.strip() and len(found[1][0]) <= 400 and long.startswith(found[1][0]) and found[1][0].endswith(".")


def test_held_out_summaries_are_not_trained_on():
    world = docstrings.world([document(n) for n in range(20)], [document(n, LINE * 2) for n in range(15, 25)])
    trained, held = ({world.item(0, i, h).answer for i in range(50)} for h in (False, True))
    assert len(trained) == 15 and len(held) == 10 and not trained & held


def test_the_baseline_is_the_first_words():
    item = docstrings.world([document(3)], [document(4)]).item(0, 0, True)
    assert docstrings.lead(item) == "It goes on for some time, so that"


def test_a_part_without_documents_that_fit_is_told():
    with pytest.raises(RunError, match=r"no held-out document .*holdout_fraction"):
        docstrings.world([document(1)], ["Too short."])
