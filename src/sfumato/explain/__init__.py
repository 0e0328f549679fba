"""Look inside: systems that show why a model made what it made."""
