"""Whether a model is better: its answers, scores, comparison by people and by a judge."""
