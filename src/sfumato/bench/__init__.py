"""The bench: judging folders of pictures and models, comparing them, and reports with an interval on every figure."""
