"""Processes, devices, hooks and messages: helpers that every part of the package may use."""
