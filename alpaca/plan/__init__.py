"""What a training run needs, how long it takes and whether it fits, before it starts; no torch."""
