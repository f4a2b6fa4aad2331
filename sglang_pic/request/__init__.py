"""From what a user sends to the one internal form: token ids plus spans."""
