"""``python -m sfumato`` is the command line."""

from sfumato.app.cli import main

main()
