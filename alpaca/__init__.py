"""Turn base LLaMA-family weights into an instruction-following model, and serve it.

One package per task: convert, training, plan, serving, dataset and doctor import the shared modules
(model, tokens, passport, recipe and others), which import prompt, layout, atomic and errors.
"""

__version__ = "0.1.0"
