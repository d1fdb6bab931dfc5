"""Rewards behind HTTP."""
