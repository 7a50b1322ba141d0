"""Turn base LLaMA-family weights into an instruction-following model, and serve it.

Five verbs, one room each: convert, training, serving and dataset stand on the shared
modules (model, tokens, passport, records), which stand on prompt, atomic and errors.
"""

__version__ = "0.1.0"
