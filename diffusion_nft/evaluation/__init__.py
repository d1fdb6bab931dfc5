"""Evaluation of test sets: sampling and scoring, results, and options of the scripts."""
