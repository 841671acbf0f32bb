"""vLLM endpoint plugin `puzzle_reasoning`: every client's own reasoning fields work, on all three APIs.

A middleware reads the fields from the body and finishes the reply (`dial/middleware.py`, `dial/reply.py`). Here the
handlers' entry methods, where requests arrive parsed and streaming is untouched, write what follows into vLLM's own
fields; the engine client that the handlers hold gives each request its limits (`thinking_engine.py`).
vLLM loads it only when VLLM_PLUGINS names it; `vllm-puzzle serve` does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from vllm_puzzle.kernels.thinking import ThinkingMarkers
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.consistent_parser import consistent
from vllm_puzzle.serving.dial.capabilities import capabilities
from vllm_puzzle.serving.dial.derive import preset
from vllm_puzzle.serving.dial.middleware import DialMiddleware
from vllm_puzzle.serving.dial.policy import policy_from_environment
from vllm_puzzle.serving.dial.profile import profile_of
from vllm_puzzle.serving.dial.request import ReasoningRequest, RequestError
from vllm_puzzle.serving.dial.resolve import Effective, ModelDial, resolve, settled_messages, text_state
from vllm_puzzle.serving.dial.responses_text import as_messages, whole_output_messages, write_back
from vllm_puzzle.serving.dial.text_switch import plain_messages
from vllm_puzzle.serving.dial.turn import TURN, Turn
from vllm_puzzle.serving.reasoning_routes import make_router
from vllm_puzzle.serving.thinking_engine import ThinkingServer, WatchedEngine, limits_alone
from vllm_puzzle.serving.thinking_markers import make_markers
from vllm_puzzle.serving.thinking_metrics import ThinkingMetrics
from vllm_puzzle.serving.thinking_plan import markers_to_wire

# Null in a Responses request is allowed, but not in vLLM's reply, which repeats them: an error after all tokens are
# made, or a stream that breaks off.
NOT_NULL = ("background", "truncation")
Entry = Callable[..., Awaitable[Any]]
Apply = Callable[[Any, ReasoningRequest, ModelDial], Effective]


class ReasoningPlugin:
    """The endpoint plugin object that vLLM asks for (vllm.plugins.endpoint_plugins.EndpointPlugin)."""

    name = "puzzle_reasoning"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """The routes, and the middleware that reads the fields."""
        app.add_middleware(DialMiddleware, max_body_bytes=policy_from_environment().max_body_bytes)
        app.include_router(make_router())

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Wrap each handler that this server has."""
        markers, dial = model_dial(engine_client, args)
        server = ThinkingServer(engine_client, markers, dial.policy, on_finish=ThinkingMetrics().observe)
        if markers is not None:
            vllm_compat.observe_outputs(server.watches.observe)
            await vllm_compat.ask_workers(engine_client, "puzzle_set_markers", markers_to_wire(markers))
        state.puzzle_thinking = server
        state.puzzle_capabilities = lambda name: capabilities(dial.profile, dial.policy, name, dial.has_budget)
        for handler in vllm_compat.handlers(state):  # of every path, known here or not: the ceiling holds on all
            make_parser = use_consistent_parser(handler, markers, getattr(engine_client.renderer, "tokenizer", None))
            handler.engine_client = WatchedEngine(handler.engine_client, server, make_parser)
        for name, method, apply in HANDLERS:
            handler = getattr(state, name, None)
            if handler is not None:
                setattr(handler, method, _wrap(handler, getattr(handler, method), apply, dial))


def use_consistent_parser(handler: Any, markers: ThinkingMarkers | None, tokenizer: Any) -> Any:
    """Replace the class of the parsers that this handler makes (chat and messages: parser_cls; responses: parser).

    Returns a maker of such parsers from vLLM's own arguments for them; None where nothing is replaced.
    """
    for name in ("parser_cls", "parser"):
        parser_cls = getattr(handler, name, None)
        if (ours := consistent(parser_cls, markers, tokenizer)) is not parser_cls:
            setattr(handler, name, ours)
            return partial(ours, tokenizer, None)
    return None


def model_dial(engine_client: Any, args: Any) -> tuple[ThinkingMarkers | None, ModelDial]:
    """The served model's markers, where they are known, and its dial: profile from its template and type, policy from
    the environment."""
    model_config = engine_client.model_config
    tokenizer = getattr(engine_client.renderer, "tokenizer", None)
    template = vllm_compat.chat_template_text(args.chat_template, tokenizer)
    names = [*(getattr(args, "served_model_name", None) or []), model_config.model]
    start, end = vllm_compat.thinking_texts(engine_client)
    profile = profile_of(vllm_compat.model_type(model_config), " ".join(names), template, start, end)
    profile = preset(profile, getattr(args, "default_chat_template_kwargs", None) or {})
    policy = policy_from_environment()
    markers = make_markers(tokenizer, profile, policy.phrase, vllm_compat.reasoning_config(engine_client))
    return markers, ModelDial(profile, policy, markers is not None, names[0])


def make_plugin() -> ReasoningPlugin:
    """Entry point `vllm.endpoint_plugins: puzzle_reasoning`."""
    return ReasoningPlugin()


def _wrap(handler: Any, original: Entry, apply: Apply, dial: ModelDial) -> Entry:
    async def entry(request: Any, *args: Any, **kwargs: Any) -> Any:
        turn = TURN.get()
        if turn is None:  # a path without the dial's middleware
            turn = Turn("")
            TURN.set(turn)
        try:
            turn.effective = apply(request, turn.wish, dial)
            if getattr(request, "use_beam_search", False):
                turn.is_followed = False
                refuse_beams(turn.effective, turn.wish)
        except RequestError as error:
            return handler.create_error_response(str(error), param=error.param)
        return await original(request, *args, **kwargs)

    return entry


def refuse_beams(done: Effective, wish: ReasoningRequest) -> None:
    """Raise RequestError for a limit beside beam search, which starts a new engine request for each token."""
    if done.budget is not None:
        source = wish.sources.get("budget", "use_beam_search")
        raise RequestError(
            f"`{source}`: found a thinking limit beside `use_beam_search`, allowed: one of the two", source
        )


def apply_to_completion(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    """A completion's prompt is the client's own: only vLLM's field for the budget, and the operator's ceiling."""
    done = limits_alone(request.thinking_token_budget, dial.policy)
    request.thinking_token_budget = None
    return done


def apply_to_chat(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    """Write the wish into a vLLM ChatCompletionRequest, in place.

    A hidden thought stays in the request: vLLM's `include_reasoning: false` would start a grammar at the first token.
    It is taken out of the reply.
    """
    request.messages = plain_messages(request.messages, "messages")
    done = resolve(wish, dial, text_state(request.messages, dial))
    _set_template_arguments(request, done)
    request.reasoning_effort = done.effort
    request.thinking_token_budget = None  # the plan of thinking_engine.py says it
    request.messages = settled_messages(request.messages, done, dial)
    return done


def apply_to_responses(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    """Write the wish into a vLLM ResponsesRequest, in place."""
    if not isinstance(request.input, str):
        request.input = whole_output_messages(plain_messages(request.input, "input"))
    for name in NOT_NULL:
        if getattr(request, name) is None:
            setattr(request, name, type(request).model_fields[name].default)
    messages = as_messages(request)
    done = resolve(wish, dial, text_state(messages, dial))
    _set_template_arguments(request, done)
    settled = settled_messages(messages, done, dial, is_whole=request.previous_response_id is None)
    if settled != messages:
        write_back(request, settled)
    if done.effort is not None:
        request.reasoning = vllm_compat.responses_reasoning(done.effort)
    return done


def _set_template_arguments(request: Any, done: Effective) -> None:
    if done.template_arguments:
        request.chat_template_kwargs = {**(request.chat_template_kwargs or {}), **done.template_arguments}


# (the handler's name on the server, its entry method, what writes the wish into its request). The Anthropic handler
# translates into a chat request, calls its own method, and translates the reply.
HANDLERS: tuple[tuple[str, str, Apply], ...] = (
    ("openai_serving_chat", "create_chat_completion", apply_to_chat),
    ("anthropic_serving_messages", "create_chat_completion", apply_to_chat),
    ("openai_serving_responses", "create_responses", apply_to_responses),
    ("openai_serving_completion", "create_completion", apply_to_completion),
)
