"""What the gateway answers itself: one line, in the shape of the API that was called."""

from __future__ import annotations

from typing import Any

MESSAGES_PATH = "/v1/messages"
TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 502: "upstream_error"}


class GatewayError(Exception):
    """An answer with a status; `param` is the field at fault, where there is one."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class UpstreamRefusal(Exception):
    """The upstream's own answer with an error status, passed on as it is."""

    def __init__(self, status: int, content_type: str, content: bytes) -> None:
        super().__init__(content[:300].decode(errors="replace"))
        self.status = status
        self.content_type = content_type
        self.content = content


def error_body(path: str, error: GatewayError) -> dict[str, Any]:
    """OpenAI's shape, or Anthropic's on its path."""
    kind = {"type": TYPES.get(error.status, "invalid_request_error"), "message": str(error)}
    if path.startswith(MESSAGES_PATH):
        return {"type": "error", "error": kind}
    return {"error": {**kind, "param": error.param, "code": error.status}}
