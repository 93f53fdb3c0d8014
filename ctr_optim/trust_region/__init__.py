"""The trust region: bound the KL divergence of a step, in nats per token."""
