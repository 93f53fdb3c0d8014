"""What a step costs: time, memory, and where they go."""
