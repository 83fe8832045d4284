"""Many methods on one model, trained and measured alike, in one table."""
