"""Everything that meets vLLM: the plugin, the model class, the server, the reasoning switch."""
