"""The Modelfile from which Ollama builds a model: the GGUF file, the template, where answers stop.

Ollama renders prompts with a template in Go's language. It renders a conversation as
`prompt.chat_template` does. llama.cpp adds the BOS token.
"""

from pathlib import Path

from alpaca import prompt
from alpaca.folder import load_tokenizer

MODEL = "model.gguf"


def modelfile(folder: Path) -> str:
    """The text of the Modelfile of a model folder."""
    eos = str(load_tokenizer(folder).eos_token)
    return "\n".join(
        [
            f"FROM ./{MODEL}",
            f'TEMPLATE """{template(eos)}"""',
            f'PARAMETER stop "{eos}"',
            "",
        ]
    )


def template(eos: str) -> str:
    """The no-input template in Go's template language, with earlier turns before the last.

    A system message is put at the start of each instruction, because the Alpaca templates have none
    and Ollama may repeat or move it.
    """
    head, _, tail = prompt.NO_INPUT.partition("{instruction}")
    system = "{{ if $.System }}{{ $.System }}\n\n{{ end }}"
    return (
        "{{- range .Messages }}"
        '{{- if eq .Role "user" }}' + head + system + "{{ .Content }}" + tail + "{{- end }}"
        '{{- if eq .Role "assistant" }}{{ .Content }}' + eos + "{{- end }}"
        "{{- end }}"
    )
