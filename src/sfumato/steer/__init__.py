"""Steer: systems that move generation towards what the prompt says while it runs."""
