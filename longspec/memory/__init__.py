"""The memory plan: a run's memory by component, known before it starts."""
