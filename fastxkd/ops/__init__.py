"""The operators: each file holds one, from schema to gradient. See ``_library`` for the choice
of kernel."""
