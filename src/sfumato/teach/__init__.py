"""Systems that teach a model something new, or better habits."""
