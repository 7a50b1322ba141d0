"""The two Alpaca templates, and everything that is rendered from them.

The texts are an interface, byte for byte: every model trained on them since 2023 expects
exactly these prompts (Taori et al., "Stanford Alpaca", 2023). Training, serving and the chat
template stored in exported tokenizers all come from this module, so they cannot drift apart.
"""

import hashlib
import json

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)

# Everything before the instruction: the same text, at the same place, in every prompt of a kind.
PREFIXES = tuple(template.partition("{instruction}")[0] for template in (NO_INPUT, WITH_INPUT))


def render(instruction: str, input: str = "") -> str:  # noqa: A002 - the data set's own word
    """Return the prompt of an example; an empty `input` takes the no-input template."""
    # Pieces are joined, not formatted, so that braces in the text stay what they are.
    head, middle, tail = _pieces(WITH_INPUT if input else NO_INPUT)
    return head + instruction + middle + input + tail


def _pieces(template: str) -> tuple[str, str, str]:
    """Split a template at its fields; the last piece is empty where there is no input."""
    head, _, rest = template.partition("{instruction}")
    middle, _, tail = rest.partition("{input}")
    return head, middle, tail


def chat_template(adds_bos: bool) -> str:
    """Return the Jinja chat template that renders a conversation as Alpaca prompts.

    One user message renders exactly as `render` does (after the BOS token where the tokenizer
    adds one). A message of role `input` before it is its input. The templates know no system
    message, so one is put before the instruction that follows it, within the instruction.
    Earlier answers are closed with EOS, as a training example is.
    """
    head, middle, tail = (json.dumps(piece) for piece in _pieces(WITH_INPUT))
    head_plain, tail_plain, _ = (json.dumps(piece) for piece in _pieces(NO_INPUT))
    return "".join(
        [
            "{{ bos_token }}" if adds_bos else "",
            "{% set ns = namespace(system='', input='') %}",
            "{% for m in messages %}",
            "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\\n\\n' %}",
            "{% elif m['role'] == 'input' %}{% set ns.input = m['content'] %}",
            "{% elif m['role'] == 'user' %}{% set text = ns.system + m['content'] %}",
            f"{{% if ns.input %}}{{{{ {head} + text + {middle} + ns.input + {tail} }}}}",
            f"{{% else %}}{{{{ {head_plain} + text + {tail_plain} }}}}{{% endif %}}",
            "{% set ns.system = '' %}{% set ns.input = '' %}",
            "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}",
            "{% endif %}{% endfor %}",
        ]
    )


def template_hash() -> str:
    """SHA-256 of both templates: equal hashes mean equal prompts."""
    return hashlib.sha256(f"{WITH_INPUT}\0{NO_INPUT}".encode()).hexdigest()
