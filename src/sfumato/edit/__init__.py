"""Edit: systems that change a picture and keep the rest of it."""
