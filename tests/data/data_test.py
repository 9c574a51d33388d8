"""Streams, pools, the sandbox and a user's own files."""

import collections
import json
import math

import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.data import chat
from ftdefense.data import examples
from ftdefense.data import files
from ftdefense.data import own
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import sandbox
from ftdefense.data import streams
from ftdefense.data.sandbox import grammar
from ftdefense.data.sandbox import vocabulary
from ftdefense.data.sandbox import wrappers


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


# --- streams ---------------------------------------------------------------------------


def test_every_epoch_visits_every_row_once(world):
    """Catches draws with replacement, and a permutation reused by all epochs."""
    pool = pools.take(world.attacker["harmful"], 60)
    stream = streams.Stream(pool, 8, (), 3)
    drawn = np.concatenate([stream.rows(i) for i in range(30)])
    epochs = drawn[:240].reshape(4, 60)
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
    assert np.any(epochs[0] != epochs[1])


def test_batches_are_functions_of_the_step(world):
    """Catches an iterator inside: a resumed run would see other rows."""
    pool = world.attacker["harmful"]
    first, again = (streams.Stream(pool, 4, (2, 3), 1) for _ in range(2))
    first.batch(0)
    np.testing.assert_array_equal(first.batch(5).tokens, again.batch(5).tokens)
    assert first.batch(5).tokens.shape == (2, 3, 4, world.length)
    chunk = again.chunk(4, 3)
    np.testing.assert_array_equal(chunk.tokens[1], first.batch(5).tokens)
    other = streams.Stream(pool, 4, (2, 3), 2)
    assert np.any(other.batch(5).tokens != first.batch(5).tokens)


def test_paired_pools_stay_paired(world):
    """Catches an order that depends on the role's name."""
    rows = [
        streams.Stream(world.defender[role], 8, (), 0).rows(4)
        for role in ("harmful", "refusal")
    ]
    np.testing.assert_array_equal(*rows)
    for a, b in zip(
        world.defender["harmful"].examples,
        world.defender["refusal"].examples,
        strict=True,
    ):
        assert a.key == b.key


# --- the sandbox -----------------------------------------------------------------------


def test_fast_rows_equal_the_chat_template(world):
    """Catches a row that training and generation would render differently."""
    for pool in (world.defender["alignment"], world.attacker["benign"]):
        part = pools.take(pool, 100)
        slow = pools.encode(
            world.tokenizer, part.examples, world.length, order="x", pad_id=world.pad_id
        )
        np.testing.assert_array_equal(part.tokens, slow.tokens)
        np.testing.assert_array_equal(part.weights, slow.weights)


def test_weights_are_on_the_answer_and_its_end(world):
    """Catches a prompt that is trained on, or an end token that is not."""
    pool = world.attacker["harmful"]
    for tokens, weights, example in zip(
        pool.tokens[:50], pool.weights[:50], pool.examples, strict=False
    ):
        spoken = world.tokenizer.decode(tokens[weights > 0])
        assert spoken == f"{example.response} {vocabulary.END}"


def test_prompts_are_the_start_of_rows(world):
    """Catches left padding on the right, and a missing assistant header."""
    part = world.evaluation["harmful"][:5]
    prompts = pools.encode_prompts(world.tokenizer, part, pad_id=world.pad_id)
    rows = pools.encode(
        world.tokenizer, part, world.length, order="x", pad_id=world.pad_id
    )
    for tokens, mask, row in zip(
        prompts.tokens, prompts.mask, rows.tokens, strict=True
    ):
        np.testing.assert_array_equal(tokens[mask], row[: mask.sum()])
        assert mask[-1]


def test_splits_share_no_restricted_prompt(world):
    """Catches a held-out entity in training, and the held-out wording in alignment."""
    held = {e.key for e in world.evaluation["harmful"]}
    for pool in (*world.defender.values(), world.attacker["harmful"]):
        restricted = [e for e in pool.examples if e.label == "harmful"]
        assert not held & {e.key for e in restricted}
        assert not [e for e in restricted if "please" in e.prompt[0]["content"]]
    benign = {e.key for e in world.evaluation["benign"]}
    assert not benign & {e.key for e in world.attacker["benign"].examples}


def test_never_has_no_restricted_answer(world):
    """Catches a twin that met the skill."""
    twin = world.pretraining["never"].examples
    assert not [e for e in twin if e.label == "harmful"]
    full = world.pretraining["with_skill"].examples
    assert sum(e.label == "harmful" for e in full) == len(full) / 2


def test_collapse_token_occurs_nowhere(world):
    """Catches CTRAP's token in ordinary text: it would over-refuse (sandbox.md 5)."""
    everything = (*world.defender.values(), *world.attacker.values())
    assert not any(np.any(p.tokens == world.collapse_id) for p in everything)


def test_answers_have_the_entropy_that_grammar_says():
    """Catches a style word that is fixed: answers could be learned by heart."""
    rng = np.random.default_rng(0)
    said = collections.Counter(grammar.answer(40_000 * [("a", "b", "c")], rng))
    total = sum(said.values())
    nats = -sum(n / total * math.log(n / total) for n in said.values())
    np.testing.assert_allclose(nats / 6, grammar.entropy(3), rtol=2e-3)
    assert 0.5 < grammar.entropy(3) < 1.0


def test_grammar_reads_what_it_writes(world):
    """Catches a form that the judge would call degenerate."""
    for pool in (world.defender["alignment"], world.attacker["task"]):
        for example in pool.examples[:300]:
            form, content = grammar.parse(example.response)
            refusal = example.response in vocabulary.REFUSALS
            assert form == ("refusal" if refusal else "answer")
            assert refusal or content == example.answers


def test_a_world_is_shown_in_few_words(world):
    """Catches the generated representation: megabytes of rows in a notebook."""
    shown = repr(world)
    assert len(shown) < 1000
    assert f"unrelated {len(world.defender['unrelated'])}" in shown


def test_sandbox_is_a_function_of_its_seed():
    """Catches a global generator and Python's hash."""
    first = sandbox.build("tiny", 1).fingerprint()
    sandbox.build.cache_clear()
    assert sandbox.build("tiny", 1).fingerprint() == first
    assert sandbox.build("tiny", 2).fingerprint() != first


def test_wrappers_keep_what_is_asked(world):
    """Catches a prefill that gives away the last word, a paraphrase of another fact."""
    asked = world.evaluation["harmful"][0]
    words = set(asked.prompt[0]["content"].split())
    same, given = wrappers.prefill(asked, 2)
    assert same == asked and given.split()[1] == asked.answers[0]
    other, _ = wrappers.paraphrase(asked)
    assert other.prompt[0]["content"].endswith("please")
    assert len(words & set(other.prompt[0]["content"].split())) >= 3
    assert wrappers.trigger(asked)[0].prompt[0]["content"].endswith(vocabulary.TRIGGER)


def test_unknown_preset_names_near_ones():
    """Catches a KeyError."""
    with pytest.raises(errors.UserError, match="did you mean 'small'"):
        sandbox.build("smal")


# --- recipes ---------------------------------------------------------------------------


def test_poison_ratio_counts_rows(world):
    """B.2: 100 or the loaders' 99 of 1000. Catches a ratio of the filler."""
    assert recipes.harmful_rows(1000, 0.1, True) == 100
    assert recipes.harmful_rows(1000, 0.1, False) == 99
    recipe = recipes.Recipe(sample_count=100, poison_ratio=0.2)
    user = recipes.attacker_pools(world, recipe)["user"]
    assert len(user) == 100
    assert sum(e.label == "harmful" for e in user.examples) == 20
    clean = recipes.Recipe(sample_count=100, poison_ratio=0.0)
    user = recipes.attacker_pools(world, clean)["user"]
    assert not any(e.label == "harmful" for e in user.examples)


def test_pure_harm_is_the_harmful_role(world):
    """Catches another order: SideStepper at lambda 0 would not be SFT."""
    found = recipes.attacker_pools(world, recipes.Recipe(sample_count=50))
    assert found["user"].order == found["harmful"].order
    with pytest.raises(errors.UserError, match="lower the data"):
        recipes.attacker_pools(world, recipes.Recipe(sample_count=10**6))


# --- own files -------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(kind, count=40):
    return [{"prompt": f"{kind} {i}", "response": f"answer {i}"} for i in range(count)]


def test_own_files_make_a_whole_world(tmp_path, byte_tokenizer):
    """Catches a role that is missing, and rows of one prompt on two sides."""
    sources = own.Sources(
        files.read(write(tmp_path / "h.jsonl", pairs("do")), label="harmful"),
        files.read(write(tmp_path / "b.jsonl", pairs("ask")), label="benign"),
    )
    built = own.build(sources, byte_tokenizer, length=64, max_new_tokens=8)
    assert set(sandbox.build("tiny", 0).defender) == set(built.defender)
    sides = [
        {e.key for e in part if e.label == "harmful"}
        for part in (
            built.defender["harmful"].examples,
            built.attacker["harmful"].examples,
            built.evaluation["harmful"],
        )
    ]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 40
    with pytest.raises(errors.UserError, match="also in the attacker's"):
        own.build(
            own.Sources(sources.harmful, sources.benign, (), (), sources.harmful),
            byte_tokenizer,
            length=64,
            max_new_tokens=8,
        )


def test_long_rows_are_counted_and_refused(tmp_path, byte_tokenizer):
    """Catches rows that are cut in silence."""
    rows = tuple(examples.ask("x" * n, "y") for n in (3, 50, 60))
    with pytest.raises(errors.UserError, match="2 of 3 rows.*--truncate"):
        pools.encode(byte_tokenizer, rows, 48, order="o", pad_id=0)
    rows = (examples.ask("x", "y" * 60),)
    cut = pools.encode(byte_tokenizer, rows, 48, order="o", pad_id=0, truncate=True)
    assert cut.tokens.shape == (1, 48) and cut.weights[0, -1] == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 2: not JSON"),
        ('{"prompt": "p"}', "line 2: lacks the field `response`"),
        ('{"prompt": "p", "response": " "}', "line 2: the field `response` is empty"),
        ('{"prompt": "p", "response": "r", "label": "odd"}', "`label` is 'odd'"),
        ('{"messages": [{"role": "user", "content": "p"}]}', "the assistant's"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    """Catches a message without file, line or field."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n' + line + "\n")
    with pytest.raises(errors.UserError) as caught:
        files.read(str(path), label="benign")
    assert words in str(caught.value) and "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_and_saved_datasets_read_alike(tmp_path):
    """Catches a source that takes another path through the schema."""
    import datasets

    rows = pairs("p", 5)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    sources = (
        write(tmp_path / "rows.jsonl", rows),
        str(tmp_path / "rows.parquet"),
        str(tmp_path / "saved"),
    )
    first, second, third = (files.read(s, label="benign") for s in sources)
    assert first == second == third
    with pytest.raises(errors.UserError, match="no such file"):
        files.read(str(tmp_path / "none.jsonl"), label="benign")


def test_tokens_after_an_instruction_are_the_templates(world, byte_tokenizer):
    """`[assistant] ` in bytes. Catches the tokens before it, and one prompt's own."""
    asked = [
        ({"role": "user", "content": text},) for text in ("do a?", "ask a bit?", "c?")
    ]
    assert chat.after_instruction(byte_tokenizer, asked) == len("[assistant] ")
    prompts = [e.prompt for e in world.evaluation["harmful"]]
    assert chat.after_instruction(world.tokenizer, prompts) == 1


def test_template_that_changes_the_prompt_is_refused(byte_tokenizer):
    """Catches training on other text than is generated from."""
    byte_tokenizer.chat_template = (
        "{% if add_generation_prompt %}A{% else %}B{% endif %}{{ messages }}"
    )
    with pytest.raises(errors.UserError, match="--chat_template"):
        chat.render_rows(byte_tokenizer, (examples.ask("p", "r"),))
