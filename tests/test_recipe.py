"""A recipe is checked whole before anything runs, and goes to TOML and back unchanged."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hessprobe.errors import UserError
from hessprobe.recipe import (
    OPTIMIZERS,
    PROBES,
    Recipe,
    build_recipe,
    differences,
    parse_setting,
    read_recipe,
    shipped_recipes,
)


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
    "unknown optimizer": (["optimizer.name=sgd"], "no optimizer named 'sgd'.*Valid: full_gn, adamw"),
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
