"""The embedded base model, its tokenizer, its held-out tasks, and the recipe that builds them."""
