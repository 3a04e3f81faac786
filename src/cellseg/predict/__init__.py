"""From images to nuclei, and from those to files."""
