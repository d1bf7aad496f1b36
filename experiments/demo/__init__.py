"""The demonstration, over several seeds."""
