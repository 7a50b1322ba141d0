"""The two Alpaca templates, and everything that is rendered from them.

The texts must not change by a single byte: every model trained on them since 2023 expects exactly
these prompts (Taori et al., "Stanford Alpaca", 2023). Training, serving and the chat template of
exported tokenizers all use this module, so they always agree.
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

# The text before the instruction. All prompts of one template start with it.
PREFIXES = tuple(template.partition("{instruction}")[0] for template in (NO_INPUT, WITH_INPUT))


def render(instruction: str, input: str = "") -> str:  # noqa: A002 - the data set's name for it
    """Return the prompt of an example; an empty `input` selects the no-input template."""
    # Pieces are joined instead of formatted, so that braces in the text are kept.
    head, middle, tail = _pieces(WITH_INPUT if input else NO_INPUT)
    return head + instruction + middle + input + tail


def plain(instruction: str, input: str = "") -> str:  # noqa: A002
    """Instruction and input as a person writes them: for people, and for other projects' models."""
    return f"{instruction}\n\n{input}" if input else instruction


def _pieces(template: str) -> tuple[str, str, str]:
    """Split a template at its fields; without an input field, the last piece is empty."""
    head, _, rest = template.partition("{instruction}")
    middle, _, tail = rest.partition("{input}")
    return head, middle, tail


def chat_template(adds_bos: bool) -> str:
    """Return the Jinja chat template that renders a conversation as Alpaca prompts.

    One user message is rendered exactly as by `render`, after the BOS token if the tokenizer adds
    one. A message of role `input` before it becomes its input. The Alpaca templates have no system
    message, so the text of one is put at the start of the next instruction. Earlier answers end
    with EOS, like training examples. A message's content is a text, or a list of text parts.
    """
    head, middle, tail = (json.dumps(piece) for piece in _pieces(WITH_INPUT))
    head_plain, tail_plain, _ = (json.dumps(piece) for piece in _pieces(NO_INPUT))
    return "".join(
        [
            "{{ bos_token }}" if adds_bos else "",
            "{% set ns = namespace(system='', input='', text='') %}",
            "{% for m in messages %}",
            "{% if m['content'] is string %}{% set ns.text = m['content'] %}",
            "{% else %}{% set ns.text = '' %}{% for part in m['content'] %}",
            "{% if part['type'] != 'text' %}{{ raise_exception('Only text is answered.') }}",
            "{% endif %}{% set ns.text = ns.text + part['text'] %}{% endfor %}{% endif %}",
            "{% if m['role'] == 'system' %}{% set ns.system = ns.text + '\\n\\n' %}",
            "{% elif m['role'] == 'input' %}{% set ns.input = ns.text %}",
            "{% elif m['role'] == 'user' %}{% set text = ns.system + ns.text %}",
            f"{{% if ns.input %}}{{{{ {head} + text + {middle} + ns.input + {tail} }}}}",
            f"{{% else %}}{{{{ {head_plain} + text + {tail_plain} }}}}{{% endif %}}",
            "{% set ns.system = '' %}{% set ns.input = '' %}",
            "{% elif m['role'] == 'assistant' %}{{ ns.text + eos_token }}",
            "{% endif %}{% endfor %}",
        ]
    )


def template_hash() -> str:
    """SHA-256 of both templates; equal hashes mean equal prompts."""
    return hashlib.sha256(f"{WITH_INPUT}\0{NO_INPUT}".encode()).hexdigest()
