"""The reasoning dial, pure: no vLLM, no HTTP. Any client's fields in, what to do with the model out."""
