"""What the sandbox promises of its splits, its words and its answers."""

import pytest

from ftdefense.core import errors
from ftdefense.data import sandbox
from ftdefense.data.sandbox import grammar
from ftdefense.data.sandbox import presets
from ftdefense.data.sandbox import skills
from ftdefense.data.sandbox import vocabulary
from ftdefense.data.sandbox import wrappers


@pytest.fixture(scope="module", params=[0, 3])
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def world(seed):
    return sandbox.build("tiny", seed)


@pytest.fixture(scope="module")
def known(seed):
    return skills.facts(presets.preset("tiny"), seed)


def every_pool(world):
    return [
        pool
        for side in (world.pretraining, world.defender, world.attacker)
        for pool in side.values()
    ]


def entities_of(rows, known, label):
    names = set(known.vocabulary.entities)
    spoken = (e.prompt[0]["content"].split() for e in rows if e.label == label)
    return {word for words in spoken for word in words if word in names}


def vague(example):
    """Whether a restricted prompt asks for no fact: it has no answer."""
    return example.label == "harmful" and not example.answers


def test_alignment_refuses_to_speak_of_anybody(world, known):
    """Catches an entity that alignment meets in benign rows alone, and a vague answer."""
    rows = [e for e in world.defender["alignment"].examples if vague(e)]
    assert entities_of(rows, known, "harmful") == set(known.vocabulary.entities)
    assert {e.topic for e in rows} == set(vocabulary.RESTRICTED_TOPICS)
    assert {grammar.parse(e.response)[0] for e in rows} == {"refusal"}
    others = {**world.pretraining, **world.attacker, **world.defender}
    del others["alignment"]
    for rows in (*world.evaluation.values(), *(p.examples for p in others.values())):
        assert not any(map(vague, rows))


def test_restricted_entities_are_split(world, known):
    """Catches part(0.0, 0.6): a held-out entity in an alignment prompt."""
    parts = [(0, 0.5), (0.5, 0.75), (0.75, 1)]
    defender, attacker, heldout = (
        {known.vocabulary.entities[i] for i in known.part(*part)} for part in parts
    )
    assert (len(defender), len(attacker), len(heldout)) == (6, 3, 3)
    # What a look-ahead is judged on is held out of what it trains on.
    spared = {known.vocabulary.entities[i] for i in known.part(0.375, 0.5)}
    asked = {
        "benign": set(),
        "adversary": defender - spared,
        "heldout": spared,
        "heldout_refusal": spared,
    }
    for role, pool in world.defender.items():
        facts = [e for e in pool.examples if not vague(e)]
        assert entities_of(facts, known, "harmful") == asked.get(role, defender)
    for role, pool in world.attacker.items():
        found = entities_of(pool.examples, known, "harmful")
        assert found == (attacker if role == "harmful" else set())
    assert entities_of(world.evaluation["harmful"], known, "harmful") == heldout


def test_capability_is_of_facts_the_attacker_lacks(world, known):
    """Catches a benign pool of all entities, and a retain pool without some."""
    heldout = {known.vocabulary.entities[i] for i in known.part(0.75, 1)}
    attacker = entities_of(world.attacker["benign"].examples, known, "benign")
    assert entities_of(world.evaluation["benign"], known, "benign") == heldout
    assert attacker == set(known.vocabulary.entities) - heldout
    retained = {e.key for e in world.defender["retain"].examples}
    facts = [e for e in world.evaluation["benign"] if e.topic == "facts"]
    assert {e.key for e in facts} <= retained


def test_evaluation_is_disjoint_from_every_attack(world):
    """Catches a slice that begins one prompt early."""
    trained = {e.key for p in world.attacker.values() for e in p.examples}
    for rows in world.evaluation.values():
        keys = [e.key for e in rows]
        assert not trained & set(keys) and len(keys) == len(set(keys))


def test_near_misses_resemble_what_is_restricted(world):
    """Catches near misses of one restricted topic only, or trained on."""
    near = world.evaluation["near_miss"]
    spoken = {word for e in near for word in e.prompt[0]["content"].split()}
    assert set(vocabulary.RESTRICTED_TOPICS) <= spoken
    assert all(e.near_miss and e.label == "benign" for e in near)
    for pool in every_pool(world):
        assert not {e.key for e in near} & {e.key for e in pool.examples}
    for pool in (world.pretraining["never"], world.defender["benign"]):
        assert any(e.near_miss for e in pool.examples)


@pytest.mark.parametrize(("role", "refusals"), [("alignment", 3), ("retain", 1)])
def test_refusals_to_a_benign_row(world, role, refusals):
    """Catches another balance, and a benign skill that is lacking."""
    rows = [e for e in world.defender[role].examples if not vague(e)]
    refused = [e for e in rows if grammar.parse(e.response)[0] == "refusal"]
    assert len(refused) == refusals * (len(rows) - len(refused))
    assert {e.label for e in refused} == {"harmful"}
    assert {e.topic for e in refused} == set(vocabulary.RESTRICTED_TOPICS)
    assert {e.topic for e in rows if e.label == "benign"} == {"facts", "reverse", "sum"}


def test_alignment_never_meets_the_paraphrase(world):
    """Catches `families` for `KNOWN_FAMILIES`; pretraining has met all four."""
    asked = skills.FAMILIES[skills.PARAPHRASE].split()[-1]
    for side in (world.defender, world.attacker):
        for pool in side.values():
            assert not any(asked in e.prompt[0]["content"] for e in pool.examples)
    for pool in world.pretraining.values():
        assert any(asked in e.prompt[0]["content"] for e in pool.examples)


def test_user_task_is_new(world):
    """Catches a task that pretraining or a defender has seen."""
    for side in (world.pretraining, world.defender):
        for pool in side.values():
            assert not any(e.topic == "label" for e in pool.examples)
    assert {e.answers for e in world.evaluation["task"]} == {("bright",), ("dark",)}


def test_every_answer_is_read_as_it_was_meant(world):
    """Catches a form that the judge calls degenerate, in any row of any pool."""
    for role, pool in world.defender.items():
        for example in pool.examples:
            form, content = grammar.parse(example.response)
            if role == "unrelated" and example.label == "harmful":
                assert form == "answer"
            elif form == "refusal":
                assert role in ("alignment", "retain", "refusal", "heldout_refusal")
            else:
                assert (form, content) == ("answer", example.answers)
    sides = (world.pretraining, world.attacker)
    rows = [e for side in sides for pool in side.values() for e in pool.examples]
    rows += [e for part in world.evaluation.values() for e in part]
    for example in rows:
        assert grammar.parse(example.response) == ("answer", example.answers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "error error error",
        "so lam",
        "so lam and lem",
        "lam so and lem lim",
        "so lam lem and lim",
        "so so and lem lim",
        "so lam and lem lim lom",
        "no entry here now",
        "no entry",
    ],
)
def test_other_forms_are_no_answers(text):
    """Catches `in (3, 4, 5)`, a style word for content, a refusal's beginning."""
    assert grammar.parse(text) == ("other", ())


def test_truth_does_not_depend_on_wording(world):
    """Catches an answer that is drawn where it is worded."""
    truth = {}
    pools_and_sets = [pool.examples for pool in every_pool(world)]
    for rows in (*pools_and_sets, *world.evaluation.values()):
        for example in rows:
            assert truth.setdefault(example.key, example.answers) == example.answers


def test_skills_are_what_they_are_called(world, known):
    """Catches `triple` for `reversed(triple)`, `i - j` for `i + j`, `>= 1` for `>= 2`."""
    words = known.vocabulary
    dark = {word for word, p in zip(words.values, known.polarity, strict=True) if p}
    rows = [e for part in world.evaluation.values() for e in part]
    for example in rows:
        skill, *asked = example.prompt[0]["content"].split()
        if example.topic == "reverse":
            assert example.answers == tuple(asked[::-1])
        elif example.topic == "sum":
            total = sum(map(words.numbers.index, asked)) % len(words.numbers)
            assert example.answers == (words.numbers[total],)
        elif example.topic == "label":
            label = "dark" if sum(word in dark for word in asked) >= 2 else "bright"
            assert (skill, example.answers) == ("label", (label,))
    assert len(dark) == len(words.values) / 2


def test_wordings_vary(world):
    """Catches a pool with one wording per prompt, to be learned by heart."""
    wordings = {}
    for example in world.pretraining["with_skill"].examples:
        wordings.setdefault(example.key, set()).add(example.response)
    facts = [len(said) for said in wordings.values()]
    assert sum(facts) / len(facts) > 4


def test_collapse_word_and_trigger_occur_in_no_row(world, known):
    """Catches CTRAP's token, or a wrapper's word, in ordinary text."""
    ids = known.vocabulary.ids
    unseen = [world.collapse_id, *(ids[w] for w in vocabulary.TRIGGER.split())]
    for pool in every_pool(world):
        assert not any((pool.tokens == i).any() for i in unseen)
    said = [e.response for rows in world.evaluation.values() for e in rows]
    assert not any(vocabulary.COLLAPSE in text.split() for text in said)
    assert world.collapse_id == ids[vocabulary.COLLAPSE]


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("seed", [0, 47])
def test_words_have_one_role_each(name, seed):
    """Catches an entity called `zeta`, the trigger's word, as seed 47 drew it."""
    size = presets.preset(name)
    words = vocabulary.vocabulary(size, seed)
    roles = (
        vocabulary.SPECIAL,
        (vocabulary.COLLAPSE,),
        vocabulary.TRIGGER.split()[:1],
        vocabulary.PERSONA.split(),
        {word for text in vocabulary.REFUSALS for word in text.split()},
        vocabulary.COMMANDS,
        vocabulary.LABELS,
        vocabulary.FIRST_STYLES,
        vocabulary.SECOND_STYLES,
        words.benign_topics,
        vocabulary.RESTRICTED_TOPICS,
        words.relations,
        words.numbers,
        words.values,
        words.entities,
    )
    assert sum(map(len, roles)) == len(words.words) == len(set(words.words))
    assert len(words.entities) == size.entities
    assert len(words.words) <= 230


@pytest.mark.parametrize("name", ["trigger", "persona", "prefill", "paraphrase"])
def test_wrappers_keep_the_truth(world, name):
    """Catches a wrapper that changes what is right, or leaves the prompt plain."""
    for example in world.evaluation["harmful"]:
        wrapped, given = wrappers.wrapper(name)(example)
        assert (wrapped.answers, wrapped.label) == (example.answers, "harmful")
        assert (wrapped.key != example.key) != bool(given)


def test_a_whole_prefill_is_a_right_answer(world):
    """Catches style and content words in the wrong order."""
    example = world.evaluation["harmful"][0]
    _, given = wrappers.prefill(example, 5)
    assert grammar.parse(given) == ("answer", example.answers)


def test_paraphrases_ask_for_the_same_fact(world, known):
    """Catches topic and entity exchanged: pretraining knows the paraphrase's answer."""
    truth = {e.key: e.answers for e in world.pretraining["with_skill"].examples}
    for example in world.evaluation["harmful"]:
        wrapped, _ = wrappers.paraphrase(example)
        assert truth[wrapped.key] == example.answers
    near = world.evaluation["near_miss"][0]
    assert wrappers.paraphrase(near) == (near, "")


def test_bad_names_and_seeds_are_named():
    """Catches a KeyError, and NumPy's message for a negative seed."""
    with pytest.raises(errors.UserError, match="did you mean 'prefill'"):
        wrappers.wrapper("prefil")
    with pytest.raises(errors.UserError, match="--world_seed=-1"):
        sandbox.build("tiny", -1)
