"""Evaluation of a test set, its results, and the options of the scripts that evaluate."""
