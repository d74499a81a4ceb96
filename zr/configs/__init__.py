"""Recipes and rubrics as package data: YAML files that ``--config zr:NAME`` and ``Rubric.load("zr:NAME")`` read."""
