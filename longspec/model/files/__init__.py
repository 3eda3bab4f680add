"""Model lookup and storage: the Hugging Face hub, local folders, the pulled default model."""
