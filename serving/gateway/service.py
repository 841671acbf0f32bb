"""What the gateway knows of its upstream, found once, and the choice of one call or two."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_puzzle.serving.gateway import events
from vllm_puzzle.serving.gateway.chat import CHAT_PATH, one_call
from vllm_puzzle.serving.gateway.continuation import BegunMessage, Continuation, Markers, RenderedPrompt
from vllm_puzzle.serving.gateway.errors import GatewayError, UpstreamRefusal
from vllm_puzzle.serving.gateway.exchange import Exchange, Headers
from vllm_puzzle.serving.gateway.kinds import AUTO, CONTINUES_APPENDED, KINDS
from vllm_puzzle.serving.gateway.plan import BY_SERVER, BY_TWO_CALLS, Plan, make_plan
from vllm_puzzle.serving.gateway.probe import Facts, context_length, detect, read_facts
from vllm_puzzle.serving.gateway.prompt_template import PromptTemplate
from vllm_puzzle.serving.gateway.tally import Tally
from vllm_puzzle.serving.gateway.two_calls import TwoCalls, check_two_calls, limit_of
from vllm_puzzle.serving.gateway.upstream import Upstream

# Clients name models; what was found out about them must not pile up.
MAX_MODELS = 64
PROBE_THOUGHTS = ("a", "a, then b, then c, then d, and so on to the end of it")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user said at the start."""

    kind: str = AUTO
    budget_by: str = "auto"
    markers: Markers = field(default_factory=Markers)
    template: PromptTemplate | None = None


class Service:
    """Chat completions in front of one upstream."""

    def __init__(self, upstream: Upstream, options: Options, say: Callable[[str], None]) -> None:
        self.upstream, self._options, self._say = upstream, options, say
        self._facts: Facts | None = None
        self._begun: dict[str, BegunMessage | None] = {}
        self._lock = asyncio.Lock()

    async def facts(self) -> Facts:
        """What the upstream is. Raises GatewayError 502 while it cannot be reached; then it is asked again."""
        async with self._lock:
            if self._facts is None:
                options = self._options
                name = await detect(self.upstream) if options.kind == AUTO else options.kind
                text, model_type = (
                    (options.template.text, options.template.model_type) if options.template else (None, "")
                )
                self._facts = await read_facts(self.upstream, KINDS[name], options.budget_by, text, model_type)
                self._say(self._line(self._facts, is_found=options.kind == AUTO))
            return self._facts

    def _line(self, facts: Facts, is_found: bool) -> str:
        budget = "by the server itself" if facts.has_budget else "in two calls"
        template = "known" if facts.template is not None else "not known (--tokenizer)"
        how = "found" if is_found else "as told"
        return f"upstream {self.upstream.url}: kind {facts.kind.name} ({how}), budgets {budget}, template {template}"

    async def chat(self, exchange: Exchange, body: dict[str, Any]) -> None:
        """Answer one chat request."""
        facts = await self.facts()
        plan = make_plan(body, facts)
        template = self._options.template
        tally = Tally(count=(lambda text: len(template.ids(text))) if template else None)
        if plan.budget_by == BY_TWO_CALLS:
            await self._two_calls(exchange, plan, tally)
            return
        try:
            await one_call(exchange, self.upstream, plan, tally)
        except UpstreamRefusal as refusal:
            if not self._is_about_budget(plan, refusal):
                raise
            self._facts = Facts(facts.kind, facts.template, facts.model_type, has_budget=False)
            self._say(f"{self._line(self._facts, is_found=True)}: it refused a budget of its own")
            await self._two_calls(exchange, make_plan(body, self._facts), tally)

    def _is_about_budget(self, plan: Plan, refusal: UpstreamRefusal) -> bool:
        """Whether the server says that it was not started for budgets (vLLM without a reasoning parser)."""
        if plan.budget_by != BY_SERVER or refusal.status != 400 or self._options.budget_by != "auto":
            return False
        return plan.kind.budget[-1].encode() in refusal.content and b"reasoning" in refusal.content

    async def _two_calls(self, exchange: Exchange, plan: Plan, tally: Tally) -> None:
        check_two_calls(plan)
        continuation = await self._continuation(exchange, plan)
        calls = TwoCalls(self.upstream, plan, tally, continuation, self._options.markers)
        if limit_of(plan.body) is None and isinstance(continuation, RenderedPrompt):
            calls.room = await self._room(exchange, plan, continuation)
        await calls.answer(exchange)

    async def _room(self, exchange: Exchange, plan: Plan, continuation: RenderedPrompt) -> int:
        """Tokens left for the answer when the client names no limit: completions would stop at 16 of them."""
        headers = exchange.passed_headers(b"content-type", b"accept-encoding")
        length = await context_length(self.upstream, plan.body.get("model"), headers)
        if length is None:
            raise GatewayError(
                400,
                "`max_tokens`: found none beside a budget, on an upstream that does not tell its context length, "
                "allowed: an integer from 1",
                "max_tokens",
            )
        # The prompt with a closed, empty thought; the thought itself takes the budget at most.
        prompt = len(continuation.prompt(plan.body, "", "", is_closed=True))
        room = length - prompt - (plan.effective.budget or 0)
        if room < 1:
            source = plan.wish.sources["budget"]
            raise GatewayError(
                400,
                f"`{source}`: found a budget that leaves no room for an answer in {length} tokens "
                f"of context after {prompt} of prompt, allowed: less",
                source,
            )
        return room

    async def _continuation(self, exchange: Exchange, plan: Plan) -> Continuation:
        """Raises GatewayError 400 where nothing can go on from a closed thought."""
        if self._options.template is not None:
            return RenderedPrompt(self._options.template, self._options.markers)
        source = plan.wish.sources.get("budget", "is_on")
        if not plan.kind.continues:
            raise GatewayError(
                400,
                f"`{source}`: found with an upstream ({plan.kind.name}) that neither holds a budget "
                f"nor continues a begun reply, allowed with --tokenizer DIR",
                source,
            )
        model = str(plan.body.get("model"))
        if model not in self._begun:
            if len(self._begun) >= MAX_MODELS:
                self._begun.clear()
            self._begun[model] = await self._try_begun_message(exchange.passed_headers(), plan)
        found = self._begun[model]
        if found is None:
            raise GatewayError(
                400,
                f"`{source}`: found with an upstream that holds no budget and whose chat template drops the thought of "
                f"a begun reply, allowed with --tokenizer DIR",
                source,
            )
        return found

    async def _try_begun_message(self, headers: Headers, plan: Plan) -> BegunMessage | None:
        """Whether a begun reply keeps its thought there: a longer one must make a longer prompt. Many templates drop
        earlier thoughts, and with them this one.
        """
        model = {"model": plan.body["model"]} if "model" in plan.body else {}
        chat = {**model, "messages": [{"role": "user", "content": "1+1"}], "max_tokens": 4, "temperature": 0}
        is_opened = False
        if plan.kind.continues == CONTINUES_APPENDED:
            reply = await self._ask(headers, {**chat, "separate_reasoning": False})
            text = str((reply["choices"][0].get("message") or {}).get("content") or "")
            is_opened = not text.lstrip().startswith(self._options.markers.start)
        begun = BegunMessage(plan.kind, self._options.markers, is_opened)
        try:
            lengths = [
                (await self._ask(headers, begun.body({**chat, "max_tokens": 1}, thought, "", True)))["usage"]
                for thought in PROBE_THOUGHTS
            ]
            is_kept = lengths[0]["prompt_tokens"] < lengths[1]["prompt_tokens"]
        except UpstreamRefusal as refusal:
            if refusal.status != 400:
                raise
            is_kept = False
        return begun if is_kept else None

    async def _ask(self, headers: Headers, body: dict[str, Any]) -> Any:
        async with self.upstream.post(CHAT_PATH, headers, body) as response:
            reply = events.parse(await response.aread()) or {}
            if not events.choices_of(reply) or not isinstance(reply.get("usage"), dict):
                raise GatewayError(502, "upstream: found a chat completion without choices or usage")
            return reply
