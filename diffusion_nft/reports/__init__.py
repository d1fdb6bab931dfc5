"""HTML report of runs, and model card of an exported LoRA."""
