"""`vllm-puzzle fuse`: which FFNs of a model to fuse, from what its blocks need of each other. No vLLM here."""
