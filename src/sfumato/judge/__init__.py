"""Judge: systems that compare sets of pictures."""
