"""The bodies of requests to /v1: which keys, which types, which ranges.

Keys that the engine cannot serve are refused by name. A few have no meaning for a server of one
model, such as `user`; they are accepted, and described as having no effect.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from alpaca.web.errors import ApiError

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
MESSAGES = 1000  # in one chat
IGNORED = "Accepted, without effect."
UNSERVED = "Not supported: leave it out."


class StreamOptions(BaseModel):
    """What a stream tells besides text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(BaseModel):
    """What both kinds of completions have in common; vLLM's names where OpenAI has none."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="The id in /v1/models; the served one by default.")
    n: int | None = Field(None, ge=1, le=128, description="Answers to each prompt; 1 by default.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = Field(None, description="Up to 16 texts that end an answer.")
    temperature: float | None = Field(None, ge=0, le=5, description="1 by default; 0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 allow all tokens.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=5)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: Seed | None = None
    ignore_eos: bool | None = Field(None, description="Go on after end tokens, for benchmarks.")
    user: str | None = Field(None, description=IGNORED)
    metadata: dict[str, str] | None = Field(None, description=IGNORED)
    store: bool | None = Field(None, description=IGNORED)
    service_tier: str | None = Field(None, description=IGNORED)
    safety_identifier: str | None = Field(None, description=IGNORED)
    prompt_cache_key: str | None = Field(None, description=IGNORED)
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description=UNSERVED)


def kind_of_prompt(value: Any) -> str:
    """Which of the four kinds a prompt is, by its first item."""
    if not isinstance(value, list):
        return "text"
    if value and isinstance(value[0], int):
        return "ids"
    return "many" if value and isinstance(value[0], list) else "texts"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts")]
    | Annotated[list[Token], Tag("ids")]
    | Annotated[list[list[Token]], Tag("many")],
    Discriminator(kind_of_prompt),
]


class CompletionBody(Common):
    """Of POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, description="16 by default; 0 needs echo.")
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128, description="Only the value of n.")
    suffix: Literal[""] | None = Field(None, description=UNSERVED)


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat. `developer` is the newer name of `system`.

    A message of role `input`, before the user's, is the input of its instruction. An answer of this
    server may come back as a message: its keys that are null or empty are accepted.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "input", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description=IGNORED)
    type: Literal["text", "message"] | None = Field(None, description=IGNORED)
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


class TextFormat(BaseModel):
    """The only format of answers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatBody(Common):
    """Of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MESSAGES)
    max_tokens: int | None = Field(None, ge=1, description="Older name of the next.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens in an answer; by default what fits."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0, description=UNSERVED)
    tool_choice: Literal["none", "auto"] | None = Field(None, description=IGNORED)
    parallel_tool_calls: bool | None = Field(None, description=IGNORED)


class UnloadAdapterBody(BaseModel):
    """Of POST /v1/unload_lora_adapter, as vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(description="The adapter's id in /v1/models.")


class LoadAdapterBody(UnloadAdapterBody):
    """Of POST /v1/load_lora_adapter, as vLLM's."""

    lora_path: str = Field(description="Its folder, in the folder that the operator allows.")


class PromptBody(BaseModel):
    """Of POST /page/prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    instruction: str
    input: str = ""
    model: str | None = None


class ComparedBody(BaseModel):
    """Of POST /page/compared: an instruction, and OpenAI's keys that the page sets.

    Some servers refuse the last two, which are not OpenAI's; the page leaves out neutral values.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    instruction: str
    input: str = ""
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: list[str] | None = None
    seed: Seed | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


Body = TypeVar("Body", bound=BaseModel)


def read(kind: type[Body], content: bytes) -> Body:
    """Check a body; raises ApiError 400 that names the first key that is wrong."""
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is no JSON: {error}") from None
    if isinstance(given, dict):
        _refuse_early(given, kind)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str | int))
        known = where.partition(".")[0] or None
        what = f"{where}: {first['msg']}" if where else first["msg"]
        if known and (field := kind.model_fields.get(known)) and field.description == UNSERVED:
            what = f"{known} is not supported by this server. Leave it out."
        raise ApiError(400, what, param=known) from None


def _refuse_early(given: dict[str, Any], kind: type[BaseModel]) -> None:
    """Refuse the first item that is wrong, so that a body with millions of them costs little.

    pydantic would describe each, in kilobytes.
    """
    _refuse_unknown(given, kind)
    messages, prompt = given.get("messages"), given.get("prompt")
    if isinstance(messages, list):
        if len(messages) > MESSAGES:
            raise ApiError(400, f"messages may hold {MESSAGES:,}.", param="messages")
        for message in messages:
            if isinstance(message, dict):
                _refuse_unknown(message, Message, "messages")
    if isinstance(prompt, list):
        kinds = {"texts": str, "ids": int, "many": list}
        wanted = kinds[kind_of_prompt(prompt)]
        inner = (one for many in prompt if isinstance(many, list) for one in many)
        alike = all(type(one) is wanted for one in prompt) and all(
            type(one) is int for one in inner
        )
        if not alike:
            raise ApiError(
                400, "prompt is a text, texts, token ids, or lists of token ids.", param="prompt"
            )


def _refuse_unknown(given: dict[str, Any], kind: type[BaseModel], inside: str = "") -> None:
    """Refuse the first unknown key before anything else, so that millions of them cost nothing."""
    unknown = next((name for name in given if name not in kind.model_fields), None)
    if unknown is not None:
        name = f"{inside}.{unknown}" if inside else unknown
        raise ApiError(
            400,
            f"{name[:100]} is not a key that this server knows. Leave it out.",
            param=inside or unknown[:100],
        )
