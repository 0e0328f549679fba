"""The command line in this process, as in tests/app."""

from tests.app.conftest import loaded_once, refused, sfumato, tiny_inpaint, tiny_sd  # noqa: F401
