"""Solvers in jobs: what was chosen is part of what the job is."""

from __future__ import annotations

import pytest

import stepfuse as sf
from stepfuse.engine.generate.identity import of_settings
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.settings import Settings

TRAINED = sf.load("digits")
RECIPES = [
    Recipe(),
    Recipe("dpmpp"),
    Recipe("dpmpp", order=3),
    Recipe("dpmpp", order=1),
    Recipe("dpmpp", solver_type="heun"),
    Recipe("unipc"),
    Recipe("unipc", solver_type="bh1"),
    Recipe("heun"),
    Recipe("plms"),
    Recipe("euler", grid="karras"),
    Recipe("euler", grid="80,10,1"),
]


def hash_of(recipe: Recipe) -> str:
    return recipe.table_hash(TRAINED)


def test_each_has_a_table_of_its_own() -> None:
    """Orders that differ in what is remembered alone, too."""
    assert len({hash_of(recipe) for recipe in RECIPES}) == len(RECIPES)
    assert hash_of(Recipe("dpmpp", order=2)) == hash_of(Recipe("dpmpp"))


def test_jobs_without_a_choice_are_what_they_were() -> None:
    sampling = of_settings(Settings())["sampling"]
    assert set(sampling) == {"method", "steps", "spacing", "eta", "guidance", "optimize"}
    chosen = of_settings(Settings(recipe=Recipe("unipc", order=3, grid="karras")))["sampling"]
    assert chosen["order"] == 3
    assert chosen["grid"] == "karras"
    assert "solver_type" not in chosen


def test_settings_come_back_from_a_file() -> None:
    settings = Settings(recipe=Recipe("dpmpp", order=3, solver_type="heun", grid="3,1"))
    assert Settings.from_json(settings.to_json()) == settings
    old = settings.to_json()
    for name in ("order", "solver_type", "grid"):
        del old["recipe"][name]
    assert Settings.from_json(old).recipe == Recipe("dpmpp")


def test_sigmas_are_numbers_with_commas_between() -> None:
    recipe = Recipe("euler", grid="80,10,1")
    sampler = recipe.sampler(lambda x, t: x, TRAINED, optimize=False)
    assert len(sampler.timesteps) == 3
    with pytest.raises(ValueError, match="sigmas with commas between, like 80,10,1; got '8O,1'"):
        hash_of(Recipe("euler", grid="8O,1"))
    with pytest.raises(ValueError, match="grid must be one of karras"):
        hash_of(Recipe("euler", grid="cosine"))
