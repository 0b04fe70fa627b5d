"""Settings of known trainings, one YAML file each over a shared base."""

from pissa.recipes.catalogue import Recipe, copy, names, recipes, text

__all__ = ["Recipe", "copy", "names", "recipes", "text"]
