"""OpenAI's error objects."""

from starlette.responses import JSONResponse

KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
RETRY_SECONDS = {429: 1, 503: 5}


class ApiError(Exception):
    """An answer with an HTTP status; `param` is the request's key that is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        """`code` is OpenAI's machine-readable reason, for example model_not_found."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, object]:
        """The object that OpenAI's clients read."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {}
        if self.status in RETRY_SECONDS:
            headers["Retry-After"] = str(RETRY_SECONDS[self.status])
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="the API key as the password"'
        return JSONResponse(self.body(), self.status, headers)
