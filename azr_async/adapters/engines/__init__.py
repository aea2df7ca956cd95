"""The engines of an inference worker, and what they share: prompts to tokens, and which jobs make sense."""
