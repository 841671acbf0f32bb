"""vLLM endpoint plugin `puzzle_reasoning`: makes the three spellings of the reasoning switch one.

It adds no route. It wraps the chat handlers' entry method, where requests arrive parsed and streaming is untouched,
and writes the switch where the chat template and the reasoning parser both look: `enable_thinking`.
vLLM loads it only when VLLM_PLUGINS names it; `vllm-puzzle serve` does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.reasoning import RequestError, needs_system_line, read_switch, with_system_line

# Both take a ChatCompletionRequest; the Anthropic handler translates into one and calls its own method.
HANDLERS = ("openai_serving_chat", "anthropic_serving_messages")


class ReasoningPlugin:
    """The endpoint plugin object that vLLM asks for (vllm.plugins.endpoint_plugins.EndpointPlugin)."""

    name = "puzzle_reasoning"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """No route of our own."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Wrap each chat handler that this server has."""
        model_config = engine_client.model_config
        tokenizer = getattr(engine_client.renderer, "tokenizer", None)
        template = vllm_compat.chat_template_text(args.chat_template, tokenizer)
        by_system_line = needs_system_line(template, getattr(model_config.hf_config, "model_type", ""))
        for name in HANDLERS:
            handler = getattr(state, name, None)
            if handler is not None:
                handler.create_chat_completion = _wrap(handler, handler.create_chat_completion, by_system_line)


def make_plugin() -> ReasoningPlugin:
    """Entry point `vllm.endpoint_plugins: puzzle_reasoning`."""
    return ReasoningPlugin()


def _wrap(handler: Any, original: Callable[..., Awaitable[Any]], by_system_line: bool) -> Callable[..., Awaitable[Any]]:
    async def create_chat_completion(request: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            apply_switch(request, by_system_line)
        except RequestError as error:
            return handler.create_error_response(str(error))
        return await original(request, *args, **kwargs)

    return create_chat_completion


def apply_switch(request: Any, by_system_line: bool) -> None:
    """Write the request's switch into its template arguments (and its system message), in place."""
    switch = read_switch(request.messages, request.chat_template_kwargs, request.reasoning_effort)
    if switch.is_on is None:
        return
    request.chat_template_kwargs = {**(request.chat_template_kwargs or {}), "enable_thinking": switch.is_on}
    if by_system_line:
        request.messages = with_system_line(request.messages, switch.is_on)
