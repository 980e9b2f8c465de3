"""Ours: a small Django project as a user would set it up."""
