"""A run as checked data: what is trained, on what, how, and what is measured. TOML files and --set a.b=c make one.

No torch here, so that a mistake in a recipe is answered at once.
"""

from __future__ import annotations

from hessprobe.instruments.cross_layer.recipe import CrossLayerRecipe
from hessprobe.instruments.gn_hessian.recipe import GNHessianRecipe
from hessprobe.instruments.preconditioner.recipe import CANDIDATES, PreconditionerRecipe
from hessprobe.recipe.optimizer import GAUSS_NEWTON, OPTIMIZERS, OptimizerName, OptimizerRecipe
from hessprobe.recipe.reading import build_recipe, differences, parse_setting, read_recipe, shipped_recipes
from hessprobe.recipe.sections import (
    PROBES,
    DataRecipe,
    ModelRecipe,
    ProbeName,
    Recipe,
    TrainingRecipe,
)
from hessprobe.recipe.study import StudyRecipe, VariantRecipe

__all__ = [
    "CANDIDATES",
    "GAUSS_NEWTON",
    "OPTIMIZERS",
    "PROBES",
    "CrossLayerRecipe",
    "DataRecipe",
    "GNHessianRecipe",
    "ModelRecipe",
    "OptimizerName",
    "OptimizerRecipe",
    "PreconditionerRecipe",
    "ProbeName",
    "Recipe",
    "StudyRecipe",
    "TrainingRecipe",
    "VariantRecipe",
    "build_recipe",
    "differences",
    "parse_setting",
    "read_recipe",
    "shipped_recipes",
]
