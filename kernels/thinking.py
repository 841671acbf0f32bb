"""Where a token stream thinks, how much, and which token must come next: the specification of a thinking budget.

Pure Python, one token at a time. vLLM's V1 runner enforces budgets with it (`serving/thinking_v1.py`), the API process
mirrors every request with it to report what happened, and `thinking_triton.py` computes the same on the device for the
V2 runner. A machine is a function of (markers, limits, prompt, tokens so far) and of the moment of a `close`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

OUTSIDE, THINKING, CLOSING = range(3)
NATURAL, BUDGET, LOOP, TOOL_CALL, USER = "natural", "budget", "loop", "tool_call", "user"
# A phrase that would take more than this share of a budget is left out.
PHRASE_SHARE = 2

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ThinkingMarkers:
    """What one server's model writes around a thought, as token ids.

    start: opens a thought. ends: each of them closes it, written by the model. closing: what is forced in their place,
    a marker too. phrase: forced before it, part of the thought and of its budget. boundaries: tokens after which a
    thought may be cut (line or sentence ends). tool_starts: each opens a tool call, which ends a thought. other_starts:
    other spellings of `start`, where it is no token of its own. headers: each stands before an answer or a marker and
    is counted with neither; they force nothing.
    """

    start: Tokens
    ends: tuple[Tokens, ...]
    closing: Tokens
    phrase: Tokens = ()
    boundaries: frozenset[int] = frozenset()
    tool_starts: tuple[Tokens, ...] = ()
    other_starts: tuple[Tokens, ...] = ()
    headers: tuple[Tokens, ...] = ()

    def __post_init__(self) -> None:
        lists = {"start": self.starts, "closing": (self.closing,), "ends": self.ends, "tool_starts": self.tool_starts}
        lists["headers"] = self.headers
        for name, marker in ((name, marker) for name, markers in lists.items() for marker in markers):
            if not marker:
                raise ValueError(f"thinking markers, key `{name}`: found no token, allowed: at least one")
        if not self.ends:
            raise ValueError("thinking markers, key `ends`: found none, allowed: at least one")

    @property
    def starts(self) -> tuple[Tokens, ...]:
        """Every spelling of the start."""
        return (self.start, *self.other_starts)

    @property
    def alarms(self) -> frozenset[int]:
        """The tokens that can make a marker whole."""
        return frozenset(marker[-1] for marker in (*self.starts, *self.ends, *self.tool_starts))


@dataclass(frozen=True, slots=True)
class LoopRule:
    """A thought loops when `count` copies of one pattern of min_pattern to max_pattern tokens end it."""

    min_pattern: int
    max_pattern: int
    count: int

    def __post_init__(self) -> None:
        if not (1 <= self.min_pattern <= self.max_pattern and self.count >= 2):
            raise ValueError(f"loop rule: found {self}, allowed: 1 <= min_pattern <= max_pattern, count >= 2")


@dataclass(frozen=True, slots=True)
class ThinkingLimits:
    """One request's limits. budget: most thinking tokens of the whole response, None for no limit. grace: how many
    tokens before the limit a boundary is taken as the end."""

    budget: int | None = None
    grace: int = 0
    loop: LoopRule | None = None

    @property
    def is_free(self) -> bool:
        """Whether nothing can ever be forced."""
        return self.budget is None and self.loop is None


def opens_thought(markers: ThinkingMarkers, prompt: Sequence[int]) -> bool:
    """Whether the last marker in the prompt opens a thought."""
    start = max(_last(prompt, marker) for marker in markers.starts)
    return start >= 0 and start > max(_last(prompt, end) for end in markers.ends)


def _last(tokens: Sequence[int], marker: Tokens) -> int:
    """Index of the last occurrence of `marker`, or -1."""
    size, stop = len(marker), len(tokens)
    backwards = list(tokens[::-1])
    position = -1
    while True:
        try:
            position = backwards.index(marker[-1], position + 1)
        except ValueError:
            return -1
        start = stop - position - size
        if start >= 0 and tuple(tokens[start : start + size]) == marker:
            return start


@dataclass(slots=True)
class ThinkingMachine:
    """State after some tokens of one response. `forced` is the token that must come next, None when the model is free.

    num_thinking counts thought tokens of all blocks, forced phrases included, markers excluded; num_markers the
    markers' tokens and the headers'; num_tokens all. A beginning marker of several tokens counts as thought until it is
    whole, so that no limit is passed whichever way it goes on.
    """

    markers: ThinkingMarkers
    limits: ThinkingLimits = ThinkingLimits()
    mode: int = OUTSIDE
    forced: int | None = None
    reason: str | None = None
    num_tokens: int = 0
    num_thinking: int = 0
    num_markers: int = 0
    num_blocks: int = 0
    _tail: list[int] = field(default_factory=list)
    _runs: dict[int, int] = field(default_factory=dict)
    _queue: Tokens = ()
    _position: int = 0
    _why: str = BUDGET
    _memory: int = field(init=False)
    _most: int = field(init=False)
    _lasts: frozenset[int] = field(init=False)
    _answer_lasts: frozenset[int] = field(init=False)
    _quiet: float = field(init=False)

    def __post_init__(self) -> None:
        markers, loop, budget = self.markers, self.limits.loop, self.limits.budget
        # Most tokens are none of these, and come before any limit: they need no look at markers and limits.
        self._lasts = frozenset(marker[-1] for marker in (*markers.ends, *markers.tool_starts))
        self._answer_lasts = frozenset(marker[-1] for marker in (*markers.starts, *markers.headers))
        self._quiet = -1 if loop else float("inf")
        if budget is not None and not loop:
            self._quiet = budget - len(self._phrase_within(budget)) - max(self.limits.grace, 0) - 1
        sizes = [len(marker) for marker in (*markers.starts, *markers.ends, *markers.tool_starts, *markers.headers)]
        # How many last tokens the rules look at.
        self._memory = max(*sizes, len(markers.phrase) + len(markers.closing), loop.max_pattern + 1 if loop else 0)
        self._most = 2 * self._memory + 64  # cut seldom

    @classmethod
    def after_prompt(
        cls, markers: ThinkingMarkers, limits: ThinkingLimits, prompt: Sequence[int] | None
    ) -> ThinkingMachine:
        """The state before the first token. Prompt tokens inside an open thought are no part of the response."""
        machine = cls(markers, limits)
        if prompt is not None and opens_thought(markers, prompt):
            machine._open()
        return machine

    def feed(self, tokens: Iterable[int]) -> None:
        """Go on by the tokens that the response got."""
        for token in tokens:
            self.feed_one(token)

    def feed_one(self, token: int) -> None:
        """Go on by one token."""
        self.num_tokens += 1
        if self.mode == THINKING:
            self._think(token)
        elif self.mode == OUTSIDE:
            self._answer(token)
        else:
            self._close(token)

    @property
    def num_quiet(self) -> float:
        """How many next tokens only count, as long as none of them is in `alarms`: `pass_over` may take them."""
        if self.mode == OUTSIDE:
            return float("inf")
        return max(0, self._quiet - self.num_thinking) if self.mode == THINKING else 0

    def pass_over(self, tokens: Sequence[int]) -> None:
        """Go on by at most `num_quiet` tokens of which none is in the markers' `alarms`: `feed`, but at once."""
        self.num_tokens += len(tokens)
        if self.mode == THINKING:
            self.num_thinking += len(tokens)
        self._tail.extend(tokens[-self._memory :])
        del self._tail[: -self._memory]

    def close(self, reason: str) -> None:
        """End the open thought from the next token on; nothing if none is open."""
        if self.mode == THINKING:
            self._force(reason)

    def forced_along(self, drafts: Sequence[int]) -> list[int | None]:
        """The forced token at each position if `drafts` came one after the other: len(drafts) + 1 of them."""
        machine, found = self._fork(), [self.forced]
        for draft in drafts:
            machine.feed((draft,))
            found.append(machine.forced)
        return found

    @property
    def num_answer(self) -> int:
        """Tokens outside thoughts, markers excluded. The last of them may turn out to begin one: see `has_answer`."""
        return self.num_tokens - self.num_thinking - self.num_markers

    @property
    def num_closing(self) -> int:
        """Tokens of a forced end that is not whole yet: `num_thinking` has them until it is."""
        phrase_size = len(self._queue) - len(self.markers.closing)
        return max(0, self._position - phrase_size) if self.mode == CLOSING else 0

    @property
    def reason_so_far(self) -> str | None:
        """Why thinking ended, or is being ended."""
        return self._why if self.mode == CLOSING and self.reason in (None, NATURAL, TOOL_CALL) else self.reason

    @property
    def has_answer(self) -> bool:
        """Whether there is an answer token that begins no marker and no header."""
        if self.mode != OUTSIDE or not self.num_answer:
            return self.num_answer > 0
        begun = (
            size
            for marker in (*self.markers.starts, *self.markers.headers)
            for size in range(1, len(marker))
            if _ends_with(self._tail, marker[:size])
        )
        return self.num_answer > max(begun, default=0)

    # --- one token ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.mode, self._tail, self._runs = THINKING, [], {}
        self.num_blocks += 1
        self._check_limits(None)

    def _answer(self, token: int) -> None:
        self._remember(token)
        if token not in self._answer_lasts:
            return
        for start in self.markers.starts:
            if token == start[-1] and _ends_with(self._tail, start):
                self.num_markers += len(start)
                self._open()
                return
        found = (len(header) for header in self.markers.headers if _ends_with(self._tail, header))
        self.num_markers += max(found, default=0)

    def _think(self, token: int) -> None:
        self._remember(token)
        self.num_thinking += 1
        if self.num_thinking <= self._quiet and token not in self._lasts:
            return
        for marker in self.markers.ends:
            if token == marker[-1] and _ends_with(self._tail, marker):
                self._leave(len(marker), NATURAL)
                return
        for marker in self.markers.tool_starts:
            if token == marker[-1] and _ends_with(self._tail, marker):
                # The call is part of the answer: its marker is no thought, and no thought marker either.
                self._leave(len(marker), TOOL_CALL)
                self.num_markers -= len(marker)
                return
        self._check_limits(token)

    def _close(self, token: int) -> None:
        if token != self._queue[self._position]:  # the sampler was not ours: what came is thought
            self.mode, self.forced = THINKING, None
            self._think(token)
            return
        self._position += 1
        self._remember(token)
        self.num_thinking += 1
        if self._position < len(self._queue):
            self.forced = self._queue[self._position]
        else:
            self._leave(len(self.markers.closing), self._why)

    def _leave(self, marker_size: int, reason: str) -> None:
        """The thought is over; its last `marker_size` tokens were no thought."""
        self.num_thinking -= marker_size
        self.num_markers += marker_size
        self.mode, self.forced, self._tail = OUTSIDE, None, []
        # A second block that ends by itself does not hide that the first one was cut.
        if self.reason in (None, NATURAL, TOOL_CALL):
            self.reason = reason

    def _check_limits(self, token: int | None) -> None:
        """Whether the thought must end after `token`, its last one (None: it has just been opened)."""
        limits = self.limits
        if limits.budget is not None:
            left = limits.budget - self.num_thinking - len(self._phrase_within(limits.budget))
            if left <= 0 or (left <= limits.grace and token in self.markers.boundaries):
                self._force(BUDGET)
                return
        if limits.loop is not None and token is not None and self._loops(limits.loop, token):
            self._force(LOOP)

    def _phrase_within(self, budget: int) -> Tokens:
        phrase = self.markers.phrase
        return phrase if len(phrase) * PHRASE_SHARE <= budget else ()

    def _force(self, why: str) -> None:
        budget, phrase = self.limits.budget, self.markers.phrase
        if budget is not None:
            phrase = self._phrase_within(budget)
            if self.num_thinking + len(phrase) > budget:
                phrase = ()
        self.mode, self._why, self._queue = CLOSING, why, phrase + self.markers.closing
        # The model may have begun the same words itself: go on from there.
        self._position = next(
            (size for size in range(len(self._queue) - 1, 0, -1) if _ends_with(self._tail, self._queue[:size])), 0
        )
        self.forced = self._queue[self._position]
        if self._position > len(phrase):  # it had begun to end the thought: what is left of the marker is its own
            self._why = NATURAL

    def _loops(self, rule: LoopRule, token: int) -> bool:
        """Counts, per distance, how long each token has equalled the one that far back."""
        window = self._tail[-rule.max_pattern - 1 : -1]
        runs: dict[int, int] = {}
        index = -1
        try:
            while True:
                index = window.index(token, index + 1)
                distance = len(window) - index
                runs[distance] = self._runs.get(distance, 0) + 1
        except ValueError:
            self._runs = runs
        return any(
            distance >= rule.min_pattern and run >= distance * (rule.count - 1) for distance, run in runs.items()
        )

    def _remember(self, token: int) -> None:
        tail = self._tail
        tail.append(token)
        if len(tail) > self._most:
            del tail[: -self._memory]

    def _fork(self) -> ThinkingMachine:
        return ThinkingMachine(
            self.markers, self.limits, self.mode, self.forced, self.reason, self.num_tokens, self.num_thinking,
            self.num_markers, self.num_blocks, self._tail[-self._memory :], dict(self._runs), self._queue,
            self._position, self._why,
        )  # fmt: skip


def _ends_with(tail: Sequence[int], marker: Tokens) -> bool:
    return len(tail) >= len(marker) and tuple(tail[-len(marker) :]) == marker
