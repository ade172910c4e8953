"""A recipe is checked whole before anything runs, and goes to TOML and back unchanged."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hessprobe.errors import UserError
from hessprobe.recipe import (
    GAUSS_NEWTON,
    OPTIMIZERS,
    PROBES,
    Recipe,
    build_recipe,
    differences,
    parse_setting,
    read_recipe,
    shipped_recipes,
)
from hessprobe.recipe.runs import variant_run, warm_up_run


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name):
    assert build_recipe(read_recipe(name)).name == name


def test_the_default_is_full_gauss_newton_on_the_standard_library():
    recipe = build_recipe(read_recipe("nano"))
    assert (recipe.optimizer.name, recipe.model.size, recipe.data.source) == ("full_gn", "nano", "stdlib")
    assert len(range(0, recipe.training.steps, recipe.cross_layer.every)) >= 6


def test_settings_change_a_value_each_the_last_one_wins_and_the_base_stays():
    base = {"optimizer": {"sequences": 4}}
    settings = ["optimizer.sequences=8", "training.steps=3", "optimizer.sequences=16", "model.tied=true"]
    recipe = build_recipe(base, settings)
    assert (recipe.optimizer.sequences, recipe.training.steps, recipe.model.tied) == (16, 3, True)
    assert base == {"optimizer": {"sequences": 4}}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("3", 3), ("1e-3", 1e-3), ("true", True), ('"3"', "3"), ("corpus/a b.txt", "corpus/a b.txt"), ("", ""),
     ('["cross_layer"]', ["cross_layer"]), ("a=b", "a=b")],
)  # fmt: skip
def test_a_settings_value_is_toml_or_else_plain_text(setting, value):
    assert parse_setting(f"a.b={setting}") == (["a", "b"], value)


@given(
    seed=st.integers(0, 2**31),
    source=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
    rate=st.none() | st.floats(1e-9, 1e3),
    probes=st.lists(st.sampled_from(PROBES), max_size=1),
    optimizer=st.sampled_from(OPTIMIZERS),
)
def test_a_recipe_goes_to_toml_and_back(seed, source, rate, probes, optimizer):
    recipe = build_recipe({
        "seed": seed, "probes": probes, "data": {"source": source},
        "optimizer": {"name": optimizer, "learning_rate": rate},
    })  # fmt: skip
    again = build_recipe(tomllib.loads(recipe.to_toml()))
    assert again == recipe
    assert differences(recipe, again) == []
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_differences_name_the_value_and_both_sides():
    changed = build_recipe({}, ["optimizer.learning_rate=0.05", "training.steps=7"])
    assert differences(Recipe(), changed) == [
        "optimizer.learning_rate: None -> 0.05",
        "training.steps: 18 -> 7",
    ]


def test_a_recipe_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[training]\nsteps = 2\n', encoding="utf-8")
    assert build_recipe(read_recipe(path)).training.steps == 2


BAD = {
    "unknown key": (["sed=1"], r"no recipe key named 'sed'\. Did you mean 'seed'.*Valid: name, seed,"),
    "unknown key in a section": (
        ["optimizer.rate=1"],
        r"no recipe key in \[optimizer\] named 'rate'.*learning_rate",
    ),
    "unknown section": (["modle.layers=1"], "no recipe key named 'modle'. Did you mean 'model'"),
    "unknown probe": (['probes=["crosslayer"]'], "no probe named 'crosslayer'.*Valid: cross_layer"),
    "unknown optimizer": (
        ["optimizer.name=sgd"],
        "no optimizer named 'sgd'.*Valid: full_gn, layerwise_gn, prox_linear, adamw, muon, soap, shampoo, sophia, kfac",
    ),
    "a batch that does not divide": (
        ["optimizer.batch=100"],
        r"\[optimizer\]: batch = 100 does not divide .* sequences = 32; wanted a multiple, such as 96 or 128",
    ),
    "a batch smaller than a minibatch": (
        ["optimizer.batch=5"],
        "batch = 5 does not divide.* such as 32 or 64",
    ),
    "no inner steps": (["optimizer.inner_steps=0"], "inner_steps = 0: .*greater than or equal to 1"),
    "an empty line-search grid": (
        ["optimizer.line_search_grid=[]"],
        r"optimizer.line_search_grid = \[\]: the line search needs at least 1 step size; leave it out for 5",
    ),
    "a line-search grid of 0": (
        ["optimizer.line_search_grid=0"],
        "line_search_grid = 0: the line search needs",
    ),
    "a line-search grid below 0": (
        ["optimizer.line_search_grid=-1"],
        "line_search_grid = -1: the line search",
    ),
    "a line-search grid of nothing": (
        ["optimizer.line_search_grid="],
        "line_search_grid = '': the line search",
    ),
    "prox-linear by conjugate gradients": (
        ["optimizer.name=prox_linear", "optimizer.inner_solver=cg"],
        r"\[optimizer\]: there is no prox_linear with inner_solver cg; there are full_gn and layerwise_gn, each with "
        "inner_solver muon, adamw, soap or cg; prox_linear with structure full or layerwise and inner_solver muon",
    ),
    "a baseline with a structure": (
        ["optimizer.name=adamw", "optimizer.structure=layerwise"],
        "there is no adamw with structure layerwise; there are full_gn",
    ),
    "a structure against the name": (
        ["optimizer.structure=layerwise"],
        "there is no full_gn with structure layerwise; there are full_gn and layerwise_gn",
    ),
    "inner steps of conjugate gradients": (
        ["optimizer.inner_solver=cg", "optimizer.inner_steps=3"],
        "inner_steps with inner_solver cg: .*bound them with cg_iterations",
    ),
    "Gauss-Newton with a rising learning rate": (
        ["optimizer.learning_rate_warmup=3"],
        "learning_rate_warmup with full_gn: the line search bounds its first steps",
    ),
    "unknown inner solver": (
        ["optimizer.inner_solver=sgd"],
        "inner_solver = 'sgd': input should be 'muon', 'adamw'",
    ),
    "damping below 0": (["optimizer.damping=-1"], "damping = -1: .*greater than or equal to 0"),
    "K-FAC without damping": (
        ["optimizer.name=kfac", "optimizer.damping=0"],
        "damping = 0 with kfac: .*wanted more than 0",
    ),
    "an infinite target": (["training.stop_at=inf"], "training.stop_at = inf: .*finite"),
    "no steps": (["training.steps=0"], "training.steps = 0: .*greater than or equal to 1"),
    "a fraction of a step": (["training.steps=1.5"], r"training.steps = 1.5: .*integer"),
    "a learning rate below 0": (["optimizer.learning_rate=-1"], "learning_rate = -1.*greater than 0"),
    "a learning rate that is none": (["optimizer.learning_rate=nan"], "learning_rate = nan"),
    "too few samples": (
        ["cross_layer.samples=1"],
        "cross_layer.samples = 1.*at least|greater than or equal to 2",
    ),
    "no value": (["optimizer.name"], "wanted key=value, such as --set"),
    "no key": (["=3"], "wanted key=value"),
    "a value taken for a section": (["name=a", "name.b=3"], "'name' is a value, not a section"),
    "a section taken for a value": (["optimizer=adamw"], "recipe key optimizer = 'adamw'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_told_with_what_is_valid(case):
    settings, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        build_recipe({}, settings)
    assert "\n" not in str(caught.value)


def test_several_mistakes_are_all_told():
    with pytest.raises(UserError) as caught:
        build_recipe({}, ["sed=1", "training.steps=0"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_recipe_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="no recipe named 'nanno'. Did you mean 'nano'.*path to a .toml file"):
        read_recipe("nanno")
    with pytest.raises(UserError, match="no recipe file at .*mine.toml; shipped recipes: .*nano"):
        read_recipe(tmp_path / "mine.toml")
    (tmp_path / "torn.toml").write_text("[training\n", encoding="utf-8")
    with pytest.raises(UserError, match="torn.toml is not a TOML recipe"):
        read_recipe(tmp_path / "torn.toml")


def test_a_batch_is_another_way_to_say_minibatches():
    assert build_recipe({}, ["optimizer.batch=96"]).optimizer.minibatches == 3
    file = {"optimizer": {"minibatches": 8, "sequences": 32}}
    assert build_recipe(file, ["optimizer.batch=64"]).optimizer.minibatches == 2
    by_batch = {"optimizer": {"batch": 64, "sequences": 16}}
    assert build_recipe(by_batch).optimizer.minibatches == 4
    assert build_recipe(by_batch, ["optimizer.sequences=8"]).optimizer.minibatches == 8
    one = build_recipe(by_batch, ["optimizer.minibatches=3"]).optimizer
    assert (one.minibatches, one.batch) == (3, None)
    stored = build_recipe(by_batch).model_dump(exclude_none=True)
    assert build_recipe(stored, ["optimizer.sequences=32"]).optimizer.minibatches == 2
    with pytest.raises(
        UserError, match="batch = 64 is 2 minibatches of 32 sequences, but minibatches = 8; give one"
    ):
        build_recipe({"optimizer": {"minibatches": 8, "batch": 64}})


def test_a_line_search_has_the_studys_grid_unless_told():
    grids = {
        name: build_recipe({}, [f"optimizer.name={name}"]).optimizer.step_sizes
        for name in ("full_gn", "layerwise_gn")
    }
    assert grids == {"full_gn": 5, "layerwise_gn": 10}
    layerwise = build_recipe({}, ["optimizer.name=prox_linear", "optimizer.structure=layerwise"]).optimizer
    assert layerwise.step_sizes == 10
    assert build_recipe({}, ["optimizer.line_search_grid=3"]).optimizer.step_sizes == 3


def test_only_gauss_newton_reads_data_to_search():
    for name in OPTIMIZERS:
        optimizer = build_recipe({}, [f"optimizer.name={name}", "optimizer.minibatches=6"]).optimizer
        assert optimizer.searched == (6 if name in GAUSS_NEWTON else 0)


STUDY = {
    "optimizer": {"sequences": 4, "batch": 8},
    "study": {
        "target_loss": 2.0,
        "seeds": 2,
        "warm_up_steps": 3,
        "variants": [
            {
                "name": "a",
                "learning_rates": [0.1, 0.2],
                "settings": {"optimizer.name": "adamw", "optimizer.batch": 16},
            },
            {"name": "b", "learning_rates": [0.3]},
        ],
    },
}


def changed(path: str, value) -> dict:
    """Returns the study with one value replaced; the path goes through lists by number."""
    study = json.loads(json.dumps(STUDY))
    *before, last = path.split(".")
    place = study
    for part in before:
        place = place[int(part) if isinstance(place, list) else part]
    place[last] = value
    return study


class TestStudy:
    """A study's variants are recipes, and are checked before anything runs."""

    def test_a_variant_is_the_recipe_with_its_settings_on_top(self):
        recipe = build_recipe(STUDY, ['probes=["cross_layer"]', "seed=7"])
        assert recipe.study is not None
        run = variant_run(recipe, recipe.study.variants[0], 0.2, 8, "out/warm-up/seed-8")
        assert (run.seed, run.optimizer.name, run.optimizer.learning_rate) == (8, "adamw", 0.2)
        assert (run.optimizer.batch, run.optimizer.minibatches, run.study) == (16, 4, None)
        assert (run.training.stop_at, run.training.start_from) == (2.0, "out/warm-up/seed-8")
        assert run.optimizer.warmup_steps == 0 and run.probes == ("cross_layer",)
        other = variant_run(recipe, recipe.study.variants[1], 0.3, 7, None)
        assert (other.optimizer.name, other.optimizer.minibatches) == ("full_gn", 2)
        warm_up = warm_up_run(recipe, 7)
        assert (warm_up.training.steps, warm_up.optimizer.warmup_steps, warm_up.probes) == (3, 3, ())
        assert warm_up.training.stop_at is None and warm_up.study is None

    def test_it_goes_to_toml_and_back(self):
        recipe = build_recipe(STUDY)
        assert build_recipe(tomllib.loads(recipe.to_toml())) == recipe
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        assert differences(recipe, build_recipe({})) != []

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("study.variants.0.settings", {"optimizer.rate": 1}, "study variant 'a': no recipe key .* named 'rate'"),
            ("study.variants.0.settings", {"optimizer.batch": 7}, "study variant 'a': .*batch = 7 does not divide"),
            ("study.variants.0.settings", {"seed": 1}, "the study itself decides seed"),
            ("study.variants.0.settings", {"name.a": 1}, "study variant 'a': name.a = 1: 'name' is a value"),
            ("study.variants.0.learning_rates", [], "learning_rates = .*at least 1 item"),
            ("study.variants.0.learning_rates", [0.1, -1], "wanted learning rates above 0, each once"),
            ("study.variants.0.learning_rates", [0.1, 0.1], "wanted learning rates above 0, each once"),
            ("study.variants.0.name", "b", "variants need names of their own; twice: b"),
            ("study.variants.0.name", "a/b", "it names a folder: letters, digits"),
            ("study.variants.0.name", "warm-up", "it names a folder: .*not 'warm-up'"),
            ("study.variants.0.rates", [0.1], "no recipe key in .study.variants.0. named 'rates'.*learning_rates"),
            ("study.variants", [], "variants = .*at least 1 item"),
            ("study.seeds", 0, "study.seeds = 0"),
            ("study.target", 1.0, "no recipe key in .study. named 'target'. Did you mean 'target_loss'"),
            ("study.target_loss", -1, "study.target_loss = -1"),
        ],
    )  # fmt: skip
    def test_a_mistake_in_it_is_told(self, path, value, message):
        with pytest.raises(UserError, match=message):
            build_recipe(changed(path, value))

    def test_what_is_missing_is_told(self):
        with pytest.raises(UserError, match="recipe key study.target_loss is missing"):
            build_recipe({"study": {"variants": STUDY["study"]["variants"]}})
