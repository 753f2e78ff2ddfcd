"""In every world, items are pure functions, cycle through slices, are small, and end in an answer that scores full marks;
held-out items consist of compositions that no training item contains, as read from their texts.
"""

import itertools
import json
import re

import pytest

from gpt4o_jax.tasks import metrics
from gpt4o_jax.tasks.chat import ROLES
from gpt4o_jax.tasks.item import NO_ANSWER
from gpt4o_jax.tasks.worlds import APPLICATIONS, WORLDS, arithmetic, docstrings, lexicon

TRAINING = 2000


def items(world, held_out, n, seed=0):
    return [world.item(seed, i, held_out) for i in range(n)]


@pytest.fixture(scope="module", params=WORLDS.values(), ids=lambda w: w.name)
def world(request):
    return request.param


@pytest.fixture(scope="module")
def some(world):
    """(training items, held-out items) from two seeds."""
    return tuple(items(world, h, n) + items(world, h, n, 1) for h, n in ((False, TRAINING), (True, 300)))


def test_items_are_pure_functions_of_seed_and_index(world):
    for held_out in (False, True):
        assert items(world, held_out, 30) == items(world, held_out, 30)
        assert items(world, held_out, 30) != items(world, held_out, 30, seed=1)


def test_slices_take_turns(world):
    slices = [item.slice for item in items(world, False, 3 * len(world.slices))]
    assert slices == 3 * list(world.slices)


def test_items_are_small_conversations_that_end_in_an_answer(some):
    for item in itertools.chain(*some):
        assert item.messages[-1].role == "assistant" and {m.role for m in item.messages} <= set(ROLES)
        assert item.answer in item.references and item.answer.strip() == item.answer != ""
        assert sum(len(m.text) for m in item.messages) < 450  # fits in 256 tokens of a vocabulary of 1,024


def test_held_out_items_are_many(world):
    """At least 200 per slice, mostly distinct, and another seed gives others."""
    one, two = ({m.messages for m in items(world, True, 220 * len(world.slices), seed)} for seed in (0, 1))
    assert len(one) > 150 * len(world.slices) and len(two - one) > 100 * len(world.slices)


def test_right_answers_score_full_marks(world, some):
    held = some[1][:120]
    for row in metrics.table(world.metrics, [item.answer for item in held], held).values():
        assert [s.value for s in row.values()] == pytest.approx([100] * len(row))


# ---------------------------------------------------------------- compositions, read from texts


def numbers(item):
    return {item.prompt[-1].text.partition(": ")[2] if item.slice.startswith("en") else item.answer}


def sentences(item):
    return triple(item.prompt[-1].text.partition(": ")[2] if item.slice.startswith("en") else item.answer)


def triple(english):
    """Verb, and adjective and noun of the object, from an English sentence."""
    of = lambda words: {form: word.name for word in words for form in word.forms["en"]}
    verbs = of(lexicon.VERBS)
    verb = max((f for f in verbs if re.search(rf"\b{f}\b", english)), key=len)
    *_, adjective, thing = english.rstrip(".?").split()
    return {(verbs[verb], of(lexicon.OF_THINGS)[adjective], of(lexicon.THINGS)[thing])}


def link(item):
    links = "friend|cousin|boss|neighbour|partner|rival"
    passage = item.messages[0].text.partition("\n")[0]
    told = re.findall(rf"(\w+)'s ({links}) is (\w+)\.", passage)
    return {*told, *((of, kind, name) for name, kind, of in re.findall(rf"(\w+) is the ({links}) of (\w+)\.", passage))}


def reports(item):
    lines = dict(line.split(": ") for line in item.prompt[-1].text.splitlines()[1:])
    wanted = {
        "weather": ("city", "day", "sky"), "match": ("home", "guest", "city"),
        "sales": ("product", "city"), "parcel": ("from", "to"),
    }[item.slice]  # fmt: skip
    return {(item.slice, *(lines[name] for name in wanted))}


def memory(item):
    said = " ".join(m.text for m in item.messages if m.role == "user")
    changes = [int(n) if verb == "Add" else -int(n) for verb, n in re.findall(r"(Add|Take away) (\d+)", said)]
    return set(itertools.pairwise(changes)) | set(re.findall(r"(?:I am|name is) (\w+)\..* I like (\w+)\.", said))


def tool(item):
    call = json.loads(next(m.text for m in item.messages if m.role == "assistant"))
    return {(call["name"], *map(str, call["arguments"].values()))}


def words(item):
    return set(re.findall(r"\b[A-Z][a-z]{3,4}\b", item.messages[0].text.partition("\n")[0])) - {"Repeat"}


def operands(item):
    return {tuple(sorted(map(int, re.findall(r"\d+", item.prompt[-1].text))))}


COMPOSITIONS = {
    "numbers": numbers,
    "sentences": sentences,
    "questions": link,
    "reports": reports,
    "writing": lambda item: triple(item.answer),
    "memory": memory,
    "tools": tool,
    "copying": words,
    "arithmetic": operands,
}
ANY = ("memory",)  # only one composition of a conversation is held out, not all


def test_held_out_compositions_never_occur_in_training(world, some):
    trained, held = ([COMPOSITIONS[world.name](item) for item in part] for part in some)
    assert all(held)
    met = set().union(*trained)
    assert all(new - met if world.name in ANY else not new & met for new in held)


def test_what_is_held_out_is_made_of_words_that_training_meets(world, some):
    """Except for names of random letters, and German numbers, which are single words."""
    if world.name in ("numbers", "copying"):
        return
    known = lambda part: [item for item in part if item.slice not in ("unseen_names", "unanswerable")]
    texts = (" ".join(m.text for item in known(part) for m in item.messages) for part in some)
    trained, held = (set(re.findall(r"[^\W\d]+", text)) for text in texts)
    assert held <= trained


def test_applications_name_worlds():
    assert {name for names in APPLICATIONS.values() for name in names} <= {*WORLDS, docstrings.NAME}


# ---------------------------------------------------------------- questions


def test_answers_to_questions_stand_in_the_passage():
    for item in items(WORLDS["questions"], False, 400):
        passage = item.messages[0].text.partition("\n")[0]
        assert (item.slice == "unanswerable") == (item.answer == NO_ANSWER)
        assert item.answer == NO_ANSWER or re.search(rf"\b{item.answer}\b", passage)


SAID = [
    ("city", r"(\w+) lives in (\w+)", False), ("city", r"(\w+) is the home of (\w+)", True),
    ("job", r"(\w+) works as a (\w+)", False), ("job", r"The (\w+) is (\w+)", True),
    ("animal", r"(\w+) has a (\w+)", False), ("animal", r"A (\w+) belongs to (\w+)", True),
    ("food", r"(\w+) likes (\w+)", False), ("food", r"It is (\w+) that (\w+) likes", True),
]  # fmt: skip
ASKED = {
    "city": (r"Where does (.+) live\?", r"Who lives in (\w+)\?"),
    "job": (r"What is the job of (.+)\?", r"Who is a (\w+)\?"),
    "animal": (r"Which animal does (.+) have\?", r"Who has a (\w+)\?"),
    "food": (r"What does (.+) like\?", r"Who likes (\w+)\?"),
}


def read(passage):
    """({(relation, person): value}, {(person, link): other person})."""
    told, links = {}, {}
    for sentence in passage.removesuffix(".").split(". "):
        if link := re.fullmatch(r"(\w+)'s (\w+) is (\w+)", sentence):
            links[link[1], link[2]] = link[3]
        elif link := re.fullmatch(r"(\w+) is the (?!home)(\w+) of (\w+)", sentence):
            links[link[3], link[2]] = link[1]
        for relation, pattern, turned in SAID:
            if fact := re.fullmatch(pattern, sentence):
                person, value = fact.groups()[::-1] if turned else fact.groups()
                told[relation, person] = value
    return told, links


def answer(passage, question):
    """The answer of a reader with a table of facts."""
    told, links = read(passage)
    if asked := re.fullmatch(r"Who is the (\w+) of (\w+)\?", question):
        return links.get((asked[2], asked[1]), NO_ANSWER)
    if owners := [person for person, kind in links if question == f"Who has a {kind}?"]:
        return owners[0]
    for relation, (of_value, of_person) in ASKED.items():
        if asked := re.fullmatch(of_value, question):
            owner, _, link = asked[1].partition("'s ")
            return told.get((relation, links.get((owner, link)) if link else owner), NO_ANSWER)
        if asked := re.fullmatch(of_person, question):
            return next((p for (r, p), value in told.items() if (r, value) == (relation, asked[1])), NO_ANSWER)
    raise AssertionError(question)


def test_passages_often_tell_the_same_kind_of_thing_of_several_persons():
    """So that a reader must look at whose it is, not only at the kind."""
    held = items(WORLDS["questions"], True, 400)
    told = [[relation for relation, _ in read(item.prompt[0].text.split("\n")[0])[0]] for item in held]
    assert sum(len(relations) > len(set(relations)) for relations in told) > 0.5 * len(held)


def test_questions_are_answered_as_a_second_reader_answers():
    for held_out in (False, True):
        for item in items(WORLDS["questions"], held_out, 800):
            passage, first = item.messages[0].text.split("\n")
            questions = [first, *(m.text for m in item.messages[2::2])]
            assert [answer(passage, q) for q in questions] == [m.text for m in item.messages[1::2]]
            assert not (held_out and len(questions) > 1)


# ---------------------------------------------------------------- arithmetic


def rewarded(said: str, item) -> bool:
    """GRPO's reward for an answer: the score of the world's first metric."""
    return bool(metrics.each(WORLDS["arithmetic"].metrics[0], [said], [item])[0])


def test_the_second_verifier_agrees_with_the_reward():
    for item in items(WORLDS["arithmetic"], False, 300):
        right = int(item.answer)
        for n in (right, right + 1, right - 1, right + 10, right + 100, -right - 1):
            question = item.prompt[-1].text
            assert arithmetic.verify(question, str(n)) == rewarded(str(n), item) == (n == right)


@pytest.mark.parametrize("said", ["", " ", "5 ", "05", "5.0", "five", "5 5", "٥", "+5"])
def test_only_the_number_itself_is_right(said):
    item = next(i for i in items(WORLDS["arithmetic"], False, 5000) if i.answer == "5")
    assert arithmetic.verify(item.prompt[-1].text, said) == rewarded(said, item) == (said == "5 ")
