# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq recipes`: the recipes that come with the package."""

from typing import Annotated, Optional

import typer

from nemo_ptq.launch.recipes import read_recipe, recipe_file, recipe_names


def recipes(
    name: Annotated[Optional[str], typer.Argument(metavar="[NAME]", help="Recipe to show.")] = None,
) -> None:
    """List the recipes, or print one: its YAML can be changed and given to `nemo llm ptq --yaml`."""
    if name is not None:
        typer.echo(recipe_file(name).read_text(), nl=False)
        return
    for recipe in map(read_recipe, recipe_names()):
        typer.echo(f"{recipe.name:26}{recipe.hardware}")
