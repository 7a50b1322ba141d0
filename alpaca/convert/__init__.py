"""Base weights of any LLaMA family, in any of their formats, to one clean folder."""
