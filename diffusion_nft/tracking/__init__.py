"""Logs, alarms, evaluations and printed summaries of a run."""
