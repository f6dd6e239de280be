"""From clicks to the cells they mean, and pictures of them."""
