"""Ranks, collectives, and stopping on request."""
