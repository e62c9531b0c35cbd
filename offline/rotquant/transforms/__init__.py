"""Rotations, each with its algebra beside it."""
