"""The trained part of the user's model: LoRA pairs, the libraries that define them, and refusals."""
