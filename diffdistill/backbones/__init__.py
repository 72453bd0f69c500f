"""Adapters from real networks to `Backbone`: one for all of diffusers, with a table of families, and a small MLP."""
