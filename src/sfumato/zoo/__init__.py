"""The built-in models: weights, recipes, and the objectives that train them; :mod:`sfumato.registry` finds them."""
