"""Adapters: LoRA, taught words and other weights, each a part that is added to a model and taken away again."""
