"""The bodies of requests to /v1: which keys, which types, which ranges.

Keys that the engine cannot serve are refused by name. A few have no meaning for a server of one
model, such as `user`; they are accepted, and described as having no effect.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alpaca.web.errors import ApiError

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Token = Annotated[int, Field(ge=0)]
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


class CompletionBody(Common):
    """Of POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
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

    A message of role `input`, before the user's, is the input of its instruction.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "input", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description=IGNORED)


class TextFormat(BaseModel):
    """The only format of answers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatBody(Common):
    """Of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
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


class PromptBody(BaseModel):
    """Of POST /page/prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    instruction: str
    input: str = ""
    model: str | None = None


Body = TypeVar("Body", bound=BaseModel)


def read(kind: type[Body], content: bytes) -> Body:
    """Check a body; raises ApiError 400 that names the first key that is wrong."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str | int))
        known = where.partition(".")[0] or None
        what = f"{where}: {first['msg']}" if where else first["msg"]
        if first["type"] == "extra_forbidden":
            what = f"{where} is not a key that this server knows. Leave it out."
        elif known and (field := kind.model_fields.get(known)) and field.description == UNSERVED:
            what = f"{known} is not supported by this server. Leave it out."
        raise ApiError(400, what, param=known) from None
