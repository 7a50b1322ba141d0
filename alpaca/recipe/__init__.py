"""What a run is made of, decided without torch: flags, examples, packs, steps and shared rules."""
