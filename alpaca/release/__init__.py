"""From a model folder to other programs: GGUF files, weight diffs, archives, a model card."""
