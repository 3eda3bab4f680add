"""What an answer is held to: a grammar, and a budget of reasoning tokens."""
