"""Checks of a configuration and its inputs, before any model is loaded."""
