"""What trains each kind of built-in model."""
