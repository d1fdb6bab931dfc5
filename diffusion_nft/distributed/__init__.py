"""Ranks, collectives, and requests to stop."""
