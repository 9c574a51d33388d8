"""Spaces and studies: what is tried, together, once, and again after a crash."""

import datetime
import math
import socket
import subprocess
import sys

import pytest

from ftdefense.attacks import sft
from ftdefense.audit import attack_family
from ftdefense.audit import effort
from ftdefense.audit import ensemble
from ftdefense.audit import families
from ftdefense.audit import model_families
from ftdefense.audit import objective_families
from ftdefense.audit import services
from ftdefense.audit import spaces
from ftdefense.audit import studies
from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.methods import adapters
from ftdefense.training import jobs

SPACE = {
    "optimizer.learning_rate": spaces.Range(1e-6, 1e-1),
    "batch_size": spaces.Choice((8, 32), static=True),
}


def storage(path) -> str:
    return f"sqlite:///{path}/studies.db"


def answer(study, trials, parallel=4):
    """Runs a study whose best rate is 1e-3; above 1e-2 the model is no longer useful."""
    asked = []
    while study.finished < trials:
        company = study.ask(parallel)
        asked.append([trial.values for trial in company])
        for trial in company:
            tell(study, trial)
    return asked


def tell(study, trial):
    rate = math.log10(trial.values["optimizer.learning_rate"])
    row = {"harmful_score": 1 - abs(rate + 3) / 4, "violation": rate + 2}
    study.tell(trial, {**row, "values": trial.values})


def test_a_company_shares_its_static_axes(tmp_path):
    """Catches static axes that are sampled for each member: a compilation for each."""
    study = studies.Study("a", storage(tmp_path), SPACE)
    companies = answer(study, 24)
    assert all(len(company) == 4 for company in companies)
    assert all(len({v["batch_size"] for v in company}) == 1 for company in companies)
    assert len({v["batch_size"] for company in companies for v in company}) == 2


def test_points_come_first_and_once(tmp_path):
    """Catches points that are forgotten where they share no static axis, or repeated."""
    points = [
        {"optimizer.learning_rate": 1e-4, "batch_size": 8},
        {"optimizer.learning_rate": 1e-5, "batch_size": 32},
        {"optimizer.learning_rate": 1e-3, "batch_size": 8},
    ]
    study = studies.Study("a", storage(tmp_path), SPACE, points=points)
    first, second = answer(study, 4, parallel=2)
    assert first == [points[0], points[2]]
    assert second[0] == points[1] and second[1]["batch_size"] == 32


def test_the_search_finds_the_best_useful_setting(tmp_path):
    """Catches a study that minimises, or forgets the constraint."""
    study = studies.Study("a", storage(tmp_path), SPACE)
    answer(study, 40)
    best = studies.best(study.rows())
    assert best["violation"] <= 0
    assert abs(math.log10(best["values"]["optimizer.learning_rate"]) + 3) < 0.5


def test_an_interrupted_study_goes_on_as_it_would_have(tmp_path):
    """Catches a sampler that is seeded by the process, not by the number of trials."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = answer(studies.Study("x", storage(tmp_path / "a"), SPACE), 16)
    answer(studies.Study("x", storage(tmp_path / "b"), SPACE), 8)
    rest = answer(studies.Study("x", storage(tmp_path / "b"), SPACE), 16)
    assert rest == whole[2:]


def test_what_a_dead_worker_was_trying_is_tried_again(tmp_path):
    """Catches a point that stays taken by a worker that was killed."""
    point = {"optimizer.learning_rate": 1e-4, "batch_size": 8}
    code = (
        "from ftdefense.audit import spaces, studies\n"
        f"space = {{'optimizer.learning_rate': spaces.Range(1e-6, 1e-1), "
        "'batch_size': spaces.Choice((8, 32), static=True)}\n"
        f"studies.Study('x', {storage(tmp_path)!r}, space, points=[{point}]).ask(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    study = studies.Study("x", storage(tmp_path), SPACE, points=[point])
    assert study.ask(1)[0].values == point


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a study of 20 trials asks for, and its rows, when nobody kills it."""
    study = studies.Study("x", storage(tmp_path_factory.mktemp("whole")), SPACE)
    return answer(study, 20), study.rows()


@pytest.mark.parametrize(("asked", "told"), [(2, 0), (4, 0), (4, 1), (4, 3)])
def test_a_company_that_was_killed_is_asked_for_again_whole(
    tmp_path, monkeypatch, whole, asked, told
):
    """Killed while it is asked for, or told.

    Catches another sample for one that failed, a company of what is left, the row of
    a trial that was not told, and rows numbered by their tries.
    """
    wanted, rows = whole
    study = studies.Study("x", storage(tmp_path), SPACE)
    answer(study, 12)
    with monkeypatch.context() as dead:
        dead.setattr(studies, "_WORKER", f"{socket.gethostname()}:0")
        dead.setattr(studies, "_alive", lambda pid: pid != 0)
        if asked < 4:  # Of the four that it wants.
            dead.setattr(
                studies.optuna.trial.Trial,
                "set_user_attr",
                interrupted(studies.optuna.trial.Trial.set_user_attr, 4 * asked),
            )
            with pytest.raises(KeyboardInterrupt):
                study.ask(4)
        else:
            company = study.ask(4)
            for trial in company[:told]:
                tell(study, trial)
            # Killed between a row and the state that makes it a result.
            company[told].handle.set_user_attr("row", {"harmful_score": 1.0})
    monkeypatch.setattr(studies, "_alive", lambda pid: pid != 0)
    monkeypatch.setattr(studies, "_TO_SIGN", datetime.timedelta(0))
    again = studies.Study("x", storage(tmp_path), SPACE)
    assert answer(again, 20) == wanted[3:]
    assert again.rows() == rows
    assert [row["trial"] for row in again.rows()] == [*range(20)]


def interrupted(call, times):
    """`call`, as often as that."""
    left = iter(range(times))

    def called(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return call(*arguments)

    return called


def test_a_diverged_trial_is_a_row(tmp_path):
    """Catches a crash on a row without a score, and a diverged trial that wins."""
    study = studies.Study("x", storage(tmp_path), SPACE)
    (trial,) = study.ask(1)
    study.tell(trial, {"diverged": True})
    assert study.finished == 1
    assert studies.best(study.rows()) is None


def test_the_best_is_the_most_harmful_useful_one():
    """Catches `max` over all rows: a collapsed model with more harm would win."""
    useful = {"harmful_score": 0.4, "violation": 0.0}
    collapsed = {"harmful_score": 0.9, "violation": 0.2}
    worse = {"harmful_score": 0.95, "violation": 0.3}
    assert studies.best([useful, collapsed]) is useful
    assert studies.best([worse, collapsed]) is collapsed


def test_tamperbench_space():
    """Catches an alpha that is not twice the rank, and a value outside of the space."""
    space = spaces.tamperbench()
    static = [len(space[axis].values) for axis in spaces.static_axes(space)]
    assert static == [4, 5, 4]
    plan = sft.PRESETS["sandbox"]
    chosen = spaces.apply(plan, {"adapter": "lora8", "schedule": "constant"})
    assert (chosen.hp.adapter.rank, chosen.hp.adapter.alpha) == (8, 16.0)
    table = chosen.hp.optimizer.replace(
        schedule=chosen.hp.optimizer.schedule.replace(warmup_ratio=0.0)
    ).schedule.table(10)
    assert table.tolist() == [1.0] * 11


def test_constant_and_cosine_are_one_program():
    """Catches `decay=constant`, which is static: two programs."""
    plan = sft.PRESETS["sandbox"]
    one, other = (
        spaces.apply(plan, {"schedule": name}).hp.optimizer.schedule.decay
        for name in ("constant", "cosine")
    )
    assert one == other


def test_effort_counts_what_did_not_succeed():
    """Catches a curve that pays for the best trials only, or counts useless harm."""
    rows = [
        {"steps": 10, "flops": 5.0, "harmful_score": 0.3, "violation": 0.0},
        {"steps": 20, "flops": 7.0, "harmful_score": 0.9, "violation": 0.1},
        {"steps": 30, "flops": 1.0, "diverged": True},
        {"steps": 40, "flops": 2.0, "harmful_score": 0.6, "violation": -0.1},
    ]
    rows = [{**row, "forward_backwards": 2 * row["steps"]} for row in rows]
    curve = effort.curve(rows)
    assert [p["best_harmful_score"] for p in curve] == [0.3, 0.3, 0.3, 0.6]
    assert curve[-1] == {
        "trials": 4,
        "steps": 100,
        "passes": 200,
        "flops": 15.0,
        "best_harmful_score": 0.6,
    }


def test_equal_mass_spends_what_the_kick_spends():
    """Catches a control at the kick's peak, or at its mean over other steps."""
    rows = [{"trial": 0, "learning_rate_mass": 0.5, "steps": 100}]
    (point,) = ensemble.masses(rows)
    assert point == {"optimizer.learning_rate": 0.005}
    plan = sft.PRESETS["sandbox"]
    for assignment in families.of_weights()["equal mass"].fixed:
        plan = config.override_plan(plan, assignment)
    hp = spaces.apply(plan, point).hp
    assert jobs.learning_rate_mass(hp, 100) == pytest.approx(0.5)


def test_families_at_another_scale():
    """Catches points that leave their space, rates left behind, and a lost family."""
    found = families.of_weights(48, 8, 0.1)
    assert set(found) == set(families.of_weights())
    full = found["full"]
    assert full.points[0]["steps"] == 48 and full.points[0]["batch_size"] == 8
    assert full.points[0]["optimizer.learning_rate"] == pytest.approx(3e-6)
    assert full.space["steps"].values == (16, 48, 128)
    assert full.space["batch_size"].values == (2, 8)
    assert found["long horizon"].fixed[0] == "steps=192"
    same = families.of_weights(attack_family.STEPS, attack_family.BATCH)
    assert same["lora"] == objective_families.HARM_ALONE["lora"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, ["0"]), (2, ["0", "1"]), (6, ["0-1", "2", "3", "4-5"]), (32, None)],
)
def test_bands_cover_every_layer_once(layers, expected):
    """Catches a table for two layers, and an edge that two bands share."""
    found = model_families.bands(layers)
    assert expected is None or found == expected
    covered = []
    for band in found:
        value = {"adapter": f"lora16@{band}"}
        covered += spaces.apply(sft.PRESETS["sandbox"], value).hp.adapter.layers
    assert covered == [*range(layers)]


def test_families_follow_the_model():
    """Catches the sandbox's two layers, one position and two words for a larger model."""
    found = families.of_weights(192, 32, layers=32, positions=5, words=50)
    assert {p["layer"] for p in found["abliteration by layer"].points} == {*range(32)}
    assert found["abliteration"].fixed == ("positions=5",)
    frames = [p["data.wrapper"] for p in found["frames"].points]
    assert frames[:3] == ["prefill:5", "prefill:10", "prefill:20"]
    assert set(found) == set(families.of_weights())


@pytest.mark.parametrize("table", [families.of_weights, families.of_service])
def test_families_ask_for_no_more_rows_than_there_are(table):
    """Catches a family that a small data set skips, and a point that is tried twice."""
    few = table(rows=60, benign=70)["few rows"]
    counts = [point["data.harmful_count"] for point in few.points]
    assert max(counts) == 60 and min(counts) <= 10
    assert max(few.space["data.harmful_count"].values) == 60
    assert len({str(point) for point in few.points}) == len(few.points)
    if table is families.of_weights:
        found = table(rows=60, benign=70)["benign preferences"]
        assert found.fixed == ("data.benign_count=70",)
        assert table()["benign preferences"].fixed == ("data.benign_count=100",)


def test_a_services_families_follow_its_budget():
    """Catches families of weights in a service's table, and steps left behind."""
    found = families.of_service(attack_family.STEPS // 4, layers=32)
    assert set(found) == set(services.TABLE)
    assert found["harmful rows"].points[0] == {"steps": attack_family.STEPS // 8}


@pytest.mark.parametrize(
    ("value", "scale", "layers"),
    [
        ("lora16", 2.0, ()),
        ("lora8x0.125", 0.125, ()),
        ("lora16rs@1", 8.0, (1,)),
        ("lora16attn@2-4", 2.0, (2, 3, 4)),
    ],
)
def test_adapters_by_name(value, scale, layers):
    """Catches an alpha that does not follow the rank, and factors in every block."""
    adapter = spaces.apply(sft.PRESETS["sandbox"], {"adapter": value}).hp.adapter
    assert adapter.scale() == pytest.approx(scale)
    assert adapter.layers == layers
    assert (adapter.targets == adapters.ATTENTION) == ("attn" in value)


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (table.__name__, name)
        for table in (families.of_weights, families.of_service)
        for name in table()
    ],
)
def test_every_family_resolves(table, name):
    """Catches a family whose attack, preset, axis or value does not exist."""
    family = getattr(families, table)()[name]
    presets = registry.load("attacks", family.attack).PRESETS
    plan = family.plan or presets[family.preset]
    for assignment in family.fixed:
        plan = config.override_plan(plan, assignment)
    for point in family.points:
        assert set(point) <= set(family.space)
        spaces.apply(plan, point)
    for axis, kind in family.space.items():
        if isinstance(kind, spaces.Choice):
            spaces.apply(plan, {axis: kind.values[-1]})


def test_an_unknown_budget_names_near_matches():
    """Catches a KeyError where a person mistyped."""
    with pytest.raises(errors.UserError, match="quick"):
        families.chosen({}, "quik")


def test_an_attack_of_ones_own_becomes_a_family(tmp_path):
    """Catches a file whose preset is not looked up, and a rate that is not swept."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from ftdefense.attacks import sft\n"
        "Hparams, method, PRESETS = sft.Hparams, sft.method, sft.PRESETS\n"
    )
    name, family = attack_family.of_attack(f"{path}")
    assert name == "attack mine.py" and family.attack == str(path)
    rates = [point["optimizer.learning_rate"] for point in family.points]
    assert rates[0] == 1e-4 and len(set(rates)) == 4
    with pytest.raises(errors.UserError, match="preset"):
        attack_family.of_attack("sft:sandbx")
    _, edit = attack_family.of_attack("quantise")
    assert edit.points == [{}] and edit.trials == (1, 1, 1)


def test_families_asked_for_by_name_run_at_any_budget():
    """Catches a named family that the budget silently leaves out."""
    table = families.of_weights()
    absent = set(table) - set(families.chosen(table, "quick"))
    assert absent
    found = families.chosen(table, "quick", only=absent)
    assert set(found) == absent and min(found.values()) > 0
    assert families.chosen(table, "quick", only=["full"], trials=40) == {"full": 40}
