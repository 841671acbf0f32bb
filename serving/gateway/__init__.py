"""The dial as a gateway in front of any OpenAI-compatible server. No vLLM here."""
