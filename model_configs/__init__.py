"""Model descriptions: per-layer records, the readers of published formats, the models that ship. Standard library."""
