"""What a run needs in memory, known before it starts."""
