"""From an image file to what the network sees: decoded, its channels chosen, normalised."""
