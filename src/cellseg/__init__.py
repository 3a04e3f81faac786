"""Find cell nuclei in microscope images with a U-Net."""

__version__ = "0.1.0"
