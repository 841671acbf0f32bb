"""What is printed: the card and its ceilings, a block for each case, the table of goals, the README's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_puzzle.bench.kernel import plan
from vllm_puzzle.bench.kernel.cases import Case
from vllm_puzzle.bench.kernel.record import OURS, Row, read_csv

if TYPE_CHECKING:
    from vllm_puzzle.bench.kernel.card import Card, Ceilings

UNMEASURED = "not yet measured"


def case_list(cases: Sequence[Case]) -> str:
    """One line a case: name, least megabytes and GFLOP, goals."""
    width = max(len(case.name) for case in cases)
    lines = [f"{'case':<{width}} {'MB':>11} {'GFLOP':>11}  goals"]
    for case in cases:
        goals = " ".join(goal.title for goal in plan.goals_of(case))
        lines.append(f"{case.name:<{width}} {case.cost.num_bytes / 1e6:>11.3f} {case.cost.flops / 1e9:>11.3f}  {goals}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def heading(card: Card, ceilings: Ceilings) -> str:
    """The card, its versions and what it was measured to do at most."""
    fp8 = f"{ceilings.matmul_fp8 / 1e12:.0f}" if ceilings.matmul_fp8 else f"none ({ceilings.notes})"
    return (
        f"{card.name}, {card.memory_bytes / 2**30:.0f} GiB, L2 {card.l2_bytes / 2**20:.0f} MiB; "
        f"torch {card.torch}, triton {card.triton}, CUDA {card.cuda}, vLLM {card.vllm}; commit {card.commit}\n"
        f"measured ceilings: copy {ceilings.copy / 1e12:.3f} TB/s, read {ceilings.read / 1e12:.3f} TB/s, "
        f"bf16 matmul {ceilings.matmul_bf16 / 1e12:.0f} TFLOP/s, FP8 matmul {fp8} TFLOP/s\n"
    )


def case_block(rows: Sequence[Row]) -> str:
    """One case: our line first, then each baseline, also those without a number."""
    lines = [f"{rows[0].case}" + (f"  [{rows[0].goals}]" if rows[0].goals else "")]
    for row in rows:
        name = "ours" if row.implementation == OURS else row.implementation
        if row.p50_us is None:
            lines.append(f"  {name:<18} {row.status}: {row.reason}")
            continue
        parts = [f"{row.p50_us:>9.2f} µs ({row.p20_us:.2f} … {row.p80_us:.2f})"]
        if row.percent_of_limit is not None:
            parts.append(f"{row.percent_of_limit:5.1f} % of {row.limit}")
        parts.append(f"{row.gbytes_per_second:.0f} GB/s" if row.limit == "copy" else f"{row.tflops:.0f} TFLOP/s")
        parts += [f"{row.ratio:.2f}x ours"] if row.ratio is not None else []
        parts += [f"{row.launches} launches"] if row.launches is not None else []
        parts.append(f"error {row.error:.2g} of {row.bound:.2g}")
        parts += [row.config] if row.config else []
        lines.append(f"  {name:<18} " + "  ".join(parts))
    return "\n".join(lines)


def verdicts(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Each goal with its state over the rows of one card."""
    found = []
    for goal in plan.GOALS:
        verdict = goal.judge(rows)
        found.append(
            {
                "goal": goal.key,
                "promise": goal.promise,
                "what": goal.what,
                "required": goal.required,
                "status": verdict.status,
                "measured": verdict.text,
            }
        )
    return found


def goal_table(found: Sequence[dict[str, str]]) -> str:
    """One line a goal, and how many are met."""
    lines = ["", "goals"]
    for row in found:
        name = row["goal"] + (f" ({row['promise']})" if row["promise"] else "")
        lines.append(
            f"  {name:<11} {row['status']:<12} {row['what']}: {row['required']}; {row['measured']}".rstrip("; ")
        )
    counts = {status: sum(row["status"] == status for row in found) for status in ("met", "not met", "not measured")}
    return "\n".join([*lines, "  " + ", ".join(f"{count} {status}" for status, count in counts.items())])


def readme_table(folder: Path) -> list[str]:
    """Lines of the README's table: a row for each goal; measured as the files `kernels-*.csv` of `folder` say, those of
    one card and commit together.
    """
    recorded: dict[tuple[str, str], list[Row]] = {}
    for path in sorted(folder.glob("kernels-*.csv")):
        setting, rows = read_csv(path)
        recorded.setdefault((setting["name"], setting["commit"]), []).extend(rows)
    lines = ["| goal | case | required | measured |", "|---|---|---|---|"]
    for goal in plan.GOALS:
        cells = []
        for (card, commit), rows in recorded.items():
            verdict = goal.judge(rows)
            text = f"{verdict.status}: {verdict.text}" if verdict.text else verdict.status
            cells.append(f"{card}, {commit}: {text}")
        lines.append(f"| {goal.title} | {goal.what} | {goal.required} | {'; '.join(cells) or UNMEASURED} |")
    return lines


if __name__ == "__main__":
    print("\n".join(readme_table(Path(__file__).resolve().parent.parent / "results")))
