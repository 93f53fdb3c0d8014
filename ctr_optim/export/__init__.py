"""Write adapters in formats that other programs read, and read saved adapters."""
