"""The fine-tuning job: the published recipe, packed and sharded."""
