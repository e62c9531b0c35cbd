"""Choosing parts of a recipe by what they do to the model in hand."""
