"""Relevance through any transformer: what is captured of its attention, and the rules that carry relevance through."""
