"""A device without a model that checks content: any block read wrongly changes its tokens."""
