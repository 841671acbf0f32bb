"""What is accepted is served right: random edits of every format give the reference's log-probabilities in vLLM."""

from __future__ import annotations

from pathlib import Path

import mutated_parity
import mutations
import pytest

NUM_EDITS = 3  # per format; `python tests/model_configs/test_mutations.py 5000` serves 33 of each


@pytest.mark.slow
def test_accepted_edits_of_every_format_have_the_references_log_probabilities(tmp_path: Path) -> None:
    served = mutated_parity.serve_edits(tmp_path, mutations.FORMATS, NUM_EDITS, "mutations")
    assert len(served) == NUM_EDITS * len(mutations.FORMATS)
    wrong = mutated_parity.unlike_reference(served)
    assert not wrong, "\n".join(wrong)
