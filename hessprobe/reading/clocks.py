"""The clocks of a run beside its steps: what had been read, spent and computed at each step's end."""

CLOCKS = ("tokens", "line_search_tokens", "seconds", "probe_seconds", "gradient_equivalents")
