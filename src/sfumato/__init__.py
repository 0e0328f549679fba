"""Make, look inside, steer, teach, animate and judge generative image and video models."""

__version__ = "0.1.0"
