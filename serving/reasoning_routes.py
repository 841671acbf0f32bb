"""Routes of the reasoning dial: what the models can do, and the end of a running thought."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from vllm_puzzle.model_configs.json_values import shown
from vllm_puzzle.serving.dial.dialects import named
from vllm_puzzle.serving.dial.json_body import declared_size, parse_body, read_body
from vllm_puzzle.serving.dial.request import RequestError

CONTROL = "/v1/chat/completions/control"
ACTION = "reasoning_end"
# A control message is a few words; the id of a request is shorter than this.
MAX_CONTROL_BYTES = 4096
# For the server's own OpenAPI document; `control` reads the body itself, to stop at the limit.
CONTROL_SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "action": {"const": ACTION}, "model": {}},
    "required": ["id", "action"],
    "additionalProperties": False,
}
CONTROL_BODY = {"required": True, "content": {"application/json": {"schema": CONTROL_SCHEMA}}}


def make_router() -> APIRouter:
    """Both routes. vLLM's own check of the API key stands before everything under /v1."""
    router = APIRouter()
    router.add_api_route(CONTROL, control, methods=["POST"], openapi_extra={"requestBody": CONTROL_BODY})
    router.add_api_route("/v1/models", models, methods=["GET"])
    return router


async def models(request: Request) -> JSONResponse:
    """vLLM's list, each model with what its reasoning can do."""
    state = request.app.state
    listed = (await state.openai_serving_models.show_available_models()).model_dump()
    for model in listed["data"]:
        model["reasoning"] = state.puzzle_capabilities(model["id"])
    return JSONResponse(listed)


async def control(request: Request) -> JSONResponse:
    """`{"id": ID, "action": "reasoning_end"}` ends the thought of a running chat completion (llama.cpp's route).

    The answer tells whether it was running. A request is found only with the Authorization header that it came with.
    """
    try:
        size = declared_size(dict(request.scope["headers"]))
        body = parse_body(await read_body(request.receive, MAX_CONTROL_BYTES, size))
    except RequestError as error:
        return _refused(error.status, str(error), error.param)
    if body is None or not isinstance(body.get("id"), str):
        return _refused(400, f"body: found no object with a string `id`, allowed: id and action, {MAX_CONTROL_BYTES} B")
    if body.get("action") != ACTION:
        return _refused(400, f"`action`: found {shown(body.get('action'))}, allowed: {ACTION}", "action")
    if unknown := sorted(set(body) - {"id", "action", "model"}):
        name = named(unknown[0])
        return _refused(400, f"`{name}`: found an unknown field, allowed: id, action, model", name)
    server = request.app.state.puzzle_thinking
    if server.markers is None:
        return _refused(
            400, "action: found on a server that knows no markers, allowed with --reasoning-parser", "action"
        )
    watch = server.watches.running.get(body["id"])
    # Another user's request is as unknown as one that never was.
    if watch is None or watch.authorization != request.headers.get("authorization"):
        return _refused(404, f"`id`: found no running request {shown(body['id'])}", "id")
    ended = await server.end_thinking(body["id"])
    return JSONResponse({"id": body["id"], "action": ACTION, "success": ended})


def _refused(status: int, message: str, param: str | None = None) -> JSONResponse:
    error = {"type": "invalid_request_error", "message": message, "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status)
