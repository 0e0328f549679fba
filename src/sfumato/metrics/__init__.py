"""Metrics as pure functions of arrays: distances of sets, segmentation, perturbation, statistics."""
