"""What each idea of the default policy is worth, and policies without them."""
