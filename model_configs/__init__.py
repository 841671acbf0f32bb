"""Model descriptions: per-layer records, the readers of published formats, and the models that ship. No torch, no vLLM."""
