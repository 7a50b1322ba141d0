"""Convert base weights of the LLaMA families, in any published format, to one clean folder."""
