"""How much to draft: which drafter, how many tokens, learned from what passes cost and drafts brought."""
