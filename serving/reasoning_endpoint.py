"""vLLM endpoint plugin `puzzle_reasoning`: every client's own reasoning fields work, on all three APIs.

A middleware reads the fields from the body and finishes the reply (`dial/middleware.py`, `dial/reply.py`). Here the
handlers' entry methods, where requests arrive parsed and streaming is untouched, write what follows into vLLM's own
fields; the engine client that the handlers hold gives each request its limits (`thinking_engine.py`).
vLLM loads it only when VLLM_PLUGINS names it; `vllm-puzzle serve` does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.dial.middleware import DialMiddleware
from vllm_puzzle.serving.dial.request import ReasoningRequest, RequestError
from vllm_puzzle.serving.dial.resolve import Effective, ModelDial, resolve, template_arguments
from vllm_puzzle.serving.dial.system_line import needs_system_line, read_lines, with_line, with_system_line
from vllm_puzzle.serving.dial.turn import TURN, Turn
from vllm_puzzle.serving.reasoning_routes import make_router
from vllm_puzzle.serving.thinking_engine import ThinkingServer, WatchedEngine
from vllm_puzzle.serving.thinking_metrics import ThinkingMetrics
from vllm_puzzle.serving.thinking_plan import markers_of, markers_to_wire

Entry = Callable[..., Awaitable[Any]]
Apply = Callable[[Any, ReasoningRequest, ModelDial], Effective]


class ReasoningPlugin:
    """The endpoint plugin object that vLLM asks for (vllm.plugins.endpoint_plugins.EndpointPlugin)."""

    name = "puzzle_reasoning"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """The routes, and the middleware that reads the fields."""
        app.add_middleware(DialMiddleware)
        app.include_router(make_router())

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Wrap each handler that this server has."""
        model_config = engine_client.model_config
        tokenizer = getattr(engine_client.renderer, "tokenizer", None)
        template = vllm_compat.chat_template_text(args.chat_template, tokenizer)
        dial = ModelDial(
            template_arguments(template),
            has_system_line=needs_system_line(template, getattr(model_config.hf_config, "model_type", "")),
            has_budget=vllm_compat.counts_thinking_tokens(engine_client),
        )
        markers = markers_of(getattr(engine_client.vllm_config, "reasoning_config", None))
        server = ThinkingServer(engine_client, markers, on_finish=ThinkingMetrics().observe)
        if markers is not None:
            vllm_compat.observe_outputs(server.watches.observe)
            await engine_client.collective_rpc("puzzle_set_markers", args=(markers_to_wire(markers),))
        state.puzzle_thinking = server
        state.puzzle_capabilities = lambda name: {"can_disable": dial.has_switch}
        for name, method, apply in HANDLERS:
            handler = getattr(state, name, None)
            if handler is not None:
                handler.engine_client = WatchedEngine(handler.engine_client, server)
                if method:
                    setattr(handler, method, _wrap(handler, getattr(handler, method), apply, dial))


def make_plugin() -> ReasoningPlugin:
    """Entry point `vllm.endpoint_plugins: puzzle_reasoning`."""
    return ReasoningPlugin()


def _wrap(handler: Any, original: Entry, apply: Apply, dial: ModelDial) -> Entry:
    async def entry(request: Any, *args: Any, **kwargs: Any) -> Any:
        turn = TURN.get() or Turn("")
        try:
            turn.effective = apply(request, turn.wish, dial)
        except RequestError as error:
            return handler.create_error_response(str(error), param=error.param)
        return await original(request, *args, **kwargs)

    return entry


def _as_it_is(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    return Effective()


def apply_to_chat(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    """Write the wish into a vLLM ChatCompletionRequest, in place.

    A hidden thought stays in the request: vLLM's `include_reasoning: false` would start a grammar at the first token.
    It is taken out of the reply.
    """
    done = resolve(_with_text(wish, read_lines(request.messages)), dial)
    _set_template_arguments(request, done)
    request.reasoning_effort = done.effort
    request.thinking_token_budget = None  # the plan of thinking_engine.py says it
    if dial.has_system_line and done.is_on is not None:
        request.messages = with_system_line(request.messages, done.is_on)
    return done


def apply_to_responses(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    """Write the wish into a vLLM ResponsesRequest, in place."""
    lines = read_lines([{"role": "system", "content": request.instructions or ""}])
    done = resolve(_with_text(wish, lines), dial)
    _set_template_arguments(request, done)
    if dial.has_system_line and done.is_on is not None and not lines:
        request.instructions = with_line(request.instructions or "", done.is_on)
    effort = "none" if done.is_on is False else done.effort
    if effort is not None:
        request.reasoning = vllm_compat.responses_reasoning(effort)
    return done


def _set_template_arguments(request: Any, done: Effective) -> None:
    if done.template_arguments:
        request.chat_template_kwargs = {**(request.chat_template_kwargs or {}), **done.template_arguments}


def _with_text(wish: ReasoningRequest, lines: list[bool]) -> ReasoningRequest:
    """The wish with a system line's switch in it; two different answers are an error."""
    for is_on in lines:
        if wish.is_on not in (None, is_on):
            source = wish.sources["is_on"]
            raise RequestError(
                f"`{source}` asks for reasoning {_word(not is_on)}, a system line `detailed thinking` for "
                f"{_word(is_on)}; allowed: one answer",
                source,
            )
        source = "a system line `detailed thinking`"
        wish = replace(wish, is_on=is_on, sources={"is_on": source, **wish.sources})
    return wish


def _word(is_on: bool) -> str:
    return "on" if is_on else "off"


# (the handler's name on the server, its entry method, what writes the wish into its request). The Anthropic handler
# translates into a chat request, calls its own method, and translates the reply.
HANDLERS: tuple[tuple[str, str, Apply], ...] = (
    ("openai_serving_chat", "create_chat_completion", apply_to_chat),
    ("anthropic_serving_messages", "create_chat_completion", apply_to_chat),
    ("openai_serving_responses", "create_responses", apply_to_responses),
    ("openai_serving_completion", "", _as_it_is),
)
