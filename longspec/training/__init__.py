"""What trains a drafter for a target: its own texts, its hidden states, the training, and what came of it.

distil     prompts -> texts that the target writes, in a file that an interrupted run goes on with
features   texts -> the target's hidden states, computed when they are needed
train      a head, step by step, with checkpoints that give the same weights however often it was killed
report     how often each position is right, and tokens per step
"""
