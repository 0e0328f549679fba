"""Experiments that measure again what papers claim and what this repository promises: ``python -m claims [KEY...]``."""
