"""vLLM endpoint plugin `puzzle_reasoning`: every client's own reasoning fields work, on all three APIs.

It adds no route. A middleware reads the fields from the body (`dial/middleware.py`); here the handlers' entry methods,
where requests arrive parsed and streaming is untouched, write what follows from them into vLLM's own fields.
vLLM loads it only when VLLM_PLUGINS names it; `vllm-puzzle serve` does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.dial.middleware import WISH, DialMiddleware
from vllm_puzzle.serving.dial.policy import policy_from_environment
from vllm_puzzle.serving.dial.profile import profile_of
from vllm_puzzle.serving.dial.reply import finish_message, finish_stream
from vllm_puzzle.serving.dial.request import ReasoningRequest, RequestError
from vllm_puzzle.serving.dial.resolve import Effective, ModelDial, resolve, settled_messages, text_state
from vllm_puzzle.serving.dial.responses_text import as_messages, write_back

Entry = Callable[..., Awaitable[Any]]
Apply = Callable[[Any, ReasoningRequest, ModelDial], Effective]
Finish = Callable[[Any, Effective], Any]


class ReasoningPlugin:
    """The endpoint plugin object that vLLM asks for (vllm.plugins.endpoint_plugins.EndpointPlugin)."""

    name = "puzzle_reasoning"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """No route of our own; the middleware that reads the fields."""
        app.add_middleware(DialMiddleware, max_body_bytes=policy_from_environment().max_body_bytes)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Wrap each handler that this server has."""
        dial = model_dial(engine_client, args)
        # The Anthropic handler translates into a chat request, calls its own method, and translates the reply.
        for name, method, apply, finish in (
            ("openai_serving_chat", "create_chat_completion", apply_to_chat, finish_chat),
            ("anthropic_serving_messages", "create_chat_completion", apply_to_messages, _as_it_is),
            ("openai_serving_responses", "create_responses", apply_to_responses, _as_it_is),
        ):
            handler = getattr(state, name, None)
            if handler is not None:
                setattr(handler, method, _wrap(handler, getattr(handler, method), apply, finish, dial))


def model_dial(engine_client: Any, args: Any) -> ModelDial:
    """The served model's dial: profile from its template and type, policy from the environment."""
    model_config = engine_client.model_config
    template = vllm_compat.chat_template_text(args.chat_template, getattr(engine_client.renderer, "tokenizer", None))
    names = [*(getattr(args, "served_model_name", None) or []), model_config.model]
    start, end = vllm_compat.thinking_texts(engine_client)
    profile = profile_of(getattr(model_config.hf_config, "model_type", ""), " ".join(names), template, start, end)
    return ModelDial(profile, policy_from_environment(), vllm_compat.counts_thinking_tokens(engine_client), names[0])


def make_plugin() -> ReasoningPlugin:
    """Entry point `vllm.endpoint_plugins: puzzle_reasoning`."""
    return ReasoningPlugin()


def _wrap(handler: Any, original: Entry, apply: Apply, finish: Finish, dial: ModelDial) -> Entry:
    async def entry(request: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            done = apply(request, WISH.get() or ReasoningRequest(), dial)
        except RequestError as error:
            return handler.create_error_response(str(error), param=error.param)
        return finish(await original(request, *args, **kwargs), done)

    return entry


def _as_it_is(reply: Any, done: Effective) -> Any:
    return reply


def finish_chat(reply: Any, done: Effective) -> Any:
    """A chat reply with its thought under both names, or without it: a stream of events, a response, or an error."""
    if hasattr(reply, "__aiter__"):
        return finish_stream(reply, done.is_visible)
    for choice in getattr(reply, "choices", []):
        finish_message(choice.message, done.is_visible)
    return reply


def apply_to_messages(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    """Write the wish into the chat request that an Anthropic one has become, in place."""
    done = apply_to_chat(request, wish, dial)
    if not done.is_visible:
        request.include_reasoning = False
    return done


def apply_to_chat(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    """Write the wish into a vLLM ChatCompletionRequest, in place.

    A hidden thought stays in the request: vLLM's `include_reasoning: false` would start a grammar at the first token.
    It is taken out of the reply (finish_chat).
    """
    done = resolve(wish, dial, text_state(request.messages, dial))
    _set_template_arguments(request, done)
    request.reasoning_effort = done.effort
    request.thinking_token_budget = done.budget
    request.messages = settled_messages(request.messages, done, dial)
    return done


def apply_to_responses(request: Any, wish: ReasoningRequest, dial: ModelDial) -> Effective:
    """Write the wish into a vLLM ResponsesRequest, in place. Its API has no field for a budget, so the sampling
    parameters get it where they are made.
    """
    messages = as_messages(request)
    done = resolve(wish, dial, text_state(messages, dial))
    if not done.is_visible:
        if request.extract_structured_outputs() is not None:  # vLLM would start the grammar at the first token
            source = wish.sources.get("is_visible") or wish.sources.get("is_on", "reasoning")
            raise RequestError(f"`{source}`: found beside a schema on this API, allowed on chat completions", source)
        request.include_reasoning = False
    _set_template_arguments(request, done)
    settled = settled_messages(messages, done, dial, is_whole=request.previous_response_id is None)
    if settled != messages:
        write_back(request, settled)
    if done.effort is not None:
        request.reasoning = vllm_compat.responses_reasoning(done.effort)
    if done.budget is not None:
        vllm_compat.set_responses_budget(request, done.budget)
    return done


def _set_template_arguments(request: Any, done: Effective) -> None:
    if done.template_arguments:
        request.chat_template_kwargs = {**(request.chat_template_kwargs or {}), **done.template_arguments}
