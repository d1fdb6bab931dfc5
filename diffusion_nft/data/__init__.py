"""Prompt sets: reading, fetching."""
