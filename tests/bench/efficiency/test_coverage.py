"""Intervals cover what they say and verdicts err as rarely as they say, by simulation. Each test prints its figures
with -rP; 2,000 simulated data sets each, all in one array.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from vllm_puzzle.bench.efficiency.frontier import cost_at, speed_up_bounds
from vllm_puzzle.bench.efficiency.resampling import (
    Array,
    Interval,
    bootstrap,
    difference_of_ratios,
    ratio,
    ratio_of_ratios,
    resampled_sums,
)
from vllm_puzzle.bench.efficiency.uncertainty import (
    BETTER,
    NON_INFERIOR,
    WORSE,
    accuracy_difference,
    accuracy_interval,
    block_bounds,
    difference_bounds,
    questions_needed,
    verdict,
    wilson,
)

DATASETS = 2000
DRAWS = 1000
# The claim; its own sampling error over 2,000 data sets is half a point.
TARGET, TOLERANCE = 0.95, 0.015


def coverage(low: Array, high: Array, truth: float) -> float:
    return float(np.mean((low <= truth) & (truth <= high)))


def simulated_accuracy(questions: int, repeats: int, effect: float, seed: int) -> tuple[Array, float]:
    """Shape (questions, datasets, 4), and the true difference. Questions differ in difficulty, which both arms share;
    B's chance of being right is `effect` higher or lower on each, within 0 to 1.
    """
    random = np.random.default_rng(seed)
    skill = random.beta(1.5, 0.8, size=(questions, DATASETS))
    other = np.clip(skill + effect, 0, 1)
    columns = np.full((questions, DATASETS, 4), float(repeats))
    columns[..., 0] = random.binomial(repeats, skill)
    columns[..., 2] = random.binomial(repeats, other)
    grid = np.random.default_rng(99).beta(1.5, 0.8, size=10**6)
    return columns, float(np.mean(np.clip(grid + effect, 0, 1) - grid))


@pytest.mark.parametrize(("questions", "repeats", "effect"), [(200, 1, 0.0), (400, 1, -0.05), (150, 4, 0.03)])
def test_the_paired_bootstrap_of_accuracy_covers(questions: int, repeats: int, effect: float) -> None:
    columns, truth = simulated_accuracy(questions, repeats, effect, seed=questions)
    _, low, high = bootstrap(columns, difference_of_ratios, draws=DRAWS)
    found = coverage(low, high, truth)
    # What compare prints takes the outer bound of this and a score interval: it may cover more, never less.
    _, wide_low, wide_high = difference_bounds(columns, draws=DRAWS)
    wide = coverage(wide_low, wide_high, truth)
    print(f"{questions} questions x {repeats}: bootstrap {found:.4f}, with score {wide:.4f}")
    assert abs(found - TARGET) <= TOLERANCE
    assert found <= wide <= 1.0 - (1 - TARGET) / 3


def test_one_data_set_gives_the_same_interval_as_many_at_once() -> None:
    columns, _ = simulated_accuracy(60, 2, 0.02, seed=5)
    estimate, low, high = difference_bounds(columns, draws=DRAWS)
    for place in (0, 777, DATASETS - 1):
        alone = accuracy_difference(columns[:, place], draws=DRAWS)
        assert (alone.estimate, alone.low, alone.high) == (estimate[place], low[place], high[place])


def test_resampling_requests_instead_of_questions_would_not_cover() -> None:
    # What a naive tool does: to it eight repeats of 60 questions are 480 requests. Each arm has learned 60 % of the
    # questions, another 60 % each, and gives its usual answer 95 times in 100.
    random = np.random.default_rng(8)
    columns = np.full((60, DATASETS, 4), 8.0)
    for place in (0, 2):
        knows = random.random((60, DATASETS)) < 0.6
        columns[..., place] = random.binomial(8, np.where(knows, 0.95, 0.05))
    difference, low, high = bootstrap(columns, difference_of_ratios, draws=DRAWS)
    shares = [columns[..., place].sum(axis=0) / 480 for place in (0, 2)]
    naive = 1.96 * np.sqrt(sum(share * (1 - share) for share in shares) / 480)
    ours, theirs = coverage(low, high, 0.0), coverage(difference - naive, difference + naive, 0.0)
    print(f"by question {ours:.4f}, by request {theirs:.4f}")
    assert abs(ours - TARGET) <= TOLERANCE
    assert theirs < 0.7


def test_the_paired_bootstrap_of_a_cost_ratio_covers() -> None:
    # Token counts of reasoning: log-normal, a factor of 2.2 to either side by question, and noise of each arm.
    random = np.random.default_rng(4)
    shared = random.normal(0, 0.8, size=(250, DATASETS))
    columns = np.ones((250, DATASETS, 4))
    columns[..., 0] = np.exp(shared + random.normal(0, 0.4, size=shared.shape))
    columns[..., 2] = 0.7 * np.exp(shared + random.normal(0, 0.4, size=shared.shape))
    _, low, high = bootstrap(columns, ratio_of_ratios, draws=DRAWS)
    found = coverage(low, high, 0.7)
    print(f"cost ratio, 250 questions: {found:.4f}")
    assert abs(found - TARGET) <= TOLERANCE


def test_percentiles_of_few_questions_are_widened_as_far_as_needed() -> None:
    columns = np.ones((12, DATASETS, 2))
    columns[..., 0] = np.random.default_rng(6).normal(5.0, 1.0, size=(12, DATASETS))
    _, low, high = bootstrap(columns, ratio, draws=DRAWS)
    plain = np.quantile(ratio(resampled_sums(columns, DRAWS)), [0.025, 0.975], axis=0)
    found, naive = coverage(low, high, 5.0), coverage(*plain, 5.0)
    print(f"12 questions: {found:.4f}; plain percentiles {naive:.4f}")
    assert abs(found - TARGET) <= TOLERANCE
    assert naive < TARGET - TOLERANCE


@pytest.mark.parametrize("blocks", [3, 4, 8])
def test_the_block_bootstrap_covers_with_as_few_as_three_blocks(blocks: int) -> None:
    # The machine drifts by 10 % from block to block, for both arms; each run has 3 % of noise of its own.
    random = np.random.default_rng(blocks)
    drift = random.normal(0, 0.1, size=(blocks, DATASETS))
    columns = np.ones((blocks, DATASETS, 4))
    columns[..., 0] = np.exp(drift + random.normal(0, 0.03, size=drift.shape))
    columns[..., 2] = 0.8 * np.exp(drift + random.normal(0, 0.03, size=drift.shape))
    _, low, high = block_bounds(columns, draws=DRAWS)
    found = coverage(low, high, 0.8)
    _, narrow_low, narrow_high = bootstrap(columns, ratio_of_ratios, draws=DRAWS)
    naive = coverage(narrow_low, narrow_high, 0.8)
    print(f"{blocks} blocks: {found:.4f}; percentiles alone {naive:.4f}")
    assert abs(found - TARGET) <= TOLERANCE
    if blocks == 3:
        assert naive < TARGET - TOLERANCE, "the plain percentiles are what this is for"


def test_the_bootstrap_of_the_equal_accuracy_speed_up_covers() -> None:
    # Four settings of each arm over 300 questions; a question has a difficulty, a setting a skill; log-normal costs.
    random = np.random.default_rng(11)
    questions, skills = 300, np.array([0.35, 0.55, 0.7, 0.8])
    costs = np.array([1.0, 2.0, 4.0, 8.0])
    difficulty = random.normal(0, 0.15, size=(questions, DATASETS, 1))
    length = random.normal(0, 0.5, size=(questions, DATASETS, 1))

    def arm(accuracies: Array, factor: float) -> Array:
        columns = np.ones((questions, DATASETS, 4, 4))
        chance = np.clip(accuracies + difficulty, 0, 1)
        columns[..., 0] = random.random(chance.shape) < chance
        noise = random.normal(0, 0.3, size=chance.shape)
        columns[..., 2] = factor * costs * np.exp(length + noise - (0.5**2 + 0.3**2) / 2)
        return columns

    margin = 0.03
    base, other = arm(skills, 1.0), arm(skills + 0.02, 0.6)
    grid = np.random.default_rng(12).normal(0, 0.15, size=(10**6, 1))
    true_base, true_other = (np.clip(skill + grid, 0, 1).mean(axis=0) for skill in (skills, skills + 0.02))
    level = true_base.max() - margin
    truth = float(cost_at(costs, true_base, level) / cost_at(0.6 * costs, true_other, level))
    _, _, low, high, reached = speed_up_bounds(base, other, margin, 400, TARGET, 1)
    found = coverage(low, high, truth)
    print(f"S(a*) = {truth:.3f}: {found:.4f}, a* reached in {reached.mean():.3f} of the resampled cases")
    assert abs(found - TARGET) <= TOLERANCE


@pytest.mark.parametrize("total", [60, 374])
def test_wilson_covers_without_any_simulation(total: int) -> None:
    # Counts are few: their probabilities can be added up. For one accuracy the sum jumps with every count; over all
    # accuracies it is what it says.
    counts = np.arange(total + 1)
    bounds = [wilson(int(count), total) for count in counts]
    low, high = (np.array([getattr(one, side) for one in bounds]) for side in ("low", "high"))
    ways = np.array([math.lgamma(total + 1) - math.lgamma(n + 1) - math.lgamma(total - n + 1) for n in counts])
    accuracies = np.linspace(0.05, 0.95, 901)[:, None]
    chances = np.exp(ways + counts * np.log(accuracies) + (total - counts) * np.log(1 - accuracies))
    covered = (chances * ((low <= accuracies) & (accuracies <= high))).sum(axis=1)
    print(f"Wilson, {total} questions: {covered.mean():.4f} on average, {covered.min():.4f} at worst")
    assert abs(covered.mean() - TARGET) <= 0.005
    assert covered.min() >= TARGET - 0.03


def test_the_accuracy_of_repeated_questions_covers() -> None:
    columns, _ = simulated_accuracy(200, 4, 0.0, seed=21)
    found = [accuracy_interval(columns[:, place, :2]) for place in range(DATASETS)]
    low, high = np.array([one.low for one in found]), np.array([one.high for one in found])
    covered = coverage(low, high, 1.5 / 2.3)  # the mean of beta(1.5, 0.8)
    print(f"accuracy of 200 questions x 4: {covered:.4f}")
    assert abs(covered - TARGET) <= TOLERANCE


def simulated_verdicts(questions: int, discordant: float, difference: float, margin: float) -> dict[str, float]:
    """How often each verdict is given of arms with this true difference, B − A."""
    random = np.random.default_rng(questions)
    wins, losses = (discordant + difference) / 2, (discordant - difference) / 2
    counts = random.multinomial(questions, [wins, losses, 1 - wins - losses], size=DATASETS)
    place = np.arange(questions)[:, None]
    columns = np.ones((questions, DATASETS, 4))
    columns[..., 0] = place >= counts[:, 0]
    columns[..., 2] = (place < counts[:, 0]) | (place >= counts[:, 0] + counts[:, 1])
    estimate, low, high = difference_bounds(columns, draws=DRAWS)
    words = [verdict(Interval(*bounds), margin) for bounds in zip(estimate, low, high, strict=True)]
    return {word: words.count(word) / DATASETS for word in (BETTER, NON_INFERIOR, WORSE)}


# Stated: 2.5 % each. √(.025·.975/2,000) = 0.35 points of sampling error, twice; and counts are whole numbers.
STATED = 0.025 + 0.007 + 0.003


@pytest.mark.parametrize("discordant", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("questions", [100, 533])
def test_an_arm_at_the_margin_is_called_neither_non_inferior_nor_worse(questions: int, discordant: float) -> None:
    found = simulated_verdicts(questions, discordant, -0.02, margin=0.02)
    print(questions, discordant, found)
    assert found[BETTER] + found[NON_INFERIOR] <= STATED
    assert found[WORSE] <= STATED


@pytest.mark.parametrize(("questions", "discordant"), [(100, 0.02), (300, 0.1), (533, 0.2)])
def test_equal_arms_are_not_called_better(questions: int, discordant: float) -> None:
    found = simulated_verdicts(questions, discordant, 0.0, margin=0.02)
    print(questions, discordant, found)
    assert found[BETTER] <= STATED


def test_the_bootstrap_alone_would_call_arms_equal_of_which_it_knows_nothing() -> None:
    # B is 2 points worse than A on 100 questions: in an eighth of all cases none of them shows it.
    random = np.random.default_rng(2)
    columns = np.ones((100, DATASETS, 4))
    columns[..., 2] = np.arange(100)[:, None] >= random.binomial(100, 0.02, size=DATASETS)
    naive = float(np.mean(bootstrap(columns, difference_of_ratios, draws=DRAWS)[1] > -0.02))
    ours = float(np.mean(difference_bounds(columns, draws=DRAWS)[1] > -0.02))
    print(f"called non-inferior at the margin: bootstrap {naive:.4f}, ours {ours:.4f}")
    assert naive > 3 * STATED >= 3 * ours


def test_so_many_questions_find_the_difference_with_the_stated_power() -> None:
    size = questions_needed(0.2, 0.05)
    found = simulated_verdicts(size, 0.2, 0.05, margin=0.0)
    print(f"power of {size} questions: {found[BETTER]:.4f}")
    assert found[BETTER] == pytest.approx(0.8, abs=0.03)  # three standard errors of 0.9 points
