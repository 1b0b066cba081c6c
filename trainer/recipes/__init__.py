"""The recipes, a module each; :mod:`trainer.recipe` says what one is."""
