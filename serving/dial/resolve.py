"""A client's wishes, the model's profile and the operator's policy → what is done, and what is said about it.

Strongest first: the request's budget, its effort, a switch in the messages' text, the operator's default. The ceiling
holds for whatever comes out. What a model or server cannot honour is an error; what it honours in its own way (the
nearest level, short hidden reasoning in place of none) is a note in the reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_puzzle.kernels.thinking import LoopRule
from vllm_puzzle.model_configs.json_values import refuse
from vllm_puzzle.serving.dial.policy import Grace, ReasoningPolicy
from vllm_puzzle.serving.dial.profile import ARGUMENT, HIDDEN, LEVEL, MESSAGE_TAG, SYSTEM_LINE, TEXT, ModelProfile
from vllm_puzzle.serving.dial.request import EFFORTS, UNLIMITED, ReasoningRequest, RequestError
from vllm_puzzle.serving.dial.text_switch import WORDS, read_switches, without_switches, write_switch

# vLLM's reasoning parsers read this variable even where the template does not, to know what the prompt ends with.
PARSER_ARGUMENT = "enable_thinking"
SHORT_BUDGET, SHORT_SHARE = 512, (2, 3)
MAX_AUTOMATIC_RESERVE, AUTOMATIC_SHARE = 1024, 4


@dataclass(frozen=True, slots=True)
class ModelDial:
    """One served model: its profile, the operator's policy, whether the server can count thinking tokens, its name.

    Raises ConfigError for a policy that this model or server cannot hold.
    """

    profile: ModelProfile
    policy: ReasoningPolicy = field(default_factory=ReasoningPolicy)
    has_budget: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        policy, where = self.policy, "reasoning policy"
        if not self.has_budget:
            needs = {"ceiling": policy.ceiling, "budgets": policy.budgets_of(self.name), "loop": policy.loop}
            for key, value in needs.items():
                if value not in (None, {}):
                    raise refuse(where, key, value, "null without --reasoning-parser, which counts thinking tokens")
            if policy.default_of(self.name) == "off" and not self.profile.has_off:
                raise refuse(where, "default", "off", "off with --reasoning-parser, as the model has no off state")
        if policy.ceiling is not None and policy.ceiling < self.profile.min_budget:
            raise refuse(where, "ceiling", policy.ceiling, f"at least {self.profile.min_budget} with this model")


@dataclass(frozen=True, slots=True)
class Requested:
    """What the client asked for: mode on or off, effort, thinking tokens; None where it said nothing."""

    mode: str | None = None
    effort: str | None = None
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Effective:
    """What is done.

    is_on: None leaves the model's own default. effort: the level that the model gets, which may be "none". budget: most
    thinking tokens, None for no limit; grace: tokens of it in which a sentence's end is taken. template_arguments: for
    the chat template and vLLM's parsers. loop: ends a thought that repeats itself. answer_reserve: as in the policy,
    for `within`. is_short: hidden reasoning in the place of none. notes: what differs from what was asked, and why.
    sampling: the model's published advice for this mode.
    """

    is_on: bool | None = None
    effort: str | None = None
    budget: int | None = None
    is_visible: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    grace: int = 0
    loop: LoopRule | None = None
    requested: Requested = Requested()
    notes: tuple[str, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    answer_reserve: int | None = None
    is_short: bool = False
    min_budget: int = 0
    grace_rule: Grace = field(default_factory=Grace)


def resolve(wish: ReasoningRequest, model: ModelDial, in_text: Iterable[bool] = ()) -> Effective:
    """What to do with one request. `in_text`: what the switches in its messages say, in order.

    Raises RequestError for a wish that the model or the server cannot honour, naming the field.
    """
    notes: list[str] = []
    profile, policy = model.profile, model.policy
    is_on, asked = _state(wish, model, list(in_text), notes)
    level = _level(asked, wish, model, notes)
    budget = _budget(asked, wish, model, notes)
    # A ceiling alone is no reason to write a number into every prompt.
    is_asked = wish.budget not in (None, UNLIMITED) or effort_budget(asked, policy, model.name)[1] is not None
    if budget == 0:
        is_on = False
        if wish.is_on:
            notes.append("on: the server's ceiling is 0 thinking tokens")
    is_short = is_on is False and profile.off_state == HIDDEN
    if is_short:
        level, budget = min(profile.levels, key=EFFORTS.index), policy.limited(SHORT_BUDGET)
        is_on = True
        notes.append(f"off: {profile.name} always reasons; hidden, level {level}, at most {budget} tokens")
    elif is_on and level is None and profile.switch == LEVEL and profile.default == "off":
        level = nearest("high", profile.levels) if profile.levels else None
    elif is_on is False:
        # The off state that the model was trained on, rather than a thought closed at once; it may think all the same.
        budget = (policy.ceiling or None) if profile.has_off else 0
        level = None
        if profile.switch == TEXT and profile.text != MESSAGE_TAG:
            notes.append("off: the switch is at the start of the prompt, so thinking requests' prefix cache is no help")
    if budget is not None and not model.has_budget:
        raise _cannot_count(wish)
    return Effective(
        is_on=is_on,
        effort="none" if is_on is False and profile.switch == LEVEL else level,
        budget=budget,
        is_visible=wish.is_visible is not False and not is_short,
        template_arguments=_template_arguments(is_on, level, budget if is_asked else None, wish, profile),
        grace=policy.grace.tokens(budget),
        loop=policy.loop,
        requested=_requested(wish),
        notes=tuple(notes),
        sampling=profile.sampling_off if is_on is False else profile.sampling_on,
        answer_reserve=policy.answer_reserve,
        is_short=is_short,
        min_budget=profile.min_budget,
        grace_rule=policy.grace,
    )


def within(done: Effective, max_tokens: int, closing_size: int) -> Effective:
    """`done` with room for the answer, once the most tokens of the response are known.

    closing_size: tokens that a forced end takes, in tokens. The budget becomes at most max_tokens - reserve -
    closing_size, never below 0 (or below what the model needs); a note tells when that changed it.
    """
    if done.is_on is False or (done.budget is None and not done.answer_reserve):
        return done
    reserve = done.answer_reserve
    if reserve is None:
        reserve = min(MAX_AUTOMATIC_RESERVE, max_tokens // AUTOMATIC_SHARE)
    most = max_tokens - closing_size - reserve
    if done.is_short:
        most = min(most, max_tokens * SHORT_SHARE[0] // SHORT_SHARE[1])
    most = max(most, done.min_budget, 0)
    if done.budget is not None and done.budget <= most:
        return done
    was = "no budget" if done.budget is None else f"budget {done.budget}"
    note = f"{was}: {most} fit into max_tokens {max_tokens} with {reserve} kept for the answer"
    return replace(done, budget=most, grace=done.grace_rule.tokens(most), notes=(*done.notes, note))


# --- the parts -----------------------------------------------------------------------------------------------------


def _state(
    wish: ReasoningRequest, model: ModelDial, in_text: list[bool], notes: list[str]
) -> tuple[bool | None, str | None]:
    """(think or not, the effort asked for): fields, then text, then the operator's default."""
    profile, default = model.profile, model.policy.default_of(model.name)
    is_on, effort = wish.is_on, wish.effort
    text = in_text[-1] if in_text and model.policy.soft_switches else None
    if in_text and text is None:
        notes.append(f"{WORDS[profile.text or '']}: switches in the text are not used by this server")
    elif text is not None and is_on is not None and text != is_on:
        notes.append(f"{WORDS[profile.text or '']}: `{wish.sources.get('is_on', 'a field')}` says otherwise, and wins")
    is_on = text if is_on is None else is_on
    if default not in (None, "on", "off") and is_on is not False and effort is None and wish.budget is None:
        return True, default
    if is_on is None and default is not None:
        is_on = default != "off"
    # What a template that thinks on demand only does by itself: vLLM's parsers must know it.
    if is_on is None and profile.default == "off" and profile.has_off:
        is_on = False
    return is_on, effort


def _level(asked: str | None, wish: ReasoningRequest, model: ModelDial, notes: list[str]) -> str | None:
    """The level that the model gets for an effort."""
    if asked is None:
        return None
    levels = model.profile.levels or model.policy.budgets_of(model.name)
    allowed = {**model.profile.levels, **model.policy.budgets_of(model.name)}
    if asked not in allowed and model.policy.strict and wish.effort == asked:
        words = ", ".join(effort for effort in EFFORTS if effort in allowed) or "none of them (the model has no levels)"
        source = wish.sources.get("effort", "effort")
        raise RequestError(f"`{source}`: found {asked!r}, allowed: {words}", source)
    is_told = wish.effort == asked  # the operator's own default needs no explanation
    if not levels:
        if is_told:
            notes.append(f"effort {asked}: the model has no levels, it thinks as it does")
        return None
    level = nearest(asked, levels)
    if level != asked and is_told:
        notes.append(f"effort {asked}: nearest level is {level}")
    return level


def nearest(effort: str, levels: Iterable[str]) -> str:
    """The level closest to an effort; of two equally close ones the stronger."""
    rank = EFFORTS.index
    return min(levels, key=lambda level: (abs(rank(level) - rank(effort)), -rank(level)))


def effort_budget(effort: str | None, policy: ReasoningPolicy, name: str) -> tuple[str | None, int | None]:
    """(the effort whose budget is used, that budget) by the operator's map for a served model; None for no limit."""
    budgets = policy.budgets_of(name)
    if effort is None or not budgets:
        return effort, None
    used = nearest(effort, budgets)
    return used, None if budgets[used] == UNLIMITED else budgets[used]


def _budget(asked: str | None, wish: ReasoningRequest, model: ModelDial, notes: list[str]) -> int | None:
    """The request's number, else what the map gives for the effort; under the ceiling. None for no limit."""
    policy = model.policy
    if wish.budget is None:
        used, budget = effort_budget(asked, policy, model.name)
        if used != asked and wish.effort == asked and model.profile.levels:
            notes.append(f"effort {asked}: nearest budget is that of {used}")
        return policy.limited(budget)
    budget = None if wish.budget == UNLIMITED else wish.budget
    if policy.limited(budget) != budget:
        notes.append(
            f"{'no limit' if budget is None else f'budget {budget}'}: the server's ceiling is {policy.ceiling}"
        )
    return policy.limited(budget)


def _cannot_count(wish: ReasoningRequest) -> RequestError:
    about = "budget" if wish.budget is not None else "is_on"
    source = wish.sources.get(about, about)
    return RequestError(
        f"`{source}`: found on a server that cannot count thinking tokens, allowed with --reasoning-parser", source
    )


def _template_arguments(
    is_on: bool | None, level: str | None, budget: int | None, wish: ReasoningRequest, profile: ModelProfile
) -> dict[str, Any]:
    arguments = _history_arguments(wish, profile)
    if is_on is not None:
        # A thought that is closed at once was open before: the prompt is that of thinking.
        arguments |= {PARSER_ARGUMENT: is_on or not profile.has_off}
        if profile.switch == ARGUMENT:
            arguments |= dict.fromkeys(profile.arguments, is_on)
    if level is not None:
        arguments |= profile.levels.get(level, {})
    if budget is not None and is_on is not False and profile.budget_argument:
        arguments[profile.budget_argument] = budget
    return arguments


def _history_arguments(wish: ReasoningRequest, profile: ModelProfile) -> dict[str, Any]:
    if wish.keeps_history is None:
        return {}
    if not profile.history:
        source = wish.sources.get("keeps_history", "keeps_history")
        raise RequestError(f"`{source}`: found with a model whose template has no such rule, allowed: nothing", source)
    return {name: kept == wish.keeps_history for name, kept in profile.history.items()}


def _requested(wish: ReasoningRequest) -> Requested:
    mode = None if wish.is_on is None else "on" if wish.is_on else "off"
    return Requested(mode, wish.effort, wish.budget)


# --- messages ------------------------------------------------------------------------------------------------------


def text_state(messages: Sequence[Any], model: ModelDial) -> list[bool]:
    """What the switches in a conversation's text say, for a model that was trained on them."""
    return read_switches(messages, model.profile.text) if model.profile.text else []


def settled_messages(messages: Sequence[Any], done: Effective, model: ModelDial, is_whole: bool = True) -> list[Any]:
    """The messages, saying in their text what is done and nothing else.

    is_whole: whether they are the whole conversation; of another, earlier messages may hold switches unseen here.
    """
    convention, said = model.profile.text, set(text_state(messages, model))
    if convention is None or (said == {done.is_on} if said else _goes_without(done, model.profile, is_whole)):
        return list(messages)
    if done.is_on is None:
        return list(messages) if model.policy.soft_switches else without_switches(messages, convention)
    return write_switch(messages, convention, done.is_on)


def _goes_without(done: Effective, profile: ModelProfile, is_whole: bool) -> bool:
    """Whether messages without any switch already mean what is done."""
    if profile.switch != TEXT or done.is_on is None:
        return True
    if profile.text == SYSTEM_LINE:  # without the line the model decides
        return False
    return done.is_on == (profile.default == "on") and (is_whole or profile.text != MESSAGE_TAG)
