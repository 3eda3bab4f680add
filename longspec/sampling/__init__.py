"""From logits to tokens: the fixed noise, the sampler, and the verification that is token equality."""
