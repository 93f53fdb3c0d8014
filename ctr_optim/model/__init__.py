"""The trained part of the user's model: LoRA layers, the libraries that define them, and checks of the set-up."""
