"""Edit: systems that change pictures that exist."""
