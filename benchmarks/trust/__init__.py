"""What holds over a long run."""
