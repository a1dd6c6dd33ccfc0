"""The encoder, its prompts and its objectives."""
