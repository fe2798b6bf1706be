"""Recipes, data, programs, plans and workers: everything that trains, and that an audit trains again."""
