"""How far a step may move the model's predictions, in nats per token."""
